"""What the cases of `cases.json` are made of: modules, guests, workers that were taken over, and clients."""

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import wasmtime
from assembling import nasm

from vmgraft.vmmhost.control.wire import SEALS

MARKER = '(func (export "vmgraft_abi_1"))'
#: Answers as an absent device does, so that the guest does the same whether it is there or not.
ONES = """(func (export "on_pio_read") (param i32 i32) (result i64) (i64.const -1))
(func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64) (i64.const -1))"""
#: A guest that does nothing, for clients to ask about.
SPIN = bytes.fromhex("ebfe")
#: What a zygote runs whose workers were taken over: at the first call of the guest they do something of their own.
BOOT = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[3])
case = json.loads({case!r})
from vmgraft.vmmhost.layer import sandbox, worker, zygote_main
def taken_over(channel, services, hooks, call):
    import mmap, signal, socket, time
    for packet in case.get("send", ()):
        channel.send(bytes.fromhex(packet))
    for kind, ahead, value, payload in case.get("frames", ()):
        channel.send(worker.frame(worker.Kind[kind], call.seq + ahead, value, bytes.fromhex(payload)))
    actions = dict(
        wait=lambda: channel.receive(), close=lambda: os._exit(0), exit=lambda: os._exit(7),
        open=lambda: os.open("/etc/passwd", os.O_RDONLY), socket=socket.socket, fork=os.fork,
        map=lambda: mmap.mmap(-1, 4096, prot=7), kill=lambda: os.kill(case["host"], signal.SIGKILL))
    actions[case.get("then", "wait")]()
    channel.send(worker.frame(worker.Kind.RESULT, call.seq, 1))
if "lie" in case:
    exec(case["lie"])
else:
    worker._answer = taken_over
    worker._access = lambda *parts: taken_over(*parts[:3], worker.parse_call(parts[3]))
zygote_main.main(int(sys.argv[1]), int(sys.argv[2]))
"""


def module_of(case: dict[str, Any]) -> bytes:
    """Assemble the module of a case."""
    if "hex" in case and case["where"] == "module":
        return bytes.fromhex(case["hex"])
    memory = case.get("memory", '(memory (export "memory") 1 1)')
    parts = (case.get("imports", ""), memory, case.get("marker", MARKER), case.get("wat", ONES))
    return bytes(wasmtime.wat2wasm(f"(module {' '.join(parts)})"))


def guest_of(source: str, folder: Path) -> bytes:
    """Assemble what a guest does instead of the example's."""
    head = "bits 16\norg 0x7c00\nxor ax, ax\nmov ds, ax\nmov es, ax\nmov ss, ax\nmov sp, 0x7c00\n"
    path = folder / "guest.asm"
    path.write_text(head + source + "\n")
    return nasm(path)


def boot_of(case: dict[str, Any]) -> str:
    """Return what the zygote of a case runs."""
    return BOOT.format(case=json.dumps({**case, "host": os.getpid()}))


class Client(threading.Thread):
    """Says one thing to the control socket of a running guest, keeps the answer, and ends the guest.

    Args:
        path: Where the socket will be.
        case: What to say.
    """

    def __init__(self, path: Path, case: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.case = path, case
        self.answer: dict[str, Any] = {}
        self.other: dict[str, Any] = {}

    def run(self) -> None:
        try:
            self.answer = self._ask(self._said(), self.case.get("descriptor"))
            self.other = self._ask(b'{"op": "status"}\n', None)  # nobody else is kept from being served
        finally:
            self._ask(b'{"op": "stop"}\n', None)

    def _said(self) -> bytes:
        return bytes.fromhex(self.case["hex"]) if "hex" in self.case else self.case["send"].encode()

    def _ask(self, said: bytes, descriptor: str | None) -> dict[str, Any]:
        deadline = time.monotonic() + 10
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            while True:
                try:
                    connection.connect(str(self.path))
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
            fds = [] if descriptor is None else [_descriptor(descriptor)]
            try:
                sent = socket.send_fds(connection, [said], fds) if fds else connection.send(said)
                assert sent
            finally:
                for fd in fds:
                    os.close(fd)
            answer = b""
            while not answer.endswith(b"\n"):
                piece = connection.recv(65536)
                if not piece:
                    break
                answer += piece
        return dict(json.loads(answer))


def _descriptor(kind: str) -> int:
    if kind in {"nonsense", "unsealed"}:
        fd = os.memfd_create("record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, b"nonsense" * 100)
        if kind == "nonsense":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return fd
    with tempfile.TemporaryFile() as file:
        file.write(b"nonsense")
        return os.dup(file.fileno())
