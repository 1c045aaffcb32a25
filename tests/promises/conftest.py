"""A small task with real structure: residual blocks, learned on data that can be learned in seconds."""

import pytest
import torch
from torch import nn

import multum
from multum.testing.zoo import Residual, conv


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [count, 3, 16, 16] with a bright stripe in the row that is the class, one of five."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=random)
    x = torch.randn(count, 3, 16, 16, generator=random)
    x[torch.arange(count), :, labels * 3] += 1.5
    return x, labels


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = images(count, seed)
    return list(zip(x.split(64), y.split(64), strict=True))


def accuracy(predict, data) -> torch.Tensor:
    return torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in data])


@pytest.fixture(scope="session")
def task() -> multum.Task:
    torch.manual_seed(0)
    body = (conv(3, 16), Residual(16, 16, 1), Residual(16, 32, 2))
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(32 * 64, 5))
    train = batches(1024, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(3):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    held = batches(512, 2)
    made = multum.Task(
        model.eval(), train[0][0][:2], train, train[:4], held, batches(512, 3), nn.functional.cross_entropy, accuracy, name="stripes"
    )
    assert accuracy(made.original, held).mean() > 90
    return made
