"""The hook as libvirt runs it: a program with arguments, the domain's XML on stdin, and an exit code."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import VmgraftError
from vmgraft.vmmhost.qemu.domain import DomainDisk, image_format, parse_domain

ROOT = Path(__file__).resolve().parents[3]
DRIVER = "<driver name='qemu' type='{format}'/>"
DISK = f"<disk type='file' device='disk'>{DRIVER}{{inner}}<target dev='vda' bus='virtio'/></disk>"


class Host:
    """A host with the hook installed, and a graft in an image."""

    def __init__(self, studio) -> None:
        self.studio, self.config = studio, studio.folder / "hook.toml"
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        module, function = scripts["vmgraft-libvirt-hook"].split(":")
        self.program = studio.folder / "qemu"
        code = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom {module} import {function}\n"
        self.program.write_text(code + f"sys.exit({function}())\n")
        self.program.chmod(0o755)
        self.configure()

    def configure(self, text: str = "") -> None:
        self.config.write_text('policy = "policy.json"\n' + text)

    def __call__(self, xml: str | bytes, *arguments: str, code: int = 0) -> str:
        data = xml.encode() if isinstance(xml, str) else xml
        done = subprocess.run(
            [str(self.program), *(arguments or ("guest", "prepare", "begin", "-"))],
            input=data, capture_output=True, check=False, timeout=60,
            env={"PATH": os.environ["PATH"], "VMGRAFT_LIBVIRT_HOOK": str(self.config)},
        )  # fmt: skip
        said = done.stderr.decode()
        assert "Traceback" not in said, said
        assert done.returncode == code, f"{done.returncode}: {said}"
        assert done.stdout == b""  # libvirt takes it for XML in some operations
        assert bool(said) is (code != 0)
        return said


@pytest.fixture
def host(studio) -> Host:
    studio.graft(studio.wat(""), capabilities=["hypercall:16-17"])
    return Host(studio)


def domain(*disks: str, root: str = "<domain type='qemu'>", more: str = "") -> str:
    return (
        f"{root}<name>guest</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os>"
        f"<devices>{''.join(disks)}</devices>{more}</domain>"
    )


def disk(path: object, *, format: str = "raw", inside: str = "", beside: str = "") -> str:
    return DISK.format(format=format, inner=f"<source file='{path}'>{inside}</source>{beside}")


def test_a_verified_domain_starts_and_its_xml_is_libvirts(host: Host, tmp_path: Path) -> None:
    xml = domain(
        disk(host.studio.image),
        "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>",
    )
    (tmp_path / "domain.xml").write_text(xml)
    done = subprocess.run(
        ["virt-xml-validate", str(tmp_path / "domain.xml"), "domain"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    host(xml)


def test_content_that_changed_is_refused_with_the_reason(host: Host) -> None:
    with host.studio.image.open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    said = host(domain(disk(host.studio.image)), code=12)
    assert "domain guest refused: content-mismatch: vda, " in said
    assert str(host.studio.image) in said


def test_one_bad_disk_among_good_ones_is_enough(host: Host, tmp_path: Path) -> None:
    bare = tmp_path / "bare.img"
    bare.write_bytes(bytes(1 << 20))
    assert "no-graft" in host(domain(disk(host.studio.image), disk(bare)), code=4)
    host(domain(disk(tmp_path / "missing.img")), code=3)


@pytest.mark.parametrize(
    "operation",
    [("guest", "start", "begin", "-"), ("guest", "release", "end", "-"), ("guest", "migrate", "begin", "-")],
)
def test_other_operations_are_let_pass(host: Host, operation: tuple[str, ...]) -> None:
    host(b"not even XML", *operation)


def test_called_wrongly_it_refuses(host: Host) -> None:
    host("", "guest", code=2)


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (b"", "no element found"),
        (b"<domain><name>x</name>", "no element found"),
        (b"<network/>", "not that of a domain"),
        (b"<!DOCTYPE domain [<!ENTITY a 'b'>]><domain>&a;</domain>", "document type"),
        (b"<domain>" + b"<a>" * 100 + b"</a>" * 100 + b"</domain>", "nested too deep"),
        (b"<domain><devices>" + b"<disk/>" * 300 + b"</devices></domain>", "too many disks"),
        (b"<domain a='" + b"x" * 5000 + b"'/>", "longer than"),
        (b"<domain>" + b" " * (4 << 20) + b"</domain>", "longer than"),
        (b"\xff\xfe<\0d\0", "cannot be read"),
    ],
)
def test_hostile_xml_is_refused(host: Host, xml: bytes, words: str) -> None:
    assert words in host(xml, code=2)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200).map(lambda text: f"<domain><devices><disk>{text}</disk></devices></domain>".encode())
       | st.binary(max_size=200))  # fmt: skip
def test_any_bytes_are_read_or_refused(xml: bytes) -> None:
    try:
        parse_domain(xml)
    except VmgraftError as error:
        assert error.message


@pytest.mark.parametrize(
    "what",
    [
        "<disk type='network' device='disk'><source protocol='nbd' name='x'><host name='h' port='1'/></source></disk>",
        "<disk type='volume' device='disk'><source pool='p' volume='v'/></disk>",
        "<disk type='file' device='disk'/>",
        "<disk type='file' device='disk'><source file='relative.img'/></disk>",
        "<disk type='block' device='lun'><source dev='/dev/sda'/></disk>",
        "<disk type='dir' device='floppy'><source dir='/tmp'/></disk>",
    ],
)
def test_disks_that_cannot_be_verified_are_refused(host: Host, what: str) -> None:
    assert "cannot be verified" in host(domain(what), code=3)


def test_a_disk_on_a_trusted_socket(host: Host) -> None:
    xml = domain(
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd'>"
        "<host transport='unix' socket='/run/vmgraft/a.sock'/></source><target dev='vda' bus='virtio'/></disk>"
    )
    host(xml, code=3)
    host.configure('trustedSockets = ["/run/vmgraft/a.sock"]')
    host(xml)
    twice = xml.replace("</source>", "<host transport='unix' socket='/run/vmgraft/a.sock'/></source>")
    host(twice, code=3)


def test_what_the_guest_would_see_has_to_be_what_was_verified(host: Host, tmp_path: Path) -> None:
    image = host.studio.image
    piece = "<slices><slice type='storage' offset='{}' size='{}'/></slices>"
    host(domain(disk(image, inside=piece.format(0, 1 << 20))))
    assert "part of the image" in host(domain(disk(image, inside=piece.format(512, 1 << 19))), code=3)
    other = "<backingStore type='file'><format type='raw'/><source file='/etc/hostname'/></backingStore>"
    assert "backing files" in host(domain(disk(image, beside=other)), code=3)
    host(domain(disk(image, beside="<backingStore/>")))
    locked = "<encryption format='luks'><secret type='passphrase' uuid='0'/></encryption>"
    assert "encrypted" in host(domain(disk(image, inside=locked)), code=3)


def test_libvirts_word_on_the_format_stands(host: Host) -> None:
    """A raw disk that begins like another image is judged as what the guest will see: raw."""
    assert image_format(DomainDisk(format="raw"), "qcow2") == "raw"
    assert image_format(DomainDisk(), "qcow2") == "raw"
    assert image_format(DomainDisk(format="raw"), "iso9660") == "iso9660"
    studio = host.studio
    for format, code in (("raw", 0), ("qcow2", 3), ("luks", 3)):
        host(domain(disk(studio.image, format=format)), code=code)


def test_arguments_for_qemu_are_refused_unless_allowed(host: Host) -> None:
    root = "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    more = "<qemu:commandline><qemu:arg value='-drive'/></qemu:commandline>"
    xml = domain(disk(host.studio.image), root=root, more=more)
    assert "arguments for QEMU" in host(xml, code=3)
    host.configure("allowCommandline = true")
    host(xml)


def test_exempt_domains_are_not_looked_at(host: Host) -> None:
    host.configure('exempt = ["router"]')
    host(domain(), "router", "prepare", "begin", "-")
    host("junk", "router", "prepare", "begin", "-")
    host("junk", "guest", "prepare", "begin", "-", code=2)


@pytest.mark.parametrize(
    "text", ["policy = 5", "nonsense", "", 'policy = "p"\nexempt = "x"', 'policy = "p"\nrequired = true', "policy = ''"]
)
def test_a_configuration_that_says_nothing_clear_refuses(host: Host, text: str) -> None:
    host.config.write_text(text)
    assert str(host.config) in host(domain(), code=2)


def test_without_a_configuration_everything_is_refused(host: Host) -> None:
    host.config.unlink()
    host(domain(), code=2)


def test_a_policy_that_cannot_be_used_refuses(host: Host) -> None:
    host.studio.policy.write_text("{}")
    host(domain(disk(host.studio.image)), code=18)
    host.studio.policy.unlink()
    host(domain(disk(host.studio.image)), code=18)


def test_a_rollback_memory_is_compared_with(host: Host) -> None:
    host.configure('state = "missing.db"')
    host(domain(disk(host.studio.image)), code=18)


@pytest.mark.parametrize(
    "inner",
    [
        "<source file='{image}'/><source file='/etc/hostname'/>",
        "<driver name='qemu' type='raw'/><driver name='qemu' type='qcow2'/><source file='{image}'/>",
    ],
    ids=["source", "driver"],
)
def test_what_stands_twice_is_refused(host: Host, inner: str) -> None:
    """Who reads the first and who reads the second would see different disks."""
    xml = f"<disk type='file' device='disk'>{inner.format(image=host.studio.image)}<target dev='vda'/></disk>"
    assert "two of what it has one of" in host(domain(xml), code=2)


def test_the_attribute_counts_that_libvirt_takes(host: Host) -> None:
    """``dev`` is the source of a block disk; a verified ``file`` beside it says nothing."""
    source = f"<source file='{host.studio.image}' dev='/etc/hostname'/>"
    said = host(domain(f"<disk type='block' device='disk'>{source}<target dev='vda'/></disk>"), code=4)
    assert "/etc/hostname" in said


@pytest.mark.parametrize(
    "change",
    [
        ("type='raw'", "type='qcow2'"),
        ("<source protocol='nbd'>", "<source protocol='nbd'><slices><slice offset='512' size='512'/></slices>"),
        ("<target", "<encryption format='luks'/><target"),
        ("<target", "<backingStore type='file'><format type='raw'/><source file='/etc/passwd'/></backingStore><target"),
    ],
    ids=["format", "slice", "encryption", "backing"],
)
def test_verified_bytes_are_not_read_as_something_else(host: Host, change: tuple[str, str]) -> None:
    """Served content that a guest has written a qcow2 header into would name any file of the host."""
    host.configure('trustedSockets = ["/run/vmgraft/a.sock"]')
    xml = domain(
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd'>"
        "<host transport='unix' socket='/run/vmgraft/a.sock'/></source><target dev='vda' bus='virtio'/></disk>"
    )
    assert "would not be shown" in host(xml.replace(*change, 1), code=3)


def test_a_data_store_is_refused(host: Host) -> None:
    inside = "<dataStore type='file'><format type='raw'/><source file='/etc/hostname'/></dataStore>"
    assert "cannot be verified" in host(domain(disk(host.studio.image, inside=inside)), code=3)


def test_a_backing_file_in_another_format_is_refused(host: Host) -> None:
    """The image says raw; read as qcow2 the same file shows other bytes, and names others."""
    studio = host.studio
    base, top = studio.folder / "base.img", studio.folder / "top.qcow2"
    base.write_bytes(os.urandom(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", str(top)], check=True)
    studio.graft(studio.wat(""), capabilities=["hypercall:16-17"], image=top)
    below = "<backingStore type='file'><format type='{}'/><source file='{}'/>{}</backingStore>"
    good = below.format("raw", base, "<backingStore/>")
    host(domain(disk(top, format="qcow2", beside=good)))
    for format, path in (("qcow2", base), ("raw", studio.image)):
        said = host(domain(disk(top, format="qcow2", beside=below.format(format, path, ""))), code=3)
        assert "other formats" in said
