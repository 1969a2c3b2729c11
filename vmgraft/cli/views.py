"""How reports look to people: trees and check lists. Text from a file is made printable, and marked as unverified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from vmgraft.cli.exitcodes import exit_code
from vmgraft.cli.output import human_size, printable, show_warnings
from vmgraft.signing.contract import Report, Status
from vmgraft.signing.report import deciding_check, report_document
from vmgraft.words import counted

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import ContentDigest, Opening

_MARKS: Final = {Status.PASS: ("ok", "green"), Status.FAIL: ("FAIL", "red"), Status.WARN: ("warn", "yellow"),
                 Status.SKIP: ("skip", "bright_black")}  # fmt: skip
#: Put before every line that only repeats what the file claims.
UNVERIFIED: Final = "?"
#: Lines that one extension's supplements get; a sound manifest has no more of them.
_MAX_SUPPLEMENTS: Final = 16


def verdict_document(report: Report, image: Path) -> dict[str, Any]:
    """Return the JSON object of ``verify`` and of ``run``, as schema ``report`` describes it."""
    return {"ok": report.ok, "exitCode": exit_code(report.error), "image": str(image), **report_document(report)}


def show_report(report: Report, image: Path) -> None:
    """Print a verdict: one line a check, then one line for all."""
    for check in report.checks:
        mark, color = _MARKS[check.status]
        click.echo(f"{click.style(f'{mark:>4}', fg=color)}  {check.name:<13} {printable(check.detail)}")
    for warning in report.warnings:
        click.echo(f"{click.style('warn', fg='yellow')}  {printable(warning)}")
    for signer in _signers(report):
        click.echo(f"{'':>4}  {'signer':<13} {printable(signer)}")
    if report.ok:
        names = ", ".join(f"{item.id} {item.version}" for item in report.extensions) or "no extension"
        good = click.style("trusted", fg="green", bold=True)
        click.echo(f"{good}  {printable(str(image))}: {names} (policy {report.policy})")
        return
    click.echo(f"{click.style('refused', fg='red', bold=True)}  {printable(str(image))}: {report.error}")
    failed = deciding_check(report)
    if failed is not None and failed.hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {printable(failed.hint)}", err=True)


def _signers(report: Report) -> list[str]:
    """Say who signed, of those whom the policy trusts: the key and its name there, or who is certified, and by whom."""
    names = dict(report.named)
    certified = {item.keyid for item in report.certified}
    lines = [
        f"{keyid} ({names[keyid]})" if keyid in names else keyid
        for keyid in report.signers
        if keyid in names or keyid not in certified
    ]
    for item in report.certified:
        line = f"{item.keyid}, {_text(item.subject)}, certified by ca:{item.authority}"
        if item.timestamp is not None:
            line += f", timestamped {item.timestamp} by tsa:{item.timestamp_authority}"
        lines.append(line)
    return lines


def show_list(listing: dict[str, Any]) -> None:
    """Print one line an extension."""
    for entry in listing["unverified"]["extensions"]:
        if "error" in entry:
            click.echo(f"{UNVERIFIED} a manifest that cannot be read: {_text(entry['error'])}")
            continue
        claims = entry["capabilities"] if isinstance(entry["capabilities"], list) else [entry["capabilities"]]
        capabilities = ", ".join(_text(claim) for claim in claims if claim is not None)
        click.echo(f"{UNVERIFIED} {_text(entry['id'])} {_text(entry['version'])}  [{_text(capabilities)}]")
        supplements = entry["supplements"]
        for item in supplements[:_MAX_SUPPLEMENTS] if isinstance(supplements, list) else []:
            click.echo(f"{UNVERIFIED}   supplement {_supplement(item)}")
    beside = f" ({printable(listing['recordFile'])})" if listing["recordFile"] else ""
    why = f" ({printable(listing['detail'])})" if listing["detail"] else ""
    click.echo(
        f"state: {listing['state']}{why}, placement: {listing['unverified']['placement']}{beside}. Nothing above is "
        "verified.",
        err=True,
    )


def _supplement(item: Any) -> str:
    """Say what a supplement claims to be; it may be anything."""
    if not isinstance(item, dict):
        return _text(item)
    words = [_text(item.get("kind"))]
    words += [f"{name} {_text(item[name])}" for name in ("label", "drive", "offset", "file", "root") if name in item]
    files = item.get("files")
    return " ".join([*words, f"({counted(len(files), 'file')})"] if isinstance(files, list) else words)


def show_inspection(report: dict[str, Any]) -> None:
    """Print the tree of ``inspect``: measured facts plain, claims with a question mark."""
    image, graft, claims = report["image"], report["graft"], report["unverified"]
    click.echo(click.style(printable(image["path"]), bold=True))
    click.echo(f"├─ format {image['format']}, file size {image['fileSize']} ({human_size(image['fileSize'])})")
    click.echo(f"├─ {UNVERIFIED} guest size {claims['virtualSize']} ({human_size(claims['virtualSize'])})")
    for item in claims["backingChain"]:
        click.echo(f"├─ {UNVERIFIED} backing file {printable(item)}")
    if claims["backingProblem"] is not None:
        click.echo(f"├─ {UNVERIFIED} backing file: {_text(claims['backingProblem'])}")
    if graft["state"] == "none":
        click.echo(f"├─ room for an inline record: {image['room']['inline']} bytes ({image['room']['reason']})")
    click.echo("├─ container")
    _branch(claims["container"], "│  ")
    _show_partitions(claims["partitions"])
    click.echo(f"└─ graft: {graft['state']}" + (f" ({printable(graft['detail'])})" if graft["detail"] else ""))
    if graft["recordFile"]:
        click.echo(f"   ├─ record file {printable(graft['recordFile'])}")
    for name in ("locator", "formatProblem", "sections", "envelopes", "manifests", "hints"):
        if claims.get(name):
            click.echo(f"   ├─ {name}")
            _branch(claims[name], "   │  ")
    click.echo(f"Lines with {UNVERIFIED} repeat what the file claims; `vmgraft verify` decides.", err=True)


def _show_partitions(table: dict[str, Any] | None) -> None:
    """Print the partition tables of a disk, one line a partition."""
    if table is None or (table["scheme"] == "none" and not table["problems"]):
        return
    click.echo(f"├─ {UNVERIFIED} partition table: {table['scheme']} {_text(table['diskId'])}".rstrip())
    tables = [("", table), *((name, table[name]) for name in ("mbr", "apm") if name in table)]
    for label, part in ((label, part) for label, listed in tables for part in listed["partitions"]):
        words = [label, f"{part['number']}:", human_size(part["size"]), f"at {part['start']},"]
        words += [_text(part["typeName"] or part["type"]), _text(part["name"])]
        click.echo(f"│  {UNVERIFIED} " + " ".join(word for word in words if word))
    for problem in table["problems"]:
        click.echo(f"│  {UNVERIFIED} {click.style(_text(problem), fg='yellow')}")


def digest_document(result: ContentDigest, opening: Opening, warnings: list[str]) -> dict[str, Any]:
    """Return the JSON object of ``digest``."""
    snapshot = opening.snapshot
    if snapshot is not None:
        snapshot = snapshot.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return {
        "virtualSize": result.virtual_size,
        "content": "ciphertext" if opening.ciphertext else "guest",
        "snapshot": snapshot,
        "tree": {
            "digest": result.tree_digest.hex(),
            "rootHash": result.root_hash.hex(),
            "blockSize": result.block_size,
        },
        "sha256": None if result.flat is None else result.flat.hex(),
        "warnings": warnings,
    }


def show_digest(document: dict[str, Any]) -> None:
    """Print the digests of a content, and which content it is where that is not the guest's current one."""
    if document["content"] == "ciphertext":
        click.echo("content      ciphertext as stored, not what the guest sees")
    if document["snapshot"] is not None:
        click.echo(f"snapshot     {_text(document['snapshot'])}")
    click.echo(f"size         {document['virtualSize']} ({human_size(document['virtualSize'])})")
    click.echo(f"tree digest  {document['tree']['digest']}")
    click.echo(f"root hash    {document['tree']['rootHash']}")
    click.echo(f"sha256       {document['sha256'] or 'not computed (--flat-digest always)'}")
    show_warnings(document["warnings"])


def _branch(value: Any, indent: str) -> None:
    """Print nested claims, one a line."""
    if isinstance(value, dict):
        for key, item in value.items():
            _leaf(f"{_text(key)}", item, indent)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _leaf(f"[{number}]", item, indent)
    else:
        click.echo(f"{indent}{UNVERIFIED} {_word(value)}")


def _leaf(label: str, item: Any, indent: str) -> None:
    """Print a claim, or a label with its claims below."""
    if isinstance(item, (dict, list)) and item:
        click.echo(f"{indent}{UNVERIFIED} {label}")
        _branch(item, indent + "  ")
    else:
        click.echo(f"{indent}{UNVERIFIED} {label}: {_word(item)}")


def _word(value: Any) -> str:
    """Return a claim as people read it: no Python words."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return "-" if value in ([], {}) else _text(value)


def _text(value: Any) -> str:
    """Return untrusted text for one line of a terminal, cut to a sane length."""
    text = printable(str(value))
    return text if len(text) <= 160 else text[:157] + "..."
