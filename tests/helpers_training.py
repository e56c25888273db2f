"""Small trainings in this process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sat.data.loader import read_references
from sat.engine.engine import Engine
from sat.engine.start import start
from sat.shards.manifest import load_manifest
from sat.stopping import STOP_SIGNALS
from sat.text import build_tokenizer

SMALL = [
    "data.num_workers=0",
    "data.captions_per_image=2",
    "model.lstm_dim=8",
    "model.embedding_dim=6",
    "model.attention_dim=5",
    "train.epochs=1",
    "train.global_batch=6",
    "train.warmup_steps=1",
    "train.precision=fp32",
    "train.log_every=1",
    "eval.metrics=[CIDEr]",
    "eval.beam_size=2",
    "eval.max_length=6",
    "tracking.mlflow_uri=none",
]


@contextmanager
def engine_alone() -> Iterator[Engine]:
    """That of the only process; the signal handlers that runs set are taken back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield start("fp32", 60)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def with_tokenizer(root: Path) -> list[str]:
    captions = [text for texts in read_references(load_manifest(root / "data"), "train").values() for text in texts]
    build_tokenizer(captions, 1).save(root / "tokenizer.json")
    return [f"data.features={root}/data", f"data.tokenizer={root}/tokenizer.json"]
