"""The one representation of a network: an `nn.Module` whose forward is an editable graph of ATen operators."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ..errors import GraphError
from . import spec

aten = torch.ops.aten

# Operators that carry a literal saying whether they train. It is flipped by `Graph.train`.
_MODE_ARGUMENTS = ("training", "train")


class Tensors(nn.Module):
    """A plain tree of parameters and buffers under the names that the user's model gave them."""


class Graph(nn.Module):
    """A captured network. It is called, trained, moved and copied like the model it was captured from.

    `fx` holds the operators: `placeholder`, `get_attr` (names a tensor), `call_function` and one flat `output`. Edit
    it, then call `recompile()`; when shapes changed, `refresh()` as well. `tensors` holds parameters and buffers.
    `node.meta["val"]` is a tensor on the meta device (or a tuple of them): shape and dtype at the example's batch size.
    """

    def __init__(self, operators: fx.Graph, tensors: Tensors, inputs: dict[str, Any], outputs: dict[str, Any]):
        super().__init__()
        self.fx = operators
        self.tensors = tensors
        self.inputs, self.outputs = inputs, outputs
        self.pinned: frozenset[str] = frozenset()  # operators that the author of the model made train always
        self.sparse: frozenset[str] = frozenset()  # weights whose zeros are meant, and stay: see sparse.py
        self._taps = 0  # how many of the last results are not the user's
        self.tapped: list[Any] = []
        self._run: Callable[..., tuple[Any, ...]]
        self.recompile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = spec.flatten((args, kwargs), self.inputs)
        results = list(self._run(self.tensors, *leaves))
        own = len(results) - self._taps
        self.tapped = results[own:]
        return spec.unflatten(results[:own], self.outputs)

    def tap(self, nodes: Sequence[fx.Node] = ()) -> None:
        """Each call from now on leaves the results of these operators in `tapped`, in their order, with gradients; without any, none."""
        output = self.fx.output_node()
        results: tuple[Any, ...] = tuple(output.args[0])  # type: ignore[arg-type]
        output.args = ((*results[: len(results) - self._taps], *nodes),)
        self._taps, self.tapped = len(nodes), []
        self.recompile()

    # --- the operators ---------------------------------------------------------------------------------------------

    @property
    def code(self) -> str:
        """The forward as readable Python."""
        return self.fx.python_code("self").src

    def recompile(self) -> None:
        """Makes the edited operators the ones that run. Raises GraphError when they are inconsistent."""
        try:
            self.fx.lint()
        except RuntimeError as error:
            raise GraphError(f"The edited graph is inconsistent: {error}", "every input of an operator computed before it") from error
        source = self.fx.python_code("self")
        namespace: dict[str, Any] = dict(source.globals)
        exec(compile(source.src, "<multum graph>", "exec"), namespace)
        self._run = namespace["forward"]

    def clean(self) -> None:
        """Removes operators whose result nobody uses, then tensors that no operator names; recompiles."""
        for node in reversed(list(self.fx.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.fx.erase_node(node)
        used = {str(node.target) for node in self.fx.nodes if node.op == "get_attr"}
        for name in [name for name, _ in self.named_tensors()]:
            if name not in used:
                owner, _, attribute = name.rpartition(".")
                delattr(self.tensors.get_submodule(owner), attribute)
        _drop_empty(self.tensors)
        self.recompile()

    def refresh(self) -> None:
        """Computes the shapes in `meta["val"]` anew, after an edit that changed some; runs no arithmetic."""
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            leaves = [mode.from_tensor(leaf) for leaf in self._example_leaves()]
            _Shapes(self).run(*leaves)

    def find(self, *targets: Any) -> list[fx.Node]:
        """The nodes that call one of these operators, in order of execution."""
        return [node for node in self.fx.nodes if node.op == "call_function" and node.target in targets]

    def attribute(self, name: str, before: fx.Node) -> fx.Node:
        """A node that reads the tensor `name`, placed before `before`."""
        with self.fx.inserting_before(before):
            node = self.fx.create_node("get_attr", name)
        node.meta["val"] = _meta(self.tensor(name))
        return node

    def operator(self, target: Any, args: Sequence[Any], like: fx.Node, before: fx.Node) -> fx.Node:
        """A node that calls an operator whose result is as that of `like`, placed before `before`."""
        with self.fx.inserting_before(before):
            node = self.fx.call_function(target, tuple(args))
        node.meta = {"val": _meta(like.meta["val"]), "module": like.meta.get("module", "")}
        return node

    # --- the tensors -----------------------------------------------------------------------------------------------

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, then all buffers, under the user's names; a tied tensor comes once."""
        yield from self.tensors.named_parameters()
        yield from self.tensors.named_buffers()

    def tensor(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        try:
            value = getattr(self.tensors.get_submodule(owner), attribute)
        except AttributeError:
            raise GraphError(f"The graph has no tensor {name!r}.", "the name of a parameter or buffer") from None
        assert isinstance(value, Tensor)
        return value

    def set_tensor(self, name: str, value: Tensor, parameter: bool | None = None) -> None:
        """Sets or adds a tensor. It stays the kind it was (a new one is a buffer) unless `parameter` says otherwise."""
        owner, _, attribute = name.rpartition(".")
        place: nn.Module = self.tensors
        for part in owner.split(".") if owner else ():
            if part not in place._modules:
                place.add_module(part, Tensors())
            child = place._modules[part]
            assert child is not None
            place = child
        old = place._parameters.get(attribute)
        if parameter is None:
            parameter = old is not None
        place._parameters.pop(attribute, None)
        place._buffers.pop(attribute, None)
        if parameter:
            trains = old.requires_grad if old is not None else value.is_floating_point()
            place.register_parameter(attribute, nn.Parameter(value.detach(), requires_grad=trains))
        else:
            place.register_buffer(attribute, value.detach())

    # --- mode, device, copies --------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Graph:
        """Flips the `training` literals of batch normalization, dropout and the like."""
        changed = False
        for node in self.fx.nodes if hasattr(self, "fx") else ():
            if node.op != "call_function" or not hasattr(node.target, "_schema") or node.name in self.pinned:
                continue
            for index, argument in enumerate(node.target._schema.arguments):
                if argument.name in _MODE_ARGUMENTS and read(node, argument.name, False) is not mode:
                    write(node, index, argument.name, mode)
                    changed = True
        if changed:
            self.recompile()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Graph:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tensor = next((tensor for _, tensor in self.named_tensors()), None)
        if tensor is None:
            return self
        moved = False
        for node in self.fx.nodes:  # factories such as arange carry their device as a literal
            if isinstance(node.kwargs.get("device"), torch.device) and node.kwargs["device"] != tensor.device:
                node.kwargs = {**node.kwargs, "device": tensor.device}
                moved = True
        if moved:
            self.recompile()
        return self

    def copy(self) -> Graph:
        """An independent copy: own operators, own tensors."""
        return copy.deepcopy(self)

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named inputs of the captured shapes, all zeros, on the graph's device."""
        args, kwargs = spec.unflatten(self._example_leaves(), self.inputs)
        return args, kwargs

    def _example_leaves(self) -> list[Tensor]:
        device = next((tensor.device for _, tensor in self.named_tensors()), torch.device("cpu"))
        return [torch.zeros_like(node.meta["val"], device=device) for node in self.fx.nodes if node.op == "placeholder"]

    def fingerprint(self) -> str:
        """SHA-256 over operators, names and the bits of every tensor, as 64 hexadecimal digits."""
        from .file import operators_to_json

        digest = hashlib.sha256(json.dumps(operators_to_json(self), sort_keys=True).encode())
        for name, tensor in sorted(self.named_tensors()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class _Shapes(fx.Interpreter):
    """Runs the operators on fake tensors and notes the shape of every result."""

    def __init__(self, graph: Graph):
        super().__init__(graph.tensors, garbage_collect_values=True, graph=graph.fx)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            with unset_fake_temporarily():
                n.meta["val"] = _meta(result)
        return result


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(tuple(int(size) for size in value.shape), dtype=value.dtype, device="meta")
    if isinstance(value, tuple | list):
        return tuple(_meta(part) for part in value)
    return value


def _drop_empty(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        _drop_empty(child)
        if not (child._parameters or child._buffers or child._modules):
            del module._modules[name]


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's result at the example's batch size. Raises GraphError for a node without one tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise GraphError(f"The node {node.name} has no single tensor as its result.")
    return tuple(value.shape)


def read(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument `name` of an ATen call, wherever it was passed; the schema's default when it was not."""
    if name in node.kwargs:
        return node.kwargs[name]
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if index < len(node.args) and not argument.kwarg_only:
                return node.args[index]
            return argument.default_value if argument.has_default_value() else default
    return default


def write(node: fx.Node, index: int, name: str, value: Any) -> None:
    """Sets the argument `name`, at position `index` of the schema, of an ATen call."""
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


def owners(nodes: Iterable[fx.Node]) -> str:
    """The user's modules in which these nodes were written, for messages."""
    return ", ".join(sorted({str(node.meta.get("module") or node.name) for node in nodes}))
