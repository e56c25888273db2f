"""Where cells look: the centre that an encoder says is where its strongest answer to a disc comes from."""

import numpy as np
import pytest
import torch

from preprocessing.features.lite import FAMILY, convert_lite
from sat.model.encoders.encoder import GridEncoder
from sat.model.encoders.folding import pairs
from sat.model.encoders.geometry import measure_centre, pads_one_side
from sat.model.encoders.table import build_encoder, load_encoder
from sat.shards.features import FeatureSpec

SIZE = 224


def centres_of(encoder: GridEncoder) -> np.ndarray:
    spec = encoder.spec
    return FeatureSpec("grid", spec.cells(SIZE), spec.dim, "fp32", spec, None).centres()


def discs(count: int, radius: int) -> tuple[np.ndarray, torch.Tensor]:
    """Places (x, y) [n, 2] and uint8 [n, 3, SIZE, SIZE]: a disc on grey each, wholly inside the picture."""
    places = np.random.default_rng(1).uniform(radius + 32, SIZE - radius - 32, (count, 2))
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = np.stack([(x - px) ** 2 + (y - py) ** 2 <= radius**2 for px, py in places])
    pictures = torch.full((count, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    pictures[torch.from_numpy(inside)[:, None].expand(-1, 3, -1, -1)] = 255
    return places, pictures


@pytest.fixture(scope="module")
def lites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for lite in FAMILY.values():
        convert_lite(lite, folder / f"{lite.name}.safetensors")
    return folder


def encoder_of(name: str, stage: int, lites) -> GridEncoder:
    if name in FAMILY:
        return load_encoder(lites / f"{name}.safetensors", stage=stage)
    torch.manual_seed(0)
    return build_encoder(name, stage).requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("name", "stage", "stride", "first"),
    [
        ("resnet50", 0, 32, 0),
        ("resnet50", 2, 8, 0),
        ("lite0", 0, 32, 18),  # as its file says of these weights
        ("lite0", 4, 16, 9),
        ("lite2", 0, 32, 26),
        ("timm/tf_efficientnet_lite0", 0, 32, 31),
        ("timm/tf_efficientnet_lite0", 4, 16, 15),
        ("timm/vit_tiny_patch16_224", 0, 16, 7.5),
        ("timm/vit_base_patch32_clip_224", 3, 32, 15.5),
        ("timm/convnext_atto", 0, 32, 15.5),
        ("timm/efficientnet_b0", 0, 32, 0),
        ("timm/swin_tiny_patch4_window7_224", 0, 32, 15.5),
    ],
)
def test_stride_and_first_centre_are_those_of_the_convolutions_unless_the_file_says_more(
    name, stage, stride, first, lites
):
    spec = encoder_of(name, stage, lites).spec
    assert (spec.stride, spec.first_centre) == (stride, first)


@pytest.mark.parametrize(
    ("name", "stage", "radius"),
    [
        ("resnet50", 0, 5),
        ("lite0", 5, 12),
        ("lite0", 4, 12),
        ("lite2", 4, 12),
        ("timm/vit_tiny_patch16_224", 0, 5),
        ("timm/convnext_atto", 0, 5),
    ],
)
def test_the_strongest_cell_is_the_one_whose_centre_is_nearest_to_the_disc(name, stage, radius, lites):
    encoder = encoder_of(name, stage, lites)
    places, answer = answers(encoder, radius)
    centres = centres_of(encoder)
    distance = np.linalg.norm(places[:, None] - centres[None], axis=2)  # [n, L]
    strongest = distance[np.arange(len(places)), answer.argmax(1)]
    # The peak is the nearest cell, or, for a disc near the border of two cells, its neighbour.
    assert (strongest <= distance.min(1) + 0.25 * encoder.spec.stride).mean() >= 0.85
    drift = drift_of(encoder, places, answer)
    assert np.abs(drift).max() < 0.25 * encoder.spec.stride, "the centres lie to one side of the answers"


def answers(encoder: GridEncoder, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of 16 discs, and how far each moves the features of every cell [16, L]."""
    places, pictures = discs(16, radius)
    with torch.inference_mode():
        grid = encoder(encoder.normalise(pictures))
        empty = encoder(encoder.normalise(torch.full_like(pictures[:1], 128)))
    return places, (grid - empty).norm(dim=2).numpy()


def drift_of(encoder: GridEncoder, places: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Pixels (x, y) from the discs to the middle of the answers, on average."""
    weights = answer**4 / (answer**4).sum(1, keepdims=True)
    return (weights @ centres_of(encoder) - places).mean(0)


@pytest.mark.parametrize("radius", [5, 12])
def test_lite2s_last_cells_answer_around_the_disc_where_its_file_says(radius, lites):
    """Its answer is wide, so the strongest cell is seldom the nearest; its middle is what attention is drawn by."""
    encoder = encoder_of("lite2", 5, lites)
    assert np.abs(drift_of(encoder, *answers(encoder, radius))).max() < encoder.spec.stride / 8


@pytest.mark.parametrize(("name", "stage"), [("lite0", 0), ("lite0", 3), ("lite0", 4), ("lite2", 3), ("lite2", 4)])
def test_a_lite_looks_where_its_file_says_by_the_gradient(name, stage, lites):
    """Its padding alone would put the cells half a cell further right and down; training made up for it."""
    encoder = encoder_of(name, stage, lites)
    assert pads_one_side(encoder) and not pads_one_side(build_encoder("resnet50", 1))
    assert abs(measure_centre(encoder, 4) - encoder.spec.first_centre) <= encoder.spec.stride / 8


def test_the_gradient_finds_the_centre_of_a_network_without_such_padding():
    encoder = encoder_of("resnet50", 2, None)
    assert abs(measure_centre(encoder, 2) - encoder.spec.first_centre) <= encoder.spec.stride / 4


@pytest.mark.parametrize("name", ["resnet50", "timm/tf_efficientnet_lite0", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_an_encoder_gives_does_not_go_with_the_type_that_it_computes_in(name, dtype):
    wide, narrow = (build_encoder(name, 0).requires_grad_(False).eval().to(each) for each in (torch.float32, dtype))
    assert narrow.spec == wide.spec
    if "vit" not in name:
        assert pairs(narrow) == pairs(wide) != []
