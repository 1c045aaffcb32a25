"""The walk over the ladder: order, announcements, neighbours, time, and what is kept, on candidates with made-up measurements."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from multum.distill import Logits
from multum.errors import FileError, StepError
from multum.prune import Channels
from multum.quantize import Static, WeightOnly
from multum.search.evaluate import Candidate
from multum.search.judge import Judge
from multum.search.ladder import FINE, ROWS, Rung, between, ladder
from multum.search.target import Target
from multum.search.walk import Walk
from multum.step import Recipe
from multum.task import Task

ORIGINAL = 100_000
Measure = Callable[[Candidate], tuple[float, float]]


def toy(**parts: Any) -> Task:
    data = [(torch.zeros(2, 4), torch.zeros(2))]
    return Task(torch.nn.Linear(4, 2), torch.zeros(2, 4), **dict.fromkeys(("train", "calibration", "validation"), data) | parts)


def rung(share: float, bits: int) -> Rung:
    def recipe(number: Static | WeightOnly) -> Recipe:
        return Recipe([*([Channels(ratio=share)] if share else []), number, *([Logits()] if share or bits < 8 else [])])

    name = f"{share} less, {bits} bits"
    made, twin = recipe(Static(weight_bits=bits)), recipe(WeightOnly(bits=bits))
    return Rung(name, made, untrained(made), Rung(f"{name}, float", twin, untrained(twin)))


def untrained(recipe: Recipe) -> Recipe:
    return Recipe([step for step in recipe.flat() if step.stage is not None])


RUNGS = [rung(0.0, 8), rung(0.0, 4), rung(0.25, 8), rung(0.25, 4), rung(0.5, 8), rung(0.5, 4), rung(0.75, 4)]


@pytest.fixture(autouse=True)
def _short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Walk.__module__], "ladder", lambda task: RUNGS)


class Shop:
    """Makes candidates out of nothing: `sizes` by what the name begins with, `measured` gives points lost and speed."""

    def __init__(self, task: Task, size: Callable[[Recipe], int], measured: Measure):
        self.task, self.size, self.measured = task, size, measured
        self.told: list[str] = []
        self.built: list[str] = []
        self.interrupt = ""

    def tell(self, message: str) -> None:
        self.told.append(message)

    def build(self, name: str, recipe: Recipe) -> Candidate:
        self.built.append(name)
        return Candidate(name, recipe, Path(str(recipe)), self.size(recipe), 1.0)

    def measure(self, candidate: Candidate, original: Candidate) -> Candidate:
        lost, speed = self.measured(candidate)
        scores = np.where(np.arange(1000) < 10 * lost, 0.0, 100.0)
        return replace(candidate, scores=scores, latency=1.0, speed=speed)


def walk(shop: Shop, **target: Any) -> Walk:
    original = Candidate("original", Recipe([]), Path("original"), ORIGINAL, 0.0, scores=np.full(1000, 100.0), latency=1.0, speed=1.0)
    return Walk(shop, Judge(shop.task, Target(**target), original), original)  # type: ignore[arg-type]


def size_by_bits_and_width(recipe: Recipe) -> int:
    steps = {step.name(): step for step in recipe.flat()}
    number = steps.get("quantize.Static") or steps["quantize.WeightOnly"]
    bits = getattr(number, "weight_bits", None) or number.bits
    kept = 1 - steps["prune.Channels"].ratio if "prune.Channels" in steps else 1.0
    return int(ORIGINAL * bits / 32 * kept**2)


def trained(candidate: Candidate) -> bool:
    return "distill.Logits" in str(candidate.recipe)


def test_the_gentlest_rung_that_is_small_enough_and_safe_is_taken_without_training() -> None:
    shop = Shop(toy(), size_by_bits_and_width, lambda candidate: (0.0, 2.0 if "Static" in str(candidate.recipe) else 1.0))
    found = walk(shop, size="1/8", max_drop=1.0)
    assert found.run() is None
    assert str(found.best.recipe) == "quantize.Static(weight_bits=4)"
    assert not any(trained(step.candidate) for step in found.tried)
    assert [name for name in shop.built if "not trained" not in name] == ["0.0 less, 8 bits"]  # which has no training


def test_a_drop_over_budget_is_announced_before_recovery_and_recovery_is_kept() -> None:
    shop = Shop(toy(), size_by_bits_and_width, lambda candidate: (0.2 if trained(candidate) else 9.0, 2.0))
    found = walk(shop, size="1/8", max_drop=0.5)
    found.run()
    announced = shop.told.index("Without recovery the drop is 9.00, over the 0.5 allowed. Recovery starts.")
    recovered = next(index for index, text in enumerate(shop.told) if "drop 0.20" in text)
    assert announced < recovered
    assert trained(found.best)
    assert not found.judge.missed(found.best)


def test_integer_activations_are_dropped_where_they_are_not_faster() -> None:
    shop = Shop(toy(), size_by_bits_and_width, lambda candidate: (0.0, 0.8 if "Static" in str(candidate.recipe) else 1.0))
    found = walk(shop, size="1/8", max_drop=1.0)
    found.run()
    assert str(found.best.recipe) == "quantize.WeightOnly(bits=4)"
    assert any("int8 activations are not faster here (0.80x against 1.00x)" in text for text in shop.told)


def test_neighbours_are_tried_and_training_is_lengthened_when_the_first_rung_loses_too_much() -> None:
    def measured(candidate: Candidate) -> tuple[float, float]:
        return (0.1 if "epochs=3.0" in str(candidate.recipe) else 5.0), 2.0

    shop = Shop(toy(), size_by_bits_and_width, measured)
    found = walk(shop, size="1/8", max_drop=0.5)
    found.run()
    assert "epochs=3.0" in str(found.best.recipe)
    assert "3x the training" in found.best.name
    assert sum(trained(step.candidate) for step in found.tried) == 3  # two rungs, then one of them longer


def test_without_a_size_the_smallest_model_within_the_drop_is_found() -> None:
    def measured(candidate: Candidate) -> tuple[float, float]:
        return (0.0 if candidate.bytes >= 6_000 else 5.0), 2.0

    shop = Shop(toy(), size_by_bits_and_width, measured)
    found = walk(shop, max_drop=0.5)
    found.run()
    assert found.best.bytes == 6_250  # half the channels at 8 bits; the next two are tried and lose too much


def test_one_rung_that_loses_too_much_does_not_end_the_way_to_the_smallest() -> None:
    def measured(candidate: Candidate) -> tuple[float, float]:
        return (5.0 if candidate.bytes == 12_500 else 0.0), 2.0

    shop = Shop(toy(), size_by_bits_and_width, measured)
    found = walk(shop, max_drop=0.5)
    found.run()
    assert found.best.bytes == 781


def test_an_impossible_size_gives_the_smallest() -> None:
    shop = Shop(toy(), size_by_bits_and_width, lambda candidate: (1.0, 2.0))
    found = walk(shop, size="1/5000")
    found.run()
    assert found.best.bytes == 781  # a quarter of the channels at 4 bits
    assert set(found.judge.missed(found.best)) == {"size"}
    assert "No recipe of the ladder is small enough; the smallest is tried." in shop.told


def test_a_rung_that_is_too_slow_is_not_recovered() -> None:
    shop = Shop(
        toy(),
        size_by_bits_and_width,
        lambda candidate: (0.0, 3.0 if "Channels()" in str(candidate.recipe) and "=4" not in str(candidate.recipe) else 1.2),
    )
    found = walk(shop, speed=2, max_drop=0.5)
    found.run()
    assert "prune.Channels()" in str(found.best.recipe)
    assert not any(trained(step.candidate) for step in found.tried)


def test_a_failing_candidate_is_recorded_and_the_walk_goes_on() -> None:
    def size(recipe: Recipe) -> int:
        if "Channels(ratio=0.25)" in str(recipe):
            raise ZeroDivisionError("by hand")
        return size_by_bits_and_width(recipe)

    shop = Shop(toy(), size, lambda candidate: (0.0, 2.0))
    found = walk(shop, size="1/8", max_drop=1.0)
    found.run()
    assert not found.judge.missed(found.best)
    failed = [row for row in found.to_data() if row.get("error")]
    assert {row["error"] for row in failed} == {"by hand"}
    assert [row for row in found.to_data() if row.get("chosen")] == [found.best.to_data() | {"chosen": True}]


def test_when_everything_fails_the_reason_is_raised() -> None:
    def size(recipe: Recipe) -> int:
        raise StepError("nothing fits")

    with pytest.raises(StepError, match="nothing fits"):
        walk(Shop(toy(), size, lambda candidate: (0.0, 2.0)), size="1/8").run()


def test_a_full_disk_ends_the_walk() -> None:
    def size(recipe: Recipe) -> int:
        raise FileError("the disk is full")

    shop = Shop(toy(), size, lambda candidate: (0.0, 2.0))
    with pytest.raises(FileError):
        walk(shop, size="1/8").run()
    assert len(shop.built) == 1


def test_time_ends_the_walk_after_the_candidate_that_was_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)

    def measured(candidate: Candidate) -> tuple[float, float]:
        clock.now += 50.0
        return 5.0, 2.0

    found = walk(Shop(toy(), size_by_bits_and_width, measured), size="1/8", max_drop=0.5, minutes=2)
    assert found.run() == "minutes"
    assert found.best is not None
    assert clock.now == 150.0  # a rung, its twin, and the recovery; then another would take too long


def test_the_ladder_has_what_a_task_can_do() -> None:
    everything, weights_only = ladder(toy()), ladder(toy(train=None, calibration=None))
    assert len(everything) == len(ROWS)
    assert any(rung.twin for rung in everything)
    assert any(rung.trains for rung in everything)
    assert not any(rung.twin or rung.trains or "quantize.Static" in str(rung.recipe) for rung in weights_only)
    assert len({str(rung.recipe) for rung in weights_only}) == len(weights_only)
    assert not any(rung.trains for rung in ladder(toy(train=None)))
    assert not any("distill" in str(rung.sketch) for rung in everything)
    coded = [rung for rung in everything if "RateDistortion" in str(rung.recipe)]
    assert coded
    assert all(rung.trains for rung in coded)
    assert not any("RateDistortion" in str(rung.recipe) for rung in weights_only)
    looks = ladder(toy(train=None))  # at data, which choose integers and repair what was cut
    assert any("rounding='coded'" in str(rung.recipe) and "rounding='nearest'" in str(rung.sketch) for rung in looks)
    assert not any(rung.draft for rung in looks)
    for made in everything:
        assert made.draft is not None
        assert not made.draft.trains
        assert (made.draft.twin is None) == (made.twin is None)
        assert ("coded" in str(made.draft.recipe)) == made.coded


def test_between_two_rungs_is_one_that_just_fits() -> None:
    coded = [made for made in ladder(toy()) if made.row and made.row[0] == 0 and made.row[1] <= FINE]
    sizes = {made: int(1000 + 10_000 * made.row[1]) for made in coded if made.row}
    found = between(toy(), sizes, 10_000)
    assert found is not None
    assert found.row is not None
    assert 0.95 * 10_000 * 0.93 < 1000 + 10_000 * found.row[1] <= 10_000 * 0.93 + 10
    assert f"Logits(bits={found.row[1]}" in str(found.recipe).replace("epochs=2.0, bits", "bits")
    assert between(toy(), sizes, 10) is None, "smaller than the smallest"
    assert between(toy(), sizes, 10**6) is None, "larger than the largest"
    assert not between(toy(train=None), sizes, 10_000).trains
    assert between(toy(train=None, calibration=None), {}, 10_000) is None


def coded_bits(recipe: Recipe) -> float:
    return next(step.bits for step in recipe.flat() if step.name() == "quantize.RateDistortion")


def with_coded_rungs(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    rungs = [made for made in ladder(task) if made.coded and made.row and made.row[0] == 0]
    monkeypatch.setattr(sys.modules[Walk.__module__], "ladder", lambda task: rungs)


def test_what_data_choose_fills_the_size_without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(recipe: Recipe) -> int:  # files take a tenth more than sketches
        bits = coded_bits(recipe)
        return int(2000 + (3300 if "coded" in str(recipe) else 3000) * bits)

    shop = Shop(toy(), size, lambda candidate: (0.0 if "coded" in str(candidate.recipe) else 5.0, 2.0))
    with_coded_rungs(monkeypatch, shop.task)
    found = walk(shop, size=0.06, max_drop=0.5)
    found.run()
    assert 0.97 * 6000 <= found.best.bytes <= 6000
    assert not any(trained(step.candidate) for step in found.tried)


@pytest.mark.parametrize(("limit", "wide"), [(0.05, True), (0.03, False)])
def test_half_of_the_channels_go_before_bits_become_too_few(monkeypatch: pytest.MonkeyPatch, limit: float, wide: bool) -> None:
    def size(recipe: Recipe) -> int:
        kept = 0.25 if "prune.Channels" in str(recipe) else 1.0
        return int(2000 + 3000 * coded_bits(recipe) * kept)

    shop = Shop(toy(), size, lambda candidate: (5.0, 2.0))
    rungs = [made for made in ladder(shop.task) if made.coded]
    monkeypatch.setattr(sys.modules[Walk.__module__], "ladder", lambda task: rungs)
    found = walk(shop, size=limit, max_drop=0.5)
    found.run()
    first = next(step.candidate for step in found.tried if trained(step.candidate))
    assert ("prune.Channels" not in str(first.recipe)) == wide
    assert sum("prune.Channels" not in str(step.candidate.recipe) for step in found.tried if trained(step.candidate)) <= 2  # and longer


def test_a_longer_training_is_not_begun_when_it_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)

    def measured(candidate: Candidate) -> tuple[float, float]:
        clock.now += 10.0
        return 5.0, 2.0

    rungs = [rung(0.0, 4), rung(0.25, 4).longer(8)]
    monkeypatch.setattr(sys.modules[Walk.__module__], "ladder", lambda task: rungs)
    found = walk(Shop(toy(), size_by_bits_and_width, measured), size="1/8", max_drop=0.5, minutes=2)
    assert found.run() == "minutes"
    assert clock.now == 30.0  # the first took 30 s, eight times as much is over 2 minutes


def test_without_a_size_the_bits_are_halved_in_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(
        toy(train=None), lambda recipe: int(3000 * coded_bits(recipe)), lambda candidate: (0.0 if candidate.bytes > 2500 else 5.0, 2.0)
    )
    with_coded_rungs(monkeypatch, shop.task)
    found = walk(shop, max_drop=0.5)
    found.run()
    tried = sorted(coded_bits(step.candidate.recipe) for step in found.tried if step.kept)
    assert coded_bits(found.best.recipe) == min(bits for bits in tried if 3000 * bits > 2500)
    assert any(0.7 < bits < 1.0 for bits in tried)


def test_longer_training_is_all_that_changes() -> None:
    before = rung(0.25, 4)
    after = before.longer(3)
    assert str(after.sketch) == str(before.sketch)
    assert str(after.recipe) == str(before.recipe).replace("distill.Logits()", "distill.Logits(epochs=3.0)")
