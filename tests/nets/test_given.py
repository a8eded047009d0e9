"""Nets that somebody trained: the features are those of the net in the file, and what is another's is named."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from edgecl.config.recipe import Data, Host
from edgecl.errors import ArtifactError, DeviceError, RecipeError
from edgecl.nets.given import load_given, load_start
from edgecl.nets.model_dir import load_model

ARCH = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def trained():
    """A net with a classifier, whose every tensor is its own."""
    torch.manual_seed(3)
    net = timm.create_model(ARCH, num_classes=7).eval()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return net


@pytest.fixture
def pictures():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def features(net, pictures):
    with torch.no_grad():
        return net.forward_head(net.forward_features(pictures), pre_logits=True)


@pytest.mark.parametrize("form", ["safetensors", "pth", "state_dict", "model", "module."])
def test_the_features_are_those_of_the_net_in_the_file(tmp_path, trained, pictures, form):
    tensors = trained.state_dict()
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(tensors, file)
    elif form == "pth":
        torch.save(tensors, file)
    elif form == "module.":
        torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, file)
    else:
        torch.save({form: tensors, "epoch": 3}, file)
    given = load_given(str(file), arch=ARCH)
    with torch.no_grad():
        assert torch.equal(given.net(pictures), features(trained, pictures))
    assert (given.arch, given.mean, len(given.sha256)) == (ARCH, None, 64)
    assert given.left_out == ("classifier.bias", "classifier.weight")


def test_a_model_directory_says_its_architecture_and_normalization(carved_model, pictures):
    given = load_given(str(carved_model), arch=None)
    net, record = load_model(carved_model)
    with torch.no_grad():
        assert torch.equal(given.net(pictures), net(pictures))
    assert given.arch == record.arch
    assert tuple(given.mean) == tuple(record.preprocessing.mean)
    with pytest.raises(RecipeError, match=f"'{record.arch}', not a 'resnet18'"):
        load_given(str(carved_model), arch="resnet18")


def test_an_untrained_net_is_always_the_same(pictures):
    torch.manual_seed(1)
    first = load_given("untrained", arch=ARCH).net(pictures)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(load_given("untrained", arch=ARCH).net(pictures), first)


def test_weights_of_another_net_are_named_with_both_shapes(tmp_path, trained):
    file = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), file)
    with pytest.raises(RecipeError, match=r"'[\w.]+' has the shape \(8, 16, 1, 1\), and is \(16, 16, 1, 1\)"):
        load_given(str(file), arch="mobilenetv3_large_100")
    tensors = trained.state_dict()
    tensors["conv_stem.weight"] = torch.zeros(24, 3, 3, 3)
    save_file(tensors, file)
    with pytest.raises(
        RecipeError, match=r"'conv_stem.weight' has the shape \(24, 3, 3, 3\), and is \(16, 3, 3, 3\)"
    ):
        load_given(str(file), arch=ARCH)
    save_file({**trained.state_dict(), "extra.weight": torch.zeros(1)}, file)
    with pytest.raises(RecipeError, match="the net has no 'extra"):
        load_given(str(file), arch=ARCH)


def test_numbers_that_are_not_finite_are_named(tmp_path, trained):
    tensors = {**trained.state_dict()}
    tensors["conv_stem.weight"] = (
        tensors["conv_stem.weight"].clone().index_fill_(0, torch.tensor([3]), torch.nan)
    )
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"'conv_stem.weight'.* not finite"):
        load_given(str(tmp_path / "weights.safetensors"), arch=ARCH)


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    torch.save({"state_dict": Bomb()}, tmp_path / "zip.pth")
    for name in ("weights.pth", "zip.pth"):
        with pytest.raises(ArtifactError, match="not a file of tensors"):
            load_given(name, arch=ARCH)
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"\x80\x02}."])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_of_something_else_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ArtifactError, RecipeError)):
        load_given(str(tmp_path / name), arch=ARCH)


def test_what_is_missing_is_named(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    with pytest.raises(ArtifactError, match="neither a file of weights"):
        load_given(str(tmp_path / "none.pth"), arch=ARCH)
    with pytest.raises(RecipeError, match="do not say of which net"):
        load_given(str(file), arch=None)
    with pytest.raises(RecipeError, match="no architecture 'resnet181'"):
        load_given("untrained", arch="resnet181")


def test_without_a_network_the_hub_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(DeviceError, match="timm's hub gives no weights of 'mobilenetv3_small_050'"):
        load_given("timm", arch=ARCH)


def test_a_model_directory_must_have_the_width_the_stride_and_the_normalization(carved_model):
    record = load_model(carved_model)[1]
    host = Host(arch=record.arch, init=str(carved_model), stem_stride=record.stem_stride)
    data = Data(mean=tuple(record.preprocessing.mean), std=tuple(record.preprocessing.std))
    assert load_start(host.init, host=host, width=record.width, data=data).arch == record.arch
    with pytest.raises(
        RecipeError, match=r"at width 2: '[\w.]+' has the shape \([\d, ]+\), and is \([\d, ]+\)"
    ):
        load_start(host.init, host=host, width=2.0, data=data)
    with pytest.raises(RecipeError, match=r"'data\.mean' is") as caught:
        load_start(
            host.init, host=host, width=record.width, data=data.model_copy(update={"mean": (0.5, 0.5, 0.5)})
        )
    assert "set [data] mean = [" in caught.value.hint
    other = host.model_copy(update={"stem_stride": 1 if record.stem_stride != 1 else 2})
    with pytest.raises(RecipeError, match="the stem stride"):
        load_start(other.init, host=other, width=record.width, data=data)


def in_the_hubs_cache(folder, net, repository):
    """Lay a net into the cache of huggingface_hub as a download would, by what timm itself publishes."""
    place = folder / f"models--{repository.replace('/', '--')}"
    timm.models.save_for_hf(net, place / "snapshots" / ("a" * 40), safe_serialization=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)


def test_a_repository_of_the_hub_gives_what_timm_loads_from_it(tmp_path, monkeypatch, trained, pictures):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    in_the_hubs_cache(tmp_path, trained, "somebody/net")
    timms = timm.create_model("hf-hub:somebody/net", pretrained=True, num_classes=0).eval()
    given = load_given("hf-hub:somebody/net", arch=None)
    with torch.no_grad():
        assert torch.equal(given.net(pictures), timms(pictures))
        assert torch.equal(given.net(pictures), features(trained, pictures))
    assert (given.arch, given.left_out) == (ARCH, ("classifier.bias", "classifier.weight"))
    assert list(given.mean) == list(timms.pretrained_cfg["mean"])
    assert given.sha256 == load_given("hf-hub:somebody/net", arch=ARCH, width=1.0).sha256
    with pytest.raises(RecipeError, match=f"holds a '{ARCH}', not a 'resnet18'"):
        load_given("hf-hub:somebody/net", arch="resnet18")
    with pytest.raises(DeviceError, match="the Hugging Face Hub gives no weights of 'nobody/net'"):
        load_given("hf-hub:nobody/net", arch=ARCH)
