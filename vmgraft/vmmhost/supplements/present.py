"""From the files of verified extensions to what the guest sees: volumes, an initrd, bytes over its disk.

Nothing is built of what the policy does not grant, and nothing is used that was not compared with the signed digests
when it was taken. Equal extensions give equal volumes: their dates are the statement's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from vmgraft.errors import CapabilityError, GraftFormatError, UsageError
from vmgraft.signing.contract import VerifiedExtension
from vmgraft.signing.signedfiles import SignedFiles
from vmgraft.signing.supplements import SupplementSpec, first_clash, supplements_of
from vmgraft.signing.times import parse_time
from vmgraft.vmmhost.core.drives import Drive, DriveKind
from vmgraft.vmmhost.supplements import cpio
from vmgraft.vmmhost.supplements.iso import VolumeFile, build_volume
from vmgraft.vmmhost.supplements.media import OverlaidDisk, ReadOnlyDisk

if TYPE_CHECKING:
    from vmgraft.imagefmt.blob import Blob
    from vmgraft.vmmhost.core.drives import Disk

#: Most volumes beside the boot disk; BIOS and QEMU drive numbers are scarce.
MAX_VOLUMES: Final = 8
#: Date of everything where no statement gives one: the first that all file systems know (FAT begins in 1980).
EPOCH: Final = datetime(1980, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Presented:
    """What the guest gets.

    Attributes:
        disk: Its boot disk, with the block overlays.
        drives: Further drives: the volumes.
        initrd: An archive to be put behind the initrd of the guest's kernel; empty where there is none.
        records: What was built, for the audit log: ``extension``, ``kind``, ``label`` and ``drive`` or ``offset``, the
            ``size``, and the ``sha256`` of the volume, archive or bytes.
    """

    disk: Disk
    drives: tuple[Drive, ...] = ()
    initrd: bytes = b""
    records: tuple[dict[str, Any], ...] = ()

    def with_initrd(self, initrd: bytes) -> bytes:
        """Return the operator's initrd with what extensions add behind it."""
        return cpio.append(initrd, self.initrd) if self.initrd else initrd


def planned(extension: VerifiedExtension) -> list[dict[str, Any]]:
    """Return what the launch plan says of an extension's supplements.

    ``sha256`` is over the canonical JSON of what each consists of: kind, label, offset, and name, size, SHA-256 and
    executable permission of every file.
    """
    return [_planned(extension, item) for item in supplements_of(extension.manifest)]


