"""Whose a signature is that does not say so: every known key is tried, within bounds.

Most schemes hash the whole message once for each key. What is hashed for one envelope is bounded, and every signature
has the same share of it, so that many that are nobody's take nothing from the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmgraft.signing.keys import PublicKey

#: Most bytes hashed for one envelope in search of keys; half a second's work with the slowest scheme.
MAX_HASHED: Final = 256 << 20
#: What a try costs beside the hashing of its message, in bytes hashed.
OVERHEAD: Final = 64 << 10


@dataclass(slots=True)
class Trials:
    """The search for the keys behind the signatures of one message.

    Attributes:
        message: What was signed.
        signatures: How many signatures there are to share the work.
        tries: Signature checks made.
        cut: The last search ended before every key was tried.
    """

    message: bytes
    signatures: int
    tries: int = 0
    cut: bool = False

    def signer(self, sig: bytes, keys: Iterable[PublicKey], keyid: str = "") -> PublicKey | None:
        """Return the first of the keys that a signature verifies with, or None.

        Args:
            sig: The signature.
            keys: Keys that may have made it; those that cannot, by its length, cost nothing.
            keyid: The key to be tried first.
        """
        left = MAX_HASHED // max(1, self.signatures)
        cost, self.cut = len(self.message) + OVERHEAD, False
        for key in sorted(keys, key=lambda item: item.keyid != keyid):
            if not key.may_have_made(sig):
                continue
            if cost > left:
                self.cut = True
                return None
            left -= cost
            self.tries += 1
            if key.verify(self.message, sig):
                return key
        return None
