"""A graph in a `.mip` file: operators as JSON, tensors coded, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FileError
from ..graph import Graph
from ..graph.file import from_data, to_data
from ..step import Result
from ..task import Task
from . import mip, onnx, outline

FORMAT = "multum graph"
_FINGERPRINT = 16  # digits of the original's fingerprint


def save(model: Result | Graph, path: str | Path, task: Task | None = None) -> int:
    """Writes a result (or a bare graph) as one self-contained file, and returns its size in bytes.

    The file holds the operators, every tensor without loss, the recipe, a record of each step, and the fingerprint of the
    original. It appears under its name only when it is whole. Raises FileError when it cannot be written.
    """
    graph = model.graph if isinstance(model, Result) else model
    data, tensors = to_data(graph)
    short, names = outline.shrink(data, [name for name, tensor in tensors.items() if tensor.dtype is torch.bfloat16], tensors)
    meta: dict[str, Any] = {"format": FORMAT, "graph": short}
    if isinstance(model, Result):
        meta |= {"recipe": model.recipe.to_data(), "records": [_brief(record.to_data()) for record in model.records]}
    if task is not None:
        meta["original"] = {"name": task.name, "fingerprint": task.original.fingerprint()[:_FINGERPRINT]}
    return mip.write(path, meta, {name: _array(tensors[name]) for name in names})


def load(path: str | Path) -> Graph:
    """The graph in a `.mip` file, ready to be called; needs neither the source nor the data of the model.

    Raises FileError for a file that is missing, damaged, hostile, or not a graph.
    """
    meta, arrays = mip.read(path)
    if meta.get("format") != FORMAT or not isinstance(meta.get("graph"), dict):
        do = f"multum unpack {path}" if meta.get("format") == onnx.FORMAT else ""
        raise FileError(f"{str(path)!r} holds {meta.get('format')!r}, not a graph.", "a file written by multum.save", do)
    try:
        data, halves = outline.expand(meta["graph"], list(arrays))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise FileError(f"The graph in {str(path)!r} is damaged ({reason}).", "a file written by multum.save") from error
    graph = from_data(data, {name: _tensor(arrays[name], name in halves) for name in arrays})
    try:
        graph.refresh()
    except Exception as error:
        raise FileError(f"The graph in {str(path)!r} cannot be computed: {error}"[:400], "a file written by multum.save") from error
    return graph


def describe(path: str | Path) -> dict[str, Any]:
    """Where a file came from: its recipe, records and original, without its weights."""
    meta = mip.read_meta(path)
    found: dict[str, Any] = {key: meta[key] for key in ("recipe", "records", "original") if key in meta}
    try:
        steps = [{"step": row, "options": {}} if isinstance(row, str) else _step(**row) for row in found.get("recipe", ())]
        if "records" in found:
            found["records"] = [step | record for step, record in zip(steps, found["records"], strict=True)]
    except (TypeError, ValueError) as error:
        raise FileError(f"The records in {str(path)!r} are damaged ({error}).", "a file written by multum.save") from error
    return found


def _step(**row: Any) -> dict[str, Any]:
    ((name, options),) = row.items()
    return {"step": name, "options": options}


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what the recipe says, and without the details of each layer, which the report has and a small file cannot afford."""
    counts = {"parameters": record["parameters"], "changed": len(record["changes"]), "skipped": len(record["skipped"])}
    return (
        counts
        | {"seconds": _short(record["seconds"])}
        | {k: _short(v) for k, v in record["measured"].items() if isinstance(v, int | float)}
    )


def _short(number: float) -> float:
    """Three digits of it."""
    return float(f"{number:.3g}") if isinstance(number, float) else number


def _array(tensor: Tensor) -> NDArray[Any]:
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _tensor(array: NDArray[Any], half: bool) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if half else tensor
