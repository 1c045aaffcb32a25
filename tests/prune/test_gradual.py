"""`prune.Gradual` and `prune.Rewind`: schedules, zeros that come and go during a training, and values that come back."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from multum import Recipe, Task, compress
from multum.analyze.evidence import Evidence
from multum.errors import StepError, TrainError
from multum.graph import layers
from multum.prune import Gradual, Rewind, Weights
from multum.prune.gradual import Thinning
from multum.step import make
from multum.train import Training, fit
from multum.train.losses import soft_labels


def task(**options: Any) -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs = [torch.randn(16, 12) for _ in range(20)]
    data = [(x, x[:, :4].argmax(1)) for x in inputs]
    return Task(model, inputs[0], **({"train": data, "loss": nn.functional.cross_entropy} | options))


def zeros(graph: Any, name: str) -> float:
    return float((graph.tensor(name) == 0).float().mean())


@given(
    curve=st.sampled_from(["polynomial", "cosine"]),
    power=st.floats(0.5, 4),
    begin=st.floats(0, 0.4),
    length=st.floats(0.1, 0.6),
    start=st.floats(0, 0.5),
)
def test_the_share_of_zeros_grows_from_the_start_to_the_ratio(curve: str, power: float, begin: float, length: float, start: float) -> None:
    how = Gradual(ratio=0.8, curve=curve, power=power, begin=begin, end=begin + length)
    shares = [how.share(step / 50, start) for step in range(51)]
    assert shares[0] == pytest.approx(start)
    assert shares[-1] == pytest.approx(0.8)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(shares))


def test_the_polynomial_is_that_of_the_paper() -> None:
    # Zhu & Gupta, equation 1: s = s_f + (s_i - s_f) (1 - t)^3
    assert Gradual(ratio=0.9, end=1.0).share(0.5) == pytest.approx(0.9 - 0.9 * 0.5**3)
    assert Gradual(ratio=0.9, curve="cosine", end=1.0).share(0.5) == pytest.approx(0.45)


@pytest.mark.parametrize("criterion", ["lamp", "l1", "movement"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_so_many_weights_are_zero_in_the_end_and_stay_zero(criterion: str, allocation: str) -> None:
    from multum.distill import Logits

    recipe = Recipe([Gradual(ratio=0.75, criterion=criterion, allocation=allocation, epochs=3), Logits(epochs=1)])
    result = compress(task(), recipe)
    shares = [zeros(result.graph, f"{index}.weight") for index in (0, 2, 4)]
    sizes = [192, 256, 64]
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes) == pytest.approx(0.75, abs=0.03)
    if allocation == "uniform":
        assert shares == pytest.approx([0.75] * 3, abs=0.01)
    assert result.records[0].measured["zeros"] == pytest.approx(0.75, abs=0.03)


def test_the_network_learns_while_it_is_thinned() -> None:
    own = task(loss=None)
    one_shot = compress(own, Weights(ratio=0.8, criterion="l1", recover=False)).graph
    gradual = compress(own, Gradual(ratio=0.8, epochs=12, learning_rate=5e-3)).graph

    def loss(graph: Any) -> float:
        return float(sum(soft_labels(graph(x), own.original(x), 4.0) for x, _ in own.train))

    with torch.no_grad():
        assert loss(gradual) < 0.5 * loss(one_shot)


def test_zeros_that_were_there_stay_and_count() -> None:
    result = compress(task(), Recipe([Weights(ratio=0.3, criterion="random", recover=False), Gradual(ratio=0.6, epochs=2)]))
    before = compress(task(), Weights(ratio=0.3, criterion="random", recover=False)).graph
    for name in ("0.weight", "2.weight", "4.weight"):
        assert bool((result.graph.tensor(name)[before.tensor(name) == 0] == 0).all())
    assert result.records[1].measured["zeros"] == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("options", [{"criterion": "movement"}, {"regrow": 0.3}], ids=str)
def test_weights_come_back(options: dict[str, Any]) -> None:
    own = task()
    graph = own.original.copy().requires_grad_(True)
    how = Gradual(ratio=0.5, begin=0.0, end=0.9, every=1, allocation="uniform", **options)
    thinning = Thinning(how, Evidence(graph, own), {layer.name: layer for layer in layers(graph)})
    seen = []

    class Watching(Thinning):
        def _choose(self) -> None:
            super()._choose()
            seen.append({name: zero.clone() for name, zero in self.zeros.items()})

    thinning.__class__ = Watching
    fit(graph, own, lambda inputs, outputs, targets: nn.functional.cross_entropy(outputs, targets), Training(epochs=2), None, [thinning])
    back = sum(int((a[name] & ~b[name]).sum()) for a, b in itertools.pairwise(seen) for name in a)
    assert back > 0
    assert thinning.met()


def test_movement_prunes_what_shrinks_and_keeps_what_grows() -> None:
    own = task()
    graph = own.original.copy().requires_grad_(True)
    weight = graph.tensor("0.weight")
    thinning = Thinning(Gradual(ratio=0.5, criterion="movement", begin=0.0, end=1.0), Evidence(graph, own), {"0": layers(graph)[0]})
    thinning.join(graph)
    weight.grad = weight.detach().sign() * torch.where(torch.arange(12) < 6, 1.0, -1.0)  # the left half is pulled to zero
    with torch.no_grad():
        thinning.after(0, 1)
    assert bool((weight[:, :6] == 0).all())
    assert bool((weight[:, 6:] != 0).all())


def test_an_interrupted_training_goes_on_to_the_same_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = task()
    step = Gradual(ratio=0.7, criterion="movement", epochs=2)
    whole = compress(own, step).graph
    monkeypatch.setattr("multum.train.loop.CHECKPOINT_SECONDS", 0.0)
    after, count = Thinning.after, 0

    def stops(self: Thinning, at: int, steps: int) -> None:
        nonlocal count
        count += 1
        if count == 25:
            raise KeyboardInterrupt
        after(self, at, steps)

    monkeypatch.setattr(Thinning, "after", stops)
    with pytest.raises(KeyboardInterrupt):
        compress(own, step, workdir=tmp_path)
    monkeypatch.setattr(Thinning, "after", after)
    resumed = compress(own, step, workdir=tmp_path).graph
    for name in ("0.weight", "2.weight", "4.weight"):
        assert torch.equal(whole.tensor(name), resumed.tensor(name))


def test_rewinding_gives_the_old_values_to_what_is_left(tmp_path: Path) -> None:
    own = task()
    for source in ("", str(tmp_path / "early.safetensors")):
        values = {name: tensor.detach().clone() for name, tensor in own.original.named_tensors()}
        if source:
            values = {name: tensor + 1 for name, tensor in values.items()}
            save_file(values, source)
        graph = compress(own, Recipe([Gradual(ratio=0.5, epochs=1), Rewind(checkpoint=source)])).graph
        weight = graph.tensor("2.weight")
        assert 0.2 < float((weight == 0).float().mean()) < 0.8
        assert torch.equal(weight[weight != 0], values["2.weight"][weight != 0])
        assert torch.equal(graph.tensor("2.bias"), values["2.bias"])


def test_rewinding_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="no weight was set to zero"):
        compress(task(), Rewind())
    with pytest.raises(StepError, match="cannot be read"):
        compress(task(), Recipe([Weights(ratio=0.5, recover=False), Rewind(checkpoint=str(tmp_path / "none"))]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"criterion": "movment"}, "'movement'"),
        ({"curve": "linear"}, "polynomial or cosine"),
        ({"begin": 0.8}, "begin < end"),
        ({"end": math.nan}, "begin < end"),
        ({"power": 0.0}, "above 0"),
        ({"regrow": 1.0}, "below 1"),
        ({"allocation": "all"}, "global or uniform"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(StepError, match=said):
        make(Gradual, options)


def test_a_training_of_the_user_s_own_cannot_give_gradients() -> None:
    def own_fit(graph: Any, loss: Any) -> None:
        optimizer = torch.optim.SGD(graph.parameters(), 0.01)
        for inputs, targets in task().train:
            loss(inputs, graph(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(TrainError, match="no gradient"):
        compress(task(fit=own_fit), Gradual(criterion="movement"))
