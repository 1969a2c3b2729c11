"""Every malformed input ends in one clear error or state, in bounded time and memory, and nothing is written to it."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpus_all import MODULES, all_cases
from corpus_model import Case, index_of, write_case
from corpus_probe import MAX_MIB, MAX_SECONDS, in_child, measured, probe, warm_up

import vmgraft.errors
from vmgraft.cli.exitcodes import exit_code
from vmgraft.imagefmt.registry import format_names

CASES = all_cases()
PROGRAM = Path(sys.executable).with_name("vmgraft")
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that trusts somebody, so that `verify` gets as far as the image."""
    folder = tmp_path_factory.mktemp("policy")
    for arguments in (
        ["keygen", "acme", "--no-passphrase"],
        ["policy", "init", "--trust", "acme.pub", "-o", "policy.json"],
    ):
        subprocess.run([PROGRAM, *arguments], cwd=folder, check=True, capture_output=True)
    return folder / "policy.json"


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> None:
    """Import what is imported on use once, so that children measure their input."""
    folder = tmp_path_factory.mktemp("warm")
    for module in MODULES:
        for name, data in module.samples().items():
            (folder / name).write_bytes(data)
            warm_up(folder / name, policy)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page of this process


def check_cost(seen: dict[str, Any], *seconds: float) -> None:
    """Hold one use, or each of several, to the limits."""
    assert "crash" not in seen, seen["crash"]
    assert max(seconds or (seen["seconds"],)) < MAX_SECONDS
    assert seen["mib"] < MAX_MIB


def check_error(error: dict[str, Any], case: Case, path: Path) -> None:
    """An error names itself well: its class is one of ours, it is about this case's files, and says one thing."""
    assert issubclass(getattr(vmgraft.errors, error["class"]), vmgraft.errors.VmgraftError)
    assert error["message"]
    assert len(error["message"]) < 4096
    assert error["file"]
    assert Path(error["file"]).parent == path.parent or "/" in error["file"]
    assert error["offset"] is None or 0 <= error["offset"] < 1 << 64
    if error["class"] == "MalformedImageError":
        assert error["field"] or error["offset"] is not None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, tmp_path: Path, policy: Path) -> None:
    """What the library says, what the program says, and what trying to write to it does."""
    path = write_case(case, tmp_path)
    seen = probe(path, policy)
    assert "crash" not in seen, seen["crash"]
    check_reader(seen["reader"], case, path)
    check_program(seen["program"], case, path)
    check_writer(seen["writer"], case, path)


def check_reader(seen: dict[str, Any], case: Case, path: Path) -> None:
    check_cost(seen)
    wanted, errors = case.expect, seen["errors"]
    for error in errors.values():
        check_error(error, case, path)
    if wanted.error is not None:
        error = errors[wanted.stage]
        assert error["class"] == wanted.error
        assert wanted.field is None or (error["field"] or "").startswith(wanted.field)
        assert wanted.message in error["text"]
    if wanted.stage == "open":
        assert list(errors) == ["open"]
        return
    assert (seen["state"], wanted.detail in seen["detail"]) == (wanted.state, True), seen["detail"]
    assert wanted.problem is None or wanted.problem in seen["problem"]
    assert wanted.fact in json.dumps(seen["metadata"])
    assert not wanted.snapshot or wanted.snapshot in seen["snapshots"][0]
    if wanted.stage == "sound":
        assert errors == {}
        assert seen["covered"] == seen["virtualSize"]
    else:
        assert seen["digest"] is None  # what cannot be read whole has no name


def check_program(seen: dict[str, Any], case: Case, path: Path) -> None:
    """`inspect`, `list`, `digest` and `verify`: the documented exit code and one JSON object."""
    check_cost(seen, *(shown["seconds"] for shown in seen.values() if isinstance(shown, dict)))
    code = None if case.expect.error is None else getattr(vmgraft.errors, case.expect.error).code
    if path.is_dir():
        code = "usage"  # the command line itself asks for a file
    opens, ungrafted = case.expect.stage != "open", case.expect.state in ("none", "orphaned")
    for name in ("inspect", "list", "digest", "verify"):
        shown = seen[name]
        assert shown["err"] == "" or name == "digest", shown["err"]
        assert shown["out"]["exitCode"] == shown["code"]
        assert shown["out"]["ok"] is (shown["code"] == 0)
        if not opens:
            assert shown["code"] == exit_code(code)
            assert shown["code"] in (2, 3)
            assert shown["out"]["error"]["code"] == code
    if opens:
        assert seen["digest"]["code"] == exit_code(code)
        if case.expect.stage == "sound":
            assert seen["inspect"]["out"]["graft"]["state"] == case.expect.state
            assert seen["list"]["code"] == (4 if case.expect.state == "none" else 0)
        # Nothing here is signed by anybody, so whatever it looks like, it never passes.
        assert seen["verify"]["code"] in ((4, 3) if ungrafted else (3, 5, 10, 11)), seen["verify"]["out"]


