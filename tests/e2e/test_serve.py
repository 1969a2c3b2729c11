"""``vmgraft serve`` as a user runs it: verified first, then an NBD server that other programs copy from."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BLOCK = 65536
PROGRAM = Path(sys.executable).with_name("vmgraft")


class Server:
    """The program, serving."""

    def __init__(self, cli: Any, *args: str | Path) -> None:
        self.process = subprocess.Popen(
            [str(PROGRAM), "serve", *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cli.cwd, env=cli.env,
        )  # fmt: skip

    def uri(self, *, error: bool = False) -> str:
        stream = self.process.stderr if error else self.process.stdout
        assert stream is not None
        return stream.readline().strip()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return self.process.returncode, out, err


@pytest.fixture
def image(cli, vendor: Path, clock: Path, tool) -> Path:
    raw = vendor / "raw.img"
    raw.write_bytes(os.urandom(20 * BLOCK) + bytes(20 * BLOCK))
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, vendor / "disk.qcow2")
    cli("attach", vendor / "disk.qcow2", clock, "--key", vendor / "acme.key")
    return vendor / "disk.qcow2"


@pytest.fixture
def serve(cli, vendor: Path, image: Path) -> Iterator[Any]:
    started: list[Server] = []

    def start(*args: str | Path) -> Server:
        started.append(Server(cli, image, "--policy", vendor / "policy.json", *args))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()
            pytest.fail("a server went on")


def test_copy_compare_and_end(serve, cli, vendor: Path, image: Path, tool, monkeypatch) -> None:
    server = serve("--socket", "disk.sock", "--audit-log", "log.jsonl")
    uri = server.uri()
    assert uri == "nbd+unix:///?socket=disk.sock"
    monkeypatch.chdir(cli.cwd)
    assert json.loads(tool("nbdinfo", "--json", uri))["exports"][0]["description"] == "disk.qcow2"
    tool("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, vendor / "copy.img")
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, image)
    assert (vendor / "copy.img").read_bytes() == (vendor / "raw.img").read_bytes()
    code, _, err = server.end()
    assert code == 0
    assert "blocks checked" in err
    assert not (vendor / "disk.sock").exists()
    cli("check-log", "log.jsonl")
    events = [json.loads(line) for line in (vendor / "log.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names[:3] == ["start", "verification", "serve"]
    assert names[-1] == "end"
    assert "seccomp" in events[2]["host"]


def test_an_image_that_fails_is_not_served(serve, image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(-5 * BLOCK, os.SEEK_END)
        file.write(b"x" * 100)
    server = serve("--socket", "disk.sock", "--json")
    code, out, _ = server.wait()
    document = json.loads(out)
    assert code == document["exitCode"] == 12
    assert document["uri"] is None
    assert not (image.parent / "disk.sock").exists()


def test_content_that_changes_while_it_is_served(serve, vendor: Path, image: Path, tool) -> None:
    server = serve("--listen", "0", "--json", "--audit-log", "log.jsonl")
    uri = server.uri(error=True)
    assert uri.startswith("nbd://127.0.0.1:")
    data = (vendor / "raw.img").read_bytes()
    at = image.read_bytes().find(data[7 * BLOCK : 7 * BLOCK + 512])
    with image.open("r+b") as file:
        file.seek(at)
        file.write(b"changed")
    tool("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, vendor / "copy.img", code=1)
    code, out, _ = server.wait()
    document = json.loads(out)
    assert code == document["exitCode"] == 12
    assert document["error"]["code"] == "content-mismatch"
    assert document["error"]["file"] == str(image)
    assert document["error"]["field"] == "block 7"
    assert document["served"]["refused"] >= 1
    records = [json.loads(line)["event"] for line in (vendor / "log.jsonl").read_text().splitlines()]
    assert "nbd-failure" in records
    assert records[-1] == "error"


def test_an_overlay_and_once(serve, vendor: Path, image: Path, tool) -> None:
    before = image.read_bytes()
    server = serve("--listen", "127.0.0.1:0", "--overlay", "--once")
    (vendor / "new.img").write_bytes(os.urandom(40 * BLOCK))
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", vendor / "new.img", server.uri())
    code, _, err = server.wait()
    assert code == 0, err
    assert f"{40 * BLOCK} written" in err
    assert image.read_bytes() == before


def test_command_lines_that_make_no_sense(cli, vendor: Path, image: Path) -> None:
    policy = ("--policy", vendor / "policy.json")
    cli("serve", image, *policy, code=2)
    cli("serve", image, *policy, "--listen", "127.0.0.1", code=2)
    cli("serve", image, *policy, "--listen", "203.0.113.7:1", code=20)
    assert "not encrypted" in cli.stderr
    (vendor / "taken").write_text("")
    cli("serve", image, *policy, "--socket", "taken", code=3)
