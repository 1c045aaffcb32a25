"""Networks of torchvision and timm, small ones with random weights, where those packages are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import torch

from .entry import ZOO, Entry, entry

_MODELS = {
    "torchvision.models": ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf", "mnasnet0_5"),
    "timm": ("resnet10t", "efficientnet_lite0", "ghostnet_050", "convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224", "hardcorenas_a"),
}
_BEFORE = len(ZOO)


def _model(package: str, name: str) -> Callable[[], Entry]:
    def make() -> Entry:
        module = importlib.import_module(package)
        size = 224 if name.endswith("224") else 64
        make_model = getattr(module, name, None) or module.create_model
        model = make_model(num_classes=5) if hasattr(module, name) else make_model(name, num_classes=5)
        return model, torch.randn(2, 3, size, size)

    make.__name__ = f"{package.partition('.')[0]}_{name}"
    return make


for package, names in _MODELS.items():
    if find_spec(package.partition(".")[0]):
        for name in names:
            entry(_model(package, name))

INSTALLED = tuple(ZOO)[_BEFORE:]