def check_writer(seen: dict[str, Any], case: Case, path: Path) -> None:
    """Detach and attach leave a file that they refuse as it is, and one that they accept comes back."""
    check_cost(seen, seen.get("longest", 0.0))
    if seen["detach"] is not None:
        assert seen["afterDetach"] == seen["before"], seen["detach"]
        check_error(seen["detach"], case, path)
    if case.expect.stage == "open":
        assert seen["detach"] is not None
        assert seen["detach"]["class"] == case.expect.error
    if case.expect.state == "none":
        assert seen["detach"] is not None
    for placement, since in (("auto", "afterDetach"), ("sidecar", "after-auto")):
        assert seen["after-" + placement] == seen[since], (placement, seen[placement])
        if seen[placement] is not None:
            check_error(seen[placement], case, path)


SAMPLE = [
    case
    for case in CASES
    if case.name
    in {
        "qcow2/l1-32-gib",
        "qcow2/8-pib-of-hole",
        "qcow2/bit-with-evil-name",
        "iso/names-not-ascii",
        "record/ratio",
        "sidecar/fifo",
        "raw/ebr-9000",
        "undo/patches-2-32",
    }
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_the_installed_program(case: Case, tmp_path: Path) -> None:
    """As a user runs it, with 256 MiB and 2 s of CPU in all: one line of error without terminal control."""
    path = write_case(case, tmp_path)
    limits = ["prlimit", f"--data={MAX_MIB << 20}", f"--cpu={MAX_SECONDS:.0f}"]
    done = subprocess.run(
        [*limits, PROGRAM, "digest", path, "--flat-digest", "never"], capture_output=True, text=True, check=False
    )
    code = None if case.expect.error is None else getattr(vmgraft.errors, case.expect.error).code
    said = done.stderr
    assert done.returncode == exit_code(code), said
    assert "Traceback" not in said
    assert all(line.isprintable() for line in said.splitlines())
    if code is not None:
        assert [line.split(":")[0] for line in said.splitlines()] in (["error"], ["error", "hint"])


def test_the_probe_sees_what_must_not_happen() -> None:
    """The limits above would strike: a traceback, a hang and a memory hog are told from good behaviour."""
    assert "ZeroDivisionError" in measured(lambda: {"x": 1 / 0})["crash"]
    assert in_child(lambda: measured(lambda: {"x": len(b"x" * (300 << 20))}))["mib"] > MAX_MIB
    busy = in_child(lambda: measured(lambda: {"x": sum(range(30_000_000))}))
    assert busy["seconds"] > 0.1

    def spin() -> dict[str, int]:
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        while True:
            pass

    assert "ended with status" in in_child(spin)["crash"]


def test_the_table_is_the_one_that_was_reviewed() -> None:
    """index.json is what a change of expectations shows up in; `make_corpus.py --index` renews it."""
    assert json.loads((HERE / "index.json").read_text()) == index_of(CASES)


def test_enough_of_everything() -> None:
    """At least 120 cases, every registered container among them, and the record."""
    assert len(CASES) >= 120
    counts = {name: sum(case.container == name for case in CASES) for name in {case.container for case in CASES}}
    names = {"iso" if name == "iso9660" else name for name in format_names()}
    for name in names | {"record", "locator", "undo", "sidecar"}:
        assert counts.get(name, 0) >= 8, name
    assert len(MODULES) >= 4


def test_the_script_makes_the_same_files_every_time(tmp_path: Path) -> None:
    script = str(HERE / "make_corpus.py")
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, script, str(tmp_path / seed), "locator/"], env=env, check=True, capture_output=True
        )
    done = subprocess.run(["diff", "-r", tmp_path / "1", tmp_path / "2"], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    made = {path.name for path in (tmp_path / "1" / "locator").iterdir()}
    assert made == {case.name.split("/")[1] for case in CASES if case.container == "locator"}
    refused = subprocess.run([sys.executable, script, str(tmp_path / "1")], check=False, capture_output=True)
    assert (refused.returncode, b"not empty" in refused.stderr) == (1, True)
