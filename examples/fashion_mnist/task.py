"""ResNet-20 on Fashion-MNIST, 93.44 % on the test images."""

from pathlib import Path

import torch
from data import HELD_OUT, Batches, load
from model import ResNet20
from safetensors.torch import load_file
from torch import Tensor

import multum

WEIGHTS = Path(__file__).parent / "resnet20.safetensors"
CALIBRATION = 512


def accuracy(predict, data) -> Tensor:
    """100 for each image put into its class, 0 for each other, [n]."""
    return torch.cat([100.0 * (predict(images).argmax(1) == labels).float() for images, labels in data])


def model() -> ResNet20:
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is not there. Do: python {WEIGHTS.parent / 'train.py'}")
    network = ResNet20()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def task() -> multum.Task:
    images, labels = load("train")
    train_images, train_labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    return multum.Task(
        model(),
        images[:8],
        train=Batches(train_images, train_labels, 128, augment=True),
        calibration=Batches(train_images[:CALIBRATION], train_labels[:CALIBRATION], 128),
        validation=Batches(images[-HELD_OUT:], labels[-HELD_OUT:], 500),
        test=Batches(*load("t10k"), 500),
        loss=torch.nn.functional.cross_entropy,
        metric=accuracy,
        name="ResNet-20 on Fashion-MNIST",
    )
