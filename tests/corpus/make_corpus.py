#!/usr/bin/env python3
"""Write the malformed corpus: one folder a case, and index.json with what is broken and what a reader must say.

Usage: make_corpus.py DIR [PREFIX]  write the cases whose names begin with PREFIX, else all, below a new or empty DIR
       make_corpus.py --index       renew the index.json beside this script, which is what a change is reviewed by
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from corpus_all import all_cases  # noqa: E402 - the line above makes it importable
from corpus_model import Case, index_of, write_case  # noqa: E402


def index_text(cases: list[Case]) -> str:
    """The table of cases as JSON."""
    return json.dumps(index_of(cases), indent=1) + "\n"


def main(argument: str, prefix: str = "") -> None:
    """Do as told."""
    if argument == "--index":
        (HERE / "index.json").write_text(index_text(all_cases()))
        return
    folder = Path(argument)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    cases = [case for case in all_cases() if case.name.startswith(prefix)]
    for case in cases:
        write_case(case, folder)
    (folder / "index.json").write_text(index_text(cases))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
