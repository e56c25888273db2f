"""Chaos: the whole of preprocessing, killed again and again, ends with the bytes of an undisturbed run.

    python -m tests.preprocessing_chaos --kills 1000 [--seed 1] [--folder DIR]

Image shards and feature shards are planned, written, finalized and, once they stand, damaged and repaired, by one
process or by two at once. Kills (SIGKILL) hit one of them, or both, at random moments. Every few kills the job is let
finish: then every file has the bytes of the undisturbed run, verification finds no fault, and nothing is left over.
"""

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from preprocessing.annotations.read import read_annotations
from preprocessing.extract_features import extract_stripe, finalize_features
from preprocessing.features import network as network  # imported once
from preprocessing.features.plan import plan_features
from preprocessing.features.recipe import FeatureOptions
from preprocessing.shard_images import plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.verify import verify
from preprocessing.verify_shards import repair
from sat.model.encoders.table import blueprint
from tests.helpers_shards import flip_bit, make_coco, snapshot
from tests.test_extract_features import make_images, random_weights

KINDS = ("images", "features")
KILLS_PER_FOLDER = 5


@dataclass
class Job:
    """Making one kind of data set in a folder, or bringing it back after damage."""

    kind: str
    root: Path
    """Where pictures, image shards and weights lie."""
    out: Path
    seconds: float = 1.0
    """What an undisturbed run takes."""
    kills: Counter = field(default_factory=Counter)

    def make(self) -> None:
        {"images": images, "features": features}[self.kind](self.root, self.out)

    def repair(self) -> None:
        report = verify(self.out)
        if report.calls_for_repair:
            repair(self.out, report)

    def damage(self, generator: random.Random) -> None:
        """Flip a bit of some files of a finished set: shards, sidecars, tables or the manifest, not the plan."""
        files = [path for path in self.out.rglob("*") if path.is_file() and path.stat().st_size]
        files = [path for path in files if not path.name.startswith("plan") and path.suffix != ".jsonl"]
        for path in generator.sample(sorted(files), 2):
            flip_bit(path, generator.randrange(8 * path.stat().st_size))


def images(root: Path, out: Path) -> None:
    files = [f"{split}={root}/coco/annotations/captions_{split}.json" for split in ("train", "val")]
    pictures = root / "coco" / "images"
    records = read_annotations(files, image_root=pictures)
    plan = plan_images(records, pictures, out, shard_size=2, seed=1, max_bad_fraction=0.01)
    shard_stripe(plan)
    finalize(plan)


def features(root: Path, out: Path) -> None:
    options = FeatureOptions(size=32, stage=1, batch_size=4, compute="fp32")
    plan = plan_features(root / "images", out, root / "weights.safetensors", options)
    extract_stripe(plan)
    finalize_features(plan)


def forked(work: Callable[[], None]) -> int:
    """Do this in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stderr = io.StringIO()  # progress lines
        tqdm.set_lock(threading.RLock())  # its own would be shared with those that are killed while they hold it
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def disturb(job: Job, work: Callable[[], None], generator: random.Random) -> int:
    """Run it in one process or two, kill one or all of them; returns how many were killed at work."""
    children = [forked(work) for _ in range(generator.choice((1, 1, 2)))]
    victims = children if generator.random() < 0.5 else children[:1]
    time.sleep(generator.uniform(0.02, 0.5) * job.seconds)
    for child in victims:
        os.kill(child, signal.SIGKILL)
    codes = {child: ended(child) for child in children}
    assert all(codes[child] == 0 for child in children if child not in victims), f"{job.out}: {codes}"
    return sum(codes[child] == -signal.SIGKILL for child in victims)


def check(job: Job, expected: dict[str, bytes]) -> None:
    report = verify(job.out)
    assert not report.faults and not report.foreign, f"{job.out}: {report}"
    found = snapshot(job.out)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not different, f"{job.out}: not the bytes of the undisturbed run: {', '.join(different)}"


def undisturbed(job: Job) -> dict[str, bytes]:
    """What a run makes that nobody disturbs, the second of two, whose time is noted."""
    for name in ("first", "undisturbed"):
        job.out = job.out.with_name(f"{job.kind}-{name}")
        begin = time.monotonic()
        assert ended(forked(job.make)) == 0
        job.seconds = time.monotonic() - begin
    return snapshot(job.out)


def rounds(job: Job, expected: dict[str, bytes], generator: random.Random, number: int) -> None:
    """One folder: killed while it is made, finished, damaged, killed while it is repaired, repaired."""
    job.out = job.out.with_name(f"{job.kind}-{number}")
    for name, work in (("make", job.make), ("repair", job.repair)):
        if name == "repair":
            job.damage(generator)
        for _ in range(KILLS_PER_FOLDER):
            job.kills[name] += disturb(job, work, generator)
        assert ended(forked(work)) == 0, f"{job.out}: cannot {name}"
        check(job, expected)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--kills", type=int, default=1000)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    return options


def main() -> None:
    options = parser().parse_args()
    Image.init()
    with tempfile.TemporaryDirectory() as temporary:
        root, generator = options.folder or Path(temporary), random.Random(options.seed)
        make_coco(root / "coco")
        make_images(root / "coco", root / "images", shard_size=2)
        weights = random_weights(root / "weights.safetensors")
        blueprint(weights, 1, 32)  # what planning imports when it is first asked for an encoder, once for all
        jobs = [Job(kind, root, root / kind) for kind in KINDS]
        expected = {job.kind: undisturbed(job) for job in jobs}
        number = done = 0
        while done < options.kills:
            for job in jobs:
                rounds(job, expected[job.kind], generator, number)
            number, done = number + 1, sum(sum(job.kills.values()) for job in jobs)
            print(f"{done} kills, every folder as the undisturbed one", flush=True)
    for job in jobs:
        print(f"{job.kind}: " + ", ".join(f"{count} kills while it was to {name}" for name, count in job.kills.items()))


if __name__ == "__main__":
    main()
