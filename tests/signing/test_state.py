"""The rollback memory: numbers only rise, whoever interrupts whom, and what cannot be believed is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from child import said_by_child

from vmgraft.cli import app
from vmgraft.errors import PolicyError, RollbackError, StateError, UsageError, VmgraftError
from vmgraft.signing import statedb, statefile
from vmgraft.signing.keyfiles import write_keypair
from vmgraft.signing.keys import generate
from vmgraft.signing.policy import load_policy
from vmgraft.signing.policysign import sign_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.state import Ran, RollbackState, create_state, policy_trust

NOW = datetime(2026, 11, 22, 15, 0, 0, tzinfo=UTC)
STATEMENT = "ab" * 32
CLOCK = "com.acme.clock"


@pytest.fixture
def path(tmp_path) -> Path:
    place = tmp_path / "state.db"
    assert create_state(place)
    return place


def put(path: Path, *versions: int, policy: str = "default", extension: str = CLOCK, generation: int = 1) -> None:
    with RollbackState(path) as state:
        for version in versions:
            state.raise_to(policy, [Ran(extension, version, generation)], statement=STATEMENT, when=NOW)


def highest(path: Path, policy: str = "default", extension: str = CLOCK) -> int | None:
    with RollbackState(path, writable=False) as state:
        return state.highest(policy, extension)


# --- what is remembered


def test_only_what_ran_under_this_policy_is_known(path):
    put(path, 3)
    assert highest(path) == 3
    assert highest(path, policy="other") is None
    assert highest(path, extension="com.acme.clock2") is None
    assert highest(path, extension="com.acme") is None


def test_numbers_only_rise(path):
    put(path, 3, 3, 7)
    with pytest.raises(RollbackError, match="security version 6, and 7 has run"):
        put(path, 6)
    assert highest(path) == 7


def test_generations_rise_on_their_own(path):
    put(path, 3, generation=4)
    put(path, 5, generation=2)
    put(path, 5, generation=3)
    with RollbackState(path) as state:
        seen = state.seen("default", CLOCK)
        assert (seen.security_version, seen.generation) == (5, 4)
        later = datetime(2027, 1, 1, tzinfo=UTC)
        assert state.raise_to("default", [Ran(CLOCK, 5, 4)], statement="cd" * 32, when=later) == ()
        assert state.seen("default", CLOCK) == seen, "nothing rose, so nothing is written"
        (raised,) = state.raise_to("default", [Ran(CLOCK, 5, 5)], statement="cd" * 32, when=later)
        assert (raised.generation, raised.statement, raised.raised) == (5, "cd" * 32, "2027-01-01T00:00:00Z")
        assert state.seen("default", CLOCK) == raised


def test_all_of_a_run_or_nothing(path):
    put(path, 5)
    with RollbackState(path) as state:
        both = [Ran("com.acme.balloon", 9, 1), Ran(CLOCK, 4, 1)]
        with pytest.raises(RollbackError):
            state.raise_to("default", both, statement=STATEMENT, when=NOW)
        assert state.extensions() == (state.seen("default", CLOCK),)


@pytest.mark.parametrize("version", [(1 << 63) - 1, 1 << 63, -1])
def test_the_largest_number(path, version):
    if 0 <= version < 1 << 63:
        put(path, version)
        assert highest(path) == version
        return
    with pytest.raises(StateError, match="not a version"):
        put(path, version)
    assert highest(path) is None


def test_what_is_written_stays_written(path):
    """A copy of the bare database, without its log, holds everything: the log is folded back after each commit."""
    with RollbackState(path) as state:
        state.raise_to("default", [Ran(CLOCK, 3, 1)], statement=STATEMENT, when=NOW)
        copy = path.with_name("copy.db")
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o600)
    assert highest(copy) == 3


def test_durable_settings(path):
    assert path.stat().st_mode & 0o777 == 0o600
    with RollbackState(path) as state:
        db = state._db._db
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert [(path.with_name(path.name + end).stat().st_mode & 0o777) for end in ("-wal", "-shm")] == [0o600] * 2
    assert [item.name for item in path.parent.iterdir()] == ["state.db"]


def test_sqlite_itself_reads_it(path):
    assert shutil.which("sqlite3"), "sqlite3 is missing: apt-get install sqlite3"
    put(path, 3)
    query = "SELECT policy, extension, security, generation FROM extensions; PRAGMA integrity_check;"
    done = subprocess.run(["sqlite3", path, query], capture_output=True, text=True, check=True)
    assert done.stdout == "default|com.acme.clock|3|1\nok\n"


# --- several processes

RAISE = """
import sys, os
from datetime import UTC, datetime
from pathlib import Path
from vmgraft.errors import RollbackError
from vmgraft.signing.state import *
path, start, count, step = Path(sys.argv[1]), *map(int, sys.argv[2:5])
create_state(path)
print("ready", flush=True)
sys.stdin.readline()
with RollbackState(path) as state:
    for number in range(start, start + count * step, step):
        try:
            state.raise_to("default", [Ran("com.acme.clock", number, 1)], statement="ab" * 32, when=datetime.now(UTC))
            print(number, flush=True)
        except RollbackError:
            pass
