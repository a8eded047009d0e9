"""The page of a run that trains: a real server, a real browser, and metrics that grow under it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from edgecl.errors import ArtifactError, DeviceError
from edgecl.reports import watch as watching
from edgecl.reports.watch import watch
from reports.test_browser import CHROMIUM


@pytest.fixture
def run(make, tmp_path, monkeypatch):
    """A run that is at step 200 of 1,200, in batches of 128, its page drawn whenever it changes."""
    monkeypatch.setattr(watching, "_DRAWN_AGAIN_S", 0)
    path = make.run(tmp_path / "run", steps=200, state="running")
    record = json.loads((path / "run.json").read_text())
    record["recipe"]["data"] = {"batch_size": 128}
    (path / "run.json").write_text(json.dumps(record))
    make.views(path)
    return path


@pytest.fixture
def served(run):
    with watch(run, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def asked(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return answer.read().decode("utf-8", "replace")


def append(run, **line):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def test_page_says_how_far_the_run_is_and_follows_it(served, run):
    page = asked(served)
    assert "200 of 1,200 steps, 1,0" in page
    # 1,000 steps of 128 images at about 1,040 images/s.
    assert "about 2 min" in page
    assert page.count("<svg") == 9
    append(run, step=201, epoch=3.2, loss=1.0, images_per_s=10.0)
    assert "201 of 1,200 steps" in asked(f"{served}/now")


def test_warnings_come_first_in_words_and_half_a_line_is_no_error(served, run):
    append(run, step=210, epoch=3.3, event="warning", because="plateau", words="it <sits> on a plateau")
    append(run, step=220, epoch=3.4, event="went back", because="the loss is not finite")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 221, "event": "war')
    page = asked(f"{served}/now")
    assert page.index("went back: the loss is not finite") < page.index("it &lt;sits&gt; on a plateau")


def test_views_are_served_and_nothing_else_of_the_disk(served, run):
    with urllib.request.urlopen(f"{served}/views.png?1", timeout=20) as answer:
        assert answer.read() == (run / "views.png").read_bytes()
    for path in ("/run.json", "/../run.json", "/metrics.jsonl"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            asked(served + path)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", ""])
def test_a_page_of_another_site_gets_nothing(served, host):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        asked(f"{served}/now", Host=host)


def test_a_run_that_writes_no_more_is_asked_after(served, run):
    long_ago = time.time() - 3600
    os.utime(run / "metrics.jsonl", (long_ago, long_ago))
    assert "nothing written for 60 min" in asked(f"{served}/now")


def test_a_finished_run_says_so(make, tmp_path):
    run = make.run(tmp_path / "done")
    assert "1,200 of 1,200 steps, done" in watching.WatchedRun(run).html()


def test_what_cannot_be_watched_is_a_named_error(make, tmp_path, run):
    with pytest.raises(ArtifactError, match="not a run directory"):
        watch(tmp_path, port=0)
    with pytest.raises(ArtifactError, match="a model directory"):
        watch(make.model(tmp_path / "model"), port=0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(DeviceError, match="port") as caught:
        watch(run, port=taken.getsockname()[1])
    assert "--port" in caught.value.hint


def test_the_command_ends_quietly_on_ctrl_c(run):
    process = subprocess.Popen(
        [sys.executable, "-m", "edgecl", "watch", str(run), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    assert "200 of 1,200 steps" in asked(url)
    process.send_signal(2)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_the_page_in_a_browser_follows_the_run_by_itself(served, run, tmp_path, monkeypatch):
    html, asked_for = watching.WatchedRun.html, []

    def html_of_a_run_that_goes_on(self):
        asked_for.append(1)
        if len(asked_for) == 3:  # the page itself, and it has asked once
            append(run, step=777, epoch=9.9, loss=1.0, images_per_s=9.0)
        return html(self)

    monkeypatch.setattr(watching.WatchedRun, "html", html_of_a_run_that_goes_on)
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=20000", "--dump-dom", served),
        ],
        capture_output=True,
        timeout=120,
        check=True,
        text=True,
    )
    assert "777 of 1,200 steps" in done.stdout
