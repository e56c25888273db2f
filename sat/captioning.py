"""Pictures in, captions out, on any machine that has a trained model's folder and its encoder's weights.

    captioning = Captioning.from_pretrained("runs/demo", weights="weights")
    for prediction in captioning([Path("dog.jpg"), picture_bytes, pixels]):
        print(prediction.caption)

A prediction's picture is what the encoder saw (after rotation, crop and resize), not the file. Where the cells of the
attention lie in the file is said by `sat.evaluation.attention_map.cells_over`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sat import files
from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.evaluation.prediction import Prediction, predict
from sat.export import TrainedModel, best_folder, load_model
from sat.model.at_rest import rest
from sat.model.encoders.encoder import GridEncoder
from sat.model.encoders.table import load_encoder
from sat.shards.features import EncoderSpec
from sat.shards.pictures import BadPicture, fit
from sat.shards.pictures import decode as decode_file

Picture = bytes | str | Path | npt.NDArray[Any]
"""A picture file's bytes, its path, or RGB pixels uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Captioning:
    """A trained model and its encoder, ready for pictures."""

    trained: TrainedModel
    encoder: GridEncoder | None
    """None where the model has its own."""
    options: DecodeOptions = field(default_factory=DecodeOptions)
    """How captions are searched for."""
    batch_size: int = 16
    """Pictures captioned at once."""
    device: str = "cpu"

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, weights: str | Path = Path("weights"), device: str = "cpu"
    ) -> "Captioning":
        """The model of a run folder or of its `best`, and the encoder that made its features.

        `weights`: the encoder's file, or a folder that holds it; not read where the model has its own encoder. The
        search is the one the model was scored with in training. Raises ValueError naming what is missing.
        """
        trained = load_model(best_folder(folder), device)
        rest(trained.model.captioner)
        encoder = None
        if not trained.config.encoder.train:
            if trained.features.kind == "regions":
                raise ValueError(
                    f"{folder}: the model looks at regions that a detector elsewhere has found, and reads no pictures; "
                    "import those of yours (preprocessing.import_features) and run sat evaluate --features on them"
                )
            if trained.features.encoder is None:
                raise ValueError(
                    f"{folder}: the model does not say which encoder made its features; it reads no pictures"
                )
            encoder = find_encoder(trained.features.encoder, Path(weights)).to(device)
        return cls(trained, encoder, trained.config.eval, device=device)

    def with_options(self, **changes: Any) -> "Captioning":
        """The same model with another search: `captioning.with_options(beam_size=5, n_best=3)`, see DecodeOptions."""
        return replace(self, options=replace(self.options, **changes))

    @overload
    def __call__(self, pictures: Iterable[Picture], bad: Literal["raise"] = "raise") -> list[Prediction]: ...

    @overload
    def __call__(self, pictures: Iterable[Picture], bad: Literal["return"]) -> list[Prediction | BadPicture]: ...

    def __call__(
        self, pictures: Iterable[Picture], bad: Literal["raise", "return"] = "raise"
    ) -> list[Prediction] | list[Prediction | BadPicture]:
        """The caption of every picture, in their order. The attention is there if `options.keep_attention` asks for it.

        A picture that cannot be read raises BadPicture, which names it by its path or number; with `bad="return"` that
        error stands in its place instead.
        """
        found = list(self.stream(pictures))
        if bad == "raise":
            for each in found:
                if isinstance(each, BadPicture):
                    raise each
        return found

    def stream(self, pictures: Iterable[Picture]) -> Iterator[Prediction | BadPicture]:
        """As a call with `bad="return"`, but each batch is given away before the next one is read."""
        numbered = enumerate(pictures)
        while batch := list(islice(numbered, self.batch_size)):
            seen = [self._see(number, picture) for number, picture in batch]
            names = [name_of(number, picture) for number, picture in batch]
            good = [(name, each) for name, each in zip(names, seen, strict=True) if not isinstance(each, BadPicture)]
            captioned = iter(self._caption(good) if good else [])
            for each in seen:
                yield each if isinstance(each, BadPicture) else next(captioned)

    def _see(self, number: int, picture: Picture) -> npt.NDArray[np.uint8] | BadPicture:
        """The picture as the encoder sees it, uint8 [S, S, 3], or why not."""
        transform = self.trained.features.transform
        assert transform is not None  # a model with an encoder names both
        try:
            return fit(_pixels(picture), transform.size, transform.geometry, transform.interpolation)
        except BadPicture as error:
            return BadPicture(f"{name_of(number, picture)}: {error.reason}", error.detail)
        except OSError as error:
            return BadPicture(f"{name_of(number, picture)}: cannot be read", error.strerror or str(error))

    @torch.inference_mode()
    def _caption(self, pictures: list[tuple[str, npt.NDArray[np.uint8]]]) -> list[Prediction]:
        images = torch.from_numpy(np.stack([seen for _, seen in pictures])).permute(0, 3, 1, 2).to(self.device)
        grid = (
            images if self.encoder is None else self.encoder(self.encoder.normalise(images))
        )  # [B, 3, S, S] or [B, L, D]
        names = [name for name, _ in pictures]
        found = decode([self.trained.model], grid, self.options, names)
        return [
            predict(name, hypotheses, self.trained.tokenizer, self.options.length_penalty, seen)
            for (name, seen), hypotheses in zip(pictures, found, strict=True)
        ]


def name_of(number: int, picture: Picture) -> str:
    """What a picture is called: its path, or its number in the list."""
    return str(picture) if isinstance(picture, str | Path) else f"picture {number}"


def find_encoder(wanted: EncoderSpec, weights: Path) -> GridEncoder:
    """The frozen encoder of a model's features: the file `weights`, or the one in that folder of the same digest.

    Raises ValueError where there is none.
    """
    candidates = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    for path in candidates:
        if path.is_file() and files.sha256(path) == wanted.weights_sha256:
            return load_encoder(path, wanted.architecture, wanted.stage)
    raise ValueError(
        f"no encoder with SHA-256 {wanted.weights_sha256[:12]}... at {weights}; "
        "give the file that extracted the training features: --weights FILE"
    )


def _pixels(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise BadPicture("not RGB pixels", f"{picture.dtype} {list(picture.shape)}; expected uint8 [H, W, 3]")
        return Image.fromarray(picture)
    return decode_file(picture if isinstance(picture, bytes) else Path(picture).read_bytes())
