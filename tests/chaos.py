"""Chaos: a small training on two ranks that is killed again and again, and ends as the undisturbed one does.

    python -m tests.chaos --kills 200 [--seed 1] [--folder DIR]

Kills (SIGKILL) hit one rank, all ranks, the launcher or MLflow's uploader, at random moments and at the places where a
checkpoint, an evaluation or an export is half done. After each nothing may be left running, and the next life goes on;
each training that gets to its end must have the weights, bit by bit, and the journal of the undisturbed one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from sat import files
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer

ROOT = Path(__file__).parents[1]
VICTIMS = ("rank 0", "rank 1", "all ranks", "launcher", "uploader")
PLACES = ("folder-written", "folder-swapped", "evaluated", "exported", "checkpoint-begun")
"""Crash points of `sat.files.crash_point`; the first two are in the commit of checkpoints and exports."""
MEASURED = {"time", "captions_per_s", "data_wait_share", "seconds_per_step"}
"""Numbers of the journal that no two runs share."""
GRACE_S = 90.0
"""On a machine that many share."""


@dataclass
class Ranks:
    """`tests.forked_ranks`, spoken to."""

    server: subprocess.Popen[str]
    pids: dict = field(default_factory=dict)
    log: Path = Path()

    @classmethod
    def serve(cls) -> "Ranks":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "tests.forked_ranks"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return cls(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))

    def _ask(self, order: dict) -> dict:
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, arguments: list[str], log: Path, *how: str, program: str = "train") -> None:
        self.log = log
        self.pids = self._ask({"start": arguments, "log": str(log), "how": how, "program": program})

    def wait(self, seconds: float = GRACE_S) -> tuple[list[int | None], list[int]]:
        """Exit codes of launcher and ranks, and what had to be killed, once nothing is left."""
        ended = self._ask({"wait": seconds})
        for pid in self.pids["ranks"]:  # those that the launcher has seen
            if (seen := Path(f"{self.log}.{pid}")).is_file():
                ended["codes"][str(pid)] = int(seen.read_text())
                seen.unlink()
        return [ended["codes"][str(pid)] for pid in (self.pids["launcher"], *self.pids["ranks"])], ended["orphans"]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(GRACE_S)


def make_config(root: Path) -> Path:
    """Eight epochs of three steps; saved every two, scored every twelve, logged every five steps."""
    make_feature_dataset(root / "data", {"train": 18, "val": 4})
    settings = [*SMALL, *with_tokenizer(root), "data.num_workers=1", "train.epochs=8", "train.save_every=2"]
    settings += ["train.eval_every=12", "train.log_every=5", "train.patience=0", "eval.batch_size=1"]
    settings += ["train.timeout=120"]  # in which ranks end whose launcher is gone before they have looked for it
    path = root / "settings.json"
    files.write_json(path, {"settings": settings})
    return path


def arguments_of(path: Path, folder: Path, *more: str) -> list[str]:
    """What `sat train` is given."""
    empty = path.with_name("empty.yaml")
    files.write_text(empty, "train: {seed: 1}\n")
    return [str(empty), *files.read_json(path)["settings"], f"train.run_dir={folder}", *more]


def result_of(folder: Path) -> tuple[dict[str, str], list[dict]]:
    """Digests of the last checkpoint's tensors and of the best model's, and the journal without what is measured."""
    assert not (left := [*folder.rglob("*.tmp-*")]), f"left half done: {left}"
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    kept = [*newest.glob("*.safetensors"), folder / "best/model.safetensors"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    journal = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    return {f"{path.parent.name}/{path.name}": files.sha256(path) for path in kept}, journal


def uploader_of(pids: dict) -> list[int]:
    """MLflow's, of rank 0."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == pids["ranks"][0] and "sat.tracking.mlflow" in path.with_name("cmdline").read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill(victim: str, pids: dict) -> None:
    """SIGKILL; who is gone already has got on faster."""
    chosen = {"rank 0": pids["ranks"][:1], "rank 1": pids["ranks"][1:], "all ranks": pids["ranks"]}
    chosen |= {"launcher": [pids["launcher"]], "uploader": uploader_of(pids) if victim == "uploader" else []}
    for pid in chosen[victim]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def one_life(ranks: Ranks, settings: Path, folder: Path, draw: random.Random, longest: float) -> str:
    """Start or continue the run and kill it; what was done. Raises AssertionError for an orphan or a wrong exit."""
    victim, place = draw.choice(VICTIMS), draw.choice((*PLACES, "", "", "", "", ""))
    more = [f"tracking.mlflow_uri=sqlite:///{folder}.db"] if victim == "uploader" else []
    how = ["slow_steps", *([place] if place else [])]
    ranks.start(arguments_of(settings, folder, *more), folder.with_suffix(".log"), *how)
    delay = draw.uniform(0.2, longest)
    until = time.monotonic() + delay
    while time.monotonic() < until and Path(f"/proc/{ranks.pids['launcher']}").exists():
        time.sleep(0.02)
    kill(victim, ranks.pids)
    # Without its uploader, or killed too late, a training goes on to its end.
    codes, orphans = ranks.wait(300)
    said = f"{victim} after {delay:.1f} s{f', death at {place}' if place else ''}: exit codes {codes}"
    assert not orphans, f"{said}: left {orphans}\n{folder.with_suffix('.log').read_text()[-3000:]}"
    allowed = {0, 75, -signal.SIGKILL, -signal.SIGTERM, 256 - signal.SIGKILL, 256 - signal.SIGTERM}
    assert set(codes) <= allowed, f"{said}\n{folder.with_suffix('.log').read_text()[-3000:]}"
    return said


