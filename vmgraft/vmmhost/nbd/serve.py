"""``serve``: verify an image against a policy, then export its content over NBD, from the one open image."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vmgraft import __version__
from vmgraft.errors import UnsupportedError, UsageError, VmgraftError
from vmgraft.imagefmt.contract import PROBE, Image, Opening, Progress
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.imagefmt.tree import ContentTree
from vmgraft.signing.contract import Report
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.policy import Policy
from vmgraft.vmmhost.audit import AuditLog
from vmgraft.vmmhost.core.disk import OVERLAY_MAX
from vmgraft.vmmhost.layer.confine import confine_host, host_record
from vmgraft.vmmhost.nbd.content import CheckedContent
from vmgraft.vmmhost.nbd.negotiation import NbdExport
from vmgraft.vmmhost.nbd.server import NbdServer
from vmgraft.vmmhost.remember import RunMemory
from vmgraft.vmmhost.verification import verify_for_use

#: Time for clients to read their last answers once content turned out to be wrong.
_LAST_WORDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve; see ``vmgraft serve --help``.

    Attributes:
        socket: Unix socket to make; None to listen on TCP.
        host, port: TCP address, 0 for any free port.
        overlay: Let clients write into an overlay that is gone at the end; all of them see the same.
        overlay_bytes: What it may hold.
        once: End when the last client has gone.
        opening: How to open the image.
        audit_log: File for the audit log.
        state: The rollback memory to compare with; it is only read. None compares with nothing.
        policy_keys: Keys of which one must have signed the policy.
        signed_policy: Refuse an unsigned policy.
        verify_all: Read all of the content first, also where the record holds the signed content tree.
    """

    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    overlay: bool = False
    overlay_bytes: int = OVERLAY_MAX
    once: bool = False
    opening: Opening = PROBE
    audit_log: Path | None = None
    state: Path | None = None
    policy_keys: tuple[PublicKey, ...] = ()
    signed_policy: bool = False
    verify_all: bool = False

    @property
    def exposed(self) -> bool:
        """Whether other computers may be able to connect: neither a Unix socket nor a loopback address."""
        if self.socket is not None or self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True


@dataclass(slots=True)
class ServeReport:
    """What happened. ``uri`` stays None when verification refused the image."""

    verification: Report
    uri: str | None = None
    failure: VmgraftError | None = None
    counters: dict[str, Any] = field(default_factory=dict)
    blocks_checked: int = 0
    audit_head: str | None = None

    @property
    def error(self) -> str | None:
        """The error code this amounts to, or None."""
        if not self.verification.ok:
            return self.verification.error
        return None if self.failure is None else self.failure.code


