"""Promise 3: a fresh process loads the file, for every method and every pair of methods, without source, data or pickle."""

import itertools
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

import multum
from multum.distill import Assistant, Attention, DataFree, Elastic, Hidden, Logits, Peers, Relations, Self, Tasks, Teachers, Unlabelled
from multum.errors import StepError
from multum.factorize import CP, SVD, Quantized, Spatial, TensorTrain, Tucker
from multum.lighten import Activations as Cheap
from multum.lighten import Merge, Reparameterize, Replace, Scale
from multum.pack import describe
from multum.prune import NM, Blocks, Channels, Gradual, Heads, Layers, Neurons, Rewind, Shrink, Weights
from multum.quantize import (
    Activations,
    Aware,
    Binary,
    Dynamic,
    Equalize,
    FixedPoint,
    Half,
    Mixed,
    NonUniform,
    RateDistortion,
    Static,
    WeightOnly,
)
from multum.share import Clusters, Hashing, Ties
from multum.step import methods
from multum.task import call, logits
from multum.testing.conformance import task as attentive

OTHER = str(Path(tempfile.gettempdir()) / f"multum_teacher_{os.getpid()}.mip")
SHORT = {
    "prune.Blocks": Blocks(samples=64),
    "prune.Channels": Channels(ratio=0.25),
    "prune.Gradual": Gradual(ratio=0.5, epochs=0.2),
    "prune.Heads": Heads(),
    "prune.Neurons": Neurons(),
    "prune.Layers": Layers(samples=16),
    "prune.NM": NM(samples=16),
    "prune.Rewind": Rewind(),
    "prune.Shrink": Shrink(ratio=0.25, epochs=0.2),
    "prune.Weights": Weights(samples=16),
    "distill.Assistant": Assistant(widths=(0.75,), epochs=0.2),
    "distill.Attention": Attention(epochs=0.2),
    "distill.DataFree": DataFree(samples=16, batch=16, descent=2),
    "distill.Elastic": Elastic(widths=(0.5,), epochs=0.2),
    "distill.Hidden": Hidden(epochs=0.2),
    "factorize.CP": CP(rank=4, samples=16),
    "factorize.Quantized": Quantized(rank=2, rounds=2, samples=16),
    "factorize.TensorTrain": TensorTrain(parameters=0.6, samples=16),
    "factorize.SVD": SVD(parameters=0.5),
    "factorize.Spatial": Spatial(parameters=0.6, samples=16),
    "factorize.Tucker": Tucker(parameters=0.6, samples=16),
    "lighten.Activations": Cheap(),
    "lighten.Merge": Merge(),
    "lighten.Reparameterize": Reparameterize(epochs=0.2),
    "lighten.Replace": Replace(samples=16),
    "lighten.Scale": Scale(),
    "distill.Logits": Logits(epochs=0.2),
    "quantize.Activations": Activations(),
    "distill.Peers": Peers(epochs=0.2),
    "distill.Relations": Relations(epochs=0.2),
    "distill.Self": Self(epochs=0.2, hidden=4),
    "distill.Tasks": Tasks(epochs=0.2),
    "distill.Teachers": Teachers(files=OTHER, epochs=0.2),
    "distill.Unlabelled": Unlabelled(epochs=0.2),
    "quantize.Aware": Aware(samples=16, epochs=0.2),
    "quantize.Binary": Binary(epochs=0.2),
    "quantize.Dynamic": Dynamic(),
    "quantize.Equalize": Equalize(),
    "quantize.FixedPoint": FixedPoint(),
    "quantize.NonUniform": NonUniform(),
    "quantize.Mixed": Mixed(samples=16, trials=4),
    "quantize.Static": Static(),
    "quantize.WeightOnly": WeightOnly(bits=4),
    "quantize.RateDistortion": RateDistortion(),
    "quantize.Half": Half(),
    "share.Clusters": Clusters(samples=16),
    "share.Hashing": Hashing(),
    "share.Ties": Ties(),
}

LOADER = textwrap.dedent("""
    import builtins, sys
    import torch
    import multum
    from multum.task import call, logits

    folder, names = sys.argv[1], sys.argv[2:]
    x = torch.load(f"{folder}/x.pt", weights_only=True)

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    import pickle
    kept = pickle.load, pickle.loads
    pickle.load = pickle.loads = refuse
    assert not any(name.startswith(("tests", "conftest")) for name in sys.modules)
    y = {}
    with torch.no_grad():
        for name in names:
            y[name] = logits(call(multum.load(f"{folder}/{name}.mip"), x))
    pickle.load, pickle.loads = kept
    torch.save(y, f"{folder}/y.pt")
""")


@pytest.fixture(autouse=True)
def another_network(task):
    multum.save(task.original, OTHER)


def test_every_method_is_tried_here():
    assert set(SHORT) == set(methods()), "add the new method, with options that take a second"


PAIRS = list(itertools.permutations(SHORT.values(), 2))
SOME = PAIRS[:: -(-len(PAIRS) // 24)]


@pytest.mark.parametrize("pairs", [SOME, pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_fresh_process_gives_the_same_outputs(task, tmp_path, pairs):
    load_elsewhere(task, [(step,) for step in SHORT.values()] + list(pairs), tmp_path, 15)


def test_so_do_those_that_need_attention(tmp_path):
    pytest.importorskip("transformers")
    load_elsewhere(
        attentive("vit"),
        [(Heads(),), (Neurons(), Static()), (Heads(), Neurons(), Half()), (Attention(epochs=0.2),), (Ties(),)],
        tmp_path,
        5,
    )


def load_elsewhere(task, recipes, tmp_path, least):
    x = task.validation[0][0]
    expected, refused = {}, 0
    for steps in recipes:
        try:
            result = multum.compress(task, list(steps))
        except StepError:  # an order that makes no sense, or weights quantized twice
            refused += 1
            continue
        name = "_".join(step.name() for step in steps)
        multum.save(result, tmp_path / f"{name}.mip", task)
        with torch.no_grad():
            expected[name] = logits(call(result.graph, x))
    assert len(expected) >= least
    assert refused + len(expected) == len(recipes)
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "loader.py").write_text(LOADER)
    subprocess.run([sys.executable, "-P", tmp_path / "loader.py", tmp_path, *expected], check=True, cwd=tmp_path)
    loaded = torch.load(tmp_path / "y.pt", weights_only=True)
    for name, y in expected.items():
        torch.testing.assert_close(loaded[name], y, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# which need zeros, attention, several outputs, a sigmoid, or layers in a row
_NAMES = ("prune.Rewind", "prune.Heads", "prune.Neurons", "distill.Attention", "distill.Tasks", "quantize.Activations", "share.Ties")
OTHERS = [SHORT[name] for name in _NAMES]
OTHERS += [SHORT["lighten.Activations"], SHORT["lighten.Merge"]]  # a smooth function, or layers with nothing between


@pytest.mark.parametrize("step", [step for step in SHORT.values() if step not in OTHERS], ids=str)
def test_the_file_says_how_it_was_made(task, step, tmp_path):
    multum.save(multum.compress(task, step), tmp_path / "model.mip", task)
    told = describe(tmp_path / "model.mip")
    assert told["recipe"] == multum.Recipe([step]).to_data()
    assert told["original"] == {"name": "stripes", "fingerprint": task.original.fingerprint()[:16]}
    assert [record["step"] for record in told["records"]] == [step.name()]
