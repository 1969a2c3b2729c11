#!/usr/bin/env python3
"""Coverage-guided fuzzing of every parser (atheris, libFuzzer).

Usage: fuzz.py TARGET... [--seconds N] [--corpus DIR] [--findings DIR]
       fuzz.py TARGET --replay FILE     run one input without instrumentation, time and memory measured
       fuzz.py TARGET --unpack FILE OUT write the file that an input of an image target stands for
       fuzz.py --list

TARGET is a name of --list, "all", or FILE.py, which defines ``run(data)``. A finding is an exception that is not a
VmgraftError, more than 2 seconds of CPU, or more than 256 MiB of memory for one input. It is saved below --findings
(build/fuzz/findings), its place printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

#: Names the folder for scratch files in the environment of a target's process.
FOLDER = "VMGRAFT_FUZZ_FOLDER"
BUILD = HERE.parents[1] / "build" / "fuzz"
#: What one input may cost: CPU seconds and MiB, measured without instrumentation.
MAX_SECONDS = 2.0
MAX_MIB = 256
#: Instrumented code is slower, and a fuzzer keeps memory: an input over the limits is replayed without both. At these,
#: in seconds and MiB, libFuzzer gives up.
_TIMEOUT = 30
_RSS_LIMIT = 3072
_MAX_INPUT = 1 << 16


def load(name: str) -> Any:
    """Return a target: one of ours, or what a file defines."""
    if name.endswith(".py"):
        sys.path.insert(0, str(Path(name).resolve().parent))
        module = importlib.import_module(Path(name).stem)
        from fuzz_targets import Target

        return Target(module.run, lambda: iter([("empty", b"")]), ())
    from fuzz_targets import all_targets

    targets = all_targets()
    if name not in targets:
        sys.exit(f"no target {name!r}; there are {', '.join(targets)}")
    return targets[name]


def import_all_of(packages: tuple[str, ...]) -> None:
    """Import packages with all that is in them now: what is imported later is not instrumented."""
    for name in packages:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
            importlib.import_module(module.name)


def ask(run: Any, data: bytes) -> float:
    """Run one input and return the CPU seconds of its longest step; a VmgraftError is a good answer."""
    from fuzz_targets import longest

    from vmgraft.errors import VmgraftError

    longest[0], start = 0.0, time.process_time()
    try:
        run(data)
    except VmgraftError as error:
        if not error.message:
            raise AssertionError("an error without message") from error
    return longest[0] or time.process_time() - start


def _peak() -> float:
    """Return the most memory this process had so far, in MiB; what getrusage says includes the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def fuzz(name: str, seconds: int, corpus: Path, findings: Path) -> int:
    """Fuzz one target in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["vmgraft", Path(name).stem], enable_loader_override=False):
        target = load(name)
        import_all_of(target.packages)
    label = Path(name).stem
    folder = corpus / label
    folder.mkdir(parents=True, exist_ok=True)
    (findings / label).mkdir(parents=True, exist_ok=True)
    for seed, data in target.seeds():
        (folder / f"seed-{seed}").write_bytes(data[:_MAX_INPUT])

    base = [0.0]

    def one(data: bytes) -> None:
        base[0] = base[0] or _peak()
        seconds = ask(target.run, data)
        if seconds > MAX_SECONDS or _peak() - base[0] > MAX_MIB:
            confirm(name, data)
            base[0] = _peak() - MAX_MIB / 2  # it was the fuzzer's own memory, or the instrumentation's time

    words = folder.parent / f"{label}.dict"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={_TIMEOUT}",
        f"-rss_limit_mb={_RSS_LIMIT}",
        f"-max_len={_MAX_INPUT}",
        f"-artifact_prefix={findings / label}/",
        "-print_final_stats=1",
        "-reload=0",
        "-len_control=20",
        f"-report_slow_units={_TIMEOUT}",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], one)
    atheris.Fuzz()
    return 0


def confirm(name: str, data: bytes) -> None:
    """Run an input again without instrumentation; raise if it really takes too long or too much."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [sys.executable, str(HERE / "fuzz.py"), name, "--replay", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)


def replay(name: str, file: Path) -> int:
    """Run one input and say what it cost; 1 if that is too much."""
    target, data = load(name), file.read_bytes()
    import_all_of(target.packages)
    with suppress(Exception):
        target.run(b"")  # what is imported on use, and what the C library keeps
    base = _peak()
    seconds = ask(target.run, data)
    print(f"{seconds:.2f} s, {_peak() - base:.0f} MiB")
    return int(seconds > MAX_SECONDS or _peak() - base > MAX_MIB)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of files a second are written there."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(
        prefix="vmgraft-fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    ) as folder:
        yield Path(folder)


def run_alone(name: str, options: argparse.Namespace, folder: Path) -> subprocess.CompletedProcess[str]:
    """Fuzz one target in a process of its own, which libFuzzer may end at any time."""
    command = [sys.executable, str(HERE / "fuzz.py"), name, "--alone", "--seconds", str(options.seconds)]
    command += ["--corpus", str(options.corpus), "--findings", str(options.findings)]
    env = os.environ | {FOLDER: str(folder)}
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)


def fuzz_each(names: list[str], options: argparse.Namespace) -> int:
    """Fuzz several targets, each in a process of its own; return 1 if there was a finding."""
    failed = []
    for name in names:
        with scratch_folder() as folder:
            done = run_alone(name, options, folder)
        lines = done.stderr.splitlines()
        stats = [line.split()[-1] for line in lines if line.startswith("stat::number_of_executed_units")]
        print(
            f"{name:16} {stats[0] if stats else '?':>9} inputs  {'a finding' if done.returncode else 'ok'}", flush=True
        )
        if done.returncode:
            failed.append(name)
            print(done.stdout[-4000:] + "\n".join(lines[-60:]), flush=True)
            for finding in sorted((options.findings / Path(name).stem).glob("*")):
                print(f"reproduce: python {HERE / 'fuzz.py'} {name} --replay {finding}", flush=True)
    return int(bool(failed))


def main() -> int:
    """Parse the command line and do as told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=BUILD / "corpus")
    parser.add_argument("--findings", type=Path, default=BUILD / "findings")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--unpack", nargs=2, type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.unpack:
        import fuzz_sparse

        fuzz_sparse.write(options.unpack[0].read_bytes(), options.unpack[1])
        return 0
    if not options.targets or options.list:
        from fuzz_targets import all_targets

        print("\n".join(all_targets()))
        return 0
    if options.alone:
        return fuzz(options.targets[0], options.seconds, options.corpus, options.findings)
    with scratch_folder() as folder:
        os.environ[FOLDER] = str(folder)
        if options.replay:
            return replay(options.targets[0], options.replay)
        return fuzz_each(names_of(options.targets), options)


def names_of(targets: list[str]) -> list[str]:
    """Return the names with "all" replaced."""
    from fuzz_targets import all_targets

    return [name for target in targets for name in (all_targets() if target == "all" else [target])]


if __name__ == "__main__":
    sys.exit(main())
