"""Images with hostile and harmless extensions, made by the vendor's own code."""

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from vmgraft.imagefmt.contract import Opening
from vmgraft.signing.keyfiles import write_keypair
from vmgraft.signing.keys import generate
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import Package
from vmgraft.vmmhost.audit import check_chain
from vmgraft.vmmhost.core.probe import probe_kvm

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules of this folder

ROOT = Path(__file__).resolve().parents[2]


class Studio:
    """Grafts WAT modules into an image that boots the example guest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = generate("p256")
        write_keypair(folder / "vendor", self.key, None)
        self.image = folder / "disk.img"
        self.policy = folder / "policy.json"
        self.audit_log = folder / "audit.jsonl"
        self.guest = (ROOT / "examples" / "guest" / "guest.bin").read_bytes()

    #: An extension that answers as an absent device does.
    ONES = '(func (export "on_pio_read") (param i32 i32) (result i64) (i64.const -1))'

    def graft(self, module: bytes, image: Path | None = None, **fields: object) -> None:
        """Attach one extension that claims the clock's ports and hypercalls, and a policy that grants all of it.

        Args:
            module: The extension.
            image: One made already; by default a raw disk that boots the guest.
            fields: What the manifest says otherwise.
        """
        manifest = {
            "id": "org.example.culprit", "version": "1.0", "securityVersion": 1, "abi": "vmgraft/1",
            "module": "module.wasm", "onFault": "detach",
            "capabilities": ["log", "guest:0x10000+0x1000:rw", "pio:0x510-0x517", "hypercall:16-17"],
            "limits": {"memoryMiB": 1, "fuelPerCall": 1_000_000, "callMs": 500, "logBytes": 1024},
            **fields,
        }  # fmt: skip
        data = canonical_manifest(manifest)
        if image is None:
            self.image.write_bytes(self.guest.ljust(1 << 20, b"\0"))
        self.attach(Package("org.example.culprit", "1.0", data, module), image=image)

    def attach(self, *packages: Package, image: Path | None = None, grant: Sequence[str] | None = None) -> None:
        """Attach extensions to an image, and write a policy that grants each all that it asks for.

        Args:
            packages: The extensions.
            image: Where to; by default the studio's own.
            grant: The capabilities that each is granted instead.
        """
        attach(image or self.image, packages, [self.key], AttachOptions(opening=Opening(root=self.folder)))
        manifests = [parse_manifest(package.manifest) for package in packages]
        document = init_policy({"vendor": self.key.public}, manifests)
        if grant is not None:
            for granted in document["trustPolicies"][0]["grants"].values():
                granted["capabilities"] = grant
        self.policy.write_bytes(format_policy(document))

    def boot_code(self, code: bytes) -> None:
        """Make images boot this instead, from 0000:7C00."""
        self.guest = code.ljust(510, b"\0") + b"\x55\xaa"

    def log(self) -> list[dict[str, Any]]:
        """Return the records of the last run, whose chain must hold."""
        check_chain(self.audit_log)
        return [json.loads(line) for line in self.audit_log.read_text().splitlines()]

    def wat(self, body: str, imports: str = "") -> bytes:
        """Assemble a module of ABI vmgraft/1 around some functions."""
        text = f'(module {imports} (memory (export "memory") 1 1) (func (export "vmgraft_abi_1")) {body})'
        return bytes(wasmtime.wat2wasm(text))


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.fixture(scope="session")
def make_studio() -> type[Studio]:
    """For fixtures that outlive one test."""
    return Studio


@pytest.fixture
def now() -> Callable[[], datetime]:
    return lambda: datetime.now(UTC)


@pytest.fixture(params=["soft", pytest.param("kvm", marks=pytest.mark.kvm)])
def cpu(request: pytest.FixtureRequest) -> str:
    if request.param == "kvm":
        info = probe_kvm()
        if not info.usable:
            pytest.skip(f"no working /dev/kvm: {info.reason}")
    return str(request.param)
