"""The HTML page: complete, self-contained, safe against hostile names, and honest about what was missed."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from multum.errors import FileError
from multum.report import report
from multum.report.layers import MOST, bars
from multum.report.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, tradeoff
from multum.report.words import amount, duration, size, statistics

Write = Callable[[dict[str, Any]], Path]


class _Elements(HTMLParser):
    """The elements of a page, all their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_shows_the_three_numbers_against_the_target(written: Write, result: dict[str, Any]) -> None:
    text = _Elements(report(written(result)).read_text()).text
    for part in (
        "25.0x",
        "2.00x",
        "0.25",
        "1.00 MB → 40.0 KB",
        "0.3 ms → 0.15 ms",
        "92.75 → 92.50",
        "✓ asked: 1/20",
        "✓ allowed: 0.5",
        "✓ Target met",
    ):
        assert part in text


def test_a_missed_target_is_named(written: Write, result: dict[str, Any]) -> None:
    result |= {"met": False, "binding": "drop", "missed": {"drop": 0.6}, "stopped": "minutes"}
    text = _Elements(report(written(result)).read_text()).text
    assert "✗ Target not met: drop" in text
    assert "✗ allowed: 0.5" in text
    assert "✓ asked: 1/20" in text
    assert "The search ended early (minutes)" in text


