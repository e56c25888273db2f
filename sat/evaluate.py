"""Score a split: every image once over all ranks, decoded freely, scored once on rank 0.

The surprise: the blind baseline (the same model fed shuffled features) needs no second decoding. Images are decoded
independently of one another, so the caption of image i under the features of image j is the caption of image j.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from sat import files
from sat.cli import run_program
from sat.config import Config
from sat.data.loader import Reading, evaluation_batches, read_references
from sat.data.plan import Share
from sat.engine.processes import Processes
from sat.engine.start import start
from sat.evaluation.decoding import decode
from sat.evaluation.metrics import Scores, most_frequent_caption, score
from sat.evaluation.options import METRICS
from sat.export import TrainedModel, load_model
from sat.machine import speed_up
from sat.run_folder import attach
from sat.shards.features import FeatureSpec
from sat.shards.manifest import Manifest, load_manifest
from sat.text import CaptionTokenizer, normalise
from sat.training_data import reading_options


@dataclass(frozen=True)
class Evaluation:
    scores: Scores
    captions: dict[str, str]
    """image_id -> caption, sorted by image_id."""
    unfinished: int
    """Captions cut at the greatest length before <end>."""


def evaluate(
    models: nn.Module | Sequence[nn.Module],
    manifest: Manifest,
    split: str,
    tokenizer: CaptionTokenizer,
    config: Config,
    processes: Processes,
    reading: Reading,
) -> Evaluation:
    """Decode and score `split`. All ranks enter and all get the result; the same scores for any world size.

    Raises ValueError where the split is empty or the captions do not cover it exactly.
    """
    local = decode_split(models, manifest, split, tokenizer, config, processes, reading)
    gathered = [pair for part in processes.gather(local) for pair in part]
    captions = {image_id: caption for image_id, caption, _ in sorted(gathered)}
    if len(captions) != len(gathered):
        raise ValueError(f"split {split!r} of {manifest.root}: an image was decoded twice; image ids must be unique")

    def score_once() -> Scores:
        return score(read_references(manifest, split, reading.options), captions, tuple(config.eval.metrics))

    scores = processes.run_on_main(score_once)
    return Evaluation(scores, captions, sum(not finished for _, _, finished in gathered))


@torch.inference_mode()
def decode_split(
    models: nn.Module | Sequence[nn.Module],
    manifest: Manifest,
    split: str,
    tokenizer: CaptionTokenizer,
    config: Config,
    processes: Processes,
    reading: Reading,
) -> list[tuple[str, str, bool]]:
    """This rank's (image_id, caption, finished) of the split; a progress line on rank 0."""
    from tqdm import tqdm

    share = Share(processes.rank, processes.world_size)
    batches = evaluation_batches(manifest, split, reading, batch_size=config.eval.batch_size, share=share)
    results = []
    images = sum(shard.samples for shard in manifest.shards if shard.split == split)
    with tqdm(total=images, desc=f"decode {split}", unit="image", disable=not processes.is_main, leave=False) as bar:
        for batch in batches:
            with processes.autocast():
                best = [hypotheses[0] for hypotheses in decode(models, batch.grid.to(processes.device), config.eval)]
            for image_id, hypothesis in zip(batch.image_ids, best, strict=True):
                results.append((image_id, tokenizer.decode(hypothesis.tokens), hypothesis.finished))
            bar.update(min(len(batch.image_ids) * processes.world_size, images - bar.n))
    return results


def baselines(
    captions: dict[str, str], references: dict[str, list[str]], training_captions: list[str]
) -> dict[str, dict[str, str]]:
    """Captions that do not see the picture: `blind` (shuffled features) and `most_frequent` (of the training's)."""
    ids = sorted(captions)
    if len(ids) < 2:
        raise ValueError(f"baselines need at least 2 images, the split has {len(ids)}")
    half = len(ids) // 2
    constant = most_frequent_caption([normalise(caption) for caption in training_captions])
    return {
        "blind": {image_id: captions[ids[(i + half) % len(ids)]] for i, image_id in enumerate(ids)},
        "most_frequent": dict.fromkeys(references, constant),
    }


