"""What a reader of an attention picture sees: colour where the word looked, on dark and on bright, on one scale."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sat.evaluation.attention_map import Cells, Regions
from sat.evaluation.attention_plot import Drawing, lay_over, plot_attention, shown_words
from sat.evaluation.prediction import Prediction

WORDS = ("a", "dog", "on", "the", "grass")


def predicted(words=WORDS, cells: int = 49, **changes) -> Prediction:
    alphas = np.random.default_rng(0).dirichlet(np.ones(cells), len(words)).astype(np.float32)
    chances = np.linspace(0.2, 0.9, len(words), dtype=np.float32)
    found = Prediction("x", " ".join(words), tuple(words), -2.5, -2.5, True, alphas, chances, chances)
    return replace(found, **changes)


def cells_of(width: int, height: int, side: int = 7) -> Cells:
    even = (np.arange(side) + 0.5) / side
    return Cells(even * width, even * height, (0, 0, width, height), (width, height))


def drawn(path, picture: Image.Image, prediction: Prediction, where=None, **options) -> np.ndarray:
    where = where or cells_of(*picture.size)
    plot_attention(picture, prediction, where, path, **options)
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


@pytest.mark.parametrize("colour", ["black", "white", "gray", "darkblue", "yellow", "red", "lime"])
def test_a_strong_place_differs_plainly_from_a_weak_one_on_any_picture(colour):
    picture = Image.new("RGB", (40, 40), colour)
    heat = np.zeros((40, 40))
    heat[:20] = 1.0
    laid = lay_over(picture, heat, 1.0).astype(float)
    assert np.abs(laid[5, 5] - laid[35, 35]).sum() > 150
    half = lay_over(picture, heat / 2, 1.0).astype(float)
    assert np.abs(half[5, 5] - laid[5, 5]).sum() > 60, "half of the scale is not the whole"
    assert 50 < laid[35, 35].mean() < 205, "neither black nor white is left where no word looks"


def test_what_is_in_the_picture_stays_visible_under_the_colours():
    edge = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 20, 1).repeat(40, 0)).convert("RGB")
    for strength in (0, 0.5, 1):
        laid = lay_over(edge, np.full((40, 40), strength), 1.0).astype(float).mean(-1)
        assert laid[:, 30:].mean() - laid[:, :10].mean() > 15


def test_all_words_share_one_scale(tmp_path):
    """The same weights beside a sharper word are paler than beside weaker ones."""
    flat, sharp = np.full(49, 1 / 49, np.float32), np.eye(49, dtype=np.float32)[24]
    picture = Image.new("RGB", (60, 60), "gray")

    def second_panel(first):
        alphas = np.stack([first, flat + 0.1 * sharp])
        page = drawn(tmp_path / "plot.png", picture, predicted(("dog", "cat"), attention=alphas))
        colour = np.abs(page - page.mean(-1, keepdims=True)).sum(-1)
        return colour[:-120, page.shape[1] * 2 // 3 :].max()  # the bar of the scale is below

    assert second_panel(sharp) < 0.6 * second_panel(flat)


def test_function_words_are_folded_unless_asked_for_and_nothing_is_left_without_a_panel():
    assert shown_words(WORDS) == [1, 4] and shown_words(WORDS, all_words=True) == [0, 1, 2, 3, 4]
    assert shown_words(("a", "the")) == [0, 1] and shown_words(()) == []
    assert shown_words(("красный", "a", "круг")) == [0, 2]


@pytest.mark.parametrize(("size", "wider"), [((300, 300), 1), ((600, 200), 3), ((200, 600), 1 / 3)])
def test_panels_have_the_proportions_of_the_picture(tmp_path, size, wider):
    page = drawn(tmp_path / "plot.png", Image.new("RGB", size, (0, 160, 0)), predicted())
    green = (page[..., 1] > 140) & (page[..., 0] < 60) & (page[..., 2] < 60)  # the first panel has its own colours
    rows, columns = np.flatnonzero(green.any(1)), np.flatnonzero(green.any(0))
    assert (np.ptp(columns) + 1) / (np.ptp(rows) + 1) == pytest.approx(wider, rel=0.03)


@pytest.mark.parametrize("format", ["svg", "pdf"])
def test_vectors_hold_the_words_and_are_the_same_twice(tmp_path, format):
    picture = Image.new("RGB", (50, 40), "navy")
    for name in ("one", "two"):
        plot_attention(picture, predicted(), cells_of(50, 40), tmp_path / name, Drawing(format))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_bytes().startswith(b"<?xml" if format == "svg" else b"%PDF")
    if format == "svg":
        assert "<!-- dog -->" in (tmp_path / "one").read_text() and "gate" in (tmp_path / "one").read_text()


def test_caption_score_probability_gate_and_references_are_written(tmp_path):
    where, picture = cells_of(50, 40), Image.new("RGB", (50, 40))
    long = "a very long reference of a great many words that goes on over more than one line of the page " * 2
    given = [long.strip(), "costs $5 < $6 & more"]
    plot_attention(picture, predicted(), where, tmp_path / "a.svg", Drawing("svg"), given)
    page = (tmp_path / "a.svg").read_text()
    assert all(
        text in page for text in ("a dog on the grass", "score -2.50", "p 0.38   gate 0.38", "reference: a very")
    )
    plot_attention(picture, predicted(gates=None), where, tmp_path / "b.svg", Drawing("svg"))
    assert "p 0.38" in (tmp_path / "b.svg").read_text() and "gate" not in (tmp_path / "b.svg").read_text()


def test_regions_are_outlined_and_odd_captions_are_drawn(tmp_path):
    boxes = Regions(np.array([[0.1, 0.1, 0.5, 0.5], [0.4, 0.4, 0.9, 0.9]], np.float32))
    found = predicted(("dog",), cells=2, attention=np.array([[0.9, 0.1]], np.float32))
    page = drawn(tmp_path / "regions.png", Image.new("RGB", (80, 60), "white"), found, boxes)
    assert (page.max(-1) < 60).any(), "a dark line around the boxes"
    for words in ((), ("a",) * 3, ("$x_1", "\\frac", "<unk>")):
        drawn(tmp_path / "odd.png", Image.new("RGB", (80, 60)), predicted(words))
    drawn(tmp_path / "thin.png", Image.new("RGB", (3, 900)), predicted(WORDS * 6))


def test_what_cannot_be_drawn_is_refused(tmp_path):
    picture, path = Image.new("RGB", (56, 56)), tmp_path / "plot.png"
    with pytest.raises(ValueError, match="5 words but attention of 0 steps"):
        plot_attention(picture, predicted(attention=None), cells_of(56, 56), path)
    with pytest.raises(ValueError, match="over 50 locations, but 49 are known"):
        plot_attention(picture, predicted(cells=50), cells_of(56, 56), path)
    with pytest.raises(ValueError, match="format 'gif' cannot be drawn; choose one of png, svg, pdf"):
        Drawing("gif")
    assert not list(tmp_path.iterdir())
