"""What the golden tests of flat formats share: released grafts stay readable, and the script still makes the same."""

import importlib.util
import json
import shutil
from hashlib import sha256
from pathlib import Path

from imagefmt_helpers import sample_sections

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path

FOLDER = Path(__file__).parent / "goldens"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def golden_names(format_name):
    return [name for name in EXPECTED if name.startswith(format_name + "/")]


def copy_of(name, folder):
    target = folder / Path(name).name
    for source, copy in ((FOLDER / name, target), (sidecar_path(FOLDER / name), sidecar_path(target))):
        if source.exists():
            shutil.copy(source, copy)
    return target


def check_read_and_detached(name, folder):
    """A golden reads as it always did, and its original comes back."""
    path, expected = copy_of(name, folder), EXPECTED[name]
    with open_image(path) as image:
        located = image.locate()
        assert (image.format_name, located.state) == (name.split("/")[0], GraftState.OK)
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


def check_the_script(format_name, folder):
    """The script makes the goldens of a format again, byte for byte."""
    spec = importlib.util.spec_from_file_location("make_goldens", FOLDER / "make_goldens.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make(folder)
    made = sorted(path.relative_to(folder) for path in folder.glob(f"{format_name}/*"))
    kept = sorted(path.relative_to(FOLDER) for path in FOLDER.glob(f"{format_name}/*"))
    assert made == kept
    assert all((folder / name).read_bytes() == (FOLDER / name).read_bytes() for name in kept)
    assert json.loads((folder / "expected.json").read_text()) == EXPECTED
