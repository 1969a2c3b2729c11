"""Who else could change what lies in a folder: owners in user namespaces, and groups that have one member.

sshd asks the same before it believes a file (sshd_config(5), StrictModes), and Debian's lets a folder be writable to
the group where that group is the user's alone, as with umask 002.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path
from typing import Final

#: Who is somebody in this user namespace, and what the kernel shows for everybody else (user_namespaces(7)).
_MAP: Final = Path("/proc/self/uid_map")
_OVERFLOW_FILE: Final = Path("/proc/sys/kernel/overflowuid")
#: Most bytes of these files that are read; a map has at most 340 lines.
_MAX_PROC: Final = 1 << 16


def unknown_owner() -> int | None:
    """Return the uid that stands for every owner whom this user namespace does not know, or None where it means one.

    None is the answer outside of user namespaces, and in those in which somebody really has that uid.
    """
    try:
        overflow, lines = int(_read(_OVERFLOW_FILE)), _read(_MAP).splitlines()
        spans = [tuple(map(int, line.split())) for line in lines]  # none before anybody was mapped
        known = any(first <= overflow < first + count for first, _outside, count in spans)
    except (OSError, ValueError):  # no /proc, or not a map: nothing is excused
        return None
    return None if known else overflow


def _read(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(_MAX_PROC).decode("ascii", "replace").strip()


def others_can_write(path: Path, found: os.stat_result) -> bool:
    """Tell whether anybody but its owner and root can write to a folder."""
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not (
        found.st_uid == os.geteuid() and _is_private(found.st_gid, found.st_uid) and not _has_acl(path)
    )


def _is_private(gid: int, uid: int) -> bool:
    """Tell whether a group is a user's primary one, called like the user, and nobody else's; never for root."""
    if uid == 0:
        return False
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    same = user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return same and all(other.pw_uid == uid for other in pwd.getpwall() if other.pw_gid == gid)


def _has_acl(path: Path) -> bool:
    """Tell whether there is an access control list: then the mode's group bits speak of everybody in it (acl(5))."""
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError as exc:
        return exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
    return True
