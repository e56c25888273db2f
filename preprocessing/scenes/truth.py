"""How much of what captions say of scenes is true: shares of captions and of claims by kind. Pure: no files.

The surprising decision: a caption that claims nothing is not wholly true. Else silence would score best.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from preprocessing.scenes.captions import Claim, check_claims
from preprocessing.scenes.scenes import Scene


@dataclass(frozen=True)
class Truth:
    """Shares, 0-1, of what was said; 0 where nothing of the kind was said."""

    captions: float
    """Captions that claim something and nothing false, of all captions."""
    objects: float
    """Nouns whose shape is that of an object in the scene, each noun another object; its colour and size apart."""
    colours: float
    """Colours said of objects that the object meant has."""
    places: float
    """Places in the picture (`in the top left corner`) where the object meant, of this shape and colour, is."""
    relations: float
    """Relations between objects that hold: left of, right of, above, below, in a row, in a column."""


def is_wholly_true(claims: Iterable[Claim]) -> bool:
    """Whether something is claimed and all of it holds."""
    held = [claim.holds for claim in claims]
    return bool(held) and all(held)


def measure(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> Truth:
    """The shares over `captions`, by image id, each against its scene of `scenes`. KeyError for an image without."""
    checked = [check_claims(caption, scenes[image]) for image, caption in captions.items()]
    claims = [claim for each in checked for claim in each]
    objects = [claim for claim in claims if claim.kind == "object"]
    return Truth(
        captions=_share(map(is_wholly_true, checked)),
        objects=_share(claim.shape is True for claim in objects),
        colours=_share(claim.colour for claim in objects if claim.colour is not None),
        places=_share(claim.holds for claim in claims if claim.kind == "place"),
        relations=_share(claim.holds for claim in claims if claim.kind == "relation"),
    )


def _share(held: Iterable[bool]) -> float:
    values = list(held)
    return sum(values) / len(values) if values else 0.0
