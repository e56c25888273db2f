"""The encoder: torchvision's numbers, honest errors, and a frozen part that stays frozen."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet50
from torchvision.transforms.functional import normalize

from sat.model.encoders.folding import fold_batchnorm
from sat.model.encoders.resnet import ResNet
from sat.model.encoders.table import build_encoder, load_encoder


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """torchvision's own ResNet-50 with statistics and affine parameters far from their initial values."""
    torch.manual_seed(0)
    network = resnet50(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def weights_file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet50.safetensors"
    save_file(reference.state_dict(), path)
    return path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def gradients(encoder: ResNet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    encoder(images).square().mean().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_grid_is_torchvisions_feature_map_in_row_major_order(stage, reference, weights_file, images):
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
    for number in range(1, stage + 1):
        x = getattr(reference, f"layer{number}")(x)
    encoder = load_encoder(weights_file, stage=stage)
    grid = encoder(images)
    assert grid.shape == (2, (64 * 96) // 4 ** (stage + 1), encoder.spec.dim)
    width = 96 // 2 ** (stage + 1)
    for cell in range(0, grid.shape[1], max(1, grid.shape[1] // 7)):
        torch.testing.assert_close(grid[:, cell], x[:, :, cell // width, cell % width])


def test_normalise_is_imagenets():
    normalise = build_encoder("resnet50", 1).normalise
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    torch.testing.assert_close(normalise(pixels), normalize(pixels / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with pytest.raises(ValueError, match="uint8"):
        normalise(pixels.float())


def test_loaded_encoder_is_frozen_and_classifier_is_optional(reference, weights_file, tmp_path, images):
    without = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.") and "num_batches" not in k}
    save_file(without, tmp_path / "short.safetensors")
    encoder = load_encoder(tmp_path / "short.safetensors")
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(encoder(images), load_encoder(weights_file)(images), rtol=0, atol=0)


def test_loading_draws_no_first_weights_that_the_files_replace(weights_file):
    before = torch.random.get_rng_state()
    load_encoder(weights_file)
    assert torch.equal(torch.random.get_rng_state(), before)
    build_encoder("resnet50")
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_a_file_that_does_not_fit_is_refused_with_the_keys(reference, tmp_path):
    weights = {k: v for k, v in reference.state_dict().items() if k != "layer2.1.conv3.weight"}
    weights["head.weight"] = torch.zeros(1)
    weights["bn1.bias"] = torch.zeros(3)
    path = tmp_path / "odd.safetensors"
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"1 missing \(layer2.1.conv3.weight\); 1 unknown \(head.weight\).*bn1.bias"):
        load_encoder(path)
    del weights["head.weight"], weights["bn1.bias"]
    save_file({**weights, "bn1.bias": torch.zeros(64)}, path)
    assert load_encoder(path, stage=1).stage == 1  # the missing key belongs to a stage that is not kept


def test_a_missing_or_broken_file_is_refused_with_the_way_out(weights_file, tmp_path):
    with pytest.raises(
        ValueError, match="absent.safetensors do not exist; make them with .*fetch_weights resnet50 --out"
    ):
        load_encoder(tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="broken.safetensors is not a whole"):
        load_encoder(broken)
    with pytest.raises(ValueError, match="stage 5"):
        build_encoder("resnet50", stage=5)


def test_folding_batchnorm_keeps_the_grid(weights_file, images):
    encoder = load_encoder(weights_file)
    folded = fold_batchnorm(encoder)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    torch.testing.assert_close(folded(images), encoder(images), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="eval mode"):
        fold_batchnorm(encoder.open_for_training([4], freeze_batchnorm=False).train())


def test_only_the_open_stages_get_gradients(weights_file, images):
    encoder = load_encoder(weights_file).open_for_training([3, 4]).train()
    grads = gradients(encoder, images)
    assert grads and all(name.startswith(("layer3.", "layer4.")) for name in grads)
    assert not any(".bn" in name or "downsample.1" in name for name in grads)
    assert {name.split(".")[0] for name, p in encoder.named_parameters() if p.requires_grad} == {"layer3", "layer4"}
    with pytest.raises(ValueError, match=r"stages \[4\]"):
        load_encoder(weights_file, stage=3).open_for_training([4])


def test_frozen_batchnorm_never_moves_in_train_mode(weights_file, images):
    encoder = load_encoder(weights_file)
    before = copy.deepcopy(encoder.state_dict())
    frozen = encoder.open_for_training([2, 3, 4], freeze_batchnorm=True).train()
    expected = load_encoder(weights_file)(images)
    torch.testing.assert_close(frozen(images), expected, rtol=0, atol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


def test_open_batchnorm_moves_only_in_the_open_stages(weights_file, images):
    encoder = load_encoder(weights_file)
    before = copy.deepcopy(encoder.state_dict())
    encoder.open_for_training([4], freeze_batchnorm=False).train()(images)
    moved = {name for name, tensor in encoder.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all(name.startswith("layer4.") for name in moved)
    assert "layer4.0.bn1.weight" in gradients(encoder, images)


@pytest.mark.parametrize("freeze_batchnorm", [True, False])
def test_checkpointing_changes_neither_gradients_nor_statistics(freeze_batchnorm, weights_file, images):
    plain = load_encoder(weights_file).open_for_training([3, 4], freeze_batchnorm).train()
    saving = load_encoder(weights_file).open_for_training([3, 4], freeze_batchnorm, checkpointing=True).train()
    expected, actual = gradients(plain, images), gradients(saving, images)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=name)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
