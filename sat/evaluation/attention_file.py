"""The attention of many captions in one file, for programs that hold it against what they know of the pictures.

`attention.npz` (numpy, no pickle) holds N pictures, M words in all and L locations:

    image_ids      str [N]            the picture's id in its data set, or its file
    starts         int64 [N + 1]      words starts[i] to starts[i + 1] are those of picture i
    words          str [M]
    attention      float32 [M, L]     the weights with which each word was chosen; a row sums to 1
    probabilities  float32 [M]        of each word after those before it
    gates          float32 [M]        how far the gate on what is seen was open, 0 to 1; NaN without a gate
    centres        float64 [L, 2]     x, y where each cell looks, in 0..1 of what the encoder saw; none of regions
    geometry       str []             how a picture became that: `squash` or `center_crop`; empty where not known
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sat import files
from sat.evaluation.attention_map import unit_centres
from sat.evaluation.prediction import Prediction
from sat.shards.features import FeatureSpec


def write_attention(path: Path, predictions: Sequence[Prediction], spec: FeatureSpec) -> None:
    """Write the attention of captions made from features of `spec`. ValueError for one whose attention is not kept."""
    bare = [each.image_id for each in predictions if each.attention is None or each.probabilities is None]
    if bare:
        raise ValueError(f"{path}: the attention of {bare[0]} was not kept; decode with keep_attention")
    words = [len(each.words) for each in predictions]
    attention = [each.attention for each in predictions if each.attention is not None]
    probabilities = [each.probabilities for each in predictions if each.probabilities is not None]
    gates = [np.full(len(each.words), np.nan) if each.gates is None else each.gates for each in predictions]
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            image_ids=np.array([each.image_id for each in predictions], dtype=np.str_),
            starts=np.cumsum([0, *words]),
            words=np.array([word for each in predictions for word in each.words], dtype=np.str_),
            attention=np.concatenate([np.zeros((0, spec.locations)), *attention], dtype=np.float32),
            probabilities=np.concatenate([np.zeros(0), *probabilities], dtype=np.float32),
            gates=np.concatenate([np.zeros(0), *gates], dtype=np.float32),
            centres=unit_centres(spec) if spec.kind == "grid" else np.zeros((0, 2)),
            geometry=np.array(spec.transform.geometry if spec.transform else "", dtype=np.str_),
        )


def is_attention(path: Path) -> bool:
    """Whether `write_attention` has written this file."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return {"image_ids", "starts", "words", "attention", "centres"} <= set(found.files)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        return False
