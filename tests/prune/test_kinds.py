"""`prune.Neurons` and `prune.Heads`: each cuts its kind, and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, prune


class Decoder(nn.Module):
    """Attention with `heads` queries and `shared` keys and values, and a gated MLP, around residual sums."""

    def __init__(self, heads: int = 4, shared: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.shared = heads, shared
        self.q, self.k, self.v = nn.Linear(16, heads * 4), nn.Linear(16, shared * 4), nn.Linear(16, shared * 4)
        self.out, self.gate, self.up, self.down, self.head = (
            nn.Linear(heads * 4, 16), nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(-1, 5, self.heads, 4).transpose(1, 2)
        k, v = (layer(x).view(-1, 5, self.shared, 4).transpose(1, 2) for layer in (self.k, self.v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).reshape(-1, 5, self.heads * 4))
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(x.mean(1))


def made(heads: int = 4, shared: int = 4) -> Task:
    model = Decoder(heads, shared)
    data = [(torch.randn(16, 5, 16), torch.zeros(16)) for _ in range(2)]
    return Task(model, data[0][0], calibration=data)


def shapes(task: Task, step: prune.Channels) -> dict[str, tuple[int, ...]]:
    graph = compress(task, step).graph
    before = dict(task.original.named_tensors())
    with torch.no_grad():
        assert graph(torch.randn(3, 5, 16)).shape == (3, 3)
    return {name: tuple(t.shape) for name, t in graph.named_tensors() if t.shape != before[name].shape and t.ndim == 2}


def test_neurons_of_a_gated_mlp_and_nothing_else() -> None:
    found = shapes(made(), prune.Neurons(ratio=0.25))
    assert found == {"gate.weight": (24, 16), "up.weight": (24, 16), "down.weight": (16, 24)}


def test_heads_and_nothing_else() -> None:
    found = shapes(made(), prune.Heads(ratio=0.25))
    assert found == {"q.weight": (12, 16), "k.weight": (12, 16), "v.weight": (12, 16), "out.weight": (16, 12)}


def test_of_shared_heads_and_their_queries_what_comes_closer_to_the_share() -> None:
    third = shapes(made(6, 2), prune.Heads(ratio=1 / 3))
    assert third == {"q.weight": (16, 16), "out.weight": (16, 16)}
    half = shapes(made(6, 2), prune.Heads(ratio=0.5, allocation="uniform"))
    assert half == {"q.weight": (12, 16), "k.weight": (4, 16), "v.weight": (4, 16), "out.weight": (16, 12)}


def test_a_head_that_says_nothing_goes_first_whatever_its_queries_are() -> None:
    task = made()
    with torch.no_grad():
        task.model.out.weight[:, 8:12] = 0
    plan = prune.Heads(ratio=0.25).plan(task.original, task)
    assert [change["keep"] for change in plan.changes.values()] == [[0, 1, 3]]


@pytest.mark.parametrize("step", [prune.Neurons(), prune.Heads()], ids=str)
def test_layers_without_their_kind_are_skipped_with_the_reason(step: prune.Channels) -> None:
    task = Task(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.zeros(2, 3, 4, 4))
    plan = step.plan(task.original, task)
    assert plan.changes == {}
    assert plan.skipped == {"0": "its outputs are channels", "2": "it is an output of the model"}
