"""Running on a board over ssh: a real sshd on the loopback plays the board."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from onboard.tiny_bundle import flip_byte, make_bundle

from edgecl.deploy.device import bench, doctor, verify
from edgecl.deploy.remote import run_on_board
from edgecl.errors import ArtifactError, DeviceError, ParityError
from edgecl.onboard.bundle import sha256_of_file

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
NEEDED = ("sh", "bash", "mkdir", "mktemp", "cat", "rm")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def children_of(pid):
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_all(pids):
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended by itself in the meantime
            os.kill(pid, signal.SIGKILL)


def processes_naming(text):
    """Every process but zombies whose command line has a text."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text in (process / "cmdline").read_bytes().decode("utf-8", "replace"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


class Board:
    """An sshd with a home of its own; `host` leads there."""

    def __init__(self, keys, folder, python=None):
        self.home, self.port = folder / "home", free_port()
        self.home.mkdir(parents=True)
        # What a login script prints must not be taken for an answer.
        (self.home / ".bashrc").write_text("echo welcome to the board\necho '@edgecl is spoken here'\n")
        programs = folder / "bin"
        programs.mkdir()
        path = str(programs)
        if python is None:
            for name in NEEDED:
                (programs / name).symlink_to(shutil.which(name))
        else:
            (programs / "python3").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
            (programs / "python3").chmod(0o755)
            path += ":/usr/bin:/bin"
        self.folder = folder
        (folder / "sshd.conf").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {keys / 'host'}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {keys / 'mine.pub'}\nStrictModes no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
            f"SetEnv HOME={self.home} PATH={path}\n"
        )
        (folder / "ssh.conf").write_text(
            f"IdentityFile {keys / 'mine'}\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {folder / 'known'}\nGlobalKnownHostsFile /dev/null\n"
            # What a user may have set, and must not count.
            "StrictHostKeyChecking no\nBatchMode no\n"
        )
        self.know((keys / "host.pub").read_text())
        self.host = f"{getpass.getuser()}@127.0.0.1:{self.port}"
        self.start()

    def know(self, key):
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {key}" if key else "")

    def start(self):
        self.log = (self.folder / "sshd.log").open("w")
        self.server = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self.folder / "sshd.conf")],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self.server.poll() is not None:
                    break
                time.sleep(0.02)
        pytest.skip("sshd does not start here: " + (self.folder / "sshd.log").read_text().strip()[-200:])

    def drop_connections(self):
        kill_all(children_of(self.server.pid))

    def stop(self):
        connections = children_of(self.server.pid) if self.server.poll() is None else []
        self.server.kill()
        self.server.wait()
        kill_all(connections)
        self.log.close()

    def left_of_runs(self):
        return list((self.home / ".cache/edgecl").glob("run.*"))


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    if SSHD is None or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("no sshd, ssh and ssh-keygen on this machine")
    if os.getuid() == 0 and not Path("/run/sshd").exists():
        Path("/run/sshd").mkdir(mode=0o755)  # sshd wants it of root, and its service makes it
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "mine", "other"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / name], check=True
        )
    return folder


@pytest.fixture
def boards(keys, tmp_path, monkeypatch):
    started = []

    def start(name="board", python=sys.executable):
        started.append(Board(keys, tmp_path / name, python))
        monkeypatch.setenv("EDGECL_SSH_OPTIONS", f"-F {tmp_path / name / 'ssh.conf'}")
        return started[-1]

    yield start
    for board in started:
        board.stop()


@pytest.fixture
def board(boards):
    return boards()


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle", precisions=("fp32", "fp16"))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what it brings back, and leaves there ---


def test_bench_brings_the_record_into_the_bundle(board, bundle):
    lines = []
    record = bench(
        bundle, duration_s=0.2, threads=1, host=board.host, precisions=["fp16"], report=lines.append
    )
    (file,) = bundle.glob("bench-*.json")
    assert json.loads(file.read_text()) == record.to_json()
    assert "-onnxruntime-fp16-1t-b1.json" in file.name
    assert record.made_from == sha256_of_file(bundle / "manifest.json")
    assert record.threads == 1
    assert record.environment["OMP_NUM_THREADS"] == "1"
    assert [one.precision for one in record.measurements][:1] == ["fp16"]
    assert any("copying 4 of 4 files to" in line for line in lines)
    assert any(line.startswith("warming up") for line in lines)
    assert board.left_of_runs() == []


