"""Where the rollback memory lies, and what its file must look like before SQLite is let near it.

The file is the owner's alone, in a folder that nobody else can write to: whoever could put a journal beside a database,
or another file in its place, could make a host forget.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vmgraft.errors import StateError
from vmgraft.signing.ownership import others_can_write, unknown_owner
from vmgraft.words import size_words

#: Largest database accepted, in bytes; one entry takes about 400.
MAX_STATE: Final = 64 << 20
#: Most symbolic links on the way to it, as on Linux (path_resolution(7)).
MAX_LINKS: Final = 40
#: Seconds to wait for another process that makes a database in the same folder, which takes milliseconds.
LOCK_SECONDS: Final = 10.0
#: What SQLite keeps beside a database (sqlite.org/tempfiles.html, 2.1 to 2.3).
COMPANIONS: Final = ("-wal", "-shm", "-journal")
#: What to do about a database that cannot be believed.
RESTORE: Final = "bring it back from a backup; only if there is none, move it away and start anew: vmgraft state init"


def default_path() -> Path:
    """Return ``$XDG_STATE_HOME/vmgraft/state.db`` (XDG Base Directory Specification; a relative value is ignored).

    Raises:
        StateError: neither that variable nor the home directory is known.
    """
    given = os.environ.get("XDG_STATE_HOME", "")
    if given.startswith("/"):
        return Path(given) / "vmgraft" / "state.db"
    try:
        home = Path.home()
    except RuntimeError as exc:
        raise StateError("no home directory to keep the rollback memory in", hint="--state FILE, or none") from exc
    return home / ".local" / "state" / "vmgraft" / "state.db"


def exists(path: Path) -> bool:
    """Tell whether there is anything by this name, a dangling link included.

    Raises:
        StateError: that cannot be found out.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as exc:
        raise _refused(path, exc) from exc
    return True


def check_file(path: Path) -> None:
    """Refuse a database that others could have changed or could change, and anything that is none.

    Raises:
        StateError: says what is wrong, and how to mend it.
    """
    _check_folder(path.parent)
    found = _lstat(path)
    _check_entry(path, found)
    if found.st_size > MAX_STATE:
        raise StateError(f"it has more than {size_words(MAX_STATE)}", file=path)
    if found.st_size == 0:
        raise StateError("it is empty: what it remembered is lost", file=path, hint=RESTORE)
    for ending in COMPANIONS:
        companion = path.with_name(path.name + ending)
        with suppress(FileNotFoundError):  # another process may just have closed the database
            _check_entry(companion, companion.lstat(), links=False)


def create(path: Path, fill: Callable[[Path], None]) -> bool:
    """Make a database; nothing by its name is ever replaced, and a half-made one is never seen.

    Args:
        path: Its name. Missing folders are made, for the owner alone.
        fill: Writes the database to the path it is given.

    Returns:
        False where there was one already.

    Raises:
        StateError: it cannot be made, or parts of an earlier one are left.
    """
    try:
        _make_folder(path.parent)
    except (OSError, ValueError) as exc:
        raise _refused(path.parent, exc) from exc
    _check_folder(path.parent)
    with _locked(path.parent):
        if exists(path):
            return False
        left = next((ending for ending in COMPANIONS if exists(path.with_name(path.name + ending))), None)
        if left is not None:
            message = f"it is missing, and its {path.name}{left} is still there"
            raise StateError(message, file=path, hint="bring it back from a backup, or remove that file too")
        try:
            with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
                made = Path(folder) / path.name
                os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
                fill(made)
                _flush(made)
                made.rename(path)
            _flush(path.parent)
        except OSError as exc:
            raise _refused(path, exc) from exc
    return True


def _make_folder(folder: Path) -> None:
    """Make what is missing of a path, each part for the owner alone (``mkdir -p`` would ask the umask)."""
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)


