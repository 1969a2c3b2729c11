"""The registry: every format has its golden and malformed cases, and known strangers are refused."""

import ast
from pathlib import Path

import pytest
from imagefmt_helpers import iso_bytes, tool

from vmgraft.errors import FileError, UnsupportedError
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.registry import detect, format_names, get_format

HERE = Path(__file__).parent


def names_of_tests(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if node.name.startswith("test_")]


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("module", ["test_golden.py", "test_malformed.py"])
def test_every_format_has_golden_and_malformed_tests(name, module):
    path = HERE / name / module
    assert path.exists(), f"the format {name} is registered but has no {module}"
    assert names_of_tests(path), f"{path} holds no test"


@pytest.mark.parametrize("name", format_names())
def test_rows(name):
    row = get_format(name)
    assert row.name == name
    assert row.probe(b"", 0) is False


def test_order_and_names():
    assert format_names()[-1] == "raw"
    with pytest.raises(UnsupportedError, match="unknown image format"):
        get_format("qed")


def test_detection(tmp_path):
    iso, raw, qcow2 = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    iso.write_bytes(iso_bytes())
    raw.write_bytes(b"x")
    tool("qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M")
    assert [detect(path).name for path in (iso, raw, qcow2)] == ["iso9660", "raw", "qcow2"]


@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("vmdk", ("-o", "subformat=monolithicFlat")),
        ("vmdk", ("-o", "subformat=twoGbMaxExtentSparse")),
        ("qed", ()),
        ("qcow", ()),
    ],
)
def test_containers_that_are_recognised_and_refused(tmp_path, container, options):
    path = tmp_path / "image"
    tool("qemu-img", "create", "-q", "-f", container, *options, path, "1M")
    with pytest.raises(UnsupportedError, match="not supported") as caught:
        open_image(path)
    assert caught.value.hint
    assert caught.value.field == "magic"


def test_luks_is_refused(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"LUKS\xba\xbe\0\2".ljust(4096, b"\0"))
    with pytest.raises(UnsupportedError, match="LUKS"):
        open_image(path)


def test_empty_file(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(FileError):
        open_image(path)