def test_files_stay_on_the_board_and_only_changed_ones_are_sent_again(board, bundle):
    lines = []
    record = verify(bundle, host=board.host, report=lines.append)
    assert record.to_json() == json.loads((bundle / "verify.json").read_text())
    assert record.ok is True
    assert set(record.precisions) == {"fp32", "fp16"}
    (there,) = (board.home / ".cache/edgecl").glob("bundle-*")
    assert there.name == f"bundle-{sha256_of_file(bundle / 'manifest.json')[:12]}"
    assert names_in(there) == ["manifest.json", "model.fp16.onnx", "model.onnx", "reference.npz"]
    flip_byte(there / "model.onnx")
    lines.clear()
    verify(bundle, precisions=["fp32"], host=board.host, report=lines.append)
    (copied,) = lines
    assert copied.startswith("copying 1 of 4 files")
    lines.clear()
    verify(bundle, precisions=["fp32"], host=board.host, report=lines.append)
    assert lines == []
    assert board.left_of_runs() == []


def test_disagreement_on_the_board_is_the_same_error_here(board, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", shift=100.0)
    with pytest.raises(ParityError, match="disagrees with torch on 5 reference images") as caught:
        verify(bundle, host=board.host)
    assert caught.value.where == {"bundle": bundle, "board": board.host}
    kept = json.loads((bundle / "verify.json").read_text())
    assert (kept["ok"], kept["files_ok"]) == (False, True)
    assert kept["precisions"]["fp32"]["max_abs_difference"] == pytest.approx(100.0, rel=1e-5)


def test_doctor_sees_the_board_for_a_bundle_or_a_target(board, bundle):
    found = doctor(bundle, host=board.host)
    assert ("bundle", "ok") in [(check.name, check.status) for check in found.checks]
    found = doctor(target="jetson", host=board.host)
    device = next(check for check in found.checks if check.name == "device")
    assert (found.ok, device.status) == (False, "fail")
    assert device.found.startswith("this is no Jetson;")
    assert device.found.endswith("any Jetson Orin")
    assert board.left_of_runs() == []


# --- connections that end ---


def test_dropped_connections_are_made_again_and_the_record_picked_up(board, bundle):
    """One drops while files are copied, one while it measures."""
    seen = []

    def drop(line):
        seen.append(line)
        if [other.split()[0] for other in seen].count(line.split()[0]) == 1 and line.startswith(
            ("copying", "measuring")
        ):
            board.drop_connections()

    record = bench(bundle, duration_s=1.5, threads=1, host=board.host, report=drop)
    lost = [line for line in seen if line.startswith(f"connection to {board.host} lost, trying again")]
    assert len(lost) == 2
    assert [line.split(" files")[0] for line in seen if line.startswith("copying")] == ["copying 4 of 4"] * 2
    (file,) = bundle.glob("bench-*.json")
    assert json.loads(file.read_text()) == record.to_json()
    assert board.left_of_runs() == []
    (there,) = (board.home / ".cache/edgecl").glob("bundle-*")
    assert names_in(there) == ["manifest.json", "model.fp16.onnx", "model.onnx", "reference.npz"]


def test_board_that_does_not_come_back_leaves_no_half_record(board, bundle, monkeypatch):
    before = names_in(bundle)
    monkeypatch.setattr("edgecl.deploy.remote._PATIENCE_S", 1.0)

    def pull_the_plug(line):
        if line.startswith(("warming", "measuring")) and board.server.poll() is None:
            board.stop()

    with pytest.raises(DeviceError, match=r"connection to .* lost .*within 1 s") as caught:
        run_on_board(board.host, "bench", ["--duration-s", "0.2"], bundle=bundle, report=pull_the_plug)
    assert "ends by itself" in caught.value.hint
    assert "nothing was written here" in caught.value.hint
    assert names_in(bundle) == before
    (run,) = board.left_of_runs()
    for _ in range(600):  # as it says: it ends by itself, with a whole record
        if (run / "status").exists():
            break
        time.sleep(0.05)
    assert json.loads((run / "record.json").read_text())["measurements"]


def test_ctrl_c_ends_the_run_on_the_board(board, bundle):
    words = ["bench", bundle, "--host", board.host, "--duration-s", "60"]
    with subprocess.Popen(
        [sys.executable, "-m", "edgecl", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        for line in process.stderr:
            if line.startswith("warming up"):
                break
        (run,) = board.left_of_runs()
        assert processes_naming(str(run / "record.json"))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    for _ in range(100):  # the board's end is told, and takes its moment
        if not processes_naming(str(run)) and not board.left_of_runs():
            break
        time.sleep(0.05)
    assert processes_naming(str(run)) == []
    assert board.left_of_runs() == []
    assert not list(bundle.glob("bench-*"))


def test_run_that_says_nothing_for_too_long_is_ended_on_the_board(board, bundle, monkeypatch):
    monkeypatch.setattr("edgecl.deploy.remote.BUILDING_SILENCE_S", 4.0)
    stopped = []

    def stop(line):
        if line.startswith("warming up") and not stopped:
            for pid in processes_naming("record.json"):
                if str(board.home) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGSTOP)  # a net that loops for ever is as silent
                    stopped.append(pid)

    with pytest.raises(DeviceError, match="said nothing for 4 s"):
        bench(bundle, host=board.host, report=stop)
    assert board.left_of_runs() == []
    (pid,) = stopped
    os.kill(pid, signal.SIGCONT)  # one that sleeps dies of SIGTERM when it wakes, one that loops at once
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_killed_run_is_told_with_its_signal(board, bundle):
    def kill(line):
        if line.startswith("warming up"):
            for pid in processes_naming("record.json"):
                if str(board.home) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(DeviceError, match=r"the net's process was killed by SIGKILL \(9\)") as caught:
        bench(bundle, host=board.host, report=kill)
    assert "memory ran out" in caught.value.hint
    assert caught.value.where["board"] == board.host
    assert not list(bundle.glob("bench-*"))


# --- boards that cannot ---


def test_board_without_python3_is_named(boards, bundle):
    board = boards(python=None)
    with pytest.raises(DeviceError, match="there is no python3 on") as caught:
        verify(bundle, host=board.host)
    assert "apt install python3 python3-numpy" in caught.value.hint
    assert not (bundle / "verify.json").exists()


@pytest.mark.slow
def test_board_with_python_3_6_does_its_part(boards, bundle):
    python = os.environ.get("EDGECL_PYTHON36") or shutil.which("python3.6")
    modules = "import numpy, onnxruntime"
    if python is None or subprocess.run([python, "-c", modules], capture_output=True).returncode != 0:
        pytest.skip("no Python 3.6 with NumPy and onnxruntime here (EDGECL_PYTHON36 may name one)")
    board = boards(python=python)
    record = bench(bundle, duration_s=0.1, threads=1, host=board.host)
    assert record.device.python.startswith("3.6.")
    assert verify(bundle, host=board.host).ok is True
    assert board.left_of_runs() == []


def test_full_disk_of_the_board_is_named_and_nothing_is_left(board, bundle):
    """A small file system, where this machine may make one."""
    cache = board.home / ".cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", cache]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        with pytest.raises(DeviceError, match="no room on the disk of") as caught:  # for onboard.pyz
            verify(bundle, host=board.host)
        assert "~/.cache/edgecl" in caught.value.hint
        assert board.left_of_runs() == []
        subprocess.run(["mount", "-o", "remount,size=1m", cache], check=True)
        with pytest.raises(DeviceError, match=r"no room on the board's disk: .* 16 MiB"):
            verify(bundle, host=board.host)
        assert board.left_of_runs() == []
    finally:
        subprocess.run(["umount", cache], check=True)


def test_board_whose_home_is_no_directory_is_named(board, bundle):
    (board.home / ".cache").write_text("in the way")
    with pytest.raises(DeviceError, match="could not do its part: exit status 1") as caught:
        verify(bundle, host=board.host)
    assert "/.cache'" in caught.value.where["it said"]


# --- connections that never come about ---


def refused(host):
    with pytest.raises(DeviceError) as caught:
        doctor(host=host)
    return caught.value


def test_unknown_host_key_is_refused(board):
    board.know("")
    error = refused(board.host)
    assert f"host key of '{board.host}' is unknown" in error.problem
    login = f"ssh -p {board.port} {getpass.getuser()}@127.0.0.1"
    assert f"`{login}`" in error.hint
    assert "fingerprint" in error.hint
    assert board.left_of_runs() == []


def test_changed_host_key_is_refused(board, keys):
    board.know((keys / "other.pub").read_text())
    error = refused(board.host)
    assert f"host key of '{board.host}' is not the one" in error.problem


def test_wrong_user_is_refused(board):
    error = refused(f"nobody-we-know@127.0.0.1:{board.port}")
    assert "without a password" in error.problem
    assert "Permission denied" in error.where["ssh said"]
    assert f"`ssh-copy-id -p {board.port} nobody-we-know@127.0.0.1`" in error.hint


def test_port_where_nothing_listens_is_named(board):
    error = refused(f"me@127.0.0.1:{free_port()}")
    assert "Connection refused" in error.problem
    assert "no ssh server listens" in error.hint


def test_unknown_name_is_named(board):
    error = refused("me@no-such-board.invalid")
    assert "'me@no-such-board.invalid': ssh: Could not resolve" in error.problem
    assert "no machine of that name" in error.hint


def test_options_that_ssh_does_not_take_are_named(board, monkeypatch):
    monkeypatch.setenv("EDGECL_SSH_OPTIONS", "-o NoSuchOption=1")
    error = refused(board.host)
    assert "does not take its options" in error.problem
    monkeypatch.setenv("EDGECL_SSH_OPTIONS", "-i 'half")
    assert "cannot split EDGECL_SSH_OPTIONS=" in refused(board.host).problem


def test_machine_without_ssh_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused("me@board")
    assert "'ssh' is not on the PATH" in error.problem
    assert "apt install openssh-client" in error.hint


@pytest.mark.parametrize(
    "host",
    [
        *("a@b;touch x", "$(touch x)@b", "a@`touch x`", "a@b|c", "a@b&", "a@'b'", "a@b\nx"),
        *("-oProxyCommand=touch x", "a@-oProxyCommand=x", "-l@b", "a@../b"),
        *("a@b@c", "@b", "", "a@b:", "a@b:0", "a@b:65536", "a@b:22;x", "a@fe80::1", "a@[b;c]"),
    ],
)
def test_host_that_is_no_plain_name_is_refused_before_anything_runs(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # had it looked for ssh, it would say so
    error = refused(host)
    assert f"--host {host!r} " in error.problem
    assert "USER@BOARD[:PORT]" in error.problem
    assert "IPv6" in error.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("board", ["--", "board"]),
        ("me@board.local:2222", ["-l", "me", "-p", "2222", "--", "board.local"]),
        ("me@[fe80::1%eth0]:22", ["-l", "me", "-p", "22", "--", "fe80::1%eth0"]),
        ("my-name_1@192.168.55.1", ["-l", "my-name_1", "--", "192.168.55.1"]),
    ],
)
def test_ssh_gets_a_list_of_words_with_the_host_last_and_checks_on(host, words, tmp_path, monkeypatch):
    fake = tmp_path / "ssh"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{tmp_path}/words"\nexit 255\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("EDGECL_SSH_OPTIONS", "-F mine")
    refused(host)
    said = (tmp_path / "words").read_text().splitlines()
    assert said[-1 - len(words) : -1] == words
    assert said.index("BatchMode=yes") < said.index("StrictHostKeyChecking=yes") < said.index("-F")
    assert said[-1].startswith("sh -c '")


# --- bundles that are not whole ---


def test_changed_bundle_is_refused_before_a_connection_is_made(bundle):
    flip_byte(bundle / "model.onnx")
    with pytest.raises(ArtifactError, match=r"'model.onnx' does not match its hash"):
        bench(bundle, host=f"me@127.0.0.1:{free_port()}")
