"""Targets: what sizes mean, and what is refused with which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multum.errors import TargetError
from multum.search.target import Target


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        ("1/10", 100),
        (0.1, 100),
        ("0.1", 100),
        ("10x", 100),
        ("2.5X", 400),
        ("3/4", 750),
        (" 1 / 4 ", 250),
        ("500B", 500),
        ("200KB", 200_000),
        ("1.5 kb", 1_500),
        ("2MB", 2_000_000),
        ("2MiB", 2 * 1024**2),
        (None, None),
    ],
)
def test_a_size_is_a_share_of_the_original_or_bytes_with_a_unit(size: str | float | None, limit: int | None) -> None:
    assert Target(size=size).limit(1000) == limit


@given(st.integers(2, 500), st.integers(1, 10**9))
def test_a_file_at_the_limit_has_the_ratio_that_was_asked(ratio: int, original: int) -> None:
    limit = Target(size=f"1/{ratio}").limit(original)
    assert limit is not None
    assert limit == original // ratio
    assert Target(size=f"{ratio}x").limit(original) == limit


@pytest.mark.parametrize("size", ["10", 10, 1, "1", "200"])
def test_a_bare_number_is_ambiguous_and_the_error_says_what_to_write(size: str | float) -> None:
    with pytest.raises(TargetError) as caught:
        Target(size=size)
    assert caught.value.given == f"The size '{size}' is ambiguous."
    assert "'1/10', 0.1" not in caught.value.do
    assert f"'1/{size}'" in caught.value.do
    assert f"'{size}KB'" in caught.value.do
    assert "a share of the original file ('1/10' or 0.1), a ratio ('10x'), or a size ('200KB', '2MB')" in str(caught.value)


@pytest.mark.parametrize(
    "size", ["-1/10", "-0.1", "0", "nan", "inf", "0x", "0.5x", "10/1", "1/0", "0KB", "0.1B", "ten", "10 %", "1/2/3", "10TB", ""]
)
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(TargetError, match="Expected: a share of the original file"):
        Target(size=size)


def test_speed_is_times_faster() -> None:
    assert Target(speed="2x").speed == Target(speed=2).speed == Target(speed="2").speed == 2.0
    for speed in ("0.5", -1, "fast", "nan", True):
        with pytest.raises(TargetError, match="Expected: times faster than the original, 1 or more"):
            Target(speed=speed)


@pytest.mark.parametrize("drop", [-0.1, float("nan"), float("inf"), "much"])
def test_a_drop_is_a_number_of_points(drop: float) -> None:
    with pytest.raises(TargetError, match=r"drop .* cannot be used.\nExpected: 0 or more, in the unit of the score"):
        Target(max_drop=drop)


@pytest.mark.parametrize("minutes", [0, -5, float("nan")])
def test_time_is_above_zero(minutes: float) -> None:
    with pytest.raises(TargetError, match="Expected: a number above 0"):
        Target(minutes=minutes)


def test_as_data_it_holds_what_was_asked() -> None:
    assert Target("1/10", 2, 0.5).to_data() == {"size": "1/10", "speed": 2.0, "max_drop": 0.5}
    assert Target().empty
    assert Target(minutes=3).empty
    assert not Target(max_drop=0).empty
