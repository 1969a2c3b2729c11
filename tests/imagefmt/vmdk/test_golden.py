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

FOLDER = Path(__file__).parent / "goldens"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_golden_is_read_and_detached(tmp_path, name):
    expected = EXPECTED[name]
    path = tmp_path / name
    for source, copy in ((FOLDER / name, path), (sidecar_path(FOLDER / name), sidecar_path(path))):
        if source.exists():
            shutil.copy(source, copy)
    with open_image(path) as image:
        located = image.locate()
        assert (image.format_name, located.state) == ("vmdk", GraftState.OK)
        assert located.locator.placement.value == expected["placement"]
        assert located.locator.tree_digest.hex() == expected["treeDigest"]
        graft = open_graft(image)
        assert graft.format_problem() is None
        assert graft.envelopes() == (sample_sections()[0].raw,)
        content = graft.content(flat=True)
        assert (content.tree_digest.hex(), content.flat.hex()) == (expected["treeDigest"], expected["flat"])
    detach_image(path)
    assert sha256(path.read_bytes()).hexdigest() == expected["originalSha256"]
    assert not sidecar_path(path).exists()


def test_the_script_makes_the_same_bytes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_vmdk_goldens", FOLDER / "make_goldens.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py")
    assert all((tmp_path / name).read_bytes() == (FOLDER / name).read_bytes() for name in names)
