"""Rows without an image weigh nothing in end-to-end training either, where a BatchNorm could see them."""

import copy

import pytest
import torch

from sat.model.captioner import Captioner
from sat.model.encoders.end_to_end import EndToEnd
from sat.model.encoders.resnet import ResNet
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import CaptionerSpec, Sizes


@pytest.mark.parametrize("shown", [2, 0])
def test_pictures_without_captions_change_neither_loss_nor_gradients_nor_statistics(shown):
    torch.manual_seed(0)
    encoder = ResNet(stage=1).open_for_training([1], freeze_batchnorm=False)
    spec = CaptionerSpec.of_preset("tutorial", embedding_dim=4, lstm_dim=4, attention_dim=4, dropout=0.0)
    captioner = Captioner(spec, Sizes(11, 64, 256))
    padded = EndToEnd(encoder, captioner).train()
    plain = copy.deepcopy(padded)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images[shown:] = 0
    captions, lengths = torch.randint(4, 11, (4, 2, 5)), torch.tensor([[4, 2], [3, 1], [2, 2], [1, 1]])
    lengths[shown:] = 0
    before = copy.deepcopy(padded.state_dict())
    sums = TeacherForcing(padded)(images, captions, lengths)
    total_loss(sums, torch.tensor(10), torch.tensor(4)).backward()
    assert all(p.grad is not None for p in padded.parameters() if p.requires_grad)
    if shown:
        expected = TeacherForcing(plain)(images[:shown], captions[:shown], lengths[:shown])
        total_loss(expected, torch.tensor(10), torch.tensor(4)).backward()
        assert torch.equal(sums.per_token, expected.per_token)
        assert all(
            torch.equal(a.grad, b.grad) for a, b in zip(padded.parameters(), plain.parameters()) if a.requires_grad
        )
        assert all(torch.equal(a, b) for a, b in zip(padded.buffers(), plain.buffers(), strict=True))
        assert padded.encoder.layer1[0].bn1.running_mean.ne(before["encoder.layer1.0.bn1.running_mean"]).any()
    else:
        assert all(torch.equal(value, before[name]) for name, value in padded.state_dict().items())
        assert padded.encoder.layer1[0].bn1.training
