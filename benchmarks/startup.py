"""How fast the command line starts: `vmgraft --help` against the import of its command library alone."""

import subprocess
import sys
from pathlib import Path

from _measure import compare

PROGRAM = str(Path(sys.executable).with_name("vmgraft"))


def main() -> None:
    compare(
        "start-up",
        {
            "vmgraft --help": lambda: subprocess.run([PROGRAM, "--help"], check=True, capture_output=True),
            "python -c 'import click'": lambda: subprocess.run([sys.executable, "-c", "import click"], check=True),
        },
        rounds=21,
    )


if __name__ == "__main__":
    main()
