"""The shares of what captions say that is true: exact on cases counted by hand, low for other scenes' captions."""

import json
import math
from random import Random

import numpy as np
import pytest

from preprocessing.check_scenes import main, read_references, read_scenes, write_claim
from preprocessing.scenes.attention import CaptionAttention, SeenWords, cells_of, measure_looking
from preprocessing.scenes.captions import check_claims, describe, objects_named
from preprocessing.scenes.scenes import Scene, SceneObject, sample_scene
from preprocessing.scenes.truth import Truth, is_wholly_true, measure
from preprocessing.synthetic import make_scenes
from sat import files


def thing(shape: str, colour: str, x: float, y: float, size: str = "large") -> SceneObject:
    return SceneObject(shape, colour, size, x, y, 34.0, 0.0, (255, 0, 0))


def scene(*objects: SceneObject, layout: str = "row") -> Scene:
    return Scene(objects, "gray", layout, (128, 128, 128), 0)


PAIR = scene(thing("circle", "red", 60, 100), thing("square", "blue", 160, 110, "small"))
ALONE = scene(thing("star", "pink", 30, 30), layout="single")


def of_objects(caption: str, shown: Scene = PAIR) -> list[tuple]:
    claims = [claim for claim in check_claims(caption, shown) if claim.kind == "object"]
    return [(claim.holds, claim.shape, claim.colour, claim.size) for claim in claims]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a large red circle", [(True, True, True, True)]),
        ("a red circle", [(True, True, True, None)]),
        ("a circle", [(True, True, None, None)]),
        ("a small red circle", [(False, True, True, False)]),
        ("a blue circle", [(False, True, False, None)]),  # a circle there is, and the blue thing is a square
        ("a blue star", [(False, False, True, None)]),
        ("a green star", [(False, False, False, None)]),
        ("a blue circle and a red circle", [(False, False, True, None), (True, True, True, None)]),
        (
            "a circle a square and a star",
            [(True, True, None, None), (True, True, None, None), (False, False, None, None)],
        ),
    ],
)
def test_shape_colour_and_size_of_a_noun_are_judged_apart(caption, expected):
    assert of_objects(caption) == expected


def test_relations_and_places_hold_of_what_is_there_whatever_its_size():
    def kinds(caption, kind, shown=PAIR):
        return [claim.holds for claim in check_claims(caption, shown) if claim.kind == kind]

    assert kinds("a small red circle left of a blue square", "relation") == [True]
    assert kinds("a green circle left of a blue square", "relation") == [False]
    assert kinds("a red circle and a blue square side by side", "relation") == [True]
    assert kinds("a red circle above a blue square in a column", "relation") == [True, False]
    assert kinds("a small pink star in the top left corner", "place", ALONE) == [True]
    assert kinds("a pink moon in the top left corner", "place", ALONE) == [False]
    assert kinds("a pink star in the middle", "place", ALONE) == [False]


def test_shares_are_those_counted_by_hand():
    captions = {
        "1": "a red circle left of a blue square",  # all true
        "2": "a red square right of a blue square",  # one noun stands for nothing; the relation neither
        "3": "a small pink star in the top left corner on a gray background",  # the size is wrong
        "4": "a pink star in the middle",  # the place is wrong
        "5": "two shapes",  # nothing but a number, and true
        "6": "what we see",
    }
    shown = dict(zip("123456", (PAIR, PAIR, ALONE, ALONE, PAIR, PAIR)))
    assert measure(captions, shown) == Truth(
        captions=2 / 6, objects=5 / 6, colours=6 / 6, places=1 / 2, relations=1 / 2
    )


@pytest.mark.parametrize("caption", ["", "what we see", "a picture"])
def test_a_caption_that_claims_nothing_is_not_wholly_true(caption):
    assert check_claims(caption, PAIR) == [] and not is_wholly_true([])
    assert measure({"1": caption}, {"1": PAIR}) == Truth(0, 0, 0, 0, 0)


def test_true_captions_are_true_and_those_of_other_scenes_are_not():
    rng = Random(3)
    scenes = {str(number): sample_scene(rng) for number in range(200)}
    captions = {number: describe(each, rng, 1)[0] for number, each in scenes.items()}
    whole = measure(captions, scenes)
    assert whole == Truth(1, 1, 1, 1, 1)
    swapped = dict(zip(captions, [*list(captions.values())[1:], captions["0"]]))
    other = measure(swapped, scenes)
    assert other.captions < 0.05 and max(other.objects, other.colours, other.relations, other.places) < 0.5
    one_wrong = captions | {"0": "a red circle a red circle and a red circle"}
    assert measure(one_wrong, scenes).captions == 199 / 200


