"""What is done to the student's inputs while the teacher sees them as they are: functions of batches, and the companion that applies them.

Chance comes from torch's global random state, which is seeded and kept with a training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError, near
from .companion import Companion

Mix = tuple[Tensor, float]  # with which sample each is mixed [n], and the share of its own


def flip(images: Tensor) -> Tensor:
    """Half of the images [n, c, h, w] the other way round."""
    return torch.where(_chance(images) < 0.5, images.flip(-1), images)


def crop(images: Tensor) -> Tensor:
    """Each image [n, c, h, w] moved by up to an eighth of its size; what comes in repeats the border."""
    rows, columns = (_moved(images, dim) for dim in (2, 3))
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cutout(images: Tensor) -> Tensor:
    """A square of half the size of each image [n, c, h, w], anywhere, gets the mean of the batch (DeVries & Taylor 2017, section 3)."""
    return torch.where(_box(images, _chance(images), _chance(images), 0.5), images.mean(), images)


def mixup(images: Tensor) -> tuple[Tensor, Mix]:
    """Each sample [n, ...] and another one, summed with random shares (Zhang et al. 2018, section 2); with whom and how much."""
    order, share = _order(images), float(torch.rand(()))
    return share * images + (1 - share) * images[order], (order, share)


def cutmix(images: Tensor) -> tuple[Tensor, Mix]:
    """A box of random size in each image [n, c, h, w] is filled from another one (Yun et al. 2019, section 3.1)."""
    order, size = _order(images), math.sqrt(float(torch.rand(())))
    down, right = torch.rand(2, 1, 1, 1, 1, device=images.device)
    box = _box(images, down, right, size)
    return torch.where(box, images[order], images), (order, 1 - float(box.float().mean()))


def tokens(ids: Tensor, share: float = 0.15, token: int | None = None) -> Tensor:
    """A share of the tokens [n, t] are masked by `token`; without one by what stands there in another one (cf. Devlin et al. 2019, 3.1)."""
    other = ids[_order(ids)] if token is None else torch.full_like(ids, token)
    return torch.where(torch.rand(ids.shape, device=ids.device) < share, other, ids)


_ONE: dict[str, Callable[[Tensor], Tensor]] = {"crop": crop, "flip": flip, "cutout": cutout, "tokens": tokens}
_MIXING: dict[str, Callable[[Tensor], tuple[Tensor, Mix]]] = {"mixup": mixup, "cutmix": cutmix}


class Augment(Companion):
    """Applies functions of this file, by name, to every batch: to its first images, or to its first table of ids."""

    def __init__(self, names: Sequence[str]):
        known = _ONE | _MIXING
        for name in names:
            if name not in known:
                raise TrainError(f"There is no augmentation {name!r}.", f"one of {', '.join(known)}, such as {near(name, known)}")
        if sum(name in _MIXING for name in names) > 1:
            raise TrainError("Samples are mixed in two ways at once.", "mixup or cutmix")
        self.names, self.key = names, f"augment {' '.join(names)}"
        self.mix: Mix | None = None
        self.seen: Any = None  # what became of the last batch

    def view(self, inputs: Any) -> Any:
        for name in self.names:
            inputs, done = self._applied(name, inputs)
            if not done:
                known = "images [n, c, h, w]; for mixup any numbers [n, ...], for tokens ids [n, t]"
                raise TrainError(f"The inputs have nothing for {name!r}.", known)
        self.seen = inputs
        return inputs

    def _applied(self, name: str, value: Any) -> tuple[Any, bool]:
        """The same inputs with the first tensor that fits changed, and whether there was one."""
        if isinstance(value, Tensor):
            if not _fits(name, value):
                return value, False
            if name in _MIXING:
                value, self.mix = _MIXING[name](value)
                return value, True
            return _ONE[name](value), True
        if not isinstance(value, dict | tuple | list):
            return value, False
        done, parts = False, []
        for part in value.values() if isinstance(value, dict) else value:
            part, done = (part, True) if done else self._applied(name, part)
            parts.append(part)
        return (dict(zip(value, parts, strict=True)) if isinstance(value, dict) else type(value)(parts)), done


def _fits(name: str, value: Tensor) -> bool:
    if name == "tokens":
        return value.ndim == 2 and not value.is_floating_point()
    return value.ndim == 4 or (name == "mixup" and value.ndim > 1 and value.is_floating_point())


def mixed(value: Any, mix: Mix | None) -> Any:
    """Nested outputs [n, ...] mixed as the inputs were."""
    if mix is None:
        return value
    if isinstance(value, Tensor):
        return mix[1] * value + (1 - mix[1]) * value[mix[0]] if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: mixed(part, mix) for key, part in value.items()}
    return type(value)(mixed(part, mix) for part in value) if isinstance(value, tuple | list) else value


def _chance(images: Tensor) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device)


def _order(value: Tensor) -> Tensor:
    return torch.randperm(len(value), device=value.device)


def _moved(images: Tensor, dim: int) -> Tensor:
    """For each image the rows, or columns, that it shows [n, size]."""
    size = images.shape[dim]
    shift = torch.randint(-(size // 8), size // 8 + 1, (len(images), 1), device=images.device)
    return (torch.arange(size, device=images.device) + shift).clamp(0, size - 1)


def _box(images: Tensor, down: Tensor, right: Tensor, size: float) -> Tensor:
    """Whether a place lies in a box of this share of either side whose corner is drawn from 0 to 1 [n or 1, 1, h, w]."""
    sides = []
    for dim, corner in ((2, down), (3, right)):
        length = images.shape[dim]
        first = (corner * (length * (1 - size) + 1)).floor()
        place = torch.arange(length, device=images.device).view([-1 if other == dim else 1 for other in range(4)])
        sides.append((place >= first) & (place < first + round(size * length)))
    return sides[0] & sides[1]
