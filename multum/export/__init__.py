"""A graph as a file for other runtimes, run and compared with the graph before it counts as exported."""

from .formats import FORMATS, export
from .onnx import to_onnx_bytes
from .verify import Verification, verify

__all__ = ["FORMATS", "Verification", "export", "to_onnx_bytes", "verify"]
