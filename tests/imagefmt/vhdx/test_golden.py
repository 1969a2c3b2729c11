"""Released grafts in VHDX images: they read as they always did, and the script makes them again."""

import importlib.util
import json
import lzma
from hashlib import sha256
from pathlib import Path

import pytest
from imagefmt_helpers import sample_sections
from vhdx_testkit import qemu_check, qemu_content, write_sparse

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path

FOLDER = Path(__file__).parent / "goldens"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def unpack(name, folder, target):
    path = target / name
    write_sparse(path, lzma.decompress((folder / f"{name}.xz").read_bytes()))
    kept = sidecar_path(folder / name)
    if kept.exists():
        sidecar_path(path).write_bytes(kept.read_bytes())
    return path


@pytest.mark.parametrize("name", list(EXPECTED))
def test_read_and_detached(name, tmp_path):
    path, expected = unpack(name, FOLDER, tmp_path), EXPECTED[name]
    with open_image(path) as image:
        located = image.locate()
        assert (image.format_name, located.state) == ("vhdx", GraftState.OK)
        assert located.locator.placement.value == expected["placement"]
        assert located.locator.tree_digest.hex() == expected["treeDigest"]
        graft = open_graft(image)
        assert graft.format_problem() is None
        assert graft.envelopes() == (sample_sections()[0].raw,)
        found = graft.content(flat=True)
    assert found.virtual_size == expected["virtualSize"]
    assert (found.flat.hex(), found.root_hash.hex()) == (expected["flat"], expected["rootHash"])
    qemu_check(path)
    assert sha256(qemu_content(path)).hexdigest() == expected["flat"]
    detach_image(path)
    assert sha256(path.read_bytes()).hexdigest() == expected["originalSha256"]
    assert not sidecar_path(path).exists()


def test_the_script_makes_them_again(tmp_path):
    spec = importlib.util.spec_from_file_location("make_vhdx_goldens", FOLDER / "make_goldens.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make(tmp_path)
    assert json.loads((tmp_path / "expected.json").read_text()) == EXPECTED
    assert {path.name for path in tmp_path.iterdir()} == {
        p.name for p in FOLDER.iterdir() if p.suffix not in (".py", "")
    }
    for name in EXPECTED:
        kept, made = (lzma.decompress((folder / f"{name}.xz").read_bytes()) for folder in (FOLDER, tmp_path))
        assert kept == made
    (sidecar,) = FOLDER.glob("*.vmgraft")
    assert sidecar.read_bytes() == (tmp_path / sidecar.name).read_bytes()
