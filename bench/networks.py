"""Networks trained for measurements alone, on Fashion-MNIST: `python bench/networks.py lenet --seeds 0 1 2`.

A trained network is kept in out/bench/networks/ and not trained again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import multum

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench" / "networks"
sys.path.insert(0, str(ROOT / "examples/fashion_mnist"))


class LeNet5(nn.Module):
    """The LeNet-5 that Caffe made known: 431,080 parameters, 430,500 of them weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x), 2)
        x = nn.functional.max_pool2d(self.conv2(x), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class Vgg(nn.Module):
    """Convolutions of 3x3 and then wide linear layers, as in VGG (Simonyan & Zisserman 2015); 2,524,934 parameters."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        inputs = 1
        for outputs in (16, 16, 0, 32, 32, 0, 64, 64, 0, 128, 256):
            if not outputs:
                parts.append(nn.MaxPool2d(2))
                continue
            parts += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.body = nn.Sequential(*parts)
        self.fc, self.head = nn.Linear(inputs * 9, 900), nn.Linear(900, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.body(x).flatten(1))))


# The network, the passes over the training images, and the highest learning rate.
NETWORKS = {"lenet": (LeNet5, 20, 0.03), "vgg": (Vgg, 12, 0.1)}


def trained(name: str, seed: int) -> nn.Module:
    """The network, trained when it was not yet, in eval mode."""
    from data import HELD_OUT, Batches, load
    from train import fit

    make, epochs, rate = NETWORKS[name]
    torch.manual_seed(seed)
    network, file = make().to(memory_format=torch.channels_last), OUT / f"{name}_{seed}.safetensors"
    if not file.is_file():
        images, labels = load("train")
        fit(network, Batches(images[:-HELD_OUT], labels[:-HELD_OUT], 128, augment=True, seed=seed), epochs, rate, 0.2)
        OUT.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    network = make()
    network.load_state_dict(load_file(file))
    return network.eval()


def task(name: str, seed: int = 0) -> multum.Task:
    """A network of this file, or the example's (`resnet20`), with the data of the example."""
    found = multum.load_task(ROOT / "examples/fashion_mnist/task.py")
    found.train.random.manual_seed(seed)  # the order of the images, and how they are shifted
    if name == "resnet20":
        return replace(found, seed=seed)
    return replace(found, model=trained(name, seed), seed=seed, name=f"{name} on Fashion-MNIST")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for which in given.names:
        for number in given.seeds:
            job = task(which, number)
            parameters = sum(parameter.numel() for parameter in job.model.parameters())
            print(f"{which}, seed {number}: {parameters:,} parameters, {float(job.score(job.original, 'test').mean()):.2f}", flush=True)
