"""An audit log's records as people read them: one line each, the time, the event, and what matters of it."""

from __future__ import annotations

import json
from typing import Any, Final

from vmgraft.cli.output import printable

#: Members that every record has.
_COMMON: Final = ("seq", "time", "event", "prev", "hash")
#: Longest piece of a member shown, in characters.
_SHOWN: Final = 160


def record_line(record: dict[str, Any]) -> str:
    """Return one line for a terminal; the log's own words cannot drive it."""
    detail = {name: value for name, value in record.items() if name not in _COMMON}
    event = str(record.get("event"))
    words = _summary(event, detail)
    return printable(f"{record.get('seq'):>5} {record.get('time')} {event:18} {words}").rstrip()


def _summary(event: str, detail: dict[str, Any]) -> str:
    if event == "verification":
        return _verdict(detail)
    if event == "plan" and isinstance(detail.get("plan"), dict):
        plan = detail["plan"]
        return f"sha256:{detail.get('sha256')} {_ids(plan.get('extensions'))} policy={plan.get('policy')}"
    return " ".join(f"{name}={_value(value)}" for name, value in detail.items() if value not in (None, [], {}, ""))


def _verdict(detail: dict[str, Any]) -> str:
    checks = [item for item in detail.get("checks") or [] if isinstance(item, dict)]
    bad = [f"{item.get('name')}: {item.get('detail')}" for item in checks if item.get("status") in ("fail", "warn")]
    words = "accepted" if detail.get("ok") is True else f"refused ({detail.get('error')})"
    return "; ".join([f"{words}, {len(checks)} checks", *bad])


def _ids(items: Any) -> str:
    names = [str(item.get("id")) for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return "extensions=" + (",".join(names) or "none")


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = json.dumps(text, ensure_ascii=False) if isinstance(value, str) and " " in text else text
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
