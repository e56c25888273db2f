"""Runs one preprocessing job in forked processes and kills them, so that many kills do not cost as many imports.

    python -m tests.killed_worker images|features ROOT    with lines OUT SECONDS on standard input; inf: let it finish

The answer to each line is `EXIT_CODE SECONDS`.
"""

import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from PIL import Image

from preprocessing.annotations.read import read_annotations
from preprocessing.extract_features import extract_stripe, finalize_features
from preprocessing.features import network as network  # imported once
from preprocessing.features.plan import plan_features
from preprocessing.features.recipe import FeatureOptions
from preprocessing.shard_images import plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from sat.model.encoders.table import blueprint


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


def run_and_kill(kind: str, root: Path, out: Path, seconds: float) -> tuple[int, float]:
    begin, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            {"images": images, "features": features}[kind](root, out)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds < math.inf:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begin


if __name__ == "__main__":
    Image.init()
    if sys.argv[1] == "features":  # what planning imports when it is first asked for an encoder, once for all
        blueprint(Path(sys.argv[2]) / "weights.safetensors", 1, 32)
    for line in sys.stdin:
        folder, delay = line.split()
        print(*run_and_kill(sys.argv[1], Path(sys.argv[2]), Path(folder), float(delay)), flush=True)
