"""Pictures in, captions and attention pictures out, on any machine that has the model's three files and its encoder.

The surprise: the attention picture shows what the encoder saw (after rotation, crop and resize), not the file, so a
bright cell lies exactly over the pixels it stands for.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from sat import files
from sat.cli import run_program
from sat.evaluate import best_folder
from sat.evaluation.attention_plot import plot_attention
from sat.evaluation.decoding import Hypothesis, decode
from sat.evaluation.options import DecodeOptions
from sat.export import TrainedModel, load_model
from sat.model.encoders.resnet import Encoder, load_encoder, normalise
from sat.run_folder import attach
from sat.shards.pictures import BadPicture, fit
from sat.shards.pictures import decode as decode_file


def find_encoder(trained: TrainedModel, weights: Path) -> Encoder:
    """The frozen ResNet-50 that made the model's features: the file `weights`, or that in it with the digest
    the model names. Raises ValueError when none matches."""
    wanted = trained.features["encoder"]
    candidates = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    for path in candidates:
        if path.is_file() and files.sha256(path) == wanted["weights_sha256"]:
            return load_encoder(path, stage=wanted["stage"])
    raise ValueError(
        f"no encoder with SHA-256 {wanted['weights_sha256'][:12]}... at {weights}; give the file that extracted the "
        "training features: --weights FILE"
    )


@torch.inference_mode()
def caption_picture(
    trained: TrainedModel, encoder: Encoder | None, data: bytes, options: DecodeOptions
) -> tuple[Image.Image, Hypothesis]:
    """The picture as the encoder sees it, [S, S], and its best hypothesis. Raises BadPicture."""
    transform = trained.features["transform"]
    seen = fit(decode_file(data), transform["size"], transform["geometry"])
    images = torch.from_numpy(seen).permute(2, 0, 1)[None]  # uint8 [1, 3, S, S]
    grid = images if encoder is None else encoder(normalise(images))
    return Image.fromarray(seen), decode(trained.model, grid, options)[0][0]


def main(
    pictures: Annotated[list[Path], typer.Argument(help="picture files, or folders of them")],
    model: Annotated[Path, typer.Option(help="run folder or folder with model.safetensors")] = Path("runs/demo"),
    weights: Annotated[Path, typer.Option(help="encoder weights, or a folder that holds them")] = Path("weights"),
    out: Annotated[Path, typer.Option(help="where captions.json and the attention pictures go")] = Path("captions"),
    beam_size: Annotated[int, typer.Option(help="beams per picture; default: the run's setting")] = 0,
    limit: Annotated[int, typer.Option(help="caption at most so many pictures; 0: all")] = 0,
) -> None:
    """Caption picture files; one PNG each shows the attention of every word."""
    files = expand(pictures)[: limit or None]
    trained = load_model(best_folder(model))
    encoder = None if trained.config.encoder.train else find_encoder(trained, weights)
    search = trained.config.eval
    options = replace(search, beam_size=beam_size or search.beam_size, keep_attention=True)
    out.mkdir(parents=True, exist_ok=True)
    written, unreadable = [], []
    for path in files:
        try:
            picture, hypothesis = caption_picture(trained, encoder, path.read_bytes(), options)
        except BadPicture as error:
            unreadable.append(f"{path}: {error}")
            continue
        caption = trained.tokenizer.decode(hypothesis.tokens)
        written.append({"file": str(path), "caption": caption, "score": hypothesis.score})
        print(f"{path}: {caption}")
        if hypothesis.alphas is not None:
            words = [trained.tokenizer.decode([token]) for token in hypothesis.tokens]
            plot_attention(picture, words, hypothesis.alphas[: len(words)], out / f"{path.stem}.png")
    (out / "captions.json").write_text(json.dumps(written, indent=1) + "\n")
    if (model / "config.yaml").is_file():
        with attach(model) as tracker:
            tracker.artifact(out, "attention")
    if unreadable:
        raise ValueError("not captioned: " + "; ".join(unreadable))


def expand(pictures: list[Path]) -> list[Path]:
    """Files as given; folders as the files in them, by name. Raises ValueError for what does not exist."""
    files = []
    for path in pictures:
        if not path.exists():
            raise ValueError(f"no picture {path}")
        files += sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return files


if __name__ == "__main__":
    run_program(main)
