"""Promise 9: the whole way, half of the channels off, int8, saved, loaded, exported, on models of very different kinds."""

import pytest
import torch

import multum
from multum.graph import layers
from multum.prune import Channels
from multum.quantize import Static
from multum.task import call, tensors
from multum.testing.conformance import task

KINDS = ("lstm", "vit", "unet", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_way(kind, tmp_path):
    if kind in ("vit", "gpt2"):
        pytest.importorskip("transformers")
    made = task(kind)
    result = multum.compress(made, [Channels(ratio=0.5), Static()])
    pruned, quantized = result.records
    weighty = {layer.name for layer in layers(result.graph) if layer.kind in ("conv", "linear", "embedding", "rnn")}
    assert weighty <= set(quantized.changes) | set(quantized.skipped), "a layer is neither changed nor skipped with a reason"
    assert all([*pruned.skipped.values(), *quantized.skipped.values()])
    assert pruned.parameters[1] < 0.75 * pruned.parameters[0]
    multum.save(result, tmp_path / "small.mip", made)
    loaded = multum.load(tmp_path / "small.mip")
    with torch.no_grad():
        before, after = (list(tensors(call(graph, made.example))) for graph in (result.graph, loaded))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    multum.export(loaded, tmp_path / "small.onnx", inputs=[made.example])  # raises when the file does not compute the same
    found = multum.Session(tmp_path / "small.onnx", "onnxruntime").predict(made.example)
    assert [one.shape for one in tensors(found)] == [one.shape for one in before]
    original = multum.save(made.original, tmp_path / "original.mip")
    assert (tmp_path / "small.mip").stat().st_size < 0.5 * original
