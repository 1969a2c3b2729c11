"""Whose the folders above a rollback memory may be: user namespaces, and groups of one."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from child import said_by_child

from vmgraft.errors import StateError
from vmgraft.signing import ownership
from vmgraft.signing.state import RollbackState, create_state

SOMEBODY = 4242
CLONE_NEWUSER, PR_SET_DUMPABLE = 0x1000_0000, 4  # linux/sched.h, linux/prctl.h

MAKE = """
import sys
from vmgraft.errors import StateError
from vmgraft.signing.state import RollbackState, create_state
try:
    print(create_state(__import__("pathlib").Path(sys.argv[1])))
    RollbackState(__import__("pathlib").Path(sys.argv[1])).close()
except StateError as error:
    print("StateError:", error)
"""


# --- user namespaces


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """Pretend to be in another user namespace."""

    def pretend(uid_map: str, overflow: str = "65534\n") -> int | None:
        (tmp_path / "map").write_text(uid_map)
        (tmp_path / "overflow").write_text(overflow)
        monkeypatch.setattr(ownership, "_MAP", tmp_path / "map")
        monkeypatch.setattr(ownership, "_OVERFLOW_FILE", tmp_path / "overflow")
        return ownership.unknown_owner()

    return pretend


@pytest.mark.parametrize(
    ("uid_map", "unknown"),
    [
        ("         0          0 4294967295\n", None),  # no namespace
        ("0 1000 1\n", 65534),  # unshare --map-root-user
        ("1000 1000 1\n", 65534),
        ("0 1000 1\n1 100000 65536\n", None),  # 65534 is somebody there
        ("0 1000 1\n1 100000 65533\n", 65534),
        ("0 1000 1\n1 100000 65534\n", None),
        ("", 65534), ("0 1000\n", None), ("unreadable\n", None),
    ],
)  # fmt: skip
def test_the_owner_whom_nobody_knows(proc, uid_map, unknown):
    assert proc(uid_map) == unknown


def test_another_overflow_uid(proc):
    assert proc("0 1000 1\n", "7\n") == 7
    assert proc("0 1000 100\n", "7\n") is None
    assert proc("0 1000 1\n", "seven\n") is None


def test_without_proc_nothing_is_excused(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "_MAP", tmp_path / "nothing")
    assert ownership.unknown_owner() is None


def test_here_there_is_none():
    if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
        assert ownership.unknown_owner() is None


def in_namespace(place: Path, inside: int | None) -> str:
    """Make and open a memory in a user namespace, as a user who is not root outside, and ``inside`` in it."""
    said = said_by_child(lambda: _enter(inside) or _make(place))
    if said.startswith("cannot:"):
        pytest.skip(f"no user namespaces here: {said}")
    return said


def _enter(inside: int | None) -> bytes:
    """Do what unshare(1) does; an interpreter that root alone may read could not be started behind that."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
        os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    uid = os.getuid()
    if libc.unshare(CLONE_NEWUSER):
        return f"cannot: {os.strerror(ctypes.get_errno())}".encode()
    if inside is not None:
        try:
            Path("/proc/self/uid_map").write_text(f"{uid if inside else 0} {uid} 1")
        except OSError as error:
            return f"cannot: {error}".encode()
    return b""


def _make(place: Path) -> bytes:
    try:
        made = create_state(place)
        RollbackState(place).close()
    except StateError as error:
        return f"StateError: {error}".encode()
    return repr(made).encode()


