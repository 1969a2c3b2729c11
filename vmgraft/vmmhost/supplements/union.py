"""Several file trees as one: a later layer wins, and takes away by whiteouts.

The whiteouts are those of the OCI image specification (layer.md, "Whiteouts"): an empty file ``.wh.NAME`` hides NAME of
all layers below, ``.wh..wh..opq`` hides everything that they have in its folder. Neither appears in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from vmgraft.errors import MalformedImageError
from vmgraft.vmmhost.supplements.iso import Folder, Node, Tree

WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"


def merge(layers: Sequence[tuple[str, Tree]]) -> dict[str, Node]:
    """Return the union of file trees.

    Args:
        layers: What to call each in errors, and its tree; the lowest first.

    Raises:
        MalformedImageError: a whiteout that names nothing, or is a folder.
    """
    result: dict[str, Node] = {}
    for name, tree in layers:
        hidden, opaque, shown = _split(name, tree)
        result = {path: node for path, node in result.items() if not _covered(path, node, hidden, opaque, shown)}
        result.update(shown)
    return result


def _split(name: str, tree: Tree) -> tuple[set[str], set[str], dict[str, Node]]:
    """Return the paths a layer hides, the folders it makes opaque, and what it shows."""
    hidden: set[str] = set()
    opaque: set[str] = set()
    shown: dict[str, Node] = {}
    for path, node in tree.items():
        if any(step.startswith(WHITEOUT) for step in path.split("/")[:-1]):
            raise MalformedImageError("a whiteout must be a file", file=name, field=path)
        for parent in _ancestors(path):
            shown.setdefault(parent, Folder())
        folder, _, last = path.rpartition("/")
        if not last.startswith(WHITEOUT):
            shown[path] = node  # in place of the folder that something below it implied
            continue
        target = last.removeprefix(WHITEOUT)
        if isinstance(node, Folder):
            raise MalformedImageError("a whiteout must be a file", file=name, field=path)
        if last == OPAQUE:
            opaque.add(folder)
        elif not target or target.startswith(WHITEOUT) or target in (".", ".."):
            raise MalformedImageError("a whiteout that hides nothing", file=name, field=path)
        else:
            hidden.add(f"{folder}/{target}".lstrip("/"))
    return hidden, opaque, shown


def _covered(path: str, node: Node, hidden: set[str], opaque: set[str], shown: Tree) -> bool:
    """Say whether something of a lower layer is hidden by one above."""
    if path in hidden or "" in opaque:
        return True
    above = shown.get(path)
    if above is not None and isinstance(node, Folder) != isinstance(above, Folder):
        return True
    return any(
        parent in hidden or parent in opaque or not isinstance(shown.get(parent, Folder()), Folder)
        for parent in _ancestors(path)
    )


def _ancestors(path: str) -> Iterator[str]:
    steps = path.split("/")
    for depth in range(1, len(steps)):
        yield "/".join(steps[:depth])
