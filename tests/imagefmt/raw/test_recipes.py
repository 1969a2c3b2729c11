"""The recipes that hide a trailer from other programs, each run by the program it is for."""

import os
import subprocess
from pathlib import Path

import pytest
from imagefmt_helpers import attach, tool

from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import open_image

MIB = 1 << 20


@pytest.fixture(params=[5 * MIB, 5 * MIB + 3])
def original(request):
    return os.urandom(request.param)


@pytest.fixture(params=["disk.img", "with, comma & 'quotes' and space.img"])
def grafted(request, original, tmp_path):
    path = tmp_path / request.param
    path.write_bytes(original)
    attach(path, Placement.INLINE)
    with open_image(path) as image:
        return path, image.metadata()["recipes"], original.ljust(image.virtual_size, b"\0")


def shell(command):
    done = tool("sh", "-c", command)
    return done.stdout.strip()


def test_qemu_img(grafted, tmp_path):
    _, recipes, content = grafted
    _, quoted = recipes["qemu-img"].split(" ", 1)
    shell(f"qemu-img convert --image-opts {quoted} -O raw {tmp_path}/out")
    assert (tmp_path / "out").read_bytes() == content


def test_qemu(grafted):
    """The emulator opens the node and exits; a wrong option would make it fail, a wrong size shows in the monitor."""
    _, recipes, content = grafted
    commands = ("qmp_capabilities", "query-named-block-nodes", "quit")
    script = "".join(f'{{"execute": "{command}"}}\n' for command in commands)
    command = f"qemu-system-x86_64 -display none -nodefaults -S -machine none {recipes['qemu']},read-only=on -qmp stdio"
    done = tool("sh", "-c", command, stdin=script)
    assert f'"virtual-size": {len(content)}' in done.stdout


def test_nbdkit(grafted, tmp_path):
    _, recipes, content = grafted
    command = recipes["nbdkit"].replace("nbdkit ", "nbdkit -U - --readonly ", 1)
    # nbdkit hands the command to a shell in which $uri is the server's address.
    shell(f"{command} --run 'nbdcopy \"$uri\" {tmp_path}/out'")
    assert (tmp_path / "out").read_bytes() == content


def test_losetup(grafted, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("setting up a loop device needs root")
    _, recipes, content = grafted
    device = shell(recipes["losetup"].replace("losetup ", "losetup --read-only ", 1))
    try:
        assert Path(device).is_block_device()
        assert tool("blockdev", "--getsize64", device).stdout.strip() == str(len(content))
        assert subprocess.run(["cat", device], capture_output=True, check=True).stdout == content
    finally:
        tool("losetup", "--detach", device)


DOMAIN = """<domain type='kvm'><name>test</name><memory>65536</memory><os><type>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/>{source}<target dev='vda' bus='virtio'/></disk>
</devices></domain>"""


def test_libvirt(grafted, tmp_path):
    """libvirt's own schema accepts the fragment, and an XML reader finds path and size in it."""
    path, recipes, content = grafted
    domain = tmp_path / "domain.xml"
    domain.write_text(DOMAIN.format(source=recipes["libvirt"]))
    tool("virt-xml-validate", domain, "domain")
    found = {
        name: tool("xmllint", "--xpath", f"string(//disk/source{name})", domain).stdout.strip()
        for name in ("/@file", "/slices/slice/@type", "/slices/slice/@offset", "/slices/slice/@size")
    }
    assert list(found.values()) == [str(path), "storage", "0", str(len(content))]
    domain.write_text(DOMAIN.format(source=recipes["libvirt"].replace("slices", "slice5")))
    assert tool("virt-xml-validate", domain, "domain", check=False).returncode != 0


def test_no_recipe_where_nothing_is_to_hide(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    attach(path, Placement.SIDECAR)
    with open_image(path) as image:
        assert "recipes" not in image.metadata()
