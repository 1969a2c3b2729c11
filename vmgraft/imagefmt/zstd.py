"""Bounded zstd, one frame at a time."""

from __future__ import annotations

from vmgraft.errors import GraftFormatError

_LEVEL = 12
#: Largest window a frame may ask for, in bytes; a section is never longer than this.
_MAX_WINDOW = 64 << 20


def compress(raw: bytes) -> bytes:
    """Return one frame that states its content size."""
    import zstandard

    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True, write_checksum=False).compress(raw)


def decompress(stored: bytes, raw_size: int, *, file: str | None, offset: int) -> bytes:
    """Decompress one frame that must hold exactly ``raw_size`` bytes and nothing behind it.

    Args:
        stored: The frame.
        raw_size: What the section table says, already within the limits.
        file: Where it comes from, for messages.
        offset: Where in that file it begins, in bytes.

    Raises:
        GraftFormatError: when the frame is damaged or states another size; nothing large was allocated then.
    """
    import zstandard

    def refuse(message: str) -> GraftFormatError:
        return GraftFormatError(message, file=file, offset=offset, field="section.zstd")

    try:
        stated = zstandard.get_frame_parameters(stored).content_size
        if stated != raw_size:
            raise refuse("the compressed frame states another size than the section table")
        raw = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompress(
            stored, max_output_size=raw_size, allow_extra_data=False
        )
    except zstandard.ZstdError as problem:
        raise refuse(f"the compressed section cannot be read: {problem}") from problem
    if len(raw) != raw_size:
        raise refuse("the compressed section holds less than the section table states")
    return raw
