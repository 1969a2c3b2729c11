from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import GraftFormatError, PolicyError, VmgraftError
from vmgraft.schemas import load_schema
from vmgraft.signing.capabilities import (
    CORE_IRQS,
    FLAGS,
    GPA_LIMIT,
    MAX_IRQ,
    SERVICES,
    SUPPLEMENTS,
    Flag,
    GuestWindow,
    HypercallRange,
    IrqLine,
    MmioRange,
    PioRange,
    ServiceClaim,
    Supplement,
    covered,
    covers,
    first_overlap,
    format_capability,
    overlaps,
    parse_capability,
)


def ordered(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted)


def windows(low, high):
    return ordered(low, high).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: (pair[0], pair[1] - pair[0]))


NAMED = st.one_of(
    st.sampled_from(FLAGS).map(Flag),
    st.sampled_from(sorted(set(range(MAX_IRQ + 1)) - set(CORE_IRQS))).map(IrqLine),
    st.builds(ServiceClaim, st.sampled_from(SERVICES), st.booleans()),
    st.sampled_from(SUPPLEMENTS).map(Supplement),
)
SMALL = st.one_of(
    NAMED,
    ordered(0, 40).map(lambda p: PioRange(*p)),
    ordered(1, 40).map(lambda p: HypercallRange(*p)),
    windows(0, 40).map(lambda p: MmioRange(*p)),
    st.tuples(windows(0, 40), st.booleans()).map(lambda p: GuestWindow(*p[0], p[1])),
)
ANY = st.one_of(
    NAMED,
    ordered(0, 0xFFFF).map(lambda p: PioRange(*p)),
    ordered(1, 2**31 - 1).map(lambda p: HypercallRange(*p)),
    windows(0, GPA_LIMIT).map(lambda p: MmioRange(*p)),
    st.tuples(windows(0, GPA_LIMIT), st.booleans()).map(lambda p: GuestWindow(*p[0], p[1])),
)


@pytest.mark.parametrize(
    ("text", "capability"),
    [
        ("log", Flag("log")),
        ("pio:0x510-0x517", PioRange(0x510, 0x517)),
        ("pio:0x0-0xffff", PioRange(0, 0xFFFF)),
        ("mmio:0xd0000+0x1000", MmioRange(0xD0000, 0x1000)),
        ("mmio:0xfffffffffffff+0x1", MmioRange(GPA_LIMIT - 1, 1)),
        ("hypercall:16-31", HypercallRange(16, 31)),
        ("hypercall:1-2147483647", HypercallRange(1, 2**31 - 1)),
        ("guest:0x10000+0x1000:rw", GuestWindow(0x10000, 0x1000, True)),
        ("guest:0x10000+0x1000:r", GuestWindow(0x10000, 0x1000, False)),
        ("kv", Flag("kv")),
        ("metric", Flag("metric")),
        ("irq:3", IrqLine(3)),
        ("irq:15", IrqLine(15)),
        ("service:rtc", ServiceClaim("rtc")),
        ("service:hypercall:chain", ServiceClaim("hypercall", chain=True)),
        ("supplement:iso", Supplement("iso")),
    ],
)
def test_parse_and_format(text, capability):
    assert parse_capability(text) == capability
    assert format_capability(capability) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "log ",
        "Log",
        "irq:0",
        "irq:1",
        "irq:2",
        "irq:4",
        "irq:16",
        "irq:05",
        "irq:5-6",
        "service:",
        "service:bios",
        "service:rtc:last",
        "service:rtc:chain:chain",
        "supplement:zip",
        "supplement:iso:r",
        "pio:0x510",
        "pio:510-517",
        "pio:0x517-0x510",
        "pio:0x0-0x10000",
        "pio:0x0510-0x517",
        "pio:0x510-0x51F",
        "pio:0x510-0x517\n",
        "pio:-0x1-0x2",
        "mmio:0xd0000+0x0",
        "mmio:0xfffffffffffff+0x2",
        "mmio:0x10000000000000+0x1",
        "mmio:0x0+0xffffffffffffffffffffffff",
        "hypercall:0-1",
        "hypercall:1-2147483648",
        "hypercall:9-8",
        "hypercall:\uff10-\uff19",
        "guest:0x0+0x10",
        "guest:0x0+0x10:w",
        "guest:0x0+0x10:wr",
    ],
)
def test_refused(text):
    with pytest.raises(GraftFormatError) as caught:
        parse_capability(text, file="manifest.json")
    assert caught.value.field == "capabilities"
    with pytest.raises(PolicyError):
        parse_capability(text, error=PolicyError)


