"""The version, apart from the package itself, so that its modules may name it without importing the package."""

__version__ = "0.1.0"
