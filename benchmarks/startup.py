"""How fast the command line starts: `vmgraft --help` against the import of its command library alone."""

from _measure import PROGRAM, PYTHON, Bench, Runner


def main() -> None:
    bench = Bench("startup", "start-up of the command line")
    run = Runner()
    bench.compare(
        "start-up",
        {
            "python -c 'import click'": run.peer(PYTHON, "-c", "import click"),
            "vmgraft --help": run.peer(PROGRAM, "--help"),
        },
        rounds=21,
    )
    bench.end()


if __name__ == "__main__":
    main()
