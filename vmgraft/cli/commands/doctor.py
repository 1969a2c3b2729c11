"""``vmgraft doctor``."""

from __future__ import annotations

import click

from vmgraft.cli.options import json_option

#: What a program is for, and how to get it.
_NEEDED = {
    "qemu-system-x86_64": "for --engine qemu; Debian: apt install qemu-system-x86",
    "seabios": "for --firmware seabios; Debian: apt install seabios",
}


@click.command(epilog="Example: vmgraft doctor --json")
@json_option
def doctor(as_json: bool) -> int:
    """Say what this machine can do: CPU engines, sandbox, packages, programs. Exit 20 when `run` cannot work here."""
    from vmgraft.cli.exitcodes import exit_code
    from vmgraft.cli.output import emit_json, printable
    from vmgraft.errors import HostError
    from vmgraft.vmmhost.doctor import examine

    found = examine()
    code = exit_code(None if found["ready"] else HostError.code)
    if as_json:
        error = HostError("`vmgraft run` cannot work on this machine", hint="see engines and sandbox").to_dict()
        emit_json({"ok": code == 0, "exitCode": code, **({"error": error} if code else {}), **found})
        return code
    for engine in found["engines"]:
        click.echo(f"{_mark(engine['usable'])}  engine {engine['name']:5} {engine['reason']}")
    sandbox = found["sandbox"]
    text = f"isolation level {sandbox['level']}: {', '.join(sandbox['mechanisms'])}"
    click.echo(f"{_mark(sandbox['works'])}  sandbox      {text if sandbox['works'] else sandbox['reason']}")
    for name, version in found["packages"].items():
        hint = "not installed (pip install 'vmgraft[soft]')" if name == "unicorn" else "not installed"
        if name in found["broken"]:
            hint = printable(f"broken: {found['broken'][name]}")
        click.echo(f"{_mark(version is not None)}  package {name:13} {version or hint}")
    for name, path in found["programs"].items():
        click.echo(f"{_mark(path is not None)}  {name:21} {printable(path or f'not installed ({_NEEDED[name]})')}")
    return code


def _mark(good: bool) -> str:
    """Return the mark in front of a line."""
    return click.style("ok", fg="green") if good else click.style("--", fg="yellow")
