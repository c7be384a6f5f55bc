"""The version, at the bottom of the package, where every module can read it."""

__version__ = "0.1.0"
