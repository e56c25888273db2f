"""Pixels to captions: the ResNet-50 in front of the captioner, for training both.

The surprise: it has the captioner's own methods, with pictures where that has grids, so training, decoding and
evaluation do not know which of the two they drive.

B pictures of S x S pixels, L = (S / 32)^2 locations, D features; K captions per picture.
"""

import torch
from torch import Tensor, nn

from sat.model.captioner import Captioner, Memory, State
from sat.model.encoders.resnet import Encoder, normalise
from sat.model.loss import LossSums


class EndToEnd(nn.Module):
    def __init__(self, encoder: Encoder, captioner: Captioner) -> None:
        super().__init__()
        self.encoder, self.captioner = encoder, captioner

    def forward(self, images: Tensor, captions: Tensor, lengths: Tensor, sampling_probability: float = 0.0) -> LossSums:
        """`images` uint8 [B, 3, S, S]; the rest as `Captioner.forward`. Pictures without captions are not looked at."""
        shown = lengths.amax(1) > 0
        if shown.any():
            grid = self.grid(images[shown])
        else:  # every parameter is still reached, as by the other ranks, but no BatchNorm moves
            mode, shown = self.encoder.training, slice(1)
            self.encoder.eval()
            grid = self.grid(images[shown])
            self.encoder.train(mode)
        return self.captioner(grid, captions[shown], lengths[shown], sampling_probability)

    def grid(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> grid [B, L, D] in the encoder's type."""
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(normalise(images).to(dtype, memory_format=torch.channels_last))

    def encode(self, images: Tensor) -> Memory:
        return self.captioner.encode(self.grid(images))

    def init_state(self, memory: Memory) -> State:
        return self.captioner.init_state(memory)

    def step(self, memory: Memory, state: State, tokens: Tensor) -> tuple[Tensor, State, Tensor]:
        return self.captioner.step(memory, state, tokens)

    def update_baseline(self, mean_nll: float) -> None:
        self.captioner.update_baseline(mean_nll)


@torch.inference_mode()
def feature_statistics(encoder: Encoder, images: Tensor, chunk: int = 32) -> dict[str, Tensor]:
    """Mean and standard deviation of each feature, float32 [D], over `images` uint8 [B, 3, S, S] as `encoder` sees them now."""
    was_training = encoder.training
    encoder.eval()
    total = square = count = 0
    for part in images.split(chunk):
        grid = encoder(normalise(part)).double().flatten(0, 1)  # [chunk * L, D]
        total, square, count = total + grid.sum(0), square + grid.square().sum(0), count + len(grid)
    encoder.train(was_training)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
    return {"mean": mean.float(), "std": std.float(), "scale": torch.ones_like(mean, dtype=torch.float32)}
