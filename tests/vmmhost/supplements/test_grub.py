"""GRUB's own ISO 9660 driver, run on the software CPU, reads a volume that was made here."""

from pathlib import Path

from vmgraft.imagefmt.blob import BytesBlob
from vmgraft.vmmhost.core.drives import Drive, DriveKind
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.supplements.iso import VolumeFile, build_volume
from vmgraft.vmmhost.supplements.media import ReadOnlyDisk
from vmgraft.vmmhost.supplements.present import EPOCH

GRUB_ISO = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")


def test_grub_reads_a_volume_that_is_shown_as_a_disk():
    files = {"some folder/A longer name.text": b"read by GRUB, for sure", "user-data": b"#cloud-config\n"}
    tree = {path: VolumeFile(BytesBlob(data)) for path, data in files.items()}
    volume = build_volume("CIDATA", tree, created=EPOCH)
    shown = Drive(ReadOnlyDisk(volume, sector_size=512), DriveKind.HARD_DISK, read_only=True, name="CIDATA")
    boot = ReadOnlyDisk(BytesBlob(GRUB_ISO.read_bytes()))
    keys = 'cls (hd0)\rcat "(hd0)/some folder/A longer name.text"\r'
    with Machine(Engine.SOFT, boot, keys=keys, timeout=60, drives=(shown,), until="read by GRUB, for sure") as machine:
        result = machine.run()
    screen = "\n".join(result.screen)
    assert result.until_seen, screen
    assert "Label `CIDATA'" in screen, screen
