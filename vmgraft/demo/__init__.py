"""``vmgraft demo``: the whole journey on small images made on the spot, with the very program a user calls."""
