"""MACs by hand, one operator at a time."""

import pytest
import torch
from torch import Tensor, nn

from multum.analyze import analyze

torch.set_num_threads(1)


class Call(nn.Module):
    """A function as a model; it has a weight so that it has a device."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


def counted(model: nn.Module, *shapes: tuple[int, ...]) -> int:
    example = tuple(torch.randn(shape) for shape in shapes)
    found = analyze(model, example, latency=False)
    assert not found.uncounted
    return found.macs


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 36 * 8 * 27),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 6, 6), 9 * 8 * 27),
        (nn.Conv2d(8, 8, 3, padding="same", groups=8), (2, 8, 6, 6), 36 * 8 * 9),  # depthwise
        (nn.Conv2d(8, 4, 1, groups=2), (2, 8, 6, 6), 36 * 4 * 4),
        (nn.Conv1d(3, 5, 4), (2, 3, 10), 7 * 5 * 12),
        (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3), 8 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), 25 * 4 * 6 * 4),
        (nn.Linear(7, 5), (2, 7), 35),
        (nn.Linear(7, 5), (2, 9, 7), 9 * 35),
        (nn.Bilinear(2, 3, 4), None, None),
    ],
)
def test_layers(layer: nn.Module, shape: tuple[int, ...] | None, expected: int | None) -> None:
    if shape is None:  # no formula: said, and not taken for zero
        found = analyze(layer, (torch.randn(2, 2), torch.randn(2, 3)), latency=False)
        assert found.uncounted == {"aten.bilinear.default": "no formula for its MACs"}
        assert found.layers[0].macs is None
        assert found.macs == 0
    else:
        assert counted(layer, shape) == expected


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, ((2, 3, 4, 5), (2, 3, 5, 6)), 3 * 4 * 6 * 5),
        (torch.bmm, ((2, 4, 5), (2, 5, 6)), 4 * 6 * 5),
        (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), ((2, 3, 4, 5), (2, 3, 6, 5)), 3 * 4 * 6 * 5),
        (lambda a: torch.einsum("bij->bji", a), ((2, 3, 4),), 0),
        (lambda a, b: torch.baddbmm(torch.zeros(1, 1, 6), a, b), ((2, 4, 5), (2, 5, 6)), 4 * 6 * 5),
        # two heads: 2 x (3 queries x 7 keys x 4) and 2 x (3 x 7 x 5 values)
        (nn.functional.scaled_dot_product_attention, ((2, 2, 3, 4), (2, 2, 7, 4), (2, 2, 7, 5)), 2 * 21 * 4 + 2 * 21 * 5),
        (lambda a, b: torch.softmax(torch.relu(a) * b + 1, -1).mean(1), ((2, 3, 4), (2, 3, 4)), 0),
    ],
)
def test_products(function: object, shapes: tuple[tuple[int, ...], ...], expected: int) -> None:
    class Model(Call):
        def __init__(self) -> None:
            super().__init__(function)
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, *x: Tensor) -> Tensor:
            return super().forward(*x) * self.one

    assert counted(Model(), *shapes) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(5, 7, batch_first=True), 6 * 4 * (5 * 7 + 7 * 7)),
        (nn.GRU(5, 7, batch_first=True, num_layers=2), 6 * 3 * (5 * 7 + 7 * 7 + 7 * 7 + 7 * 7)),
        (nn.LSTM(5, 7, batch_first=True, bidirectional=True, bias=False), 6 * 2 * 4 * (5 * 7 + 7 * 7)),
    ],
)
def test_recurrent_layers_over_six_steps(layer: nn.Module, expected: int) -> None:
    assert counted(layer, (2, 6, 5)) == expected
