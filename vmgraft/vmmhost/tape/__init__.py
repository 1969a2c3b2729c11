"""Recordings of what extensions were asked and answered, and runs in which such a recording answers for them.

What is kept are the packets between host and workers, so a replay goes through the very code that a run with workers
goes through, and every packet is checked again. See docs/operator.md.
"""
