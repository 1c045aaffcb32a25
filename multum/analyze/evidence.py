"""What data say about weights: gradients and inputs, streamed once and summed up in the memory of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer, layers
from ..graph.matrix import channel_dim, columns, data, multiplies, to_matrix
from ..graph.watch import Watch
from ..task import Task, batch_size, call, first, rows, tensors, total
from ..train import arrange

_LOOKED_UP = 1 << 16  # samples whose look-ups are counted
_PIECE = 16  # samples that are pulled at together
GRAMS = 1 << 29  # bytes of grams that are held at once
Pull = Callable[[list[Tensor], Any, Any], Sequence[Tensor | None]]  # (floating-point outputs, all outputs, targets) -> gradients


class Evidence:
    """Statistics of a graph on a task's data, each found when it is first asked for. The graph is not changed.

    `samples` bounds how many samples are looked at. Raises StepError or TaskError when the task lacks what is asked for.
    """

    def __init__(self, graph: Graph, task: Task, samples: int = 512):
        self.graph, self.task, self.samples = graph, task, samples
        self._grams: dict[str, tuple[Tensor, Tensor, int]] = {}
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

        def see(layer: Layer, value: Tensor) -> None:
            for part in columns(layer, value, self.graph.tensor(layer.weight).shape):
                found[layer.name] = found.get(layer.name, 0) + part.square().sum(2).double()

        self._read([layer for layer in layers(self.graph) if multiplies(layer)], see)
        return found

    @cached_property
    def activations(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each channel that such a layer reads: the mean of its absolute values, and the share of them that are not zero [channels]."""
        sums: dict[str, list[Any]] = {}

        def see(layer: Layer, value: Tensor) -> None:
            others = [dim for dim in range(value.ndim) if dim != channel_dim(layer) % value.ndim]
            own = sums.setdefault(layer.name, [0, 0, 0])
            own[0] += value.abs().sum(others).double()
            own[1] += (value != 0).sum(others).double()
            own[2] += value.numel() // value.shape[channel_dim(layer)]

        self._read([layer for layer in layers(self.graph) if multiplies(layer)], see)
        return {name: (total / count, filled / count) for name, (total, filled, count) in sums.items()}

    def gram(self, layer: Layer) -> Tensor:
        """The products of a layer's columns with themselves, about their means, summed over the samples [groups, height, height].

        Layers that come next are taken along as far as memory allows: ask in order of execution.
        """
        return self.moments(layer)[0]

    def second(self, layer: Layer) -> Tensor:
        """The same about zero instead of the means."""
        gram, mean, count = self.moments(layer)
        return gram + count * mean[:, :, None] * mean[:, None]

    def counts(self, layer: Layer) -> Tensor:
        """How often each row of a table of embeddings is looked up, in all training data if there are any [rows]."""
        node, rows_ = layer.node.args[1], self.graph.tensor(layer.weight).shape[0]
        assert isinstance(node, fx.Node)
        found = torch.zeros(rows_, dtype=torch.double, device=self.device)
        part = "calibration" if self.task.train is None else "train"

        def see(_: fx.Node, value: Tensor) -> None:
            found.add_(torch.bincount(value.flatten(), minlength=rows_))

        watch = Watch(self.graph.eval(), [node], see)
        with torch.no_grad():
            for inputs, _ in first(self.task, part, _LOOKED_UP):
                watch(arrange(inputs, self.device))
        return found

    def pulls(self, chosen: Sequence[Layer]) -> dict[str, Tensor]:
        """The second moments, by layer, of the gradients at its results [outputs, outputs]: what an error there costs the outputs.

        Random directions are pulled back from the outputs, as for `curvature`; no labels are needed.
        """
        graph, random = self.graph.copy().requires_grad_(True).eval(), torch.Generator().manual_seed(self.task.seed)
        nodes = {node.name: node for node in graph.fx.nodes}
        graph.tap([nodes[layer.node.name] for layer in chosen])
        found: dict[str, Tensor] = {}
        for inputs, _, _ in self._batches("calibration"):
            outputs = [output for output in tensors(call(graph, inputs)) if output.requires_grad]
            given = [
                (
                    torch.randn(output.shape, generator=random, dtype=output.dtype)
                    / output.detach().square().mean().sqrt().clamp_min(1e-12).cpu()
                )
                for output in outputs
            ]
            pulled = torch.autograd.grad(outputs, graph.tapped, [g.to(self.device) for g in given], allow_unused=True)
            for layer, tapped, gradient in zip(chosen, graph.tapped, pulled, strict=True):
                value = torch.zeros_like(tapped) if gradient is None else gradient
                flat = value.transpose(0, 1).flatten(1) if layer.kind == "conv" else value.reshape(-1, value.shape[-1]).T
                found[layer.name] = found.get(layer.name, 0) + (flat @ flat.T).double()
        return found

    def moments(self, layer: Layer) -> tuple[Tensor, Tensor, int]:
        """`gram`, the means that it is about [groups, height], and the number of columns."""
        if layer.name not in self._grams:
            known = [other for other in layers(self.graph) if multiplies(other)]
            wanted, left = list[Layer](), GRAMS
            for other in known[[other.name for other in known].index(layer.name) :]:
                if wanted and self.graph.tensor(other.weight).shape[1 - other.axis] == 1:
                    continue  # depthwise: no channel is read together with another, nobody asks
                left -= _gram_bytes(other, self.graph)
                if wanted and left < 0:
                    break
                wanted.append(other)
            self._grams = self._sum_grams(wanted)
        return self._grams[layer.name]

    def _sum_grams(self, wanted: list[Layer]) -> dict[str, tuple[Tensor, Tensor, int]]:
        sums: dict[str, list[Any]] = {layer.name: [0, 0, 0, None] for layer in wanted}

        def see(layer: Layer, value: Tensor) -> None:
            own = sums[layer.name]
            for x in columns(layer, value, self.graph.tensor(layer.weight).shape):
                # About a mean that is nearly right: about zero, what varies little would be lost in single precision.
                own[3] = x.mean(2, keepdim=True) if own[3] is None else own[3]
                x = x - own[3]
                own[0] += (x @ x.transpose(1, 2)).double()
                own[1] += x.sum(2).double()
                own[2] += x.shape[2]

        self._read(wanted, see)
        found = {}
        for name, (gram, sum_, count, about) in sums.items():
            off = sum_ / count
            found[name] = gram - count * off[:, :, None] * off[:, None], off + about[:, :, 0].double(), count
        return found

    def _read(self, wanted: list[Layer], see: Callable[[Layer, Tensor], None]) -> None:
        """Shows what these layers read, on calibration data."""
        readers: dict[fx.Node, list[Layer]] = {}
        for layer in wanted:
            readers.setdefault(data(layer), []).append(layer)

        def show(node: fx.Node, value: Tensor) -> None:
            for layer in readers[node]:
                see(layer, value)

        watch = Watch(self.graph.eval(), readers, show)
        with torch.no_grad():
            for inputs, _, _ in self._batches("calibration"):
                watch(inputs)

    def _loss(self, outputs: list[Tensor], nested: Any, targets: Any) -> Sequence[Tensor | None]:
        if self.task.loss is None:
            raise StepError(f"This criterion needs `loss`, which the task {self.task.name!r} does not have.", "Task(..., loss=...)")
        return torch.autograd.grad(total(self.task.loss(nested, targets)), outputs, retain_graph=True, allow_unused=True)

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


def _gram_bytes(layer: Layer, graph: Graph) -> int:
    groups, _, height = to_matrix(layer, graph.tensor(layer.weight).detach()).shape
    return 8 * groups * height * height
