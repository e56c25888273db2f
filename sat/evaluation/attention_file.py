"""The attention of many captions in one file, for programs that hold it against what they know of the pictures.

`attention.npz` (numpy, no pickle) holds N pictures, M words in all and L locations:

    image_ids      str [N]            the picture's id in its data set, or its file
    starts         int64 [N + 1]      words starts[i] to starts[i + 1] are those of picture i
    words          str [M]
    attention      float32 [M, L]     the weights with which each word was chosen; a row sums to 1
    probabilities  float32 [M]        of each word after those before it
    gates          float32 [M]        how far the gate on what is seen was open, 0 to 1; NaN without a gate
    centres        float64 [L, 2]     x, y where each cell looks, in 0..1 of what the encoder saw; none of regions
    boxes          float32 [N, L, 4]  of regions: x0 y0 x1 y1 in 0..1 of the picture; none of cells or where not known
    locations      int64 [N]          how many of the L are this picture's; the others have no weight
    scores, log_probabilities, finished   [N] of each caption, see `Prediction`
    geometry       str []             how a picture became that: `squash` or `center_crop`; empty where not known
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sat import files
from sat.evaluation.attention_map import Locations, Regions, cells_at, unit_centres
from sat.evaluation.prediction import Prediction
from sat.shards.features import FeatureSpec

ARRAYS = (
    *("image_ids", "starts", "words", "attention", "probabilities", "gates", "centres", "geometry"),
    *("boxes", "locations", "scores", "log_probabilities", "finished"),
)


@dataclass(frozen=True)
class KeptAttention:
    """What the file holds."""

    predictions: tuple[Prediction, ...]
    centres: npt.NDArray[np.float64]
    geometry: str

    def where(self, prediction: Prediction, width: int, height: int) -> Locations:
        """Where the locations of one of the predictions lie in its picture. ValueError for regions without boxes."""
        if prediction.boxes is not None:
            return Regions(prediction.boxes)
        if not len(self.centres):
            raise ValueError(
                f"image {prediction.image_id}: its regions came without boxes, nobody knows where they lie"
            )
        return cells_at(self.centres, self.geometry, width, height)


def write_attention(path: Path, predictions: Sequence[Prediction], spec: FeatureSpec) -> None:
    """Write the attention of captions made from features of `spec`. ValueError for one whose attention is not kept."""
    bare = [each.image_id for each in predictions if each.attention is None or each.probabilities is None]
    if bare:
        raise ValueError(f"{path}: the attention of {bare[0]} was not kept; decode with keep_attention")
    words = [len(each.words) for each in predictions]
    attention = np.zeros((sum(words), spec.locations), np.float32)
    for start, each in zip(np.cumsum([0, *words]), predictions, strict=False):
        assert each.attention is not None
        attention[start : start + len(each.words), : each.attention.shape[1]] = each.attention
    arrays = {
        "image_ids": np.array([each.image_id for each in predictions], dtype=np.str_),
        "starts": np.cumsum([0, *words]),
        "words": np.array([word for each in predictions for word in each.words], dtype=np.str_),
        "attention": attention,
        "probabilities": _joined([each.probabilities for each in predictions], words),
        "gates": _joined([each.gates for each in predictions], words),
        "centres": unit_centres(spec) if spec.kind == "grid" else np.zeros((0, 2)),
        "geometry": np.array(spec.transform.geometry if spec.transform else "", dtype=np.str_),
        "boxes": _padded([each.boxes for each in predictions], spec.locations),
        "locations": np.array([0 if each.attention is None else each.attention.shape[1] for each in predictions]),
        "scores": np.array([each.score for each in predictions], dtype=np.float64),
        "log_probabilities": np.array([each.log_probability for each in predictions], dtype=np.float64),
        "finished": np.array([each.finished for each in predictions], dtype=np.bool_),
    }
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_attention(path: Path) -> KeptAttention:
    """What `write_attention` wrote. ValueError for a file that is damaged or of something else."""
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of attention ({error}); `sat evaluate --attention` writes one") from None
    predictions = tuple(_prediction(arrays, row) for row in range(len(arrays["image_ids"])))
    return KeptAttention(predictions, arrays["centres"], str(arrays["geometry"]))


def is_attention(path: Path) -> bool:
    """Whether `write_attention` has written this file."""
    try:
        read_attention(path)
    except ValueError:
        return False
    return True


def _prediction(arrays: Mapping[str, npt.NDArray[Any]], row: int) -> Prediction:
    start, end = arrays["starts"][row : row + 2]
    locations = int(arrays["locations"][row])
    words = tuple(map(str, arrays["words"][start:end]))
    gates = arrays["gates"][start:end]
    return Prediction(
        image_id=str(arrays["image_ids"][row]),
        caption=" ".join(words),
        words=words,
        score=float(arrays["scores"][row]),
        log_probability=float(arrays["log_probabilities"][row]),
        finished=bool(arrays["finished"][row]),
        attention=arrays["attention"][start:end, :locations],
        probabilities=arrays["probabilities"][start:end],
        gates=None if np.isnan(gates).any() else gates,
        boxes=arrays["boxes"][row, :locations] if len(arrays["boxes"]) else None,
    )


def _joined(parts: Sequence[npt.NDArray[np.float32] | None], words: Sequence[int]) -> npt.NDArray[np.float32]:
    """[M] the numbers of all words; NaN for what is not known."""
    known = [np.full(count, np.nan) if part is None else part for part, count in zip(parts, words, strict=True)]
    return np.concatenate([np.zeros(0), *known], dtype=np.float32)


def _padded(boxes: Sequence[npt.NDArray[np.float32] | None], locations: int) -> npt.NDArray[np.float32]:
    """[N, L, 4] zero where a picture has fewer; [0, L, 4] where none has boxes."""
    known = [each for each in boxes if each is not None]
    padded = np.zeros((len(boxes) if len(known) == len(boxes) else 0, locations, 4), np.float32)
    for row, each in zip(padded, known, strict=False):
        row[: len(each)] = each
    return padded