"""


def raiser(path: Path, start: int, count: int, step: int = 1) -> subprocess.Popen[str]:
    """A process that raises the numbers one by one and says each that it was told is safe."""
    command = [sys.executable, "-c", RAISE, str(path), str(start), str(count), str(step)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def test_two_processes_make_the_memory_and_raise_it_at_once(tmp_path):
    path = tmp_path / "new" / "folder" / "state.db"
    odd, even = raiser(path, 1, 100, 2), raiser(path, 2, 100, 2)
    go(odd, even)
    told = [int(line) for process in (odd, even) for line in process.communicate(timeout=60)[0].split()]
    assert (odd.returncode, even.returncode) == (0, 0)
    assert highest(path) == max(told) == 200
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("moment", [0.0, 0.03])
def test_a_kill_loses_nothing_that_was_said(path, moment):
    process = raiser(path, 1, 100_000)
    go(process)
    first = int(process.stdout.readline())
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    said = [first, *(int(line) for line in process.communicate()[0].splitlines())]
    assert process.returncode == -signal.SIGKILL
    assert path.with_name("state.db-wal").exists(), "it was killed in the middle"
    assert said[-1] <= highest(path) <= said[-1] + 1
    put(path, said[-1] + 2)
    assert highest(path) == said[-1] + 2


def test_a_kill_inside_a_transaction_leaves_the_old_number(path):
    put(path, 3)
    script = (
        "import sys, os, signal; from pathlib import Path; from vmgraft.signing.statedb import StateDatabase\n"
        "db = StateDatabase(Path(sys.argv[1]))\n"
        "with db.transaction('BEGIN IMMEDIATE'):\n"
        "    db.put('extensions', ('default', 'com.acme.clock', 9, 1, 'ab' * 32, '2026-11-22T15:00:00Z'))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -signal.SIGKILL
    assert highest(path) == 3
    put(path, 4)


def test_a_kill_while_it_is_made_leaves_none(tmp_path):
    path = tmp_path / "state.db"
    script = (
        "import sys, os, signal; from pathlib import Path; from vmgraft.signing import statefile\n"
        "statefile.create(Path(sys.argv[1]), lambda path: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -signal.SIGKILL
    assert not path.exists()
    assert create_state(path)


def test_another_process_in_the_middle_is_waited_for_and_not_for_ever(path, monkeypatch):
    monkeypatch.setattr(statedb, "BUSY_SECONDS", 0.2)
    with RollbackState(path) as state:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(StateError, match="another process holds it"):
            state.raise_to("default", [Ran(CLOCK, 3, 1)], statement=STATEMENT, when=NOW)
        assert time.monotonic() - began >= 0.2
        other.execute("ROLLBACK")
        other.close()
        state.raise_to("default", [Ran(CLOCK, 3, 1)], statement=STATEMENT, when=NOW)
    assert highest(path) == 3


# --- what is refused


def test_none_there(tmp_path):
    with pytest.raises(StateError, match="there is no rollback memory") as caught:
        RollbackState(tmp_path / "state.db")
    assert "vmgraft state init" in caught.value.hint
    assert not (tmp_path / "state.db").exists()


def every_byte(path: Path) -> range:
    return range(0, path.stat().st_size, 7)


def test_a_flipped_bit_is_damage_or_changes_nothing(path):
    """Wherever it falls: refused, or everything is read as it was."""
    put(path, 3)
    put(path, 5, extension="com.acme.balloon")
    with RollbackState(path) as state:
        whole = state.export()
    good, refused = path.read_bytes(), 0
    interesting = [at for at in range(len(good)) if good[at]]
    for at in interesting[::11] + list(every_byte(path))[::40]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            with RollbackState(path) as state:
                assert state.export() == whole, at
        except StateError:
            refused += 1
    assert refused > 25


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b"not a database" * 100, "damaged: file is not a database"),
        (None, "damaged"),
    ],
)
def test_what_is_no_database_is_never_made_anew(path, content, says):
    put(path, 3)
    data = path.read_bytes()[:5000] if content is None else content
    path.write_bytes(data)
    with pytest.raises(StateError, match=says) as caught:
        RollbackState(path)
    assert "backup" in caught.value.hint
    assert not create_state(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("PRAGMA application_id=1", "no rollback memory of vmgraft"),
        ("PRAGMA user_version=2", "layout 2 is not known"),
        ("CREATE TABLE more (a)", "other tables"),
        (
            "CREATE TRIGGER quiet AFTER UPDATE ON extensions BEGIN UPDATE extensions SET security = 0; END",
            "other tables",
        ),
        ("DROP TABLE pins", "other tables"),
        ("UPDATE extensions SET security = 1", "a row of 'extensions' is damaged"),
        ("UPDATE extensions SET extension = 'com.acme.other'", "a row of 'extensions' is damaged"),
        ("PRAGMA journal_mode=DELETE", "not in WAL mode"),
    ],
)
def test_a_database_that_is_not_ours(path, change, says):
    put(path, 3)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(change)
    db.close()
    with pytest.raises(StateError, match=says):
        RollbackState(path)


KEYID = "SHA256:GxzrlzeR3EUrhaSLAjffNp1ZJDVBjfbHIDjYeq9AlXo"


@pytest.mark.parametrize(
    ("table", "values", "says"),
    [
        ("extensions", ("default", CLOCK, "abc", 1, STATEMENT, "y"), "'security'"),
        ("extensions", ("default", CLOCK, b"\x01", 1, STATEMENT, "y"), "'security'"),
        ("extensions", ("default", CLOCK, 1.5, 1, STATEMENT, "y"), "'security'"),
        ("extensions", ("default", CLOCK, -5, 1, STATEMENT, "y"), "'security'"),
        ("extensions", ("default", CLOCK, 1, "zz", STATEMENT, "y"), "'generation'"),
        ("extensions", ("default", CLOCK, 1, 1, b"\xff", "y"), "'statement'"),
        ("extensions", ("default", CLOCK, 1, 1, STATEMENT, b"\x00"), "'raised'"),
        ("policies", (KEYID, "abc", "x", "y"), "'version'"),
        ("policies", (b"\x01", 1, "x", "y"), "'signer'"),
        ("pins", (KEYID, "junk", "y"), "not the one it is named"),
        ("pins", (KEYID, 7.5, "y"), "not the one it is named"),
        ("pins", (KEYID, b"\xff", "y"), "'pem'"),
        ("pins", ("SHA256:x", None, "y"), "not the one it is named"),
    ],
)
def test_rows_that_were_never_written(path, capsys, table, values, says):
    """With a digest that is right: types and ranges are checked too, and never become a fault of ours."""
    if values[1] is None:
        values = (values[0], generate("p256").public.pem.decode(), values[2])
    db = sqlite3.connect(path, isolation_level=None)
    places = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO {table} VALUES ({places}, 'x')", values)  # noqa: S608 - our names
    stored = db.execute(f"SELECT * FROM {table}").fetchone()[:-1]  # noqa: S608 - as affinities left it
    db.execute(f"UPDATE {table} SET digest = ?", (statedb._digest(table, stored),))  # noqa: S608
    db.close()
    with pytest.raises(StateError, match=says) as caught:
        RollbackState(path, writable=False)
    assert "backup" in caught.value.hint
    for command in ("show", "export"):
        with pytest.raises(SystemExit) as ended:
            app.run(["state", command, "--state", str(path)])
        assert ended.value.code == 18, capsys.readouterr().out


def test_a_lost_database_with_its_log_left_is_not_begun_anew(path):
    with RollbackState(path):
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(StateError, match=r"it is missing, and its state\.db-wal is still there"):
            create_state(path)


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o604])
def test_others_may_use_it(path, mode):
    path.chmod(mode)
    with pytest.raises(StateError, match="others may use it") as caught:
        RollbackState(path)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_others_may_write_to_the_folder(path, mode):
    path.parent.chmod(mode)
    with pytest.raises(StateError, match="others can write to the folder"):
        RollbackState(path)
    with pytest.raises(StateError, match="others can write to the folder"):
        create_state(path.with_name("new.db"))


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_others_may_write_further_up(tmp_path, mode):
    """They could put another folder in place of ours, and the host would forget."""
    top = tmp_path / "top"
    place = top / "mine" / "deep" / "state.db"
    assert create_state(place)
    (tmp_path / "link").symlink_to(top / "mine")
    top.chmod(mode)
    for name in (place, tmp_path / "link" / "deep" / "state.db", top / "mine" / "new" / "state.db"):
        with pytest.raises(StateError, match="others can write to a folder above") as caught:
            RollbackState(place) if name == place else create_state(name)
        assert caught.value.file == str(top) and f"chmod go-w {top}" in caught.value.hint
    top.chmod(mode | 0o1000)
    RollbackState(place).close()


def test_a_link_in_the_middle_through_a_folder_of_everybodys(tmp_path):
    """``mine/st`` leads to ``open/L``, that to ``real``; who may write to ``open`` chooses what the host reads."""
    for name in ("mine", "real", "open"):
        (tmp_path / name).mkdir(mode=0o700)
    assert create_state(tmp_path / "real" / "state.db")
    (tmp_path / "open" / "L").symlink_to(tmp_path / "real")
    (tmp_path / "mine" / "st").symlink_to("../open/L")
    for way in ("mine/st", "mine/../open/../mine/st", "open/L", "real/../open/L", "real/../open/../real"):
        RollbackState(tmp_path / way / "state.db").close()
    (tmp_path / "open").chmod(0o777)
    for way in ("mine/st", "mine/../open/../mine/st", "open/L", "real/../open/L", "real/../open/../real"):
        with pytest.raises(StateError, match="others can write to a folder above") as caught:
            RollbackState(tmp_path / way / "state.db")
        assert caught.value.file == str(tmp_path / "open")
    (tmp_path / "open").chmod(0o1777)
    RollbackState(tmp_path / "mine" / "st" / "state.db").close()


def test_somebody_elses_link_in_the_middle(tmp_path, monkeypatch):
    """In a folder like ``/tmp``, where only the owner may change it."""
    for name in ("mine", "real", "open"):
        (tmp_path / name).mkdir(mode=0o700)
    assert create_state(tmp_path / "real" / "state.db")
    (tmp_path / "open").chmod(0o1777)
    (tmp_path / "open" / "L").symlink_to(tmp_path / "real")
    (tmp_path / "mine" / "st").symlink_to(tmp_path / "open" / "L")
    real = statefile._lstat

    def seen(path):
        found = list(real(path))
        found[4] = 4711 if path == tmp_path / "open" / "L" else found[4]  # st_uid
        return os.stat_result(found)

    monkeypatch.setattr(statefile, "_lstat", seen)
    with pytest.raises(StateError, match="belongs to uid 4711") as caught:
        RollbackState(tmp_path / "mine" / "st" / "state.db")
    assert caught.value.file == str(tmp_path / "open" / "L")


def test_links_without_end(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    assert create_state(tmp_path / "real" / "state.db")
    (tmp_path / "l0").symlink_to("real")
    for number in range(1, 41):
        (tmp_path / f"l{number}").symlink_to(f"l{number - 1}")
    RollbackState(tmp_path / "l39" / "state.db").close()
    with pytest.raises(StateError):
        RollbackState(tmp_path / "l40" / "state.db")
    with pytest.raises(StateError, match="too many symbolic links"):
        list(statefile._way(tmp_path / "l40"))


def test_somebody_else_owns_a_folder_further_up(tmp_path, monkeypatch):
    place = tmp_path / "theirs" / "mine" / "state.db"
    assert create_state(place)
    real = statefile._lstat

    def seen(path):
        found = list(real(path))
        found[4] = 4711 if path == tmp_path / "theirs" else found[4]  # st_uid
        return os.stat_result(found)

    monkeypatch.setattr(statefile, "_lstat", seen)
    with pytest.raises(StateError, match="belongs to uid 4711") as caught:
        RollbackState(place)
    assert caught.value.file == str(tmp_path / "theirs")


def test_links_and_other_things(path, tmp_path):
    link = tmp_path / "link.db"
    link.symlink_to(path)
    with pytest.raises(StateError, match="symbolic link"):
        RollbackState(link)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    assert not create_state(link), "a dangling link is something that is there"
    link.unlink()
    os.link(path, link)
    with pytest.raises(StateError, match="hard link"):
        RollbackState(path)
    link.unlink()
    os.mkfifo(link, 0o600)
    with pytest.raises(StateError, match="regular file"):
        RollbackState(link)
    path.with_name("state.db-journal").symlink_to(link)
    with pytest.raises(StateError, match="symbolic link"):
        RollbackState(path)


def test_another_owner(path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StateError, match="belongs to uid"):
        RollbackState(path)


def test_one_that_is_too_large(path):
    os.truncate(path, statefile.MAX_STATE + 1)
    with pytest.raises(StateError, match="more than"):
        RollbackState(path)


def test_a_folder_that_somebody_else_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(statefile, "LOCK_SECONDS", 0.1)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(StateError, match="holds the folder"):
        create_state(tmp_path / "state.db")
    os.close(holder)
    assert create_state(tmp_path / "state.db")


@pytest.mark.parametrize("name", ["a b?mode=memory#x%41", "größe", ":memory:", "x?", "-wal"])
def test_names_that_mean_something_to_sqlite(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    create_state(path)
    put(path, 3)
    assert [item.name for item in tmp_path.iterdir()] == [name]
    assert highest(path) == 3


@pytest.mark.parametrize("name", ["a/file/state.db", "nul\0/state.db", "x" * 300 + "/state.db"])
def test_places_that_cannot_be(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    with pytest.raises(StateError):
        create_state(tmp_path / name)


ONE_RUN = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from vmgraft.errors import StateError
from vmgraft.signing.state import Ran, RollbackState, create_state
path = Path(sys.argv[1])
try:
    create_state(path)
    with RollbackState(path) as state:
        state.raise_to("default", [Ran("com.acme.clock", 9, 1)], statement="ab" * 32, when=datetime.now(UTC))
except StateError as error:
    sys.exit(f"refused: {error} ({error.hint})")
"""


