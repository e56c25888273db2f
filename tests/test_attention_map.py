"""A weight lies where its cell looks, in the picture's own proportions, whatever the encoder saw of the picture."""

import numpy as np
import pytest

from sat.evaluation.attention_map import Cells, Regions, cells_over, even_scale, panel_size, unit_centres
from sat.shards.features import EncoderSpec, FeatureSpec, Transform


def spec(side: int = 7, geometry: str = "squash", size: int = 224, first_centre: float = 0) -> FeatureSpec:
    encoder = EncoderSpec("resnet50", 4, dim=2048, stride=32, first_centre=first_centre)
    return FeatureSpec("grid", (side, side), 2048, "bf16", encoder, Transform(size, geometry))


def hot(side: int, row: int, column: int) -> np.ndarray:
    alpha = np.zeros((side, side), np.float32)
    alpha[row, column] = 1.0
    return alpha.ravel()


def peak(heat: np.ndarray) -> tuple[float, float]:
    """(x, y) of the middle of the greatest values, in shares of the map."""
    rows, columns = np.nonzero(heat >= heat.max() - 1e-9)
    return (columns.mean() + 0.5) / heat.shape[1], (rows.mean() + 0.5) / heat.shape[0]


@pytest.mark.parametrize("first", [0, 15.5, 31])
@pytest.mark.parametrize(("width", "height"), [(224, 224), (640, 360), (300, 900)])
def test_squashed_a_cells_weight_stands_at_its_receptive_fields_centre(width, height, first):
    """0 is a ResNet's, 15.5 the middle of a patch, 31 of one that pads on the right alone."""
    cells = cells_over(spec(first_centre=first), width, height)
    for row, column in [(1, 5), (3, 2), (5, 3)]:
        heat = cells.heat(hot(7, row, column), width, height)
        x, y = (32 * column + first + 0.5) / 224, (32 * row + first + 0.5) / 224
        assert peak(heat) == pytest.approx((x, y), abs=1.5 / min(width, height))
        assert heat.max() == pytest.approx(1, abs=0.01)


def test_a_centre_crop_is_mapped_back_and_nothing_is_shown_outside_it():
    cells = cells_over(spec(geometry="center_crop"), 600, 200)
    heat = cells.heat(hot(7, 2, 4), 600, 200)
    assert peak(heat) == pytest.approx(((200 + 200 * 128.5 / 224) / 600, 64.5 / 224), abs=0.01)
    even = cells.heat(np.full(49, 1 / 49), 600, 200)
    assert even[:, :200].max() == even[:, 400:].max() == 0
    np.testing.assert_allclose(even[:, 200:400], 1 / 49)


def test_the_map_of_any_weights_passes_through_them_and_stays_positive():
    weights = np.random.default_rng(3).dirichlet(np.full(49, 0.3))
    cells = Cells(np.arange(7) * 10 + 5.5, np.arange(7) * 10 + 5.5, (0, 0, 70, 70), (70, 70))
    heat = cells.heat(weights, 70, 70)
    np.testing.assert_allclose(heat[5::10, 5::10].ravel(), weights, atol=1e-12)
    assert heat.min() >= 0
    twice = cells.heat(weights, 140, 140)
    assert np.abs(twice.reshape(70, 2, 70, 2).mean((1, 3)) - heat).max() < 0.02, "the size drawn at changes nothing"


def test_one_cell_and_a_grid_of_an_unknown_encoder():
    one = FeatureSpec("grid", (1, 1), 8, "bf16", None, None)
    np.testing.assert_allclose(cells_over(one, 30, 20).heat(np.ones(1), 30, 20), 1)
    assert unit_centres(FeatureSpec("grid", (2, 2), 8, "bf16", None, None)).tolist() == [
        [0.25, 0.25],
        [0.75, 0.25],
        [0.25, 0.75],
        [0.75, 0.75],
    ]


def test_a_regions_weight_fills_its_box_and_the_greater_wins():
    regions = Regions(np.array([[0, 0, 0.5, 1], [0.25, 0, 1, 0.5], [0, 0, 0, 0]], np.float32))
    heat = regions.heat(np.array([0.3, 0.6, 0.1]), 40, 20)
    assert heat[5, 2] == heat[15, 12] == pytest.approx(0.3) and heat[5, 12] == heat[5, 35] == pytest.approx(0.6)
    assert heat[15, 30] == 0


def test_the_scale_is_the_greatest_weight_but_keeps_even_attention_pale():
    assert even_scale(np.array([[0.2, 0.7, 0.1]] * 2), 49) == pytest.approx(0.7)
    assert even_scale(np.full((3, 49), 1 / 49), 49) == pytest.approx(8 / 49)
    assert even_scale(np.zeros((0, 49)), 49) == pytest.approx(8 / 49) and even_scale(np.ones((1, 1)), 1) == 1


@pytest.mark.parametrize(("width", "height"), [(640, 480), (4000, 100), (100, 4000), (1, 1)])
def test_a_panel_keeps_the_proportions_and_no_side_is_too_long(width, height):
    w, h = panel_size(width, height, 4.6, 4.2)
    assert w / h == pytest.approx(width / height) and max(w, h) <= 4.2 + 1e-9 and w * h <= 4.6 + 1e-9
