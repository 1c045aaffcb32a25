"""Low rank plus a residual of few bits: nearer than integers alone, small in the file, and it trains."""

import pytest
import torch
from torch import nn

import multum
from multum import Task, compress
from multum.distill import Logits
from multum.errors import StepError
from multum.export import to_onnx_bytes, verify
from multum.factorize import Quantized
from multum.graph import layers
from multum.quantize import Static, WeightOnly


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(32 * 9, 20))
    x = torch.randn(32, 3, 8, 8)
    batches = [(x, torch.zeros(32, dtype=torch.long))]
    return Task(model.eval(), x[:2], train=batches, calibration=batches, loss=nn.functional.cross_entropy)


def off(task: Task, step) -> float:
    x = task.calibration[0][0]
    wanted = task.original(x)
    return float(((compress(task, step).graph(x) - wanted).norm() / wanted.norm()).detach())


def test_factors_bring_it_nearer_the_more_the_higher_their_rank(task):
    alone = off(task, WeightOnly(bits=2, edges=2))
    two, eight = (off(task, Quantized(bits=2, rank=rank)) for rank in (2, 8))
    assert eight < 0.8 * two
    assert two < 0.95 * alone


def test_turns_of_fitting_and_rounding_miss_less_than_one(task):
    missed = [Quantized(bits=2, rank=8, rounds=r).plan(task.original, task).changes for r in (1, 6)]
    for name in missed[0]:
        assert missed[1][name]["missed"] <= missed[0][name]["missed"] < missed[0][name]["alone"]
    assert missed[1]["5"]["missed"] < 0.97 * missed[0]["5"]["missed"]
    assert missed[0]["5"]["bits"] == 2 + 32 * 8 * (20 + 288) / (20 * 288)  # integers, and two factors in float


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (nn.Linear(40, 30), torch.randn(2, 4, 40)),
        (nn.Embedding(50, 40), torch.randint(0, 50, (2, 7))),
        (nn.Conv1d(20, 30, 3), torch.randn(2, 20, 9)),
    ],
)
def test_of_eight_bits_it_computes_nearly_the_same(module, example):
    torch.manual_seed(0)
    module.reset_parameters()
    task = Task(nn.Sequential(module).eval(), example)
    result = compress(task, Quantized(rank=8, bits=8, samples=0))
    wanted = task.original(example).detach()
    torch.testing.assert_close(result.graph(example), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    kinds = [layer.kind for layer in layers(result.graph)]
    assert len(kinds) == 3


def test_integers_are_small_in_the_file_and_all_of_it_trains_quantizes_and_exports(task, tmp_path):
    result = compress(task, [Quantized(bits=2, rank=2), Logits(epochs=2.0), Static()])
    names = [layer.name for layer in layers(result.graph)]
    assert names == [part for base in "025" for part in (base, f"{base}.factor0", f"{base}.factor1")]
    multum.save(result, tmp_path / "model.mip", task)
    assert (tmp_path / "model.mip").stat().st_size < sum(p.numel() for p in task.original.parameters())
    x = task.example
    torch.testing.assert_close(multum.load(tmp_path / "model.mip")(x), result.graph(x))
    verify(result.graph, to_onnx_bytes(result.graph))


def test_what_does_not_pay_is_kept_and_bad_options_are_refused(task):
    plan = Quantized(rank=18).plan(task.original, task)
    assert plan.skipped == {"0": "the rank 18 is above its full rank 16", "5": "factors of rank 18 and 3 bits cost no less"}
    assert Quantized(rank=15, bits=8).plan(task.original, task).skipped["0"] == "factors of rank 15 and 8 bits cost no less"
    for options, text in (
        ({"rank": 0}, "rank is 0"),
        ({"bits": 1}, "1 bits"),
        ({"rounds": 0}, "rounds 0"),
        ({"samples": -1}, "samples -1"),
    ):
        with pytest.raises(StepError, match=text):
            Quantized(**options)
