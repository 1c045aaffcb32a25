"""From a trained `nn.Module` to a `Graph`, by `torch.export`."""

from __future__ import annotations

import contextlib
import io
import itertools
import keyword
import operator
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

from ..errors import CaptureError
from . import spec
from .cells import CELLS, write_out
from .computed import fold
from .model import Graph, Tensors, _meta, aten

# Asserts and markers that torch.export leaves in the graph; they compute nothing.
_MARKERS = ("_assert", "sym_constrain_range", "_guards_fn")
_MODES = ("wrap_with_set_grad_enabled", "wrap_with_autocast")  # operators on a block that set a mode; others choose by data what runs
_MOST_TRIED = 12
_SCATTERS: dict[Any, Any] = {aten.select.int: aten.select_scatter.default, aten.slice.Tensor: aten.slice_scatter.default}


def capture(model: nn.Module, example: Any) -> Graph:
    """The graph of `model`, with a dynamic batch size; the model itself is not changed.

    Tensors keep their names, as far as Python can spell them: `class.weight` becomes `class_.weight`, `conv-1.weight` `conv_1.weight`.
    A weight that is computed from other tensors, as under weight norm, is computed once.

    `example` is one batch of inputs: a tensor, a tuple (passed by position) or a dict (passed by name), nested at will.
    Its tensors share the batch as their first dimension. Raises CaptureError, which names the operator that stopped the
    capture and the submodules that can be captured.
    """
    args, kwargs = arguments(example)
    if isinstance(model, Graph):
        return model.copy()
    _check(model)
    was_training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        exported, structure = _export(model, args, kwargs)
    except CaptureError:
        raise
    except Exception as error:
        raise _failure(model, args, kwargs, error) from error
    finally:
        for name, module in model.named_modules():
            module.training = was_training[name]
    graph = _rebuild(exported, structure)
    fold(graph)
    graph.eval()
    graph.refresh()
    return graph


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments from one batch of inputs."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


class _Structure:
    """What goes in and comes out. An object of its own: torch.export undoes what a forward assigns to its module."""

    def __init__(self, inputs: dict[str, Any]):
        self.inputs = inputs
        self.outputs: dict[str, Any] = {}


class _Flat(nn.Module):
    """Calls the model with tensors alone and gives tensors alone; notes the structure of the outputs."""

    def __init__(self, model: nn.Module, structure: _Structure):
        super().__init__()
        self.model = model
        self.structure = structure

    def forward(self, *leaves: Tensor) -> tuple[Any, ...]:
        args, kwargs = spec.unflatten(list(leaves), self.structure.inputs)
        result = self.model(*args, **kwargs)
        self.structure.outputs = spec.spec_of(result, "output")
        return tuple(spec.flatten(result, self.structure.outputs))


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.export.ExportedProgram, _Structure]:
    structure = _Structure(spec.spec_of((args, kwargs), "example"))
    leaves = [leaf.detach() for leaf in spec.flatten((args, kwargs), structure.inputs)]
    if not leaves:
        raise CaptureError("The example holds no tensor.", "one batch of inputs", "give the tensors that the model is called with")
    batch = leaves[0].shape[0] if leaves[0].ndim else 0
    if batch == 1:  # torch.export takes a size of one for a constant
        leaves = [leaf.repeat(2, *[1] * (leaf.ndim - 1)) if leaf.ndim and leaf.shape[0] == 1 else leaf for leaf in leaves]
        batch = 2
    dynamic = tuple({0: torch.export.Dim.AUTO} if leaf.ndim and leaf.shape[0] == batch else None for leaf in leaves)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():  # a failing export prints its graph
        warnings.simplefilter("ignore")
        exported = torch.export.export(_Flat(model, structure), tuple(leaves), dynamic_shapes=(dynamic,), strict=False)
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and free_unbacked_symbols(value.shape):
            raise _DependsOnData(f"the size of what {node.target} gives depends on data{_at(node)}")
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.__name__ not in _MODES:
            raise _DependsOnData(f"the control-flow operator {node.target} chooses by data what runs{_at(node)}")
    return exported, structure


class _DependsOnData(Exception):
    """What runs, or how large it is, depends on the values of the inputs."""


