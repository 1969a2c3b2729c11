"""The command group: a table of commands that are imported only when they run."""

from __future__ import annotations

import errno
import importlib
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TextIO

import click

from vmgraft import __version__
from vmgraft.cli import exitcodes

#: name → (module under vmgraft.cli.commands, attribute, line for the overview). Static, so that ``--help`` is quick.
COMMANDS: Final[dict[str, tuple[str, str, str]]] = {
    "demo": ("demo", "demo", "Show the whole journey on small images made on the spot."),
    "doctor": ("doctor", "doctor", "Say what this machine can do: engines, sandbox, packages."),
    "new": ("vendor", "new", "Start an extension: manifest, C source, Makefile, README."),
    "keygen": ("keys", "keygen", "Make a signing key."),
    "key": ("keys", "key", "Look at keys and certificates."),
    "dev-ca": ("devca", "dev_ca", "Make a certificate authority for trying things out."),
    "attach": ("vendor", "attach", "Sign extensions and graft them into an image."),
    "detach": ("vendor", "detach", "Take the graft away and give the original file back."),
    "payload": ("ceremony", "payload", "Write the exact bytes to sign, for keys that are elsewhere."),
    "attach-signature": ("ceremony", "attach_signature", "Attach extensions with signatures made elsewhere."),
    "sign": ("ceremony", "sign", "Add a signature to those that are there."),
    "resign": ("ceremony", "resign", "Make a new statement about what is there, and sign it."),
    "import": ("ceremony", "import_", "Add signatures from an envelope or a Sigstore bundle."),
    "timestamp": ("ceremony", "timestamp", "Add RFC 3161 timestamps to signatures."),
    "move": ("mend", "move", "Take a graft over to another image with the same content."),
    "recover": ("mend", "recover", "Bring back a graft that was lost half-way."),
    "convert": ("convert", "convert", "Write the disk and its graft to an image of another format."),
    "compose": ("compose", "compose", "Make one read-only volume of the files of several images."),
    "list": ("audit", "list_", "List the extensions in an image (nothing verified)."),
    "inspect": ("audit", "inspect", "Show everything an image carries (nothing verified)."),
    "extract": ("audit", "extract", "Write a part of the graft to a file."),
    "digest": ("audit", "digest", "Print the digests of the guest content."),
    "diff": ("audit", "diff", "Show where the guest contents of two images differ."),
    "policy": ("policy", "policy", "Make and check trust policies."),
    "verify": ("verify", "verify", "Check an image against a trust policy."),
    "export": ("audit", "export", "Write the signatures in forms that other tools verify."),
    "run": ("run", "run", "Verify an image and boot it."),
    "serve": ("serve", "serve", "Verify an image and export its content over NBD."),
    "state": ("state", "state", "Show and change what this host remembers of earlier runs."),
    "ctl": ("ctl", "ctl", "Ask and change a guest that runs."),
    "audit-log": ("auditlog", "audit_log", "Check and read audit logs."),
    "check-log": ("auditlog", "check_log", "Check the hash chain of an audit log."),
}


class _ReaderGoneError(Exception):
    """A write nobody reads; no ``OSError``, since click would end the program for one with 1."""


@contextmanager
def _past_click() -> Iterator[None]:
    """Let a broken pipe through click, which would make it exit code 1: `internal` in our table."""
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderGoneError from error


def _keep_lines(command: click.Command) -> None:
    """Let click wrap no example, here and in the commands below: what is wrapped cannot be copied."""
    if command.epilog and not command.epilog.startswith("\b"):
        command.epilog = "\n\n".join(f"\b\n{example}" for example in command.epilog.split("\n\n"))
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _keep_lines(below)


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the command line; this is where ``--help`` and ``--version`` print."""
        with _past_click():
            return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a user's journey."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds the command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"vmgraft.cli.commands.{module}"), attribute)
        _keep_lines(command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a known error is reported here, where colour settings are still in force."""
        from vmgraft.errors import VmgraftError

        with _past_click():
            try:
                return super().invoke(ctx)
            except VmgraftError as error:
                from vmgraft.cli.output import report_error

                return report_error(error, bool(ctx.obj))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview from the table, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest name for a mistyped command."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from error


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog='Example: vmgraft demo\n\nShell completion: eval "$(_VMGRAFT_COMPLETE=bash_source vmgraft)"',
)
@click.version_option(__version__, "-V", "--version", prog_name="vmgraft")
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="Default: auto.")
@click.pass_context
def cli(ctx: click.Context, color: str) -> None:
    """Graft signed extensions into VM images, audit them, and boot what a policy trusts."""
    ctx.color = {"always": True, "never": False}.get(color)
    if ctx.color is None and os.environ.get("NO_COLOR"):
        ctx.color = False


