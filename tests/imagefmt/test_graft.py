"""The facade: attach, read, detach; and where each damaged byte is laid."""

from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import TREE, attach, content_of, digest, flip, problem_of, sample_sections, state_of

from vmgraft.errors import FileError, GraftFormatError, NoGraftError, PayloadMismatchError, UsageError, VmgraftError
from vmgraft.imagefmt.blob import BytesBlob
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind, parse_record
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.imagefmt.tree import digest_content

PLACEMENTS = [Placement.AUTO, Placement.INLINE, Placement.SIDECAR]
KINDS = {"raw": "raw_image", "iso9660": "iso_image", "qcow2": "qcow2_image"}


@pytest.fixture(params=list(KINDS))
def image(request):
    return request.getfixturevalue(KINDS[request.param])


def record_file(path):
    """Return the file that holds the record and the record's offset in it."""
    with open_image(path) as opened:
        located = opened.locate()
    locator = located.locator
    if locator.placement is Placement.SIDECAR:
        return sidecar_path(path), 128, locator.record_size
    return path, locator.record_offset or located.locator_offset + 128, locator.record_size


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_whole_way(image, placement):
    before, original = digest(image), content_of(image)
    located = attach(image, placement)
    assert located.state is GraftState.OK
    assert located.locator.placement is (Placement.INLINE if placement is Placement.AUTO else placement)
    assert located.locator.tree_digest == TREE
    assert content_of(image) == original
    with open_image(image) as opened:
        graft = open_graft(opened)
        assert graft.format_problem() is None
        assert graft.envelopes() == (sample_sections()[0].raw,)
        assert graft.manifests() == (sample_sections()[1].raw,)
        assert graft.hints() == b'{"tool":"test"}'
        for section in sample_sections()[1:3]:
            assert graft.payload(sha256(section.raw).hexdigest()) == section.raw
        with pytest.raises(PayloadMismatchError):
            graft.payload("00" * 32)
        assert graft.tree is None
        names = graft.content(flat=False)
        assert names.flat is None
        assert graft.content(flat=True).flat == sha256(original).digest()
        assert graft.tree.check(0, original[:65536])
        assert graft.content(flat=False).tree_digest == names.tree_digest == digest_content(opened).tree_digest
    detach_image(image)
    assert digest(image) == before
    assert not sidecar_path(image).exists()


def test_attach_twice_is_refused_and_changes_nothing(image):
    attach(image, Placement.AUTO)
    before = digest(image)
    with pytest.raises(UsageError, match="already carries") as caught:
        attach(image, Placement.AUTO)
    assert "detach" in caught.value.hint
    assert digest(image) == before


def test_no_graft(image):
    before = digest(image)
    with open_image(image) as opened, pytest.raises(NoGraftError):
        open_graft(opened)
    with pytest.raises(NoGraftError):
        detach_image(image)
    assert digest(image) == before


def test_what_is_wrong_is_refused_before_anything_is_written(image):
    before = digest(image)
    with pytest.raises(GraftFormatError):
        attach(image, Placement.AUTO, [Section(SectionKind.FILES, bytes((64 << 20) + 1))])
    with pytest.raises(UsageError):
        attach(image, Placement.AUTO, [Section(SectionKind.UNDO, b"mine")])
    with pytest.raises(GraftFormatError):
        attach_sections(image, sample_sections(), placement=Placement.AUTO, tree_digest=b"short")
    assert digest(image) == before
    assert not sidecar_path(image).exists()


def test_a_read_only_image_cannot_be_changed(image):
    with open_image(image) as opened, pytest.raises(VmgraftError):
        opened.attach(lambda _undo: BytesBlob(b"x" * 100), Placement.INLINE, TREE)
    assert state_of(image) is GraftState.NONE


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "loop", "/dev/null", "nul\0byte"):
        with pytest.raises(FileError):
            open_image(path)


def test_a_symbolic_link_leads_to_the_sidecar_of_the_file_itself(tmp_path, raw_image):
    link = tmp_path / "latest"
    link.symlink_to(raw_image)
    attach(link, Placement.SIDECAR)
    assert sidecar_path(raw_image).exists()
    assert not sidecar_path(link).exists()
    detach_image(link)
    assert not sidecar_path(raw_image).exists()


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_every_changed_byte_of_a_record_is_laid_where_it_belongs(image, placement):
    attach(image, placement, sample_sections(320, compress=False)[:4])
    file, offset, size = record_file(image)
    record = parse_record(file.read_bytes()[offset : offset + size], file=file, offset=offset)
    table_end = record.sections[0].offset
    for position in range(0, size, 7):
        flip(file, offset + position)
        section = next((item for item in record.sections if 0 <= position - item.offset < item.stored_size), None)
        with open_image(image) as opened:
            assert opened.locate().state is GraftState.OVERWRITTEN or section is None or section.name == "UNDO"
            graft = open_graft(opened)
            if position < table_end or section.name in ("UNDO", "HINTS"):
                assert graft.format_problem(), position
            elif section.name == "ENVELOPE":
                assert graft.format_problem() is None
                assert graft.envelopes()[0] != sample_sections()[0].raw
            else:
                assert graft.format_problem() is None
                with pytest.raises(PayloadMismatchError):
                    graft.payload(section.raw_sha256.hex())
        flip(file, offset + position)
    assert problem_of(image) is None


