"""The core's own devices, each a handler of :mod:`vmgraft.vmmhost.core.contract` that sees offsets only."""
