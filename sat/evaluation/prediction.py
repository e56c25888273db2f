"""What a captioner says of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sat.evaluation.beams import Hypothesis
from sat.text import CaptionTokenizer


@dataclass(frozen=True)
class Prediction:
    """The best caption of one picture."""

    image_id: str
    """The image's id in its data set, or what a picture from outside is called."""
    caption: str
    words: tuple[str, ...]
    """The caption's words, one per row of `attention`."""
    score: float
    """What the search ranks by: log-probability / words ** length_penalty."""
    log_probability: float
    """Of the caption under the model (or ensemble), its end included."""
    finished: bool
    """False: the greatest length came before the end."""
    attention: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """[words, L]: weights of the grid's cells, or of the picture's own regions, at each word, if asked for."""
    probabilities: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """With the attention, [words]: of each word after those before it."""
    gates: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """With the attention, [words]: how far the gate on what is seen was open, 0 to 1; None without a gate."""
    picture: npt.NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """[S, S, 3]: exactly what the encoder saw; None where only features were read."""
    boxes: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """[L, 4]: x0 y0 x1 y1 of those regions in 0..1 of the picture's width and height; None for grids, and where the
    features came without boxes."""
    others: tuple["Prediction", ...] = ()
    """The further captions, best first, where more than one was asked for; without the picture."""


def predict(
    image_id: str,
    hypotheses: Sequence[Hypothesis],
    tokenizer: CaptionTokenizer,
    length_penalty: float,
    picture: npt.NDArray[np.uint8] | None = None,
    regions: int | None = None,
    boxes: npt.NDArray[np.float32] | None = None,
) -> Prediction:
    """The n best hypotheses of an image in words; `length_penalty` is that of the search.

    `regions` is how many the image has, where images differ in that: the attention is cut to them.
    """
    best, *others = hypotheses
    words = tuple(tokenizer.decode([token]) for token in best.tokens)
    return Prediction(
        image_id=image_id,
        caption=tokenizer.decode(best.tokens),
        words=words,
        score=best.score,
        log_probability=best.score * max(len(words), 1) ** length_penalty,
        finished=best.finished,
        attention=_of_words(None if best.alphas is None else best.alphas[:, :regions], len(words)),
        probabilities=_of_words(best.probabilities, len(words)),
        gates=_of_words(best.gates, len(words)),
        picture=picture,
        boxes=boxes,
        others=tuple(predict(image_id, [each], tokenizer, length_penalty, regions=regions) for each in others),
    )


def _of_words(steps: Tensor | None, words: int) -> npt.NDArray[np.float32] | None:
    """The rows of the words, without that of `<end>`."""
    return None if steps is None else steps[:words].numpy(force=True)
