"""What is logged while a run trains, and when it must stop."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from edgecl.errors import CollapseError, tell
from edgecl.nets.slimming import SlimmableNet
from edgecl.storage.reading import METRICS_BYTES, parse_json, read_bytes
from edgecl.storage.writing import disk_errors, write_bytes

# Below a tenth of an even spread the projections agree on almost every dimension (METHOD section 4, row 11).
COLLAPSE_SPREAD = 0.1
# A net with a large mean looks collapsed to the spread, but its views still agree beyond the mean.
COLLAPSE_DIAGONAL = 0.3
# Records in a row: early steps pass through narrow states and recover.
COLLAPSE_PATIENCE = 5
# Looks at RankMe in a row, each below the one before.
FALLING_RANK_ME = 3


class MetricsFile:
    """Append records to metrics.jsonl, one JSON object a line; those after a step, which is made again, are dropped."""

    def __init__(self, path: Path, *, after_step: int = 0):
        self._path = path
        self._file: IO[str] | None = None
        self.keep_until(after_step)

    def keep_until(self, step: int) -> None:
        """Drop the records of later steps; at the first step also the look before it, which is taken again."""
        kept = [
            record
            for record in read_metrics(self._path)
            if record["step"] <= step and (step > 0 or "event" in record)
        ]
        if self._file:
            self._file.close()
        write_bytes(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and hand it to the operating system; numbers that are not finite become null."""
        tidy = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        assert self._file is not None
        with disk_errors(self._path):
            self._file.write(json.dumps(tidy) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Flush the file to the disk: a checkpoint must not outlive the records before it."""
        assert self._file is not None
        with disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        if self._file:
            try:
                self.sync()
            finally:
                self._file.close()
                self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line torn by a kill is left out, any other that is no record is named on stderr."""
    records: list[dict[str, Any]] = []
    lines = read_bytes(path, most=METRICS_BYTES).splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            float(record["step"])
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                tell(f"line {number} of '{path}' is no record and left out")
            continue
        records.append(record)
    return records


class CollapseAlarm:
    """Warn when the projections no longer differ or the features lose dimensions; stop when it lasts.

    Source: METHOD section 4, row 11.
    """

    def __init__(self, *, run: Path, warn: Callable[[str], None]):
        self._run = run
        self._warn = warn
        self._low = 0
        self._rank_me: list[float] = []

    def check(self, record: Mapping[str, Any]) -> str | None:
        """Look at one metrics record of a step.

        Returns:
            "collapse" when it gave cause for a warning.

        Raises:
            CollapseError: the spread of the projections stayed below a tenth of an even one.
        """
        if not math.isfinite(record["loss"]):
            return None
        # Of a method that does not correlate its views, the spread alone tells.
        collapsed = record["std"] < COLLAPSE_SPREAD and record.get("diagonal", 0.0) < COLLAPSE_DIAGONAL
        self._low = self._low + 1 if collapsed else 0
        if self._low == 0:
            return None
        seen = (
            f"the spread of the projections is {record['std']:.3g}, below {COLLAPSE_SPREAD:g} (1 is an even spread), "
            f"and the diagonal of the correlation {record['diagonal']:.3g}"
            if "diagonal" in record
            else f"the spread of the embeddings is {record['std']:.3g}, below {COLLAPSE_SPREAD:g} (1 is an even spread)"
        )
        if self._low >= COLLAPSE_PATIENCE:
            raise CollapseError(
                f"the embedding collapsed: {seen}, in {self._low} records in a row",
                where={"run": self._run, "step": record["step"]},
                hint="start a new run, in another --out, with a lower [optim] lr, a higher "
                "[method.coding_rate] weight, or milder [views]",
            )
        if self._low == 1:
            self._warn(
                f"step {record['step']}: the embedding may be collapsing: {seen}; "
                f"{COLLAPSE_PATIENCE} such records in a row stop the run"
            )
        return "collapse"

    def check_quality(self, record: Mapping[str, Any]) -> str | None:
        """Look at one record of quality: RankMe that falls three times in a row is a warning.

        Returns:
            "rankme falls" when it gave cause for one.
        """
        value = record.get("rankme_slim") or record.get("rankme_host")
        if value is None:
            return None
        self._rank_me = [*self._rank_me, float(value)][-(FALLING_RANK_ME + 1) :]
        falls = len(self._rank_me) > FALLING_RANK_ME and all(
            later < earlier for earlier, later in itertools.pairwise(self._rank_me)
        )
        if not falls:
            return None
        self._warn(
            f"step {record['step']}: RankMe fell {FALLING_RANK_ME} times in a row, "
            + " > ".join(f"{rank:.1f}" for rank in self._rank_me)
            + ": the features lose dimensions; lower [optim] lr or raise [method.coding_rate] weight if it goes on"
        )
        return "rankme falls"

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {"low": self._low, "rank_me": list(self._rank_me)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        self._low = int(state.get("low", 0))
        self._rank_me = [float(value) for value in state.get("rank_me", [])]


def gradient_norms(net: SlimmableNet, watched: dict[str, Tensor], *, scale: float) -> dict[str, float | None]:
    """Measure how strongly the host's pass and the slim net's pass each pull.

    Args:
        net: after the backward pass, before gradients are clipped.
        watched: gradients of the slim pass's slices, by name.
        scale: what the loss was multiplied by before the backward pass (fp16), else 1.

    Returns:
        L2 norms of the gradients that came through the slim net's passes, and through all others: the host's and
        those of narrower slim nets.
    """
    host_square = slim_square = 0.0
    for name, parameter in net.host.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.detach().float()
        part = watched.get(name)
        if part is not None:
            through_slim = part.detach().float()
            slim_square += float(through_slim.square().sum())
            gradient = gradient.clone()
            gradient[net.slim_index[name]] -= through_slim
        host_square += float(gradient.square().sum())
    for parameter in net.slim_norms.parameters():
        if parameter.grad is not None:
            slim_square += float(parameter.grad.detach().float().square().sum())
    return {
        "grad_norm_host": math.sqrt(host_square) / scale,
        "grad_norm_slim": math.sqrt(slim_square) / scale if net.has_slim else None,
    }