def traced(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One run under strace, which answers in the kernel's place where it is told to."""
    assert shutil.which("strace"), "strace is missing: apt-get install strace"
    files = [f"-P{path.with_name(path.name + end)}" for end in ("", "-wal", "-shm", "-journal")]
    command = ["strace", "-f", "-o", path.with_name("trace"), *files, *options, sys.executable, "-c", ONE_RUN, path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("calls", "reason"), [("pwrite64,write,ftruncate", "ENOSPC"), ("fdatasync,fsync", "EIO")])
def test_a_full_or_failing_disk_at_every_write(path, calls, reason):
    """Refused, and the old number stands; or safe. Never a number in between, and never neither."""
    put(path, 3)
    before = path.read_bytes()
    assert traced(path, "-e", f"trace={calls}").returncode == 0
    trace = path.with_name("trace").read_text()
    assert highest(path) == 9
    points = [(call, number + 1) for call in calls.split(",") for number in range(trace.count(f"{call}("))]
    assert len(points) >= 2
    for call, number in points:
        path.write_bytes(before)
        for companion in statefile.COMPANIONS:
            path.with_name(path.name + companion).unlink(missing_ok=True)
        done = traced(path, "-e", f"trace={call}", "-e", f"inject={call}:error={reason}:when={number}")
        assert "Traceback" not in done.stderr, (call, number)
        if done.returncode == 0:  # only what SQLite can do without: its last fold
            assert highest(path) == 9, (call, number)
            continue
        assert done.stderr.startswith("refused: "), done.stderr
        assert highest(path) in (3, 9), (call, number)
        put(path, 9)
        assert highest(path) == 9


def as_owner_without_rights(folder: Path, action) -> str:
    """Run something in a child that owns the folder and is not root; return what it says."""

    def act() -> bytes:
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
        try:
            return repr(action()).encode()
        except VmgraftError as error:
            return f"{type(error).__name__}: {error}".encode()

    return said_by_child(act)


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o400, 0o700), (0o400, 0o500), (0o600, 0o500)])
def test_a_read_only_memory(file_mode, folder_mode):
    with tempfile.TemporaryDirectory() as name:  # under a folder that everybody may pass through
        path = Path(name) / "memory" / "state.db"
        create_state(path)
        put(path, 3)
        if os.getuid() == 0:
            os.chown(path, 65534, 65534)
            os.chown(path.parent, 65534, 65534)
            Path(name).chmod(0o755)
        path.chmod(file_mode)
        path.parent.chmod(folder_mode)
        said = as_owner_without_rights(path.parent, lambda: RollbackState(path))
        assert said.startswith("StateError: ")
        assert "cannot be opened or written" in said
        assert as_owner_without_rights(path.parent, lambda: create_state(path.with_name("b.db"))).startswith(
            "StateError" if folder_mode == 0o500 else "True"
        )
        if folder_mode == 0o500:  # a log cannot be read where its index cannot be made
            said = as_owner_without_rights(path.parent, lambda: RollbackState(path, writable=False))
            assert said.startswith("StateError: ")
        else:
            assert as_owner_without_rights(path.parent, lambda: highest(path)) == "3"
        path.parent.chmod(0o700)
        path.chmod(0o600)
        assert as_owner_without_rights(path.parent, lambda: highest(path)) == "3"


