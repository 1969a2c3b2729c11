"""An installed QEMU as the engine: same verification, same workers, same audit log (docs/qemu.md)."""
