"""A graph as a file for other runtimes, each run and compared with the graph before it counts as exported."""

from .onnx import to_onnx_bytes

__all__ = ["to_onnx_bytes"]
