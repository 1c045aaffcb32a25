"""Every step of the package on every model of the zoo."""

from functools import lru_cache

import pytest

from multum import capture
from multum.errors import CaptureError
from multum.step import methods
from multum.testing import CHECKS, CONFIGS, SLOW_CHECKS, ZOO, Trial
from multum.testing.zoo import branching

STEPS = {name: step for name, step in methods().items() if step.stage is not None}  # training has tests of its own
FAST = ("resnet", "tied_weights", "tuple_inputs")


@lru_cache(maxsize=1)
def trial(step: str, model: str) -> Trial:
    return Trial(STEPS[step](), model)


def case(step: str, model: str, check) -> object:
    marks = () if model in FAST and check in CHECKS else (pytest.mark.slow,)
    return pytest.param(step, model, check, id=f"{step}-{model}-{check.__name__}", marks=marks)


CASES = [case(step, model, check) for model in ZOO for step in STEPS for check in (*CHECKS, *SLOW_CHECKS)]


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
