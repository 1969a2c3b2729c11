"""Does to an image everything a reader does, in a child process whose time and memory are measured."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from vmgraft.errors import VmgraftError

#: What a malformed input may cost: CPU seconds, and MiB on top of what the process had.
MAX_SECONDS = 2.0
MAX_MIB = 256
#: When a child that does not come back is killed, in seconds; above the limit, since machines are shared.
WATCHDOG = 30


def _steps(path: Path) -> dict[str, Any]:
    """Open the image and use all of it; every step's error is noted under its name."""
    from vmgraft.imagefmt.graft import Graft, open_image
    from vmgraft.imagefmt.tree import digest_content

    seen: dict[str, Any] = {"errors": {}}

    def step(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except VmgraftError as error:
            seen["errors"][name] = {"class": type(error).__name__, "text": str(error), **error.to_dict()}
            return None

    image = step("open", lambda: open_image(path))
    if image is None:
        return seen
    with image:
        located = step("locate", image.locate)
        if located is not None:
            seen |= {"state": located.state.value, "detail": located.detail}
            graft = Graft(image, located=located)
            seen["problem"] = step("graft", graft.format_problem)
            step("graft", lambda: [*graft.envelopes(), *graft.manifests(), graft.hints()])
        seen["metadata"] = step("metadata", image.metadata)
        seen["snapshots"] = [_snapshot(path, row["id"]) for row in (seen["metadata"] or {}).get("snapshots", ())[:4]]
        seen["virtualSize"] = image.virtual_size
        step("room", image.room)
        step("chain", image.backing_chain)
        seen["covered"] = step("extents", lambda: _covered(image))
        step("read", lambda: image.read(0, 65536))
        step("read", lambda: image.read(max(0, image.virtual_size - 65536), 65536))
        digest = step("content", lambda: digest_content(image, flat="never"))
        seen["digest"] = None if digest is None else digest.tree_digest.hex()
    return seen


def _snapshot(path: Path, wanted: str) -> str:
    """Read a named snapshot as a whole and return its digest, or what is wrong with it."""
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.imagefmt.graft import open_image
    from vmgraft.imagefmt.tree import digest_content

    try:
        with open_image(path, Opening(snapshot=wanted)) as image:
            return digest_content(image, flat="never").tree_digest.hex()
    except VmgraftError as error:
        return f"{type(error).__name__} {error.field}: {error.message}"


def _covered(image: Any) -> int:
    """Walk all extents and return the bytes they cover without gap."""
    end = 0
    for extent in image.extents():
        assert extent.start == end
        assert extent.length > 0
        end += extent.length
    return end


def _change(path: Path) -> dict[str, Any]:
    """Try to detach, then to attach and detach: nothing, or the whole way."""
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.imagefmt.graft import attach_sections, detach_image
    from vmgraft.imagefmt.record import Section, SectionKind

    sections = [Section(SectionKind.ENVELOPE, b"{}"), Section(SectionKind.MANIFEST, b"{}")]
    seen: dict[str, Any] = {"before": fingerprint(path)}

    def attempt(name: str, action: Callable[[], Any]) -> bool:
        start = time.process_time()
        try:
            action()
        except VmgraftError as error:
            seen[name] = {"class": type(error).__name__, "text": str(error), **error.to_dict()}
            return False
        finally:
            seen["longest"] = max(seen.get("longest", 0.0), time.process_time() - start)
        seen[name] = None
        return True

    attempt("detach", lambda: detach_image(path))
    seen["afterDetach"] = fingerprint(path)
    for placement in (Placement.AUTO, Placement.SIDECAR):
        if attempt(
            placement.value, lambda p=placement: attach_sections(path, sections, placement=p, tree_digest=bytes(32))
        ):
            detach_image(path)
        seen["after-" + placement.value] = fingerprint(path)
    return seen


def fingerprint(path: Path) -> dict[str, str]:
    """Return what lies in the image's folder; of large files only size and allocated blocks."""
    found = {}
    for item in sorted(path.parent.iterdir()):
        status = item.lstat()
        if item.is_symlink() or not item.is_file():
            found[item.name] = f"mode {status.st_mode}"
        elif status.st_size > 8 << 20:
            with item.open("rb") as file:
                found[item.name] = f"{status.st_size} {sha256(file.read(1 << 20)).hexdigest()}"
        else:
            found[item.name] = sha256(item.read_bytes()).hexdigest()
    return found


def _program(path: Path, policy: Path) -> dict[str, Any]:
    """Run the commands that read an image, as the program would."""
    return {
        name: _command([name, str(path), *more, "--json"])
        for name, more in (
            ("inspect", ()),
            ("list", ()),
            ("digest", ("--flat-digest", "never")),
            ("verify", ("--policy", str(policy), "--quiet")),
        )
    }


def _command(arguments: list[str]) -> dict[str, Any]:
    from vmgraft.cli.app import run

    out, err, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(arguments)
        except SystemExit as end:
            shown = {"code": end.code, "out": json.loads(out.getvalue()), "err": err.getvalue()}
            return shown | {"seconds": time.process_time() - start}
    raise AssertionError("the program did not end")


def probe(path: Path, policy: Path) -> dict[str, dict[str, Any]]:
    """Run the three above in one child; return for each what it saw, with ``seconds`` and ``mib``.

    A child that dies or does not come back shows as ``crash``.
    """

    def everything() -> dict[str, Any]:
        # Last, since it may change the files.
        return {
            "reader": measured(lambda: _steps(path)),
            "program": measured(lambda: _program(path, policy)),
            "writer": measured(lambda: _change(path)),
        }

    return in_child(everything)


def warm_up(path: Path, policy: Path) -> None:
    """Do the same here, with a well-formed image: what is imported on use is then there before a child is forked."""
    for action in (lambda: _steps(path), lambda: _program(path, policy), lambda: _change(path)):
        answer = measured(action)
        if "crash" in answer:
            raise AssertionError(answer["crash"])


def measured(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run ``action``; add CPU ``seconds``, the ``mib`` of memory it took at most, and what escaped as ``crash``."""
    # The parent's peak must not count: 5 resets the high-water mark (Linux, proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    size, start = _status("VmRSS"), time.process_time()
    try:
        answer = action()
    except BaseException:  # noqa: BLE001 - whatever escapes is the finding
        answer = {"crash": traceback.format_exc()}
    return answer | {"seconds": time.process_time() - start, "mib": (_status("VmHWM") - size) / (1 << 20)}


def in_child(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run ``action`` in a forked child under a watchdog and return its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            limit = _status("VmSize") + (2 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # a runaway must not take the machine with it
            with os.fdopen(writer, "w") as file:
                json.dump(action(), file)
        finally:
            os._exit(0)  # without the parent's exit handlers
    os.close(writer)
    data = _wait(reader, child)
    _, status = os.waitpid(child, 0)
    if not data:
        return {"crash": f"the child ended with status {status}"}
    answer: dict[str, Any] = json.loads(data)
    return answer


def _status(name: str) -> int:
    """Return a number of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(name)


def _wait(reader: int, child: int) -> bytes:
    data, end = b"", time.monotonic() + WATCHDOG
    with os.fdopen(reader, "rb", buffering=0) as file:
        while True:
            ready, _, _ = select.select([file], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                return b""
            piece = file.read(1 << 16)
            if not piece:
                return data
            data += piece