def _rebuild(exported: torch.export.ExportedProgram, structure: _Structure) -> Graph:
    """Turns the lifted inputs of an exported program back into named tensors, and drops what computes nothing."""
    tensors, names = _tensors(exported)
    operators = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            made[node] = operators.create_node("get_attr", names[node.name], name=node.name)
        elif node.op == "placeholder":
            made[node] = operators.create_node("placeholder", node.name, name=node.name)
        else:
            _copy(node, operators, made, exported.graph_module)
        if isinstance(made.get(node), fx.Node):
            made[node].meta = _notes(node)
    graph = Graph(operators, tensors, structure.inputs, structure.outputs)
    graph.pinned = frozenset(n.name for n in operators.nodes if n.op == "call_function" and _trains_always(n))
    graph.clean()
    return graph


def _tensors(exported: torch.export.ExportedProgram) -> tuple[Tensors, dict[str, str]]:
    """The tensors under the user's names, and for each lifted input its tensor's name; tied tensors get one name."""
    graph = Graph.__new__(Graph)
    nn.Module.__init__(graph)
    graph.tensors = Tensors()
    names: dict[str, str] = {}
    seen: dict[int, str] = {}
    for item in exported.graph_signature.input_specs:
        if item.kind is InputKind.USER_INPUT or item.target is None:
            continue
        value = exported.state_dict[item.target] if item.target in exported.state_dict else exported.constants[item.target]
        if not isinstance(value, Tensor):
            raise CaptureError(f"The model holds {item.target!r}, a {type(value).__name__}.", "parameters and buffers only")
        if id(value) not in seen:
            name = ".".join(_spelled(part) for part in item.target.removeprefix("model.").split("."))
            while name in seen.values():
                name += "_"
            seen[id(value)] = name
            parameter = isinstance(value, nn.Parameter)
            graph.set_tensor(name, value.detach().clone(), parameter)
            if parameter:
                graph.tensor(name).requires_grad_(value.requires_grad)
        names[str(item.arg.name)] = seen[id(value)]
    return graph.tensors, names


def _spelled(part: str) -> str:
    """Part of a tensor's name as code and files can have it: an identifier or a number."""
    part = re.sub(r"\W", "_", part)
    if part.isdecimal():
        return part
    return f"{part}_" if keyword.iskeyword(part) else part if part.isidentifier() else f"_{part}"


