"""What every signer without certificates of its own has; apart from ``keys``, which takes longer to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey


class BareKey:
    """What signers without certificates of their own share: those come from a file, if at all."""

    __slots__ = ()

    public: PublicKey

    @property
    def keyid(self) -> str:
        """The keyid of the public half."""
        return self.public.keyid

    @property
    def certificates(self) -> tuple[bytes, ...]:
        """None: a bare key."""
        return ()