def run(argv: list[str] | None = None) -> NoReturn:
    """Run the program and exit with the documented code; never shows a traceback for a known error."""
    args = sys.argv[1:] if argv is None else argv
    as_json = "--json" in args
    _print_anything()
    try:
        code = _outcome(args, as_json)
    except BrokenPipeError:  # while an error was reported
        code = _broken_pipe(as_json)
    sys.exit(code)


def _outcome(args: list[str], as_json: bool) -> int:
    """Run the program, report what went wrong, and return the exit code."""
    try:
        result: Any = cli.main(args, prog_name="vmgraft", standalone_mode=False, obj=as_json)
    except (click.exceptions.Abort, KeyboardInterrupt):
        from vmgraft.cli.output import report_interrupt

        return report_interrupt(as_json)
    except click.ClickException as error:
        return _usage(error, as_json)
    except (_ReaderGoneError, BrokenPipeError):
        return _broken_pipe(as_json)
    except OSError as error:
        return _system(error, as_json)
    except Exception as error:  # noqa: BLE001 - the last line: a bug is reported as one, and never looks like a verdict
        return _internal(error, as_json)
    return result if isinstance(result, int) else exitcodes.OK


def _print_anything() -> None:
    """Let no file name or claim fail to print where the terminal's encoding lacks its characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output(stream: TextIO | None) -> None:
    """Throw away what a stream cannot take, so that the interpreter does not complain about it at its end."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _broken_pipe(as_json: bool) -> int:
    """End as other programs do when the reader went away (`vmgraft inspect | head`): without a message."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _unread(stream)]
    if not gone:  # a pipe of our own, and no command foresaw that its other end would close
        return _system(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), as_json)
    for stream in gone:
        _drop_output(stream)
    return exitcodes.BROKEN_PIPE


def _unread(stream: TextIO | None) -> bool:
    """Tell whether a standard stream is a pipe or socket that nobody reads any more."""
    poll = select.poll()
    try:
        if stream is not None:
            poll.register(stream, 0)  # POLLERR and POLLHUP are reported always (poll(2))
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _system(error: OSError, as_json: bool) -> int:
    """Report what the system refused and no room foresaw, such as a full disk below stdout."""
    from vmgraft.cli.output import report_error
    from vmgraft.errors import FileError

    hint = "is the disk below stdout full?" if error.errno == errno.ENOSPC else None
    problem = FileError(f"the system refused: {error.strerror or error}", file=error.filename, hint=hint)
    try:
        sys.stdout.flush()
        return report_error(problem, as_json)
    except OSError:
        _drop_output(sys.stdout)
        return report_error(problem, as_json=False)


def _usage(error: click.ClickException, as_json: bool) -> int:
    """Report a wrong command line: click's own words for people, our object for programs."""
    from vmgraft.cli.output import printable, report_error
    from vmgraft.errors import UsageError

    if as_json:
        hint = "see `vmgraft --help`"
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"see `{error.ctx.command_path} --help`"
        return report_error(UsageError(error.format_message(), hint=hint), as_json=True)
    shown = io.StringIO()
    error.show(shown)
    click.echo("\n".join(map(printable, shown.getvalue().split("\n"))), err=True, nl=False)
    return exitcodes.USAGE


def _internal(error: Exception, as_json: bool) -> int:
    """Report a bug; VMGRAFT_TRACEBACK=1 shows where it is."""
    from vmgraft.cli.output import report_error
    from vmgraft.errors import VmgraftError

    if os.environ.get("VMGRAFT_TRACEBACK"):
        raise error
    hint = "this is a bug in vmgraft: please report it, with what VMGRAFT_TRACEBACK=1 shows"
    return report_error(VmgraftError(f"{type(error).__name__}: {error}", hint=hint), as_json)
