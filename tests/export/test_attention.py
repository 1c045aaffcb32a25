"""Attention is written in operators that engines know as one, with the zeros of PyTorch where no key is left."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import multum
from multum.export import to_onnx_bytes
from multum.graph import capture
from multum.runtime.engines import installed


class Attention(nn.Module):
    def __init__(self, form, scale=None):
        super().__init__()
        self.form, self.scale = form, scale
        self.register_buffer("bias", torch.randn(1, 2, 5, 7))

    def forward(self, query, key, value, mask):
        if self.form == "bool":
            given = mask[:, None] > 0
        elif self.form == "float":
            given = torch.zeros(mask.shape)[:, None].masked_fill(mask[:, None] == 0, float("-inf")) + self.bias
        else:
            given = self.bias if self.form == "constant" else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=given, is_causal=self.form == "causal", scale=self.scale)


def example(rows=2):
    mask = torch.ones(rows, 5, 7, dtype=torch.long)
    mask[0, 1, 3:], mask[1, 2] = 0, 0  # a query with few keys, and one with none
    shapes = ((rows, 2, 5, 4), (rows, 2, 7, 4), (rows, 2, 7, 4))
    return (*(torch.randn(shape) for shape in shapes), mask)


@pytest.mark.parametrize("engine", installed())
@pytest.mark.parametrize(("form", "scale"), [("none", None), ("bool", None), ("float", 0.3), ("constant", 2.0), ("causal", None)])
def test_answers_are_those_of_pytorch(tmp_path, engine, form, scale):
    torch.manual_seed(0)
    model, path = Attention(form, scale).eval(), tmp_path / "model.onnx"
    path.write_bytes(to_onnx_bytes(capture(model, example())))
    inputs = example(3)
    with torch.no_grad():
        expected = model(*inputs)
    found = multum.Session(path, engine=engine)(*inputs)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-4, atol=1e-5)
    if form in ("bool", "float"):
        assert not expected[1, :, 2].any()


def test_openvino_runs_it_as_one_operator(tmp_path):
    openvino = pytest.importorskip("openvino")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x, mask):
            parts = [part(x).view(*x.shape[:2], 2, 32).transpose(1, 2) for part in self.parts]
            return F.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None] > 0).transpose(1, 2).reshape(x.shape)

    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx_bytes(capture(Block(), (torch.randn(2, 16, 64), torch.ones(2, 16, dtype=torch.long)))))
    compiled = openvino.Core().compile_model(path, "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert not {"Softmax", "MatMul"} & {*kinds}, kinds
