"""Curves keep what a chart must show."""

from __future__ import annotations

from edgecl.report.curves import MOST_POINTS, curve


def test_thinned_curve_keeps_its_spikes():
    lines = [{"epoch": step / 100, "loss": 500.0 if step == 7777 else 1.0} for step in range(10_000)]
    thin = curve(lines, "loss")
    assert thin is not None
    assert len(thin["mean"]) <= MOST_POINTS
    assert max(thin["high"]) == 500.0
    assert min(thin["low"]) == 1.0


def test_short_curve_is_unchanged():
    thin = curve(
        [{"epoch": 1.0, "loss": 3.0}, {"epoch": 2.0, "loss": None}, {"epoch": 3.0, "loss": 2.0}], "loss"
    )
    assert thin == {"epoch": [1.0, 3.0], "mean": [3.0, 2.0], "low": [3.0, 2.0], "high": [3.0, 2.0]}


def test_quantity_nobody_logged_is_none():
    assert curve([{"epoch": 1.0}], "loss") is None
