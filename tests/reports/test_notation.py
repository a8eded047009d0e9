"""How numbers are written."""

from __future__ import annotations

import pytest

from edgecl.reports.notation import duration, megabytes, milliseconds, percent, points, scaled, shortened


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        # Three significant digits.
        (milliseconds, None, "–"),
        (milliseconds, 0.0, "0"),
        (milliseconds, 0.04123, "0.0412"),
        (milliseconds, 0.412, "0.412"),
        (milliseconds, 1.2, "1.20"),
        (milliseconds, 9.996, "10.0"),
        (milliseconds, 99.96, "100"),
        (milliseconds, 1234.0, "1,230"),
        (scaled, None, "–"),
        (scaled, 4_712_000, "4.7 M"),
        (scaled, 231_400, "231 k"),
        (scaled, 999_950, "1.0 M"),
        (scaled, 512, "512"),
        (scaled, 4_100_000_000, "4.1 G"),
        (scaled, 99_960, "100 k"),
        # No negative zero.
        (percent, 56.46, "56.5"),
        (percent, None, "–"),
        (percent, -0.04, "0.0"),
        (points, -0.04, "+0.0"),
        (points, -1.26, "−1.3"),
        (megabytes, 934_210, "0.93"),
        (megabytes, 16_480_000, "16.5"),
        (megabytes, None, "–"),
        (duration, 4.214, "4.21 s"),
        (duration, 59.4, "59 s"),
        (duration, 151.3, "2 min 31 s"),
        (duration, 7500, "2 h 05 min"),
    ],
)
def test_number_is_written_as_read(write, value, text):
    assert write(value) == text


def test_long_names_lose_their_middle():
    assert (shortened("abcdefghij", 5), shortened("abc", 5)) == ("ab…ij", "abc")