def test_an_auditor_changes_nothing(path):
    put(path, 3)
    before = path.read_bytes()
    with RollbackState(path, writable=False) as state:
        with pytest.raises(StateError):
            state.raise_to("default", [Ran(CLOCK, 4, 1)], statement=STATEMENT, when=NOW)
        with pytest.raises(StateError):
            state.reset("default", CLOCK)
        assert state.highest("default", CLOCK) == 3
    assert path.read_bytes() == before


# --- forgetting


def test_reset_is_the_way_down(path):
    put(path, 7)
    put(path, 7, policy="other")
    with RollbackState(path) as state:
        assert state.reset("default", CLOCK).security_version == 7
        with pytest.raises(UsageError, match=r"nothing is remembered of com\.acme\.clock under default"):
            state.reset("default", CLOCK)
    put(path, 2)
    assert (highest(path), highest(path, policy="other")) == (2, 7)


# --- signed policies


@pytest.fixture
def signed(sim, tmp_path):
    """Write a signed policy of some version."""

    def write(version: int, signer: str = "second") -> Path:
        document = sim.policy_document() | {"policyVersion": version}
        file = tmp_path / f"policy-{version}-{signer}.json"
        file.write_bytes(sign_policy(format_policy(document), [sim.keys[signer]]))
        return file

    return write


