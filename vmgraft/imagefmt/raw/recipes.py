"""How to open the content of a grafted raw image with other programs, trailer hidden."""

from __future__ import annotations

from pathlib import Path
from shlex import quote


def recipes(path: Path, size: int) -> dict[str, str]:
    """Return command lines and snippets by program.

    Args:
        path: The image.
        size: Bytes of guest content, a multiple of 512.
    """
    from xml.sax.saxutils import quoteattr

    # QEMU splits options at commas; a doubled comma stands for one.
    options = f"driver=raw,size={size},file.driver=file,file.filename={str(path).replace(',', ',,')}"
    piece = f"<slices><slice type='storage' offset='0' size='{size}'/></slices>"
    return {
        "qemu": f"-blockdev {quote('node-name=disk0,' + options)}",
        "qemu-img": f"--image-opts {quote(options)}",
        "nbdkit": f"nbdkit --filter=truncate file {quote(str(path))} truncate={size}",
        "libvirt": f"<source file={quoteattr(str(path))}>{piece}</source>",
        "losetup": f"losetup --find --show --sizelimit {size} {quote(str(path))}",
    }
