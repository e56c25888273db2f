"""Measure feature extraction: the whole job against the bare network and against the naive loop, in one run.

    sat bench features      or: python -m preprocessing.bench_features

Surprising: the job's figure counts everything from plan to manifest: loading the network, decoding, statistics, shards
synced, read back and hashed; the bare network only gets finished batches. The naive loop runs in a process of its own,
with PyTorch's default settings. Weights are random, speed does not depend on them.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from preprocessing.annotations.read import Records
from preprocessing.console import run
from preprocessing.extract_features import extract_stripe, finalize_features
from preprocessing.features.plan import plan_features
from preprocessing.features.recipe import FeatureOptions
from preprocessing.shard_images import plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.plan import ImageRecord
from preprocessing.synthetic import make_scenes
from sat.machine import best_precision
from sat.model.encoders.weights import RESNETS, AboutWeights


def main(
    images: Annotated[int, typer.Option(min=8, help="pictures per run of the job")] = 2048,
    encoder: Annotated[str, typer.Option(help="architecture: resnet50, resnet101, resnet152 or timm/NAME")] = RESNETS[
        0
    ],
    size: Annotated[int, typer.Option(help="side of the encoder's input")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures per pass of job and bare network")] = 32,
    pictures: Annotated[Path | None, typer.Option(help="folder of picture files; default: scenes rendered now")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each contender; the medians count")] = 3,
    folder: Annotated[Path | None, typer.Option(help="where test shards go; default: temporary")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> list[dict[str, Any]]:
    """Images/s of the whole job, the bare network at the same precision and a naive loop (PIL, batch 1, fp32)."""
    import torch

    from sat.bench.harness import InOwnProcess, report

    device, compute = "cuda:0" if torch.cuda.is_available() else "cpu", best_precision()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        files = _picture_files(root, pictures, images)
        weights = _random_weights(root / "weights.safetensors", encoder)
        naive_loop = InOwnProcess(_naive, files[: max(8, images // 32)], weights, size, device, device=device)
        contenders: dict[str, Callable[[], Any]] = {
            "job": _job(root, files, weights, size, batch_size),
            "bare": _bare(weights, size, batch_size, compute, device, images),
            "naive": naive_loop,
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):  # in turn, so that a slow minute of the machine hits all alike
            for name, contender in contenders.items():
                rates[name].append(contender())
        naive_loop.close()
    job, bare, naive = (sorted(rates[name])[rounds // 2] for name in ("job", "bare", "naive"))
    row = {
        "encoder": encoder,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "compute": compute,
        "size": size,
    }
    row |= {"job_images_per_s": job, "bare_images_per_s": bare, "naive_images_per_s": naive}
    rows = [row | {"job_of_bare": job / bare, "job_of_naive": job / naive}]
    report(rows, json_file)
    return rows


def _job(root: Path, files: list[Path], weights: Path, size: int, batch_size: int) -> Callable[[], float]:
    """The extraction from plan to manifest over image shards made of `files`, as a user would run it."""
    records = tuple(
        ImageRecord(str(number), file.name, "train", ("a picture",), str(number), file.stat().st_size)
        for number, file in enumerate(files)
    )
    annotated, out = Records(records, (), {}), root / "images"
    plan = plan_images(annotated, files[0].parent, out, shard_size=128, seed=1, max_bad_fraction=0.0)
    shard_stripe(plan)
    finalize(plan)

    def job() -> float:
        shutil.rmtree(root / "features", ignore_errors=True)
        begin = time.perf_counter()
        options = FeatureOptions(size=size, batch_size=batch_size)
        plan = plan_features(root / "images", root / "features", weights, options)
        extract_stripe(plan)
        finalize_features(plan)
        return len(files) / (time.perf_counter() - begin)

    return job


def _bare(weights: Path, size: int, batch_size: int, compute: str, device: str, images: int) -> Callable[[], float]:
    """The network that the job uses, on one finished batch over and over."""
    import torch

    from preprocessing.features.network import COMPUTE, fast_forward
    from sat.model.encoders.table import load_encoder

    forward = fast_forward(load_encoder(weights), size, compute, device, images)
    batch = torch.randn(batch_size, 3, size, size, device=device).to(
        COMPUTE[compute], memory_format=torch.channels_last
    )
    passes = max(1, images // batch_size)

    @torch.inference_mode()
    def bare() -> float:
        forward(batch)
        _synchronise(device)
        begin = time.perf_counter()
        for _ in range(passes):
            forward(batch)
        _synchronise(device)
        return passes * batch_size / (time.perf_counter() - begin)

    return bare


def _naive(files: list[Path], weights: Path, size: int, device: str) -> Callable[[], float]:
    """What one writes first: open, resize, normalise, torchvision-style network in fp32, one picture at a time."""
    import numpy as np
    import torch
    from PIL import Image

    from sat.model.encoders.table import load_encoder

    encoder = load_encoder(weights).to(device)

    @torch.inference_mode()
    def naive() -> float:
        begin = time.perf_counter()
        for file in files:
            image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()[None]
            encoder(encoder.normalise(pixels.to(device))).cpu()
        return len(files) / (time.perf_counter() - begin)

    return naive


def _picture_files(root: Path, pictures: Path | None, count: int) -> list[Path]:
    """`count` picture files in one folder, repeated if there are fewer: the given ones, or rendered scenes."""
    if pictures is not None:
        found = sorted(path for path in pictures.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not found:
            raise ValueError(f"{pictures} holds no .jpg, .jpeg or .png file")
        return [found[number % len(found)] for number in range(count)]
    make_scenes(root / "scenes", {"train": count}, seed=1)
    return sorted((root / "scenes" / "images" / "train").iterdir())


def _random_weights(path: Path, architecture: str) -> Path:
    """An encoder with random weights."""
    import torch

    from preprocessing.features.writing import write_weights
    from sat.model.encoders.table import build_encoder, parameters_of

    torch.manual_seed(1)
    built = build_encoder(architecture)
    write_weights(parameters_of(built), path, AboutWeights(architecture, built.pixels, "random"), "")
    return path


def _synchronise(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(main)
