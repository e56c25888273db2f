"""How self-critical training samples and rewards. Imports no torch, so that settings load at once."""

from dataclasses import dataclass

from sat.settings import check, setting


@dataclass(frozen=True)
class SelfCriticalOptions:
    """The section `self_critical`, read where `train.objective` is that. ValueError at once for what cannot work."""

    samples: int = setting(5, above=0)
    """Captions drawn per picture and step."""
    baseline: str = setting("others", choices=("others", "greedy"))
    """What a sample's reward is compared with: the mean of its picture's `others`, or its `greedy` caption's."""
    max_length: int = setting(20, above=0)
    """Words of a sample at most; one without `<end>` by then is cut."""
    cider_d: float = setting(1.0)
    """Weight of CIDEr-D, 0 to 10, by the document frequencies of the training captions."""
    bleu_4: float = setting(0.0)
    """Weight of the caption's own BLEU-4, 0 to 1."""
    length: float = setting(0.0)
    """Weight of how near the caption's length is to the nearest reference's: the shorter over the longer, 0 to 1."""

    def __post_init__(self) -> None:
        check(self, "self_critical")
        if self.baseline == "others" and self.samples < 2:
            raise ValueError(
                "self_critical.baseline is others, but self_critical.samples 1 leaves a sample no others; "
                "draw at least 2, or set self_critical.baseline=greedy"
            )
        if not (self.cider_d or self.bleu_4 or self.length):
            raise ValueError("self_critical.cider_d, bleu_4 and length are all 0: nothing is rewarded; set one of them")
