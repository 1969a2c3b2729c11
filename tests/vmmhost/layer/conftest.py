"""A machine without a machine: guest RAM, audit log and clock that the layer can be tried against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.proxy import ExtensionProxy
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.zygote import Zygote


class Ram:
    """1 MiB of guest RAM."""

    def __init__(self) -> None:
        self.bytes = bytearray(1 << 20)

    def read(self, gpa: int, length: int) -> bytes:
        if gpa + length > len(self.bytes):
            raise ValueError(f"{gpa:#x} is not RAM")
        return bytes(self.bytes[gpa : gpa + length])

    def write(self, gpa: int, data: bytes) -> None:
        if gpa + len(data) > len(self.bytes):
            raise ValueError(f"{gpa:#x} is not RAM")
        self.bytes[gpa : gpa + len(data)] = data


@dataclass
class Bench:
    """Starts extensions and keeps what they did."""

    zygote: Zygote
    ram: Ram = field(default_factory=Ram)
    audit: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    now: int = 0
    hosts: list[ExtensionHost] = field(default_factory=list)

    def host(self, *specs: ExtensionSpec, **options: Any) -> ExtensionHost:
        host = ExtensionHost(
            specs, memory=self.ram, audit=lambda event, fields: self.audit.append((event, fields)),
            stop=self.stops.append, clock=lambda: self.now, zygote=self.zygote, **options,
        )  # fmt: skip
        self.hosts.append(host)
        host.start()
        return host

    def one(self, module: bytes, options: dict[str, Any] | None = None, **fields: Any) -> ExtensionProxy:
        return self.host(ExtensionSpec("org.example.test", "1", module, **fields), **(options or {})).proxies[0]

    def records(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.audit if name == event]

    def fault(self) -> dict[str, Any]:
        """The one fault record, which names the extension."""
        (record,) = self.records("fault")
        assert record["id"] == "org.example.test"
        return record


def _wat(body: str, imports: str = "", memory: str = '(memory (export "memory") 1)') -> bytes:
    text = f'(module {imports} {memory} (func (export "vmgraft_abi_1")) {body})'
    return bytes(wasmtime.wat2wasm(text))


@pytest.fixture(scope="session")
def wat() -> Callable[..., bytes]:
    return _wat


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote.start() as running:
        running.wait_ready()
        yield running


@pytest.fixture
def bench(zygote: Zygote) -> Iterator[Bench]:
    bench = Bench(zygote)
    yield bench
    for host in bench.hosts:
        host.close()
    deadline = time.monotonic() + 5  # the zygote reaps on its own time
    while children_of(zygote.pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert children_of(zygote.pid) == []


def children_of(pid: int) -> list[int]:
    """PIDs of the children of a single-threaded process, zombies among them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="session")
def children() -> Callable[[int], list[int]]:
    return children_of


@pytest.fixture(scope="session")
def examples() -> Path:
    return Path(__file__).parents[3] / "examples"
