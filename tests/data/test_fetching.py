"""Remote shards: over HTTP from a server that misbehaves, from S3, without their secrets."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from disks import largest_file
from worlds import wait_until

pytest.importorskip("webdataset")
pytest.importorskip("aiohttp")

from edgecl.data import fetching
from edgecl.data.fetching import cached_place
from edgecl.data.sources import absolute_uri, open_source

from .tar_shards import exc, numbers, pattern

pytestmark = pytest.mark.usefixtures("cache")


# --- over HTTP ---


class Server(ThreadingHTTPServer):
    """A real server of a folder that counts what it is asked and can misbehave."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked = []
        self.behave = "well"
        self.release = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        name = self.path.partition("?")[0].lstrip("/")
        server.asked.append(self.path)
        path = server.folder / name
        busy = server.behave == "busy" or (server.behave == "busy once" and len(server.asked) == 1)
        if busy or server.behave == "forbid" or not path.is_file():
            self.send_error(503 if busy else 403 if server.behave == "forbid" else 404)
            return
        content = path.read_bytes()
        announced = len(content)
        if server.behave == "break" or (server.behave == "break once" and len(server.asked) == 1):
            content = content[: announced // 2]
        if server.behave == "cut":
            content = content[: announced // 2]
            announced = len(content)
        self.send_response(200)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if server.behave in ("stall", "wait"):
            self.wfile.write(content[:8192])
            self.wfile.flush()
            server.release.wait(20)
            content = content[8192:] if server.behave == "wait" else b""
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "data")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_come_over_http_once_and_are_as_on_the_disk(write_shards, server, cache):
    root = write_shards(3)
    uri = f"shards:{server.url}/x-{{000..002}}.tar"
    source = open_source(uri)
    assert numbers(source) == list(range(12))
    assert source.fingerprint == open_source(pattern(root, 2)).fingerprint
    assert source.describe(4) == f"{server.url}/x-001.tar:000004.png"
    assert len(server.asked) == 3
    assert open_source(uri).fingerprint == source.fingerprint
    assert len(server.asked) == 3
    assert not list(cache.glob("*.part"))


def test_a_damaged_file_in_the_cache_is_fetched_again(write_shards, server, cache):
    write_shards(1)
    uri = f"shards:{server.url}/x-000.tar"
    open_source(uri)
    os.truncate(cached_place(uri.removeprefix("shards:")), 1000)
    assert numbers(open_source(uri)) == [0, 1, 2, 3]
    assert len(server.asked) == 2


def test_a_shard_the_server_has_not_is_named(write_shards, server):
    write_shards(1)
    error = exc(f"shards:{server.url}/x-{{000..001}}.tar")
    assert "no such file" in error.problem
    assert error.where == {"url": f"{server.url}/x-001.tar"}


def test_a_refused_login_says_where_a_login_belongs_and_not_which(write_shards, server):
    write_shards(1)
    server.behave = "forbid"
    error = exc(f"shards:http://me:geheim@127.0.0.1:{server.server_port}/x-000.tar?Signature=streng")
    assert "HTTP 403" in error.problem
    assert "WDS_NAME" in error.hint
    shown = "".join(traceback.format_exception(error))
    assert not [secret for secret in ("geheim", "streng") if secret in shown]


def test_a_server_that_is_not_there_is_named(server):
    server.shutdown()
    server.server_close()
    error = exc(f"shards:{server.url}/x.tar")
    assert "no connection" in error.problem
    assert error.where == {"url": f"{server.url}/x.tar"}


@pytest.mark.parametrize("behave", ["busy once", "break once"])
def test_a_transfer_that_fails_for_now_is_tried_again(write_shards, server, behave):
    write_shards(1)
    server.behave = behave
    assert numbers(open_source(f"shards:{server.url}/x-000.tar")) == [0, 1, 2, 3]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("behave", "words", "asked"),
    [
        ("busy", "HTTP 503 (3 tries)", 3),
        ("break", "broke before the end (3 tries)", 3),
        ("stall", "nothing came", 1),
    ],
)
def test_a_server_that_stays_so_is_given_up_and_nothing_kept(
    write_shards, server, monkeypatch, cache, behave, words, asked
):
    write_shards(1)
    server.behave = behave
    monkeypatch.setattr(fetching, "STALL_S", 0.5)
    error = exc(f"shards:{server.url}/x-000.tar")
    assert words in error.problem
    assert error.where == {"url": f"{server.url}/x-000.tar"}
    assert len(server.asked) == asked
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_shard_that_is_cut_on_the_server_is_not_kept(write_shards, server, cache):
    write_shards(1)
    server.behave = "cut"
    error = exc(f"shards:{server.url}/x-000.tar")
    assert error.problem.startswith("the shard 'x-000.tar' is cut short: ")
    assert error.where["shard"] == f"{server.url}/x-000.tar"
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    server.behave = "well"
    assert numbers(open_source(f"shards:{server.url}/x-000.tar")) == [0, 1, 2, 3]


def open_there(uri, answers):
    source = open_source(uri)
    answers.put((source.fingerprint, source.order(7, 0, np.arange(len(source))).tolist()))


