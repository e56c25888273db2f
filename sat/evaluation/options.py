"""How captions are searched for and scored. Imports no torch, so that settings load at once."""

import math
from dataclasses import dataclass
from typing import ClassVar

from sat.settings import check, setting

METHODS = ("beam", "greedy", "sample")
METRICS = ("BLEU", "METEOR", "ROUGE-L", "CIDEr")
"""Scored during training unless it says otherwise."""
FURTHER_METRICS = ("BLEU without brevity penalty", "CIDEr-D")
"""They cost nothing beside those."""
REPORTED_METRICS = (*METRICS, *FURTHER_METRICS)
"""Scored by `sat evaluate` and `sat score`."""
OPTIONAL_METRICS = ("SPICE",)
"""Scored where they are asked for: they need more than is installed with us."""
ALL_METRICS = (*REPORTED_METRICS, *OPTIONAL_METRICS)


@dataclass(frozen=True)
class DecodeOptions:
    """How captions are searched for. ValueError at once for a setting that cannot work or would be ignored."""

    SECTION: ClassVar[str] = ""
    """What stands before a setting's name in an error."""
    method: str = setting("beam", choices=METHODS)
    """`beam`, `greedy` (beam of one) or `sample`."""
    beam_size: int = setting(3, at_least=1)
    """Beams kept per image; 1 is greedy. Only read by `beam`."""
    max_length: int = setting(20, at_least=1)
    """Steps at most: this many words, or fewer words and `<end>`."""
    length_penalty: float = setting(0.0)
    """A caption's score is its log-probability / words ** this; `<end>` is no word, the empty caption counts as one."""
    n_best: int = setting(1, at_least=1)
    """Captions returned per image, best first; with `sample` the number of independent samples."""
    block_unk: bool = setting(False)
    """Never choose `<unk>`."""
    block_ngram: int = setting(0)
    """No caption repeats a sequence of this many words; 0: allowed."""
    temperature: float = setting(1.0, above=0)
    """`sample`: logits are divided by this; greedy takes the best word."""
    top_k: int = setting(0)
    """`sample`: only the k most probable words; 0: all."""
    top_p: float = setting(1.0, above=0, at_most=1)
    """`sample`: only the fewest words that together reach this probability; 1: all."""
    seed: int = setting(0, at_least=-math.inf)
    """`sample`: with the image's id it fixes the captions, whatever the batch; so too where hard attention samples."""
    keep_attention: bool = setting(False)
    """Return the attention of every step."""

    def __post_init__(self) -> None:
        check(self, self.SECTION)
        if self.method != "sample" and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError(f"temperature, top_k and top_p have no effect on method {self.method}; use method sample")
        if self.n_best > self.width:
            way_out = "beam_size" if self.method == "beam" else "method beam or sample"
            raise ValueError(f"n_best {self.n_best} captions cannot come from a width of {self.width}; raise {way_out}")

    @property
    def width(self) -> int:
        """Slots per image."""
        return {"beam": self.beam_size, "greedy": 1, "sample": self.n_best}[self.method]


@dataclass(frozen=True)
class EvaluationOptions(DecodeOptions):
    """The section `eval`: the search, how many images at once, and what scores them."""

    SECTION: ClassVar[str] = "eval"
    batch_size: int = setting(64, above=0)
    """Images decoded at once per rank."""
    metrics: list[str] = setting(list(METRICS), choices=ALL_METRICS)
    """Metrics computed; CIDEr, which picks the best model, is one of them."""
