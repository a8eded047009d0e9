"""Bundles that a stranger made and sealed: refused by name, before anything is opened, unpacked or shown raw."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
from onboard.tiny_bundle import make_bundle, read_manifest, write_manifest

from edgecl.onboard.__main__ import main
from edgecl.onboard.bundle import is_plain_file, read_plain, sha256_of_file
from edgecl.onboard.doctor import doctor
from edgecl.onboard.errors import BundleError, OnboardError, bounded, printable
from edgecl.onboard.reference import read_reference
from edgecl.onboard.verify import verify


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def seal(bundle, **changes):
    """Write the manifest with changes, and with the hash of every file that can be read."""
    manifest = {**read_manifest(bundle), **changes}
    for name in manifest["files"]:
        if (bundle / name).is_file() and (bundle / name).stat().st_size < 1 << 28:
            manifest["files"][name] = sha256_of_file(bundle / name)
    write_manifest(bundle, manifest)


# --- what may be opened ---


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def endless_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def link_outside(path):
    outside = path.parent.parent / path.name
    path.rename(outside)
    path.symlink_to(outside)


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


def sparse(path):
    os.truncate(path, 1 << 33)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "reference.npz"])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (fifo, "no plain file"),
        (folder, "no plain file"),
        (endless_device, "is a link"),
        (link_outside, "is a link"),
        (link_to_nowhere, "is a link"),
        (sparse, "8589934592 bytes"),
    ],
)
def test_what_is_no_plain_file_of_its_own_is_refused_before_it_is_opened(bundle, name, spoil, why):
    spoil(bundle / name)
    with pytest.raises(BundleError, match=why) as caught:
        verify(bundle)
    assert f"'{name}'" in caught.value.problem


def test_a_file_that_nothing_reads_is_not_followed_out_of_the_bundle_either(bundle, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (bundle / "README.txt").symlink_to(tmp_path / "secret")
    files = {**read_manifest(bundle)["files"], "README.txt": sha256_of_file(tmp_path / "secret")}
    seal(bundle, files=files)
    with pytest.raises(BundleError, match=r"'README\.txt' .* is a link"):
        verify(bundle)


def test_a_bundle_under_a_linked_folder_is_as_any_other(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert verify(tmp_path / "link")["ok"]


def test_an_engine_or_its_record_that_is_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "engine.json")
    assert not is_plain_file(tmp_path / "engine.json")
    with pytest.raises(OSError, match="no plain file"):
        read_plain(tmp_path / "engine.json")


def test_a_file_that_must_not_be_read_is_named(bundle, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(BundleError, match="cannot be read: Permission denied"):
        verify(bundle)


# --- names ---


@pytest.mark.parametrize("name", ["n" * 300, "ä" * 200, "a\0b", "\x1b[2J", "a\u202eb", "\ud800"])
@pytest.mark.parametrize("place", ["files", "model"])
def test_a_name_that_no_file_has_is_refused(bundle, name, place):
    manifest = read_manifest(bundle)
    if place == "files":
        manifest["files"][name] = "0" * 64
    else:
        manifest["precisions"]["fp32"]["model"] = name
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=r"manifest\.json': '(files|precisions\.fp32\.model)' is "):
        verify(bundle)


@pytest.mark.parametrize("verb", ["verify", "bench", "doctor"])
def test_what_a_stranger_wrote_reaches_no_terminal_raw(bundle, capsys, verb):
    form = {**read_manifest(bundle)["input"], "name": "\x1b[2J\x1b]0;x\x07\u202e\u2066"}
    target = {"runtime": "\x1b[31m\u202e"}
    seal(bundle, input=form, **({"target": target, "runtime": "\x1b[31m\u202e"} if verb == "doctor" else {}))
    assert main([verb, str(bundle)]) == 1
    printed = capsys.readouterr()
    assert printed.err == printable(printed.err)
    assert r"\x1b[" in printed.err
    json.loads(printed.out)
    assert printed.out.isascii()


def test_an_error_is_bounded():
    assert len(bounded("x" * 1_000_000)) < 5000


# --- numbers and shapes ---


def test_numbers_of_thousands_of_digits_are_refused(bundle):
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"max_batch": 1', '"max_batch": ' + "9" * 5000))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        verify(bundle)


@pytest.mark.parametrize("shape", [[2**31 - 1, 3, 8, 8], [1, 3, 2**20, 2**20], [1, 2**30, 2**30, 2**30]])
def test_a_batch_that_fills_a_machine_is_refused(bundle, shape):
    seal(bundle, input={**read_manifest(bundle)["input"], "shape": shape})
    with pytest.raises(BundleError, match=r"'input\.shape' is .* bytes at most"):
        verify(bundle)


# --- reference.npz ---


def npy(shape, *, descr="'<f4'", content=b"\0" * 64):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + content


def put_reference(bundle, **members):
    with zipfile.ZipFile(bundle / "reference.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"inputs.npy": npy((1, 3, 8, 8)), "outputs.npy": npy((1, 6)), **members}.items():
            archive.writestr(name, content)
    seal(bundle)


@pytest.mark.parametrize(
    "members",
    [
        {"inputs.npy": npy((5_592_405, 3, 8, 8)), "outputs.npy": npy((5_592_405, 6))},
        {"inputs.npy": npy((1, 3, 2**16, 2**16))},
        {"inputs.npy": npy((2**44, 3, 8, 8)), "outputs.npy": npy((2**44, 6))},
        {"outputs.npy": npy((1, 2**40))},
        {"inputs.npy": npy((1, 3, 8, 8), descr="'<f16'")},
        {"inputs.npy": npy((1, 3, 8, 8), descr="'|O'")},
        {"inputs.npy": npy((1, 3, 8, 8), descr="'|V1000000000'")},
        {"inputs.npy": npy("(1, 3, 8, -8)")},
        {"inputs.npy": npy("(1, 3, 8")},
        {"inputs.npy": npy("(" * 4000)},
        {"inputs.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 1000},
        {"inputs.npy": b""},
    ],
    ids=["4 GiB", "48 GiB image", "12 PiB", "4 TiB outputs", "float128", "objects", "records", "negative", "torn", "deep",
         "4 GiB header", "empty"],
)  # fmt: skip
def test_arrays_are_held_to_the_manifest_before_they_are_unpacked(bundle, monkeypatch, members):
    put_reference(bundle, **members)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(BundleError, match=r"reference\.npz"):
        verify(bundle)


def test_the_arrays_that_are_unpacked_are_those_that_were_looked_at(bundle):
    """NumPy prefers a member 'inputs' to 'inputs.npy', which it names the same."""
    images = np.ones((1, 3, 8, 8), np.float32)
    with io.BytesIO() as whole:
        np.save(whole, images)
        put_reference(bundle, **{"inputs": npy((2**20, 3, 64, 64)), "inputs.npy": whole.getvalue()})
    found, _ = read_reference(bundle, read_manifest(bundle))
    assert np.array_equal(found, images)


def damaged(content, change):
    content = bytearray(content)
    for signature, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = content.index(signature)
        if change == "encrypted":
            content[at + place] |= 1
        else:
            content[at + place + 2] = 99  # the method of compression
    return bytes(content)


@pytest.mark.parametrize("change", ["encrypted", "another compression"])
def test_an_archive_of_another_kind_is_a_named_error(bundle, change):
    path = bundle / "reference.npz"
    path.write_bytes(damaged(path.read_bytes(), change))
    seal(bundle)
    with pytest.raises(BundleError, match="holds no reference inputs and outputs: "):
        verify(bundle)


@pytest.mark.parametrize("kind", ["float64", "float16", "big-endian", "fortran"])
def test_every_float_that_numpy_writes_is_read(bundle, kind):
    with np.load(bundle / "reference.npz") as arrays:
        inputs, outputs = arrays["inputs"], arrays["outputs"]
    changed = {"float64": "<f8", "float16": "<f2", "big-endian": ">f4"}
    kept = np.asfortranarray(inputs) if kind == "fortran" else inputs.astype(changed[kind])
    np.savez(bundle / "reference.npz", inputs=kept, outputs=outputs)
    seal(bundle)
    found, _ = read_reference(bundle, read_manifest(bundle))
    assert np.array_equal(found, kept.astype("<f4"))


# --- the boundary ---


@pytest.mark.parametrize(
    "exc", [TypeError("x"), KeyError("x"), MemoryError(), RecursionError("x"), OSError(5, "EIO")]
)
def test_what_nobody_foresaw_is_a_named_error(bundle, monkeypatch, capsys, exc):
    def fail(*_, **__):
        raise exc

    monkeypatch.setattr("edgecl.onboard.verify.verify", fail)
    assert main(["verify", str(bundle)]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert str(bundle) in error["problem"]


def values_of(manifest, place=()):
    """Every place in a manifest, as keys."""
    yield place
    if isinstance(manifest, dict):
        for key, value in manifest.items():
            yield from values_of(value, (*place, key))


WRONG = [
    None,
    True,
    -1,
    10**400,
    1e308,
    float("nan"),
    "",
    "\x1b[2J",
    "n" * 1000,
    [],
    [[]],
    {},
    {"a": {"b": []}},
]


@pytest.mark.parametrize("precisions", [("fp32",), ("int8", "fp32")])
def test_no_value_of_another_kind_anywhere_in_a_manifest_leads_to_anything_but_a_named_error(
    tmp_path, monkeypatch, precisions
):
    """Runtimes apart: these see what passed the checks, which is tried with a session that computes nothing."""
    bundle = make_bundle(tmp_path / "bundle", precisions=precisions)
    monkeypatch.setattr("edgecl.onboard.verify.open_session", lambda *_, **__: Nothing())
    monkeypatch.setattr(
        "edgecl.onboard.doctor.probe", lambda module, hidden=(): {"version": "1.0", "file": module}
    )
    whole = read_manifest(bundle)
    whole["target"]["build"] = {"workspace_mib": 8, "dla_core": 0, "compute_capabilities": ["SM86"]}
    for place in list(values_of(whole))[1:]:
        for value in WRONG:
            changed = json.loads(json.dumps(whole))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            write_manifest(bundle, changed)
            with contextlib.suppress(OnboardError):
                verify(bundle)
            doctor(bundle)


class Nothing:
    """A session."""

    def run(self, images):
        return np.zeros((len(images), 6), np.float32)

    def describe(self):
        return {"runtime": "nothing"}

    def close(self):
        pass
