"""The options by which programs take how captions are searched for; one that is not given is the run's setting."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, TypeVar

import typer

from sat.evaluation.options import METHODS, DecodeOptions

Options = TypeVar("Options", bound=DecodeOptions)
DRAWN = ("temperature", "top_k", "top_p")
"""Settings that `sample` alone reads."""

Method = Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}; default of this and of the search: the run's")]
BeamSize = Annotated[int | None, typer.Option(help="beams per image")]
MaxLength = Annotated[int | None, typer.Option(help="words at most, the end included")]
LengthPenalty = Annotated[float | None, typer.Option(help="captions rank by log-probability / words ** this")]
NBest = Annotated[int | None, typer.Option(help="captions kept per image, best first; samples drawn with sample")]
BlockUnk = Annotated[bool | None, typer.Option("--block-unk/--no-block-unk", help="never say <unk>")]
BlockNgram = Annotated[int | None, typer.Option(help="repeat no sequence of so many words; 0: allowed")]
Temperature = Annotated[float | None, typer.Option(help="sample: logits are divided by this")]
TopK = Annotated[int | None, typer.Option(help="sample: of the k most probable words only; 0: all")]
TopP = Annotated[float | None, typer.Option(help="sample: of the fewest words that reach this probability only")]
Seed = Annotated[int | None, typer.Option(help="sample: of the random numbers")]


@dataclass(frozen=True)
class Asked:
    """What was given of the search, named as in `DecodeOptions`; None: nothing."""

    method: str | None = None
    beam_size: int | None = None
    max_length: int | None = None
    length_penalty: float | None = None
    n_best: int | None = None
    block_unk: bool | None = None
    block_ngram: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def over(self, options: Options) -> Options:
        """These options with what was asked for in their place.

        Asked for another method than `sample`, a run's own temperature and cuts are forgotten. Raises ValueError as
        `DecodeOptions` does.
        """
        given = {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) is not None}
        if self.method not in (None, "sample"):
            given = {each.name: each.default for each in fields(DecodeOptions) if each.name in DRAWN} | given
        return replace(options, **given)
