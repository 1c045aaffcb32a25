"""A training that was cut short, in one file: written whole or not at all, read without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError
from ..graph import Graph

FORMAT = 2  # in every key: files of another format are of another training
Parts = dict[str, dict[str, Tensor]]


def save(file: Path, key: str, position: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes named tensors in named parts (no dot in the name of a part), and the position as JSON."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.{name}": tensor.detach().cpu().contiguous() for part, rows in parts.items() for name, tensor in rows.items()}
    partial = file.with_name(file.name + ".part")
    save_file(tensors, partial, {"key": key, "position": json.dumps(position)})
    partial.replace(file)


def load(file: Path, key: str) -> tuple[dict[str, Any], Parts]:
    """Position and parts. Raises TrainError when the file is damaged, or `key` says that it is of another training."""
    from safetensors import SafetensorError, safe_open

    parts: Parts = {}
    try:
        with safe_open(file, "pt") as content:
            notes = content.metadata()
            if notes["key"] != key:
                raise TrainError(f"{str(file)!r} is of another training.", "the same graph, options and seed", "give another workdir")
            for name in content.keys():  # noqa: SIM118
                part, _, rest = name.partition(".")
                parts.setdefault(part, {})[rest] = content.get_tensor(name)
            return json.loads(notes["position"]), parts
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainError(f"{str(file)!r} cannot be read: {error}", "a checkpoint of this training", "remove it to start anew") from error


def moments(optimizer: torch.optim.Optimizer, graph: Graph) -> dict[str, Tensor]:
    """What an optimizer remembers, by the names of parameter and value: a graph from a file has its parameters in another order."""
    state = optimizer.state
    rows = {name: state[parameter] for name, parameter in graph.tensors.named_parameters() if parameter in state}
    return {f"{name}:{key}": value for name, values in rows.items() for key, value in values.items() if isinstance(value, Tensor)}


def restore_moments(optimizer: torch.optim.Optimizer, graph: Graph, rows: Mapping[str, Tensor]) -> None:
    places = {id(parameter): place for place, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    parameters, state = dict(graph.tensors.named_parameters()), dict[int, dict[str, Tensor]]()
    for row, tensor in rows.items():
        name, _, key = row.rpartition(":")
        like = parameters[name]
        # fused optimizers go through memory in order: a moment must be laid out like its parameter
        value = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor) if tensor.shape == like.shape else tensor
        state.setdefault(places[id(like)], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
