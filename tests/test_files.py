"""The only writers: whole or not at all at any kill, by the umask, and nothing of others is touched."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from sat import files

ROOT = Path(__file__).parents[1]

REPLACES_FOR_EVER = """
import itertools, sys
from pathlib import Path
from sat import files
folder, exchanges = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchanges:
    files._exchange = lambda a, b: False
files.recover_folder(folder / "best")
for number in itertools.count():
    with files.replacing_folder(folder / "best") as new:
        for name in "abc":
            (new / name).write_text(str(number) * 1000)
    files.write_json(folder / "status.json", {"number": number, "padding": "x" * 5000})
    if number == 3:
        print("ready", flush=True)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.faults
@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_kill_at_any_moment_leaves_a_whole_file_and_a_whole_folder(tmp_path, way):
    for kill in range(6):
        command = [sys.executable, "-c", REPLACES_FOR_EVER, str(tmp_path), way]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.003 * kill)
            child.kill()
        assert child.returncode == -signal.SIGKILL
        assert json.loads((tmp_path / "status.json").read_text())["padding"] == "x" * 5000
        if way == "exchange":
            assert (tmp_path / "best").is_dir(), "there is a moment without it"
        files.recover_folder(tmp_path / "best")
        assert names(tmp_path / "best") == ["a", "b", "c"]
        assert len({(tmp_path / "best" / name).read_text() for name in "abc"}) == 1


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_by_all_of_the_new_one_and_by_nothing_when_it_fails(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    path = tmp_path / "best"
    for content in ("old", "new"):
        with files.replacing_folder(path) as folder:
            (folder / content).write_text(content)
        assert names(path) == [content]
    with pytest.raises(RuntimeError), files.replacing_folder(path) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert names(path) == ["new"] and names(tmp_path) == ["best"]


def test_a_kill_between_two_renames_is_mended(tmp_path):
    old = tmp_path / f"best{files.OLD}1"
    old.mkdir()
    (old / "model").write_text("whole")
    files.recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "model").read_text() == "whole" and names(tmp_path) == ["best"]


def test_what_was_set_aside_in_an_earlier_life_is_never_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    for name in ("best", f"best{files.OLD}1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)

    def die(place: str) -> None:
        if place == "folder-set-aside":
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "crash_point", die)
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(tmp_path / "best") as new:
        (new / "of").write_text("new")
    files.recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "of").read_text() == "best" and names(tmp_path) == ["best"]


def test_a_failed_writer_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1} and names(tmp_path) == ["value.json"]


@pytest.mark.faults
def test_a_full_disk_leaves_the_old_file(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path; from sat import files;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "files.write_bytes(Path(sys.argv[1]), b'x' * 2000)"
    )
    path = tmp_path / "file"
    files.write_text(path, "old")
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_is_as_the_umask_says_also_where_a_library_writes_it(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "text", "a")
        assert files.create(tmp_path / "created", b"a")
        with files.replacing(tmp_path / "weights.safetensors") as temporary:
            save_file({"w": zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_of_two_that_create_one_file_the_first_wins(tmp_path):
    assert files.create(tmp_path / "claim", b"first")
    assert not files.create(tmp_path / "claim", b"second")
    assert (tmp_path / "claim").read_bytes() == b"first" and names(tmp_path) == ["claim"]


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sat import files\n"
        "with files.locked(Path(sys.argv[1])) as mine:\n    print(mine, flush=True); time.sleep(600)"
    )
    lock = tmp_path / "lock"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout.readline() == b"True\n"
        with files.locked(lock, wait=False) as mine:
            assert not mine
        child.kill()
    with files.locked(lock, wait=False) as mine:
        assert mine
    with files.locked(lock, wait=False) as mine:
        assert mine, "it was given back"


def test_sweeping_takes_what_is_unfinished_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("a.json", "tmp", "a.tmp", "other.tar", "notes.tmp-old")]
    for path in kept:
        path.write_text("mine")
    files.temporary_name(tmp_path / "a.json", tmp_path).write_text("half")
    files.temporary_name(tmp_path / "best", tmp_path).mkdir()
    files.sweep(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in kept)


def test_digests_are_sha256_of_the_bytes(tmp_path):
    data = os.urandom(1 << 17)
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == files.sha256_of(data) == hashlib.sha256(data).hexdigest()
    assert files.sha256_of("é") == hashlib.sha256("é".encode()).hexdigest()


@pytest.mark.parametrize("content", [None, "", "[1]", "{", '{"a": 1}'])
def test_json_that_cannot_be_read_is_no_object(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_text(content)
    assert files.read_json(tmp_path / "file") == ({"a": 1} if content == '{"a": 1}' else {})


def test_the_cache_is_where_the_user_says_or_a_new_folder_where_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "show-attend-and-tell"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    other = files.cache_folder()
    assert other.is_dir() and other != tmp_path / "file" / "show-attend-and-tell"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a container's user that no file knows
    assert files.cache_folder().parent == other.parent
