"""Score a split: every image once over all ranks, decoded freely, scored once on rank 0."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from sat.data.batch import CaptionBatch
from sat.data.loader import Reading, evaluation_batches, read_references
from sat.data.options import CacheOptions
from sat.data.plan import Share
from sat.engine.processes import Interrupted, Processes
from sat.evaluation.beams import Hypothesis
from sat.evaluation.decoding import Decodable, decode
from sat.evaluation.metrics import Scores, get_ready, score
from sat.evaluation.options import EvaluationOptions
from sat.evaluation.prediction import Prediction, predict
from sat.evaluation.score_table import Candidate, ScoreTable
from sat.meter import AttentionUse
from sat.model.at_rest import weights_at_rest
from sat.model.objectives.teacher_forcing import attention_counts
from sat.shards.manifest import Manifest
from sat.text import CaptionTokenizer, normalise


@dataclass(frozen=True)
class Captioned:
    """A split, captioned."""

    predictions: tuple[Prediction, ...]
    """Of every image, sorted by image_id."""
    attention: AttentionUse
    """At the words of the captions, their ends included; without attention it is even."""

    @property
    def captions(self) -> dict[str, str]:
        """image_id -> caption."""
        return {each.image_id: each.caption for each in self.predictions}

    @property
    def unfinished(self) -> int:
        """Captions cut at the greatest length before <end>."""
        return sum(not each.finished for each in self.predictions)


@dataclass(frozen=True)
class Evaluation(Captioned):
    """A split, captioned and scored."""

    scores: Scores

    @property
    def table(self) -> ScoreTable:
        """The images that could be scored, with their captions."""
        scored = set(self.scores.image_ids)
        rows = [each for each in self.predictions if each.image_id in scored]  # both are sorted by id
        others = tuple(
            tuple(Candidate(each.caption, each.log_probability, each.finished) for each in row.others) for row in rows
        )
        return ScoreTable(
            image_ids=tuple(each.image_id for each in rows),
            captions=tuple(each.caption for each in rows),
            log_probabilities=np.array([each.log_probability for each in rows], np.float64),
            finished=np.array([each.finished for each in rows], np.bool_),
            per_image=self.scores.per_image,
            bleu_counts=self.scores.bleu_counts,
            values=self.scores.values,
            references_digest=self.scores.references_digest,
            signature=self.scores.signature,
            others=others if any(others) else (),
        )


def evaluate(
    models: Sequence[Decodable],
    manifest: Manifest,
    split: str,
    tokenizer: CaptionTokenizer,
    options: EvaluationOptions,
    reading: Reading,
    processes: Processes,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Decode and score `split` by a model or an ensemble. All ranks enter and all get the result.

    The scores are the same for any number of ranks. Raises ValueError where the split is empty or the captions do not
    cover it exactly, and Interrupted on all ranks together, after a batch or while rank 0 scores, once any rank's
    `interrupted()` says so.
    """
    found = caption_split(models, manifest, split, tokenizer, options, reading, processes, interrupted)

    def score_once() -> Scores:
        references = scored_references(manifest, split, tokenizer.word_rule, reading.options)
        return score(references, found.captions, tuple(options.metrics))

    return Evaluation(found.predictions, found.attention, processes.run_beside_on_main(score_once, interrupted))


def caption_split(
    models: Sequence[Decodable],
    manifest: Manifest,
    split: str,
    tokenizer: CaptionTokenizer,
    options: EvaluationOptions,
    reading: Reading,
    processes: Processes,
    interrupted: Callable[[], bool] = lambda: False,
) -> Captioned:
    """The first half of `evaluate`, while what scores gets ready. All ranks enter and all get the result."""
    if processes.is_main:
        get_ready(options.metrics)
    local = decode_split(models, manifest, split, tokenizer, options, reading, processes, interrupted)
    gathered = [pair for part in processes.gather(local) for pair in part]
    gathered.sort(key=lambda pair: pair[0].image_id)  # sums too are the same for any number of ranks
    found = Captioned(tuple(prediction for prediction, _ in gathered), sum((u for _, u in gathered), AttentionUse()))
    if len(found.captions) != len(found.predictions):
        raise ValueError(f"split {split!r} of {manifest.root}: an image was decoded twice; image ids must be unique")
    return found


