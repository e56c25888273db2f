"""The lit place of a panel is the place of the cell the word looked at."""

import numpy as np
import pytest
from PIL import Image

from sat.evaluation.attention_plot import DARK, light, plot_attention


def hot(side: int, row: int, column: int) -> np.ndarray:
    alpha = np.zeros((side, side), np.float32)
    alpha[row, column] = 1.0
    return alpha.ravel()


def centre(brightness: np.ndarray) -> tuple[float, float]:
    """(row, column) in pixels of the middle of the upper half of the brightness."""
    rows, columns = np.nonzero(brightness >= (brightness.max() + brightness.min()) / 2)
    return rows.mean() + 0.5, columns.mean() + 0.5


@pytest.mark.parametrize("side", [7, 14])
def test_a_hot_cell_lights_the_middle_of_its_stride_and_leaves_the_rest_dark(side):
    size = 224
    white, stride = Image.new("RGB", (size, size), "white"), size // side
    for row, column in [(0, side - 1), (2, 5), (side - 2, 1)]:
        lit = np.asarray(light(white, hot(side, row, column)), dtype=float)[..., 0]
        middle = ((row + 0.5) * stride, (column + 0.5) * stride)
        assert centre(lit) == pytest.approx(middle, abs=stride / 4)
        assert lit[int(middle[0]), int(middle[1])] > 200
        far = np.hypot(*(np.indices(lit.shape) + 0.5 - np.reshape(middle, (2, 1, 1)))) > 2.9 * stride
        assert lit[far].max() < 255 * DARK + 10


def test_even_attention_leaves_the_picture_as_it_is():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    assert np.array_equal(light(picture, np.full(49, 1 / 49, np.float32)), picture)


@pytest.mark.parametrize("words", [1, 4, 12])
def test_the_png_has_the_picture_first_and_every_words_light_in_its_place(tmp_path, words):
    side, spots = 7, [(i % 7, (3 * i) % 7) for i in range(words)]
    alphas = np.stack([hot(side, *spot) for spot in spots])
    plot_attention(np.full((224, 224, 3), 90, np.uint8), [" "] * words, alphas, tmp_path / "new" / "plot.png")
    page = np.asarray(Image.open(tmp_path / "new/plot.png").convert("L"), dtype=float)
    panels = find_panels(page)
    assert len(panels) == words + 1
    assert panels[0].min() == panels[0].max() == 90
    for panel, (row, column) in zip(panels[1:], spots):
        height, width = panel.shape
        assert abs(height - width) <= 2
        lit = centre(panel[2:-2, 2:-2])
        assert (lit[0] * side / height, lit[1] * side / width) == pytest.approx((row + 0.5, column + 0.5), abs=0.4)


def find_panels(page: np.ndarray) -> list[np.ndarray]:
    """The dark rectangles on a white page, in reading order."""

    def spans(dark: np.ndarray) -> list[slice]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], dark.astype(int), [0]])))
        return [slice(a, b) for a, b in zip(edges[::2], edges[1::2]) if b - a > 10]

    dark = page < 120
    return [page[rows, columns] for rows in spans(dark.any(1)) for columns in spans(dark[rows].all(0))]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    picture = np.zeros((56, 56, 3), np.uint8)
    with pytest.raises(ValueError, match="2 words but attention of 1 steps"):
        plot_attention(picture, ["a", "dog"], np.ones((1, 49)), tmp_path / "plot.png")
    with pytest.raises(ValueError, match="50 cells"):
        plot_attention(picture, ["a"], np.ones((1, 50)), tmp_path / "plot.png")
