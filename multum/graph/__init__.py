"""The graph: capture, edit, analyse channels, fuse, and turn into data."""

from .capture import capture
from .layers import Layer, layers, select
from .model import Graph

__all__ = ["Graph", "Layer", "capture", "layers", "select"]
