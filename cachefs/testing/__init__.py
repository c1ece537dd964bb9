"""Shipped with cachefs: what tests of layers, backends and whole mounts are made of."""
