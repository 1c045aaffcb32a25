"""What data say, against the same by one sample at a time."""

import pytest
import torch
from torch import Tensor, nn

from multum import Task
from multum.analyze.evidence import Evidence
from multum.errors import StepError, TaskError
from multum.graph.layers import layers
from multum.prune.criteria import CRITERIA


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2, stride=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    data = [(torch.randn(size, 1, 4, 4), torch.randint(0, 4, (size,))) for size in (40, 24, 40)]
    return Task(model, data[0][0], train=data, calibration=data, loss=cross_entropy)


def by_sample(task: Task) -> list[dict[str, Tensor]]:
    """The gradient of the loss of each of the first 64 samples."""
    found = []
    for inputs, targets in task.train[:2]:
        for x, y in zip(inputs, targets, strict=True):
            task.model.zero_grad()
            cross_entropy(task.model(x[None]), y[None]).backward()
            found.append({name: p.grad.clone() for name, p in task.model.named_parameters()})
    return found


def test_the_gradient_is_the_mean_over_samples(task: Task) -> None:
    found, each = Evidence(task.original, task, 64).gradients, by_sample(task)
    for name in ("0.weight", "3.weight"):
        torch.testing.assert_close(found[name], torch.stack([gradient[name] for gradient in each]).mean(0))


def test_the_fisher_diagonal_is_right_in_expectation(task: Task) -> None:
    each = by_sample(task)
    seeds = [Evidence(task.original, Task(task.model, task.example, train=task.train, loss=task.loss, seed=seed), 64) for seed in range(60)]
    for name in ("0.weight", "3.weight"):
        wanted = torch.stack([gradient[name] for gradient in each]).square().mean(0)
        found = torch.stack([evidence.squares[name] for evidence in seeds]).mean(0)
        assert float((found - wanted).norm() / wanted.norm()) < 0.15


def test_the_curvature_is_that_of_the_outputs_in_expectation(task: Task) -> None:
    """For the last layer by hand: each output sees only its own row, so the diagonal is the mean square of what it reads."""
    x = torch.cat([inputs for inputs, _ in task.calibration[:2]])
    read = task.model[:3](x).detach()
    scale = torch.cat([task.model(part).detach().square().mean().reshape(1).repeat(len(part)) for part in x.split(16)]).mean()
    wanted = (read.square().mean(0) / scale).expand(4, -1)
    seeds = [Evidence(task.original, Task(task.model, task.example, train=task.train, seed=seed), 64) for seed in range(60)]
    found = torch.stack([evidence.curvature["3.weight"] for evidence in seeds]).mean(0)
    assert float((found - wanted).norm() / wanted.norm()) < 0.2


def test_the_powers_are_sums_of_squares_of_inputs(task: Task) -> None:
    found = Evidence(task.original, task, 64).powers
    x = torch.cat([inputs for inputs, _ in task.calibration[:2]])
    torch.testing.assert_close(found["3"][0], task.model[:3](x).detach().square().sum(0).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["0"][0], nn.functional.unfold(x, 2, stride=2).square().sum((0, 2)).double(), rtol=1e-5, atol=1e-5)


def test_as_many_samples_as_asked_for_and_no_more(task: Task) -> None:
    sizes = [size for _, _, size in Evidence(task.original, task, 50)._batches("train")]
    assert sizes == [16, 16, 8, 10]


def test_the_graph_stays_as_it_was(task: Task) -> None:
    before, evidence = task.original.fingerprint(), Evidence(task.original, task, 8)
    _ = evidence.gradients, evidence.squares, evidence.curvature, evidence.powers
    assert task.original.fingerprint() == before
    assert not any(p.requires_grad or p.grad is not None for p in task.original.parameters())


def test_criteria_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    x, y = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.zeros(2, 2)
    task = Task(model, x, train=[(x, y)], loss=lambda outputs, targets: (outputs - targets).square().sum() / 2 / len(outputs))
    graph, (layer,) = task.original, layers(task.original)
    evidence = Evidence(graph, task)
    w, outputs = model.weight.detach(), x @ model.weight.detach().T
    gradient = outputs.T @ x / 2
    wanted = {
        "l1": [[1, 2], [3, 0]],
        "l2": [[1, 4], [9, 0]],
        "lamp": [[1 / 14, 4 / 13], [1, 0]],
        "gradient": gradient.abs().tolist(),
        "taylor": (w * gradient).square().tolist(),
        "wanda": (w.abs() * torch.tensor([10.0, 5.0]).sqrt()).tolist(),
    }
    for name, scores in wanted.items():
        torch.testing.assert_close(CRITERIA[name](evidence, layer), torch.tensor(scores, dtype=torch.double), rtol=1e-5, atol=1e-6)
    random = CRITERIA["random"](evidence, layer)
    assert torch.equal(random, CRITERIA["random"](Evidence(graph, task), layer))
    assert 0 <= random.min() < random.max() < 1
    for name in ("fisher", "obd"):
        assert CRITERIA[name](evidence, layer).flatten()[3] == 0
        assert (CRITERIA[name](evidence, layer).flatten()[:3] > 0).all()


def test_what_the_task_lacks_is_named(task: Task) -> None:
    bare = Task(task.model, task.example)
    with pytest.raises(TaskError, match="no train data"):
        _ = Evidence(bare.original, bare).gradients
    unlabelled = Task(task.model, task.example, train=task.train)
    with pytest.raises(StepError, match="needs `loss`"):
        _ = Evidence(unlabelled.original, unlabelled).squares


def test_moments_of_what_hardly_varies_are_right() -> None:
    """Inputs of 50 and a noise of 1e-3: squares about zero in single precision would drown the noise's."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    data = [(50 + 1e-3 * torch.randn(64, 3), torch.zeros(64)) for _ in range(3)]
    task = Task(model, data[0][0], calibration=data)
    gram, mean, count = Evidence(task.original, task, 192).moments(layers(task.original)[0])
    x = torch.cat([part for part, _ in data]).double()
    assert count == 192
    torch.testing.assert_close(mean[0], x.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(gram[0], (x - x.mean(0)).T @ (x - x.mean(0)), rtol=0.02, atol=1e-6)
