"""The directories that verbs write, and the names in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgecl.errors import ArtifactError
from edgecl.onboard import bundle as bundle_names
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.record_files import read_record
from edgecl.storage.records import Manifest, ModelRecord, PipelineRecord, RunRecord


class RunDir:
    """The directory of one pretraining run: its record, metrics and checkpoints."""

    KIND = RunRecord.KIND
    RECORD = RunRecord.FILE

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.metrics_file = self.path / "metrics.jsonl"
        self.views_file = self.path / "views.png"
        self.checkpoints = self.path / "checkpoints"
        self.beside = self.path.absolute().parent / ".edgecl"
        """Where what takes long to find is kept, for the next start and for neighboring runs."""

    def checkpoint_file(self, step: int) -> Path:
        """Return the directory of the checkpoint after so many steps."""
        return self.checkpoints / f"step-{step:09d}"

    def read(self) -> RunRecord:
        """Return the run's record; see `read_record` for the errors."""
        return read_record(self.record_file, RunRecord)


class ModelDir:
    """The directory of one small net: its record and its weights."""

    KIND = ModelRecord.KIND
    RECORD = ModelRecord.FILE

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.weights_file = self.path / "weights.safetensors"
        self.probe_file = self.path / "probe.json"
        self.cost_file = self.path / "cost.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.inspection_file = self.path / "inspection.json"

    def read(self) -> ModelRecord:
        """Return the model's record after comparing it and the weights with their hashes.

        Raises:
            ArtifactError: not a model directory, an entry is missing or of another type, or the weights changed since.
        """
        record = read_record(self.record_file, ModelRecord)
        if not self.weights_file.is_file():
            raise ArtifactError("the model's weights are missing", where={"file": self.weights_file})
        found = sha256_of_file(self.weights_file)
        if found != record.weights_sha256:
            raise ArtifactError(
                f"the weights do not match their hash: model.json says {record.weights_sha256[:12]}…, "
                f"the file has {found[:12]}…",
                where={"file": self.weights_file},
                hint="the file changed after it was written; carve or fine-tune it again",
            )
        return record

    @property
    def sha256(self) -> str:
        """Hash of the model's record, which itself holds the hash of the weights."""
        return sha256_of_file(self.record_file)


class Bundle:
    """The directory a device gets: ONNX, manifest, reference inputs and outputs, and the code that runs them."""

    KIND = Manifest.KIND
    RECORD = Manifest.FILE

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / bundle_names.MANIFEST
        self.reference_file = self.path / bundle_names.REFERENCE
        self.verify_file = self.path / bundle_names.VERIFY
        self.onboard_file = self.path / bundle_names.ONBOARD
        self.readme_file = self.path / bundle_names.README
        self.trtexec_file = self.path / bundle_names.TRTEXEC

    def bench_file(
        self, device: str, *, runtime: str, precisions: Sequence[str], threads: int, batch: int
    ) -> Path:
        """Return the record of a measurement on a device."""
        return self.path / bundle_names.bench_name(device, runtime, precisions, threads, batch)

    def read(self) -> Manifest:
        """Return the manifest; `verify` checks the files."""
        return read_record(self.record_file, Manifest)


class ReportDir:
    """The directory of one report: a page, a text and the numbers behind them."""

    KIND = "report"
    RECORD = "report.json"

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.page_file = self.path / "report.html"
        self.text_file = self.path / "report.md"


class PipelineDir:
    """The directory of `edgecl run`: every stage's output, one folder each, and the comparison."""

    KIND = PipelineRecord.KIND
    RECORD = PipelineRecord.FILE

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.run = self.path / "pretrain"
        self.slim = self.path / "slim"
        self.random = self.path / "random"
        self.given = self.path / "given"
        self.scratch = self.path / "scratch"
        self.comparison_file = self.path / "comparison.json"
        self.bundles = self.path / "bundles"
        self.report = self.path / "report"
