"""The whole road in one real process on a tiny recipe, and what happens when it is walked again."""

from __future__ import annotations

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

import edgecl.pipeline
from edgecl.config.recipe import read_recipe
from edgecl.errors import ArtifactError, DataError, RecipeError, TargetError
from edgecl.onboard.bundle import sha256_of_file
from edgecl.pipeline import run
from edgecl.reports.report import report
from edgecl.storage.directories import Bundle, ModelDir, PipelineDir, ReportDir, RunDir
from edgecl.storage.record_files import kind_of, read_record, write_record
from edgecl.storage.records import BenchRecord, ComparisonRecord, DeviceInfo, VerifyRecord


@pytest.fixture(scope="module")
def walked(tmp_path_factory, edgecl_process, recipe_file, image_folder):
    """`edgecl run` as a user types it."""
    out = tmp_path_factory.mktemp("pipeline") / "out"
    done = edgecl_process("run", recipe_file, "--data", image_folder, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Within this process, measure nothing, probe nothing and write no report."""
    import edgecl.deploy.export

    def bench(bundle, *, precisions, duration_s):
        record = BenchRecord(
            made_from=None,
            runtime="onnxruntime",
            batch=1,
            threads=1,
            device=DeviceInfo(name="here"),
            measurements=[],
        )
        write_record(Bundle(bundle).path / "bench-here.json", record)

    def verify(bundle, *, runtime):
        write_record(Bundle(bundle).verify_file, VerifyRecord(made_from=None, ok=True, files_ok=True))

    monkeypatch.setattr("edgecl.deploy.device.bench", bench)
    monkeypatch.setattr(edgecl.deploy.export, "verify", verify)
    monkeypatch.setattr("edgecl.deploy.device.verify", verify)
    # Nor about probing,
    chance = SimpleNamespace(
        top1=lambda features, labels: 33.0, logits=lambda features: features.new_zeros(len(features), 3)
    )
    monkeypatch.setattr("edgecl.evaluate.probe.fit_linear", lambda features, labels, *, classes: chance)
    # nor about reports.
    monkeypatch.setattr(sys.modules[report.__module__], "report", lambda dirs, *, out, force: {"made": True})


@pytest.fixture
def out(tmp_path, walked):
    return shutil.copytree(walked[0], tmp_path / "out")


@pytest.fixture
def again(out, recipe_file, image_folder):
    """Run the same thing again in this process; return what was said."""

    def again(*, assignments=None, data=image_folder, **options):
        lines = []
        run(
            read_recipe(str(recipe_file), assignments),
            recipe_name="tiny",
            data=str(data),
            say=lines.append,
            **{"out": out, "resume": True, "device": "cpu", **options},
        )
        return stages_of(lines)

    return again


def stages_of(lines):
    """What was said of the stages, without how far an export is."""
    return [
        line for line in lines if not line.startswith("export ") or ": " not in line or line.endswith("done")
    ]


def hashes(directory):
    return {
        str(path.relative_to(directory)): sha256_of_file(path)
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).parts[0] not in ("report", ".lock")
    }


STAGES = ["pretrain", "carve", "cost", "probe", "export ort-cpu"]
ALL_DONE = [*(f"{stage}: already done" for stage in STAGES), "report"]


def test_every_stage_leaves_its_directory(walked):
    pipeline = PipelineDir(walked[0])
    paths = (pipeline.path, pipeline.run, pipeline.slim, pipeline.random, pipeline.bundles / "ort-cpu")
    assert [*map(kind_of, paths)] == ["pipeline", "run", "model", "model", "bundle"]


def test_records_form_a_chain(walked):
    """Each record names the hash of what it was made from."""
    pipeline = PipelineDir(walked[0])
    slim, bundle = ModelDir(pipeline.slim), Bundle(pipeline.bundles / "ort-cpu")
    (state,) = RunDir(pipeline.run).checkpoints.glob("step-*/state.json")
    assert slim.read().made_from == sha256_of_file(state)
    assert bundle.read().made_from == slim.sha256
    assert json.loads(bundle.verify_file.read_text())["made_from"] == sha256_of_file(bundle.record_file)
    assert json.loads(pipeline.comparison_file.read_text())["made_from"] == slim.sha256


def test_progress_is_on_stderr_and_the_report_on_stdout(walked):
    out, done = walked
    told = [line.removeprefix("edgecl: ") for line in done.stderr.splitlines() if line.startswith("edgecl: ")]
    assert stages_of(told) == [*STAGES, "report"]
    assert "export ort-cpu: fp32: exporting" in told
    assert done.stdout.rstrip().endswith(f"report: {ReportDir(out / 'report').page_file}")
    assert ReportDir(out / "report").page_file.is_file()


# --- from given weights ---


def test_a_run_from_given_weights_is_compared_with_them(again, tmp_path, walked):
    weights, pipeline = (
        shutil.copytree(walked[0] / "slim", tmp_path / "weights"),
        PipelineDir(tmp_path / "further"),
    )
    settings = [f"host.init={weights}", "host.nested_start=true", f"probe.pretrained_from_scratch={weights}"]
    again(assignments=settings, out=pipeline.path, resume=False)
    verdict = read_record(pipeline.comparison_file, ComparisonRecord).verdict
    assert re.search(r"pretraining .* points \[.*\] for .* seconds", verdict)
    for written in (pipeline.given, pipeline.scratch):
        assert ModelDir(written).read().weights_sha256 == ModelDir(weights).read().weights_sha256
    before = hashes(pipeline.path)
    again(assignments=settings, out=pipeline.path)
    assert hashes(pipeline.path) == before
    shutil.rmtree(pipeline.given)
    shutil.copytree(walked[0] / "random", weights, dirs_exist_ok=True)
    with pytest.raises(RecipeError, match="another init"):
        again(assignments=settings, out=pipeline.path)


def test_what_a_run_is_to_be_compared_with_is_looked_at_before_training(again, tmp_path):
    with pytest.raises(ArtifactError, match="neither a file of weights nor a model directory at 'nowhere'"):
        again(assignments=["probe.pretrained_from_scratch=nowhere"], out=tmp_path / "new", resume=False)
    assert not (tmp_path / "new").exists()


# --- again ---


def test_existing_output_is_refused(again):
    with pytest.raises(ArtifactError, match="already exists"):
        again(resume=False)


def test_resume_finds_every_stage_done_and_changes_nothing(again, out):
    before = hashes(out)
    assert again() == ALL_DONE
    assert hashes(out) == before


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        ("slim/cost.json", ["cost"]),
        ("comparison.json", ["probe"]),
        ("random", ["probe"]),
        ("bundles/ort-cpu", ["export ort-cpu"]),
        ("slim", ["carve", "cost", "probe", "export ort-cpu"]),
    ],
)
def test_stage_whose_output_is_gone_is_redone_with_what_was_made_from_it(again, out, lost, redone):
    path = out / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    expected = [stage if stage in redone else f"{stage}: already done" for stage in STAGES]
    assert again() == [*expected, "report"]
    assert path.exists()


def test_lost_run_is_trained_again_and_everything_after_it(again, out):
    shutil.rmtree(out / "pretrain")
    before = json.loads((out / "slim" / "model.json").read_text())
    assert again() == [*STAGES, "report"]
    after = json.loads((out / "slim" / "model.json").read_text())
    # The same recipe, seed and images: the same weights.
    assert after["weights_sha256"] == before["weights_sha256"]


def test_further_target_is_added(again, out):
    said = again(targets=["ort-cpu", "ort-cpu-batch"])
    assert said == [*ALL_DONE[:-1], "export ort-cpu-batch", "report"]
    assert kind_of(out / "bundles" / "ort-cpu-batch") == "bundle"


def test_changed_recipe_or_data_cannot_resume(again, image_folder, unlabelled_folder):
    with pytest.raises(ArtifactError, match=r"other settings: optim\.lr was 0\.01, now 0\.02"):
        again(assignments=["optim.lr=0.02"])
    with pytest.raises(ArtifactError, match=f"data was '{image_folder}', now '{unlabelled_folder}'"):
        again(data=unlabelled_folder)


def test_changed_pictures_cannot_resume_once_the_net_is_trained(again, tmp_path, image_folder):
    data = shutil.copytree(image_folder, tmp_path / "data")
    out = tmp_path / "new"
    again(out=out, resume=False, data=data)
    (out / "comparison.json").unlink()
    shutil.copy(data / "red" / "000.png", data / "red" / "new.png")
    with pytest.raises(ArtifactError, match=f"were {data} with 60 images, now {data} with 61 images"):
        again(out=out, data=data)
    assert not (out / "comparison.json").exists()


def test_run_that_lost_its_record_is_not_trained_over(again, out):
    (out / "pretrain" / "run.json").unlink()
    with pytest.raises(ArtifactError, match=r"has checkpoints but no run\.json"):
        again()
    assert list((out / "pretrain" / "checkpoints").iterdir())


def test_force_does_not_replace_a_folder_of_the_users(again, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="--force replaces only a pipeline directory"):
        again(out=tmp_path / "photos", resume=False, force=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_force_starts_from_the_beginning(again, out):
    (out / "slim" / "stray").write_text("x")
    assert again(resume=False, force=True) == [*STAGES, "report"]
    assert not (out / "slim" / "stray").exists()


# --- before hours are spent ---


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"targets": ["ort-cpuu"]}, "unknown target 'ort-cpuu'"),
        ({"targets": ["ort-cpu", "ort-cpu.toml"]}, "two targets are called 'ort-cpu'"),
        ({"precisions": ["fp8"]}, "fp8"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_training(again, tmp_path, monkeypatch, how, problem):
    monkeypatch.setattr(edgecl.pipeline._Stages, "_pretrain", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ort-cpu.toml").write_text('runtime = "onnxruntime"\n')
    with pytest.raises(TargetError, match=problem):
        again(out=tmp_path / "new", resume=False, **how)
    assert not (tmp_path / "new").exists()


def test_recipe_without_images_asks_for_them(recipe_file, tmp_path):
    with pytest.raises(RecipeError, match="the recipe 'tiny' names no images"):
        run(read_recipe(str(recipe_file)), recipe_name="tiny", out=tmp_path / "new")


def test_refused_start_leaves_nothing_and_another_may_follow(again, tmp_path, unlabelled_folder):
    new = tmp_path / "a" / "new"
    for _ in range(2):
        with pytest.raises(DataError, match="a batch of 64 is larger than the data"):
            again(out=new, resume=False, data=unlabelled_folder, assignments=["data.batch_size=64"])
        assert not (tmp_path / "a").exists()


def test_images_without_labels_give_no_comparison_and_no_error(again, tmp_path, unlabelled_folder):
    said = again(out=tmp_path / "new", resume=False, data=unlabelled_folder)
    assert said == [*STAGES, "report"]
    assert not PipelineDir(tmp_path / "new").comparison_file.exists()
    assert not PipelineDir(tmp_path / "new").random.exists()
    assert again(out=tmp_path / "new", data=unlabelled_folder) == ALL_DONE


# --- several widths ---

WIDTHS = ["slim.widths=[0.35, 0.4, 0.5]"]
STAGES_OF_WIDTHS = [*STAGES, "export ort-cpu 0.4", "export ort-cpu 0.35"]
NETS = {"slim": 0.5, "slim-0.4": 0.4, "slim-0.35": 0.35}


@pytest.fixture(scope="module")
def walked_with_widths(tmp_path_factory):
    """Where the road with three widths is walked by whoever needs it first, and what was said."""
    return tmp_path_factory.mktemp("widths") / "out", []


@pytest.fixture
def many(again, walked_with_widths, tmp_path):
    """A copy of the directory of three widths."""
    out, said = walked_with_widths
    if not said:
        said += again(out=out, resume=False, assignments=WIDTHS)
    return shutil.copytree(out, tmp_path / "many")


def test_every_width_goes_the_whole_road(many, again, walked_with_widths):
    out = many
    assert walked_with_widths[1] == [*STAGES_OF_WIDTHS, "report"]
    records = {name: ModelDir(out / name).read() for name in NETS}
    assert {name: record.width for name, record in records.items()} == NETS
    assert len({record.made_from for record in records.values()}) == 1
    for name in NETS:
        model = ModelDir(out / name)
        probe = json.loads(model.probe_file.read_text())
        assert probe["made_from"] == model.sha256
        assert probe["few_label_top1"]["labels_per_class"] == 2
        assert json.loads(model.cost_file.read_text())["params"] == records[name].params
        bundle = Bundle(out / "bundles" / name.replace("slim", "ort-cpu"))
        assert bundle.read().net.width == NETS[name]
        assert bundle.read().made_from == model.sha256
    assert json.loads((out / "comparison.json").read_text())["made_from"] == ModelDir(out / "slim").sha256
    again_said = again(out=out, assignments=WIDTHS)
    assert again_said == [*(f"{stage}: already done" for stage in STAGES_OF_WIDTHS), "report"]


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        ("slim-0.4/cost.json", ["cost"]),
        ("slim-0.4/probe.json", ["probe"]),
        ("bundles/ort-cpu-0.4", ["export ort-cpu 0.4"]),
    ],
)
def test_what_is_lost_of_one_width_is_made_again(many, again, lost, redone):
    out = many
    path = out / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    expected = [stage if stage in redone else f"{stage}: already done" for stage in STAGES_OF_WIDTHS]
    assert again(out=out, assignments=WIDTHS) == [*expected, "report"]
    assert path.exists()


def test_changed_target_file_is_exported_for_anew(again, out, tmp_path):
    target = tmp_path / "mine.toml"
    target.write_text('# mine\nruntime = "onnxruntime"\n[graph]\nbatch = 4\n')
    again(targets=[str(target)])
    assert f"export {target}: already done" in again(targets=[str(target)])
    target.write_text('# mine\nruntime = "onnxruntime"\n[graph]\nbatch = 2\n')
    assert f"export {target}" in again(targets=[str(target)])
    manifest = json.loads((out / "bundles" / "mine" / "manifest.json").read_text())
    assert manifest["input"]["shape"][0] == 2


def test_precisions_in_place_of_the_targets_are_exported_anew(again, out):
    assert again(precisions=["fp32", "fp16"])[-2:] == ["export ort-cpu", "report"]
    manifest = json.loads((out / "bundles" / "ort-cpu" / "manifest.json").read_text())
    assert list(manifest["precisions"]) == ["fp32", "fp16"]
    assert again(precisions=["fp32", "fp16"]) == ALL_DONE
