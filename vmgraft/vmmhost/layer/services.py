"""What a module may ask for: the imports of ABI ``vmgraft/1`` as a worker serves them."""

from __future__ import annotations

import hashlib
from typing import Any, Final, Protocol

from vmgraft.vmmhost.layer.abi import (
    IMPORT_MODULE,
    IMPORTS,
    MASK64,
    MAX_ACCESS_BYTES,
    MAX_COPY_BYTES,
    MAX_LOG_BYTES,
    MIN_LOG_COST,
    Signature,
)
from vmgraft.vmmhost.layer.engine import Invoke, Machine, ModuleTrapError
from vmgraft.vmmhost.layer.protocol import Kind, Setup

_BLOCK: Final = hashlib.blake2b.MAX_DIGEST_SIZE


class Requests(Protocol):
    """The way to the host during a call."""

    def tell(self, kind: Kind, value: int = 0, payload: bytes = b"") -> None: ...  # noqa: D102
    def read_guest(self, gpa: int, length: int) -> bytes: ...  # noqa: D102
    def write_guest(self, gpa: int, data: bytes) -> None: ...  # noqa: D102


class RandomStream:
    """A generator of this worker alone: BLAKE2b keyed with a fresh key for every request (RFC 7693).

    The key is replaced by output that is never handed out, so what was handed out cannot be found from a later state.
    """

    def __init__(self, seed: bytes) -> None:
        self._key = seed

    def take(self, count: int) -> bytes:
        """Return ``count`` bytes."""
        blocks = (count + _BLOCK - 1) // _BLOCK
        out = b"".join(self._block(number) for number in range(1, blocks + 1))
        self._key = self._block(0)[:32]
        return out[:count]

    def _block(self, number: int) -> bytes:
        return hashlib.blake2b(number.to_bytes(8, "little"), key=self._key, person=b"vmgraft-random").digest()


class Services:
    """Serves the imports; every pointer, length and offset of the module is checked here.

    Args:
        setup: Config text, quota of log bytes and seed.
        requests: The way to the host.
    """

    def __init__(self, setup: Setup, requests: Requests) -> None:
        self.now = 0
        self._config = setup.config
        self._log_left = setup.log_bytes
        self._source = RandomStream(setup.seed)
        self._requests = requests
        self._machine: Machine | None = None
        self._memory: Any = None

    def imports(self, names: frozenset[str]) -> dict[tuple[str, str], tuple[Signature, Invoke]]:
        """Return the functions behind the names, which a checked module imports."""
        return {(IMPORT_MODULE, name): (IMPORTS[name][0], getattr(self, f"_{name}")) for name in names}

    def connect(self, machine: Machine, memory: Any) -> None:
        """Tell where the module's memory is, once it is instantiated; None if it has none."""
        self._machine, self._memory = machine, memory

    def _load(self, pointer: int, length: int) -> bytes:
        self._check(pointer, length)
        return bytes(self._memory.read(self._store, pointer, pointer + length))

    def _save(self, pointer: int, data: bytes) -> None:
        self._check(pointer, len(data))
        if data:
            self._memory.write(self._store, bytearray(data), pointer)

    def _check(self, pointer: int, length: int) -> None:
        size = self._memory.data_len(self._store)
        if pointer + length > size:
            raise ModuleTrapError(f"{length} bytes at {pointer:#x} are outside the module's memory of {size} bytes")

    @property
    def _store(self) -> Any:
        if self._machine is None:
            raise ModuleTrapError("an import was called before the module was ready")
        return self._machine.store

    # --- the imports, named as in the ABI with an underscore before; integers arrive unsigned ---

    def _config_read(self, pointer: int, length: int, offset: int) -> int:
        chunk = self._config[offset : offset + length]
        self._save(pointer, chunk)
        return len(chunk)

    def _log(self, pointer: int, length: int) -> None:
        text = self._load(pointer, min(length, MAX_LOG_BYTES))
        if self._log_left <= 0 or not text:
            return
        sent = text[: self._log_left]
        self._log_left -= max(len(text), MIN_LOG_COST)
        self._requests.tell(Kind.LOG, 0, sent)

    def _now(self) -> int:
        return self.now

    def _random(self, pointer: int, length: int) -> None:
        self._save(pointer, self._source.take(self._copy_length(length)))

    def _set_tick(self, nanoseconds: int) -> None:
        self._requests.tell(Kind.SET_TICK, nanoseconds)

    def _stop(self) -> None:
        self._requests.tell(Kind.STOP)

    def _guest_read(self, gpa: int, pointer: int, length: int) -> int:
        count = self._copy_length(length)
        self._check(pointer, count)
        for at in range(0, count, MAX_ACCESS_BYTES):
            step = min(MAX_ACCESS_BYTES, count - at)
            self._save(pointer + at, self._requests.read_guest((gpa + at) & MASK64, step))
        return 0

    def _guest_write(self, gpa: int, pointer: int, length: int) -> int:
        data = self._load(pointer, self._copy_length(length))
        for at in range(0, len(data), MAX_ACCESS_BYTES):
            self._requests.write_guest((gpa + at) & MASK64, data[at : at + MAX_ACCESS_BYTES])
        return 0

    @staticmethod
    def _copy_length(length: int) -> int:
        if length > MAX_COPY_BYTES:
            raise ModuleTrapError(f"{length} bytes are more than the {MAX_COPY_BYTES} that one call may copy")
        return length
