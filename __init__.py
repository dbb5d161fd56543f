"""dropformer: find the layers a Transformer can do without, take them out, prove what it cost."""

__version__ = "0.1.0"
