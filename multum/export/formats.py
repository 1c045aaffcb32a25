"""`export`: one verified file, in one of the formats that other runtimes read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import ExportError, FileError
from ..graph import Graph
from .onnx import to_onnx_bytes
from .verify import verify

FORMATS: dict[str, Callable[[Graph], bytes]] = {"onnx": to_onnx_bytes}


def export(graph: Graph, path: str | Path, to: str = "onnx", inputs: Iterable[Any] | None = None) -> Path:
    """Writes the graph in a format of `FORMATS`, after the result was run and agreed with the graph (see `verify`).

    `inputs` are batches of held inputs to compare on; without them random ones are drawn. The file appears under its name
    only when it is whole. Raises ExportError when it computes something else, FileError when it cannot be written.
    """
    if not isinstance(graph, Graph):
        raise ExportError(f"A {type(graph).__name__} is to be exported.", "a Graph", "multum.load(path) gives one from a .mip file")
    if to not in FORMATS:
        raise ExportError(f"There is no export to {to!r}.", f"one of {', '.join(FORMATS)}")
    content = FORMATS[to](graph)
    verify(graph, content, inputs)
    return written(content, path)


def written(content: bytes, path: str | Path) -> Path:
    """The content in a file, which appears under its name only when it is whole. Raises FileError."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be written: {error.strerror}", "a path in a folder that exists, with room") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
