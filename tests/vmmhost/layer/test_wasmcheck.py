"""The static check: one kind of error for malformed bytes, another for imports that are not granted."""

import contextlib
from pathlib import Path

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import CapabilityError, GraftFormatError
from vmgraft.vmmhost.layer.abi import EXPORTS, IMPORTS, Grant, Hook
from vmgraft.vmmhost.layer.wasmcheck import MAX_MODULE_BYTES, check_bounds, check_module

ALL = Grant(2047)
HEAD = b"\0asm\1\0\0\0"
MARK = b"\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x11\x01\x0dvmgraft_abi_1\0\0\x0a\x04\x01\x02\0\x0b"
CLOCK = (Path(__file__).parents[3] / "examples/clock/module.wasm").read_bytes()


def build(text):
    return bytes(wasmtime.wat2wasm(text))


def section(number, body):
    assert len(body) < 128
    return bytes([number, len(body)]) + body


def check(module, grant=ALL, memory_mib=1):
    return check_module(module, grant, memory_mib, file="m.wasm")


def refused(module, words, grant=ALL):
    with pytest.raises(GraftFormatError, match=words) as caught:
        check(module, grant)
    error = caught.value
    assert error.file == "m.wasm"
    assert error.offset is not None
    assert 0 <= error.offset <= len(module)
    assert error.field.startswith("module: ")


def test_smallest_module():
    info = check(HEAD + MARK)
    assert (info.hooks, info.imports, info.memory_pages, info.memory_max) == (Hook(0), frozenset(), 0, None)


def test_every_import_and_export_of_the_abi():
    def types(codes, word):
        return f"({word} {' '.join({0x7F: 'i32', 0x7E: 'i64'}[code] for code in codes)})" if codes else ""

    imports = "".join(
        f'(import "vmgraft" "{name}" (func {types(sig.params, "param")} {types(sig.results, "result")}))'
        for name, (sig, _capability) in IMPORTS.items()
    )
    exports = "".join(
        f'(func (export "{name}") {types(sig.params, "param")} {types(sig.results, "result")} unreachable)'
        for name, (sig, _hook) in EXPORTS.items()
    )
    module = build(f'(module {imports} (memory (export "memory") 2 16) {exports})')
    info = check(module)
    assert info.imports == frozenset(IMPORTS)
    assert info.hooks == Hook(32767)
    assert (info.memory_pages, info.memory_max) == (2, 16)
    for bit in Grant:
        with pytest.raises(CapabilityError) as caught:
            check(module, ALL & ~bit)
        assert caught.value.offset is not None


def test_examples_pass_with_what_they_declare():
    assert check(CLOCK, Grant.LOG | Grant.NOW).hooks == Hook.START | Hook.PIO_READ | Hook.HYPERCALL


