"""What the host keeps for one extension through a run: its key-value store and its metrics, both bounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vmgraft.vmmhost.layer.abi import MAX_KEY_BYTES, MAX_VALUE_BYTES

#: Bytes of keys and values together, and how many keys.
STORE_BYTES: Final = 65536
STORE_KEYS: Final = 1024
#: Names of metrics that are kept.
METRIC_NAMES: Final = 64


class KvStore:
    """Keys and values of an extension; survives its workers, ends with the run."""

    def __init__(self, items: Mapping[bytes, bytes] | None = None) -> None:
        self._items: dict[bytes, bytes] = {}
        self._bytes = 0
        self.replace(items or {})

    def get(self, key: bytes) -> bytes | None:
        """Return a value, or None."""
        return self._items.get(key)

    def put(self, key: bytes, value: bytes) -> bool:
        """Keep a value, or forget the key where it is empty; False where there is no room for it."""
        old = self._items.get(key)
        used = self._bytes - (0 if old is None else len(key) + len(old))
        if not value:
            self._items.pop(key, None)
            self._bytes = used
            return True
        used += len(key) + len(value)
        if used > STORE_BYTES or (old is None and len(self._items) >= STORE_KEYS) or not _fits(key, value):
            return False
        self._items[key] = value
        self._bytes = used
        return True

    def items(self) -> dict[bytes, bytes]:
        """Return a copy of everything in it."""
        return dict(self._items)

    def replace(self, items: Mapping[bytes, bytes]) -> bool:
        """Hold these items instead; False, and nothing changed, where they do not fit."""
        used = sum(len(key) + len(value) for key, value in items.items())
        if used > STORE_BYTES or len(items) > STORE_KEYS or not all(_fits(*item) for item in items.items()):
            return False
        self._items, self._bytes = dict(items), used
        return True


def _fits(key: bytes, value: bytes) -> bool:
    return 0 < len(key) <= MAX_KEY_BYTES and 0 < len(value) <= MAX_VALUE_BYTES


class Metrics:
    """Numbers that an extension reports, by name; the last value of each counts."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def put(self, name: str, value: int) -> bool:
        """Keep a value; False where the name is one too many."""
        if name not in self.values and len(self.values) >= METRIC_NAMES:
            return False
        self.values[name] = value
        return True
