"""The commands, imported one by one when they run."""
