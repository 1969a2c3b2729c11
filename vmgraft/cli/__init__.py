"""The command line: parse, call one function, print. All logic lives in the rooms below."""


def main() -> None:
    """Run the ``vmgraft`` program."""
    from vmgraft.cli.app import run

    run()