def test_it_asks_nothing_of_the_network(written: Write, result: dict[str, Any]) -> None:
    page = report(written(result)).read_text()
    found = _Elements(page).found
    assert not [tag for tag, _ in found if tag in ("link", "img", "iframe", "object", "embed", "base")]
    assert not [attributes for _, attributes in found if {"src", "href", "srcset", "action"} & set(attributes)]
    assert not re.findall(r"url\(|@import|https?:", page)
    policy = next(attributes["content"] for tag, attributes in found if tag == "meta" and "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_names_from_a_model_are_text_and_nothing_else(written: Write, result: dict[str, Any]) -> None:
    hostile = '</script><script>alert(1)</script><img src=x onerror=alert(1)>" onmouseover="x'
    result["name"] = result["layers"][0]["name"] = result["verdict"] = hostile
    result["records"][0]["skipped"] = {hostile: hostile}
    result["recipe"] = [{hostile: {"a": hostile}}]
    found = _Elements(report(written(result)).read_text())
    assert [tag for tag, _ in found.found].count("script") == 1
    assert not [attributes for _, attributes in found.found if {"onerror", "onmouseover"} & set(attributes)]
    assert found.text.count("alert(1)") >= 5


def test_what_was_skipped_and_what_failed_has_its_reason(written: Write, result: dict[str, Any]) -> None:
    text = _Elements(report(written(result)).read_text()).text
    assert "its outputs are the model's: head, stem" in text
    assert "the loss is NaN at step 12" in text
    assert "1 candidate could not be made" in text
    assert "- prune.Channels:\n    ratio: 0.5\n- quantize.Static" in text


def test_without_data_it_says_that_nothing_was_scored(written: Write, result: dict[str, Any], candidates: list[dict[str, Any]]) -> None:
    for row in candidates:
        row["score"] = None
    result |= {"drop": None, "target": {}, "limit": None}
    assert tradeoff(result, candidates) is None
    text = _Elements(report(written(result)).read_text()).text
    assert "nothing was scored" in text
    assert "Recipe carried out" in text


def test_one_sentence_says_what_the_drop_proves(result: dict[str, Any]) -> None:
    assert statistics(result) == (
        "On 10 000 samples of the test data the compressed file lost 0.25 points; with 95 % confidence the loss is at most 0.40; "
        "original and compressed score differently on 150 of them (p = 0.031)."
    )
    result["drop"] |= {"points": -0.25}
    assert "the compressed file gained 0.25 points" in statistics(result)
    result["drop"] |= {"bound": None, "p": None, "discordant": None}
    assert "no confidence bound" in statistics(result)


def test_the_plot_puts_sizes_on_a_logarithmic_axis(result: dict[str, Any], candidates: list[dict[str, Any]]) -> None:
    plot = tradeoff(result, candidates)
    assert plot is not None
    by_title = {point["title"].split(":")[0]: point for point in plot["points"]}
    assert set(by_title) == {"original", "gentle", "strong"}
    original, gentle, strong = (by_title[name]["x"] for name in ("original", "gentle", "strong"))
    assert (original - gentle) / (original - strong) == pytest.approx(0.4307, abs=1e-3)  # log 4 / log 25
    assert by_title["original"]["y"] == by_title["gentle"]["y"] < by_title["strong"]["y"]
    assert by_title["strong"]["kind"] == "chosen"
    assert all(LEFT <= point["x"] <= WIDTH - RIGHT and TOP <= point["y"] <= HEIGHT - BOTTOM for point in plot["points"])
    assert strong < plot["limit"] < gentle
    assert plot["floor"] < plot["bottom"]
    result["higher_is_better"] = False
    flipped = tradeoff(result, candidates)
    assert flipped is not None
    assert flipped["floor"] < by_title["original"]["y"]


def test_one_candidate_alone_can_be_plotted(result: dict[str, Any], candidates: list[dict[str, Any]]) -> None:
    result["target"] = {}
    plot = tradeoff(result, candidates[:1])
    assert plot is not None
    assert len(plot["points"]) == 1
    assert plot["floor"] is None


def test_bars_are_relative_to_the_longest() -> None:
    layers = [
        {"name": "a", "before": {"bytes": 400, "parameters": 100}, "after": {"bytes": 100, "parameters": 100}},
        {"name": "b", "before": {"bytes": 200, "parameters": 50}, "after": None},
    ]
    by_key = {group["key"]: group["rows"] for group in bars(layers)}
    assert set(by_key) == {"bytes", "parameters"}
    assert [(row["before"], row["after"]) for row in by_key["bytes"]] == [(100, 25), (50, 0)]
    assert by_key["bytes"][1]["text"] == "200 B → 0 B"


def test_many_layers_are_summed_up() -> None:
    layers = [{"name": str(i), "before": {"bytes": 1000 - i}, "after": {"bytes": 10}} for i in range(MOST + 40)]
    (group,) = bars(layers)
    assert len(group["rows"]) == MOST
    assert group["rows"][-1]["name"] == "41 smaller layers"
    assert group["rows"][-1]["before"] == 100


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (45_210, "45.2 KB"), (999_600, "1.00 MB"), (2.5e9, "2.50 GB")]
)
def test_sizes_in_words(value: int, text: str) -> None:
    assert size(value) == text


def test_counts_and_times_in_words() -> None:
    assert amount(272_186) == "272 k"
    assert amount(7) == "7"
    assert [duration(ms) for ms in (0.0123, 0.25, 12.345, 1500)] == ["12.3 µs", "0.25 ms", "12.3 ms", "1.5 s"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "result.json").unlink(),
            r"There is no .*result.json.\nExpected: a folder that compress or run has written",
        ),
        (lambda folder: (folder / "result.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "result.json").write_text("[]"), "holds a list"),
        (lambda folder: (folder / "result.json").write_text('{"result": 2}'), r"is of version 2.\nExpected: version 1\nDo: update multum"),
        (lambda folder: (folder / "result.json").write_text('{"result": 1}'), "is damaged"),
        (lambda folder: (folder / "candidates.json").unlink(), "There is no .*candidates.json"),
    ],
)
def test_a_damaged_result_is_an_error_and_the_old_page_stays(
    written: Write, result: dict[str, Any], damage: Callable[[Path], None], message: str
) -> None:
    folder = written(result)
    before = report(folder).read_bytes()
    damage(folder)
    with pytest.raises(FileError, match=message):
        report(folder)
    assert (folder / "report.html").read_bytes() == before
