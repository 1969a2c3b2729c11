"""Goldens: released grafts stay readable, and the script that made them still makes the same bytes."""

import importlib.util
import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from imagefmt_helpers import sample_sections

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path

FORMAT = "iso9660"
FOLDER = Path(__file__).parent.parent / "goldens"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
NAMES = [name for name in EXPECTED if name.startswith(FORMAT + "/")]


def copy_of(name, folder):
    target = folder / Path(name).name
    for source, copy in ((FOLDER / name, target), (sidecar_path(FOLDER / name), sidecar_path(target))):
        if source.exists():
            shutil.copy(source, copy)
    return target


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_is_read_and_detached(tmp_path, name):
    path, expected = copy_of(name, tmp_path), EXPECTED[name]
    with open_image(path) as image:
        located = image.locate()
        assert (image.format_name, located.state) == (FORMAT, GraftState.OK)
        assert located.locator.placement.value == expected["placement"]
        assert located.locator.tree_digest.hex() == expected["treeDigest"]
        graft = open_graft(image)
        assert graft.format_problem() is None
        assert graft.envelopes() == (sample_sections()[0].raw,)
        found = graft.content(flat=True)
        assert found.virtual_size == expected["virtualSize"]
        assert found.flat.hex() == expected["flat"]
        assert found.root_hash.hex() == expected["rootHash"]
    detach_image(path)
    assert sha256(path.read_bytes()).hexdigest() == expected["originalSha256"]
    assert not sidecar_path(path).exists()


def test_the_script_makes_the_same_bytes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_goldens", FOLDER / "make_goldens.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.glob(f"{FORMAT}/*"))
    kept = sorted(path.relative_to(FOLDER) for path in FOLDER.glob(f"{FORMAT}/*"))
    assert made == kept
    assert all((tmp_path / name).read_bytes() == (FOLDER / name).read_bytes() for name in kept)
    assert json.loads((tmp_path / "expected.json").read_text()) == EXPECTED
