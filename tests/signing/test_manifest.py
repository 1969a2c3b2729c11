from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import GraftFormatError, UsageError, VmgraftError
from vmgraft.signing.contract import Limits
from vmgraft.signing.manifest import MAX_MANIFEST, canonical_manifest, lower_limits, parse_manifest

MINIMAL = {"id": "com.acme.clock", "version": "1.4.0", "securityVersion": 3, "abi": "vmgraft/1"}


def test_minimal_manifest_and_its_defaults():
    manifest = parse_manifest(canonical_manifest(MINIMAL))
    assert manifest.document == MINIMAL
    assert (manifest.generation, manifest.module, manifest.on_fault, manifest.config) == (0, None, "stop", "")
    assert manifest.limits == Limits()
    assert manifest.capabilities == ()


def test_canonical_bytes_do_not_depend_on_order():
    document = MINIMAL | {"title": "Uhr für alle", "limits": {"logBytes": 1, "callMs": 2}}
    data = canonical_manifest(document)
    assert data == canonical_manifest(dict(reversed(document.items())))
    assert data.endswith(b"}\n") and data.count(b"\n") == 1
    assert "Uhr für alle".encode() in data
    assert list(json.loads(data)) == sorted(document)
    assert canonical_manifest(parse_manifest(data).document) == data


def test_limits_and_fault_are_read():
    limits = {"memoryMiB": 1, "fuelPerCall": 1000, "callMs": 3, "callsPerSecond": 4, "logBytes": 0}
    manifest = parse_manifest(canonical_manifest(MINIMAL | {"limits": limits, "onFault": "restart(3)"}))
    assert manifest.limits == Limits(1, 1000, 3, 4, 0)
    assert manifest.on_fault == "restart(3)"
    assert lower_limits(manifest.limits, Limits(9, 9, 9, 1, 9)) == Limits(1, 9, 3, 1, 0)


@pytest.mark.parametrize(
    "claims",
    [
        ["pio:0x510-0x517", "pio:0x517-0x518"],
        ["mmio:0x0+0x10", "guest:0x8+0x10:r"],
        ["guest:0x0+0x1:r", "guest:0x0+0x2:rw"],
    ],
)
def test_claims_of_one_manifest_must_not_overlap(claims):
    with pytest.raises(UsageError, match="overlap") as caught:
        canonical_manifest(MINIMAL | {"capabilities": claims}, file="manifest.toml")
    assert (caught.value.file, caught.value.field) == ("manifest.toml", "capabilities")


def test_bounds_of_capabilities_are_checked():
    with pytest.raises(GraftFormatError, match="port"):
        parse_manifest(json.dumps(MINIMAL | {"capabilities": ["pio:0x0-0x10000"]}).encode())


def test_surrogates_and_floats_never_reach_the_bytes():
    for change in ({"config": "\ud800"}, {"securityVersion": 3.0}, {"limits": {"callMs": 1.5}}):
        with pytest.raises(UsageError):
            canonical_manifest(MINIMAL | change)


def test_size_limit():
    with pytest.raises(GraftFormatError, match="more than"):
        parse_manifest(b" " * (MAX_MANIFEST + 1))


@given(st.binary(max_size=300))
def test_only_our_error(data):
    with pytest.raises(VmgraftError):
        parse_manifest(data)


@given(st.data())
def test_mutated_manifests(data):
    base = bytearray(canonical_manifest(MINIMAL | {"capabilities": ["log", "pio:0x1-0x2"], "limits": {"callMs": 2}}))
    for _ in range(data.draw(st.integers(1, 4))):
        base[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_manifest(bytes(base))
    except VmgraftError as exc:
        assert type(exc) is GraftFormatError
