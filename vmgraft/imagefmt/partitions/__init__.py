"""Partition tables of a disk, for people and reports: MBR, GPT and Apple's map, as far as they can be read.

Nothing here decides anything, and nothing raises because a table is damaged: what is wrong stands in ``problems``.
"""

from vmgraft.imagefmt.partitions.describe import describe, describe_disk

__all__ = ["describe", "describe_disk"]
