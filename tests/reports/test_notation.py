"""How numbers are written."""

from __future__ import annotations

import pytest

from edgecl.reports.notation import duration, megabytes, milliseconds, percent, points, scaled, shortened


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.04123, "0.0412"),
        (0.412, "0.412"),
        (1.2, "1.20"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.0, "1,230"),
    ],
)
def test_milliseconds_have_three_significant_digits(value, text):
    assert milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (4_712_000, "4.7 M"),
        (231_400, "231 k"),
        (999_950, "1.0 M"),
        (512, "512"),
        (4_100_000_000, "4.1 G"),
        (99_960, "100 k"),
    ],
)
def test_counts_have_their_prefix(value, text):
    assert scaled(value) == text


def test_percent_has_one_decimal_and_no_negative_zero():
    assert (percent(56.46), percent(None), percent(-0.04), points(-0.04), points(-1.26)) == (
        "56.5",
        "–",
        "0.0",
        "+0.0",
        "−1.3",
    )


def test_bytes_are_millions_of_bytes():
    assert (megabytes(934_210), megabytes(16_480_000), megabytes(None)) == ("0.93", "16.5", "–")


def test_durations_read_as_said():
    assert [duration(seconds) for seconds in (4.214, 59.4, 151.3, 7500)] == [
        "4.21 s",
        "59 s",
        "2 min 31 s",
        "2 h 05 min",
    ]


def test_long_names_lose_their_middle():
    assert (shortened("abcdefghij", 5), shortened("abc", 5)) == ("ab…ij", "abc")
