"""Distillation as a step: it recovers what pruning took, on real images, and never touches the teacher."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multum.distill import Hidden, Logits, hidden
from multum.errors import StepError, TrainError
from multum.graph import Graph, capture
from multum.step import Recipe, compress, methods
from multum.task import Task, call
from multum.train import default_rate

torch.set_num_threads(1)
EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, classes)
        nn.init.normal_(self.head.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.norm(self.body(x)))
        return {"logits": self.head(hidden), "hidden": hidden}


def task_of(model: nn.Module, **parts: object) -> Task:
    torch.manual_seed(3)
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(12)]
    return Task(model, data[0][0], train=data, **parts)


def forget(graph: Graph) -> Graph:
    """The same graph with half of its largest weights gone."""
    with torch.no_grad():
        for weight in (p for p in graph.parameters() if p.ndim > 1):
            weight[weight.abs() > weight.abs().median()] *= 0.1
    return graph


def distance(student: Graph, teacher: Graph, x: Tensor) -> float:
    """Mean squared difference of the probabilities."""
    ours, theirs = (torch.softmax(call(graph, x)["logits"], 1) for graph in (student, teacher))
    return (ours - theirs).square().mean().item()


def test_it_is_found_by_its_name_and_its_options() -> None:
    assert methods()["distill.Logits"] is Logits
    step = Logits(epochs=0.5, temperature=2.0)
    assert Recipe.from_data(Recipe([step]).to_data()) == Recipe([step])
    assert str(step) == "distill.Logits(epochs=0.5, temperature=2.0)"


def test_the_student_comes_near_the_teacher_without_any_labels() -> None:
    task = task_of(Net())
    teacher, student = task.original, forget(task.original.copy().requires_grad_(True))
    x = task.train[0][0]
    before, bits = distance(student, teacher, x), teacher.fingerprint()
    step = Logits(epochs=30, learning_rate=0.01)
    measured = step.apply(student, step.plan(student, task), task, None)
    assert distance(student, teacher, x) < 0.1 * before
    assert measured["loss_last"] < 0.3 * measured["loss_first"]
    assert measured["steps"] == 360
    assert teacher.fingerprint() == bits
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_tasks_loss_gets_the_rest() -> None:
    asked = []

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        asked.append(1)
        return nn.functional.cross_entropy(outputs["logits"], targets)

    for alpha, calls in ((0.0, 12), (0.5, 12), (1.0, 0)):
        asked.clear()
        result = compress(task_of(Net(), loss=loss), Logits(alpha=alpha))
        assert len(asked) == calls
        assert result.records[0].changes["*"]["alpha"] == alpha
    plan = Logits().plan(capture(Net(), torch.randn(2, 6)), task_of(Net()))
    assert plan.changes["*"] == {"epochs": 1.0, "learning_rate": 1e-3, "optimizer": "adamw", "bits": None, "temperature": 4.0, "alpha": 1.0}


def test_the_default_rate_is_smaller_without_batch_normalization() -> None:
    with_norm, without = capture(Net(), torch.randn(2, 6)), capture(nn.Linear(6, 3), torch.randn(2, 6))
    assert default_rate(with_norm, "adamw") == pytest.approx(1e-3)
    assert default_rate(without, "adamw") == pytest.approx(1e-4)
    assert default_rate(with_norm, "sgd") == pytest.approx(0.05)
    assert default_rate(without, "sgd") == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, StepError, "temperature is 0.0"),
        ({"alpha": 1.5}, StepError, "alpha is 1.5"),
        ({"alpha": 0.0}, StepError, "has no loss"),
        ({"optimizer": "adam"}, TrainError, "'adam'"),
        ({"learning_rate": 0.0}, TrainError, "learning_rate is 0.0"),
        ({"epochs": -1.0}, TrainError, "epochs is -1.0"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options: dict, error: type[Exception], message: str) -> None:
    task = task_of(Net())
    with pytest.raises(error, match=message):
        Logits(**options).plan(task.original.copy(), task)


def test_another_number_of_classes_names_both() -> None:
    task = task_of(Net(classes=10))
    student = capture(Net(classes=3), task.example).requires_grad_(True)
    step = Logits()
    with pytest.raises(StepError, match=r"student gives logits \[16, 3\].*teacher logits \[16, 10\]"):
        step.apply(student, step.plan(student, task), task, None)


def test_it_needs_train_data() -> None:
    with pytest.raises(StepError, match="needs `train`"):
        compress(Task(Net(), torch.randn(2, 6)), Logits())


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch) -> Task:
    """The trained ResNet-20 with 3,200 images to recover on and 1,000 others to judge it by."""
    from safetensors.torch import load_file

    if not (EXAMPLE / "resnet20.safetensors").is_file():
        pytest.skip("the checkpoint of the example is not there")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("data", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import data
    import model

    try:
        images, labels = data.load("train")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    network = model.ResNet20()
    network.load_state_dict(load_file(EXAMPLE / "resnet20.safetensors"))
    return Task(
        network,
        images[:2],
        train=data.Batches(images[:3200], labels[:3200], 128, augment=True),
        validation=data.Batches(images[-1000:], labels[-1000:], 500),
        loss=nn.functional.cross_entropy,
        metric=lambda predict, batches: torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in batches]),
    )


def test_it_recovers_a_network_that_lost_a_third_of_its_channels(fashion: Task) -> None:
    graph = fashion.original.copy().requires_grad_(True)
    with torch.no_grad():
        for weight in (p for p in graph.parameters() if p.ndim == 4 and p.shape[1] > 1):
            weight[weight.abs().sum((1, 2, 3)).argsort()[: len(weight) // 3]] = 0
    step, bits = Logits(), fashion.original.fingerprint()
    measured = step.apply(graph, step.plan(graph, fashion), fashion, None)
    (_, before), (_, after) = measured["validation"]
    original = float(fashion.score(fashion.original).mean())
    assert before < original - 30
    assert after > original - 5
    assert fashion.original.fingerprint() == bits


def labelled(lies: bool) -> Task:
    """Few labels; the teacher knows the rule by which they are given, or has it the wrong way round."""
    torch.manual_seed(0)
    rule = nn.Linear(6, 3)
    x, more = torch.randn(256, 6), torch.randn(512, 6)
    labels = rule(x).argmax(1)
    noisy = torch.where(torch.rand(256) < 0.4, torch.randint(0, 3, (256,)), labels)
    if lies:
        noisy = labels
        rule.weight.data *= -1
        rule.bias.data *= -1
    true = rule(more).argmin(1) if lies else rule(more).argmax(1)
    train = list(zip(x.split(32), noisy.split(32), strict=True))

    def accuracy(predict: object, data: object) -> Tensor:
        return torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in data])

    return Task(rule, x[:2], train=train, validation=[(more, true)], loss=nn.functional.cross_entropy, metric=accuracy)


@pytest.mark.parametrize("lies", [False, True])
def test_the_gain_is_measured_and_a_teacher_that_does_not_help_is_dropped(lies: bool) -> None:
    task = labelled(lies)
    torch.manual_seed(1)
    student = nn.Linear(6, 3)
    result = compress(task, Logits(epochs=30, learning_rate=0.03, baseline=True), student=student)
    measured = result.records[0].measured
    score = float(task.score(result.graph).mean())
    assert measured["taught"] is not lies
    assert measured["gain"] < -10 if lies else measured["gain"] > 0
    assert score == pytest.approx(measured["alone"] if lies else measured["alone"] + measured["gain"])


def test_a_gain_needs_a_loss_and_something_to_measure_it_on() -> None:
    with pytest.raises(StepError, match="gain of the original cannot be measured"):
        compress(task_of(Net()), Logits(baseline=True))


@pytest.mark.parametrize("likeness", ["decoupled", "correlated", "standardized"])
def test_another_likeness_brings_the_student_to_the_teacher_too(likeness: str) -> None:
    task = task_of(Net(), loss=lambda outputs, targets: nn.functional.cross_entropy(outputs["logits"], targets))
    student, x = forget(task.original.copy().requires_grad_(True)), task.train[0][0]
    before = distance(student, task.original, x)
    step = Logits(epochs=20, learning_rate=0.01, likeness=likeness, alpha=1.0)
    step.apply(student, step.plan(student, task), task, None)
    assert distance(student, task.original, x) < 0.7 * before


def test_a_likeness_that_is_none_and_one_that_needs_labels() -> None:
    task = task_of(Net())
    with pytest.raises(StepError, match="no likeness 'hard'"):
        compress(task, Logits(likeness="hard"))
    with pytest.raises(StepError, match="Logits without labels cannot be compared decoupled"):
        compress(task.but(train=[(x, None) for x, _ in task.train]), Logits(likeness="decoupled"))


def test_hidden_values_that_do_not_help_are_dropped_while_the_outputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint draws the hidden value to nothing: what is kept is the training without it."""
    task = labelled(lies=False)
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    task = Task(compress(task, Logits(alpha=1.0, epochs=40, learning_rate=0.03), student=teacher).graph, task.example, **{
        name: getattr(task, name) for name in ("train", "validation", "loss", "metric")
    })  # fmt: skip
    monkeypatch.setitem(hidden._HIDDEN, "patient", lambda ours, theirs: ours.square().mean())
    torch.manual_seed(2)
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    step = Hidden(loss="patient", weight=1000.0, epochs=20, learning_rate=0.03, baseline=True)
    result = compress(task, step, student=student)
    measured = result.records[0].measured
    assert measured["kept_terms"] == "outputs"
    assert measured["taught"] is True
    assert float(task.score(result.graph).mean()) == pytest.approx(measured["outputs"])
    assert measured["outputs"] > measured["alone"] + measured["gain"]
