"""Options of ``run`` that do not go together: refused before anything is read or made."""

from __future__ import annotations

from typing import Final

import click
from click.core import ParameterSource

from vmgraft.errors import UsageError

#: Options of the core engine: parameter and its spelling.
_CORE_ONLY: Final = {
    "pin": "--pin", "firmware": "--firmware", "bios": "--bios", "debug": "--debug", "keys": "--keys",
    "control": "--control", "record": "--record", "replay": "--replay", "restore": "--restore",
}  # fmt: skip
#: What goes on from outside while a guest runs, which no recording repeats.
_LIVE: Final = {"control": "--control", "console": "--console"}


def check_together(context: click.Context) -> None:
    """Refuse options that mean nothing beside others that were given.

    Args:
        context: The command line of ``run``, as it was parsed.

    Raises:
        UsageError: such a pair.
    """
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    values = context.params
    if values["engine"] == "qemu":
        for name, option in _CORE_ONLY.items():
            if name in given:
                _refuse(option, "--engine qemu")
    if "screen_format" in given and "screen" not in given:
        raise UsageError("--screen-format goes with --screen", hint="name a file: --screen FILE")
    streamed = [f"--{name} -" for name in ("screen", "serial", "debug") if str(values[name]) == "-"]
    if len(streamed) > 1:
        raise UsageError(f"{' and '.join(streamed)}: stdout takes one of them", hint="name a file for the other")
    for tape in ("record", "replay"):
        if tape not in given:
            continue
        for name, option in _LIVE.items():
            if values[name]:
                _refuse(f"--{tape}", option)
        if values["cpu"] == "kvm":
            _refuse(f"--{tape}", "--cpu kvm", hint="record and replay on the soft CPU: --cpu soft")


def _refuse(one: str, other: str, hint: str | None = None) -> None:
    raise UsageError(f"{one} does not go with {other}", field=one, hint=hint or f"leave {one} or {other} out")
