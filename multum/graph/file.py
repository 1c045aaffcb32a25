"""A graph as plain data: operators as JSON, tensors by name. Reading it resolves operators from an allow-list and runs no code."""

from __future__ import annotations

import json
import keyword
import logging
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import FileError, GraphError
from . import spec
from .layers import QUANTIZERS
from .model import Graph, Tensors, aten, read
from .sparse import sparse_weights

VERSION = 1

# Arithmetic on the batch size. Everything else must be an ATen operator that changes nothing.
_SCALAR = {
    f.__name__: f
    for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg)
} | {f.__name__: f for f in (torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, math.ceil, math.floor, math.trunc)}
_SCALAR |= {f.__name__: f for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)}
_MUTABLE = ("aten.batch_norm.default", "aten.instance_norm.default")  # they update running statistics while training
_DENIED = ("aten.from_file", "aten.set_data", "aten._print", "aten.data_ptr", "aten._cudnn", "aten._mkldnn", "aten.resize", "aten.set.")
_DTYPES = {str(t).removeprefix("torch."): t for t in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format, "channels_last": torch.channels_last}
_MOST_NODES = 200_000


def to_data(graph: Graph) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Operators and structure as JSON, and the tensors to store.

    A weight that is read through a fake-quantization node alone is stored as its integers, in the smallest integer type:
    its floating-point value is `scale * (integer - zero point)`, which the quantizer maps to itself.
    """
    integers = quantized_weights(graph)
    tensors: dict[str, Tensor] = {}
    for name, tensor in graph.named_tensors():
        value = tensor.detach().cpu()
        if name in integers:
            value = to_integers(value, graph, integers[name])
        tensors[name] = value.contiguous()
    return operators_to_json(graph) | {"integers": sorted(integers)}, tensors


def from_data(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Graph:
    """The graph that `to_data` described. Raises FileError for anything that is not such a description."""
    try:
        graph = _build(data, tensors)
        for name in data.get("integers", ()):
            quantizers = quantized_weights(graph).get(name)
            if quantizers is None:
                raise FileError(f"The tensor {name!r} is said to hold integers but is not quantized.", "a graph written by multum")
            graph.set_tensor(name, from_integers(graph.tensor(name), graph, quantizers), parameter=True)
        with _unlogged("torch._subclasses.fake_tensor"):  # which prints a trace for shapes that do not fit, before it raises
            graph.refresh()
    except FileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, GraphError, ArithmeticError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise FileError(f"The description of the graph is damaged ({reason}).", "a graph written by multum") from error
    return graph


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def operators_to_json(graph: Graph) -> dict[str, Any]:
    """Operators, structure and kinds of tensors as JSON. Raises GraphError for an operator that no file may hold."""
    index = {node: position for position, node in enumerate(graph.fx.nodes)}
    rows = []
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            rows.append(["in", node.name, list(value.shape), _name_of(value.dtype)])
        elif node.op == "get_attr":
            rows.append(["get", str(node.target)])
        elif node.op == "call_function":
            row = ["call", _target_to_name(node), _to_json(node.args, index), node.meta.get("module") or ""]
            rows.append([*row, _to_json(dict(node.kwargs), index)] if node.kwargs else row)
        else:
            rows.append(["out", _to_json(node.args[0], index)])
    buffers = sorted(name for name, _ in graph.tensors.named_buffers())
    pinned = [index[node] for node in graph.fx.nodes if node.name in graph.pinned]
    data = {"graph": VERSION, "nodes": rows, "inputs": graph.inputs, "outputs": graph.outputs, "buffers": buffers, "pinned": pinned}
    return data | ({"sparse": sparse_weights(graph)} if graph.sparse else {})


def allowed(name: str) -> Any:
    """The operator called `name`. Raises FileError unless it is a pure ATen operator or arithmetic on sizes."""
    if name in _SCALAR:
        return _SCALAR[name]
    parts = name.split(".")
    refused = FileError(f"The file asks for the operator {name!r}.", "a pure ATen operator", "do not trust this file")
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts) or name.startswith(_DENIED):
        raise refused
    packet = getattr(aten, parts[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or parts[2] not in packet.overloads():  # type: ignore[no-untyped-call]
        raise refused
    overload = getattr(packet, parts[2])
    if overload._schema.is_mutable and name not in _MUTABLE:
        raise refused
    return overload


def _target_to_name(node: fx.Node) -> str:
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else str(getattr(node.target, "__name__", node.target))
    try:
        allowed(name)
    except FileError:
        where = node.meta.get("module") or node.name
        raise GraphError(f"The operator {name} at {where!r} cannot be stored.", "a pure ATen operator") from None
    return name


def _to_json(value: Any, index: Mapping[fx.Node, int]) -> Any:
    """Lists and plain values stay; what JSON lacks becomes an object with one key."""
    if isinstance(value, fx.Node):
        return {"n": index[value]}
    if isinstance(value, list | tuple):
        return [_to_json(part, index) for part in value]
    if isinstance(value, dict):
        return {"d": {key: _to_json(part, index) for key, part in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"f": repr(value)}
    if isinstance(value, slice):
        return {"s": [_to_json(part, index) for part in (value.start, value.stop, value.step)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": ""}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {kind.__name__: _name_of(value)}
    raise GraphError(f"An operator has an argument of type {type(value).__name__}, which cannot be stored.")


def _from_json(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(part, nodes) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "n":
            if not 0 <= content < len(nodes):
                raise ValueError(f"node {content} is used before it is computed")
            return nodes[content]
        case "d":
            return {str(key): _from_json(part, nodes) for key, part in content.items()}
        case "f":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
        case "s":
            return slice(*(_from_json(part, nodes) for part in content))
        case "device":
            return torch.device("cpu")
        case "dtype":
            return _DTYPES[content]
        case "layout":
            return _LAYOUTS[content]
        case "memory_format":
            return _FORMATS[content]
    raise ValueError(f"unknown kind of argument {kind!r}")


def _build(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Graph:
    if data["graph"] != VERSION:
        raise FileError(f"The graph is of version {data['graph']!r}.", f"version {VERSION}", "read it with a newer multum")
    if len(data["nodes"]) > _MOST_NODES:
        raise FileError(f"The graph has {len(data['nodes'])} operators.", f"at most {_MOST_NODES}")
    operators, nodes = fx.Graph(), list[fx.Node]()
    for row in data["nodes"]:
        node = _node(operators, nodes, row)
        nodes.append(node)
    _check_ends(data, nodes)
    graph = Graph.__new__(Graph)
    torch.nn.Module.__init__(graph)
    graph.tensors = Tensors()
    buffers = set(data["buffers"])
    for name, tensor in tensors.items():
        if not all(_is_name(part) or part.isdecimal() for part in name.split(".")):
            raise ValueError(f"{name!r} names no tensor")
        graph.set_tensor(name, tensor, parameter=name not in buffers and tensor.is_floating_point())
    result = Graph(operators, graph.tensors, data["inputs"], data["outputs"])
    result.pinned = frozenset(nodes[position].name for position in data["pinned"])
    result.sparse = frozenset(name for name in data.get("sparse", ()) if name in tensors)
    for node in operators.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            raise ValueError(f"there is no tensor {node.target!r}")
    return result.eval()


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _check_ends(data: Mapping[str, Any], nodes: list[fx.Node]) -> None:
    """What goes in and comes out must fit the structures that are declared."""
    places = [node.op for node in nodes].count("placeholder")
    if [part["t"] for part in data["inputs"]["c"]] != ["tuple", "dict"] or spec.check(data["inputs"]) != places:
        raise ValueError("the inputs do not fit their structure")
    if [node.op for node in nodes].index("output") != len(nodes) - 1:
        raise ValueError("operators stand behind the output")
    results: Any = nodes[-1].args[0]
    if spec.check(data["outputs"]) != len(results) or not all(isinstance(result, fx.Node) for result in results):
        raise ValueError("the outputs do not fit their structure")


def _node(operators: fx.Graph, nodes: list[fx.Node], row: list[Any]) -> fx.Node:
    match row:
        case ["in", str(name), list(size), str(dtype)]:
            if not _is_name(name) or not all(type(n) is int and 0 < n <= 1 << 31 for n in size):
                raise ValueError(f"{name!r} {size} is no input")
            node = operators.placeholder(name)
            node.meta["val"] = torch.empty(size, dtype=_DTYPES[dtype], device="meta")
        case ["get", str(name)]:
            node = operators.create_node("get_attr", name)
        case ["call", str(target), list(args), str(module), *rest]:
            kwargs = _from_json(rest[0], nodes) if rest else {}
            node = operators.call_function(allowed(target), tuple(_from_json(args, nodes)), kwargs)
            node.meta["module"] = module
        case ["out", list(values)]:
            node = operators.output(tuple(_from_json(values, nodes)))
        case _:
            raise ValueError(f"{str(row)[:80]} is no operator")
    return node


def quantized_weights(graph: Graph) -> dict[str, fx.Node]:
    """Tensors of which every use passes through one fake-quantization node, with that node."""
    uses: dict[str, set[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            uses.setdefault(str(node.target), set()).update(node.users)
    found = {}
    for name, users in uses.items():
        first = next(iter(users), None)
        if first is not None and len(users) == 1 and first.target in QUANTIZERS and _reads(first.args[0]) == name:
            found[name] = first
    return found


def _reads(node: Any) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def grid(graph: Graph, node: fx.Node, ndim: int) -> tuple[Tensor, Tensor, int, int]:
    """Scale and zero point, shaped to broadcast over the weight, and the smallest and largest integer."""
    scale, zero = (graph.tensor(str(_reads(read(node, name)))).detach().cpu() for name in ("scale", "zero_point"))
    axis = read(node, "axis")
    if axis is not None:
        form = [-1 if dim == axis else 1 for dim in range(ndim)]
        scale, zero = scale.reshape(form), zero.reshape(form)
    return scale, zero, int(read(node, "quant_min")), int(read(node, "quant_max"))


def to_integers(value: Tensor, graph: Graph, node: fx.Node) -> Tensor:
    scale, zero, low, high = grid(graph, node, value.ndim)
    levels = torch.clamp(torch.round(value * (1.0 / scale)) + torch.round(zero), low, high)
    kinds = (torch.int8, torch.uint8, torch.int16, torch.int32)
    return levels.to(next(t for t in kinds if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max))


def from_integers(levels: Tensor, graph: Graph, node: fx.Node) -> Tensor:
    scale, zero, low, high = grid(graph, node, levels.ndim)
    if levels.numel() and not (low <= int(levels.min()) and int(levels.max()) <= high):
        raise FileError(f"The tensor {_reads(node.args[0])!r} holds integers outside {low}..{high}.", "integers on the declared grid")
    return (levels - torch.round(zero)) * scale


def _name_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


def dump(graph: Graph, path: Path) -> None:
    """Keeps a graph that is still being worked on, every tensor in full, under `path` (safetensors)."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in graph.named_tensors()}
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial, {"graph": json.dumps(operators_to_json(graph))})
    partial.replace(path)


def restore(path: Path) -> Graph:
    """The graph that `dump` kept. Raises FileError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            data = json.loads(file.metadata()["graph"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}", "a graph kept by an earlier run", "remove it to start anew") from error
    return from_data(data, tensors)
