"""What data say about weights: gradients and inputs, streamed once and summed up in the memory of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, layers
from ..graph.matrix import columns, data, multiplies
from ..graph.watch import Watch
from ..task import Task, batch_size, call, first, rows, tensors
from ..train import arrange

_PIECE = 16  # samples that are pulled at together
Pull = Callable[[list[Tensor], Any, Any], Sequence[Tensor | None]]  # (floating-point outputs, all outputs, targets) -> gradients


class Evidence:
    """Statistics of a graph on a task's data, each found when it is first asked for. The graph is not changed.

    `samples` bounds how many samples are looked at. Raises StepError or TaskError when the task lacks what is asked for.
    """

    def __init__(self, graph: Graph, task: Task, samples: int = 512):
        self.graph, self.task, self.samples = graph, task, samples
        self.device = next((tensor.device for _, tensor in graph.named_tensors()), torch.device("cpu"))

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """The gradient of the task's loss, mean over training samples, for each weight."""
        return self._mean("train", self._loss, lambda gradient, size: gradient * size)

    @cached_property
    def squares(self) -> dict[str, Tensor]:
        """The mean over training samples of the squared gradient of the loss: the diagonal of the empirical Fisher matrix.

        The squared sum over samples under random signs has the sum of the squares as its mean: one backward pass serves many samples.
        """

        def pull(outputs: list[Tensor], nested: Any, targets: Any) -> list[Tensor | None]:
            signs = (torch.randint(0, 2, (len(outputs[0]),), generator=random) * 2.0 - 1).to(self.device) * len(outputs[0])
            found = self._loss(outputs, nested, targets)
            return [None if g is None else g * signs.reshape(-1, *[1] * (g.ndim - 1)) for g in found]

        random = torch.Generator().manual_seed(self.task.seed)
        return self._mean("train", pull, lambda gradient, size: gradient.square())

    @cached_property
    def curvature(self) -> dict[str, Tensor]:
        """The diagonal of the Hessian of half the squared change of the outputs, relative to their mean square, mean over samples.

        Where nothing is changed yet it is that of J^T J, so random directions pulled back through the graph give it; no labels are needed.
        """

        def pull(outputs: list[Tensor], nested: Any, targets: Any) -> list[Tensor | None]:
            noise = [torch.randn(output.shape, generator=random, dtype=output.dtype).to(self.device) for output in outputs]
            return [n / output.detach().square().mean().sqrt().clamp_min(1e-12) for n, output in zip(noise, outputs, strict=True)]

        random = torch.Generator().manual_seed(self.task.seed)
        return self._mean("calibration", pull, lambda gradient, size: gradient.square())

    @cached_property
    def powers(self) -> dict[str, Tensor]:
        """For each layer that multiplies a matrix, the sum of squares of each element of its columns [groups, height]."""
        found: dict[str, Tensor] = {}
        readers: dict[fx.Node, list[Any]] = {}
        for layer in layers(self.graph):
            if multiplies(layer):
                readers.setdefault(data(layer), []).append(layer)

        def see(node: fx.Node, value: Tensor) -> None:
            for layer in readers[node]:
                for part in columns(layer, value, self.graph.tensor(layer.weight).shape):
                    found[layer.name] = found.get(layer.name, 0) + part.square().sum(2).double()

        watch = Watch(self.graph.eval(), readers, see)
        with torch.no_grad():
            for inputs, _, _ in self._batches("calibration"):
                watch(inputs)
        return found

    def _loss(self, outputs: list[Tensor], nested: Any, targets: Any) -> Sequence[Tensor | None]:
        if self.task.loss is None:
            raise StepError(f"This criterion needs `loss`, which the task {self.task.name!r} does not have.", "Task(..., loss=...)")
        return torch.autograd.grad(self.task.loss(nested, targets), outputs, retain_graph=True, allow_unused=True)

    def _mean(self, part: str, pull: Pull, form: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
        """The sum over pieces of the data of what `form` makes of each weight's gradient, divided by the number of samples."""
        graph = self.graph.copy().requires_grad_(True).eval()
        known = {layer.weight: graph.tensor(layer.weight) for layer in layers(graph)}
        weights = {name: weight for name, weight in known.items() if weight.requires_grad}
        sums, count = {name: torch.zeros_like(weight) for name, weight in weights.items()}, 0
        for inputs, targets, size in self._batches(part):
            nested = call(graph, inputs)
            outputs = [output for output in tensors(nested) if output.requires_grad and output.ndim and len(output) == size]
            pulls = [(output, g) for output, g in zip(outputs, pull(outputs, nested, targets), strict=True) if g is not None]
            ends, given = zip(*pulls, strict=True)
            found = torch.autograd.grad(ends, list(weights.values()), given, allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    sums[name] += form(gradient, size)
            count += size
        return {name: total / count for name, total in sums.items()}

    def _batches(self, part: str) -> Iterator[tuple[Any, Any, int]]:
        """Inputs, targets and number of samples, on the graph's device, a few at a time."""
        left = self.samples
        for inputs, targets in first(self.task, part, self.samples):
            size = batch_size(inputs)
            for begin in range(0, min(size, left), _PIECE):
                end = min(begin + _PIECE, size, begin + left)
                piece = (rows(value, size, begin, end) for value in (inputs, targets))
                yield *(arrange(value, self.device) for value in piece), end - begin
            left -= size
