"""Debian's kernel in QEMU: userland, a supplement, and a call to an extension over virtio-serial."""

import gzip
import io
import json
import lzma
from pathlib import Path

from vmgraft.vendor.pack import load_package
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.supplements import cpio

MODULES = (
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
    "virtio_console", "cdrom", "isofs",
)  # fmt: skip
ID = "org.example.seed"
MANIFEST = f"""
id = "{ID}"
version = "1.0"
securityVersion = 1
abi = "vmgraft/1"
module = "module.wasm"
onFault = "stop"
capabilities = ["hypercall:16-17", "log", "supplement:iso", "supplement:initrd"]
[[supplements]]
kind = "iso"
label = "CIDATA"
root = "seed"
[[supplements]]
kind = "initrd"
root = "early"
"""
#: Requests as shell's printf writes them: number 16 with 2 and 3, the discovery leaf, garbage, a number nobody has.
INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
for m in MODULES; do insmod /modules/$m.ko; done
until [ -e /sys/class/virtio-ports ] && [ -n "$(ls /sys/class/virtio-ports)" ]; do sleep 0.05; done
echo "userland on $(uname -r)"
echo "early: $(cat /early.txt)"
mount -t iso9660 -o ro /dev/vdb /mnt && echo "seed: $(cat /mnt/user-data)"
dd if=/dev/vdb of=/dev/vdb bs=512 count=1 conv=notrunc 2>/dev/null || echo "the volume is read-only"
echo disk-mark > /tmp.txt; dd if=/tmp.txt of=/dev/vda bs=512 seek=1 conv=notrunc 2>/dev/null; sync
for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name)" = org.vmgraft.0 ] && port=/dev/${p##*/}; done
exec 3<>$port
call() { printf "$1" >&3; echo "$2 $(dd bs=24 count=1 <&3 2>/dev/null | hexdump -v -e '24/1 "%02x"')"; }
call 'VGRQ\007\0\0\0\020\0\0\0\0\0\0\0\002\0\0\0\003\0\0\0\0\0\0\0\0\0\0\0' sum
call 'VGRQ\010\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0' discovery
call 'garbage!' garbage
call 'VGRQ\011\0\0\0\143\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0' nobody
poweroff -f
"""


def _kernel() -> tuple[Path, Path]:
    """Return Debian's kernel for virtual machines and the folder of its modules."""
    found = sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"))
    for kernel in reversed(found):
        modules = Path("/lib/modules") / kernel.name.removeprefix("vmlinuz-")
        if modules.is_dir():
            return kernel, modules
    raise FileNotFoundError("Debian's linux-image-cloud-amd64 is not installed: see requirements/install-debian")


def _initrd(modules: Path) -> bytes:
    files = [("bin/busybox", Path("/bin/busybox").read_bytes(), True)]  # Debian's busybox-static
    files.append(("init", INIT.replace("MODULES", " ".join(MODULES)).encode(), True))
    for name in MODULES:
        (path,) = modules.rglob(f"{name}.ko*")
        data = path.read_bytes()
        files.append((f"modules/{name}.ko", lzma.decompress(data) if path.suffix == ".xz" else data, False))
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(cpio.archive(files, mtime=0))
    return packed.getvalue()


class Linux:
    """An image with an extension that answers calls and adds files, and a kernel to start."""

    def __init__(self, studio, launch) -> None:
        self.studio, self._launch = studio, launch
        self.kernel, modules = _kernel()
        self.initrd = studio.folder / "initrd.img"
        self.initrd.write_bytes(_initrd(modules))

    def graft(self, body: str) -> None:
        folder = self.studio.folder / "extension"
        for name, text in (("seed/user-data", "hello from the vendor"), ("early/early.txt", "before the root")):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(text)
        (folder / "manifest.toml").write_text(MANIFEST)
        (folder / "module.wasm").write_bytes(self.studio.wat(body))
        self.studio.image.write_bytes(bytes(1 << 20))
        self.studio.attach(load_package(folder))

    def run(self, **chosen: object):
        append = "console=ttyS0 quiet panic=-1"
        chosen = {"memory_mib": 256, "kernel": self.kernel, "initrd": self.initrd, "append": append} | chosen
        return self._launch(**chosen).run()


SUM = """(func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64)
  (i64.add (i64.extend_i32_u (local.get 0))
           (i64.add (i64.extend_i32_u (local.get 1)) (i64.extend_i32_u (local.get 2)))))"""


def test_userland_a_supplement_and_a_call(studio, launch) -> None:
    linux = Linux(studio, launch)
    linux.graft(SUM)
    before = studio.image.read_bytes()
    report = linux.run()
    lines = report.result.serial.decode().splitlines()
    assert report.error is None
    assert report.result.reason is EndReason.SHUTDOWN
    assert any(line.startswith("userland on ") for line in lines)
    for line in (
        "early: before the root",
        "seed: hello from the vendor",
        "the volume is read-only",
        "sum 5647525307000000" + "00000000" + "00000000" + (16 + 2 + 3).to_bytes(8, "little").hex(),
        "discovery 5647525308000000" + "00000000" + "00000000" + (1 << 32 | 0x56474654).to_bytes(8, "little").hex(),
        "garbage 5647525300000000" + "02000000" + "00000000" + "f" * 16,
        "nobody 5647525309000000" + "01000000" + "00000000" + "f" * 16,
    ):
        assert line in lines, "\n".join(lines)
    assert report.result.exits["api"] == 3
    assert report.result.exits["api-malformed"] == 1
    assert report.result.blocks_written == 1
    assert studio.image.read_bytes() == before
    events = [record["event"] for record in studio.log()]
    assert events.count("supplement") == 2
    assert report.extensions[0]["calls"] == 1


def test_the_plan_names_the_kernel(studio, launch) -> None:
    linux = Linux(studio, launch)
    linux.graft(SUM)
    report = launch(audit_log=None, kernel=linux.kernel, initrd=linux.initrd).plan()
    plan = json.loads(json.dumps(report.plan.to_dict()))
    assert plan["engine"] == "qemu"
    assert len(plan["direct"]["kernelSha256"]) == 64
