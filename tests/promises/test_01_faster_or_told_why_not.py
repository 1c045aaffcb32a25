"""Promise 1: gains in time are paired medians with their spread; inside the noise the verdict is "not faster", with the reason."""

import itertools
import json

import pytest
import torch

import multum
from multum.prune import Channels
from multum.runtime import best, verdict


@pytest.fixture(scope="module")
def measured(task, tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("faster")
    multum.export(task.original, folder / "original.onnx", inputs=[task.example])
    multum.export(task.original, folder / "copy.onnx", inputs=[task.example])
    half = multum.compress(task, Channels(ratio=0.5)).graph
    multum.export(half, folder / "half.onnx", inputs=[task.example])
    names = ("original", "copy", "half")
    candidates = {name: multum.Session(folder / f"{name}.onnx", "onnxruntime") for name in names}
    return {"bench": multum.bench(candidates, task.example, batches=(1,), threads=(1,), rounds=9, seconds=20), "half": half}


def test_candidates_share_rounds_threads_and_inputs(measured):
    timings = measured["bench"].timings
    assert [one.candidate for one in timings] == ["original", "copy", "half"]
    assert len({(one.batch, one.threads) for one in timings}) == 1
    assert len({tuple(map(len, one.rounds)) for one in timings}) == 1, "each round times every candidate once"
    rows = json.loads(json.dumps(measured["bench"].to_dict()))["timings"]
    assert all(row["milliseconds"]["p10"] <= row["milliseconds"]["median"] <= row["milliseconds"]["p90"] for row in rows)


def test_the_verdict_is_the_paired_ratio_with_its_interval(measured):
    bench = measured["bench"]
    found = verdict(bench, "half", "original")
    pairs = zip(bench.timing("original").rounds, bench.timing("half").rounds, strict=True)
    ratios = [a / b for row in pairs for a, b in zip(*row, strict=True)]
    assert found.ratio == pytest.approx(torch.tensor(ratios).double().quantile(0.5).item())
    assert found.low < found.ratio < found.high
    assert found.faster == (found.low > 1)
    assert f"{found.ratio:.2f}x" in found.reason


def test_the_same_model_twice_is_not_called_faster(measured):
    for pair in itertools.permutations(("original", "copy")):
        found = verdict(measured["bench"], *pair)
        assert found.faster is (found.low > 1)
        assert found.faster or found.reason.startswith(("inside the noise", "slower"))
        assert found.low < 1.1, "an interval that excludes that two equal files are alike"


def test_the_baseline_is_the_fastest_of_those_named(measured):
    bench = measured["bench"]
    fastest = min(("original", "copy"), key=lambda name: bench.timing(name).median)
    assert best(bench, ["original", "copy"]) == fastest


def test_pruned_widths_are_multiples_of_what_engines_like(measured, task):
    def widths(graph) -> list[int]:
        return [node.meta["val"].shape[1] for node in graph.fx.nodes if "conv" in str(node.target) and node.op == "call_function"]

    pairs = list(zip(widths(task.original), widths(measured["half"]), strict=True))
    assert any(left < whole for whole, left in pairs)
    assert all(left % (8 if whole >= 32 else 4) == 0 for whole, left in pairs)  # of a quarter of a layer at most
