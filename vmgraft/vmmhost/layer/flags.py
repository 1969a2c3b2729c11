"""Sets of flags that have names in the audit log."""

from __future__ import annotations

from enum import IntFlag


class NamedFlag(IntFlag):
    """Flags that can say what they are."""

    def names(self) -> list[str]:
        """Return the names as the audit log spells them, such as ``no-new-privs``."""
        return [item.name.lower().replace("_", "-") for item in type(self) if item in self and item.name]