def start_open(uri, answers):
    """Open shards in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=open_there, args=(uri, answers))
    with warnings.catch_warnings():
        # The server's thread goes on here alone; newer Pythons warn of it.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def test_processes_that_want_the_same_shard_fetch_it_once_and_agree(write_shards, server):
    write_shards(1)
    server.behave = "wait"
    uri = f"shards:{server.url}/x-000.tar"
    answers = multiprocessing.get_context("fork").SimpleQueue()
    processes = [start_open(uri, answers) for _ in range(3)]
    wait_until(lambda: server.asked)
    # Time for the others to come to the lock.
    time.sleep(0.5)
    server.release.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    one, two, three = (answers.get() for _ in processes)
    assert one == two == three
    assert len(server.asked) == 1


def test_a_process_killed_while_fetching_leaves_nothing_in_the_way(write_shards, server, cache):
    write_shards(1)
    server.behave = "wait"
    uri = f"shards:{server.url}/x-000.tar"
    process = start_open(uri, None)
    wait_until(lambda: [path for path in cache.glob("*.part") if path.stat().st_size])
    process.kill()
    process.join()
    assert list(cache.glob("*.part"))
    server.release.set()
    server.behave = "well"
    assert numbers(open_source(uri)) == [0, 1, 2, 3]
    assert not list(cache.glob("*.part"))


def test_ctrl_c_ends_fetching_and_leaves_nothing_behind(write_shards, server, cache):
    write_shards(1)
    server.behave = "stall"
    # Not forked: a copy of this process, threads and all, ends otherwise than Python does after Ctrl-C.
    open_it = f"from edgecl.data.sources import open_source; open_source('shards:{server.url}/x-000.tar')"
    with subprocess.Popen([sys.executable, "-c", open_it], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: [path for path in cache.glob("*.part") if path.stat().st_size])
        process.send_signal(signal.SIGINT)
        # The server stays silent for longer, and edgecl's own patience would be longer still.
        assert process.wait(30) == -signal.SIGINT
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_process_that_waits_for_one_that_gets_nowhere_gives_up(write_shards, server, cache, monkeypatch):
    write_shards(1)
    url = f"{server.url}/x-000.tar"
    lock = cached_place(url).with_name(f"{cached_place(url).name}.lock")
    cache.mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open({str(lock)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setattr(fetching, "STALL_S", 0.25)
    error = exc(f"shards:{url}")
    holder.kill()
    holder.communicate()
    assert "another process" in error.problem
    assert error.where == {"url": url, "lock": str(lock)}


def test_a_cache_that_cannot_be_written_is_named(write_shards, server, monkeypatch, tmp_path):
    write_shards(1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGECL_CACHE", str(tmp_path / "file"))
    error = exc(f"shards:{server.url}/x-000.tar")
    assert "cannot be written" in error.problem
    assert error.where["cache"] == tmp_path / "file" / "shards"
    assert error.hint.startswith("EDGECL_CACHE names another place")


def test_a_full_disk_is_named(write_shards, server, cache):
    write_shards(1)
    with largest_file(1000):
        error = exc(f"shards:{server.url}/x-000.tar")
    assert "no room" in error.problem
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


# --- secrets ---


def test_a_signed_url_finds_its_shard_however_it_is_signed_and_recorded(write_shards, server, monkeypatch):
    write_shards(1)
    signed = (
        f"shards:http://me:geheim@127.0.0.1:{server.server_port}/x-000.tar?X-Amz-Expires=60&X-Amz-Signature="
    )
    source = open_source(signed + "streng")
    assert server.asked == ["/x-000.tar?X-Amz-Expires=60&X-Amz-Signature=streng"]
    recorded = absolute_uri(signed + "streng")
    assert recorded == source.uri == f"shards:{server.url}/x-000.tar"
    assert source.describe(0) == f"{server.url}/x-000.tar:000000.png"
    for uri in (signed + "anew", recorded):
        assert open_source(uri).fingerprint == source.fingerprint
    assert len(server.asked) == 1


def test_urls_that_differ_in_more_than_a_signature_are_different_shards():
    places = {
        cached_place(f"http://h/get?{query}")
        for query in ("shard=1", "shard=2", "shard=2&sig=x", "shard=2&sig=y")
    }
    assert len(places) == 2


def test_a_secret_in_the_environment_stays_out_of_the_record(write_shards, server, monkeypatch):
    write_shards(1)
    monkeypatch.setenv("WDS_SIGNATURE", "token=geheim")
    uri = f"shards:{server.url}/x-000.tar?${{SIGNATURE}}"
    assert open_source(uri).uri == uri
    assert server.asked == ["/x-000.tar?token=geheim"]
    assert absolute_uri(uri) == uri


# --- from elsewhere ---


@pytest.fixture
def s3(server, monkeypatch):
    """Have s3:// mean the server, which is asked for /BUCKET/KEY."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # another test's server was elsewhere
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "geheim",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("s3")
def test_shards_come_from_s3(write_shards, server):
    write_shards(2, folder="data/bucket")
    source = open_source("shards:s3://bucket/x-{000..001}.tar")
    assert numbers(source) == list(range(8))
    assert source.describe(0) == "s3://bucket/x-000.tar:000000.png"


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(("behave", "word"), [("well", "no such file"), ("forbid", "denied")])
def test_what_s3_refuses_is_named(server, behave, word):
    server.behave = behave
    error = exc("shards:s3://bucket/x.tar")
    assert word in error.problem
    assert error.where == {"url": "s3://bucket/x.tar"}
    assert "geheim" not in str(error)


@pytest.mark.parametrize("missing", ["braceexpand", "aiohttp"])
def test_a_missing_package_is_named(server, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    error = exc(f"shards:{server.url}/x.tar")
    assert missing in error.problem
    assert "edgecl[shards]" in error.hint


@pytest.mark.parametrize("scheme", ["gopher", "memory", "github", "filecache"])
def test_an_unknown_kind_of_url_is_named(scheme):
    error = exc(f"shards:{scheme}://host/x.tar")
    assert f"'{scheme}:'" in error.problem
    assert "https" in error.hint


def test_a_pipe_runs_no_program(tmp_path):
    error = exc(f"shards:pipe:touch {tmp_path}/ran; cat x.tar")
    assert "'pipe:'" in error.problem
    assert not (tmp_path / "ran").exists()
