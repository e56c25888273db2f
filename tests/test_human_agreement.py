"""Our scores rank captions as people do, exactly as far as is published of these metrics (Flickr8k-Expert)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sat.evaluation.metrics import score

ROOT = Path(__file__).resolve().parents[1]
EXPERTS = Path(os.environ.get("SAT_REAL_DATA", ROOT.parent / "shared/data")) / "flickr8k/expert_judgements.json"
PUBLISHED = {"BLEU-1": 32.3, "BLEU-4": 30.8, "ROUGE-L": 32.3, "METEOR": 41.8, "CIDEr": 43.9}
"""Kendall's tau-c x 100 (Hessel et al. 2021): three judgements of each pair, an image's own captions left out."""


def test_agreement_with_people_is_the_published_one():
    stats = pytest.importorskip("scipy.stats")
    if not EXPERTS.is_file():
        pytest.skip(f"no judgements at {EXPERTS}; set SAT_REAL_DATA")
    pairs = {str(i): pair for i, pair in enumerate(json.loads(EXPERTS.read_text()))}
    references = {i: pair["references"] for i, pair in pairs.items()}
    found = score(references, {i: pair["candidate"] for i, pair in pairs.items()})
    assert found.reasons == {}
    judged = np.array([pairs[i]["judgements"] for i in found.image_ids])  # [pairs, 3]
    for name, published in PUBLISHED.items():
        tau = stats.kendalltau(np.repeat(found.per_image[name], 3), judged.ravel(), variant="c").statistic
        assert 100 * tau == pytest.approx(published, abs=0.3), name
