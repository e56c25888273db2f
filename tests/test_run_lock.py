"""One training at a time in a run folder: dead owners, owners elsewhere, file systems without locks."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sat import files, run_lock
from sat.run_lock import LOCK, owned
from sat.stopping import START_AGAIN
from tests.chaos import GRACE_S, ROOT

pytestmark = pytest.mark.faults


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "PATIENCE_S", 1.0)


def lock_of(folder: Path, **changed: object) -> None:
    """As another machine's process would have left it."""
    owner = dataclasses.replace(run_lock._myself(), **changed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(owner)))


def test_the_lock_of_a_dead_process_is_taken_over_and_freed(tmp_path, capsys):
    lock_of(tmp_path, pid=2**22 + 1, job="77")
    with owned(tmp_path):
        assert files.read_json(tmp_path / LOCK)["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists() and "Slurm job 77, since" in capsys.readouterr().out
    lock_of(tmp_path, born="1")  # our process id, but another process had it
    with owned(tmp_path):
        pass


def test_an_owner_elsewhere_is_alive_while_it_gives_signs_of_life(tmp_path, quick):
    lock_of(tmp_path, machine="another", host="node7", job="12")
    os.utime(tmp_path / LOCK, (4e9, 4e9))  # its clock is far ahead
    ended = threading.Event()

    def beat():
        stamp = 4e9
        while not ended.wait(0.1):
            stamp += 1
            os.utime(tmp_path / LOCK, (stamp, stamp))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ValueError, match=r"on node7, Slurm job 12, since"), owned(tmp_path):
        pass
    ended.set()
    thread.join()
    with owned(tmp_path):
        assert files.read_json(tmp_path / LOCK)["host"] != "node7"
    (tmp_path / LOCK).write_text("not a lock")
    with owned(tmp_path):
        pass


def test_of_many_that_take_over_a_dead_lock_one_has_it(tmp_path, quick):
    lock_of(tmp_path, pid=2**22 + 1)
    owners, refused, all_in = [], [], threading.Barrier(8)

    def contend():
        all_in.wait()
        try:
            with owned(tmp_path):
                owners.append(threading.get_ident())
                time.sleep(0.5)
        except ValueError:
            refused.append(threading.get_ident())

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 1 and len(refused) == 7


OWNER = """
import sys
from pathlib import Path
from sat import run_lock
run_lock.BEAT_S, run_lock.PATIENCE_S = 0.1, 5.0
try:
    with run_lock.owned(Path(sys.argv[1])):
        print("owns", flush=True)
        sys.stdin.readline()
except ValueError as error:
    sys.exit(f"error: {error}")
"""
ELSEWHERE = ["unshare", "--map-root-user", "--user", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""Another machine, as far as a lock can tell: its process ids say nothing here, and ours nothing there."""


def can_be_elsewhere() -> bool:
    try:
        return subprocess.run([*ELSEWHERE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def owner_elsewhere(folder: Path):
    """A process on another machine that wants the run folder; it leaves by a line of input."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [*ELSEWHERE, sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


SFTP_SERVER = Path("/usr/lib/openssh/sftp-server")


@contextmanager
def as_two_clients_see(served: Path, root: Path):
    """The folder over sshfs, twice: no locks between them, no exchange of names, and what another has done to a file is
    seen a second later, as over NFS.
    """
    lacking = [name for name in ("sshfs", "fusermount3", str(SFTP_SERVER)) if not shutil.which(name)]
    if lacking or not os.access("/dev/fuse", os.W_OK):
        pytest.skip(f"no file system of two clients: {', '.join(lacking) or '/dev/fuse'} is not there")
    (root / "connect").write_text(f"#!/bin/sh\nexec {SFTP_SERVER}\n")
    (root / "connect").chmod(0o755)
    with ExitStack() as mounted:
        places = [root / name for name in ("client", "another")]
        for place in places:
            place.mkdir()
            options = f"ssh_command={root}/connect,dcache_timeout=1"
            subprocess.run(["sshfs", "-o", options, f"localhost:{served}", str(place)], check=True, timeout=60)
            mounted.callback(subprocess.run, ["fusermount3", "-uz", str(place)], check=True, timeout=60)
        yield places


@pytest.fixture(params=["local", "network"])
def sides(request, tmp_path):
    """The same folder for two machines."""
    (tmp_path / "run").mkdir()
    if request.param == "local":
        yield tmp_path / "run", tmp_path / "run"
    else:
        with as_two_clients_see(tmp_path / "run", tmp_path) as places:
            yield places


@pytest.mark.skipif(not can_be_elsewhere(), reason="this system gives no process ids of their own")
def test_processes_of_two_machines_share_a_folder_one_after_the_other(sides, tmp_path):
    """Stopped for long, an owner is dead to the others; when it wakes it ends, and leaves the folder to its owner."""
    here, there = sides
    with owner_elsewhere(here) as one, owner_elsewhere(there) as other:
        side = {one: here, other: there}
        said = {each: each.stdout.readline() for each in (one, other)}
        first, last = sorted(said, key=lambda each: "owns" not in said[each])
        assert "owns" in said[first] and "s to see whether it is alive" in said[last]
        assert last.wait(GRACE_S) == 1 and "is being trained by process" in last.stderr.read()

        os.kill(inside(first), signal.SIGSTOP)
        with owner_elsewhere(side[last]) as heir:
            assert "to see whether" in heir.stdout.readline() and "taken over, it is dead" in heir.stdout.readline()
            assert heir.stdout.readline() == "owns\n"
            os.kill(inside(first), signal.SIGCONT)
            assert first.wait(GRACE_S) == START_AGAIN and "nothing more is written" in first.stderr.read()
            assert (tmp_path / "run" / LOCK).exists()
            heir.communicate("leave\n")
            assert heir.returncode == 0 and not (tmp_path / "run" / LOCK).exists()


def inside(process: subprocess.Popen) -> int:
    """The only process in there, by our ids."""
    (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(pid)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_or_links_has_one_owner_too(tmp_path, quick, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("fcntl.flock", refuse)  # NFS without its lock service
    monkeypatch.setattr("os.link", no_links)
    lock_of(tmp_path, pid=2**22 + 1)
    with owned(tmp_path):
        assert files.read_json(tmp_path / LOCK)["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"is being trained by process {os.getpid()} on"), owned(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()
