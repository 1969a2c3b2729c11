"""Differences by range, against a plain byte comparison."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgraft.imagefmt.graft import open_image
from vmgraft.inspect.diff import SECTOR, Range, diff_images


def diff(a: Path, b: Path) -> list[Range]:
    with open_image(a) as left, open_image(b) as right:
        return diff_images(left, right)


def expected(x: bytes, y: bytes) -> list[Range]:
    """The slow and obvious way."""
    common = min(len(x), len(y))
    found: list[Range] = []
    for start in range(0, common, SECTOR):
        end = min(start + SECTOR, common)
        if x[start:end] != y[start:end]:
            if found and found[-1].end == start:
                found[-1] = Range(found[-1].start, end)
            else:
                found.append(Range(start, end))
    if len(x) != len(y):
        found.append(Range(common, max(len(x), len(y)), "a" if len(x) > len(y) else "b"))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sectors=st.integers(1, 40),
    longer=st.integers(0, 5),
    changes=st.lists(st.tuples(st.integers(0, 40 * SECTOR - 1), st.binary(min_size=1, max_size=1500)), max_size=6),
)
def test_agrees_with_the_obvious_way(tmp_path: Path, sectors: int, longer: int, changes: list) -> None:
    x = bytes(range(256)) * (sectors * 2)
    y = bytearray(x + bytes(longer * SECTOR))
    for offset, data in changes:
        fitting = data[: max(0, len(y) - offset)]
        y[offset : offset + len(fitting)] = fitting
    (tmp_path / "a").write_bytes(x)
    (tmp_path / "b").write_bytes(y)
    assert diff(tmp_path / "a", tmp_path / "b") == expected(x, bytes(y))
    assert diff(tmp_path / "a", tmp_path / "a") == []


def test_across_containers(tmp_path: Path) -> None:
    data = bytearray(3 << 20)
    data[100_000:200_000] = bytes(range(250)) * 400
    (tmp_path / "a.img").write_bytes(data)
    args = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", tmp_path / "a.img", tmp_path / "b.qcow2"]
    subprocess.run([str(arg) for arg in args], check=True)
    assert diff(tmp_path / "a.img", tmp_path / "b.qcow2") == []
    data[1 << 20] = 1
    (tmp_path / "a.img").write_bytes(data)
    assert diff(tmp_path / "a.img", tmp_path / "b.qcow2") == [Range(1 << 20, (1 << 20) + SECTOR)]


@pytest.mark.parametrize("size", [1, 511, 513])
def test_holes_cost_nothing_and_hide_nothing(tmp_path: Path, size: int) -> None:
    for name, content in (("a", b""), ("b", b"z" * size)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 36)
            file.seek(1 << 35)
            file.write(content)
    assert diff(tmp_path / "a", tmp_path / "b") == [Range(1 << 35, (1 << 35) + (1 + (size - 1) // 512) * 512)]