def test_policy_versions_only_rise(path, sim, signed):
    key = sim.keys["second"].public
    with RollbackState(path) as state:
        for version, rises in ((4, True), (6, True), (6, False)):
            policy = load_policy(signed(version), policy_trust(state, [key]))
            assert state.raise_policy(policy.signed_by, policy.policy_version, policy.sha256, when=NOW) is rises
        with pytest.raises(PolicyError, match="policy version 5 is older than 6"):
            load_policy(signed(5), policy_trust(state, [key]))
        with pytest.raises(PolicyError, match="policy version 5 is older than 6"):
            state.raise_policy(policy.signed_by, 5, policy.sha256, when=NOW)
        load_policy(signed(5, "third"), policy_trust(state, [sim.keys["third"].public]))
        assert state.policy_version(key.keyid) == 6


def test_a_pinned_key_rules(path, sim, signed, tmp_path):
    second, third = sim.keys["second"].public, sim.keys["third"].public
    plain = tmp_path / "plain.json"
    plain.write_bytes(format_policy(sim.policy_document()))
    with RollbackState(path) as state:
        load_policy(plain, policy_trust(state))
        state.pin(second, when=NOW)
        state.pin(second, when=NOW)
        assert state.pinned() == (second,)
        assert load_policy(signed(1), policy_trust(state)).signed_by == (second.keyid,)
        with pytest.raises(PolicyError, match="not signed"):
            load_policy(plain, policy_trust(state))
        with pytest.raises(PolicyError, match="not signed by"):
            load_policy(signed(1, "third"), policy_trust(state))
        with pytest.raises(PolicyError, match="none of the policy keys named is pinned"):
            policy_trust(state, [third])
        assert policy_trust(state, [third, second]).keys == (second,)
        state.reset_signer(second.keyid)
        load_policy(plain, policy_trust(state))
    assert policy_trust(None, required=True).required


