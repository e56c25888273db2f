"""Score a trained model, or an ensemble, on a split: `sat evaluate RUN`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from sat import files
from sat.cli import run_program
from sat.config import Config
from sat.data.loader import read_references
from sat.engine.start import start
from sat.evaluation.attention_file import write_attention
from sat.evaluation.baselines import baselines
from sat.evaluation.metrics import Scores, score
from sat.evaluation.options import METRICS
from sat.evaluation.report import Report, captions_file, write_captions
from sat.evaluation.split import Evaluation, evaluate, scored_references
from sat.export import TrainedModel, best_folder, load_model
from sat.machine import best_precision, speed_up
from sat.run_folder import CONFIG_FILE, attach
from sat.shards.manifest import Manifest, load_manifest
from sat.training_data import reading_options


def main(
    run: Annotated[
        Path, typer.Argument(help="run folder (its best model is taken) or a folder with model.safetensors")
    ],
    split: Annotated[str, typer.Option(help="split to score")] = "test",
    features: Annotated[str, typer.Option(help="feature folder or URL; default: the one trained on")] = "",
    beam_size: Annotated[int, typer.Option(help="beams per image; default: the run's setting")] = 0,
    with_baselines: Annotated[bool, typer.Option("--baselines", help="score the two blind baselines too")] = False,
    keep_attention: Annotated[bool, typer.Option("--attention", help="write RUN/attention-SPLIT.npz too")] = False,
    also: Annotated[
        list[Path] | None, typer.Option("--ensemble", help="further run folders, averaged word by word")
    ] = None,
) -> None:
    """Score a trained model; writes RUN/evaluation-SPLIT.json, RUN/captions-SPLIT.json and each baseline's captions.

    Under a launcher the images are shared by all ranks; the scores do not depend on how many there are (but for hard
    attention that samples its locations).
    """
    trained = load_ensemble([run, *(also or [])])
    config = trained[0].config
    beams = beam_size or config.eval.beam_size
    search = replace(config.eval, metrics=list(METRICS), beam_size=beams, keep_attention=keep_attention)
    manifest = load_manifest(features or config.data.features)
    for model in trained:
        model.refuse_unfit(manifest)
    processes = start(scoring_precision(config.train.precision)).processes
    kernels = speed_up(config.train.kernels, processes.device)
    if processes.is_main:
        print(kernels, flush=True)
    models = [each.model.to(processes.device) for each in trained]
    reading = reading_options(config, trained[0].features)
    result = evaluate(models, manifest, split, trained[0].tokenizer, search, reading, processes)

    def report() -> None:
        words = trained[0].tokenizer.word_rule
        blind = baseline_captions(result, manifest, config, words) if with_baselines else {}
        scores = {"model": result.scores} | score_baselines(blind, manifest, split, config, words)
        unfinished, step = result.unfinished, trained[0].step
        found = Report(split, len(result.predictions), unfinished, search.beam_size, step, scores, attention)
        keep(run, found, {"model": result.captions} | blind)
        if keep_attention:
            write_attention(run / f"attention-{split}.npz", result.predictions, trained[0].features)
        print(json.dumps(found.to_document(), indent=1))

    attention = result.attention.values() if any(each.attends for each in trained) else {}
    processes.run_on_main(report)
    processes.leave()


def scoring_precision(trained_in: str) -> str:
    """What a model is scored in: as it was trained, but for a CPU that would only emulate what a GPU trained in."""
    return trained_in if trained_in == "fp32" or torch.cuda.is_available() else best_precision()


def load_ensemble(folders: Sequence[Path]) -> list[TrainedModel]:
    """The best models of these run folders. Raises ValueError unless their words are the same."""
    trained = [load_model(best_folder(folder)) for folder in folders]
    for folder, model in zip(folders, trained, strict=True):
        if model.tokenizer.digest != trained[0].tokenizer.digest:
            raise ValueError(
                f"the ensemble's models have different vocabularies ({folders[0]} and {folder}); "
                "they cannot vote on words"
            )
    return trained


def baseline_captions(result: Evaluation, manifest: Manifest, config: Config, words: str) -> dict[str, dict[str, str]]:
    """Captions of the baselines for the same images."""
    training = [
        caption
        for name in config.data.train_splits
        for captions in read_references(manifest, name, config.data).values()
        for caption in captions
    ]
    return baselines(result.captions, training, words)


def score_baselines(
    captions: Mapping[str, Mapping[str, str]], manifest: Manifest, split: str, config: Config, words: str
) -> dict[str, Scores]:
    """Scores of each baseline's captions."""
    references = scored_references(manifest, split, words, config.data) if captions else {}
    return {name: score(references, each, tuple(METRICS)) for name, each in captions.items()}


def keep(run: Path, report: Report, captions: Mapping[str, Mapping[str, str]]) -> None:
    """Write scores and captions into the run folder, and into its MLflow run where it has one.

    `captions`: those of `model` and of each baseline, by image.
    """
    path = captions_file(run, report.split)
    for name, each in captions.items():
        write_captions(captions_file(run, report.split, name), each)
    files.write_json(run / f"evaluation-{report.split}.json", report.to_document())
    if not (run / CONFIG_FILE).is_file():
        return
    with attach(run) as tracker:
        for name, scores in report.scores.items():
            label = report.split if name == "model" else f"{report.split}_{name}"
            spread = report.attention if name == "model" else {}
            tracker.log(
                report.step, {f"{label}/{metric}": value for metric, value in {**scores.values, **spread}.items()}
            )
        tracker.artifact(path, "captions")


if __name__ == "__main__":
    run_program(main)
