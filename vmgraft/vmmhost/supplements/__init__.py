"""Supplements: what signed extensions add beside an image or over it, while the image itself stays pristine.

``build`` turns the files of verified extensions into volumes, an initrd and overlaid blocks; docs/supplements.md.
"""
