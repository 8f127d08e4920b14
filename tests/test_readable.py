"""Numbers as people read them."""

import pytest

from lightning_peft import readable


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (8.2, "8 s"), (59.7, "1 min 0 s"), (550, "9 min 10 s"), (3599.6, "1 h 0 min"),
        (7_500, "2 h 5 min"), (86_399, "1 d 0 h"), (200_000, "2 d 8 h"),
    ],
)  # fmt: skip
def test_duration_has_two_units(seconds, text):
    assert readable.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.2, "8 s"), (99.4, "99 s"), (99.6, "2 min"), (4_400, "73 min"), (1e6, "12 d")]
)
def test_short_duration_has_one_unit(seconds, text):
    assert readable.short_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (11_510.0, "11,510"), (999.96, "1,000"), (32_768, "32,768"), (85.44, "85.44"), (0.4988, "0.4988"),
        (0.000195, "1.95e-4"), (2e-4, "2e-4"), (0.0, "0"), (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_number_has_separators_and_no_false_digits(value, text):
    assert readable.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (999.6, "1.0k"), (2_430, "2.4k"), (11_510, "12k"), (1_300_000, "1.3M")]
)
def test_short_count(value, text):
    assert readable.short_count(value) == text
