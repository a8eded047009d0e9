"""What a run does about a loss that is not finite: leave the step out, then go back once, then stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgecl.errors import NonFiniteError, counted

# Factor on the learning rate after a rollback.
SMALLER_RATE = 0.5
_HINT = (
    "start a new run, in another --out, with a lower [optim] lr, longer [optim] warmup_epochs, [optim] clip_norm, "
    "or in fp32 or bf16"
)


class Guard:
    """Counts steps left out since the last checkpoint, and remembers whether the run has gone back."""

    def __init__(self, *, max_skipped: int):
        self._max_skipped = max_skipped
        self.skipped: list[int] = []
        """Steps left out since the last checkpoint."""
        self.went_back = False

    @property
    def rate_factor(self) -> float:
        """What the schedule's learning rate is multiplied by."""
        return SMALLER_RATE if self.went_back else 1.0

    def must_go_back(self, step: int, *, terms: str, where: dict[str, object]) -> bool:
        """Count a step that was left out; return whether the run must go back to its last checkpoint.

        Raises:
            NonFiniteError: it already went back once.
        """
        self.skipped.append(step)
        if len(self.skipped) <= self._max_skipped:
            return False
        self._refuse_second_time(
            f"{counted(len(self.skipped), 'step')} since the last checkpoint had no finite loss, the last with {terms}",
            where,
        )
        return True

    def net_broke(self, what: str, *, where: dict[str, object]) -> None:
        """Note that weights or features are not finite, which no checkpoint may hold; the run must go back.

        Raises:
            NonFiniteError: it already went back once.
        """
        self._refuse_second_time(f"{what} hold numbers that are not finite", where)

    def _refuse_second_time(self, problem: str, where: dict[str, object]) -> None:
        if self.went_back:
            raise NonFiniteError(
                f"{problem}, again after going back to a checkpoint with {SMALLER_RATE:g} of the learning rate",
                where=where,
                hint=_HINT,
            )

    def go_back(self) -> None:
        """Start again from the last checkpoint."""
        self.went_back = True
        self.skipped = []

    def start_anew(self) -> None:
        """Count from here: a checkpoint with finite weights is due."""
        self.skipped = []

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {"went_back": self.went_back, "skipped": list(self.skipped)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        self.went_back = bool(state.get("went_back", False))
        self.skipped = list(state.get("skipped", []))
