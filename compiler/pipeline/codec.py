"""The codec under the name by which the pipeline knows it; it lies lower because the artifact's manifest needs it too."""

from compiler.codec import dump, key, load

__all__ = ["dump", "key", "load"]