def scored_references(
    manifest: Manifest, split: str, word_rule: str, cache: CacheOptions = CacheOptions()
) -> dict[str, list[str]]:
    """image_id -> its captions as the metrics get them.

    `basic`: as they were given, for the metrics' own tokenizer, as everybody scores. Otherwise they are split into the
    vocabulary's words first, as the model's captions are: the metrics know no words in Chinese, and would take a
    sentence for one.
    """
    given = read_references(manifest, split, cache)
    if word_rule == "basic":
        return given
    return {image: [normalise(text, word_rule) for text in texts] for image, texts in given.items()}


@torch.inference_mode()
def decode_split(
    models: Sequence[Decodable],
    manifest: Manifest,
    split: str,
    tokenizer: CaptionTokenizer,
    options: EvaluationOptions,
    reading: Reading,
    processes: Processes,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[tuple[Prediction, AttentionUse]]:
    """This rank's images of the split, captioned, and where the captions looked; a progress line on rank 0.

    The predictions hold their attention only where `options` asks for it. All ranks enter; they look at their wishes
    together after each batch, also those that have none left: raises Interrupted as `evaluate` does.
    """
    from tqdm import tqdm

    share = Share(processes.rank, processes.world_size)
    batches = evaluation_batches(manifest, split, reading, batch_size=options.batch_size, share=share)
    found: list[tuple[Prediction, AttentionUse]] = []
    images = manifest.splits.get(split, 0)
    bar = tqdm(total=images, desc=f"decode {split}", unit="image", disable=not processes.is_main, leave=False)
    with bar, closing(batches), weights_at_rest(models):
        working = True
        while working:
            batch = next(batches, None)
            if batch is not None:
                found += _caption_batch(batch, models, tokenizer, options, processes)
                bar.update(min(len(batch.image_ids) * processes.world_size, images - bar.n))
            working, stop = map(bool, processes.sum_over_ranks([batch is not None, interrupted()]))
            if stop:
                raise Interrupted
    return found


def _caption_batch(
    batch: CaptionBatch,
    models: Sequence[Decodable],
    tokenizer: CaptionTokenizer,
    options: EvaluationOptions,
    processes: Processes,
) -> list[tuple[Prediction, AttentionUse]]:
    there, looking = batch.to(processes.device), replace(options, keep_attention=True)
    with processes.autocast():
        hypotheses = decode(models, there.grid, looking, batch.image_ids, there.regions)
    found = []
    for row, best in enumerate(hypotheses):
        kept = best if options.keep_attention else [_without_trace(each) for each in best]
        found.append((_predict(batch, row, kept, tokenizer, options), _attention_use(best[0])))
    return found


def _predict(
    batch: CaptionBatch, row: int, best: list[Hypothesis], tokenizer: CaptionTokenizer, options: EvaluationOptions
) -> Prediction:
    """What is said of the image in one row of the batch."""
    regions = None if batch.regions is None else int(batch.regions[row])
    boxes = batch.boxes_of(row) if options.keep_attention else None
    return predict(batch.image_ids[row], best, tokenizer, options.length_penalty, regions=regions, boxes=boxes)


def _without_trace(hypothesis: Hypothesis) -> Hypothesis:
    return replace(hypothesis, alphas=None, probabilities=None, gates=None)


def _attention_use(hypothesis: Hypothesis) -> AttentionUse:
    alphas = hypothesis.alphas  # [steps, L]
    if alphas is None or not len(alphas):
        return AttentionUse()
    counts = attention_counts(alphas)
    return AttentionUse(len(alphas), float(counts["entropy"]), float(counts["top"]))
