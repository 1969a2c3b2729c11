"""Goldens: released grafts stay readable, and the script that made them still makes the same bytes."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import make_zip_goldens
import pytest
from imagefmt_helpers import sample_sections

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path

FOLDER = Path(__file__).parent / "goldens"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_golden_is_read_and_detached(tmp_path, name):
    expected, path = EXPECTED[name], tmp_path / name
    for kept in FOLDER.glob(f"{name}*"):
        shutil.copy(kept, tmp_path)
    with open_image(path) as image:
        located = image.locate()
        assert (image.format_name, located.state) == ("zip", GraftState.OK)
        assert located.locator.placement.value == expected["placement"]
        assert located.locator.tree_digest.hex() == expected["treeDigest"]
        graft = open_graft(image)
        assert graft.format_problem() is None
        assert graft.envelopes() == (sample_sections()[0].raw,)
        found = graft.content(flat=True)
        assert found.virtual_size == expected["virtualSize"]
        assert found.flat.hex() == expected["flat"]
        assert found.tree_digest.hex() == expected["treeDigest"]
    detach_image(path)
    assert sha256(path.read_bytes()).hexdigest() == expected["originalSha256"]
    assert not sidecar_path(path).exists()


def test_the_script_makes_the_same_bytes(tmp_path):
    make_zip_goldens.make(tmp_path)
    names = sorted(path.name for path in FOLDER.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len(names) == 6
    assert all((tmp_path / name).read_bytes() == (FOLDER / name).read_bytes() for name in names)
