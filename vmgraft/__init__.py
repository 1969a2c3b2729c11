"""vmgraft: signed, pluggable extensions for virtual machine monitors, carried in the image's own metadata."""

__version__ = "0.1.0"