def test_bounds_only_looks_at_size_and_preamble():
    check_bounds(HEAD + b"\xff" * 100)
    with pytest.raises(GraftFormatError, match="1048577 bytes"):
        check_bounds(HEAD + bytes(MAX_MODULE_BYTES - 7))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (b"", "not a WebAssembly"),
        (b"\x7fELF" + bytes(60), "not a WebAssembly"),
        (b"\0asm\x0d\0\1\0", "components"),
        (b"\0asm\2\0\0\0", "version 1"),
        (HEAD, "vmgraft_abi_1 is missing"),
        (HEAD + b"\x01", "ends early"),
        (HEAD + b"\x01\x7f", "do not fit"),
        (HEAD + b"\x01\x80\x80\x80\x80\x80\x01", "longer than 5 bytes"),
        (HEAD + b"\x01\xff\xff\xff\xff\x1f", "32 bits"),
        (HEAD + section(14, b""), "unknown section 14"),
        (HEAD + section(8, b"\0") + MARK, "start function"),
        (HEAD + section(13, b"\0"), "exceptions"),
        (HEAD + section(3, b"\0") + section(1, b"\0"), "twice or too late"),
        (HEAD + section(1, b"\0") * 2, "twice or too late"),
        (HEAD + section(1, b"\x01\x5f\0"), "plain function types"),
        (HEAD + section(1, b"\x01\x60\x01\x7b\0"), "0x7b"),
        (HEAD + section(1, b"\0\0"), "left over"),
        (HEAD + section(1, b"\x81\x08"), "more than the 1024"),
        (HEAD + section(3, b"\x01\0"), "type 0 does not exist"),
        (HEAD + section(4, b"\x01\x60\0\0"), "funcref"),
        (HEAD + section(4, b"\x01\x70\0\x91\x4e"), "more than the 10000"),
        (HEAD + section(5, b"\x02\0\1\0\1"), "more than the 1"),
        (HEAD + section(5, b"\x01\x02\1"), "shared"),
        (HEAD + section(5, b"\x01\x04\1\0"), "64-bit"),
        (HEAD + section(5, b"\x01\x08\1\0"), "page sizes"),
        (HEAD + section(5, b"\x01\x10\1\0"), "flags 0x10"),
        (HEAD + section(5, b"\x01\0\x11"), "17 pages"),
        (HEAD + section(5, b"\x01\x01\x02\x01"), "below the minimum"),
        (HEAD + section(6, b"\x01\x7f\x02\x41\0\x0b"), "mutability"),
        (HEAD + section(6, b"\x01\x7f\0\x10\0\x0b"), "not constant"),
        (HEAD + section(6, b"\x01\x7f\0\x41\x80\x80\x80\x80\x80\0\x0b"), "longer than 32 bits"),
        (HEAD + section(6, b"\x01\x7f\0" + b"\x41\0" * 20), "more than 16"),
        (HEAD + section(7, b"\x01\x01a\0\0"), "names nothing"),
        (HEAD + section(7, b"\x01\x01a\x07\0"), "names nothing"),
        (HEAD + section(7, b"\x01\x02\xff\xfe\0\0"), "not UTF-8"),
        (HEAD + section(1, b"\x01\x60\0\0") + section(3, b"\x01\0"), "1 functions have 0 bodies"),
        (HEAD + section(10, b"\x01\x02\0\x0b"), "0 functions have 1 bodies"),
        (HEAD + section(10, b"\x01\x80\x80\x08"), "more than the 65536"),
        (HEAD + section(10, b"\x01\x06\x01\xff\xff\x03\x7f\x0b"), "more than 4096 locals"),
        (HEAD + section(11, b"\x81\x08"), "more than the 1024"),
        (HEAD + section(12, b"\x81\x08"), "more than the 1024"),
        (HEAD + section(0, b"\0") * 65, "64 custom"),
        (HEAD + section(0, b""), "ends early"),
        (HEAD + MARK.replace(b"abi_1", b"abi_2"), "not part of the ABI"),
    ],
)
def test_malformed(module, words):
    refused(module, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('(module (import "env" "log" (func)))', "unknown import env.log"),
        ('(module (import "vmgraft" "exec" (func)))', "unknown import vmgraft.exec"),
        ('(module (import "vmgraft" "log" (func (param i32))))', "wrong type"),
        ('(module (import "vmgraft" "log" (memory 1)))', "not a function"),
        ('(module (func (export "vmgraft_abi_1") (param i32)))', "wrong type"),
        ('(module (memory (export "on_tick") 1))', "wrong type"),
        ('(module (func (export "on_block_read")))', "not part of the ABI"),
        ('(module (import "vmgraft" "log" (func (param i32 i32))) (memory 1) (func (export "vmgraft_abi_1")))',
         "must be exported"),
        ('(module (func (export "vmgraft_abi_1")) (start 0))', "start function"),
    ],
)  # fmt: skip
def test_outside_the_abi(text, words):
    refused(build(text), words)


def test_an_export_twice():
    start, end = MARK.index(b"\x07\x11"), MARK.index(b"\x0a\x04")
    refused(HEAD + MARK[:start] + section(7, b"\x02" + b"\x01a\0\0" * 2) + MARK[end:], "comes twice")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_changed_bytes_give_one_of_two_errors(data):
    module = bytearray(CLOCK)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(module) - 1))
        module[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(module)))
    for candidate in (bytes(module), bytes(module[:cut])):
        with contextlib.suppress(GraftFormatError, CapabilityError):
            check(candidate)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.binary(max_size=60)), max_size=8))
def test_random_sections_give_one_of_two_errors(sections):
    with contextlib.suppress(GraftFormatError, CapabilityError):
        check(HEAD + b"".join(section(number, body) for number, body in sections))
