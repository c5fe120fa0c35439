"""A disk with a volatile write cache under capture's real code, and power cuts at any operation."""

SECTOR = 512
"""Bytes that a disk writes whole."""
