"""The lock of a directory, between real processes: one holder at a time, and free as soon as it ends."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from disks import mounted

from edgecl.errors import ArtifactError
from edgecl.storage import lock

REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def process(code, *words):
    """Run code in a process of its own, once it has printed a line; killed in the end."""
    started = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        started.first_line = started.stdout.readline().strip()
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdin.close()
        started.stdout.close()


HOLDER = """
    import sys
    from pathlib import Path
    from edgecl.storage.lock import hold
    sys.argv[0] = "edgecl"
    with hold(Path(sys.argv[1]), what="run directory"):
        print("held", flush=True)
        sys.stdin.read()
"""


def refused(directory):
    with pytest.raises(ArtifactError) as caught, lock.hold(directory, what="run directory"):
        pass
    return caught.value


# --- one holder ---


def test_a_directory_in_use_names_its_holder(tmp_path):
    run = tmp_path / "a run"
    with process(HOLDER, run) as holder:
        error = refused(run)
        since = json.loads((run / lock.NAME).read_text())["since"]
    assert f"'{run}' is in use by process {holder.pid} on {platform.node()}" in error.problem
    assert error.where == {"since": since, "command": f"edgecl '{run}'"}


def test_a_clean_end_frees_it(tmp_path):
    with process(HOLDER, tmp_path) as holder:
        holder.stdin.close()
        assert holder.wait() == 0
        assert list(tmp_path.iterdir()) == []
        with lock.hold(tmp_path, what="run directory"):
            assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_frees_it_at_once(tmp_path):
    with process(HOLDER, tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        left = json.loads((tmp_path / lock.NAME).read_text())
        assert left["pid"] == holder.pid
        with lock.hold(tmp_path, what="run directory"):
            assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    with process("print(flush=True); import sys; sys.stdin.read()") as dead:
        pass
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f".run.json.{pid}-{pid}.part").touch()
    (tmp_path / "my.1-2.part").touch()
    with lock.hold(tmp_path, what="run directory"):
        found = {path.name for path in tmp_path.iterdir()}
    assert found == {lock.NAME, f".run.json.{os.getppid()}-{os.getppid()}.part", "my.1-2.part"}


def test_a_directory_that_was_there_or_was_filled_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "filled"):
        with lock.hold(tmp_path / name, what="run directory"):
            if name == "filled":
                (tmp_path / name / "run.json").touch()
        assert (tmp_path / name).is_dir()
    with lock.hold(tmp_path / "new" / "run", what="run directory"):
        (tmp_path / "new" / "other").mkdir()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


COMPETING = """
    import os, sys
    from pathlib import Path
    from edgecl.errors import ArtifactError
    from edgecl.storage.lock import hold

    run, turns, children = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    inside = run.with_name("inside")

    def compete():
        for _ in range(turns):
            while True:
                try:
                    with hold(run, what="run directory"):
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails beside a second holder
                        os.sched_yield()
                        inside.unlink()
                    break
                except ArtifactError as error:
                    assert "is in use by" in error.problem, error
                    os.sched_yield()

    started = []
    for _ in range(children):
        child = os.fork()
        if child == 0:
            try:
                compete()
            except BaseException as problem:
                print(repr(problem), flush=True)
                os._exit(1)
            os._exit(0)
        started.append(child)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in started)
    print("failed", failed)
"""


def test_of_many_that_compete_never_two_hold_at_once(tmp_path):
    words = [sys.executable, "-c", textwrap.dedent(COMPETING), str(tmp_path / "run"), "150", "6"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "failed 0\n", done.stdout + done.stderr
    assert not (tmp_path / "inside").exists()
    assert list((tmp_path / "run").glob("*")) == []


# --- children ---

PARENT = """
    import os, subprocess, sys, time
    from pathlib import Path
    from edgecl.storage.lock import hold

    with hold(Path(sys.argv[1]), what="run directory"):
        if sys.argv[2] == "subprocess":
            subprocess.Popen(["sh", "-c", "echo $$; exec sleep 600"], close_fds=False)
        elif os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(600)
        sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["subprocess", "fork"])
def test_a_child_that_outlives_its_killed_parent_does_not_hold_on(tmp_path, way):
    with process(PARENT, tmp_path, way) as parent:
        child = int(parent.first_line)
        try:
            refused(tmp_path)
            parent.kill()
            parent.wait()
            os.kill(child, 0)  # alive
            with lock.hold(tmp_path, what="run directory"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


LEAVING_CHILD = """
    import os, sys
    from pathlib import Path
    from edgecl.storage.lock import hold
    held = hold(Path(sys.argv[1]), what="run directory")
    held.__enter__()
    child = os.fork()
    if child == 0:
        held.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_forked_child_that_leaves_does_not_free_its_parents(tmp_path):
    with process(LEAVING_CHILD, tmp_path) as parent:
        assert f"is in use by process {parent.pid} on" in str(refused(tmp_path))


# --- odd places ---


@pytest.mark.parametrize("content", ["", "{", "[]", '"pid"', '{"pid": 3}', "\x00\xff", "[" * 50_000])
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content, encoding="latin-1")
    with (tmp_path / lock.NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refused(tmp_path).problem.endswith(f"'{tmp_path}' is in use by another process")
    with lock.hold(tmp_path, what="run directory"):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_that_is_a_link_or_a_directory_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("content")
    assert f"'{tmp_path}/run': {os.strerror(errno.ELOOP).lower()}" in refused(tmp_path / "run").problem
    assert (tmp_path / "precious").read_text() == "content"
    (tmp_path / "run" / lock.NAME).unlink()
    (tmp_path / "run" / lock.NAME).mkdir()
    assert f"'{tmp_path}/run': is a directory" in refused(tmp_path / "run").problem


def test_a_file_system_that_is_read_only_is_named(tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        for place in (disk, disk / "run"):
            assert f"'{place}': read-only file system" in refused(place).problem


def test_a_full_disk_is_named(tmp_path):
    with mounted(tmp_path / "disk", "size=4k") as disk:
        (disk / "ballast").write_bytes(bytes(4096))
        assert f"'{disk}': no space left on device" in refused(disk).problem
        assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_file_system_without_locks_is_spoken_of_and_used(tmp_path, monkeypatch, capsys):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.hold(tmp_path, what="run directory"):
        (tmp_path / "run.json").touch()
    said = capsys.readouterr().err
    assert re.fullmatch(f"edgecl: .*'{re.escape(str(tmp_path))}' has no locks.*second run.*\n", said)
    assert (tmp_path / "run.json").is_file()
