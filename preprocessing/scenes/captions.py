"""Say what a scene shows, in varied words; and check any caption's claims against the scene. Pure: no files.

The surprising decision: the words are drawn with uneven odds (circle more often than disc), as people's words are. A
picture's captions then have something in common that a model can learn, and still differ in order, synonyms and detail.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from random import Random

from preprocessing.scenes.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, SIZES, Scene, SceneObject

SYNONYMS = {
    "circle": ("disc",),
    "square": ("box",),
    "triangle": (),
    "star": (),
    "ring": ("hoop",),
    "cross": ("plus",),
    "heart": (),
    "moon": ("crescent",),
    "large": ("big",),
    "small": ("tiny",),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "background": ("backdrop", "surface"),
    "picture": ("image",),
    "there is": ("we see",),
    "left of": ("to the left of",),
    "right of": ("to the right of",),
    "above": ("over",),
    "below": ("under",),
    "in a row": ("side by side",),
    "in a column": ("one above the other",),
    "in the top left corner": ("in the upper left corner",),
    "in the top right corner": ("in the upper right corner",),
    "in the bottom left corner": ("in the lower left corner",),
    "in the bottom right corner": ("in the lower right corner",),
    "at the top": ("near the top edge",),
    "at the bottom": ("near the bottom edge",),
    "in the center": ("in the middle",),
    "on the left side": ("near the left edge",),
    "on the right side": ("near the right edge",),
    "shapes": ("objects",),
}
"""Other ways to say each term; the term itself is the usual one."""
USUAL = 0.65
"""Probability of the usual word where there are others."""
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left side", "in the center", "on the right side"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
"""Where a lone object is, by third of the picture: row, then column."""
NUMBERS = {"two": 2, "three": 3}

SENTENCES = {
    ("single", 1): (
        ("{a} {place} on a {ground}", 0.55),
        ("{there is} {a} {place}", 0.15),
        ("a {ground} with {a} {place}", 0.15),
        ("the {picture} shows {a} {place}", 0.15),
    ),
    ("row", 2): (
        ("{a} {left of} {b} on a {ground}", 0.5),
        ("{b} {right of} {a} on a {ground}", 0.2),
        ("{a} and {b} {in a row} on a {ground}", 0.15),
        ("{there is} {a} {left of} {b}", 0.15),
    ),
    ("column", 2): (
        ("{a} {above} {b} on a {ground}", 0.5),
        ("{b} {below} {a} on a {ground}", 0.2),
        ("{a} and {b} {in a column} on a {ground}", 0.15),
        ("{there is} {a} {above} {b}", 0.15),
    ),
    ("row", 3): (
        ("{a} {b} and {c} {in a row}", 0.5),
        ("{a} {b} and {c} {in a row} on a {ground}", 0.2),
        ("{a} {left of} {b} and {c}", 0.15),
        ("three {shapes} {in a row} {a} {b} and {c}", 0.15),
    ),
    ("column", 3): (
        ("{a} {b} and {c} {in a column}", 0.5),
        ("{a} {b} and {c} {in a column} on a {ground}", 0.2),
        ("{a} {above} {b} and {c}", 0.15),
        ("three {shapes} {in a column} {a} {b} and {c}", 0.15),
    ),
}
"""Sentences and their odds per layout and number of objects; a, b, c are the objects in reading order."""


@dataclass(frozen=True)
class Claim:
    """Something a caption says, in the usual words, and whether the scene bears it out."""

    text: str
    holds: bool
    kind: str
    """`object`, `relation` (left of, in a row, ...), `place`, `number` or `ground`."""
    shape: bool | None = None
    """Of an object: whether its shape is right; None for every other kind."""
    colour: bool | None = None
    """Of an object: whether its colour is right; None where none is said."""
    size: bool | None = None
    """Of an object: whether its size is right; None where none is said."""


def describe(scene: Scene, rng: Random, count: int = 5) -> list[str]:
    """`count` different captions of `scene`, lower case, without punctuation."""
    captions: list[str] = []
    while len(captions) < count:
        caption = _sentence(scene, rng)
        if caption not in captions:
            captions.append(caption)
    return captions


def place_of(thing: SceneObject) -> str:
    """The third of the picture, across and down, in which an object's centre lies."""
    row, column = (min(2, max(0, int(3 * value / SIZE))) for value in (thing.y, thing.x))
    return PLACES[row][column]


def _sentence(scene: Scene, rng: Random) -> str:
    choices = SENTENCES[scene.layout, len(scene.objects)]
    sentence = rng.choices([words for words, _ in choices], weights=[odds for _, odds in choices])[0]
    parts = {letter: _noun(scene, thing, rng) for letter, thing in zip("abc", scene.objects, strict=False)}
    parts["place"] = _word(place_of(scene.objects[0]), rng)
    parts["ground"] = f"{scene.background} {_word('background', rng)}"
    return re.sub(r"{(.*?)}", lambda match: parts.get(match[1]) or _word(match[1], rng), sentence)


def _noun(scene: Scene, thing: SceneObject, rng: Random) -> str:
    """An object in words; its size is worth saying of one alone, or of two that differ in it."""
    words = [_word(thing.colour, rng), _word(thing.shape, rng)]
    sizes = {other.size for other in scene.objects}
    odds = {1: 0.85, 2: 0.75 if len(sizes) > 1 else 0.15, 3: 0.0}[len(scene.objects)]
    if rng.random() < odds:
        words.insert(0, _word(thing.size, rng))
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _word(term: str, rng: Random) -> str:
    others = SYNONYMS.get(term, ())
    return rng.choice(others) if others and rng.random() >= USUAL else term


