"""cachefs: virtual disks for compute nodes, one file per disk. docs/design.md has the picture."""

__version__ = "0.1.0"
