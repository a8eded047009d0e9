"""The board's end of a remote run, without the connection: what it takes and what it refuses."""

import hashlib
import io
import json
import os
import time

import pytest

from edgecl.onboard.remote import MARK, go, pinned

CONTENT = b"some bytes of a net"
SHA = "bundle-0123456789ab"


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run.ABCDEFGH"
    directory.mkdir()
    return directory


def file(name="model.onnx", content=CONTENT, **changed):
    return {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **changed}


def say(run, files, sent=b"", *, bundle=SHA):
    """What the board answers to a request that never starts a run, since it is refused or cut short."""
    request = {"verb": "verify", "arguments": [], "bundle": bundle, "files": files, "target": None}
    told = io.StringIO()
    status = go(run, io.BytesIO(json.dumps(request).encode() + b"\n" + sent), told)
    assert status == 1
    assert not (run / "started").exists()
    lines = told.getvalue().splitlines()
    assert all(line.startswith(MARK) for line in lines)
    return [json.loads(line[len(MARK) :]) for line in lines]


@pytest.mark.parametrize(
    "names",
    [
        *({"name": name} for name in ("../x", "/etc/x", "a/b", ".x", "", "a b", "a;b", "-x", "x\n")),
        *({"bundle": f"{SHA}{end}"} for end in ("/x", "0", "\n")),
        *({"bundle": name} for name in (f"../{SHA}", "run.ABCDEFGH", "bundle-")),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(run, names):
    (answer,) = say(run, [file(names.get("name", "model.onnx"))], CONTENT, bundle=names.get("bundle", SHA))
    assert answer["refused"]["problem"] == "the board does not take files of such names"
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_bundle_that_does_not_fit_on_the_disk_is_refused_before_it_is_sent(run):
    (answer,) = say(run, [file(size=1 << 60)])
    assert answer["refused"]["problem"].startswith("no room on the board's disk: the bundle needs ")
    assert str(run.parent) in answer["refused"]["hint"]


def test_file_that_arrives_changed_is_refused_and_not_kept(run):
    answers = say(run, [file(sha256="0" * 64)], CONTENT)
    assert answers[0] == {"need": ["model.onnx"]}
    assert answers[1]["refused"]["problem"] == "'model.onnx' arrived changed: its hash is another"
    assert list((run.parent / SHA).iterdir()) == []


def test_connection_that_ends_within_a_file_leaves_no_part_of_it(run):
    whole = file("a.onnx")
    answers = say(run, [whole, file("b.onnx")], CONTENT + CONTENT[:5])
    assert answers == [{"need": ["a.onnx", "b.onnx"]}]
    assert [path.name for path in (run.parent / SHA).iterdir()] == ["a.onnx"]
    # The next try sends the rest only.
    assert say(run, [whole, file("b.onnx")]) == [{"need": ["b.onnx"]}]


def test_request_cut_short_is_no_request(run):
    told = io.StringIO()
    assert go(run, io.BytesIO(b'{"verb": "ver'), told) == 1
    assert told.getvalue() == ""


def test_parts_left_long_ago_are_removed(run):
    bundle = run.parent / SHA
    bundle.mkdir()
    for name, age_s in (("old", 7200), ("new", 10)):
        part = bundle / f".{name}.1.part"
        part.write_bytes(b"x")
        os.utime(part, (time.time() - age_s,) * 2)
    say(run, [file()], b"")
    assert [path.name for path in bundle.iterdir()] == [".new.1.part"]


def test_threads_are_pinned_in_the_environment(monkeypatch):
    monkeypatch.setenv("KEPT", "yes")
    environment = pinned(3)
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("3", "3")
    assert environment["KEPT"] == "yes"
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != "3"