@pytest.fixture
def home():
    """A folder of the user's own below one that everybody may pass through."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "home"
        folder.mkdir(mode=0o700)
        Path(name).chmod(0o755)
        if os.getuid() == 0:
            os.chown(folder, SOMEBODY, SOMEBODY)
        yield folder


@pytest.mark.parametrize("inside", [0, 1])
def test_in_a_namespace_the_root_folder_is_nobodys(home, inside):
    """As root there (unshare --map-root-user), or as oneself (--map-current-user)."""
    assert in_namespace(home / "a" / "state.db", inside) == "True"


def test_in_a_namespace_our_own_folder_must_be_ours(home):
    if os.getuid() != 0:
        pytest.skip("needs root to give a folder away")
    os.chown(home, 4711, 4711)
    home.chmod(0o755)
    assert "StateError" in in_namespace(home / "state.db", 0)
    home.chmod(0o777)  # and nobody's folder to which all can write is no better there
    assert "others can write to a folder above" in in_namespace(home / "a" / "state.db", 0)


def test_a_namespace_that_knows_nobody(home):
    assert "knows no owners" in in_namespace(home / "a" / "state.db", None)


# --- groups


@pytest.fixture
def people(monkeypatch):
    """A system with users ``ann`` (1000) and ``bob`` (1001), each with a group of the same name and number."""

    def system(members: tuple[str, ...] = (), name: str = "ann", primary: int = 1000, bobs: int = 1001) -> bool:
        users = [
            SimpleNamespace(pw_name="ann", pw_uid=1000, pw_gid=primary),
            SimpleNamespace(pw_name="bob", pw_uid=1001, pw_gid=bobs),
        ]
        monkeypatch.setattr(pwd, "getpwall", lambda: users)
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: {user.pw_uid: user for user in users}[uid])
        groups = {1000: SimpleNamespace(gr_name=name, gr_mem=list(members))}
        monkeypatch.setattr(grp, "getgrgid", lambda gid: groups[gid])
        return ownership._is_private(1000, 1000)

    return system


def test_a_group_of_one(people):
    assert people() and people(members=("ann",))
    assert not people(members=("ann", "bob")) and not people(members=("bob",))
    assert not people(name="staff") and not people(primary=100) and not people(bobs=1000)
    assert not ownership._is_private(1001, 1000), "a group that is not known"
    assert not ownership._is_private(1000, 77), "a user who is not known"


def test_root_has_no_group_of_its_own(monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: pytest.fail("asked"))
    assert not ownership._is_private(0, 0)


@pytest.mark.parametrize(
    ("mode", "acl", "private", "others"),
    [
        (0o755, False, False, False), (0o775, False, True, False), (0o775, True, True, True),
        (0o775, False, False, True), (0o777, False, True, True), (0o757, False, True, True),
    ],
)  # fmt: skip
def test_who_can_write(tmp_path, monkeypatch, mode, acl, private, others):
    def getxattr(_path, _name):
        if not acl:
            raise OSError(61, "No data available")
        return b"\x02\0\0\0"

    monkeypatch.setattr(os, "getxattr", getxattr)
    monkeypatch.setattr(ownership, "_is_private", lambda _gid, _uid: private)
    tmp_path.chmod(mode)
    assert ownership.others_can_write(tmp_path, tmp_path.stat()) is others
    if mode == 0o775:  # a folder of somebody else's: that one's group is not ours
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        assert ownership.others_can_write(tmp_path, tmp_path.stat())


def test_an_access_control_list_that_cannot_be_read(tmp_path, monkeypatch):
    def getxattr(_path, _name):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "getxattr", getxattr)
    monkeypatch.setattr(ownership, "_is_private", lambda _gid, _uid: True)
    tmp_path.chmod(0o775)
    assert ownership.others_can_write(tmp_path, tmp_path.stat())


def a_user_with_a_group() -> pwd.struct_passwd | None:
    users = pwd.getpwall()
    return next((user for user in users if user.pw_uid and ownership._is_private(user.pw_gid, user.pw_uid)), None)


def test_a_home_made_under_umask_002():
    """As a real user of this machine with a private group: the memory itself stays the user's alone."""
    user = a_user_with_a_group() if os.getuid() == 0 else None
    if user is None:
        pytest.skip("needs root, and a user with a private group")
    with tempfile.TemporaryDirectory() as name:
        local = Path(name) / ".local"
        local.mkdir()
        Path(name).chmod(0o755)
        os.chown(local, user.pw_uid, user.pw_gid)
        local.chmod(0o775)
        command = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", sys.executable]
        command += ["-c", MAKE, str(local / "state" / "vmgraft" / "state.db")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
        assert done.stdout == "True\n", done.stderr
        assert stat.S_IMODE((local / "state").stat().st_mode) == 0o700
        os.chown(local, user.pw_uid, 0)  # another group
        local.chmod(0o775)
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
        assert "others can write to a folder above" in done.stdout, done.stderr


# --- read-only places


@pytest.fixture
def memory(tmp_path):
    path = tmp_path / "state.db"
    create_state(path)
    yield path
    for part in (path, tmp_path):
        subprocess.run(["chattr", "-i", str(part)], capture_output=True, check=False)


def fixed(path: Path) -> None:
    if os.getuid() != 0 or subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("needs root, and a file system with chattr +i")


def test_a_file_that_cannot_change_is_for_reading_only(memory):
    fixed(memory)
    with RollbackState(memory, writable=False) as state:
        assert state.highest("default", "com.acme.clock") is None
    with pytest.raises(StateError, match="cannot be opened or written") as caught:
        RollbackState(memory)
    assert "`run` writes to the file" in caught.value.hint


def test_a_folder_that_cannot_change(memory):
    """SQLite makes files even to read."""
    fixed(memory.parent)
    for writable in (False, True):
        with pytest.raises(StateError, match="cannot be opened or written"):
            RollbackState(memory, writable=writable)


def test_a_file_system_for_reading_only(memory):
    script = f"""
import sys; from pathlib import Path
from vmgraft.errors import StateError
from vmgraft.signing.state import RollbackState
for writable in (False, True):
    try: RollbackState(Path({str(memory)!r}), writable=writable).close(); print("open")
    except StateError as error: print(error.message)
"""
    mount = f"mount --bind {memory.parent} {memory.parent} && mount -o remount,ro,bind {memory.parent} && exec "
    command = ["unshare", "--mount", "sh", "-c", f'{mount} "$0" "$@"', sys.executable, "-c", script]
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "mount:" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr}")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("cannot be opened or written" in line for line in lines), done.stderr