def _copy(node: fx.Node, operators: fx.Graph, made: dict[fx.Node, Any], module: fx.GraphModule) -> None:
    """Copies one node: inlines blocks under no_grad and autocast, makes in-place operators plain, skips markers."""
    if node.op == "get_attr":
        made[node] = getattr(module, str(node.target))
        return
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", node.target))
        if any(name.startswith(marker) for marker in _MARKERS):
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            made[node] = _inline(node, operators, made)
            return
        if node.target is operator.getitem and isinstance(made[node.args[0]], tuple):  # type: ignore[index]
            made[node] = made[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        if node.target in (aten.lift_fresh_copy.default, aten.alias.default, aten.detach_.default):
            made[node] = made[node.args[0]]  # type: ignore[index]
            return
        if node.target in CELLS:
            made[node], new = write_out(node.target, operators, fx.map_arg(node.args, lambda n: made[n]))
            for part in new:
                part.meta = _notes(node) | {"val": None}
            return
        target = _plain(node)
        copied = operators.node_copy(node, lambda n: made[n])
        copied.target = target
        made[node] = copied
        if target is not node.target:
            _redirect(node.args[0], node, operators, made)  # type: ignore[arg-type]
        return
    made[node] = operators.node_copy(node, lambda n: made[n])


def _inline(node: fx.Node, operators: fx.Graph, made: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """The results of a higher-order operator that only sets a mode around a subgraph."""
    values = [made.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
    body = next(value for value in values if isinstance(value, fx.GraphModule))
    inputs = values[values.index(body) + 1 :]
    inner: dict[fx.Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    for part in body.graph.nodes:
        if part.op == "output":
            return tuple(fx.map_arg(part.args[0], lambda n: inner[n]))
        if part.op != "placeholder":
            _copy(part, operators, inner, body)
            if isinstance(inner.get(part), fx.Node):
                inner[part].meta = _notes(part)
    return ()


def _plain(node: fx.Node) -> Callable[..., Any]:
    """The operator that computes what an in-place one does, without changing its input."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return target  # type: ignore[no-any-return]
    name, overload = schema.name.split("::")[1], schema.overload_name or "default"
    if name.endswith("_") and hasattr(aten, name[:-1]) and hasattr(getattr(aten, name[:-1]), overload):
        return getattr(getattr(aten, name[:-1]), overload)  # type: ignore[no-any-return]
    if target in (aten.batch_norm.default, aten.instance_norm.default):
        return target  # type: ignore[no-any-return]
    raise CaptureError(
        f"The operator {target} in {_where(node)!r} changes a tensor in place.",
        "operators that return a new tensor",
        "write the assignment as an expression (torch.where, torch.cat)",
    )


def _redirect(changed: fx.Node, by: fx.Node, operators: fx.Graph, made: dict[fx.Node, Any]) -> None:
    """After an in-place operator, its input means the new value, and so does everything that shares memory with it.

    A change through slices of a tensor is scattered back into it; through other views it is refused when it would be seen.
    """
    chain = [changed]
    while _is_view(chain[-1]):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    made[changed] = value = made[by]
    reach = max((i for i, node in enumerate(chain) if any(by < user for user in node.users)), default=0)
    path = list(itertools.pairwise(chain[: reach + 1]))
    stale = any(view < by and view not in chain and any(by < user for user in view.users) for view in _views(chain[-1]))
    if stale or any(view.target not in _SCATTERS for view, _ in path):
        raise CaptureError(
            f"The operator {by.target} in {_where(by)!r} changes part of a tensor through a view.",
            "operators that return a new tensor",
            "write the assignment as an expression (torch.where, torch.cat)",
        )
    for view, before in path:
        scatter = _SCATTERS[view.target]
        value = operators.call_function(scatter, (made[before], value, *fx.map_arg(view.args[1:], lambda n: made[n])))
        value.meta = _notes(by) | {"val": None}
        made[before] = value


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(argument.alias_info is not None for argument in schema.returns)


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """Everything that shares memory with `node`."""
    for user in node.users:
        if _is_view(user) and user.args[0] is node:
            yield user
            yield from _views(user)


def _trains_always(node: fx.Node) -> bool:
    """Whether an operator trained although the model was in eval mode, such as batch norm without running statistics."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    place = next((i for i, a in enumerate(schema.arguments) if a.name in ("training", "train")), None)
    return place is not None and place < len(node.args) and node.args[place] is True


def _notes(node: fx.Node) -> dict[str, Any]:
    return {"val": _meta(node.meta.get("val")), "module": _where(node)}


def _where(node: fx.Node) -> str:
    """The user's module in which a node was written, by its path in the model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]).removeprefix("model").removeprefix(".") if paths else ""


def _at(node: fx.Node) -> str:
    """The line of the user's that a node comes from, as `_line` has it."""
    found = re.findall(r'File "([^<].*)", line (\d+), in .*\n +(.+)', node.meta.get("stack_trace") or "")
    return ", at {}:{}: {}".format(*found[-1]) if found else ""


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"The model is a {type(model).__name__}.", "a torch.nn.Module")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CaptureError(
                f"The tensor {name!r} of the model holds NaN or infinite values.",
                "finite weights",
                "check the checkpoint and how it was trained",
            )


def _failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> CaptureError:
    """An error that says what stopped the capture and which submodules can be captured."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, GuardOnDataDependentSymNode):
        reason = "the forward asks for a value that depends on data"
    else:
        reason = str(error) if isinstance(error, _DependsOnData) else f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"
    return CaptureError(
        f"{type(model).__name__} cannot be captured whole: {reason}{_line(error)}",
        "a forward without branches or shapes that depend on data",
        f"capture a submodule and put it back; these can be captured: {_capturable(model, args, kwargs)}",
    )


def _line(error: Exception) -> str:
    """The innermost line outside of torch and of this package at which the forward failed; empty when there is none."""
    own = tuple(f"{Path(module.__file__).parent}{os.sep}" for module in (torch, spec) if module.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    return f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _capturable(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, a, k, name=name: calls.setdefault(name, (a, k)) and None, with_kwargs=True)
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters())
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        return f"none (the model fails on its example: {(str(error).splitlines() or [type(error).__name__])[0]})"
    finally:
        for handle in handles:
            handle.remove()
    found: list[str] = []
    tried = 0
    for name, call in calls.items():  # outer modules come first; the inside of one that works is not tried
        if tried == _MOST_TRIED or any(name.startswith(f"{other}.") for other in found):
            continue
        tried += 1
        try:
            _export(model.get_submodule(name), *call)
        except Exception:
            continue
        found.append(name)
    return ", ".join(found) or "none"