_USUAL_WORDS = {other: term for term, others in SYNONYMS.items() for other in (term, *others)}
_PHRASES = re.compile(r"\b(" + "|".join(sorted(_USUAL_WORDS, key=len, reverse=True)) + r")\b")
_NOUN = re.compile(rf"\b(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})\b")
_GROUND = re.compile(rf"({'|'.join(BACKGROUNDS)}) background\b")
_NUMBER = re.compile(rf"({'|'.join(NUMBERS)}) shapes\b")
_RELATIONS = {
    "left_of": lambda a, b: a.x < b.x,
    "right_of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}


def check_claims(caption: str, scene: Scene) -> list[Claim]:
    """What `caption` says of objects, relations, places, layout, number and ground, each compared with `scene`.

    Words outside the vocabulary of this module claim nothing. Two nouns are never taken for the same object. A relation
    or place is true only of objects whose shape and colour are: of what is not there nothing holds.
    """
    text = _usual_words(caption)
    nouns = list(_NOUN.finditer(text))
    pairs = _match_objects(nouns, scene)
    claims = [_object_claim(noun, pairs.get(noun.start())) for noun in nouns]
    meant = {noun.start(): pairs[noun.start()] for noun, claim in zip(nouns, claims, strict=True) if _is_there(claim)}
    claims += _relation_claims(text, nouns, meant)
    claims += _place_claims(text, nouns, meant)
    claims += [Claim(match[0], match[1] == scene.background, "ground") for match in _GROUND.finditer(text)]
    layouts = re.finditer(r"in_a_(row|column)", text)
    claims += [Claim(match[0], match[1] == scene.layout, "relation") for match in layouts]
    numbers = _NUMBER.finditer(text)
    claims += [Claim(match[0], NUMBERS[match[1]] == len(scene.objects), "number") for match in numbers]
    return claims


def objects_named(words: Sequence[str], scene: Scene) -> list[tuple[int, SceneObject]]:
    """(place among `words`, object) of every shape word that stands for an object of its shape and colour.

    ValueError where one of `words` is several, so that places cannot be told.
    """
    nouns = list(_NOUN.finditer(_usual_words(" ".join(words))))
    places = [place for place, word in enumerate(words) if _USUAL_WORDS.get(word, word) in SHAPES]
    if len(places) != len(nouns):
        raise ValueError(f"{' '.join(words)!r} is not given word by word")
    pairs = _match_objects(nouns, scene)
    meant = ((place, noun, pairs.get(noun.start())) for place, noun in zip(places, nouns, strict=True))
    return [
        (place, thing) for place, noun, thing in meant if thing is not None and _is_there(_object_claim(noun, thing))
    ]


def _usual_words(caption: str) -> str:
    """Words alone, in lower case; each term in its usual way, of several words joined by underscores."""
    words = " ".join(re.findall(r"\w+", caption.lower()))
    return _PHRASES.sub(lambda match: _USUAL_WORDS[match[1]].replace(" ", "_"), words)


def _match_objects(nouns: list[re.Match[str]], scene: Scene) -> dict[int, SceneObject]:
    """Objects meant, by where the noun starts: the assignment, one object a noun, that is kindest to the caption.

    It lets most nouns be wholly true, then most shapes, then most colours, then most sizes.
    """
    best: dict[int, SceneObject] = {}
    most: list[int] = []
    for order in permutations(range(max(len(nouns), len(scene.objects))), len(scene.objects)):
        pairs = [(nouns[index], thing) for index, thing in zip(order, scene.objects, strict=True) if index < len(nouns)]
        found = [_object_claim(noun, thing) for noun, thing in pairs]
        true = [(claim.holds, claim.shape is True, claim.colour is True, claim.size is True) for claim in found]
        score = [sum(column) for column in zip(*true, strict=True)]
        if score > most:
            best, most = {noun.start(): thing for noun, thing in pairs}, score
    return best


def _object_claim(noun: re.Match[str], thing: SceneObject | None) -> Claim:
    said = {"size": noun[1], "colour": noun[2], "shape": noun[3]}
    right = {name: thing is not None and word == getattr(thing, name) for name, word in said.items() if word}
    return Claim(noun[0], all(right.values()), "object", **right)


def _is_there(claim: Claim) -> bool:
    return claim.shape is True and claim.colour is not False


def _relation_claims(text: str, nouns: list[re.Match[str]], meant: dict[int, SceneObject]) -> list[Claim]:
    """`A relation B`, and C where it goes on with `and C`."""
    claims = []
    for index, subject in enumerate(nouns[:-1]):
        relation = ""
        for before, noun in pairwise(nouns[index:]):
            link = re.fullmatch(r" (?:is )?(\w+) an? ", text[before.end() : noun.start()])
            word = link[1] if link else ""
            if before is subject and word in _RELATIONS:
                relation = word
            elif not relation or word != "and":
                break
            pair = meant.get(subject.start()), meant.get(noun.start())
            holds = None not in pair and _RELATIONS[relation](*pair)
            claims.append(Claim(f"{subject[0]} {relation} {noun[0]}", holds, "relation"))
    return claims


def _place_claims(text: str, nouns: list[re.Match[str]], meant: dict[int, SceneObject]) -> list[Claim]:
    """A place belongs to the last noun before it."""
    claims = []
    for place in (place for row in PLACES for place in row):
        for match in re.finditer(place.replace(" ", "_"), text):
            owner = max((noun.start() for noun in nouns if noun.start() < match.start()), default=-1)
            claims.append(Claim(match[0], owner in meant and place_of(meant[owner]) == place, "place"))
    return claims
