"""Verified content over NBD: a server of blocks that are checked before they leave (docs/nbd.md)."""
