"""Curves keep what a chart must show."""

from __future__ import annotations

from edgecl.reports.content import MOST_POINTS, Curve, curve


def test_thinned_curve_keeps_its_spikes():
    lines = [{"epoch": step / 100, "loss": 500.0 if step == 7777 else 1.0} for step in range(10_000)]
    thin = curve(lines, "loss")
    assert thin is not None
    assert len(thin.mean) <= MOST_POINTS
    assert max(thin.high) == 500.0
    assert min(thin.low) == 1.0


def test_short_curve_is_unchanged():
    thin = curve([{"epoch": 1.0, "loss": 3.0}, {"epoch": 2.0}, {"epoch": 3.0, "loss": 2.0}], "loss")
    assert thin == Curve(epoch=[1.0, 3.0], mean=[3.0, 2.0], low=[3.0, 2.0], high=[3.0, 2.0])


def test_quantity_nobody_logged_is_none():
    assert curve([{"epoch": 1.0}], "loss") is None


def test_events_hide_no_look_at_quality(tmp_path):
    """A warning stands at the step of the look that gave cause for it."""
    from edgecl.reports.collect import read_metrics

    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 5, "epoch": 1.0, "loss": 1.0}\n'
        '{"step": 5, "epoch": 1.0, "rankme_slim": 3.0}\n'
        '{"step": 5, "epoch": 1.0, "event": "warning", "because": "rankme falls"}\n',
        encoding="utf-8",
    )
    steps, quality, unreadable = read_metrics(path)
    assert [line["loss"] for line in steps] == [1.0]
    assert [line["rankme_slim"] for line in quality] == [3.0]
    assert unreadable == 0
