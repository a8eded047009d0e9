"""What is logged while a run trains, and when it must stop."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from edgecl.artifacts import disk_errors, write_bytes
from edgecl.errors import CollapseError, NonFiniteError
from edgecl.nets.slimming import SlimmableNet

# Below a tenth of an even spread the projections agree on almost every dimension (METHOD section 4, row 11).
COLLAPSE_SPREAD = 0.1
# A net with a large mean looks collapsed to the spread, but its views still agree beyond the mean.
COLLAPSE_DIAGONAL = 0.3
# Records in a row: early steps pass through narrow states and recover.
COLLAPSE_PATIENCE = 5


class MetricsFile:
    """Append records to metrics.jsonl, one JSON object a line.

    Args:
        path: the file.
        after_step: drop records of later steps, which a run being resumed will make again.
    """

    def __init__(self, path: Path, *, after_step: int = 0):
        kept = [record for record in read_metrics(path) if record["step"] <= after_step] if after_step else []
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and hand it to the operating system; numbers that are not finite become null."""
        tidy = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with disk_errors(self._path):
            self._file.write(json.dumps(tidy) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line torn by a kill is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class CollapseAlarm:
    """Stop a run whose loss is not a number, or whose projections no longer differ."""

    def __init__(self, *, run: Path):
        self._run = run
        self._low = 0

    def check(self, record: dict[str, Any]) -> None:
        """Look at one metrics record.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            CollapseError: the spread of the projections stayed below a tenth of an even one.
        """
        where = {"run": self._run, "step": record["step"]}
        if not math.isfinite(record["loss"]):
            terms = ", ".join(
                f"{name} {record[name]:g}"
                for name in ("sacl", "xd_host", "xd_slim")
                if record[name] is not None
            )
            raise NonFiniteError(
                f"the loss is {record['loss']:g} ({terms}; learning rate {record['lr']:.3g})",
                where=where,
                hint="lower [optim] lr, lengthen [optim] warmup_epochs, or train in fp32 or bf16",
            )
        self._low = self._low + 1 if _looks_collapsed(record) else 0
        if self._low >= COLLAPSE_PATIENCE:
            raise CollapseError(
                f"the embedding collapsed: the spread of the projections was {record['std']:.3g}, below "
                f"{COLLAPSE_SPREAD:g} (1 is an even spread), and the diagonal of the correlation "
                f"{record['diagonal']:.3g}, in {self._low} records in a row",
                where=where,
                hint="lower [optim] lr, raise [loss] off_diagonal, or use milder [views]",
            )


def _looks_collapsed(record: dict[str, Any]) -> bool:
    return bool(record["std"] < COLLAPSE_SPREAD and record["diagonal"] < COLLAPSE_DIAGONAL)


def gradient_norms(net: SlimmableNet, watched: dict[str, Tensor], *, scale: float) -> dict[str, float | None]:
    """Measure how strongly the host's pass and the slim net's pass each pull.

    Args:
        net: after the backward pass, before gradients are clipped.
        watched: the slim pass's slices, with gradients.
        scale: what the loss was multiplied by before the backward pass (fp16), else 1.

    Returns:
        L2 norms of the gradients that came through the host's passes and through the slim net's.
    """
    host_square = slim_square = 0.0
    for name, parameter in net.host.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.detach().float()
        part = watched.get(name)
        if part is not None and part.grad is not None:
            through_slim = part.grad.detach().float()
            slim_square += float(through_slim.square().sum())
            gradient = gradient.clone()
            gradient[tuple(slice(0, size) for size in through_slim.shape)] -= through_slim
        host_square += float(gradient.square().sum())
    for parameter in net.slim_norms.parameters():
        if parameter.grad is not None:
            slim_square += float(parameter.grad.detach().float().square().sum())
    return {
        "grad_norm_host": math.sqrt(host_square) / scale,
        "grad_norm_slim": math.sqrt(slim_square) / scale if net.has_slim else None,
    }
