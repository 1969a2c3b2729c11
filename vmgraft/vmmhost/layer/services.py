"""What a module may ask for: the imports of ABI ``vmgraft/1`` as a worker serves them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final, Protocol

from vmgraft.vmmhost.layer.abi import (
    IMPORT_MODULE,
    IMPORTS,
    MAX_COPY_BYTES,
    MAX_KEY_BYTES,
    MAX_LOG_BYTES,
    MAX_NAME_BYTES,
    MAX_VALUE_BYTES,
    MIN_LOG_COST,
    Signature,
)
from vmgraft.vmmhost.layer.engine import Invoke, Machine, ModuleTrapError
from vmgraft.vmmhost.layer.protocol import Kind, Setup
from vmgraft.vmmhost.layer.windows import GuestView

_BLOCK: Final = hashlib.blake2b.MAX_DIGEST_SIZE


class Requests(Protocol):
    """The way to the host during a call."""

    def tell(self, kind: Kind, value: int = 0, payload: bytes = b"") -> None: ...  # noqa: D102
    def read_guest(self, gpa: int, length: int) -> bytes: ...  # noqa: D102
    def write_guest(self, gpa: int, data: bytes) -> None: ...  # noqa: D102
    def get_value(self, key: bytes) -> bytes | None: ...  # noqa: D102
    def put_value(self, key: bytes, value: bytes) -> bool: ...  # noqa: D102


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
        view: The guest's memory; None for one that is reached by requests alone.
    """

    def __init__(self, setup: Setup, requests: Requests, view: GuestView | None = None) -> None:
        self.now = 0
        #: Data of the call that runs, what the module answers with, and how many bytes of that there may be.
        self.data, self.answer, self.room = b"", b"", 0
        #: What ``virtio_kick`` does.
        self.kick: Callable[[int], None] = lambda _queue: None
        self.view = GuestView(setup.windows, {}, requests) if view is None else view
        self._irqs = setup.irqs
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

    def fuel_used(self) -> int:
        """Return the fuel that the last call used."""
        return 0 if self._machine is None else self._machine.fuel_used()

    def refuel(self) -> None:
        """Begin a call that may do without the module: so far it used no fuel."""
        if self._machine is not None:
            self._machine.store.set_fuel(self._machine.fuel)

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
        self._save(pointer, self.view.read(gpa, count))
        return 0

    def _guest_write(self, gpa: int, pointer: int, length: int) -> int:
        self.view.write(gpa, self._load(pointer, self._copy_length(length)))
        return 0

    def _get_buffer(self, offset: int, pointer: int, length: int) -> int:
        chunk = self.data[offset : offset + length]
        self._save(pointer, chunk)
        return len(chunk)

    def _set_buffer(self, pointer: int, length: int) -> None:
        if length > self.room:
            raise ModuleTrapError(f"{length} bytes are more than the {self.room} that this call's answer has room for")
        self.answer = self._load(pointer, length)

    def _irq(self, line: int, level: int) -> None:
        if line > 15 or not self._irqs >> line & 1:
            raise ModuleTrapError(f"interrupt line {line} is not granted")
        self._requests.tell(Kind.IRQ, line << 1 | (level != 0))

    def _kv_get(self, key: int, key_length: int, pointer: int, length: int) -> int:
        value = self._requests.get_value(self._name(key, key_length, MAX_KEY_BYTES))
        if value is None:
            return -1
        self._save(pointer, value[:length])
        return len(value)

    def _kv_put(self, key: int, key_length: int, pointer: int, length: int) -> int:
        if length > MAX_VALUE_BYTES:
            return -1
        name = self._name(key, key_length, MAX_KEY_BYTES)
        return 0 if self._requests.put_value(name, self._load(pointer, length)) else -1

    def _metric(self, pointer: int, length: int, value: int) -> None:
        self._requests.tell(Kind.METRIC, value, self._name(pointer, length, MAX_NAME_BYTES))

    def _virtio_kick(self, queue: int) -> None:
        self.kick(queue)

    def _name(self, pointer: int, length: int, most: int) -> bytes:
        if not 1 <= length <= most:
            raise ModuleTrapError(f"a name or key of {length} bytes, where 1 to {most} are allowed")
        return self._load(pointer, length)

    @staticmethod
    def _copy_length(length: int) -> int:
        if length > MAX_COPY_BYTES:
            raise ModuleTrapError(f"{length} bytes are more than the {MAX_COPY_BYTES} that one call may copy")
        return length
