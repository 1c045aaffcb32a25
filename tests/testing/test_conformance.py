"""Every step of the package on every model of the zoo."""

from functools import lru_cache

import pytest

from multum import capture
from multum.errors import CaptureError
from multum.prune import Channels
from multum.quantize import Activations, Aware, Mixed, Static, WeightOnly
from multum.step import methods
from multum.testing import CHECKS, CONFIGS, CORE, SLOW_CHECKS, ZOO, Trial
from multum.testing.zoo import branching

STEPS = {name: step for name, step in methods().items() if step.stage is not None}  # training has tests of its own
FAST = ("resnet", "tied_weights", "tuple_inputs")
# Settings with ways of their own through a model, and the models that they are always tried on.
VARIANTS = {
    "Static of few samples": (Static(samples=4), CORE),
    "WeightOnly of 5 bits": (WeightOnly(bits=5), ("resnet", "unet", "bidirectional_gru", "tied_weights", "llama")),
    "Aware of few samples": (Aware(samples=16, epochs=0.5), ("resnet", "tied_weights")),
    "Mixed of few trials": (Mixed(trials=2, samples=16), ("resnet", "tied_weights")),
    "Channels of inputs that hardly vary": (Channels(), ("levit",)),
    "Activations in pieces": (Activations(bits=4, hard=True), ("mlp", "squeeze_excite")),
}
TRIED = {name: (step(), FAST) for name, step in STEPS.items()} | VARIANTS


@lru_cache(maxsize=1)
def trial(step: str, model: str) -> Trial:
    return Trial(TRIED[step][0], model)


def case(step: str, model: str, check) -> object:
    marks = () if model in TRIED[step][1] and check in CHECKS else (pytest.mark.slow,)
    return pytest.param(step, model, check, id=f"{step}-{model}-{check.__name__}", marks=marks)


CASES = [case(step, model, check) for model in ZOO for step in TRIED for check in (*CHECKS, *SLOW_CHECKS)]


@pytest.mark.parametrize(("step", "model", "check"), CASES)
def test_step(step, model, check):
    if model in CONFIGS:
        pytest.importorskip("transformers")
    check(trial(step, model))


def test_there_are_steps_of_every_stage():
    assert {step.stage.name for step in STEPS.values()} >= {"STRUCTURE", "NUMBERS"}


def test_a_model_that_branches_on_data_is_refused_with_a_way_out():
    model, example = branching()
    with pytest.raises(CaptureError, match="can be captured: body, ") as caught:
        capture(model, example)
    assert "Branching" in caught.value.given