# --- the command


@pytest.fixture
def run(capsys):
    """Run the program in this process; return what it printed."""

    def call(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            app.run([str(item) for item in arguments])
        said = capsys.readouterr()
        assert ended.value.code == code, said
        return said.out + said.err

    return call


def test_the_place_is_where_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert statefile.default_path() == tmp_path / "vmgraft" / "state.db"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert statefile.default_path() == Path("/home/somebody/.local/state/vmgraft/state.db")


def test_the_state_command(tmp_path, monkeypatch, sim, run):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = statefile.default_path()
    assert "there is no rollback memory" in run("state", "show", code=18)
    assert json.loads(run("state", "show", "--json", code=18))["error"]["code"] == "state-invalid"
    run("state", "init")
    run("state", "init", code=3)
    assert run("state", "show") == "nothing is remembered yet\n"
    put(path, 3, extension="com.acme.clock")
    assert "default  com.acme.clock  security version 3, generation 1, since 2026-11-22T15:00:00Z" in run(
        "state", "show"
    )
    write_keypair(tmp_path / "fleet", sim.keys["second"], None)
    keyid = sim.keys["second"].keyid
    assert keyid in run("state", "pin", tmp_path / "fleet.pub")
    shown = json.loads(run("state", "show", "--json"))
    exported = json.loads(run("state", "export"))
    assert {name: shown[name] for name in exported} == exported
    assert exported["extensions"] == [
        {
            "policy": "default", "extension": CLOCK, "securityVersion": 3, "generation": 1,
            "statementSha256": STATEMENT, "raised": "2026-11-22T15:00:00Z",
        }
    ]  # fmt: skip
    assert [pin["keyid"] for pin in exported["pinnedPolicyKeys"]] == [keyid]
    assert "say --yes" in run("state", "reset", "default", CLOCK, code=2)
    assert highest(path) == 3
    for wrong in (("default",), (), ("default", "--policy-key", keyid, "--yes")):
        run("state", "reset", *wrong, code=2)
    forgotten = json.loads(run("state", "reset", "default", CLOCK, "--yes", "--json"))["forgotten"]
    assert forgotten["securityVersion"] == 3
    run("state", "reset", "--policy-key", keyid, "--yes")
    assert run("state", "show") == "nothing is remembered yet\n"
