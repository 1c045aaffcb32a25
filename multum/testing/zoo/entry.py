"""Where models of the zoo register: `ZOO[name]()` gives a model, in eval mode, and an example batch of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Entry = tuple[nn.Module, Any]
ZOO: dict[str, Callable[[], Entry]] = {}


def entry(make: Callable[[], Entry]) -> Callable[[], Entry]:
    def seeded() -> Entry:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, example = make()
            return _settled(model), example

    ZOO[make.__name__] = seeded
    return seeded


def _settled(model: nn.Module) -> nn.Module:
    """The model in eval mode, its batch norms with statistics and scales that differ from those they start with."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()