def test_a_shape_word_is_found_with_the_object_it_stands_for():
    def named(caption):
        return objects_named(caption.split(), PAIR)

    two = named("a blue box to the left of a large red disc and a red hoop")
    assert two == [(2, PAIR.objects[1]), (10, PAIR.objects[0])]
    assert named("a small red circle") == [(3, PAIR.objects[0])], "whatever its size"
    assert named("what we see") == []
    with pytest.raises(ValueError, match="not given word by word"):
        objects_named(["a", "red circle"], PAIR)


# ------------------------------------------------------------------ where the model looked


def centres(side: int) -> np.ndarray:
    even = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(even, even), axis=-1).reshape(-1, 2)


def looking(attention: np.ndarray, caption: str, side: int, shown: Scene = PAIR):
    words = tuple(caption.split())
    seen = SeenWords(words, np.tile(attention, (len(words), 1)))
    kept = CaptionAttention(centres(side), {"1": seen})
    return measure_looking(kept, {"1": shown})


def test_an_objects_cells_are_those_its_disc_touches():
    """Against every pixel of the disc, one by one."""
    for shown, side in ((PAIR, 7), (PAIR, 14), (ALONE, 7)):
        for each in shown.objects:
            x, y = np.meshgrid(np.arange(224) + 0.5, np.arange(224) + 0.5)
            inside = np.hypot(x - each.x, y - each.y) < each.radius
            touched = {(int(py * side // 224), int(px * side // 224)) for px, py in zip(x[inside], y[inside])}
            expected = [(row, column) in touched for row in range(side) for column in range(side)]
            assert cells_of(each, centres(side)).tolist() == expected


@pytest.mark.parametrize("side", [7, 14])
def test_even_attention_looks_once_at_the_cells_and_sharp_attention_many_times(side):
    even = looking(np.full(side**2, side**-2), "a red circle", side)
    assert even.words == 1 and even.times_cells == pytest.approx(1)
    assert even.area == pytest.approx(math.pi * 34**2 / 224**2)
    on = cells_of(PAIR.objects[0], centres(side))
    sharp = looking(on / on.sum(), "a red circle", side)
    assert sharp.mass == pytest.approx(1) and sharp.times_cells == pytest.approx(side**2 / on.sum())
    elsewhere = looking(on / on.sum(), "a blue square", side)
    assert elsewhere.mass == 0 == elsewhere.times_area
    both = looking(on / on.sum(), "a red circle left of a blue square", side)
    assert both.words == 2 and both.mass == pytest.approx(0.5)


def test_words_for_what_is_not_there_are_not_counted():
    assert looking(np.full(49, 1 / 49), "a pink star and a red square", 7) is None
    assert looking(np.full(49, 1 / 49), "a red circle and a red square", 7).words == 1


# ------------------------------------------------------------------ the program


@pytest.fixture
def evaluated(tmp_path):
    """A scene set and a run folder with the captions of its test split: three true of five, and the same shuffled."""
    make_scenes(tmp_path / "scenes", {"test": 5}, seed=1)
    texts = {image: captions[1] for image, captions in read_references(tmp_path / "scenes", "test").items()}
    ids = sorted(texts)
    said = texts | {ids[0]: "a red circle a red circle and a red circle", ids[1]: "what we see"}
    write(tmp_path / "run/captions-test.json", said)
    write(tmp_path / "run/captions-test-blind.json", {i: said[j] for i, j in zip(ids, [*ids[2:], *ids[:2]])})
    return tmp_path


def write(path, captions: dict[str, str]) -> None:
    files.write_json(path, [{"image_id": image, "caption": text} for image, text in captions.items()])


def test_the_program_writes_and_prints_the_shares(evaluated, capsys):
    main(evaluated / "run", evaluated / "scenes", "test")
    found = files.read_json(evaluated / "run/truth-test.json")
    assert found["truth"].keys() == {"model", "blind", "reference"}
    names = {"captions", "objects", "colours", "places", "relations"}
    assert all(shares.keys() == names for shares in found["truth"].values())
    assert found["truth"]["model"]["captions"] == 3 / 5 > found["truth"]["blind"]["captions"]
    assert found["truth"]["reference"]["captions"] == found["truth"]["reference"]["objects"] == 1
    assert found["captions_sha256"] == files.sha256(evaluated / "run/captions-test.json")
    printed = capsys.readouterr().out
    assert "model" in printed and "0.600" in printed
    said = {row["image_id"]: row["caption"] for row in json.loads((evaluated / "run/captions-test.json").read_text())}
    scenes, claims = read_scenes(evaluated / "scenes"), found["claims"]
    assert claims.keys() == said.keys()
    for image, caption in said.items():
        expected = [(claim.text.replace("_", " "), claim.holds) for claim in check_claims(caption, scenes[image])]
        assert [(" ".join(each["words"]), each["holds"]) for each in claims[image]] == expected


@pytest.mark.parametrize(
    ("caption", "words", "wrong"),
    [("a small blue circle", ["small", "blue", "circle"], [0, 1]), ("a green star", ["green", "star"], [0, 1])],
)
def test_of_an_object_the_words_that_are_wrong_are_told(caption, words, wrong):
    (claim,) = check_claims(caption, PAIR)
    assert write_claim(claim) == {"words": words, "holds": False, "wrong": wrong}


def keep_attention(run, words: dict[str, str], cells: int = 49) -> None:
    """attention.npz as `sat evaluate --attention` writes it, of even attention."""
    said = [text.split() for text in words.values()]
    starts = np.cumsum([0, *map(len, said)])
    attention = np.full((starts[-1], cells), 1 / cells, np.float32)
    flat = np.array([word for each in said for word in each], dtype=np.str_)
    ids = np.array(list(words), dtype=np.str_)
    numbers = {"probabilities": np.full(len(flat), 0.5), "gates": np.full(len(flat), np.nan)}
    arrays = {"image_ids": ids, "starts": starts, "words": flat, "attention": attention, "centres": centres(7)}
    np.savez(run / "attention-test.npz", **arrays | numbers)


def test_the_attention_is_measured_where_it_was_kept(evaluated, capsys):
    run = evaluated / "run"
    said = {row["image_id"]: row["caption"] for row in json.loads((run / "captions-test.json").read_text())}
    keep_attention(run, said)
    main(run, evaluated / "scenes", "test")
    found = files.read_json(run / "truth-test.json")["attention"]
    assert found["words"] >= 3 and found["times_cells"] == pytest.approx(1, rel=1e-3)
    assert "1.0 times its cells' share" in capsys.readouterr().out
    keep_attention(run, said | {next(iter(said)): "a red circle"})
    with pytest.raises(ValueError, match=r"attention-test\.npz is of another evaluation than the captions"):
        main(run, evaluated / "scenes", "test")
    keep_attention(run, said, cells=36)
    with pytest.raises(ValueError, match="36 locations, 49 of them known places"):
        main(run, evaluated / "scenes", "test")
    (run / "attention-test.npz").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is no file of attention"):
        main(run, evaluated / "scenes", "test")


def test_a_users_mistake_is_named(evaluated):
    run, scenes = evaluated / "run", evaluated / "scenes"
    with pytest.raises(ValueError, match=r"captions-val\.json is missing; run `sat evaluate"):
        main(run, scenes, "val")
    with pytest.raises(ValueError, match=r"captions_test\.json is missing; --scenes takes"):
        main(run, evaluated, "test")
    blind = json.loads((run / "captions-test-blind.json").read_text())
    (run / "captions-test-blind.json").write_text(json.dumps([{**blind[0], "caption": "a moon"}, *blind[1:]]))
    with pytest.raises(ValueError, match="of another evaluation than the model's"):
        main(run, scenes, "test")
    for content in ("[1]", "{", '[{"image_id": 1}]'):
        (run / "captions-test.json").write_text(content)
        with pytest.raises(ValueError, match=r"captions-test\.json is no list of image_id and caption"):
            main(run, scenes, "test")
    for name in ("captions-test.json", "captions-test-blind.json"):
        write(run / name, {"7": "a red circle", "8": "a red moon"})
    with pytest.raises(ValueError, match="image 7, which is none of these scenes"):
        main(run, scenes, "test")
