"""Writing checkpoints off the training thread: a copy of every tensor, then one background thread and the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from edgecl.errors import tell
from edgecl.storage.checkpoint import to_json, write_checkpoint
from edgecl.storage.directories import RunDir

REPORT_AFTER_S = 30.0
"""How often a wait for the disk is reported."""


class Saver:
    """Writes the checkpoints of one run, one after another, while training goes on.

    A context manager: it is left only when the last checkpoint is on the disk. The memory that checkpoints are
    copied to is kept and used again, so that a run's memory does not grow from one to the next.
    """

    def __init__(self, run_dir: RunDir, *, keep: int, keep_best: bool):
        self._run_dir = run_dir
        self._keep = keep
        self._keep_best = keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edgecl-saver")
        self._write: Future[None] | None = None
        self._step = 0
        self._copies: dict[tuple[object, ...], Tensor] = {}
        self._devices: set[torch.device] = set()

    def save(
        self,
        *,
        step: int,
        epoch: int,
        model: Mapping[str, Tensor],
        optimizer: dict[str, Any],
        state: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
        on_written: Callable[[], None] | None = None,
    ) -> None:
        """Copy the state of a run and begin to write it; everything may change as soon as this returns.

        Waits for the write before it. The other arguments are those of `write_checkpoint`.

        Args:
            on_written: called on the background thread once the checkpoint is on the disk.

        Raises:
            ArtifactError: the write before it met a full disk; this one was not begun.
            TypeError: something JSON cannot hold exactly.
        """
        self.flush()
        taken = {
            "state": to_json(dict(state or {}), "state"),
            "quality": dict(quality) if quality else None,
            "model": self._copy(dict(model), ("model",)),
            "optimizer": self._copy(optimizer, ("optimizer",)),
        }
        # Copies from a device are only begun until here.
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()

        def write() -> None:
            write_checkpoint(
                self._run_dir, step=step, epoch=epoch, keep=self._keep, keep_best=self._keep_best, **taken
            )
            if on_written:
                on_written()

        self._step = step
        self._write = self._thread.submit(write)

    def flush(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            ArtifactError: the disk was full. Any other error of the write comes out here too, once.
        """
        if self._write is None:
            return
        begun = time.monotonic()
        while not wait([self._write], timeout=REPORT_AFTER_S).done:
            tell(
                f"waiting for the disk to take the checkpoint of step {self._step}, "
                f"{time.monotonic() - begun:.0f} s so far, in {self._run_dir.checkpoints}"
            )
        done, self._write = self._write, None
        done.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        on_its_way: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        except Exception as problem:
            if on_its_way is None:
                raise
            tell(f"the checkpoint of step {self._step} was not written: {problem}")
        finally:
            self._thread.shutdown(wait=self._write is None)  # not when a wait for a slow disk was interrupted
            self._copies.clear()

    def _copy(self, value: Any, name: tuple[object, ...]) -> Any:
        """Copy a nest of tables, lists, tensors and numbers; tensors to CPU memory."""
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), name)
        if isinstance(value, dict):
            return {key: self._copy(item, (*name, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            copies = [self._copy(item, (*name, index)) for index, item in enumerate(value)]
            return tuple(copies) if isinstance(value, tuple) else copies
        return value

    def _copy_tensor(self, tensor: Tensor, name: tuple[object, ...]) -> Tensor:
        place = self._copies.get(name)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            # In the tensor's own order, which is the quickest to copy; the background thread puts it in the file's.
            place = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[name] = place
        if tensor.is_cuda:
            self._devices.add(tensor.device)
        return place.copy_(tensor, non_blocking=tensor.is_cuda)
