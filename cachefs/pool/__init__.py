"""Pools: a directory with one hard quota, in which images are kept that disks have read."""
