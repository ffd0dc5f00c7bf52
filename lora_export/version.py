"""The version of this package. Nothing is imported for it."""

__version__ = "0.1.0"
