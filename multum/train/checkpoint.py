"""A training that was cut short, in one file: written whole or not at all, read without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError

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


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers, by the number of the parameter and the name of the value."""
    rows = optimizer.state_dict()["state"].items()
    return {f"{index}.{name}": value for index, values in rows for name, value in values.items() if isinstance(value, Tensor)}


def restore_moments(optimizer: torch.optim.Optimizer, rows: Mapping[str, Tensor]) -> None:
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in rows.items():
        index, _, key = name.partition(".")
        like = trained[int(index)]
        # fused optimizers go through memory in order: a moment must be laid out like its parameter
        value = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor) if tensor.shape == like.shape else tensor
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
