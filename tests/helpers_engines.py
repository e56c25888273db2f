"""A small training that real processes take steps of, under any launcher configuration."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from sat.data.loader import read_references
from sat.text import build_tokenizer
from tests.helpers_launch import DEEPSPEED, ENCODERS, start, start_cold
from tests.helpers_shards import make_feature_dataset

STEPS = 4


def launch(arguments: list[str], ranks: int, launcher: str | None, expect: int = 0) -> str:
    """Run a program on `ranks` real processes under launch/LAUNCHER.yaml and return what it printed.

    Another exit status than `expect` fails and shows it. Without a launcher: a bare process.
    """
    options = ["--config_file", f"launch/{launcher}.yaml", "--num_processes", ranks] if launcher else None
    if options and not launcher.endswith("cpu"):
        code, said = start_cold(arguments, options)
    else:
        code, said = start(arguments, options, DEEPSPEED if launcher and "deepspeed" in launcher else ENCODERS)
    assert code == expect, f"{' '.join(arguments)} on {ranks} ranks:\n{said}"
    return said


def small_config(root: Path) -> Path:
    """22 images of 3 to 7 words, 3 captions used of 5: batches of 6 leave a last batch of 4, uneven on any ranks."""
    manifest = make_feature_dataset(root / "features", splits={"train": 22, "val": 7})
    captions = [caption for captions in read_references(manifest, "train").values() for caption in captions]
    build_tokenizer(captions, 1).save(root / "tokenizer.json")
    path = root / "config.yaml"
    path.write_text(
        f"data: {{features: {root}/features, tokenizer: {root}/tokenizer.json, "
        "captions_per_image: 3, num_workers: 0}\n"
        "model: {embedding_dim: 12, lstm_dim: 10, attention_dim: 8, dropout: 0.0, weight_init: uniform}\n"
        f"train: {{run_dir: {root}/run, global_batch: 6, epochs: 2, warmup_steps: 2, "
        "precision: fp32, learning_rate: 0.01}\n"
        "eval: {metrics: [CIDEr, BLEU], beam_size: 2, max_length: 8}\n"
    )
    return path


def launch_variants(
    config: Path, launcher: str | None, ranks: int, variants: list[tuple[str, ...]]
) -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
    """What `STEPS` steps of each variant did, one after the other in one launch: starting processes is what costs."""
    out = config.parent / f"{launcher}-{ranks}.safetensors"
    words = [word for variant in variants for word in (*(variant or ("train.seed=1",)), "--")]
    launch(["tests/two_process_worker.py", str(config), str(STEPS), str(out), *words], ranks, launcher)
    found = load_file(out)
    return {
        variant: {name.removeprefix(f"{i}."): value for name, value in found.items() if name.startswith(f"{i}.")}
        for i, variant in enumerate(variants)
    }
