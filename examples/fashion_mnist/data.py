"""Fashion-MNIST (Xiao et al. 2017, MIT licence): 60,000 and 10,000 grey images of 28x28, ten classes.

The files come from the Debian package ``dataset-fashion-mnist``, from its installed place or downloaded and unpacked
without root, or from the data set's public address; they are kept in ``$MULTUM_DATA`` (default ``~/.cache/multum``).
"""

import gzip
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from debian import cache, unpacked

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
ADDRESS = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
MEAN, STD = 0.2860, 0.3530
HELD_OUT = 5_000  # the last training images steer the search; neither the network nor its recovery sees them


def directory() -> Path:
    """The folder that holds the four files; fetched on first use.

    Raises FileNotFoundError, with what was tried, when no source can be reached.
    """
    kept = cache() / "fashion-mnist"
    for place in (INSTALLED, kept):
        if all((place / name).is_file() for name in FILES):
            return place
    tried = [f"{INSTALLED}: not there"]
    for fetch in (_from_package, _from_address):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = fetch(Path(scratch))
            except (OSError, subprocess.SubprocessError) as error:
                tried.append(f"{fetch.__name__[1:].replace('_', ' ')}: {error}")
                continue
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=kept.parent))
            for name in FILES:
                shutil.copy(found / name, partial / name)
            shutil.rmtree(kept, ignore_errors=True)
            partial.rename(kept)
            return kept
    raise FileNotFoundError(
        "Fashion-MNIST could not be had. Tried: " + "; ".join(tried) + f". Install the Debian package {PACKAGE}, "
        "or put its four idx files into the folder that MULTUM_DATA names, under fashion-mnist/."
    )


def _from_package(scratch: Path) -> Path:
    return unpacked(PACKAGE, scratch) / INSTALLED.relative_to("/")


def _from_address(scratch: Path) -> Path:
    for name in FILES:
        with urllib.request.urlopen(ADDRESS + name, timeout=60) as answer, open(scratch / name, "wb") as file:
            shutil.copyfileobj(answer, file)
    return scratch


def load(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, 28, 28], normalized, and labels [n] of ``train`` or ``t10k``."""
    with gzip.open(directory() / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(directory() / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    pixels = torch.from_numpy(images.astype(np.float32)) / 255
    return (pixels - MEAN) / STD, torch.from_numpy(labels.astype(np.int64))


class Batches:
    """Batches of (images, labels) in order, or shuffled and augmented (flip, shift by up to two pixels) anew each pass."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, size: int, augment: bool = False, seed: int = 0):
        self.images, self.labels, self.size, self.augment = images, labels, size, augment
        self.random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.size if self.augment else -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if not self.augment:
            yield from zip(self.images.split(self.size), self.labels.split(self.size), strict=True)
            return
        order = torch.randperm(len(self.images), generator=self.random)
        for rows in order.split(self.size)[: len(self)]:
            yield self._shift(self.images[rows]), self.labels[rows]

    def _shift(self, images: torch.Tensor) -> torch.Tensor:
        flip = torch.rand(len(images), generator=self.random) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
        dy, dx = torch.randint(0, 5, (2, len(images)), generator=self.random)
        rows = (dy[:, None] + torch.arange(28))[:, None, :, None]
        columns = (dx[:, None] + torch.arange(28))[:, None, None, :]
        return padded[torch.arange(len(images))[:, None, None, None], 0, rows, columns]
