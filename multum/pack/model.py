"""A graph in a `.mip` file: operators as JSON, tensors coded, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FileError
from ..graph import Graph
from ..graph.file import from_data, to_data
from ..step import Result
from ..task import Task
from . import mip

FORMAT = "multum graph"


def save(model: Result | Graph, path: str | Path, task: Task | None = None) -> int:
    """Writes a result (or a bare graph) as one self-contained file, and returns its size in bytes.

    The file holds the operators, every tensor without loss, the recipe, a record of each step, and the fingerprint of the
    original. It appears under its name only when it is whole. Raises FileError when it cannot be written.
    """
    graph = model.graph if isinstance(model, Result) else model
    data, tensors = to_data(graph)
    meta: dict[str, Any] = {"format": FORMAT, "graph": data, "bfloat16": [n for n, t in tensors.items() if t.dtype is torch.bfloat16]}
    if isinstance(model, Result):
        meta |= {"recipe": model.recipe.to_data(), "records": [_brief(record.to_data()) for record in model.records]}
    if task is not None:
        meta["original"] = {"name": task.name, "fingerprint": task.original.fingerprint()}
    return mip.write(path, meta, {name: _array(tensor) for name, tensor in tensors.items()})


def load(path: str | Path) -> Graph:
    """The graph in a `.mip` file, ready to be called; needs neither the source nor the data of the model.

    Raises FileError for a file that is missing, damaged, hostile, or not a graph.
    """
    meta, arrays = mip.read(path)
    if meta.get("format") != FORMAT or not isinstance(meta.get("graph"), dict):
        raise FileError(f"{str(path)!r} holds {meta.get('format')!r}, not a graph.", "a file written by multum.save")
    halves = meta.get("bfloat16", [])
    graph = from_data(meta["graph"], {name: _tensor(arrays[name], name in halves) for name in arrays})
    try:
        graph.refresh()
    except Exception as error:
        raise FileError(f"The graph in {str(path)!r} cannot be computed: {error}"[:400], "a file written by multum.save") from error
    return graph


def describe(path: str | Path) -> dict[str, Any]:
    """Where a file came from: its recipe, records and original, without its weights."""
    meta = mip.read_meta(path)
    return {key: meta[key] for key in ("recipe", "records", "original") if key in meta}


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the details of each layer, which the report has and a small file cannot afford."""
    return {key: value for key, value in record.items() if key not in ("changes", "skipped")} | {
        "changed": len(record["changes"]),
        "skipped": len(record["skipped"]),
    }


def _array(tensor: Tensor) -> NDArray[Any]:
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _tensor(array: NDArray[Any], half: bool) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if half else tensor
