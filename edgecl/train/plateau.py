"""The plateau of one dimension: small nets can sit on it to the end of a run, and a falling loss does not show it.

When every dimension of the projections is the same function of the picture, up to sign, every entry of their
correlation matrix C has one size: the mean of its diagonal equals the root mean square off it. For the loss that is a
saddle (docs/results.md, "a plateau of one dimension"), left by chance or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from edgecl.storage.records import Plateau

# How far the two may lie apart, relative to the larger. Stuck runs were recorded within 0.02; runs that start well come
# as close in single records, never in three in a row (tests/train/recorded).
NEARNESS = 0.05
# Records in a row that tell one state from the other.
RECORDS = 3
# A RankMe below this part of min(N, F) is low. So it is for some good features too: it is no sign alone.
LOW_RANK = 0.1

HINT = (
    "turn on what keeps a net off it, [method.coding_rate] weight and [host] nested_start; where both are on, try half the "
    "[optim] lr, then twice, or a larger [data] batch_size"
)


class _Look(NamedTuple):
    """A look at the features."""

    rankme: float
    most: int
    """The largest RankMe there can be."""
    knn: float | None
    """Percent."""
    queries: int
    """Images that were classified."""


class PlateauAlarm:
    """Warn when the projections say only one thing and a look at the features finds nothing better.

    Neither sign is enough alone: projections may pass through one dimension, good features may have a low RankMe, and
    those of a run that starts well are for a while no better than random ones.
    """

    def __init__(self, *, warn: Callable[[str], None]):
        self._warn = warn
        self._alike = self._apart = 0
        self._correlation = [0.0, 0.0]
        self._first_knn: float | None = None
        self._look: _Look | None = None
        self._since: int | None = None

    def check(self, record: Mapping[str, Any]) -> str | None:
        """Look at one metrics record of a step; of a method that does not correlate its views there is nothing to see.

        Returns:
            the warning, when this record gave cause for one.
        """
        if "diagonal" not in record or "off_diagonal_rms" not in record:
            return None
        diagonal, rms = record["diagonal"], record["off_diagonal_rms"]
        if not math.isfinite(diagonal + rms):
            return None
        alike = abs(abs(diagonal) - rms) <= NEARNESS * max(abs(diagonal), rms)
        self._alike = self._alike + 1 if alike else 0
        self._apart = 0 if alike else self._apart + 1
        if alike:
            self._correlation = [diagonal, rms]
        return self._decide(record["step"])

    def check_quality(self, record: Mapping[str, Any], *, images: int, features: int) -> str | None:
        """Look at one record of quality, the first of them from before the first step.

        Args:
            record: RankMe and, where there are labels, kNN accuracy; of the slim net, of the host where there is none.
            images: N, how many were looked at; each half of them is classified by the other.
            features: F, length of a feature vector.

        Returns:
            the warning, when this record gave cause for one.
        """
        net = "host" if record["rankme_slim"] is None else "slim"
        knn = record[f"knn_top1_{net}"]
        if record["step"] == 0:
            self._first_knn = knn
            return None
        self._look = _Look(
            rankme=record[f"rankme_{net}"], most=min(images, features), knn=knn, queries=images // 2
        )
        return self._decide(record["step"])

    def decision(self) -> Plateau | None:
        """Return what a run's record says while it is stuck, else None."""
        if self._since is None:
            return None
        words = f"Pretraining got stuck on a plateau of one dimension by step {self._since}: {self._seen()}."
        return Plateau(since=self._since, words=words, hint=HINT)

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {
            "alike": self._alike,
            "apart": self._apart,
            "correlation": self._correlation,
            "first_knn": self._first_knn,
            "look": self._look and self._look._asdict(),
            "since": self._since,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept; nothing of a run from before there was this alarm."""
        self._alike = state.get("alike", 0)
        self._apart = state.get("apart", 0)
        self._correlation = state.get("correlation", [0.0, 0.0])
        self._first_knn = state.get("first_knn")
        look = state.get("look")
        self._look = _Look(**look) if look else None
        self._since = state.get("since")

    def _decide(self, step: int) -> str | None:
        poor = self._features_are_poor()
        if self._since is not None:
            if self._apart >= RECORDS or not poor:
                self._since = None
            return None
        if self._alike < RECORDS or not poor:
            return None
        self._since = step
        text = f"step {step}: training sits on a plateau of one dimension: {self._seen()}; {HINT}"
        self._warn(text)
        return text

    def _features_are_poor(self) -> bool:
        """Return whether the newest look found a low RankMe, or a kNN accuracy that has not risen beyond its noise."""
        if self._look is None:
            return False
        if self._look.rankme < LOW_RANK * self._look.most:
            return True
        if self._look.knn is None or self._first_knn is None:
            return False
        before, now = self._first_knn / 100, self._look.knn / 100
        noise = 1.96 * math.sqrt((before * (1 - before) + now * (1 - now)) / self._look.queries)
        return bool(now <= before + noise)

    def _seen(self) -> str:
        assert self._look is not None
        diagonal, rms = self._correlation
        text = (
            f"all dimensions of the projections say the same (the mean diagonal of C, {diagonal:.3f}, is as large as "
            f"the RMS off it, {rms:.3f}), and RankMe is {self._look.rankme:.1f} of at most {self._look.most:,}"
        )
        if self._look.knn is not None and self._first_knn is not None:
            text += f", kNN {self._look.knn:.1f} % (before the first step {self._first_knn:.1f} %)"
        return text
