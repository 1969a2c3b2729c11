"""The control socket of a running guest: what may be asked, and how each change is verified (docs/operator.md)."""