def parse_listen(text: str) -> tuple[str, int]:
    """Parse ``PORT``, ``ADDRESS:PORT`` or ``[IPv6]:PORT``; a port alone is on the loopback address.

    Raises:
        UsageError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if (colon and not host) or not (port.isascii() and port.isdigit() and len(port) <= 5) or int(port) > 0xFFFF:
        raise UsageError(f"{text!r} is no ADDRESS:PORT", field="listen", hint="for example 127.0.0.1:10809")
    return host or "127.0.0.1", int(port)


class Serving:
    """Serves one image until it is told to stop.

    Args:
        image: Path of the image.
        policy: Path of the trust policy.
        options: Where and how.
        ready: Gets the URI once clients can connect.
        progress: Called while the content is verified.
        confine: Give up the rights of this process that serving does not need, before the first client. Cannot be
            undone, so only programs that end with it ask for it.
    """

    def __init__(
        self,
        image: Path,
        policy: Path,
        options: ServeOptions,
        *,
        ready: Callable[[str], None] | None = None,
        progress: Progress | None = None,
        confine: bool = False,
    ) -> None:
        self._path, self._policy_path, self._options = image, policy, options
        self._ready, self._progress, self._confine = ready, progress, confine

    def run(self) -> ServeReport:
        """Verify and serve; return when a signal (as KeyboardInterrupt), ``once`` or wrong content ends it.

        Raises:
            PolicyError: the policy cannot be used.
            StateError: the rollback memory cannot be used.
            NoGraftError: the image carries no graft.
            FileError: the image, the socket or the audit log cannot be used.
            HostError: the address cannot be used.
        """
        options = self._options
        with RunMemory(options.state, raising=False) as memory:
            policy = memory.load_policy(self._policy_path, options.policy_keys, required=options.signed_policy)
            with closing(AuditLog(options.audit_log)) as log:
                return self._logged(log, policy, memory)

    def _logged(self, log: AuditLog, policy: Policy, memory: RunMemory) -> ServeReport:
        """Verify and serve, and let the log say how it began and ended, however that was."""
        names = {"image": str(self._path), "policyFile": str(self._policy_path)}
        log.write("start", {**names, "vmgraft": __version__, "command": "serve"})
        try:
            with open_image(self._path, self._options.opening) as image:
                report = self._serve(log, image, *self._verify(image, policy, memory))
        except BaseException as error:
            if not log.broken:
                log.write("error", _failure(error))
            raise
        log.write("end" if report.error is None else "error", _ending(report))
        report.audit_head = log.head
        return report

    def _verify(self, image: Image, policy: Policy, memory: RunMemory) -> tuple[ContentTree | None, Report]:
        graft = open_graft(image, progress=self._progress)
        now = datetime.now(UTC)
        verdict = verify_for_use(
            graft, policy, image_name=self._path.name, now=now, memory=memory.state, verify_all=self._options.verify_all
        )
        return graft.tree, verdict

    def _serve(self, log: AuditLog, image: Image, tree: ContentTree | None, verdict: Report) -> ServeReport:
        log.write("verification", {"ok": verdict.ok, "error": verdict.error, "warnings": list(verdict.warnings)})
        report = ServeReport(verdict)
        if not verdict.ok or tree is None:
            return report
        if not image.is_disk:
            raise UnsupportedError(f"{image.format_name} is no disk format: there is nothing to serve", file=self._path)
        options = self._options
        disk = CheckedContent(image, tree, overlay_max=options.overlay_bytes)
        export = NbdExport("", disk, read_only=not options.overlay, description=self._path.name)
        with ExitStack() as stack:
            server = stack.enter_context(NbdServer([export], audit=log.write))
            if options.socket is not None:
                report.uri = server.listen_unix(options.socket)
            else:
                report.uri = server.listen_tcp(options.host, options.port)
            served = {"uri": report.uri, "readOnly": export.read_only, "contentTree": tree.tree_digest.hex()}
            if self._confine:
                # Only what is needed to take the socket away again is left.
                folders = [] if options.socket is None else [str(options.socket.parent)]
                served |= host_record(confine_host(remove=folders))
            log.write("serve", served)
            try:
                server.start()
                if self._ready is not None:
                    self._ready(report.uri)
                server.wait(once=options.once)
                if server.failure is not None:
                    server.drain(_LAST_WORDS)
            except KeyboardInterrupt:  # how a server is ended
                pass
        report.failure, report.counters, report.blocks_checked = server.failure, server.summary(), disk.blocks_checked
        if report.failure is not None and report.failure.file is None:
            report.failure.file = str(self._path)
        return report


def _failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, VmgraftError):
        return error.to_dict()
    code = "interrupted" if isinstance(error, KeyboardInterrupt) else "internal"
    return {"code": code, "message": f"{type(error).__name__}: {error}"}


def _ending(report: ServeReport) -> dict[str, Any]:
    if report.uri is None:
        return {"code": report.error, "message": "the verification refused the image; nothing was served"}
    ending: dict[str, Any] = {**report.counters, "blocksChecked": report.blocks_checked}
    return ending if report.failure is None else {**report.failure.to_dict(), **ending}