def finished(folder: Path) -> bool:
    return files.read_json(folder / "status.json").get("state") == "finished"


def chaos(root: Path, ranks: Ranks, kills: int, seed: int, say=print) -> int:
    """Kill so often; the number of trainings that got to their end. Raises AssertionError where one is not the same."""
    settings, draw = make_config(root), random.Random(seed)
    began = time.monotonic()
    ranks.start(arguments_of(settings, root / "undisturbed"), root / "undisturbed.log", "slow_steps")
    codes, orphans = ranks.wait(300)
    assert codes == [0, 0, 0] and not orphans, (codes, (root / "undisturbed.log").read_text())
    longest, expected, folder, ends = time.monotonic() - began, result_of(root / "undisturbed"), root / "run", 0
    for number in range(1, kills + 1):
        said = one_life(ranks, settings, folder, draw, longest)
        say(f"{number}: {said}, step {files.read_json(folder / 'status.json').get('saved_step', 0)}")
        if number == kills and not finished(folder):
            ranks.start(arguments_of(settings, folder), folder.with_suffix(".log"))
            codes, orphans = ranks.wait(300)
            assert codes == [0, 0, 0] and not orphans, (codes, folder.with_suffix(".log").read_text()[-3000:])
        if finished(folder):
            ends += 1
            assert result_of(folder) == expected, f"not as undisturbed: {result_of(folder)} {expected}"
            shutil.rmtree(folder)
    return ends


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    return options


def main() -> None:
    given = parser().parse_args()
    if given.folder and given.folder.exists() and any(given.folder.iterdir()):
        raise SystemExit(
            f"error: {given.folder} is not empty; name a new folder, as an older run would be gone on with"
        )
    with tempfile.TemporaryDirectory() as temporary:
        root = given.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        ranks = Ranks.serve()
        try:
            ends = chaos(root, ranks, given.kills, given.seed, lambda line: print(line, flush=True))
        finally:
            ranks.close()
    print(f"{given.kills} kills; {ends} trainings got to their end, each as the undisturbed one")


if __name__ == "__main__":
    main()