def _planned(extension: VerifiedExtension, item: SupplementSpec) -> dict[str, Any]:
    files = _files_of(extension)
    entries = [(name, files.entry(path)) for name, path in item.files]
    body = {
        "kind": item.kind,
        "label": item.label,
        "drive": item.drive,
        "offset": item.offset,
        "files": [[name, entry.size, entry.sha256, entry.executable] for name, entry in entries],
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {
        "kind": item.kind,
        **_place(item),
        "files": len(entries),
        "size": sum(entry.size for _, entry in entries),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _place(item: SupplementSpec) -> dict[str, Any]:
    if item.kind == "iso":
        return {"label": item.label, "drive": item.drive}
    return {"offset": item.offset} if item.kind == "blocks" else {}


def check_supplements(extensions: Sequence[VerifiedExtension], disk_size: int, *, kernel: bool) -> None:
    """Refuse what cannot be presented, before anything is built or started.

    Args:
        extensions: In load order.
        disk_size: Bytes of the guest's boot disk.
        kernel: Whether this host loads the guest's kernel, and so its initial RAM disk.

    Raises:
        CapabilityError: a supplement is not granted, or two extensions want the same bytes or label.
        UsageError: an initial RAM disk is to be supplemented that the guest loads by itself.
        GraftFormatError: an overlay does not lie inside the disk, or there are too many volumes.
    """
    volumes = 0
    for extension, item in _all(extensions):
        if item.capability not in extension.capabilities:
            raise CapabilityError(
                f"{extension.id} has a supplement of kind {item.kind}, which the policy does not grant",
                field=item.capability,
                hint=f"the grant is called {item.capability}; --without-supplements runs the guest without any",
            )
        if item.kind == "initrd" and not kernel:
            raise UsageError(
                f"{extension.id} adds files to the initial RAM disk, and the guest loads its own from its disk",
                field=item.capability,
                hint="--kernel and --initrd let the host load it; --without-supplements runs the guest without any",
            )
        volumes += item.kind == "iso"
        if item.kind == "blocks":
            end = item.offset + _files_of(extension).entry(item.files[0][1]).size
            if end > disk_size:
                message = f"{extension.id} lays blocks up to byte {end} over a disk of {disk_size} bytes"
                raise GraftFormatError(message, field="supplements", hint="the extension was made for a larger disk")
    if volumes > MAX_VOLUMES:
        raise GraftFormatError(f"{volumes} volumes, at most {MAX_VOLUMES} can be shown", field="supplements")
    clash = first_clash([(extension.id, extension.manifest) for extension in extensions])
    if clash is not None:
        raise CapabilityError(clash, field="supplements", hint="leave one of the two extensions out")


def check_label(extensions: Sequence[VerifiedExtension], label: str) -> None:
    """Refuse a volume of the operator's with a label that an extension's volume has: a guest finds them by it.

    Raises:
        CapabilityError: there are two.
    """
    for extension, item in _all(extensions):
        if item.kind == "iso" and item.label == label:
            raise CapabilityError(
                f"{extension.id} shows a volume labelled {label}, as the volume of the layers is",
                field="supplements",
                hint="leave --layer out, or run --without-supplements",
            )


def build(extensions: Sequence[VerifiedExtension], base: Disk, *, created: datetime = EPOCH) -> Presented:
    """Build everything the extensions supplement; later extensions' initrd files win over earlier ones'.

    The evidence that the extensions were verified from has to be open. Nothing of it is needed afterwards.

    Args:
        extensions: Verified, in load order.
        base: The guest's boot disk.
        created: Date of everything that is built, with a zone.

    Raises:
        CapabilityError, GraftFormatError: as :func:`check_supplements`.
        PayloadMismatchError: a file is not any more what was verified.
        FileError: a volume cannot be written.
        UsageError: a volume cannot hold the files.
    """
    check_supplements(extensions, base.size, kernel=True)
    drives: list[Drive] = []
    patches: list[tuple[int, bytes]] = []
    archives: list[bytes] = []
    records: list[dict[str, Any]] = []
    for extension, item in _all(extensions):
        files = _files_of(extension)
        if item.kind == "iso":
            blob = build_volume(item.label, signed_tree(extension, item), created=created)
            drives.append(_drive(blob, item))
            size, digest = blob.size, blob.sha256.hex()
        elif item.kind == "initrd":
            members = ((name, files.read(path), files.entry(path).executable) for name, path in item.files)
            archives.append(cpio.archive(members, mtime=_seconds(created)))
            size, digest = len(archives[-1]), hashlib.sha256(archives[-1]).hexdigest()
        else:
            patches.append((item.offset, files.read(item.files[0][1])))
            size, digest = len(patches[-1][1]), hashlib.sha256(patches[-1][1]).hexdigest()
        files.release()
        records.append({"extension": extension.id, "kind": item.kind, **_place(item), "size": size, "sha256": digest})
    disk = OverlaidDisk(base, patches) if patches else base
    return Presented(disk, tuple(drives), b"".join(archives), tuple(records))


def _drive(volume: Blob, item: SupplementSpec) -> Drive:
    if item.drive == "disk":
        return Drive(ReadOnlyDisk(volume, sector_size=512), DriveKind.HARD_DISK, read_only=True, name=item.label)
    return Drive(ReadOnlyDisk(volume), DriveKind.CDROM, read_only=True, name=item.label)


def signed_tree(extension: VerifiedExtension, item: SupplementSpec) -> dict[str, VolumeFile]:
    """Return the files of a supplement, each checked when it is read."""
    files = _files_of(extension)
    return {name: VolumeFile(_Signed(files, path), files.entry(path).executable) for name, path in item.files}


def created_of(statement: dict[str, Any] | None) -> datetime:
    """Return when a verified statement was made, which is the date of what is built from it."""
    if statement is None:
        return EPOCH
    return parse_time(statement["predicate"]["created"], file=None, field="created", error=GraftFormatError)


def _all(extensions: Sequence[VerifiedExtension]) -> Iterator[tuple[VerifiedExtension, SupplementSpec]]:
    for extension in extensions:
        for item in supplements_of(extension.manifest):
            yield extension, item


def _files_of(extension: VerifiedExtension) -> SignedFiles:
    if extension.files is None:
        raise GraftFormatError(f"{extension.id} has supplements and no files", field="files")
    return extension.files


def _seconds(created: datetime) -> int:
    """Return a time within the 32 bits that a cpio header has for it."""
    return min(max(int(created.timestamp()), 0), 0xFFFFFFFF)


class _Signed:
    """One signed file as a volume reads it: taken and checked once when the first byte is asked for."""

    def __init__(self, files: SignedFiles, path: str) -> None:
        self._files, self._path, self.size = files, path, files.entry(path).size
        self._data: bytes | None = None

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the file; at its end it lets go of them."""
        if self._data is None:
            self._data = self._files.read(self._path)
        part = self._data[offset : offset + length]
        if offset + length >= self.size:
            self._data = None
        return part
