"""Name what is on pictures, by a model directory in torch or by a bundle in a process of its own."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecl.deploy.process import error_from_onboard, run_here, silence_s
from edgecl.errors import ArtifactError, DataError
from edgecl.onboard.bundle import sha256_of_file
from edgecl.onboard.device_info import available_cores
from edgecl.onboard.errors import OnboardError
from edgecl.onboard.pictures import find_pictures
from edgecl.onboard.predict import DONE, Classifier, classify, sigmoid, softmax
from edgecl.onboard.runtime import Report
from edgecl.progress import Progress
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.records import Json, Predictions
from edgecl.storage.writing import write_bytes

_DONE = re.compile(DONE.replace("%d", r"(\d+)"))


def predict(
    model: Path,
    pictures: Sequence[Path],
    *,
    top: int = 5,
    out: Path | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    force: bool = False,
    say: Report = lambda line: None,
) -> Predictions:
    """Decode pictures, run them through a classifier, and name their classes; a file that is none gets a problem instead.

    `edgecl.predict` tells arguments, result and errors.
    """
    if out is not None:
        _check_out(out, force=force)
    is_bundle = Bundle(model).record_file.exists()
    if (precision or runtime) and not is_bundle:
        raise ArtifactError(
            "a precision or runtime is that of a bundle, and this is none",
            where={"directory": model},
            hint="leave them out for a model directory, which runs in torch",
        )
    try:
        files = find_pictures(pictures)
    except OnboardError as error:
        raise DataError(error.problem, hint=error.hint) from error
    # Loaded before the progress's clock starts: importing torch takes longer than a few pictures.
    classifier = None if is_bundle else _classifier(model)
    with Progress("predict" if len(files) > 1 else None, total=len(files), unit="pictures") as progress:
        done = 0

        def report(line: str) -> None:
            nonlocal done
            if found := _DONE.fullmatch(line):
                progress.advance(int(found[1]) - done)
                done = int(found[1])
            else:
                say(line)

        if classifier is None:
            made_from, found = _by_bundle(model, pictures, top, precision, runtime, report)
            # As they were given, not as they lie.
            given = {str(file.absolute()): str(file) for file in files}
            for prediction in found["predictions"]:
                prediction["file"] = given.get(prediction["file"], prediction["file"])
        else:
            made_from, found = _by_torch(model, classifier, files, top, report)
        progress.advance(len(files) - done)
    record = Predictions.model_validate({"made_from": made_from, **found})
    if out is not None:
        write_bytes(out, (_csv if out.suffix == ".csv" else _lines)(record))
    return record


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse what would fail after hours."""
    if out.suffix not in (".csv", ".jsonl"):
        raise ArtifactError(f"'{out.name}' is neither a .csv nor a .jsonl", where={"out": out})
    if out.exists() and not (force and out.is_file()):
        raise ArtifactError(
            f"output '{out}' already exists", hint="choose another --out, or replace it with --force"
        )
    if not out.absolute().parent.is_dir():
        raise ArtifactError(f"there is no folder '{out.parent}'", where={"out": out})


def _classifier(model: Path) -> Classifier:
    """Load a model directory's net, to be run in torch."""
    import torch

    from edgecl.nets.model_dir import load_model

    net, record = load_model(model)
    if record.classes is None:
        raise ArtifactError(
            "this net gives features, not classes",
            where={"model": model},
            hint="`edgecl finetune` adds a classifier",
        )

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return net(torch.from_numpy(images)).numpy()

    form = {"dtype": "float32", "layout": "nchw"}
    score = sigmoid if record.label_sets else softmax
    return Classifier(run, form, record.preprocessing.to_json(), record.classes, score)


def _by_torch(
    model: Path, classifier: Classifier, files: Sequence[Path], top: int, report: Report
) -> tuple[str, Json]:
    import torch

    found = classify(classifier, files, top=top, threads=available_cores(), report=report)
    return ModelDir(model).sha256, {**found, "runtime": f"torch {torch.__version__}", "precision": "fp32"}


def _by_bundle(
    bundle: Path,
    pictures: Sequence[Path],
    top: int,
    precision: str | None,
    runtime: str | None,
    report: Report,
) -> tuple[str, Json]:
    """Run a stranger's net where it can take only its own process along, as `edgecl verify` does."""
    manifest = Bundle(bundle).read()
    asked = {"--top": str(top), "--precision": precision, "--runtime": runtime}
    words = [word for name, value in asked.items() if value for word in (name, value)]
    try:
        found = run_here(
            ["predict", *words, str(bundle.resolve()), *(str(path.absolute()) for path in pictures)],
            threads=available_cores(),
            limit_s=silence_s(runtime or manifest.runtime),
            report=report,
        )
    except OnboardError as error:
        raise error_from_onboard(error, where={"bundle": bundle}) from error
    return sha256_of_file(Bundle(bundle).record_file), found


def _lines(record: Predictions) -> bytes:
    return "".join(json.dumps(one.to_json()) + "\n" for one in record.predictions).encode()


def _csv(record: Predictions) -> bytes:
    """Return a line a picture: its file, names and scores by rank, its problem."""
    ranks = max((len(one.top) for one in record.predictions), default=0)
    columns = [f"{what}_{rank}" for rank in range(1, ranks + 1) for what in ("class", "score")]
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["file", *columns, "problem"])
    for one in record.predictions:
        cells = [cell for guess in one.top for cell in (guess.name, guess.score)]
        table.writerow([one.file, *cells, *[""] * (len(columns) - len(cells)), one.problem or ""])
    return written.getvalue().encode("utf-8", "surrogateescape")
