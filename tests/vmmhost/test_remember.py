"""What a run remembers: only what got ready, before the guest runs, and never less than before."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import ExtensionFaultError, PolicyError, RollbackError, StateError
from vmgraft.signing.keyfiles import write_keypair
from vmgraft.signing.keys import generate
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policysign import sign_policy
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.signing.state import Ran, RollbackState, create_state
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import Package
from vmgraft.vmmhost import launch, remember
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.plan import RunOptions

CULPRIT = "org.example.culprit"
NEVER_READY = '(func (export "on_start") (param i32) (result i32) (i32.const 7))'


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "memory" / "state.db"


def launcher(studio, state: Path | None, **chosen: Any) -> Launcher:
    studio.audit_log.unlink(missing_ok=True)
    options = RunOptions(**({"cpu": "soft", "timeout": 60, "audit_log": studio.audit_log, "state": state} | chosen))
    return Launcher(studio.image, studio.policy, options)


def graft(studio, version: int, body: str | None = None, **fields: Any) -> None:
    studio.graft(studio.wat(body or studio.ONES), securityVersion=version, **fields)
    change_policy(studio, minSecurityVersion={})


def change_policy(studio, **members: Any) -> None:
    document = json.loads(studio.policy.read_text())
    document["trustPolicies"][0].update(members)
    studio.policy.write_text(json.dumps(document))


def known(state: Path) -> int | None:
    with RollbackState(state) as memory:
        return memory.highest("default", CULPRIT)


def raised(report: RunReport) -> list[int]:
    assert report.memory is not None
    return [seen["securityVersion"] for seen in report.memory["raised"]]


def test_what_ran_is_remembered_and_what_is_older_refused(studio, state: Path) -> None:
    graft(studio, 4)
    report = launcher(studio, state).run()
    assert report.error is None
    assert (raised(report), report.memory["created"], known(state)) == ([4], True, 4)
    events = [record["event"] for record in studio.log()]
    assert events.index("extension-start") < events.index("remember") < events.index("boot")
    again = launcher(studio, state).run()
    assert (raised(again), again.memory["created"]) == ([], False)
    graft(studio, 3)
    report = launcher(studio, state).run()
    assert (report.error, report.plan, known(state)) == ("rollback", None, 4)
    assert [record["event"] for record in studio.log()] == ["start", "verification", "error"]
    assert launcher(studio, None).run().error is None
    assert launcher(studio, state.with_name("other.db")).run().error is None


def test_a_dry_run_compares_and_leaves_no_trace(studio, state: Path) -> None:
    graft(studio, 4)
    assert launcher(studio, state).plan().plan is not None
    assert not state.parent.exists()
    launcher(studio, state).run()
    before = state.read_bytes()
    graft(studio, 9)
    assert launcher(studio, state).plan().plan is not None
    graft(studio, 3)
    assert launcher(studio, state).plan().error == "rollback"
    assert state.read_bytes() == before


@pytest.mark.parametrize("on_fault", ["stop", "detach"])
def test_what_never_got_ready_is_not_remembered(studio, state: Path, on_fault: str) -> None:
    """A release that fails at its start must not lock out the one that works."""
    graft(studio, 9, NEVER_READY, onFault=on_fault)
    if on_fault == "detach":
        assert raised(launcher(studio, state).run()) == []
    else:
        with pytest.raises(ExtensionFaultError):
            launcher(studio, state).run()
    assert known(state) is None
    graft(studio, 3)
    assert raised(launcher(studio, state).run()) == [3]


def test_without_extensions_nothing_ran(studio, state: Path) -> None:
    graft(studio, 4)
    report = launcher(studio, state, extensions=False).run()
    assert (report.error, raised(report), known(state)) == (None, [], None)


def test_an_extension_without_a_module_is_ready_at_once(studio, state: Path) -> None:
    manifest = {"id": CULPRIT, "version": "1.0", "securityVersion": 4, "abi": "vmgraft/1", "capabilities": []}
    data = canonical_manifest(manifest)
    studio.image.write_bytes(studio.guest.ljust(1 << 20, b"\0"))
    attach(studio.image, [Package(CULPRIT, "1.0", data, None)], [studio.key], AttachOptions())
    studio.policy.write_bytes(format_policy(init_policy({"vendor": studio.key.public}, [parse_manifest(data)])))
    assert raised(launcher(studio, state).run()) == [4]


@pytest.mark.parametrize(("level", "minimum", "remembered"), [("strict", 4, [4]), ("permissive", 5, [])])
def test_what_was_only_let_pass_teaches_nothing(studio, state: Path, level, minimum, remembered) -> None:
    graft(studio, 4)
    change_policy(studio, signatureVerification={"level": level}, minSecurityVersion={CULPRIT: minimum})
    report = launcher(studio, state).run()
    assert report.error is None
    assert raised(report) == remembered


def test_a_newer_one_gets_ready_in_the_meantime(studio, state: Path, monkeypatch) -> None:
    graft(studio, 4)
    real = remember.RunMemory.remember

    def late(self, *arguments: Any) -> None:
        with RollbackState(state) as other:
            other.raise_to("default", [Ran(CULPRIT, 6, 1)], statement="cd" * 32, when=launch.datetime.now(launch.UTC))
        real(self, *arguments)

    monkeypatch.setattr(remember.RunMemory, "remember", late)
    with pytest.raises(RollbackError, match="security version 4, and 6 has run"):
        launcher(studio, state).run()
    assert known(state) == 6
    assert [record["event"] for record in studio.log()][-1] == "error"


def test_a_kill_before_the_mark_and_after_it(studio, state: Path) -> None:
    """Killed just before it is raised: the old number. Just after, before the guest runs: the new one."""
    graft(studio, 4)
    for when, expected in (("before", None), ("after", 4)):
        script = (
            "import sys, os, signal; from pathlib import Path\n"
            "from vmgraft.vmmhost import remember; from vmgraft.vmmhost.launch import Launcher\n"
            "from vmgraft.vmmhost.plan import RunOptions\n"
            "real = remember.RunMemory.remember\n"
            "def killed(self, *arguments):\n"
            "    if sys.argv[4] == 'after': real(self, *arguments)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "remember.RunMemory.remember = killed\n"
            "Launcher(Path(sys.argv[1]), Path(sys.argv[2]), RunOptions(cpu='soft', state=Path(sys.argv[3]))).run()\n"
        )
        command = [sys.executable, "-c", script, studio.image, studio.policy, state, when]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert known(state) == expected


def test_a_memory_that_cannot_be_used_ends_the_run_first(studio, state: Path, monkeypatch) -> None:
    graft(studio, 4)
    monkeypatch.setattr(launch, "open_image", None)
    state.parent.mkdir(mode=0o700)
    state.write_bytes(b"")
    state.chmod(0o600)
    for attempt in ("plan", "run"):
        with pytest.raises(StateError, match="what it remembered is lost"):
            getattr(launcher(studio, state), attempt)()
    assert not studio.audit_log.exists()


def test_a_policy_that_counts_on_a_memory_does_not_begin_one(studio, state: Path) -> None:
    graft(studio, 4)
    change_policy(studio, rollbackState="required")
    for attempt in ("plan", "run"):
        with pytest.raises(StateError, match="there is no rollback memory, and default in the policy demands one"):
            getattr(launcher(studio, state), attempt)()
    assert not state.exists()
    assert launcher(studio, None).run().error == "rollback"
    create_state(state)
    assert raised(launcher(studio, state).run()) == [4]


def test_a_signed_policy_is_remembered_too(studio, state: Path, tmp_path: Path) -> None:
    graft(studio, 4)
    key, plain = generate("p256"), studio.policy.read_bytes()

    def wrap(version: int) -> None:
        document = json.loads(plain) | {"policyVersion": version}
        studio.policy.write_bytes(sign_policy(json.dumps(document).encode(), [key]))

    def run(**chosen: Any) -> str | None:
        return launcher(studio, state, **chosen).run().error

    wrap(5)
    assert run(policy_keys=(key.public,)) is None
    wrap(4)
    for attempt in ("plan", "run"):
        with pytest.raises(PolicyError, match="policy version 4 is older than 5"):
            getattr(launcher(studio, state, policy_keys=(key.public,)), attempt)()
    with RollbackState(state) as memory:
        memory.pin(key.public, when=launch.datetime.now(launch.UTC))
    wrap(6)
    assert run() is None
    studio.policy.write_bytes(plain)
    with pytest.raises(PolicyError, match="not signed"):
        run()
    with pytest.raises(PolicyError, match="not signed"):
        launcher(studio, None, signed_policy=True).run()


# --- the program


def program(studio, *arguments: object, code: int = 0) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "vmgraft", "run", studio.image, "--policy", studio.policy, "--cpu", "soft"]
    done = subprocess.run([*command, "--json", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_program_remembers_unless_told_not_to(studio, tmp_path: Path) -> None:
    """Also once it has given up its rights: the memory is closed by then."""
    home = Path(os.environ["XDG_STATE_HOME"]) / "vmgraft"
    graft(studio, 4)
    report, _ = program(studio, "--state", "none")
    assert report["memory"] is None
    assert not home.exists()
    report, _ = program(studio)
    assert report["memory"]["file"] == str(home / "state.db")
    assert [item.name for item in home.iterdir()] == ["state.db"], "closed, and its log folded back"
    assert known(home / "state.db") == 4
    graft(studio, 3)
    report, _ = program(studio, code=16)
    assert report["error"]["field"] == "rollback"
    program(studio, "--state", tmp_path / "mine" / "state.db")
    assert known(tmp_path / "mine" / "state.db") == 3
    (home / "state.db").chmod(0o644)
    report, _ = program(studio, code=18)
    assert report["error"]["code"] == "state-invalid"
    write_keypair(tmp_path / "fleet", generate("p256"), None)
    report, _ = program(studio, "--state", "none", "--policy-key", tmp_path / "fleet.pub", code=18)
    assert report["error"]["code"] == "policy-invalid"
