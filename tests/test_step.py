"""Steps, recipes and `compress`: order, requirements, options, YAML, records, and resuming after a kill."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from multum import Recipe, Task, compress
from multum.errors import StepError
from multum.graph import select
from multum.step import Plan, Record, Stage, Step, check, dry_run, make, methods, option

calls: list[str] = []


@dataclass(frozen=True)
class Scale(Step):
    """Multiplies the weights of layers."""

    stage: ClassVar[Stage | None] = Stage.VALUES

    by: float = option(2.0, "factor")
    include: str | tuple[str, ...] = option("*", "patterns")
    limit: float | None = option(None, "largest factor")

    def plan(self, graph, task):
        chosen = select(graph, self.include, kinds=("linear",))
        if self.by == 1:
            return Plan({}, {layer.name: "a factor of one changes nothing" for layer in chosen})
        return Plan({layer.name: {"by": self.by} for layer in chosen})

    def apply(self, graph, plan, task, workdir):
        calls.append(f"scale {self.by}")
        for layer in select(graph, tuple(plan.changes)):
            graph.set_tensor(layer.weight, graph.tensor(layer.weight).detach() * plan.changes[layer.name]["by"])
        return {"layers": len(plan.changes)}


@dataclass(frozen=True)
class Cut(Scale):
    stage: ClassVar[Stage | None] = Stage.STRUCTURE


@dataclass(frozen=True)
class Round(Scale):
    stage: ClassVar[Stage | None] = Stage.NUMBERS
    needs: ClassVar[tuple[str, ...]] = ("calibration",)


@dataclass(frozen=True)
class Train(Scale):
    stage: ClassVar[Stage | None] = None
    needs: ClassVar[tuple[str, ...]] = ("train", "loss")


@dataclass(frozen=True)
class Idle(Scale):
    def apply(self, graph, plan, task, workdir):
        return {}


@dataclass(frozen=True)
class Killed(Scale):
    def apply(self, graph, plan, task, workdir):
        calls.append("killed")
        raise KeyboardInterrupt


BATCHES = [(torch.randn(2, 3), torch.tensor([0, 1]))]


def task(**options: Any) -> Task:
    torch.manual_seed(0)
    return Task(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3), **options)


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


def test_steps_are_applied_in_order_to_a_copy():
    mine = task()
    before, fingerprint = mine.model[0].weight.detach().clone(), mine.original.fingerprint()
    result = compress(mine, [Cut(by=3.0), Scale(include="2")])
    assert calls == ["scale 3.0", "scale 2.0"]
    torch.testing.assert_close(result.graph.tensor("0.weight").detach(), 3 * before)
    torch.testing.assert_close(result.graph.tensor("2.weight").detach(), 6 * mine.model[2].weight.detach())
    assert torch.equal(mine.model[0].weight, before)
    assert mine.original.fingerprint() == fingerprint
    assert not result.graph.training


def test_records_say_what_was_done():
    record = compress(task(), Scale(by=3.0, include="0")).records[0]
    assert record.step == "tests.Scale" or record.step == "Scale"
    assert record.options == {"by": 3.0, "include": "0"}
    assert record.changes == {"0": {"by": 3.0}}
    assert record.parameters == (26, 26)
    assert record.measured == {"layers": 1}
    assert json.loads(json.dumps(record.to_data())) == record.to_data() | {"parameters": [26, 26]}


def test_a_recipe_stands_where_a_step_may():
    recipe = Recipe([Cut(), Recipe([Scale(), Recipe([Train()])])])
    assert [type(step) for step in recipe.flat()] == [Cut, Scale, Train]
    assert str(recipe).count(" > ") == 2
    with pytest.raises(StepError, match="needs `train`"):
        compress(task(), recipe)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Round(), Scale()], r"Scale \(values\) comes after .*Round \(numbers\)"),
        ([Scale(), Cut()], r"Cut \(structure\) comes after .*Scale \(values\)"),
        ([Cut(), Train(), Round(), Train(), Cut()], r"Cut \(structure\) comes after .*Round"),
    ],
)
def test_order_is_checked_before_any_work(steps, message):
    mine = task(train=BATCHES, loss=nn.functional.cross_entropy)
    with pytest.raises(StepError, match=message) as caught:
        compress(mine, steps)
    assert "shapes before weights before number formats" in caught.value.expected
    assert caught.value.do.startswith("move ")
    assert calls == []


def test_training_fits_anywhere():
    check(task(train=BATCHES, loss=nn.functional.cross_entropy), [Train(), Cut(), Train(), Scale(), Train(), Round(), Train()])


@pytest.mark.parametrize(
    ("step", "options", "need"),
    [
        (Round(), {}, "calibration"),
        (Train(), {"train": BATCHES}, "loss"),
        (Train(), {"loss": nn.functional.cross_entropy}, "train"),
    ],
)
def test_what_a_step_needs_is_checked_before_any_work(step, options, need):
    with pytest.raises(StepError, match=f"needs `{need}`, which the task 'model' does not have") as caught:
        compress(task(**options), [Cut(), step])
    assert f"Task(..., {need}=...)" in caught.value.expected
    assert calls == []


class NoLength:
    """As a DataLoader over a stream: asking whether it is empty fails."""

    def __iter__(self):
        return iter(BATCHES)

    def __len__(self):
        raise TypeError("a stream has no length")


@pytest.mark.parametrize("options", [{"train": BATCHES}, {"calibration": NoLength()}])
def test_training_data_serve_for_calibration(options):
    check(task(**options), [Round()])


@pytest.mark.parametrize("steps", [[], Recipe([]), Recipe([Recipe([])])])
def test_an_empty_recipe_is_an_error(steps):
    with pytest.raises(StepError, match="The recipe is empty"):
        compress(task(), steps)


def test_a_step_that_would_change_nothing_is_an_error_with_the_reasons():
    with pytest.raises(StepError, match=r"would change nothing\. 0: a factor of one changes nothing; 2: a factor"):
        compress(task(), Scale(by=1.0))


def test_a_step_that_changed_nothing_is_an_error():
    with pytest.raises(StepError, match="changed nothing although it planned to"):
        compress(task(), Idle())


def test_a_pattern_without_a_match_names_the_near_misses():
    with pytest.raises(StepError, match="'22' matches no layer of kind linear") as caught:
        compress(task(), Scale(include="22"))
    assert "'2'" in caught.value.expected


def test_a_dry_run_plans_each_step_on_what_the_ones_before_made():
    plans = list(dry_run(task(), Recipe([Cut(), Scale(by=1.0)])))
    assert [(type(step), len(plan.changes), len(plan.skipped)) for step, plan in plans] == [(Cut, 2, 0), (Scale, 0, 2)]


# --- resuming ------------------------------------------------------------------------------------------------------


def test_a_second_start_repeats_nothing(tmp_path):
    first = compress(task(), [Cut(), Scale(by=3.0)], workdir=tmp_path)
    assert calls == ["scale 2.0", "scale 3.0"]
    told = []
    second = compress(task(), [Cut(), Scale(by=3.0)], workdir=tmp_path, tell=told.append)
    assert calls == ["scale 2.0", "scale 3.0"]
    assert all("resumed" in line for line in told)
    assert second.graph.fingerprint() == first.graph.fingerprint()
    assert [record.to_data() for record in second.records] == [record.to_data() for record in first.records]
    assert isinstance(second.records[0], Record)


def test_what_served_a_step_that_is_done_is_cleared_away(tmp_path):
    class Long(Scale):
        def apply(self, graph, plan, task, workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "training.safetensors").write_bytes(b"half way")
            return super().apply(graph, plan, task, workdir)

    compress(task(), Long(by=3.0), workdir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in folder.iterdir()} == {"graph.safetensors", "record.json"}


def test_after_a_kill_only_the_rest_is_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compress(task(), [Cut(), Killed(), Scale(by=3.0)], workdir=tmp_path)
    assert calls == ["scale 2.0", "killed"]
    resumed = compress(task(), [Cut(), Scale(by=5.0)], workdir=tmp_path)
    assert calls == ["scale 2.0", "killed", "scale 5.0"]
    assert resumed.graph.fingerprint() == compress(task(), [Cut(), Scale(by=5.0)]).graph.fingerprint()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("changed", ["options", "model", "seed"])
def test_work_for_something_else_is_not_taken_over(tmp_path, changed):
    compress(task(), Cut(), workdir=tmp_path)
    other = task(seed=1) if changed == "seed" else task()
    if changed == "model":
        with torch.no_grad():
            other.model[0].weight.mul_(1.5)
    compress(other, Cut(by=7.0) if changed == "options" else Cut(), workdir=tmp_path)
    assert len(calls) == 2


# --- options and recipes as data -----------------------------------------------------------------------------------


def test_every_step_of_the_package_has_a_name_and_described_options():
    known = methods()
    assert {"prune.Channels", "quantize.Static", "quantize.WeightOnly", "distill.Logits"} <= set(known)
    for name, kind in known.items():
        assert kind.name() == name
        assert kind.__doc__
        assert all(field.metadata["help"] for field in kind.__dataclass_fields__.values() if "ClassVar" not in str(field.type))
        assert kind() == make(kind, {})


def test_yaml_gives_the_recipe_again(tmp_path):
    path = tmp_path / "recipe.yaml"
    recipe = Recipe.from_data(
        [{"prune.Channels": {"ratio": 0.25}}, "distill.Logits", {"quantize.Static": {"include": ["a*", "b"], "weight_bits": 4}}]
    )
    recipe.save(path)
    again = Recipe.load(path)
    assert again == recipe
    assert again.to_data()[0] == {"prune.Channels": {"ratio": 0.25}}
    assert again.to_data()[1] == "distill.Logits"
    assert list(again.flat())[2].include == ("a*", "b")


@pytest.mark.parametrize(
    ("data", "message", "expected"),
    [
        ([], "A recipe is a list", "a list of steps"),
        ("prune.Channels", "A recipe is a str", "a list of steps"),
        (None, "A recipe is a NoneType", "a list of steps"),
        ([3], "3 is not a step", "a name, or one name with its options"),
        ([{}], "is not a step", "a name"),
        ([{"prune.Channels": {}, "distill.Logits": {}}], "is not a step", "a name"),
        ([{"prune.Channels": 0.5}], "is not a step", "a name"),
        (["prune.Chanels"], "There is no step 'prune.Chanels'", "'prune.Channels'"),
        ([{"prune.Channels": {"ration": 0.5}}], "prune.Channels has no option 'ration'", "'ratio'"),
        ([{"prune.Channels": {"ratio": "half"}}], "prune.Channels: ratio is 'half'", "float, such as 0.5"),
        ([{"prune.Channels": {"ratio": True}}], "ratio is True", "float"),
        ([{"quantize.Static": {"weight_bits": 4.0}}], "weight_bits is 4.0", "int, such as 8"),
        ([{"quantize.Static": {"include": 3}}], "include is 3", "str or tuple"),
        ([{"quantize.Static": {"exclude": None}}], "exclude is None", "str or tuple"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(data, message, expected):
    with pytest.raises(StepError) as caught:
        Recipe.from_data(data)
    assert message in caught.value.given
    assert expected in caught.value.expected


def test_whole_numbers_stand_for_floats_and_none_where_it_is_meant():
    assert make(Scale, {"by": 3}).by == 3
    assert make(Scale, {"limit": None, "include": ["a"]}) == replace(Scale(), include=("a",))
    with pytest.raises(StepError, match="limit is 'x'"):
        make(Scale, {"limit": "x"})


@pytest.mark.parametrize("content", ["[unclosed", b"\xff\xfe\x00", None])
def test_a_recipe_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StepError, match="cannot be read"):
        Recipe.load(path)


def test_yaml_cannot_make_objects(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(StepError, match="cannot be read"):
        Recipe.load(path)
