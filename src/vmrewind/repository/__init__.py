"""The external storage: store contract, backends, layout, and the formats of its objects (docs/repository-format.md)."""
