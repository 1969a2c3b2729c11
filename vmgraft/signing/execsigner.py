"""Keys behind a program: ``exec:/path/to/program?public-key=/path/to/key.pub``.

The program gets the bytes to sign on stdin and gives the signature on stdout, nothing else: DER for ECDSA, the raw
bytes for the other kinds. It ends with 0. There is no shell, it has no arguments, and ``VMGRAFT_PASSPHRASE`` is not in
its environment. What it says on stderr is shown when it fails. It may ask on the terminal, within its time.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from vmgraft.errors import FileError, UsageError
from vmgraft.signing.barekey import BareKey
from vmgraft.signing.dsse import MAX_SIGNATURE_BYTES
from vmgraft.signing.keyfiles import PASSPHRASE_VARIABLE, load_public
from vmgraft.signing.keyuri import absolute_path, decode_text, split_uri

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

#: Seconds a program has, unless ``timeout`` says otherwise: enough to touch a key or to type a PIN.
DEFAULT_TIMEOUT: Final = 120
#: Most seconds that ``timeout`` may give.
MAX_TIMEOUT: Final = 3600
#: Bytes of stderr that are kept for the message.
MAX_STDERR: Final = 2048

_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class ProgramSigner(BareKey):
    """A program that signs.

    Attributes:
        public: The public half of its key.
        program: Absolute path.
        timeout: Seconds it has for one signature.
    """

    public: PublicKey
    program: Path
    timeout: int = DEFAULT_TIMEOUT

    def sign(self, message: bytes) -> bytes:
        """Run the program once.

        Raises:
            FileError: it cannot be started, fails, gives too much or nothing, or takes too long.
            BadSignatureError: what it gave does not verify.
        """
        code, signature, said = _run(self.program, message, self.timeout)
        hint = "it said: " + said if said else "it said nothing on stderr"
        if code != 0:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            raise FileError(f"the signing program {how}", file=self.program, field="key", hint=hint)
        if not signature:
            raise FileError("the signing program gave no signature", file=self.program, field="key", hint=hint)
        return self.public.check_made(message, signature, by=os.fspath(self.program))


def open_program(reference: str) -> ProgramSigner:
    """Return the signer that an ``exec:`` URI names; the program is not run yet.

    Args:
        reference: ``exec:PROGRAM?public-key=PATH``, and ``timeout=SECONDS``; both paths absolute.

    Raises:
        UsageError: the URI makes no sense.
        FileError: there is no such program, or the public key cannot be read.
    """
    path, query = split_uri(reference, ("public-key", "timeout"))
    if path.startswith("//"):
        raise UsageError("an exec: URI names no host", field="key", hint="exec:/path/to/program?public-key=/path")
    program = absolute_path(decode_text(path, "the program"), "the program of an exec: URI")
    if "public-key" not in query:
        hint = f"exec:{path}?public-key=/path/to/key.pub"
        raise UsageError("an exec: URI must name the public key", field="key", hint=hint)
    timeout = query.get("timeout", str(DEFAULT_TIMEOUT))
    if not (timeout.isascii() and timeout.isdecimal() and len(timeout) < 6 and 1 <= int(timeout) <= MAX_TIMEOUT):
        raise UsageError(f"timeout is a number of seconds from 1 to {MAX_TIMEOUT}", field="key")
    if not program.is_file() or not os.access(program, os.X_OK):
        raise FileError("this is no program that can be run", file=program, field="key", hint="is it executable?")
    public = load_public(absolute_path(query["public-key"], "public-key"))
    return ProgramSigner(public, program, int(timeout))


def _run(program: Path, message: bytes, timeout: int) -> tuple[int, bytes, str]:
    """Return exit code, stdout, and the end of stderr in printable form."""
    environment = {name: value for name, value in os.environ.items() if name != PASSPHRASE_VARIABLE}
    pipe, group = subprocess.PIPE, None if _has_terminal() else 0  # out of our group it could not read the terminal
    try:
        process = subprocess.Popen(
            [program], stdin=pipe, stdout=pipe, stderr=pipe, env=environment, bufsize=0, process_group=group
        )
    except OSError as exc:
        raise FileError(f"the signing program cannot be run: {exc.strerror}", file=program, field="key") from exc
    with process:
        try:
            deadline = time.monotonic() + timeout
            output, errors = _Talk(process, message, program, deadline, timeout).all()
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as exc:
            _kill(process, group)
            raise _late(program, timeout) from exc
        except BaseException:
            _kill(process, group)
            raise
    return code, output, "".join(c if c.isprintable() else " " for c in errors.decode("utf-8", "replace")).strip()


def _has_terminal() -> bool:
    """Tell whether there is a terminal that a program could ask on (POSIX: ``/dev/tty`` is the controlling one)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _kill(process: subprocess.Popen[bytes], group: int | None) -> None:
    """Kill a program, and what it started where it has a group of its own; not reaped yet, so the number is its own."""
    if group is not None and process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # no harm where it has ended


def _late(program: Path, timeout: int) -> FileError:
    hint = "timeout=SECONDS in the exec: URI gives it longer"
    return FileError(f"the signing program took longer than {timeout} s", file=program, field="key", hint=hint)


class _Talk:
    """Writes the message and reads both outputs at the same time, within bounds, until both are closed."""

    def __init__(
        self, process: subprocess.Popen[bytes], message: bytes, program: Path, deadline: float, timeout: int
    ) -> None:
        self.process, self.program, self.deadline, self.timeout = process, program, deadline, timeout
        self.left = memoryview(message)
        self.output, self.errors = b"", b""

    def all(self) -> tuple[bytes, bytes]:
        process = self.process
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise FileError("the signing program has no pipes", file=self.program, field="key")
        os.set_blocking(process.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE, self.write)
            selector.register(process.stdout, selectors.EVENT_READ, self.read_output)
            selector.register(process.stderr, selectors.EVENT_READ, self.read_errors)
            while selector.get_map():
                ready = selector.select(max(0.0, self.deadline - time.monotonic()))
                if not ready or time.monotonic() > self.deadline:
                    raise _late(self.program, self.timeout)
                for key, _ in ready:
                    stream: IO[bytes] = key.fileobj  # type: ignore[assignment]  # as registered above
                    if not key.data(stream):
                        selector.unregister(stream)
                        stream.close()
        return self.output, self.errors

    def write(self, stream: IO[bytes]) -> bool:
        """Write some; a program that does not read all of it fails in its own way, or signs something else."""
        try:
            self.left = self.left[os.write(stream.fileno(), self.left[:_CHUNK]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        return len(self.left) > 0

    def read_output(self, stream: IO[bytes]) -> bool:
        chunk = os.read(stream.fileno(), _CHUNK)
        self.output += chunk
        if len(self.output) > MAX_SIGNATURE_BYTES:
            message = f"the signing program gave more than {MAX_SIGNATURE_BYTES} bytes, which no signature has"
            raise FileError(message, file=self.program, field="key", hint="only the signature belongs on its stdout")
        return bool(chunk)

    def read_errors(self, stream: IO[bytes]) -> bool:
        chunk = os.read(stream.fileno(), _CHUNK)
        self.errors = (self.errors + chunk)[-MAX_STDERR:]
        return bool(chunk)
