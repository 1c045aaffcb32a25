"""Pictures of things and animals, the stamps of Tux Paint (GPL-2), for a network trained on ImageNet.

The Debian package ``tuxpaint-stamps-default`` (161 MB) holds 796 PNG pictures. They are unpacked without root, put on
white, scaled to 224x224 and kept in ``$MULTUM_DATA`` (default ``~/.cache/multum``), 120 MB.

Three sets, by file name alone:

- ``labelled``: the 123 whose name is one or more ImageNet classes (imagenet_ids.json, checked by eye).
- ``photos``: the stamps in the folders of animals, clothes, food, hobbies, household things, plants, sports and vehicles
  that are not cartoons, and the labelled ones: 314.
- ``drawings``: the rest, mostly drawings and signs. Only these are seen in calibration, recovery and search.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
from debian import cache, unpacked

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = Path("/usr/share/tuxpaint/stamps")
FOLDERS = ("animals", "clothes", "food", "hobbies", "household", "plants", "sports", "vehicles")
SIDE = 224
MARGIN = 0.025  # of the longer side, on every side
IDS: dict[str, list[int]] = json.loads((Path(__file__).parent / "imagenet_ids.json").read_text())


def directory() -> Path:
    """The folder with ``images.npy`` [796, 224, 224, 3] and ``names.json``; made on first use.

    Raises FileNotFoundError, with the reason, when the package cannot be had.
    """
    kept = cache() / "tuxpaint-stamps"
    if kept.is_dir():
        return kept
    with tempfile.TemporaryDirectory() as scratch:
        try:
            stamps = INSTALLED if INSTALLED.is_dir() else unpacked(PACKAGE, Path(scratch)) / INSTALLED.relative_to("/")
        except (OSError, subprocess.SubprocessError) as error:
            raise FileNotFoundError(f"The stamps could not be had: {error}. Install the Debian package {PACKAGE}.") from error
        files = sorted(stamps.rglob("*.png"))
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=kept.parent))
        np.save(partial / "images.npy", np.stack([decoded(file) for file in files]))
        (partial / "names.json").write_text(json.dumps([str(file.relative_to(stamps).with_suffix("")) for file in files]))
        try:
            partial.rename(kept)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return kept


def decoded(file: Path) -> np.ndarray:
    """A picture on a white square with a margin, scaled to [224, 224, 3] bytes."""
    from PIL import Image

    with Image.open(file) as image:
        picture = image.convert("RGBA")
    longer = max(picture.size)
    side = longer + 2 * round(MARGIN * longer)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def is_photo(name: str) -> bool:
    return name in IDS or (name.split("/")[0] in FOLDERS and "cartoon" not in name)


class Batches:
    """Batches of (images [n, 3, 224, 224], rows [n]): a row is a picture's place in the list of names."""

    def __init__(self, rows: list[int], size: int, shuffle: bool = False, seed: int = 0):
        self.rows, self.size, self.shuffle = torch.tensor(rows), size, shuffle
        self.images = np.load(directory() / "images.npy", mmap_mode="r")
        self.random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.rows), generator=self.random) if self.shuffle else torch.arange(len(self.rows))
        for chosen in self.rows[order].split(self.size):
            pixels = torch.from_numpy(self.images[chosen.numpy()]).permute(0, 3, 1, 2)
            yield (pixels.float() - 127) / 128, chosen


def rows() -> tuple[list[str], dict[str, list[int]]]:
    """All names, and the rows of ``labelled``, ``photos`` and ``drawings``."""
    names: list[str] = json.loads((directory() / "names.json").read_text())
    photos = [row for row, name in enumerate(names) if is_photo(name)]
    labelled = [row for row in photos if names[row] in IDS]
    return names, {"labelled": labelled, "photos": photos, "drawings": sorted(set(range(len(names))) - set(photos))}
