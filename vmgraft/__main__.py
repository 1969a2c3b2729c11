"""``python -m vmgraft``."""

from vmgraft.cli import main

main()
