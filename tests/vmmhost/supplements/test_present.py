"""Supplements of signed extensions, from the graft to a running guest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from assembling import GUESTS, nasm
from click.testing import CliRunner

from vmgraft.cli.app import cli
from vmgraft.cli.runview import run_document
from vmgraft.cli.views import show_list
from vmgraft.errors import (
    CapabilityError,
    GraftFormatError,
    HostError,
    PayloadMismatchError,
    RollbackError,
    UsageError,
    VmgraftError,
)
from vmgraft.imagefmt.contract import Opening
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.schemas import validate
from vmgraft.signing.manifest import parse_manifest
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.signing.state import RollbackState
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import load_package
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.plan import RunOptions

DISK_SIZE = 1 << 20
ID = "org.example.seed"
MANIFEST = f"""
id = "{ID}"
version = "1.0"
securityVersion = 1
abi = "vmgraft/1"
capabilities = ["supplement:iso", "supplement:blocks"]
[[supplements]]
kind = "iso"
label = "CIDATA"
root = "seed"
[[supplements]]
kind = "blocks"
offset = 514
file = "patch"
"""


class Seed:
    """An extension folder with supplements, and an image that looks at them."""

    def __init__(self, studio):
        self.studio, self.folder = studio, studio.folder / "seed-ext"
        (self.folder / "seed").mkdir(parents=True)
        (self.folder / "seed" / "user-data").write_bytes(b"hello, guest\n")
        (self.folder / "patch").write_bytes(b"OVERLAID")
        self.boot = nasm(GUESTS / "supplements.asm").ljust(510, b"\0") + b"\x55\xaa"
        self.disk = (self.boot + b"0123456789abcdef").ljust(DISK_SIZE, b"\0")

    def graft(self, text=MANIFEST, grant=None, disk=None):
        (self.folder / "manifest.toml").write_text(text)
        self.studio.image.write_bytes(disk or self.disk)
        self.studio.attach(load_package(self.folder), grant=grant)

    def launcher(self, **chosen):
        self.studio.audit_log.unlink(missing_ok=True)
        options = RunOptions(**({"cpu": "soft", "timeout": 60, "audit_log": self.studio.audit_log} | chosen))
        return Launcher(self.studio.image, self.studio.policy, options)


@pytest.fixture
def seed(studio):
    return Seed(studio)


def extent_of(volume_folder, label):
    """Where xorriso says that a file lies."""
    listed = subprocess.run(
        ["xorriso", "-indev", str(volume_folder / label), "-find", "/user-data", "-exec", "report_lba"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return int(next(line for line in listed.splitlines() if line.startswith("File data lba")).split(",")[1])


def volume(seed, tmp_path):
    """The volume that a run will show, built from the graft as the run builds it."""
    from vmgraft.vmmhost.core.disk import VerifiedDisk
    from vmgraft.vmmhost.supplements.present import build, created_of

    with open_image(seed.studio.image) as image:
        graft = open_graft(image)
        graft.content(flat=False)
        report = seed.launcher().plan()
        statement = report.verification.statement
        # the plan's evidence is closed by now; the same extensions from this one
        from datetime import UTC, datetime

        from vmgraft.signing.policy import load_policy
        from vmgraft.signing.verify import verify_evidence

        policy = load_policy(seed.studio.policy)
        verified = verify_evidence(graft, policy, image_name="disk.img", now=datetime.now(UTC))
        base = VerifiedDisk(image, graft.tree.check)
        presented = build(verified.extensions, base, created=created_of(statement))
        (drive,) = presented.drives
        (tmp_path / drive.name).write_bytes(drive.disk.read(0, drive.disk.size))
        return presented


def test_a_guest_sees_the_volume_and_the_overlay_and_the_image_stays_pristine(seed, tmp_path, cpu):
    seed.graft()
    presented = volume(seed, tmp_path)
    lba = extent_of(tmp_path, "CIDATA")
    assert lba < 256
    seed.boot = seed.boot[:0x1F0] + lba.to_bytes(4, "little") + seed.boot[0x1F4:]
    seed.disk = seed.boot + seed.disk[512:]
    seed.graft()
    before = seed.studio.image.read_bytes()
    report = seed.launcher(cpu=cpu).run()
    assert report.error is None, report.result
    assert report.result.serial == b"01OVERLAIDabcdef" + b"CIDATA" + b"hello" + b"he!lo, guest\n\0\0\0"
    assert seed.studio.image.read_bytes() == before
    records = [line for line in seed.studio.log() if line["event"] == "supplement"]
    assert [(item["extension"], item["kind"]) for item in records] == [(ID, "iso"), (ID, "blocks")]
    assert records[0]["label"] == "CIDATA"
    assert records[1]["offset"] == 514
    assert records[1]["sha256"] == presented.records[1]["sha256"]
    plan = next(line for line in seed.studio.log() if line["event"] == "plan")["plan"]
    shown = plan["extensions"][0]["supplements"]
    assert [(item["kind"], item["size"]) for item in shown] == [("iso", 13), ("blocks", 8)]
    document = run_document(report, seed.studio.image, 0)
    assert document["supplements"] == [{"id": ID, "version": "1.0", "supplements": shown}]
    assert document["layer"] == []
    validate("report", document, file=None, error=VmgraftError)


def test_a_host_that_cannot_make_volumes_says_what_is_missing(seed, monkeypatch):
    seed.graft()
    monkeypatch.setitem(sys.modules, "pycdlib", None)
    with pytest.raises(HostError, match="without the package pycdlib") as caught:
        seed.launcher().run()
    assert "pip install pycdlib" in caught.value.hint
    assert seed.launcher(supplements=False).run().error is None


def test_without_supplements_the_guest_sees_its_disk_alone(seed):
    seed.graft()
    report = seed.launcher(supplements=False).run()
    assert run_document(report, seed.studio.image, 0)["supplements"] == []
    assert report.result.serial.startswith(b"0123456789abcdef" + b"?" + b"?")
    assert not [line for line in seed.studio.log() if line["event"] == "supplement"]


@pytest.mark.parametrize("missing", ["iso", "blocks"])
def test_a_supplement_that_is_not_granted_is_refused_by_name(seed, missing):
    granted = [f"supplement:{kind}" for kind in ("iso", "blocks") if kind != missing]
    seed.graft(grant=granted)
    report = seed.launcher().run()
    assert report.error == "capability-denied"
    assert report.result is None
    check = next(item for item in report.verification.checks if item.name == "capabilities")
    assert f"{ID} claims supplement:{missing}" in check.detail
    command = ["run", str(seed.studio.image), "--policy", str(seed.studio.policy), "--cpu", "soft"]
    assert CliRunner().invoke(cli, command, standalone_mode=False).return_value == 17


def test_a_policy_that_only_logs_does_not_grant(seed):
    seed.graft(grant=["supplement:iso"])
    document = json.loads(seed.studio.policy.read_text())
    document["trustPolicies"][0]["signatureVerification"] = {"level": "strict", "override": {"capabilities": "log"}}
    seed.studio.policy.write_text(json.dumps(document))
    for start in (seed.launcher().plan, seed.launcher().run):
        with pytest.raises(
            CapabilityError, match="supplement of kind blocks, which the policy does not grant"
        ) as caught:
            start()
        assert caught.value.field == "supplement:blocks"


def test_an_overlay_beyond_the_disk_is_refused(seed):
    seed.graft(MANIFEST.replace("514", str(DISK_SIZE - 7)))
    with pytest.raises(GraftFormatError, match=f"up to byte {DISK_SIZE + 1} over a disk of {DISK_SIZE}"):
        seed.launcher().plan()
    seed.graft(MANIFEST.replace("514", str(DISK_SIZE - 8)))
    assert seed.launcher().plan().error is None


def test_an_initrd_needs_a_kernel_that_the_host_loads(seed):
    text = MANIFEST.replace('"supplement:iso"', '"supplement:iso", "supplement:initrd"')
    seed.graft(text + '[[supplements]]\nkind = "initrd"\nroot = "seed"\n')
    with pytest.raises(UsageError, match="the guest loads its own"):
        seed.launcher().plan()
    (seed.studio.folder / "kernel").write_bytes(b"kernel")
    assert seed.launcher(kernel=seed.studio.folder / "kernel").plan().error is None


def test_files_changed_after_the_verification_are_noticed_when_they_are_taken(seed):
    from datetime import UTC, datetime

    from vmgraft.signing.policy import load_policy
    from vmgraft.signing.verify import verify_evidence

    noise = bytes(range(256)) * 8  # not compressed, so that its place in the file can be found
    (seed.folder / "patch").write_bytes(noise)
    seed.graft()
    with open_image(seed.studio.image) as image:
        graft = open_graft(image)
        report = verify_evidence(graft, load_policy(seed.studio.policy), image_name="x", now=datetime.now(UTC))
        (extension,) = report.extensions
        assert extension.files.read("patch") == noise
        extension.files.release()
        from vmgraft.imagefmt.record import SectionKind

        stored = graft.record.of_kind(SectionKind.FILES)[0]
        damaged = bytearray(graft.record.data._data)
        damaged[stored.offset + stored.stored_size // 2] ^= 1
        graft.record.data._data = bytes(damaged)
        with pytest.raises(PayloadMismatchError):
            extension.files.read("patch")


def test_the_example_is_what_cloud_init_looks_for(studio, tmp_path):
    """NoCloud wants a file system that blkid calls cidata or CIDATA, with user-data and meta-data at its root."""
    folder = Path(__file__).parents[3] / "examples" / "cloudinit"
    studio.image.write_bytes(bytes(1 << 20))
    packed = load_package(folder)
    attach(studio.image, [packed], [studio.key], AttachOptions(opening=Opening(root=studio.folder)))
    document = init_policy({"vendor": studio.key.public}, [parse_manifest(packed.manifest)])
    studio.policy.write_bytes(format_policy(document))
    command = [
        "vmgraft", "compose", str(studio.image), "-o", str(tmp_path / "seed.iso"), "--policy", str(studio.policy),
        "--label", "CIDATA",
    ]  # fmt: skip
    CliRunner().invoke(cli, command[1:], catch_exceptions=False)
    told = subprocess.run(
        ["blkid", "-p", "-o", "export", tmp_path / "seed.iso"], capture_output=True, text=True, check=True
    )
    assert {"LABEL=CIDATA", "TYPE=iso9660"} <= set(told.stdout.split("\n"))
    for name in ("user-data", "meta-data"):
        read = subprocess.run(["bsdtar", "-xOf", tmp_path / "seed.iso", name], capture_output=True, check=True).stdout
        assert read == (folder / "seed" / name).read_bytes()
    assert read.startswith(b"instance-id: ")


def test_further_images_are_shown_as_one_volume(seed, tmp_path):
    seed.graft()
    for name, files in {"base.iso": {"user-data": b"lower", "b": b"base"}, "top.iso": {"user-data": b"upper"}}.items():
        source = tmp_path / f"{name}.d"
        source.mkdir()
        for path, data in files.items():
            (source / path).write_bytes(data)
        subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", tmp_path / name, source], check=True)
        (seed.folder / "manifest.toml").write_text(MANIFEST.partition("capabilities")[0])
        options = AttachOptions(opening=Opening(root=tmp_path))
        attach(tmp_path / name, [load_package(seed.folder)], [seed.studio.key], options)
    layers = (tmp_path / "base.iso", tmp_path / "top.iso")
    report = seed.launcher(layers=layers, supplements=False).run()
    assert report.result.serial.startswith(b"0123456789abcdef" + b"UNION ")
    plan = next(line for line in seed.studio.log() if line["event"] == "plan")["plan"]
    assert [item["image"] for item in plan["union"]["layers"]] == list(map(str, layers))
    composed = report.plan.union
    (tmp_path / "union.iso").write_bytes(composed.volume.read_all())
    read = subprocess.run(["bsdtar", "-xOf", tmp_path / "union.iso", "user-data"], capture_output=True, check=True)
    assert read.stdout == b"upper"
    (tmp_path / "stranger.iso").write_bytes((tmp_path / "base.iso").read_bytes()[: -4096 * 2])
    with pytest.raises(VmgraftError) as caught:
        seed.launcher(layers=(tmp_path / "stranger.iso",)).plan()
    assert caught.value.file == str(tmp_path / "stranger.iso")


def layer_of(seed, folder, version):
    """An ISO image whose extension adds a file to what is in it."""
    path = folder / f"layer{version}.iso"
    subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", path, seed.folder / "seed"], check=True)
    text = MANIFEST.partition("capabilities")[0].replace("securityVersion = 1", f"securityVersion = {version}")
    text = text.replace(ID, "org.example.layer") + 'capabilities = ["supplement:iso"]\n'
    (seed.folder / "manifest.toml").write_text(text + '[[supplements]]\nkind = "iso"\nlabel = "L"\nroot = "seed"\n')
    packed = load_package(seed.folder)
    attach(path, [packed], [seed.studio.key], AttachOptions(opening=Opening(root=folder)))
    return path, parse_manifest(packed.manifest)


def test_layers_are_compared_with_the_rollback_memory_and_remembered(seed, tmp_path):
    """A layer is part of what ran: an older one is refused from then on, and a plan alone teaches nothing."""
    seed.graft()
    state = tmp_path / "memory" / "state.db"
    layers, manifests = zip(*(layer_of(seed, tmp_path, version) for version in (1, 2)), strict=True)
    seed.graft()
    document = init_policy({"vendor": seed.studio.key.public}, [load_manifest(seed), manifests[0]])
    document["trustPolicies"][0]["minSecurityVersion"] = {}
    seed.studio.policy.write_bytes(format_policy(document))

    def highest():
        with RollbackState(state, writable=False) as memory:
            return memory.highest("default", "org.example.layer"), memory.highest("default", ID)

    assert seed.launcher(layers=(layers[0],), state=state).run().error is None
    assert highest() == (1, 1)
    assert seed.launcher(layers=(layers[1],), state=state).plan().error is None
    assert highest() == (1, 1)
    report = seed.launcher(layers=(layers[1],), state=state).run()
    assert {item["extension"]: item["securityVersion"] for item in report.memory["raised"]} == {"org.example.layer": 2}
    for start in (seed.launcher(layers=(layers[0],), state=state).plan, seed.launcher(layers=layers, state=state).run):
        with pytest.raises(RollbackError) as caught:
            start()
        assert caught.value.file == str(layers[0])
    assert highest() == (2, 1)


def load_manifest(seed):
    (seed.folder / "manifest.toml").write_text(MANIFEST)
    return parse_manifest(load_package(seed.folder).manifest)


def test_a_volume_of_layers_does_not_bear_an_extensions_label(seed, tmp_path):
    layer, manifest = layer_of(seed, tmp_path, 1)
    seed.graft(MANIFEST.replace("CIDATA", "UNION"))
    document = init_policy(
        {"vendor": seed.studio.key.public}, [manifest, parse_manifest(load_package(seed.folder).manifest)]
    )
    seed.studio.policy.write_bytes(format_policy(document))
    with pytest.raises(CapabilityError, match="labelled UNION"):
        seed.launcher(layers=(layer,)).plan()
    assert seed.launcher(layers=(layer,), supplements=False).plan().error is None


def test_list_names_supplements_unverified(seed):
    seed.graft()
    done = CliRunner().invoke(cli, ["list", str(seed.studio.image)], catch_exceptions=False)
    assert done.stdout.splitlines()[1:] == [
        "?   supplement iso label CIDATA root seed (1 file)",
        "?   supplement blocks offset 514 file patch",
    ]
    listed = json.loads(CliRunner().invoke(cli, ["list", str(seed.studio.image), "--json"]).stdout)
    (extension,) = listed["unverified"]["extensions"]
    assert [item["kind"] for item in extension["supplements"]] == ["iso", "blocks"]


@pytest.mark.parametrize("said", [5, "x", {"kind": "iso"}, [None, 1, ["iso"], {}, {"kind": {}, "files": 7}], [{}] * 99])
def test_list_prints_any_claim(said, capsys):
    entry = {"id": "a.b", "version": "1", "capabilities": [], "supplements": said}
    show_list(
        {"state": "ok", "detail": "", "recordFile": None, "unverified": {"placement": "x", "extensions": [entry]}}
    )
    assert len(capsys.readouterr().out.splitlines()) <= 17


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ('kind = "iso"\nlabel = "CIDATA"\nroot = "seed"', "both show a volume labelled CIDATA"),
        ('kind = "blocks"\noffset = 521\nfile = "patch"', "both lay blocks over byte 521"),
    ],
)
def test_verify_reports_supplements_that_clash(seed, monkeypatch, second, words):
    """Signing refuses them; who signs past that finds a verifier that does too, and a host that starts nothing."""
    packages = []
    for name, text in (
        (ID, MANIFEST),
        ("org.example.rival", MANIFEST.partition("[[")[0] + f"[[supplements]]\n{second}\n"),
    ):
        (seed.folder / "manifest.toml").write_text(text.replace(ID, name))
        packages.append(load_package(seed.folder))
    options = AttachOptions(opening=Opening(root=seed.studio.folder))
    seed.studio.image.write_bytes(seed.disk)
    with pytest.raises(UsageError, match=words):
        attach(seed.studio.image, packages, [seed.studio.key], options)
    with monkeypatch.context() as patched:
        patched.setattr("vmgraft.signing.statement.first_clash", lambda _manifests: None)
        attach(seed.studio.image, packages, [seed.studio.key], options)
    manifests = [parse_manifest(package.manifest) for package in packages]
    seed.studio.policy.write_bytes(format_policy(init_policy({"vendor": seed.studio.key.public}, manifests)))
    command = ["verify", str(seed.studio.image), "--policy", str(seed.studio.policy), "--json"]
    done = CliRunner().invoke(cli, command, standalone_mode=False)
    assert done.return_value == 17
    (check,) = [item for item in json.loads(done.stdout)["checks"] if item["name"] == "conflicts"]
    assert words in check["detail"]
    assert seed.launcher().plan().error == "capability-denied"
