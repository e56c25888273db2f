"""timm's backbones as encoders: whole files fit, stages open and stay frozen, folding and fusing change nothing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from preprocessing.features import network
from preprocessing.features.fused import PackedConvolution
from preprocessing.features.network import fast_forward
from preprocessing.features.writing import write_weights
from sat import files
from sat.captioning import find_encoder
from sat.machine import best_precision
from sat.model.encoders.folding import fold_batchnorm
from sat.model.encoders.table import blueprint, build_encoder, load_encoder, parameters_of
from sat.model.encoders.weights import AboutWeights, read_about

SMALL = "timm/tf_efficientnet_lite0"


def shaken(architecture: str, stage: int = 0) -> nn.Module:
    """An encoder whose BatchNorms are not trivial, frozen."""
    torch.manual_seed(0)
    encoder = build_encoder(architecture, stage)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder.requires_grad_(False).eval()


@pytest.mark.parametrize("architecture", [SMALL, "timm/efficientnet_b0", "timm/resnet18", "timm/convnext_atto"])
def test_folding_and_fusing_keep_the_grid(architecture):
    encoder, images = shaken(architecture), torch.randn(2, 3, 64, 64)
    folded = fold_batchnorm(encoder)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    fast = fast_forward(encoder, 64, "fp32", "cpu", 0)
    assert torch.backends.mkldnn.is_available() is any(isinstance(m, PackedConvolution) for m in fast.modules())
    with torch.inference_mode():
        expected = encoder(images)
        for each in (folded, fast):
            found = each(images.to(memory_format=torch.channels_last))
            assert found.shape == expected.shape and (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("compute", sorted({"fp32", best_precision()}))
@pytest.mark.parametrize("architecture", [SMALL, "timm/convnext_atto"])
def test_a_batch_in_pieces_gives_the_bits_of_the_whole(architecture, compute, tmp_path, monkeypatch):
    encoder, weights, sizes = shaken(architecture), tmp_path / "w.safetensors", []
    write_weights(parameters_of(encoder), weights, AboutWeights(architecture), "")
    pictures = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)

    def watched(*about):
        forward = fast_forward(*about)
        return lambda images: sizes.append(len(images)) or forward(images)

    monkeypatch.setattr(network, "fast_forward", watched)
    run = network.load_network(weights, 0, 64, compute)
    whole = run(pictures)
    monkeypatch.setattr(network, "_at_once", lambda size: 3)
    assert np.array_equal(run(pictures), whole) and sizes == [7, 3, 3, 1]


def test_the_pieces_of_a_batch_grow_with_the_threads_and_shrink_with_the_pictures(monkeypatch):
    for threads, size, pictures in [(1, 224, 8), (2, 224, 16), (1, 448, 2), (1, 1024, 1)]:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert network._at_once(size) == pictures


def test_a_file_of_timms_fits_with_its_classifier_and_is_cut_at_a_stage(tmp_path):
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    write_weights(whole.state_dict(), tmp_path / "w.safetensors", AboutWeights(SMALL), "")
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        last = load_encoder(tmp_path / "w.safetensors")(images)
        torch.testing.assert_close(last, whole.forward_features(images).flatten(2).transpose(1, 2))
        cut = load_encoder(tmp_path / "w.safetensors", stage=4)
        expected = whole.forward_intermediates(images, indices=[3], intermediates_only=True)[0]
        torch.testing.assert_close(cut(images), expected.flatten(2).transpose(1, 2))
    assert len(list(cut.parameters())) < len(list(whole.parameters()))
    broken = {name: t for name, t in whole.state_dict().items() if name != "blocks.1.0.conv_dw.weight"} | {
        "x": torch.zeros(1)
    }
    save_file(broken, tmp_path / "odd.safetensors", AboutWeights(SMALL).to_metadata())
    with pytest.raises(
        ValueError, match=r"timm's names: keys 1 missing \(blocks.1.0.conv_dw.weight\); 1 unknown \(x\)"
    ):
        load_encoder(tmp_path / "odd.safetensors")


def test_class_tokens_are_dropped_and_a_fixed_size_is_refused_by_a_sentence(tmp_path):
    encoder = shaken("timm/vit_tiny_patch16_224")
    write_weights(parameters_of(encoder), tmp_path / "vit.safetensors", AboutWeights(encoder.architecture), "")
    assert blueprint(tmp_path / "vit.safetensors", 0, 224).spec.cells(224) == (14, 14)
    with pytest.raises(ValueError, match="takes pictures of 224 x 224 pixels alone, not 448"):
        blueprint(tmp_path / "vit.safetensors", 0, 448)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), encoder.network.forward_features(images)[:, 1:])


@pytest.mark.parametrize(
    ("architecture", "stage", "message"),
    [
        ("vgg19", 0, "architecture 'vgg19' is unknown; choose one of resnet50, resnet101, resnet152 or timm/NAME"),
        ("timm/no_such_net", 0, "timm has no backbone 'no_such_net'"),
        (SMALL, 6, "stage 6 of timm/tf_efficientnet_lite0 does not exist; choose one of 1 to 5, or 0"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_choices(architecture, stage, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(architecture, stage)


@pytest.mark.parametrize("architecture", [SMALL, "timm/convnext_atto", "timm/vit_tiny_patch16_224"])
def test_only_the_open_stages_get_gradients_and_the_stages_hold_the_whole_network(architecture):
    encoder = shaken(architecture)
    last = encoder.stages[-1]
    size = encoder.pixels.size if encoder.fixed_size else 64
    encoder.open_for_training([last], freeze_batchnorm=False).train()
    encoder(torch.randn(2, 3, size, size)).square().mean().backward()
    with_gradient = {id(p) for p in encoder.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in encoder.stage_module(last).parameters()}
    in_stages = [id(p) for stage in encoder.stages for p in encoder.stage_module(stage).parameters()]
    outside = [name for name, p in encoder.named_parameters() if id(p) not in in_stages]
    assert len(in_stages) == len(set(in_stages))
    assert all(name in ("network.cls_token", "network.pos_embed") for name in outside), outside
    opened = encoder.open_for_training([])
    assert not any(p.requires_grad for p in opened.stage_module(1).parameters())
    assert any(p.requires_grad for p in opened.stage_module(2).parameters())
    with pytest.raises(ValueError, match="cannot open stages"):
        encoder.open_for_training([99])


def test_frozen_batchnorms_stay_and_checkpointing_changes_neither_gradients_nor_statistics():
    images = torch.randn(2, 3, 64, 64)
    frozen = shaken(SMALL)
    before = copy.deepcopy(frozen.state_dict())
    frozen.open_for_training([4, 5], freeze_batchnorm=True).train()(images)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    plain = shaken(SMALL).open_for_training([4, 5], freeze_batchnorm=False).train()
    saving = shaken(SMALL).open_for_training([4, 5], freeze_batchnorm=False, checkpointing=True).train()
    for encoder in (plain, saving):
        encoder(images).square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    state = saving.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())


def test_captioning_finds_an_encoder_of_any_architecture_by_its_digest(tmp_path):
    encoder = shaken(SMALL, 2)
    write_weights(parameters_of(encoder), tmp_path / "b.safetensors", AboutWeights(SMALL), "")
    write_weights(parameters_of(shaken("resnet50", 1)), tmp_path / "a.safetensors", AboutWeights("resnet50"), "")
    wanted = replace(encoder.spec, weights_sha256=files.sha256(tmp_path / "b.safetensors"))
    found = find_encoder(wanted, tmp_path)
    images = torch.randn(1, 3, 64, 64)
    assert found.architecture == SMALL and torch.equal(found(images), encoder(images))
    with pytest.raises(ValueError, match="no encoder with SHA-256 000000000000.*--weights FILE"):
        find_encoder(replace(wanted, weights_sha256="0" * 64), tmp_path)


def test_metadata_that_cannot_be_read_is_refused(tmp_path):
    for key, value in (("mean", "[1, 2]"), ("size", "x"), ("interpolation", '"lanczos"'), ("first_centres", "[1]")):
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {key: value})
        with pytest.raises(ValueError, match=r"w\.safetensors: its metadata cannot be read"):
            read_about(tmp_path / "w.safetensors")
