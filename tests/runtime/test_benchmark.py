"""Benchmarks: what is twice the work measures slower, what is the same does not, and what fails is skipped with its reason."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from multum.errors import ExportError, MultumError
from multum.runtime import Bench, Session, bench, best, timing, verdict
from multum.runtime.benchmark import Timing, batch_size, resized
from multum.runtime.candidate import Remote


def test_twice_the_work_is_slower_and_the_same_work_is_not_faster(linear):
    one, two = linear(width=256, depth=8, scale=1.0), linear(width=256, depth=16, scale=1.0)
    candidates = {name: Session(path, "onnxruntime") for name, path in (("one", one), ("same", one), ("two", two))}
    measured = bench(candidates, torch.rand(1, 256), threads=(1,), rounds=24, seconds=20)
    assert measured.skipped == {}
    assert verdict(measured, "one", "two").faster
    slower = verdict(measured, "two", "one")
    assert not slower.faster
    assert slower.high < 1
    assert slower.reason.startswith("slower: 0.")
    same = verdict(measured, "one", "same")
    assert not same.faster
    assert same.low < 1 < same.high
    assert same.reason.startswith("inside the noise: ")
    assert best(measured, ["two", "one"]) == "one"


def test_memory_is_that_of_the_candidate(linear):
    peaks = {}
    for width in (64, 4096):  # the larger weight alone: 64 MB
        path = linear(width=width)
        remote = Remote(Session(path, "onnxruntime"), str(path), 1)
        peaks[width] = remote.prepare(torch.rand(1, width))
        remote.close()
    assert peaks[64] < 50e6
    assert 64e6 < peaks[4096] - peaks[64] < 400e6


def test_a_model_is_sent_to_its_process_from_memory_too(linear):
    path = linear()
    remote = Remote(Session(path, "onnxruntime"), path.read_bytes(), 1)
    assert remote.prepare(torch.rand(1, 4)) > 0
    assert 0 < remote.sample() < 1
    with pytest.raises(ExportError, match=r"the engine fails on the model: .*Got: 5 Expected: 4"):
        remote._ask("prepare", [np.zeros((1, 5), np.float32)])
    assert 0 < remote.sample() < 1  # it lives on
    remote.close()


def nap(seconds: float):
    return lambda x: time.sleep(seconds)


def broken(x):
    raise RuntimeError("no such kernel")


def test_callables_are_measured_here_and_failures_are_kept():
    measured = bench({"short": nap(0.002), "long": nap(0.006), "broken": broken}, torch.rand(4, 2), threads=(1,), rounds=6, seconds=5)
    assert [(one.candidate, one.batch) for one in measured.timings] == [("short", 1), ("long", 1), ("short", 4), ("long", 4)]
    assert all([len(row) for row in one.rounds] == [2, 2, 2] for one in measured.timings)
    assert measured.timing("short").memory is None
    assert measured.timing("short").median >= 2
    assert measured.timing("long").median >= 6
    assert measured.skipped == {("broken", batch, 1): "RuntimeError: no such kernel" for batch in (1, 4)}
    missing = verdict(measured, "broken", "long")
    assert (missing.faster, missing.ratio) == (False, None)
    assert missing.reason == "not measured at batch 1 on 1 threads: broken: RuntimeError: no such kernel"
    data = json.loads(json.dumps(measured.to_dict()))
    assert (
        data["timings"][0]["milliseconds"]["p10"]
        <= data["timings"][0]["milliseconds"]["median"]
        <= data["timings"][0]["milliseconds"]["p90"]
    )
    assert data["skipped"][0] == {"candidate": "broken", "batch": 1, "threads": 1, "reason": "RuntimeError: no such kernel"}
    assert data["machine"]["cpus"] >= 1


def test_torch_threads_are_as_asked_and_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def spy(x):
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))

    bench({"spy": spy}, torch.rand(1, 2), threads=(1,), rounds=1)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert set(seen) == {(1, True)}
    assert after == 2


@pytest.mark.parametrize("text", ["", "/autogroup-7 nice 3\n", None])
def test_times_are_taken_with_and_without_a_group_of_the_scheduler(text, tmp_path, monkeypatch):
    group = tmp_path / "autogroup"
    if text is not None:
        group.write_text(text)
    monkeypatch.setattr(timing, "_GROUP", group)
    with timing.undisturbed():
        assert text is None or group.read_text() == "-20"
    assert text is None or group.read_text() == ("3" if text else "-20")


def test_a_fixed_batch_size_is_skipped_at_others(linear):
    measured = bench({"fixed": Session(linear(batch=2), "onnxruntime")}, torch.rand(2, 4), threads=(1,), rounds=3, seconds=1)
    assert [(one.batch, len(one.rounds)) for one in measured.timings] == [(2, 3)]
    assert measured.skipped == {("fixed", 1, 1): "The input 'x' has the shape [1, 4]."}


def test_a_path_is_a_session_that_chooses(linear):
    measured = bench({"path": str(linear())}, torch.rand(1, 4), threads=(1,), rounds=1, seconds=1)
    assert [one.candidate for one in measured.timings] == ["path"]


def made(**rows: tuple[tuple[float, ...], ...]) -> Bench:
    return Bench(tuple(Timing(name, 1, 2, row, None) for name, row in rows.items()), {}, {})


def test_a_verdict_by_hand():
    row = (1.0, 2.0, 4.0)
    doubled = tuple(2 * one for one in row)
    result = verdict(made(fast=(row, row, row), slow=(doubled,) * 3), "fast", "slow")
    assert (result.faster, result.ratio) == (True, 2.0)
    assert result.low == pytest.approx(2 / 1.03)
    assert result.high == pytest.approx(2 * 1.03)
    assert result.reason == "faster: 2.00x (1.94 to 2.06) the speed of slow at batch 1 on 2 threads"


def test_every_process_must_be_faster():
    # 14 of 18 rounds are twice as fast, but in the third process the median is not: its ratios are 0.9, 0.9, 0.9, 0.9, 2, 2.
    fast = ((1.0,) * 6, (1.0,) * 6, (1.0,) * 6)
    slow = ((2.0,) * 6, (2.0,) * 6, (0.9, 0.9, 0.9, 0.9, 2.0, 2.0))
    result = verdict(made(fast=fast, slow=slow), "fast", "slow")
    assert result.ratio == 2.0
    assert not result.faster
    assert result.low == pytest.approx(0.9 / 1.03)


def test_a_gain_that_two_equal_processes_show_is_noise():
    result = verdict(made(a=((1.0,) * 3,) * 3, b=((1.02,) * 3,) * 3), "a", "b")
    assert not result.faster
    assert result.reason == "inside the noise: 1.02x (0.99 to 1.05) the speed of b at batch 1 on 2 threads"


def test_too_few_rounds_prove_nothing():
    result = verdict(made(a=((1.0,),) * 5, b=((9.0,),) * 5), "a", "b")
    assert (result.faster, result.ratio, result.low) == (False, 9.0, None)
    assert result.reason == "too few rounds at batch 1 on 2 threads: 5, an interval needs 6"


def test_names_and_settings_that_were_not_measured():
    measured = made(original=((1.0,),), compressed=((1.0,),))
    with pytest.raises(MultumError, match=r"'orignal' was not measured at batch 1 on 2 threads.\nDo: use 'original'"):
        verdict(measured, "orignal", "compressed")
    with pytest.raises(MultumError, match=r"'original' was not measured at batch 8 on 2 threads.\nDo: choose a setting"):
        measured.timing("original", batch=8)


def test_a_benchmark_that_makes_no_sense():
    x = torch.rand(1, 2)
    for options in ({"batches": (0,)}, {"threads": (-1,)}, {"threads": (10_000,)}, {"rounds": 0}):
        with pytest.raises(MultumError, match="at least one of each"):
            bench({"a": nap(0)}, x, **options)
    with pytest.raises(MultumError, match="0 candidates"):
        bench({}, x)
    with pytest.raises(MultumError, match="A candidate is a int"):
        bench({"a": 3}, x)
    with pytest.raises(MultumError, match="no tensor with a batch dimension"):
        bench({"a": nap(0)}, torch.tensor(1.0))
    training = bench({"net": torch.nn.Linear(2, 2)}, x, threads=(1,), rounds=1, seconds=1)
    assert training.skipped == {("net", 1, 1): "The model is in training mode."}
    with pytest.raises(MultumError, match="None of 'net' could be measured"):
        best(training, ["net"])


def test_resizing_keeps_structure_and_what_has_no_batch():
    inputs = {"a": torch.arange(3), "pair": (torch.arange(6).reshape(3, 2), torch.zeros(5, 3)), "flag": True}
    assert batch_size(inputs) == 3
    more, less = resized(inputs, 7), resized(inputs, 1)
    assert more["a"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert more["pair"][0].shape == (7, 2)
    assert more["pair"][1].shape == (5, 3)
    assert less["flag"] is True
    assert less["a"].tolist() == [0]


def test_a_process_that_dies_is_named(linear):
    remote = Remote(Session(linear(), "onnxruntime"), str(linear()), 1)
    remote.prepare(torch.rand(1, 4))
    assert remote.sample() > 0
    remote._process.kill()
    with pytest.raises(ExportError, match="its process ended with code -9: it said nothing"):
        remote.sample()
    remote.close()


def test_processes_end_with_the_benchmark(linear):
    started = []

    class Interrupted(BaseException):
        """As Ctrl-C is."""

    def interrupt(x):
        children = subprocess.run(
            ["ps", "-o", "pid=,stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
        ).stdout
        started.extend(line.split()[:2] for line in children.splitlines() if "multum.runtime.worker" in line)
        raise Interrupted

    with pytest.raises(Interrupted):
        bench({"worker": Session(linear(), "onnxruntime"), "interrupt": interrupt}, torch.rand(1, 4), threads=(1,))
    assert len(started) == 1
    assert started[0][1].startswith("T")  # stopped while another has its turn
    with pytest.raises(ProcessLookupError):
        os.kill(int(started[0][0]), 0)


def test_measuring_processes_do_not_wait_for_torch():
    code = "import sys, multum.runtime.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
