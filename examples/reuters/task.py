"""all-MiniLM-L6-v2 with a linear head, on Reuters R8."""

import torch
from data import Batches, Inputs, splits
from model import trained
from torch import Tensor

import multum

CALIBRATION = 200


def accuracy(predict, data) -> Tensor:
    """100 for each document put into its class, 0 for each other, [n]."""
    return torch.cat([100.0 * (predict(inputs).argmax(1) == labels).float() for inputs, labels in data])


def first(part: tuple[Inputs, Tensor], count: int) -> tuple[Inputs, Tensor]:
    inputs, labels = part
    return {name: value[:count] for name, value in inputs.items()}, labels[:count]


def task() -> multum.Task:
    parts = splits()
    return multum.Task(
        trained(),
        first(parts["train"], 8)[0],
        train=Batches(*parts["train"], 32, shuffle=True),
        calibration=Batches(*first(parts["train"], CALIBRATION), 20),
        validation=Batches(*parts["validation"], 50),
        test=Batches(*parts["test"], 50),
        loss=torch.nn.functional.cross_entropy,
        metric=accuracy,
        name="all-MiniLM-L6-v2 on Reuters R8",
    )