@given(ANY)
def test_one_spelling(capability):
    assert parse_capability(str(capability)) == capability


@given(st.text(max_size=80) | st.from_regex(load_schema("manifest")["$defs"]["capability"]["pattern"]))
def test_only_our_error(text):
    try:
        assert str(parse_capability(text)) == text
    except VmgraftError as exc:
        assert type(exc) is GraftFormatError


def cells(capability):
    """The claim as a set of numbered cells, the slow and obvious way."""
    match capability:
        case PioRange(first, last):
            return {("pio", n) for n in range(first, last + 1)}
        case HypercallRange(first, last):
            return {("hypercall", n) for n in range(first, last + 1)}
        case MmioRange(gpa, size) | GuestWindow(gpa, size, _):
            return {("gpa", n) for n in range(gpa, gpa + size)}
        case IrqLine(line):
            return {("irq", line)}
        case ServiceClaim(name, False):
            return {("service", name)}
    return set()


def shared(capability):
    return isinstance(capability, GuestWindow) and not capability.writable


@given(SMALL, SMALL)
def test_covers_means_subset(grant, claim):
    expected = type(grant) is type(claim) and cells(claim) <= cells(grant)
    if isinstance(grant, Flag | Supplement):
        expected = grant == claim
    if isinstance(grant, ServiceClaim) and isinstance(claim, ServiceClaim):
        expected = grant.name == claim.name and (claim.chain or not grant.chain)
    if expected and isinstance(claim, GuestWindow):
        expected = grant.writable or not claim.writable
    assert covers(grant, claim) is expected


@given(SMALL, SMALL)
def test_overlap_means_common_cells(one, other):
    expected = bool(cells(one) & cells(other)) and not (shared(one) and shared(other))
    assert overlaps(one, other) is expected
    assert overlaps(other, one) is expected


@given(st.lists(SMALL, max_size=8))
def test_first_overlap_finds_one_when_there_is_one(claims):
    pairs = {(i, j) for i in range(len(claims)) for j in range(i + 1, len(claims)) if overlaps(claims[i], claims[j])}
    found = first_overlap(claims)
    assert (found in pairs) if pairs else found is None


def test_grants_are_never_joined():
    grants = [PioRange(0, 3), PioRange(4, 7)]
    assert covered(grants, PioRange(1, 3))
    assert not covered(grants, PioRange(3, 4))
    assert not covered([], Flag("log"))


@pytest.mark.parametrize(
    ("grant", "claim", "expected"),
    [
        ("guest:0x0+0x1000:r", "guest:0x0+0x1000:rw", False),
        ("guest:0x0+0x1000:r", "guest:0x10+0x10:rw", False),
        ("guest:0x0+0x1000:rw", "guest:0x10+0x10:r", True),
        ("guest:0x0+0x1000:rw", "guest:0x10+0x1000:rw", False),
        ("mmio:0x0+0x1000", "guest:0x0+0x10:r", False),
        ("pio:0x10-0x1f", "pio:0x10-0x20", False),
        ("pio:0x10-0x1f", "hypercall:16-17", False),
        ("hypercall:16-31", "hypercall:16-16", True),
        ("log", "now", False),
        ("now", "now", True),
        ("irq:5", "irq:5", True),
        ("irq:5", "irq:7", False),
        ("service:rtc", "service:rtc", True),
        ("service:rtc", "service:rtc:chain", True),
        ("service:rtc:chain", "service:rtc", False),
        ("service:rtc:chain", "service:time:chain", False),
        ("supplement:iso", "supplement:iso", True),
        ("supplement:iso", "supplement:blocks", False),
    ],
)
def test_what_a_grant_covers(grant, claim, expected):
    assert covers(parse_capability(grant), parse_capability(claim)) is expected


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("service:rtc", "service:rtc", True),
        ("service:rtc", "service:rtc:chain", False),
        ("service:rtc:chain", "service:rtc:chain", False),
        ("service:rtc", "service:time", False),
        ("irq:5", "irq:5", True),
        ("irq:5", "irq:7", False),
        ("supplement:iso", "supplement:iso", False),
        ("kv", "kv", False),
    ],
)
def test_who_gets_in_whose_way(one, other, clash):
    claims = [parse_capability(one), parse_capability("log"), parse_capability(other)]
    assert first_overlap(claims) == ((0, 2) if clash else None)
