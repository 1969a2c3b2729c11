"""``verify`` with a memory and with summaries, as the program does it."""

import json
import os
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from vmgraft.cli import app
from vmgraft.inspect import verdict
from vmgraft.signing.keyfiles import write_keypair
from vmgraft.signing.keys import generate
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policysign import sign_policy
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.signing.state import Ran, RollbackState, create_state
from vmgraft.signing.statefile import default_path
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import Package

ME = "https://audit.example/vmgraft"
LATER = datetime(2026, 11, 22, 15, 0, 0, tzinfo=UTC)


class Desk:
    """An image, its policy and an auditor's key, and the program."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.image, self.policy, self.capsys = folder / "disk.img", folder / "policy.json", capsys
        self.image.write_bytes(bytes(range(256)) * 4096)
        manifest = {"id": "com.acme.clock", "version": "1.4", "securityVersion": 3, "abi": "vmgraft/1",
                    "capabilities": []}  # fmt: skip
        data = canonical_manifest(manifest)
        self.vendor, self.auditor = generate("p256"), generate("ed25519")
        attach(self.image, [Package("com.acme.clock", "1.4", data, None)], [self.vendor], AttachOptions())
        self.plain = format_policy(init_policy({"acme": self.vendor.public}, [parse_manifest(data)]))
        self.policy.write_bytes(self.plain)
        for name, key in (("vendor", self.vendor), ("auditor", self.auditor)):
            write_keypair(folder / name, key, None)
        self.key, self.public = folder / "auditor.key", folder / "auditor.pub"
        self.summary, self.state = folder / "summary.json", folder / "state.db"

    def verify(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        command = ["verify", self.image, "--policy", self.policy, "--json", *arguments]
        with pytest.raises(SystemExit) as ended:
            app.run([str(part) for part in command])
        said = self.capsys.readouterr()
        document: dict[str, Any] = json.loads(said.out)
        assert ended.value.code == document["exitCode"] == code, said
        return document

    def emit(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        return self.verify(
            "--emit-vsa", self.summary, "--vsa-key", self.key, "--verifier-id", ME, *arguments, code=code
        )


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


# --- a memory


def test_an_auditor_compares_only_when_told_to(desk: Desk) -> None:
    default = default_path()
    create_state(default)
    create_state(desk.state)
    for path in (default, desk.state):
        with RollbackState(path) as memory:
            memory.raise_to("default", [Ran("com.acme.clock", 4, 1)], statement="ab" * 32, when=LATER)
    desk.verify()
    before = desk.state.read_bytes()
    report = desk.verify("--state", desk.state, code=16)
    assert report["error"]["field"] == "rollback"
    assert "4 was accepted here before" in report["error"]["message"]
    assert "state reset default com.acme.clock" in report["error"]["hint"]
    assert desk.state.read_bytes() == before


def test_a_memory_that_is_not_there_is_not_made(desk: Desk) -> None:
    assert desk.verify("--state", desk.state, code=18)["error"]["code"] == "state-invalid"
    assert not desk.state.exists()


def test_a_pinned_key_holds_for_the_auditor_too(desk: Desk) -> None:
    create_state(desk.state)
    with RollbackState(desk.state) as memory:
        memory.pin(desk.auditor.public, when=LATER)
    desk.verify("--state", desk.state, code=18)
    desk.policy.write_bytes(sign_policy(desk.plain, [desk.auditor]))
    desk.verify("--state", desk.state)
    desk.verify("--policy-key", desk.public)
    desk.verify("--policy-key", desk.public.with_name("vendor.pub"), code=18)
    desk.verify(code=18)
    desk.policy.write_bytes(desk.plain)
    desk.verify("--require-signed-policy", code=18)


def test_who_signed_is_said(desk: Desk) -> None:
    assert desk.verify()["signerNames"] == {desk.vendor.keyid: "acme"}
    with pytest.raises(SystemExit):
        app.run(["verify", str(desk.image), "--policy", str(desk.policy)])
    assert f"      signer        {desk.vendor.keyid} (acme)\n" in desk.capsys.readouterr().out


def test_a_memory_that_cannot_change_serves_who_only_reads(desk: Desk) -> None:
    """An auditor compares with it; a host that could not raise it does not start."""
    create_state(desk.state)
    fix = ["chattr", "+i", str(desk.state)]
    if os.getuid() != 0 or subprocess.run(fix, capture_output=True, check=False).returncode:
        pytest.skip("needs root, and a file system with chattr +i")
    try:
        desk.verify("--state", desk.state)
        with pytest.raises(SystemExit) as ended:
            command = ["run", desk.image, "--policy", desk.policy, "--state", desk.state, "--json"]
            app.run([str(part) for part in command])
        document = json.loads(desk.capsys.readouterr().out)
        assert ended.value.code == 18 and document["error"]["code"] == "state-invalid"
        assert "cannot be opened or written" in document["error"]["message"]
    finally:
        subprocess.run(["chattr", "-i", str(desk.state)], check=True)


# --- summaries


def test_a_summary_is_made_and_relied_on(desk: Desk) -> None:
    made = desk.emit()
    assert made["signers"] == [desk.vendor.keyid]
    report = desk.verify("--vsa", desk.summary, "--vsa-trust", desk.public)
    assert report["signers"] == []
    checks = {check["name"]: check for check in report["checks"]}
    assert desk.auditor.keyid in checks["signature"]["detail"]
    desk.verify("--vsa", desk.summary, code=11)
    desk.verify("--vsa", desk.summary, "--vsa-trust", desk.public.with_name("vendor.pub"), code=11)
    desk.policy.write_bytes(desk.plain + b"\n")
    report = desk.verify("--vsa", desk.summary, "--vsa-trust", desk.public, code=11)
    assert "another policy" in report["error"]["message"]


def test_a_changed_guest_is_found_whatever_the_auditor_said(desk: Desk) -> None:
    desk.emit()
    with desk.image.open("r+b") as image:
        image.seek(70_000)
        image.write(b"!")
    report = desk.verify("--vsa", desk.summary, "--vsa-trust", desk.public, code=12)
    assert report["error"]["field"] == "content"


def test_a_failed_verification_is_summed_up_and_still_fails(desk: Desk) -> None:
    with desk.image.open("r+b") as image:
        image.seek(70_000)
        image.write(b"!")
    desk.emit(code=12)
    report = desk.verify("--vsa", desk.summary, "--vsa-trust", desk.public, code=11)
    assert "the auditor refused this image" in report["error"]["message"]


def test_summaries_are_never_overwritten(desk: Desk) -> None:
    desk.summary.write_bytes(b"mine")
    assert desk.emit(code=3)["error"]["file"] == str(desk.summary)
    assert desk.summary.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--emit-vsa", "new"),
        ("--emit-vsa", "new", "--vsa-key", "KEY"),
        ("--emit-vsa", "new", "--vsa-key", "KEY", "--verifier-id", "nobody"),
        ("--emit-vsa", "new", "--vsa-key", "KEY", "--verifier-id", ME, "--vsa", "KEY"),
        ("--vsa-key", "KEY"),
        ("--verifier-id", ME),
        ("--vsa-trust", "KEY"),
        ("--vsa-max-age", "7d"),
        ("--vsa", "KEY", "--vsa-max-age", "7"),
        ("--vsa", "KEY", "--vsa-max-age", "0d"),
        ("--vsa", "KEY", "--vsa-max-age", "-1d"),
    ],
)
def test_wrong_command_lines(desk: Desk, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.image.parent)
    desk.verify(*(str(desk.key) if part == "KEY" else part for part in arguments), code=2)
    assert not (desk.image.parent / "new").exists()


@pytest.mark.parametrize(("age", "code"), [("1s", 14), ("10s", 14), ("1h", 0)])
def test_how_old_a_summary_may_be(desk: Desk, monkeypatch: pytest.MonkeyPatch, age: str, code: int) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(minutes=1)

    with monkeypatch.context() as patch:
        patch.setattr(verdict, "datetime", Earlier)
        desk.emit()
    desk.verify("--vsa", desk.summary, "--vsa-trust", desk.public, "--vsa-max-age", age, code=code)


# --- the pages


def documented() -> list[str]:
    found = []
    for name in ("state.md", "vsa.md"):
        text = (Path(__file__).parents[2] / "docs" / name).read_text().replace("\\\n", " ")
        found += [line.partition("#")[0] for line in text.splitlines() if line.startswith("vmgraft ")]
    return found


@pytest.mark.parametrize("line", documented())
def test_every_command_in_the_pages_is_one(line: str) -> None:
    _, *words = shlex.split(line)
    command: click.Command | None = app.cli
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words.pop(0))
    assert command is not None
    with command.make_context("vmgraft", words) as context:
        assert context.params
    assert not context.args
