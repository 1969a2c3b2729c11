"""All cases, by container."""

from __future__ import annotations

import corpus_iso
import corpus_qcow2
import corpus_raw
import corpus_record
import corpus_vdi
import corpus_vhd
import corpus_vhdx
import corpus_vmdk
import corpus_zip
from corpus_model import Case

MODULES = (
    corpus_qcow2,
    corpus_iso,
    corpus_raw,
    corpus_record,
    corpus_vdi,
    corpus_vhd,
    corpus_vhdx,
    corpus_vmdk,
    corpus_zip,
)


def all_cases() -> list[Case]:
    """Return the cases of every container; no two have one name."""
    found = [case for module in MODULES for case in module.cases()]
    names = [case.name for case in found]
    if len(names) != len(set(names)):
        raise ValueError(f"names twice: {sorted(name for name in names if names.count(name) > 1)}")
    return found
