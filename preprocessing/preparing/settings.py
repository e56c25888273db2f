"""Settings fit for the size of a data set, as the text of a configuration file.

What is known: 6,000 photographs learn best as `configs/flickr8k.yaml` has it, 3,000 steps of 16; COCO's 113,000 want
larger batches and models. Fewer pictures get a smaller model and more passes. Whoever knows better edits the file: it
is never overwritten once it has been edited.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

STEPS = 3000
"""Steps that a training should have at least, within the bounds of epochs."""
BATCHES = ((8, 100), (16, 20_000), (64, 50_000), (256, 1 << 62))
"""(batch, fewer training pictures than this)."""
FEW = 1000
"""Training pictures below which the scores mean little, and a trained model is the better start."""


@dataclass(frozen=True)
class Prepared:
    """What was prepared, as far as the settings depend on it."""

    out: Path
    train_splits: tuple[str, ...]
    pictures: int
    """Of the splits learnt from."""
    captions: int
    captions_per_image: int
    """Most captions of a picture."""
    longest: int
    """Words that 95 % of the captions have at most."""


def min_count(captions: int) -> int:
    """Times a word must occur in so many captions: rare words cannot be learnt, and few captions have few others."""
    return next(count for count, limit in ((1, 2_000), (2, 20_000), (3, 100_000), (5, 1 << 62)) if captions < limit)


def held_out(pictures: int, splits: frozenset[str]) -> tuple[int, int]:
    """How many training pictures become val and test: a tenth each; of under 100 a fifth, of under 200 no test.

    A split that the data has itself is left as it is; of one picture none is held out.
    """
    share = max(1, min(5000, round(pictures * (0.2 if pictures < 100 else 0.1)))) if pictures > 1 else 0
    return (0 if "val" in splits else share), (0 if "test" in splits or pictures < 200 else share)


def configuration(prepared: Prepared) -> str:
    """The text of a complete configuration file."""
    n = prepared.pictures
    batch = next(size for size, limit in BATCHES if n < limit)
    per_epoch = ceil(n / batch)
    epochs = max(8, min(60, round(STEPS / per_epoch)))
    total = epochs * per_epoch
    small = n < FEW
    width = (128, 256, 256) if small else (256, 256, 256) if batch == 16 else (512, 512, 512)
    advice = "# With so few pictures, start from a trained model: train.start_from=RUN\n" if small else ""
    splits = ", ".join(prepared.train_splits)
    return f"""# Made by `sat prepare` for {n:,} training pictures, {prepared.captions:,} captions. Edit it as you like.
#   sat train {prepared.out}/config.yaml
{advice}data:
  features: {_quoted(prepared.out / "features")}
  tokenizer: {_quoted(prepared.out / "tokenizer.json")}
  train_splits: [{splits}]
  eval_split: val
  captions_per_image: {min(5, prepared.captions_per_image)}
  max_caption_length: {max(20, min(100, 2 * prepared.longest))}
  num_workers: {0 if n < 5000 else 2}
model:
  preset: paper
  weight_init: {"normal" if batch == 256 else "uniform"} # N(0, 0.01) learns next to nothing in two epochs of 6,000
  embedding_dim: {width[0]}
  lstm_dim: {width[1]}
  attention_dim: {width[2]}
  penalty_weight: 0.3 # the paper has 1; 0.3 and some smoothing are better on Flickr8k
  label_smoothing: 0.1
train:
  run_dir: {_quoted(prepared.out / "run")}
  epochs: {epochs}
  global_batch: {batch}
  learning_rate: {"8.0e-4" if batch == 256 else "1.0e-3"}
  warmup_steps: {max(1, min(1000, total // 20))}
  ema: {0.99 if total > 1000 else 0}
  eval_every: {max(per_epoch, ceil(total / 12))}
  patience: 4
eval:
  beam_size: 5
  length_penalty: 0.7
  block_unk: true
  max_length: {max(10, min(60, prepared.longest + 5))}
tracking:
  experiment: {_quoted(prepared.out.name or "prepared")}
"""


def _quoted(value: object) -> str:
    """Text as YAML takes it, whatever is in it."""
    return "'" + str(value).replace("'", "''") + "'"
