"""Plan a feature data set: encoder, transform, format and int8 scales, all fixed before the first shard.

The surprising decision: int8 scales are calibrated while planning, on the first training pictures in shard order,
because every shard, on whichever machine, has to use the same ones. They travel in the plan; the fingerprint holds
their digest.
"""

import base64
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from preprocessing.features.extractor import Extractor
from preprocessing.features.statistics import calibrate
from preprocessing.sharding.plan import Plan, publish_plan, standing_plan
from preprocessing.sharding.write import PlannedShard, hash_file
from sat.shards.features import EncoderSpec, FeatureSpec, Transform, storage_type
from sat.shards.manifest import Manifest, load_manifest
from sat.shards.pictures import GEOMETRIES, RESIZE

WRITER = 1
"""Version of what is written for given inputs; part of the fingerprint."""
CALIBRATION_IMAGES = 256
"""Pictures from which the int8 scales are taken."""
PRECISIONS = ("auto", "bf16", "fp32")


def plan_features(
    images: Path,
    out: Path,
    weights: Path,
    *,
    size: int = 224,
    stage: int = 4,
    dtype: str = "bf16",
    geometry: str = "squash",
    compute: str = "auto",
    batch_size: int = 32,
    statistics_splits: tuple[str, ...] = ("train",),
    overwrite: bool = False,
) -> Plan:
    """Publish the plan of the features of a finished image data set.

    Raises ValueError for settings that do not exist, images that are not finished, or a folder planned otherwise.
    """
    _check_settings(dtype, geometry, compute)
    encoder = EncoderSpec("resnet50", stage, weights_sha256=hash_file(weights))
    transform = Transform(size, geometry, resize=RESIZE, normalise="imagenet")
    spec = FeatureSpec("grid", encoder.cells(size), encoder.dim, dtype, encoder, transform)
    source = load_manifest(images)
    if source.kind != "images":
        raise ValueError(f"{images} holds {source.kind}, expected image shards")
    fingerprint = {
        "writer": WRITER,
        "source": source.digest,
        **spec.to_fingerprint(),
        "compute": _resolve_compute(out, compute),
        "statistics_splits": list(statistics_splits),
    }
    settings = {"images": os.path.abspath(images), "weights": os.path.abspath(weights), "batch_size": batch_size}
    shards = tuple(PlannedShard(s.name, s.split, s.samples, s.sha256) for s in source.shards)
    plan = Plan(out, "features", fingerprint, settings, shards)
    if dtype == "int8":
        plan = _with_scale(plan, source)
    return publish_plan(plan, overwrite=overwrite)


def scale_of(plan: Plan) -> np.ndarray:
    """Scale per channel, float32 [D]: the plan's for int8, else ones."""
    if plan.fingerprint["dtype"] != "int8":
        return np.ones(plan.fingerprint["dim"], np.float32)
    return np.frombuffer(base64.b64decode(plan.settings["scale"]), "<f4").copy()


def source_of(plan: Plan) -> Manifest:
    """The image data set a feature plan was made from. Raises ValueError when it is another one by now."""
    source = load_manifest(plan.settings["images"])
    if source.digest != plan.fingerprint["source"]:
        raise ValueError(
            f"{plan.settings['images']} is image data set {source.digest[:12]}, {plan.root} was planned from "
            f"{plan.fingerprint['source'][:12]}; run the plan step again with --overwrite"
        )
    return source


def _check_settings(dtype: str, geometry: str, compute: str) -> None:
    storage_type(dtype)
    for name, value, choices in (("geometry", geometry, GEOMETRIES), ("compute", compute, PRECISIONS)):
        if value not in choices:
            raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(map(str, choices))}")


def _resolve_compute(out: Path, compute: str) -> str:
    """`auto`: what the plan that stands says, else what this machine does best (which takes importing torch)."""
    if compute != "auto":
        return compute
    standing = standing_plan(out)
    if standing is not None and "compute" in standing.fingerprint:
        return standing.fingerprint["compute"]
    from preprocessing.features.network import best_compute

    return best_compute()


def _with_scale(plan: Plan, source: Manifest) -> Plan:
    """The plan with int8 scales: those of the plan that stands, when all else is equal, or calibrated now."""
    standing = standing_plan(plan.root)
    digest = standing.fingerprint.get("scale_sha256") if standing else None
    if digest and standing.fingerprint == plan.fingerprint | {"scale_sha256": digest}:
        return replace(
            plan, fingerprint=standing.fingerprint, settings=plan.settings | {"scale": standing.settings["scale"]}
        )
    splits = [split for split in plan.fingerprint["statistics_splits"] if split in source.splits] or sorted(
        source.splits
    )
    with Extractor(plan, source, np.ones(plan.fingerprint["dim"], np.float32)) as extractor:
        scale = calibrate(extractor.first_grids(splits[0], CALIBRATION_IMAGES)).astype("<f4").tobytes()
    encoded = base64.b64encode(scale).decode()
    fingerprint = plan.fingerprint | {"scale_sha256": hashlib.sha256(scale).hexdigest()}
    return replace(plan, fingerprint=fingerprint, settings=plan.settings | {"scale": encoded})
