"""A graft record that came in through the control socket, as evidence about the content of the running guest."""

from __future__ import annotations

from pathlib import Path

from vmgraft.imagefmt.blob import file_blob
from vmgraft.imagefmt.contract import ContentDigest, GraftState, Located
from vmgraft.imagefmt.graft import Graft
from vmgraft.vmmhost.control.wire import offered_size


class OfferedGraft(Graft):
    """A record without an image of its own: what it says is held against the image that runs.

    Args:
        running: The graft that the guest was started with; its image is open.
        fd: A sealed memory file with the record's bytes; it is duplicated.

    Raises:
        UsageError: the descriptor is anything else.
    """

    def __init__(self, running: Graft, fd: int) -> None:
        self._running = running
        record = file_blob(fd, 0, offered_size(fd), file=Path("the offered record"))
        super().__init__(running.image, located=Located(GraftState.OK, record=record))

    def content(self, flat: bool) -> ContentDigest:
        """Return the digests of the running image's content; it is read again only for a digest not known yet."""
        return self._running.content(flat)
