"""The scores of every picture in one file, RUN/scores-SPLIT.parquet, which comparisons, reports and others read.

One row per scored picture, sorted by its id: `image_id`, `caption`, `log_probability`, `finished`, one float64 column
per metric (CIDEr, CIDEr-D, BLEU-1..4, METEOR, ROUGE-L, those there are), `bleu_counts` (ten whole numbers, of whose
sums the corpus BLEU is made) and `others`, the further captions of an n-best search, best first. What holds for all of
it is JSON under the key `sat` of the file's metadata: corpus scores, digest of the references, signatures.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sat import files

Floats = npt.NDArray[np.float64]
METADATA = b"sat"
BLEU_COUNTS = 10
"""Clipped matches of 1 to 4 words, their totals, words of the hypothesis, words of the nearest reference."""
_CANDIDATE = pa.struct([("caption", pa.string()), ("log_probability", pa.float64()), ("finished", pa.bool_())])
_FIXED = (
    pa.field("image_id", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("log_probability", pa.float64()),
    pa.field("finished", pa.bool_()),
    pa.field("bleu_counts", pa.list_(pa.int64(), BLEU_COUNTS)),
    pa.field("others", pa.list_(_CANDIDATE)),
)


@dataclass(frozen=True)
class Candidate:
    """A caption that the search ranked behind the one that is scored."""

    caption: str
    log_probability: float
    finished: bool


@dataclass(frozen=True)
class ScoreTable:
    """The scored captions of a split."""

    image_ids: tuple[str, ...]
    """Sorted; all that follows is in this order."""
    captions: tuple[str, ...]
    log_probabilities: Floats
    """[images]"""
    finished: npt.NDArray[np.bool_]
    """[images] False: the greatest length came before the caption's end."""
    per_image: Mapping[str, Floats]
    """Metric -> [images]."""
    bleu_counts: npt.NDArray[np.int64]
    """[images, 10], see `BLEU_COUNTS`."""
    values: Mapping[str, float | None]
    """The corpus scores."""
    references_digest: str
    """Of ids and references: only tables of the same are comparable."""
    signature: Mapping[str, str]
    """Metric -> how it was computed."""
    others: tuple[tuple[Candidate, ...], ...] = ()
    """Of every image; empty where one caption was asked for."""


def table_file(run: Path, split: str) -> Path:
    """Where the table of a split lies."""
    return run / f"scores-{split}.parquet"


def write_table(path: Path, table: ScoreTable) -> None:
    """Write the table, whole or not at all."""
    about = {
        "values": dict(table.values),
        "references_digest": table.references_digest,
        "signature": dict(table.signature),
    }
    columns: dict[str, Any] = {
        "image_id": list(table.image_ids),
        "caption": list(table.captions),
        "log_probability": table.log_probabilities,
        "finished": table.finished,
        **table.per_image,
        "bleu_counts": table.bleu_counts.tolist(),
        "others": [[vars(each) for each in row] for row in table.others or [()] * len(table.image_ids)],
    }
    metrics = [pa.field(name, pa.float64()) for name in table.per_image]
    schema = pa.schema([*_FIXED[:4], *metrics, *_FIXED[4:]], {METADATA: json.dumps(about).encode()})
    with files.replacing(path) as temporary:
        pq.write_table(pa.table(columns, schema), temporary)


def read_table(path: Path) -> ScoreTable:
    """What `write_table` wrote. Raises ValueError, naming the file, where there is none or it is something else."""
    if not path.is_file():
        split = path.stem.removeprefix("scores-")
        raise ValueError(f"{path} is missing; run `sat evaluate {path.parent} --split {split}` first")
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[METADATA])
        fixed = {each.name for each in _FIXED}
        others = tuple(tuple(Candidate(**each) for each in row) for row in table["others"].to_pylist())
        return ScoreTable(
            image_ids=tuple(table["image_id"].to_pylist()),
            captions=tuple(table["caption"].to_pylist()),
            log_probabilities=table["log_probability"].to_numpy(),
            finished=np.array(table["finished"].to_pylist(), dtype=np.bool_),
            per_image={name: table[name].to_numpy() for name in table.column_names if name not in fixed},
            bleu_counts=np.array(table["bleu_counts"].to_pylist(), dtype=np.int64).reshape(-1, BLEU_COUNTS),
            values=about["values"],
            references_digest=about["references_digest"],
            signature=about["signature"],
            others=others if any(others) else (),
        )
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of scores ({error}); run `sat evaluate` again to write one") from None
