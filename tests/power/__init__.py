"""A disk with a volatile write cache under capture's real code, and power cuts at any operation."""
