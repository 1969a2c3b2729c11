"""The database under the rollback memory: SQLite, opened with suspicion. ``state`` gives its rows their meaning.

WAL mode with ``synchronous=FULL`` (sqlite.org/pragma.html#pragma_synchronous: a commit survives a loss of power). The
log is folded back after each commit, and each row carries a digest of its own, so that a flipped bit is damage and not
another number. Nothing is repaired, made anew or passed over: what cannot be believed is a ``StateError``.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import FileError, StateError
from vmgraft.signing import statefile
from vmgraft.signing.keys import public_from_pem

#: ``application_id`` of the database: "vmgs".
APPLICATION: Final = 0x766D6773
#: ``user_version`` of the database: the layout below.
LAYOUT: Final = 1
#: Largest number kept; statements hold nothing larger.
MAX_NUMBER: Final = (1 << 63) - 1
#: Seconds to wait for another process's transaction, which takes milliseconds.
BUSY_SECONDS: Final = 10.0

_TABLES: Final = {
    "extensions": "CREATE TABLE extensions (policy TEXT NOT NULL, extension TEXT NOT NULL, security INTEGER NOT NULL, "
    "generation INTEGER NOT NULL, statement TEXT NOT NULL, raised TEXT NOT NULL, digest TEXT NOT NULL, "
    "PRIMARY KEY (policy, extension)) WITHOUT ROWID",
    "policies": "CREATE TABLE policies (signer TEXT NOT NULL PRIMARY KEY, version INTEGER NOT NULL, "
    "sha256 TEXT NOT NULL, raised TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID",
    "pins": "CREATE TABLE pins (signer TEXT NOT NULL PRIMARY KEY, pem TEXT NOT NULL, pinned TEXT NOT NULL, "
    "digest TEXT NOT NULL) WITHOUT ROWID",
}
#: Everything but the digest, in the order it is hashed.
_COLUMNS: Final = {
    "extensions": ("policy", "extension", "security", "generation", "statement", "raised"),
    "policies": ("signer", "version", "sha256", "raised"),
    "pins": ("signer", "pem", "pinned"),
}
#: Columns that hold numbers; the others hold text.
_NUMBERS: Final = ("security", "generation", "version")


class StateDatabase:
    """An open database that passed every check.

    Args:
        path: The file.
        writable: Whether it is opened for writing.

    Raises:
        StateError: missing, not the user's alone, damaged, of another layout, or in use for too long.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self.path = path
        if not statefile.exists(path):
            hint = f"vmgraft state init --state {path}; where there was one before, bring it back from a backup"
            raise StateError("there is no rollback memory", file=path, hint=hint)
        statefile.check_file(path)
        with self.guard():
            self._db = _connect(path, "rw" if writable else "ro")
        try:
            with self.guard():
                self._db.execute(f"PRAGMA query_only={'OFF' if writable else 'ON'}")
                self._check()
                if writable:
                    self._probe()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the database; may be called twice."""
        self._db.close()

    def rows(self, table: str, where: Mapping[str, str] | None = None) -> list[tuple[Any, ...]]:
        """Return rows without their digests, which must be right."""
        names = _COLUMNS[table]
        condition = " AND ".join(f"{name} = ?" for name in where) if where else "1"
        query = f"SELECT {', '.join(names)}, digest FROM {table} WHERE {condition} ORDER BY 1, 2"  # noqa: S608 - our names
        rows = self._db.execute(query, tuple((where or {}).values())).fetchall()
        for row in rows:
            if row[-1] != _digest(table, row[:-1]):
                raise StateError(f"a row of {table!r} is damaged", file=self.path, hint=statefile.RESTORE)
            self._check_row(table, row)
        return [row[:-1] for row in rows]

    def _check_row(self, table: str, row: tuple[Any, ...]) -> None:
        """Refuse what this release never writes: SQLite keeps any type in any column (sqlite.org/datatype3.html, 3)."""
        for name, value in zip(_COLUMNS[table], row, strict=False):
            number = type(value) is int and 0 <= value <= MAX_NUMBER
            if not (number if name in _NUMBERS else type(value) is str):
                message = f"a row of {table!r} holds a {name!r} that was never written by vmgraft"
                raise StateError(message, file=self.path, hint=statefile.RESTORE)
        if table == "pins" and _keyid(row[1]) != row[0]:
            raise StateError("a pinned key is not the one it is named", file=self.path, hint=statefile.RESTORE)

    def put(self, table: str, values: tuple[Any, ...]) -> None:
        """Write a row, its digest left out, over the one with the same key if there is one."""
        places = ", ".join("?" * (len(values) + 1))
        query = f"INSERT OR REPLACE INTO {table} VALUES ({places})"  # noqa: S608 - our names
        self._db.execute(query, (*values, _digest(table, values)))

    def delete(self, table: str, where: Mapping[str, str]) -> None:
        """Delete rows."""
        condition = " AND ".join(f"{name} = ?" for name in where)
        self._db.execute(f"DELETE FROM {table} WHERE {condition}", tuple(where.values()))  # noqa: S608 - our names

    @contextmanager
    def transaction(self, begin: str) -> Iterator[None]:
        """Commit at the end, or leave everything as it was."""
        self._db.execute(begin)
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def fold(self) -> None:
        """Fold the log back into the database, so that a lost log loses nothing; one in the way only puts it off."""
        with self.guard():
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _check(self) -> None:
        """Refuse a database that is damaged, not ours, or of a layout this release does not know."""
        db = self._db
        application = db.execute("PRAGMA application_id").fetchone()[0]
        layout = db.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION:
            raise StateError("a database, and no rollback memory of vmgraft", file=self.path)
        if layout != LAYOUT:
            hint = "it was written by another release of vmgraft"
            raise StateError(f"layout {layout} is not known here, {LAYOUT} is", file=self.path, hint=hint)
        problem = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problem != "ok":
            raise StateError(f"the database is damaged: {str(problem)[:200]}", file=self.path, hint=statefile.RESTORE)
        tables = dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL LIMIT 16").fetchall())
        if tables != _TABLES:
            raise StateError("the database has other tables than it should", file=self.path, hint=statefile.RESTORE)
        if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            raise StateError("the database is not in WAL mode", file=self.path, hint="is it on a network file system?")
        for table in _TABLES:  # all of them: a damaged name is not found by looking for the right one
            self.rows(table)

    def _probe(self) -> None:
        """Find out before a guest is started whether a commit is possible at all."""
        with self.transaction("BEGIN IMMEDIATE"):
            self._db.execute(f"PRAGMA user_version={LAYOUT}")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except (sqlite3.Error, UnicodeError, OverflowError) as exc:
            raise _translate(exc, self.path) from exc


def create_database(path: Path) -> bool:
    """Make an empty database, with its folders.

    Returns:
        False where there was one already; it is left as it is.

    Raises:
        StateError: it cannot be made.
    """
    try:
        return statefile.create(path, _fill)
    except sqlite3.Error as exc:
        raise _translate(exc, path) from exc


def _fill(path: Path) -> None:
    with closing(_connect(path, "rw")) as db:
        if db.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise StateError(
                "SQLite cannot keep a write-ahead log there", file=path, hint="is it a network file system?"
            )
        db.execute("BEGIN IMMEDIATE")
        for sql in _TABLES.values():
            db.execute(sql)
        db.execute(f"PRAGMA application_id={APPLICATION}")
        db.execute(f"PRAGMA user_version={LAYOUT}")
        db.execute("COMMIT")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    try:
        for pragma in (
            "synchronous=FULL",
            "trusted_schema=OFF",
            "cell_size_check=ON",
            "temp_store=MEMORY",
            "mmap_size=0",
        ):
            db.execute(f"PRAGMA {pragma}")
    except BaseException:
        db.close()
        raise
    return db


def _keyid(pem: str) -> str | None:
    """Return the keyid of a pinned key, or None where it is no key."""
    try:
        return public_from_pem(pem.encode()).keyid
    except FileError:
        return None


def _digest(table: str, values: Sequence[Any]) -> str:
    """Return the digest of a row: SHA-256 of its table and values in canonical JSON."""
    return hashlib.sha256(json.dumps([table, *values], default=repr).encode("ascii")).hexdigest()


def _translate(exc: Exception, path: Path) -> StateError:
    """Say what SQLite refused, and what to do about it (result codes: sqlite.org/rescode.html)."""
    primary = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StateError("another process holds it for too long", file=path, hint="is a vmgraft process stuck?")
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        hint = "`run` writes to the file; SQLite makes files beside it even to read it. Or another place: --state FILE"
        return StateError(f"it cannot be opened or written: {exc}", file=path, hint=hint)
    if primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return StateError(f"it cannot be written: {exc}", file=path, hint="is the disk full?")
    return StateError(f"the database is damaged: {exc}", file=path, hint=statefile.RESTORE)
