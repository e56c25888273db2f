"""Plan a feature data set: encoder, transform, format and int8 scales, all fixed before the first shard.

The surprising decision: int8 scales are calibrated while planning, on the first training pictures in shard order,
because every shard, on whichever machine, has to use the same ones. They travel in the plan; the fingerprint holds
their digest. Data sets that are to be mixed, or scored by one model, share the scales of one of them.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from preprocessing.features.extractor import Extractor
from preprocessing.features.recipe import FeatureOptions, FeatureRecipe
from preprocessing.features.statistics import CALIBRATION_IMAGES, Floats, calibrate, packed, scale_from
from preprocessing.sharding.ownership import publish_plan
from preprocessing.sharding.plan import FeatureSettings, Plan, PlannedShard, standing_plan
from sat import files
from sat.machine import best_precision
from sat.model.encoders.weights import named_stage, read_about
from sat.shards.features import FeatureSpec, Transform
from sat.shards.manifest import Manifest, load_manifest
from sat.shards.pictures import RESIZE


def plan_features(images: Path, out: Path, weights: Path, options: FeatureOptions, *, overwrite: bool = False) -> Plan:
    """Publish the plan of the features of a finished image data set.

    Raises ValueError for options that do not fit it, images that are not finished, or a folder planned otherwise.
    """
    source = load_manifest(images)
    if source.kind != "images":
        raise ValueError(f"{images} holds {source.kind}, expected image shards")
    splits = _statistics_splits(source, options.statistics_splits)
    spec = _spec(out, weights, options)
    recipe = FeatureRecipe(source.digest, spec, _resolve_compute(out, options.compute), options.batch_size, splits)
    settings = FeatureSettings(os.path.abspath(images), os.path.abspath(weights))
    shards = tuple(PlannedShard(s.name, s.split, s.samples, s.sha256) for s in source.shards)
    plan = Plan(out, recipe.to_fingerprint(), settings, shards)
    if spec.dtype == "int8":
        plan = _with_scale(plan, source, options.scale_from)
    return publish_plan(plan, overwrite=overwrite)


def recipe_of(plan: Plan) -> FeatureRecipe:
    """What shapes the features of a plan; ValueError for a plan of images, or one that `plan_features` did not make."""
    plan.settings_as(FeatureSettings)
    try:
        return FeatureRecipe.from_fingerprint(plan.fingerprint)
    except KeyError as missing:
        raise ValueError(f"{plan.root}: its plan does not say {missing}; plan the features again") from None


def source_of(plan: Plan) -> Manifest:
    """The image data set a feature plan was made from. Raises ValueError when it is another one by now."""
    images, planned = plan.settings_as(FeatureSettings).images, recipe_of(plan).source
    source = load_manifest(images)
    if source.digest != planned:
        raise ValueError(
            f"{images} is image data set {source.digest[:12]}, {plan.root} was planned from {planned[:12]}; "
            "run the plan step again with --overwrite"
        )
    return source


def _spec(out: Path, weights: Path, options: FeatureOptions) -> FeatureSpec:
    """What an encoder of these weights gives: as the plan that stands says of the same one, else seen now (by torch).

    ValueError for weights, a stage or a size that do not fit each other.
    """
    digest, stage = files.sha256(weights), named_stage(read_about(weights).architecture, options.stage)
    standing = _standing_recipe(out)
    if standing is not None and standing[1].reads(digest, stage, options.size):
        encoder, transform = standing[1].encoder, replace(standing[1].transform, geometry=options.geometry)
    else:
        from sat.model.encoders.table import blueprint

        plan = blueprint(weights, stage, options.size)
        encoder, pixels = replace(plan.spec, weights_sha256=digest), plan.pixels
        transform = Transform(options.size, options.geometry, RESIZE, pixels.interpolation, pixels.mean, pixels.std)
    return FeatureSpec("grid", encoder.cells(options.size), encoder.dim, options.dtype, encoder, transform)


def _statistics_splits(source: Manifest, named: tuple[str, ...]) -> tuple[str, ...]:
    unknown = sorted(set(named) - set(source.splits))
    if unknown:
        raise ValueError(
            f"--statistics-split {unknown[0]}: {source.root} has no such split, only {', '.join(source.splits)}"
        )
    return named or ("train",)


def _resolve_compute(out: Path, compute: str) -> str:
    """`auto`: what the plan that stands says, else what this machine does best (which takes importing torch)."""
    if compute != "auto":
        return compute
    standing = _standing_recipe(out)
    return best_precision() if standing is None else standing[1].compute


def _standing_recipe(root: Path) -> tuple[Plan, FeatureRecipe] | None:
    """The plan that stands and what it says, where it is one of features that this program understands."""
    try:
        plan = standing_plan(root)
        return None if plan is None else (plan, recipe_of(plan))
    except ValueError:
        return None


def _with_scale(plan: Plan, source: Manifest, shared: str) -> Plan:
    """The plan with int8 scales: of the data set `shared`, of the plan that stands when all else is equal, or new."""
    settings, recipe = plan.settings_as(FeatureSettings), recipe_of(plan)
    standing = _standing_recipe(plan.root)
    if not shared and standing is not None and standing[1] == _scaled(recipe, standing[1].spec.scale_sha256):
        scale = standing[0].settings_as(FeatureSettings).scale
        return replace(plan, fingerprint=standing[0].fingerprint, settings=replace(settings, scale=scale))
    scale, digest = packed(scale_from(shared, recipe.spec.dim) if shared else _calibrated(plan, source))
    fingerprint = _scaled(recipe, digest).to_fingerprint()
    return replace(plan, fingerprint=fingerprint, settings=replace(settings, scale=scale))


def _calibrated(plan: Plan, source: Manifest) -> Floats:
    """Scale per channel, float32 [D], of the first pictures of the training split."""
    recipe = recipe_of(plan)
    splits = [split for split in recipe.statistics_splits if split in source.splits] or sorted(source.splits)
    with Extractor(plan, recipe, source, np.ones(recipe.spec.dim, np.float32)) as extractor:
        return calibrate(extractor.first_grids(splits[0], CALIBRATION_IMAGES))


def _scaled(recipe: FeatureRecipe, scale_sha256: str) -> FeatureRecipe:
    return replace(recipe, spec=replace(recipe.spec, scale_sha256=scale_sha256))
