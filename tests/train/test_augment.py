"""Changed inputs of the student, averaged weights, and curves."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multum.distill import Hidden, Logits
from multum.errors import StepError, TrainError
from multum.step import compress
from multum.task import Task
from multum.train import Augment, Average, Training, augment, fit, shown

torch.set_num_threads(1)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.arange(64 * 16 * 16).float().view(64, 1, 16, 16)


def test_a_flip_turns_some_and_a_crop_moves_each(images: Tensor) -> None:
    turned = augment.flip(images)
    same, other = ((turned == wanted).flatten(1).all(1) for wanted in (images, images.flip(-1)))
    assert bool((same ^ other).all())
    assert 10 < int(other.sum()) < 54
    moved = augment.crop(images.repeat(1, 3, 1, 1))
    shift = moved[:, :, 5, 5] - images.repeat(1, 3, 1, 1)[:, :, 5, 5]
    assert moved.shape == (64, 3, 16, 16)
    assert set((shift[:, 0] % 16).tolist()) == {0.0, 1.0, 2.0, 14.0, 15.0}
    assert bool((shift == shift[:, :1]).all())  # all channels alike


def test_a_quarter_is_cut_out(images: Tensor) -> None:
    changed = (augment.cutout(images) != images).float()
    assert changed.flatten(1).mean(1).tolist() == pytest.approx([0.25] * 64, abs=0.01)
    rows = changed[0, 0].any(1).nonzero().flatten()
    assert rows[-1] - rows[0] == 7
    assert len({tuple(one.nonzero()[0].tolist()) for one in changed[:, 0]}) > 10  # anywhere


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_samples_and_their_shares_agree(name: str) -> None:
    torch.manual_seed(0)
    classes = torch.arange(8)
    images = classes.float()[:, None, None, None].expand(8, 1, 16, 16).contiguous()
    for _ in range(10):
        found, mix = getattr(augment, name)(images)
        wanted = augment.mixed({"x": classes.float()}, mix)["x"]
        torch.testing.assert_close(found.mean((1, 2, 3)), wanted, rtol=0, atol=1e-4)


def test_tokens_come_from_the_same_place_of_another_sample_or_are_masked() -> None:
    torch.manual_seed(0)
    ids = torch.arange(12) + 100 * torch.arange(40)[:, None]
    found = augment.tokens(ids, 0.5)
    assert bool((found % 100 == ids % 100).all())
    assert 0.3 < float((found != ids).float().mean()) < 0.6
    assert set(augment.tokens(ids, 0.5, token=7).flatten().tolist()) <= {7, *ids.flatten().tolist()}


def test_the_first_tensor_that_fits_is_changed() -> None:
    inputs = {"mask": torch.ones(4, 6), "ids": torch.randint(9, 99, (4, 6)), "more": torch.randint(9, 99, (4, 6))}
    found = Augment(["tokens"]).view(inputs)
    assert list(found) == list(inputs)
    assert found["more"] is inputs["more"]
    assert not torch.equal(found["ids"], inputs["ids"])
    with pytest.raises(TrainError, match="nothing for 'crop'"):
        Augment(["crop"]).view(inputs)


def test_series_are_mixed_too() -> None:
    series, augment = torch.randn(8, 3, 12), Augment(["mixup"])
    found = augment.view((torch.randint(0, 9, (8, 3)), series))[1]
    order, share = augment.mix
    torch.testing.assert_close(found, share * series + (1 - share) * series[order])


class Watched(nn.Module):
    """The mean of an image under a scale, and what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean((2, 3)))


def made(**parts: object) -> Task:
    torch.manual_seed(0)
    data = [(torch.randn(16, 1, 8, 8), torch.randint(0, 2, (16,))) for _ in range(6)]
    return Task(Watched(), data[0][0], train=data, validation=data, loss=nn.functional.cross_entropy, **parts)


def test_the_teacher_sees_what_came_and_the_student_what_was_made_of_it() -> None:
    task = made()
    graph, sums = task.original.copy().requires_grad_(True), []

    class Doubled(Augment):
        def view(self, inputs: Tensor) -> Tensor:
            return 2 * inputs

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        sums.append((inputs, outputs.detach()))
        return outputs.square().mean()

    fit(graph, task, loss, Training(learning_rate=1e-9), companions=[Doubled([])])
    for inputs, outputs in sums:
        torch.testing.assert_close(outputs, task.original(2 * inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("names", ["mixup", ("crop", "flip", "cutmix"), "cutout"])
def test_a_student_learns_from_changed_inputs(names: str | tuple[str, ...]) -> None:
    torch.manual_seed(1)
    task = made()
    result = compress(task, Logits(augment=names, epochs=3, learning_rate=1e-3), student=Watched())
    assert result.records[0].measured["loss_last"] < result.records[0].measured["loss_first"] * 1.1


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Logits(augment="mixupp"), "such as 'mixup'"),
        (Logits(augment=("mixup", "cutmix")), "two ways"),
        (Logits(augment="tokens"), "nothing for 'tokens'"),
        (Logits(average=1.0), "decay of the average is 1.0"),
        (Hidden(augment="flip", layers="layer"), "do not answer"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(step: Logits, said: str) -> None:
    with pytest.raises((TrainError, StepError), match=said):
        compress(made(), step, student=Watched())


def test_the_tasks_own_fit_cannot_change_inputs() -> None:
    task = made(fit=lambda graph, loss: None)
    with pytest.raises(TrainError, match="'Augment'"):
        compress(task, Logits(augment="flip"), student=Watched())


def test_the_average_of_the_weights_is_the_result_and_a_resumed_training_gives_its_bits(tmp_path: Path) -> None:
    task, past = made(metric=None), []
    start = task.original.copy().requires_grad_(True)

    class Noted(Average):
        def after(self, step: int, steps: int) -> None:
            super().after(step, steps)
            past.append(self.own["layer.weight"].detach().clone())

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    graph = start.copy()
    fit(graph, Task(task.model, task.example, train=task.train), loss, Training(learning_rate=0.1, warmup=0), None, [Noted(0.5)])
    wanted = start.tensor("layer.weight").clone()
    for step, value in enumerate(past):
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
    torch.testing.assert_close(graph.tensor("layer.weight"), wanted)
    assert not torch.equal(graph.tensor("layer.weight"), past[-1])


def test_curves_are_written_when_asked_for(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with shown(tmp_path):
        for _ in range(2):
            compress(made(), Logits(epochs=2))
    compress(made(), Logits())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01", "02"]
    events = EventAccumulator(str(tmp_path / "01")).Reload()
    assert {"loss", "loss/teacher", "loss/task", "score", "rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("score")] == [0, 6, 12]
    assert "layer.weight" in events.Tags()["histograms"]
    found = {name: events.Scalars(name)[-1].value for name in ("loss", "loss/teacher", "loss/task")}
    assert found["loss"] == pytest.approx(found["loss/teacher"] + found["loss/task"], rel=1e-5)


def test_without_tensorboard_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainError, match=r"pip install 'multum\[tensorboard\]'"), shown(tmp_path):
        raise AssertionError
