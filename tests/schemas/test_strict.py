"""Strict JSON: what is refused, and that nothing but our error ever comes out."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import GraftFormatError, VmgraftError
from vmgraft.schemas import strict_json


def parse(data, **options):
    return strict_json(data, file="x.json", error=GraftFormatError, **({"max_bytes": 1 << 20} | options))


@pytest.mark.parametrize("document", [{}, [], {"a": [1, -2, {"b": None}], "ü": "\u2028"}, "text", 0, True, 2**64 - 1])
def test_good_documents(document):
    assert parse(json.dumps(document).encode()) == document
    assert parse(json.dumps(document, ensure_ascii=False, indent=2).encode()) == document


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b'{"a":1,"a":1}', "stands twice"),
        (b'{"a":1,"\\u0061":2}', "stands twice"),
        (b'{"x":{"b":1,"b":2}}', "stands twice"),
        (b"1.0", "not an integer"),
        (b"1e3", "not an integer"),
        (b"-0.0", "not an integer"),
        (b"NaN", "not JSON"),
        (b"[Infinity]", "not JSON"),
        (b"[-Infinity]", "not JSON"),
        (b"1" * 21, "20 digits"),
        (b"-" + b"1" * 5000, "20 digits"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udc00":1}', "surrogate"),
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{}\0", "not JSON"),
        (b'{"a":1,}', "not JSON"),
        (b"'a'", "not JSON"),
        (b'"a\nb"', "not JSON"),
        (b"[1] // c", "not JSON"),
        (b"\xfe\xff\0{\0}", "UTF-8"),
        (b"0x10", "not JSON"),
        (b"01", "not JSON"),
    ],
)
def test_refused(data, part):
    with pytest.raises(GraftFormatError, match=part) as caught:
        parse(data)
    assert caught.value.file == "x.json"


def test_offset_is_in_bytes():
    with pytest.raises(GraftFormatError) as caught:
        parse('["üü",x]'.encode())
    assert caught.value.offset == 8


def test_surrogate_pairs_are_fine():
    assert parse(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"]":'])
def test_depth_bombs_end_at_once(opening):
    started = time.monotonic()
    with pytest.raises(GraftFormatError, match="nested") as caught:
        parse(opening * 100_000)
    assert caught.value.offset < 200
    assert time.monotonic() - started < 1


def test_depth_is_exact_and_brackets_in_strings_do_not_count():
    assert parse(b"[" * 16 + b"]" * 16) is not None
    with pytest.raises(GraftFormatError, match="nested"):
        parse(b"[" * 17 + b"]" * 17)
    assert parse(b'"' + b"[" * 1000 + b'"') == "[" * 1000
    assert parse(b'["\\"[[[[[[[[[[[[[[[[[[["]') == ['"[[[[[[[[[[[[[[[[[[[']
    assert parse(b"[" + b"[]," * 1000 + b"[]]") == [[]] * 1001


@pytest.mark.parametrize("bomb", [b'"' + b'\\"' * 400_000, b'"' * 800_001, b'"\\' * 400_000, b"\\" * 800_000])
def test_quotes_cannot_make_it_slow(bomb):
    started = time.monotonic()
    with pytest.raises(GraftFormatError):
        parse(bomb)
    assert time.monotonic() - started < 2


def test_size_is_bounded_before_anything_else():
    with pytest.raises(GraftFormatError, match=r"more than 4 bytes$"):
        parse(b"[1,2]", max_bytes=4)
    # Readers stop behind the bound: what is said is the bound, and never the size of what was read.
    with pytest.raises(GraftFormatError, match=r"the document has more than 1 MiB$"):
        parse(b" " * ((1 << 20) + 1))


@given(st.binary(max_size=200) | st.text(alphabet='[]{}":,\\u0d89ab-1.eE+ntf ', max_size=60).map(str.encode))
def test_only_our_error_comes_out(data):
    try:
        document = parse(data)
    except VmgraftError:
        return
    assert json.loads(data) == document
