"""Which image and which extension a trust policy speaks about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import translate


class Reach(IntEnum):
    """How closely an image scope fits; a closer one wins over all wider ones."""

    NONE = 0
    GLOBAL = 1  #: ``*``
    GLOB = 2  #: ``name:GLOB``
    EXACT = 3  #: ``tree:sha256:HEX``


@dataclass(frozen=True, slots=True)
class ImageScope:
    """One entry of ``imageScopes``: ``*``, ``name:GLOB`` or ``tree:sha256:HEX``."""

    text: str

    @property
    def wants_tree(self) -> bool:
        """Whether the content's digest is needed to tell."""
        return self.text.startswith("tree:")

    def reach(self, name: str, tree_digest: bytes | None) -> Reach:
        """Tell how closely this scope fits an image.

        Args:
            name: File name of the image, without folders.
            tree_digest: fs-verity digest of the guest content, or None where it is not known.
        """
        if self.text == "*":
            return Reach.GLOBAL
        kind, _, rest = self.text.partition(":")
        if kind == "name" and re.fullmatch(translate(rest), name):
            return Reach.GLOB
        if kind == "tree" and tree_digest is not None and rest == f"sha256:{tree_digest.hex()}":
            return Reach.EXACT
        return Reach.NONE


def extension_in_scope(scope: str, extension: str) -> bool:
    """Tell whether an entry of ``extensionScopes`` covers an extension id.

    ``com.acme.*`` covers ids below the label ``acme`` and never ``com.acme-evil.x``; without ``.*`` only the id itself.
    """
    if scope == "*":
        return True
    if scope.endswith(".*"):
        return extension.startswith(scope[:-1])
    return extension == scope
