"""Makes the dictionary with which headers of files are compressed: `python bench/words.py multum/pack/words2.zdict`.

It learns from the headers of small networks of many kinds under many recipes; none of the networks that are measured is among them.
Files name the dictionary that they need, so one that was released is never changed: a better one gets the next number.
"""

from __future__ import annotations

import itertools
import re
import struct
import sys
import tempfile
from pathlib import Path

import torch
import zstandard
from torch import nn

import multum
from multum.errors import MultumError
from multum.pack import coder
from multum.testing.zoo import ZOO

SIZE = 12_000  # bytes
RECIPES = [
    [],
    [multum.quantize.WeightOnly(bits=2)],
    [multum.quantize.WeightOnly(bits=4), multum.quantize.Half()],
    [multum.quantize.Static(), multum.quantize.Half()],
    [multum.prune.Channels(ratio=0.3), multum.quantize.WeightOnly(bits=3), multum.quantize.Static()],
]


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Residual(nn.Module):
    """Names as most libraries give them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Basic(8, 8, 1), Basic(8, 8, 1))
        self.layer2 = nn.Sequential(Basic(8, 16, 2), Basic(16, 16, 1))
        self.layer3 = nn.Sequential(Basic(16, 32, 2), Basic(32, 32, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer3(self.layer2(self.layer1(x)))), 1))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Sequential(nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU(True)) for a, b in ((3, 8), (8, 16), (16, 16))]
        self.features = nn.Sequential(*itertools.chain.from_iterable((*part, nn.MaxPool2d(2, 2)) for part in convolutions))
        self.classifier = nn.Sequential(nn.Linear(64, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).view(x.shape[0], -1))


class Few(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5), nn.AvgPool2d(2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 40), nn.Linear(40, 20), nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2).flatten(1)
        return torch.log_softmax(self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x))))), 1)


def networks() -> dict[str, tuple[nn.Module, object]]:
    torch.manual_seed(0)
    known = {name: make() for name, make in ZOO.items()}
    more = {"residual": (Residual(), (3, 32, 32)), "plain": (Plain(), (3, 16, 16)), "few": (Few(), (1, 28, 28))}
    return known | {name: (model.eval(), torch.randn(2, *size)) for name, (model, size) in more.items()}


def header(path: Path) -> bytes:
    """The plain header of a file, as `multum/pack/mip.py` has it, less what no dictionary can know."""
    data = path.read_bytes()
    packed, plain, _ = struct.unpack("<III", data[-12:])
    text = coder.decompress(data[-12 - packed : -12], plain, words=True)
    text = re.sub(rb'"fingerprint":"\w+"', b'"fingerprint":"', text)
    return re.sub(rb"\[\d+,\d{5,},", b"[", text)


def headers() -> list[bytes]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, example) in networks().items():
            for steps in RECIPES:
                try:
                    task = multum.Task(model, example, calibration=[(example, torch.zeros(2, dtype=torch.int64))])
                    result = multum.compress(task, steps) if steps else task.original
                    multum.save(result, Path(folder) / "x.mip", task)
                except MultumError as error:
                    print(f"{name}, {steps}: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                found.append(header(Path(folder) / "x.mip"))
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    number = int(re.findall(r"\d+", path.stem)[0])
    samples = headers()
    made = zstandard.train_dictionary(SIZE, samples, dict_id=number, level=19)
    path.write_bytes(made.as_bytes())
    print(f"{len(samples)} headers, {sum(map(len, samples))} bytes; {path}: {path.stat().st_size} bytes")