def _check_folder(folder: Path) -> None:
    try:
        found = folder.stat()
    except (OSError, ValueError) as exc:
        raise _refused(folder, exc) from exc
    if not stat.S_ISDIR(found.st_mode):
        raise StateError("not a folder", file=folder)
    if found.st_uid not in (os.geteuid(), 0):
        raise StateError(f"the folder belongs to uid {found.st_uid}", file=folder, hint="use a folder of your own")
    if found.st_mode & 0o022:
        raise StateError("others can write to the folder", file=folder, hint=f"chmod 700 {folder}")
    unknown = unknown_owner()
    if unknown == os.geteuid():
        message = "this user namespace knows no owners: what is ours and what is not looks the same"
        raise StateError(message, file=folder, hint="map a user into it, as unshare --map-current-user does")
    for part, how in _way(folder.absolute()):
        _check_ancestor(part, how, unknown)


def _way(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Return each folder and each link that the kernel passes on the way to a folder, as they are themselves.

    A link in the middle, in a folder that is on the way by that link alone, leads elsewhere for whoever can change it.
    """
    here, steps, links = Path(folder.anchor), list(reversed(folder.parts[1:])), 0
    yield here, _lstat(here)
    while steps:
        step = steps.pop()
        part = here.parent if step == os.pardir else here / step
        how = _lstat(part)
        yield part, how
        if not stat.S_ISLNK(how.st_mode):
            here = part
            continue
        links += 1
        if links > MAX_LINKS:
            raise StateError("too many symbolic links on the way to the rollback memory", file=folder)
        target = _target(part)
        here = Path(target.anchor) if target.is_absolute() else here
        steps += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _target(link: Path) -> Path:
    try:
        return link.readlink()
    except OSError as exc:
        raise _refused(link, exc) from exc


def _check_ancestor(part: Path, found: os.stat_result, unknown: int | None) -> None:
    """Refuse a folder, or a link to one, through which others could put another folder in place of ours.

    Whose a folder is that belongs to somebody outside of a user namespace cannot be seen in it; such a one, as ``/`` is
    in a rootless container, counts as the system's.
    """
    if found.st_uid not in (os.geteuid(), 0, unknown):
        hint = "name a place below folders of your own or root's: --state FILE"
        raise StateError(f"a folder above the rollback memory belongs to uid {found.st_uid}", file=part, hint=hint)
    if stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX:
        return
    if others_can_write(part, found):
        hint = f"chmod go-w {part}; or another place: --state FILE"
        raise StateError("others can write to a folder above the rollback memory", file=part, hint=hint)


def _check_entry(path: Path, found: os.stat_result, *, links: bool = True) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise StateError("the rollback memory must not be a symbolic link", file=path, hint="name the file itself")
    if not stat.S_ISREG(found.st_mode):
        raise StateError("the rollback memory must be a regular file", file=path)
    if found.st_uid != os.geteuid():
        message = f"it belongs to uid {found.st_uid}, and this is uid {os.geteuid()}"
        raise StateError(message, file=path, hint="each user keeps a memory of their own: --state FILE")
    if found.st_mode & 0o077:
        raise StateError(f"others may use it (mode {found.st_mode & 0o777:04o})", file=path, hint=f"chmod 600 {path}")
    if links and found.st_nlink > 1:
        raise StateError("it has a second name (a hard link)", file=path, hint="SQLite would keep two journals for it")


def _lstat(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except (OSError, ValueError) as exc:
        raise _refused(path, exc) from exc


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make a database in a folder; the lock ends with the process."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise _refused(folder, exc) from exc
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _lock(fd):
            if time.monotonic() > deadline:  # anybody who may read the folder could hold it
                hint = f"chmod 700 {folder}"
                raise StateError("another process holds the folder for too long", file=folder, hint=hint)
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        hint = "is it on a network file system?"
        raise StateError(f"the folder cannot be locked: {exc.strerror}", hint=hint) from exc
    return True


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refused(path: Path, exc: OSError | ValueError) -> StateError:
    why = exc.strerror if isinstance(exc, OSError) else str(exc)
    return StateError(f"the rollback memory cannot be used: {why}", file=path, hint="--state FILE names another place")
