"""Score a trained model, or an ensemble, on a split: `sat evaluate RUN`."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from sat import files
from sat.cli import run_program
from sat.config import Config
from sat.data.loader import read_number_ids, read_references
from sat.engine import losses
from sat.engine.processes import Interrupted, Processes
from sat.engine.start import start
from sat.engine.watchdog import watched
from sat.evaluation.attention_file import write_attention
from sat.evaluation.baselines import AGAINST_REST, REFERENCE, baselines, leave_one_out
from sat.evaluation.metrics import Scores, score, scorer_kept
from sat.evaluation.options import REPORTED_METRICS, EvaluationOptions
from sat.evaluation.recording import Extra, record_evaluation
from sat.evaluation.report import Report, captions_file, intervals_of, write_captions
from sat.evaluation.score_table import table_file, write_table
from sat.evaluation.search_options import (
    Asked,
    BeamSize,
    BlockNgram,
    BlockUnk,
    LengthPenalty,
    MaxLength,
    Method,
    NBest,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from sat.evaluation.split import Evaluation, evaluate, scored_references
from sat.export import TrainedModel, best_folder, load_model
from sat.machine import speed_up
from sat.shards.manifest import Manifest, load_manifest
from sat.stopping import StartAgain, follow_launcher, listen
from sat.training_data import input_of, reading_options

PRECISIONS = ("fp32", "bf16", "fp16")
NOT_OF_THE_SEARCH = ("batch_size", "keep_attention", "metrics")
"""Options that change no caption."""


@dataclass(frozen=True)
class Job:
    """What is to be scored, and how."""

    run: Path
    out: Path
    """Folder of what is written."""
    split: str
    manifest: Manifest
    trained: Sequence[TrainedModel]
    """One model, or those that vote."""
    search: EvaluationOptions
    precision: str
    with_baselines: bool
    ensemble: tuple[Path, ...]
    """The other run folders whose models vote."""

    @property
    def config(self) -> Config:
        """Of the first model."""
        return self.trained[0].config


def main(
    run: Annotated[
        Path, typer.Argument(help="run folder (its best model is taken) or a folder with model.safetensors")
    ],
    split: Annotated[str, typer.Option(help="split to score")] = "test",
    features: Annotated[str, typer.Option(help="feature folder or URL; default: the one trained on")] = "",
    with_baselines: Annotated[
        bool, typer.Option("--baselines", help="score two blind baselines and a reference left out too")
    ] = False,
    keep_attention: Annotated[bool, typer.Option("--attention", help="write RUN/attention-SPLIT.npz too")] = False,
    precision: Annotated[str, typer.Option(help="fp32; in bf16 captions depend a little on the batch")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="folder for what is written; default: RUN")] = None,
    also: Annotated[
        list[Path] | None, typer.Option("--ensemble", help="further run folders, averaged word by word")
    ] = None,
    method: Method = None,
    beam_size: BeamSize = None,
    max_length: MaxLength = None,
    length_penalty: LengthPenalty = None,
    n_best: NBest = None,
    block_unk: BlockUnk = None,
    block_ngram: BlockNgram = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Score a trained model on a split, with 95 % bootstrap intervals over its images.

    Writes RUN/evaluation-SPLIT.json (scores), RUN/captions-SPLIT.json (COCO's results format), RUN/scores-SPLIT.parquet
    (of each image) and each baseline's captions. Under a launcher the images are shared by all ranks; in fp32 the
    scores do not depend on how many there are. Asked to stop, it ends at once.
    """
    follow_launcher()
    drawn = (temperature, top_k, top_p, seed)
    asked = Asked(method, beam_size, max_length, length_penalty, n_best, block_unk, block_ngram, *drawn)
    if precision not in PRECISIONS:
        raise ValueError(f"--precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    folder, others = writable(out or run), tuple(also or ())
    trained = load_ensemble([run, *others])
    config = trained[0].config
    metrics = list(dict.fromkeys((*REPORTED_METRICS, *config.eval.metrics)))
    search = replace(asked.over(config.eval), metrics=metrics, keep_attention=keep_attention)
    manifest = load_manifest(features or config.data.features)
    score_and_report(Job(run, folder, split, manifest, trained, search, precision, with_baselines, others))


def writable(folder: Path) -> Path:
    """The folder, made if need be. Raises ValueError, before minutes of scoring, where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}); choose another --out FOLDER") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written; have the scores elsewhere: --out FOLDER")
    return folder


def score_and_report(job: Job) -> None:
    """Decode and score on all ranks of this launch; rank 0 writes and prints. Raises StartAgain if asked to stop."""
    for model in job.trained:
        model.refuse_unfit(job.manifest)
    timeout = job.config.train.timeout
    with losses.named():
        processes = start(job.precision, timeout).processes
    stop = listen().is_there
    with losses.named(processes), watched(processes, timeout, lambda _: None), scorer_kept():
        try:
            result = decode_and_score(job, processes, stop)
            processes.run_beside_on_main(lambda: report(job, result), stop)
        except Interrupted:
            raise StartAgain(f"stopped before {job.run} had its scores of {job.split}: start it again") from None
    processes.leave()


def decode_and_score(job: Job, processes: Processes, stop: Callable[[], bool]) -> Evaluation:
    """The split, captioned and scored. All ranks enter. Raises Interrupted once any rank is to `stop`."""
    kernels = speed_up(job.config.train.kernels, processes.device)
    if processes.is_main:
        print(kernels, flush=True)
    models = [each.model.to(processes.device) for each in job.trained]
    first = job.trained[0]
    reading = reading_options(job.config, first.features)
    return evaluate(models, job.manifest, job.split, first.tokenizer, job.search, reading, processes, stop)


def report(job: Job, result: Evaluation) -> None:
    """Score what the model is held against, print the report, write everything, and bring the scores to MLflow."""
    blind = baseline_captions(job, result) if job.with_baselines else {}
    scores = {"model": result.scores}
    if job.with_baselines:
        held_against, human = score_baselines(job, result, blind)
        scores, blind = scores | held_against, blind | human
    search = {name: value for name, value in asdict(job.search).items() if name not in NOT_OF_THE_SEARCH}
    attends = any(each.attends for each in job.trained)
    found = Report(
        split=job.split,
        images=len(result.predictions),
        unfinished=result.unfinished,
        beam_size=job.search.beam_size,
        step=job.trained[0].step,
        scores=scores,
        attention=result.attention.values() if attends else {},
        intervals=intervals_of(scores),
        search=search | {"precision": job.precision},
    )
    print(json.dumps(found.to_document(), indent=1), flush=True)  # first: whatever becomes of the files
    number_ids = read_number_ids(job.manifest, job.split, job.config.data)
    written = keep(job.out, found, {"model": result.captions} | blind, number_ids)
    write_table(table_file(job.out, job.split), result.table)
    if job.search.keep_attention:
        write_attention(job.out / f"attention-{job.split}.npz", result.predictions, job.trained[0].features)
    data = input_of(job.manifest, [job.split], "evaluation")
    extra = Extra((*written, table_file(job.out, job.split)), job.ensemble)
    record_evaluation(job.out, job.run, found, data, extra)


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


def baseline_captions(job: Job, result: Evaluation) -> dict[str, dict[str, str]]:
    """Captions of the blind baselines for the same images."""
    training = [
        caption
        for name in job.config.data.train_splits
        for captions in read_references(job.manifest, name, job.config.data).values()
        for caption in captions
    ]
    return baselines(result.captions, training, job.trained[0].tokenizer.word_rule)


def score_baselines(
    job: Job, result: Evaluation, captions: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Scores], dict[str, dict[str, str]]]:
    """Scores of each baseline's captions, and of a reference left out with the model's against the same references.

    The second value: the references left out, as captions; none where no image has two.
    """
    references = scored_references(job.manifest, job.split, job.trained[0].tokenizer.word_rule, job.config.data)
    found = {name: score(references, each, tuple(job.search.metrics)) for name, each in captions.items()}
    human = leave_one_out(references)
    if not human.captions:
        return found, {}
    ours = {image_id: result.captions[image_id] for image_id in human.captions}
    for name, each in ((REFERENCE, human.captions), (AGAINST_REST, ours)):
        found[name] = score(human.rest, each, tuple(job.search.metrics))
    return found, {REFERENCE: dict(human.captions)}


def keep(
    folder: Path, report: Report, captions: Mapping[str, Mapping[str, str]], number_ids: Collection[str]
) -> list[Path]:
    """Write scores and captions into the folder; the files of the scores and of the model's captions.

    `captions`: those of `model` and of each baseline, by image; `number_ids`: the images whose id is a whole number.
    """
    for name, each in captions.items():
        write_captions(captions_file(folder, report.split, name), each, number_ids)
    scores = folder / f"evaluation-{report.split}.json"
    files.write_json(scores, report.to_document())
    return [scores, captions_file(folder, report.split)]


if __name__ == "__main__":
    run_program(main)
