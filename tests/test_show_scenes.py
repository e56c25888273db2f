"""The page of captioned scenes: true is green, false is red, nothing is loaded, cells lie where they look."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from preprocessing.check_scenes import main as check_scenes
from preprocessing.check_scenes import read_captions, read_references, read_scenes
from preprocessing.scenes.attention import SeenWords
from preprocessing.scenes.captions import check_claims
from preprocessing.scenes.page import Shown, Table, page
from preprocessing.show_scenes import main
from preprocessing.synthetic import make_scenes
from sat import files

NASTY = "a <script>alert('x')</script> & \"quoted\" red circle"


class Reader(HTMLParser):
    """Tags with their attributes, and the text of each."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append((self.tags[-1][0] if self.tags else "", data))

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def jpeg(colour: str, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def centres(side: int, first: float, stride: float, size: int = 224) -> np.ndarray:
    along = (first + stride * np.arange(side) + 0.5) / size
    return np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize(("side", "first", "stride"), [(7, 0, 32), (7, 31, 32), (14, 7.5, 16)])
def test_a_strong_cell_lies_over_the_picture_where_it_looks(side, first, stride):
    cell, places = 2 * side + 4, centres(side, first, stride)
    attention = np.eye(side * side)[[cell]]
    seen = SeenWords(("circle",), attention, np.ones(1), np.ones(1))
    read = Reader(page("t", [], [], [Shown("1", jpeg("red"), "circle", [], [], seen)], places))
    (overlay,) = read.attributes("img")
    box = {name: float(value) / 100 for name, value in re.findall(r"(\w+): ([\d.-]+)%", overlay["style"])}
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(overlay["src"].split(",")[1]))))
    row, column = np.unravel_index(pixels[..., 3].argmax(), pixels.shape[:2])
    x = box["left"] + (column + 0.5) * box["width"] / pixels.shape[1]
    y = box["top"] + (row + 0.5) * box["height"] / pixels.shape[0]
    assert (x, y) == pytest.approx(tuple(places[cell]), abs=2e-4)


def test_text_is_escaped_and_nothing_is_loaded_from_anywhere():
    seen = SeenWords(("<b>", "red"), np.full((2, 4), 0.25), np.ones(2), np.full(2, np.nan))
    scenes = [Shown(NASTY, jpeg("blue"), NASTY, [], [NASTY], seen)]
    text = page(NASTY, [Table(NASTY, [NASTY], [(NASTY, [NASTY])])], [NASTY], scenes, centres(2, 56, 112))
    read = Reader(text)
    assert not {"script", "b", "link", "iframe"} & {tag for tag, _ in read.tags}
    assert sum(NASTY in "".join(word for _, word in read.words[i : i + 1]) for i in range(len(read.words))) >= 7
    addresses = [value for _, attributes in read.tags for name, value in attributes.items() if name in ("src", "href")]
    addresses += re.findall(r"url\((.*?)\)", text)
    assert len(addresses) == 3 and all(address.startswith("data:image/") for address in addresses)
    assert "default-src 'none'" in str(read.attributes("meta")) and "gate" not in text.split("</style>")[1]


def test_a_large_picture_is_made_small_and_a_caption_without_words_is_shown():
    wide = io.BytesIO()
    Image.effect_noise((1600, 800), 90).save(wide, "PNG")
    text = page("t", [], [], [Shown("1", wide.getvalue(), "", [], [], None)], np.zeros((0, 2)))
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^)]*)\)", text)[1])))
    assert picture.size == (224, 112) and len(text) < 50_000
    assert "(no words)" in text and "claims nothing" in text


# ------------------------------------------------------------------ the program


@pytest.fixture
def checked(tmp_path):
    """Scenes, and a run that was evaluated and checked: true captions, one false, one of a word unknown here."""
    make_scenes(tmp_path / "scenes", {"test": 6}, seed=1, size=64)
    ids = sorted(read_references(tmp_path / "scenes", "test"))
    said = {image: texts[0] for image, texts in read_references(tmp_path / "scenes", "test").items()}
    said |= {ids[0]: "a red circle a red circle and a red circle", ids[1]: "what we see"}
    rows = [{"image_id": image, "caption": text} for image, text in sorted(said.items())]
    run = tmp_path / "run"
    files.write_json(run / "captions-test.json", rows)
    files.write_json(run / "captions-test-blind.json", rows)
    files.write_json(run / "evaluation-test.json", {"scores": {"model": {"CIDEr": 1.25}}})
    words = [text.split() for _, text in sorted(said.items())]
    arrays = {"image_ids": np.array(sorted(said)), "starts": np.cumsum([0, *map(len, words)])}
    count = int(arrays["starts"][-1])
    arrays |= {"words": np.array([word for each in words for word in each]), "centres": centres(2, 56, 112)}
    arrays |= {"attention": np.full((count, 4), 0.25), "probabilities": np.ones(count), "gates": np.ones(count)}
    np.savez(run / "attention-test.npz", **arrays)
    check_scenes(run, tmp_path / "scenes", "test")
    return tmp_path


def write_page(root, **options) -> Reader:
    main(root / "run", root / "scenes", "test", **({"panels": 300, "limit": 0} | options))
    return Reader((root / "run/page.html").read_text())


def test_every_claim_is_green_or_red_as_the_checker_says(checked):
    read = write_page(checked)
    scenes, captions = read_scenes(checked / "scenes"), read_captions(checked / "run/captions-test.json")
    expected = [claim.holds for image in sorted(captions) for claim in check_claims(captions[image], scenes[image])]
    chips = [each["class"] for each in read.attributes("li") if "class" in each]
    assert chips.count("true") == sum(expected) and chips.count("false") == expected.count(False) + 1
    assert [each["class"] for each in read.attributes("article")] == ["fails", "fails", *["holds"] * 4]
    text = (checked / "run/page.html").read_text()
    assert "1.250" in text and "0.667" in text, "the scores and the shares"
    references = [text for texts in read_references(checked / "scenes", "test").values() for text in texts]
    shown = {word for _, word in read.words}
    assert set(references) <= shown


def test_panels_and_scenes_are_as_many_as_asked_for(checked):
    whole = len(write_page(checked).attributes("figure"))
    assert 0 < len(write_page(checked, panels=2).attributes("figure")) < whole
    assert write_page(checked, panels=0).attributes("figure") == []
    assert len(write_page(checked, limit=2).attributes("article")) == 2
    (checked / "run/attention-test.npz").unlink()
    assert write_page(checked).attributes("figure") == []


def test_a_users_mistake_is_named(checked, tmp_path):
    run = checked / "run"
    with pytest.raises(ValueError, match="captions-val.json is missing"):
        main(run, checked / "scenes", "val", 1, 0)
    make_scenes(tmp_path / "others", {"test": 1}, seed=2, size=64)
    with pytest.raises(ValueError, match="is none of these scenes; give the --scenes"):
        main(run, tmp_path / "others", "test", 1, 0)
    (run / "truth-test.json").unlink()
    with pytest.raises(ValueError, match="the captions are not checked yet; run preprocessing.check_scenes"):
        main(run, checked / "scenes", "test", 1, 0)
