"""VHDX files made by hand, independently of the package, and the real qemu-img to compare with."""

import functools
import struct
import subprocess
from uuid import UUID

MIB = 1 << 20
BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
GRAFT = UUID("441a6886-7621-4a2e-baa8-de42ff3059e7").bytes_le
FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
DISK_ID = UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
LOGICAL = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
PHYSICAL = UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
PARENT = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
HEADERS = (64 << 10, 128 << 10)
TABLES = (192 << 10, 256 << 10)
LOG_AT, BAT_AT, METADATA_AT, DATA_AT = MIB, 2 * MIB, 3 * MIB, 4 * MIB


@functools.cache
def _crc_table():
    rows = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ 0x82F63B78 if value & 1 else value >> 1
        rows.append(value)
    return rows


@functools.lru_cache(maxsize=4096)
def crc32c(data):
    """One byte after the other, zeros and all."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def sealed(data, at=4):
    """The structure with its checksum filled in."""
    data = bytes(data[:at]) + bytes(4) + bytes(data[at + 4 :])
    return data[:at] + struct.pack("<I", crc32c(data)) + data[at + 4 :]


def header(sequence=7, *, log_guid=bytes(16), version=1, log_version=0, log=(MIB, LOG_AT), file_guid=b"F" * 16):
    body = struct.pack("<4sIQ", b"head", 0, sequence) + file_guid + b"D" * 16 + log_guid
    return sealed((body + struct.pack("<HHIQ", log_version, version, *log)).ljust(4096, b"\0"))


def table(rows=((BAT, BAT_AT, MIB, 1), (METADATA, METADATA_AT, MIB, 1)), count=None):
    body = struct.pack("<4sIII", b"regi", 0, len(rows) if count is None else count, 0)
    body += b"".join(struct.pack("<16sQII", *row) for row in rows)
    return sealed(body.ljust(65536, b"\0"))


def metadata(size, *, block=MIB, flags=0, logical=512, physical=4096, more=(), without=(), count=None):
    items = [
        (FILE_PARAMETERS, struct.pack("<II", block, flags), 4),
        (DISK_SIZE, struct.pack("<Q", size), 6),
        (DISK_ID, b"I" * 16, 6),
        (LOGICAL, struct.pack("<I", logical), 6),
        (PHYSICAL, struct.pack("<I", physical), 6),
        *more,
    ]
    items = [item for item in items if item[0] not in without]
    rows, values = b"", b""
    for guid, value, flags_of_item in items:
        rows += struct.pack("<16sIIII", guid, 65536 + len(values), len(value), flags_of_item, 0)
        values += value
    head = struct.pack("<8sHH20s", b"metadata", 0, len(items) if count is None else count, bytes(20))
    return ((head + rows).ljust(65536, b"\0") + values).ljust(MIB, b"\0")


def disk(path, entries=(), blocks=(), *, size=4 * MIB, places=(), **parameters):
    """Write a file; ``entries`` are the words of the block table, ``blocks`` the data from 4 MiB on."""
    with path.open("wb") as file:
        file.write(b"vhdxfile" + "made by hand".encode("utf-16-le"))
        for offset, data in (
            (HEADERS[0], header(7)),
            (HEADERS[1], header(8, file_guid=b"G" * 16)),
            *((offset, table()) for offset in TABLES),
            (BAT_AT, struct.pack(f"<{len(entries)}Q", *entries)),
            (METADATA_AT, metadata(size, **parameters)),
            *((DATA_AT + number * MIB, data) for number, data in enumerate(blocks)),
            *places,
        ):
            file.seek(offset)
            file.write(data)
        file.truncate(max(file.seek(0, 2), DATA_AT))
    return path


def entry(offset, state=6):
    return offset | state


def simple(path, **parameters):
    """A disk of 4 blocks of 1 MiB: data, nothing, data, zeros."""
    entries = (entry(5 * MIB), 0, entry(4 * MIB), entry(0, 2))
    data = (b"third" * 800 + bytes(MIB - 4006) + b"<end>\n", b"first" * 900)
    return disk(path, entries, data, **{"places": [(6 * MIB - 1, b"\0")]} | parameters)


def write_sparse(path, data):
    """Write a file with holes where it is zero: quick to flush."""
    with path.open("wb") as file:
        for at in range(0, len(data), 65536):
            piece = data[at : at + 65536]
            if piece != bytes(len(piece)):
                file.seek(at)
                file.write(piece)
        file.truncate(len(data))


def put(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def get(path, offset, size):
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def run(*command, check=True):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=120)
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def make(path, size="64M", *options):
    run("qemu-img", "create", "-q", "-f", "vhdx", *(["-o", ",".join(options)] if options else []), path, size)
    return path


def qemu_io(path, *commands):
    run("qemu-io", "-f", "vhdx", *(part for command in commands for part in ("-c", command)), path)
    return path


def qemu_content(path):
    """What QEMU says the guest sees."""
    out = path.with_suffix(".converted")
    run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


def qemu_check(path):
    assert "No errors" in run("qemu-img", "check", "-f", "vhdx", path).stdout


def log_entry(guid, *, sequence=1, offset=LOG_AT, target=BAT_AT, page=bytes(4096), file_size=DATA_AT):
    """A log entry of one data sector, as 2.3.1 lays it out; its tail is itself."""
    start = struct.pack("<4sIIIQII16sQQ", b"loge", 0, 8192, 0, sequence, 1, 0, guid, file_size, file_size)
    descriptor = struct.pack("<4s4s8sQQ", b"desc", page[-4:], page[:8], target, sequence)
    sector = struct.pack("<4sI", b"data", sequence >> 32) + page[8:-4] + struct.pack("<I", sequence & 0xFFFFFFFF)
    return offset, sealed((start + descriptor).ljust(4096, b"\0") + sector)


def set_log_guid(path, guid):
    """Give both headers a log GUID."""
    for offset in HEADERS:
        raw = bytearray(get(path, offset, 4096))
        raw[48:64] = guid
        put(path, offset, sealed(raw))
