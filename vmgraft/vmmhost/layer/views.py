"""The claimed ranges of an extension as the core's bus sees them: by offsets."""

from __future__ import annotations

from dataclasses import dataclass

from vmgraft.vmmhost.layer.proxy import ExtensionProxy


@dataclass(frozen=True, slots=True)
class PioView:
    """One claimed port range of an extension, seen by offsets (core contract ``PioHandler``)."""

    proxy: ExtensionProxy
    first: int

    def pio_read(self, offset: int, size: int) -> int:
        """Answer a read."""
        return self.proxy.pio_read(self.first + offset, size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Take a write."""
        self.proxy.pio_write(self.first + offset, size, value)


@dataclass(frozen=True, slots=True)
class MmioView:
    """One claimed address range of an extension, seen by offsets (core contract ``MmioHandler``)."""

    proxy: ExtensionProxy
    base: int

    def mmio_read(self, offset: int, size: int) -> int:
        """Answer a read."""
        return self.proxy.mmio_read(self.base + offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Take a write."""
        self.proxy.mmio_write(self.base + offset, size, value)
