"""Where a server listens: what is said on the command line, and what is exposed by it."""

import pytest

from vmgraft.errors import UsageError
from vmgraft.vmmhost.nbd.serve import ServeOptions, parse_listen


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0", ("127.0.0.1", 0)),
        ("10809", ("127.0.0.1", 10809)),
        ("192.0.2.1:65535", ("192.0.2.1", 65535)),
        ("[::1]:5", ("::1", 5)),
        ("host.example:5", ("host.example", 5)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["", "x", "1:", ":5", "1.2.3.4:65536", "1.2.3.4:100000", "[::1]", "h:-1", "h:\u0661"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_listen(text)
    assert caught.value.field == "listen"


@pytest.mark.parametrize(
    ("host", "exposed"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("localhost", False), ("::", True), ("a.b", True)],
)
def test_what_other_computers_can_reach(host: str, exposed: bool) -> None:
    assert ServeOptions(host=host).exposed is exposed
