"""Readable names of partition types and attributes."""

from __future__ import annotations

#: Types of MBR partitions that are common today; the list of all is kept by https://www.win.tue.nl/~aeb/partitions/.
MBR_TYPES = {
    0x01: "FAT12",
    0x04: "FAT16 up to 32 MiB",
    0x05: "extended",
    0x06: "FAT16",
    0x07: "NTFS or exFAT",
    0x0B: "FAT32",
    0x0C: "FAT32 (LBA)",
    0x0E: "FAT16 (LBA)",
    0x0F: "extended (LBA)",
    0x11: "hidden FAT12",
    0x14: "hidden FAT16 up to 32 MiB",
    0x16: "hidden FAT16",
    0x17: "hidden NTFS, or isohybrid",
    0x1B: "hidden FAT32",
    0x1C: "hidden FAT32 (LBA)",
    0x27: "Windows recovery",
    0x42: "Windows dynamic disk",
    0x82: "Linux swap",
    0x83: "Linux",
    0x85: "Linux extended",
    0x8E: "Linux LVM",
    0x96: "CHRP ISO 9660",
    0xA5: "FreeBSD",
    0xA6: "OpenBSD",
    0xA9: "NetBSD",
    0xAF: "HFS or HFS+",
    0xCD: "isohybrid",
    0xDA: "non-file-system data",
    0xEE: "GPT protective",
    0xEF: "EFI system",
    0xFB: "VMware VMFS",
    0xFD: "Linux RAID",
}

#: Types of GPT partitions: UEFI 2.10, table 5-7; Microsoft, "PARTITION_INFORMATION_GPT"; the UAPI group's Discoverable
#: Partitions Specification; FreeBSD gpart(8); Apple Technical Note TN2166; GRUB manual, "BIOS installation".
GPT_TYPES = {
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B": "EFI system",
    "024DEE41-33E7-11D3-9D69-0008C781F39F": "MBR partition scheme",
    "21686148-6449-6E6F-744E-656564454649": "BIOS boot",
    "E3C9E316-0B5C-4DB8-817D-F92DF00215AE": "Microsoft reserved",
    "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": "Microsoft basic data",
    "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC": "Windows recovery",
    "5808C8AA-7E8F-42E0-85D2-E1E90434CFB3": "Windows LDM metadata",
    "AF9B60A0-1431-4F62-BC68-3311714A69AD": "Windows LDM data",
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4": "Linux",
    "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F": "Linux swap",
    "E6D6D379-F507-44C2-A23C-238F2A3DF928": "Linux LVM",
    "A19D880F-05FC-4D3B-A006-743F0F84911E": "Linux RAID",
    "BC13C2FF-59E6-4262-A352-B275FD6F7172": "Linux extended boot",
    "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": "Linux root (x86-64)",
    "44479540-F297-41B2-9AF7-D131D5F0458A": "Linux root (x86)",
    "B921B045-1DF0-41C3-AF44-4C6F280D3FAE": "Linux root (arm64)",
    "8484680C-9521-48C6-9C11-B0720656F69E": "Linux /usr (x86-64)",
    "2C7357ED-EBD2-46D9-AEC1-23D437EC2BF5": "Linux root verity (x86-64)",
    "77FF5F63-E7B6-4633-ACF4-1565B864C0E6": "Linux /usr verity (x86-64)",
    "41092B05-9FC8-4523-994F-2DEF0408B176": "Linux root verity signature (x86-64)",
    "933AC7E1-2EB4-4F13-B844-0E14E2AEF915": "Linux /home",
    "3B8F8425-20E0-4F3B-907F-1A25A76F98E8": "Linux /srv",
    "4D21B016-B534-45C2-A9FB-5C16E091FD2D": "Linux /var",
    "CA7D7CCB-63ED-4C53-861C-1742536059CC": "Linux LUKS",
    "516E7CB4-6ECF-11D6-8FF8-00022D09712B": "FreeBSD",
    "83BD6B9D-7F41-11DC-BE0B-001560B84F0F": "FreeBSD boot",
    "516E7CB6-6ECF-11D6-8FF8-00022D09712B": "FreeBSD UFS",
    "516E7CBA-6ECF-11D6-8FF8-00022D09712B": "FreeBSD ZFS",
    "6A898CC3-1DD2-11B2-99A6-080020736631": "Solaris /usr or Apple ZFS",
    "48465300-0000-11AA-AA11-00306543ECAC": "Apple HFS+",
    "7C3457EF-0000-11AA-AA11-00306543ECAC": "Apple APFS",
    "FE3A2A5D-4F32-41A7-B725-ACCC3285A309": "ChromeOS kernel",
    "3CB8E202-3B7E-47DD-8A3C-7FF2A13CFCEC": "ChromeOS root",
}

#: UEFI 2.10, table 5-8: attributes that every type has.
_COMMON = {0: "required", 1: "no-block-io", 2: "legacy-boot"}
#: Microsoft, "PARTITION_BASIC_DATA_GPT": attributes of basic data partitions; Linux uses the same for its own.
_OF_TYPE = {59: "grow-file-system", 60: "read-only", 61: "shadow-copy", 62: "hidden", 63: "no-automount"}


def gpt_flags(attributes: int) -> list[str]:
    """Return the names of the bits set in a GPT entry's attributes; ``bit-N`` for those without."""
    names = _COMMON | _OF_TYPE
    return [names.get(bit, f"bit-{bit}") for bit in range(64) if attributes >> bit & 1]