def locator_places(path):
    """Return (file, offset) of every copy of the locator."""
    files = [path, sidecar_path(path)]
    found = []
    for file in files:
        data = file.read_bytes() if file.exists() else b""
        start = data.find(b"VMGRAFT\0")
        while start >= 0:
            if data[start + 32 : start + 64] != bytes(32) and data[start + 104 : start + 120] == bytes(16):
                found.append((file, start))
            start = data.find(b"VMGRAFT\0", start + 1)
    return found


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_every_changed_byte_of_a_locator_is_a_format_problem(image, placement):
    before = digest(image)
    attach(image, placement)
    places = locator_places(image)
    only_one = {("disk.img", Placement.SIDECAR), ("disk.qcow2", Placement.INLINE)}
    assert len(places) == (1 if (image.name, placement) in only_one else 2)
    for file, start in places:
        for position in range(128):
            flip(file, start + position)
            with open_image(image) as opened:
                try:
                    assert open_graft(opened).format_problem(), (file, start, position)
                except NoGraftError:
                    raise AssertionError(f"{file}: byte {position} of the locator made the graft vanish") from None
            flip(file, start + position)
    detach_image(image)
    assert digest(image) == before


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_detach_with_a_damaged_module_but_sound_undo(image, placement):
    before = digest(image)
    attach(image, placement, sample_sections(compress=False))
    file, offset, size = record_file(image)
    flip(file, offset + size - 30)
    assert state_of(image) is GraftState.OVERWRITTEN
    detach_image(image)
    assert digest(image) == before


def test_detach_of_an_iso_with_damaged_undo_is_refused(iso_image):
    attach(iso_image, Placement.INLINE)
    with open_image(iso_image) as opened:
        record = open_graft(opened).record
        undo = record.of_kind(SectionKind.UNDO)[0]
        offset = opened.locate().locator.record_offset + undo.offset
    flip(iso_image, offset + 2)
    damaged = digest(iso_image)
    with pytest.raises(GraftFormatError, match="way back"):
        detach_image(iso_image)
    assert digest(iso_image) == damaged


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_hostile_bytes_never_raise_anything_else(image, placement):
    """Random changes over the whole graft end in a VmgraftError or a report, and detach never makes content shorter."""
    attach(image, placement)
    file, _, _ = record_file(image)
    good = {path: path.read_bytes() for path in (image, file)}

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        for path, content in good.items():
            changed = bytearray(content)
            start = max(0, len(content) - 6000) if path == image else 0
            for _ in range(data.draw(st.integers(0, 5))):
                position = data.draw(st.integers(start, len(content) - 1))
                changed[position] = data.draw(st.integers(0, 255))
            cut = data.draw(st.integers(0, 3000)) if data.draw(st.booleans()) else 0
            path.write_bytes(bytes(changed[: len(changed) - cut]))
        try:
            with open_image(image) as opened:
                graft = open_graft(opened)
                graft.format_problem()
                graft.envelopes()
                graft.manifests()
                graft.hints()
                graft.content(flat=True)
                opened.metadata()
            detach_image(image)
        except VmgraftError:
            pass

    run()


@pytest.mark.parametrize("kind", [SectionKind.TREE, SectionKind.FILES])
def test_damage_is_the_format_s_problem_where_no_statement_can_name_it(image, kind):
    attach(image, Placement.INLINE, [*sample_sections(), Section(kind, b"file" * 100)])
    file, offset, size = record_file(image)
    flip(file, offset + size - 5)
    problem = problem_of(image)
    assert (problem is None) == (kind is SectionKind.FILES)
    assert kind is SectionKind.FILES or "TREE" in problem


@pytest.mark.parametrize("name", ["raw_image", "iso_image"])
def test_damage_in_a_module_never_hides_other_damage(request, name):
    image = request.getfixturevalue(name)
    attach(image, Placement.INLINE, sample_sections(compress=False)[:3])
    file, offset, size = record_file(image)
    flip(file, offset + size - 5)
    assert problem_of(image) is None
    with open(file, "ab") as grown:
        grown.write(bytes(4096))
    assert problem_of(image)
    with open(file, "r+b") as cut:
        cut.truncate(file.stat().st_size - 4096)
    assert problem_of(image) is None
    flip(file, file.stat().st_size - (128 if "disk" in image.name else 2048))
    assert problem_of(image)
