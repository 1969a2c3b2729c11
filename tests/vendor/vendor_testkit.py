"""Plain helpers for the tests of vendor: packages made on the spot, and what an image carries."""

import json
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.manifest import canonical_manifest
from vmgraft.signing.statement import parse_statement
from vmgraft.signing.verify import self_check
from vmgraft.vendor.pack import Package

#: The smallest WebAssembly module.
WASM = b"\0asm\x01\0\0\0"


def package(name, version="1", security=1, generation=0, module=True, capabilities=()):
    document = {
        "id": f"com.example.{name}",
        "version": version,
        "securityVersion": security,
        "generation": generation,
        "abi": "vmgraft/1",
        "capabilities": list(capabilities),
    }
    if module:
        document["module"] = "module.wasm"
    # A custom section (id 0) with a name: every module has bytes of its own.
    label = f"{name} {version}".encode()
    body = WASM + bytes([0, len(label) + 1, len(label)]) + label
    return Package(document["id"], version, canonical_manifest(document), body if module else None)


@dataclass(frozen=True)
class Carried:
    """What an image carries: (id, version) in load order, the envelope, the statement, the placement."""

    extensions: list
    envelope: bytes
    statement: object
    placement: str
    state: str


def carried(path):
    with open_image(path) as image:
        graft = open_graft(image)
        assert graft.format_problem() is None
        (envelope,) = graft.envelopes()
        statement = parse_statement(parse_envelope(envelope).payload)
        listed = [(entry.id.removeprefix("com.example."), entry.version) for entry in statement.extensions]
        stored = [json.loads(data) for data in graft.manifests()]
        assert [(item["id"], item["version"]) for item in stored] == [
            (entry.id, entry.version) for entry in statement.extensions
        ]
        return Carried(listed, envelope, statement, graft.located.locator.placement.value, graft.located.state.value)


def verifies(path, *keys):
    """Whether the graft verifies under all of these private keys: signature, payloads, content."""
    with open_image(path) as image:
        return self_check(open_graft(image), [key.public for key in keys], now=datetime.now(UTC)).ok


def files_of(folder):
    return {item.name: item.read_bytes() for item in Path(folder).iterdir()}


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