def main(
    run: Annotated[
        Path, typer.Argument(help="run folder (its best model is taken) or a folder with model.safetensors")
    ],
    split: Annotated[str, typer.Option(help="split to score")] = "test",
    features: Annotated[str, typer.Option(help="feature folder or URL; default: the one trained on")] = "",
    beam_size: Annotated[int, typer.Option(help="beams per image; default: the run's setting")] = 0,
    with_baselines: Annotated[bool, typer.Option("--baselines", help="score the two blind baselines too")] = False,
    also: Annotated[
        list[Path] | None, typer.Option("--ensemble", help="further run folders, averaged word by word")
    ] = None,
) -> None:
    """Score a trained model; writes RUN/evaluation-SPLIT.json and RUN/captions-SPLIT.json.

    Under `accelerate launch` the images are shared by all ranks; the scores do not depend on how many there are (but
    for hard attention that samples its locations).
    """
    trained = [load_model(best_folder(folder)) for folder in [run, *(also or [])]]
    config = trained[0].config
    search = replace(config.eval, metrics=list(METRICS), beam_size=beam_size or config.eval.beam_size)
    config = replace(config, eval=search)
    manifest = load_manifest(features or config.data.features)
    for model in trained:
        refuse_unfit(model, manifest)
        if model.tokenizer.digest != trained[0].tokenizer.digest:
            raise ValueError(
                f"the ensemble's models have different vocabularies ({run} and {also}); they cannot vote on words"
            )
    precision = config.train.precision if torch.cuda.is_available() or config.train.precision != "fp16" else "bf16"
    processes = start(precision).processes
    kernels = speed_up(config.train.kernels, processes.device)
    if processes.is_main:
        print(kernels, flush=True)
    models = [each.model.to(processes.device) for each in trained]
    result = evaluate(models, manifest, split, trained[0].tokenizer, config, processes, reading_options(config))

    def report() -> None:
        scores = {"model": result.scores}
        if with_baselines:
            references = read_references(manifest, split)
            training = [
                c for name in config.data.train_splits for cs in read_references(manifest, name).values() for c in cs
            ]
            for name, captions in baselines(result.captions, references, training).items():
                scores[name] = score(references, captions, tuple(config.eval.metrics))
        write_report(run, split, config, trained[0].step, result, scores)

    processes.run_on_main(report)
    processes.leave()


def refuse_unfit(trained: TrainedModel, manifest: Manifest) -> None:
    """Raise ValueError unless the model reads what `manifest` holds."""
    if trained.config.encoder.train and manifest.kind != "images":
        raise ValueError(f"the model has its own encoder and reads image shards; {manifest.root} holds {manifest.kind}")
    if not trained.config.encoder.train:
        FeatureSpec.from_fingerprint(trained.features).refuse(manifest.spec, manifest.root)


def best_folder(run: Path) -> Path:
    """The folder of the trained model: `run` itself or its `best`."""
    return run if (run / "model.safetensors").is_file() else run / "best"


def write_report(run: Path, split: str, config, step: int, result: Evaluation, scores: dict[str, Scores]) -> None:
    report = {
        "split": split,
        "images": len(result.captions),
        "unfinished": result.unfinished,
        "beam_size": config.eval.beam_size,
        "step": step,
        "scores": {name: each.values for name, each in scores.items()},
        "missing": {name: each.reasons for name, each in scores.items() if each.reasons},
    }
    files.write_json(
        run / f"captions-{split}.json", [{"image_id": i, "caption": c} for i, c in result.captions.items()]
    )
    files.write_json(run / f"evaluation-{split}.json", report)
    if (run / "config.yaml").is_file():
        with attach(run) as tracker:
            for name, values in report["scores"].items():
                label = split if name == "model" else f"{split}_{name}"
                tracker.log(step, {f"{label}/{metric}": value for metric, value in values.items()})
            tracker.artifact(run / f"captions-{split}.json", "captions")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_program(main)
