"""Promise 8: the second technique keeps the gain of the first, and the teacher's bits never change."""

import itertools

import pytest
import torch

import multum
from multum.distill import Logits
from multum.graph.file import quantized_weights, to_integers
from multum.prune import NM, Channels, Weights
from multum.quantize import Half, Static, WeightOnly

CHAINS = (
    (Channels(ratio=0.5), Logits(epochs=0.3), WeightOnly(bits=3), Logits(epochs=0.3), Static(), Half()),
    (Weights(ratio=0.8), Logits(epochs=0.3), Static(weight_bits=4), Logits(epochs=0.3), Half()),
    (Channels(ratio=0.25), Static(weight_bits=4), Logits(epochs=0.3), Half()),
)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: " ".join(step.name() for step in chain))
def test_the_file_never_grows(task, chain, tmp_path):
    before = task.original.fingerprint()
    sizes = [multum.save(task.original, tmp_path / "0.mip")]
    shapes: dict[str, torch.Size] = {}
    for count in range(1, len(chain) + 1):
        graph = multum.compress(task, chain[:count]).graph
        sizes.append(multum.save(graph, tmp_path / f"{count}.mip"))
        for name, tensor in graph.tensors.named_parameters():
            assert tensor.shape == shapes.get(name, tensor.shape), f"{name} changed its shape after it was pruned"
            shapes[name] = tensor.shape
    assert task.original.fingerprint() == before
    for step, (old, new) in zip(chain, itertools.pairwise(sizes), strict=True):
        # training spreads integers a little, and quantizers bring their scales
        assert new <= 1.03 * old + 200, f"{step} made the file grow from {old} to {new} bytes"
    assert sizes[-1] < 0.25 * sizes[0]


@pytest.mark.parametrize("first", [Weights(ratio=0.8), NM()], ids=str)
def test_zeros_stay_zero(task, first):
    holes = {name: value == 0 for name, value in multum.compress(task, first).graph.named_tensors() if name.endswith("weight")}
    for after in ([Logits(epochs=0.3)], [Static(weight_bits=4), Logits(epochs=0.3), Half()], [WeightOnly(bits=3), Logits(epochs=0.3)]):
        graph = multum.compress(task, [first, *after]).graph
        for name in graph.sparse:
            assert not graph.tensor(name)[holes[name]].any()
            assert graph.tensor(name)[~holes[name]].any()


def test_weights_stay_on_their_grid_through_training(task):
    graph = multum.compress(task, [WeightOnly(bits=3, edges=2), Logits(epochs=0.3), Static(), Half()]).graph
    found = quantized_weights(graph)
    assert len(found) >= 6
    for name, node in found.items():
        assert to_integers(graph.tensor(name), graph, node).unique().numel() <= 7
