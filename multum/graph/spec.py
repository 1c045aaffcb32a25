"""Nested inputs and outputs as a flat list of tensors and a spec: plain data that says how to put them back.

A spec is JSON: ``{"t": "tensor"}`` (a leaf, consumed in order), ``{"t": "none"}``, ``{"t": "const", "v": 3}`` (fixed at capture, no leaf),
``{"t": "tuple" | "list", "c": [spec, ...]}`` or ``{"t": "dict", "k": [key, ...], "c": [spec, ...]}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from multum.errors import GraphError

Spec = dict[str, Any]

_LARGEST_DEPTH = 64


def spec_of(value: Any, where: str = "value") -> Spec:
    """The structure of ``value``. Named tuples become tuples; every mapping (``ModelOutput`` among them) becomes a dict."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return {"t": "tensor"}
    if value is None:
        return {"t": "none"}
    if isinstance(value, bool | int | float | str):
        return {"t": "const", "v": value}
    if isinstance(value, Mapping):
        if not all(type(key) in (str, int) for key in value):
            raise GraphError(f"{where} has keys other than strings and integers: {list(value)}.", "string or integer keys")
        return {"t": "dict", "k": list(value), "c": [spec_of(child, f"{where}[{key!r}]") for key, child in value.items()]}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {"t": kind, "c": [spec_of(child, f"{where}[{i}]") for i, child in enumerate(value)]}
    raise GraphError(
        f"{where} is a {type(value).__name__}.",
        "tensors, numbers, strings, None, and tuples, lists and dicts of them",
        "wrap the model so that it takes and gives only these (transformers models: use_cache=False)",
    )


def flatten(value: Any, spec: Spec, where: str = "value") -> list[Any]:
    """The tensors of ``value`` in the order of ``spec``. A list may stand for a tuple and the reverse: data loaders swap them.

    Raises ``GraphError`` when the structure differs, or a value that was fixed at capture has another value now.
    """
    match spec["t"]:
        case "tensor" if isinstance(value, torch.Tensor | np.ndarray):
            return [value]
        case "none" if value is None:
            return []
        case "const" if type(value) is type(spec["v"]) and value == spec["v"]:
            return []
        case "tuple" | "list" if isinstance(value, tuple | list) and len(value) == len(spec["c"]):
            children = ((i, child) for i, child in enumerate(value))
        case "dict" if isinstance(value, Mapping) and set(value) == set(spec["k"]):
            children = ((key, value[key]) for key in spec["k"])
        case _:
            raise GraphError(f"{where} is {_describe(value)}.", _describe_spec(spec), "give inputs in the structure of the example")
    return [leaf for (key, child), part in zip(children, spec["c"], strict=True) for leaf in flatten(child, part, f"{where}[{key!r}]")]


def unflatten(leaves: Sequence[Any], spec: Spec) -> Any:
    """The inverse of ``flatten``. Raises ``GraphError`` when there are not as many leaves as the spec has."""
    if len(leaves) != (expected := check(spec)):
        raise GraphError(f"{len(leaves)} tensors are given for a structure.", f"{expected} tensors: {_describe_spec(spec)}")
    return _build(iter(leaves), spec)


def check(spec: Any, depth: int = 0) -> int:
    """The number of leaves of ``spec``, which may come from a hostile file. Raises ``GraphError`` when it is not a spec."""
    if depth > _LARGEST_DEPTH:
        raise GraphError(f"A structure is nested more than {_LARGEST_DEPTH} deep.", "tuples, lists and dicts of a few levels")
    match spec:
        case {"t": "tensor"}:
            return 1
        case {"t": "none"} | {"t": "const", "v": bool() | int() | float() | str()}:
            return 0
        case {"t": "tuple" | "list", "c": list(children)}:
            return sum(check(child, depth + 1) for child in children)
        case {"t": "dict", "k": list(keys), "c": list(children)} if _are_keys(keys) and len(keys) == len(children):
            return sum(check(child, depth + 1) for child in children)
        case _:
            raise GraphError(f"{str(spec)[:80]!r} describes no structure.", "a spec as multum.graph.spec defines it")


def _are_keys(keys: list[Any]) -> bool:
    return all(type(key) in (str, int) for key in keys) and len(set(keys)) == len(keys)


def _build(leaves: Iterator[Any], spec: Spec) -> Any:
    match spec["t"]:
        case "tensor":
            return next(leaves)
        case "none":
            return None
        case "const":
            return spec["v"]
        case "dict":
            return {key: _build(leaves, child) for key, child in zip(spec["k"], spec["c"], strict=True)}
        case kind:
            return (tuple if kind == "tuple" else list)(_build(leaves, child) for child in spec["c"])


def _describe(value: Any) -> str:
    match value:
        case torch.Tensor() | np.ndarray():
            return f"a tensor {list(value.shape)}"
        case Mapping():
            return f"a dict with the keys {sorted(map(str, value))}"
        case tuple() | list():
            return f"a {type(value).__name__} of {len(value)}"
        case _:
            return repr(value) if value is None or isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"


def _describe_spec(spec: Spec) -> str:
    match spec["t"]:
        case "tensor":
            return "a tensor"
        case "none":
            return "None, as at capture"
        case "const":
            return f"{spec['v']!r}, as at capture"
        case "dict":
            return f"a dict with the keys {sorted(map(str, spec['k']))}"
        case kind:
            return f"a {kind} of {len(spec['c'])}"
