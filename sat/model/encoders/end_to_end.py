"""Pixels to captions: an encoder in front of the captioner, for training both.

The surprise: it has the captioner's own methods, with pictures where that has grids, so objectives, decoding and
evaluation do not know which of the two they drive.

B pictures of S x S pixels, L locations, D features; K captions per picture.
"""

import torch
from torch import Tensor, nn

from sat.model.captioner import Captioner, Memory, State
from sat.model.encoders.encoder import GridEncoder


class EndToEnd(nn.Module):
    """Pictures -> words: an encoder and the captioner that reads its grid."""

    def __init__(self, encoder: GridEncoder, captioner: Captioner) -> None:
        super().__init__()
        self.encoder, self.captioner = encoder, captioner

    def grid(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> grid [B, L, D] in the encoder's type."""
        dtype = next(self.encoder.parameters()).dtype
        grid: Tensor = self.encoder(self.encoder.normalise(images).to(dtype, memory_format=torch.channels_last))
        return grid

    def encode(self, images: Tensor, order: Tensor | None = None, regions: Tensor | None = None) -> Memory:
        """As `Captioner.encode`, from `images` uint8 [B, 3, S, S]; those that `order` leaves out are not looked at."""
        assert regions is None, "an encoder of our own gives a grid"
        if order is None:
            return self.captioner.encode(self.grid(images))
        seen, place = order.unique(return_inverse=True)  # in the batch's own order, so that sums over it stay the same
        return self.captioner.encode(self.grid(images[seen]), place)

    @property
    def draws_locations(self) -> bool:
        return self.captioner.draws_locations

    def init_state(self, memory: Memory) -> State:
        return self.captioner.init_state(memory)

    def step(self, memory: Memory, state: State, tokens: Tensor) -> tuple[Tensor, State, Tensor]:
        return self.captioner.step(memory, state, tokens)

    def gate_mean(self, state: State) -> Tensor | None:
        return self.captioner.gate_mean(state)


@torch.inference_mode()
def feature_statistics(encoder: GridEncoder, images: Tensor, chunk: int = 32) -> dict[str, Tensor]:
    """Mean and standard deviation, float32 [D], of what `encoder` now makes of `images` uint8 [B, 3, S, S]."""
    was_training = encoder.training
    encoder.eval()
    count = 0
    total, square = torch.zeros(2, encoder.spec.dim, dtype=torch.float64, device=images.device)
    for part in images.split(chunk):
        grid = encoder(encoder.normalise(part)).double().flatten(0, 1)  # [chunk * L, D]
        total, square, count = total + grid.sum(0), square + grid.square().sum(0), count + len(grid)
    encoder.train(was_training)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
    return {"mean": mean.float(), "std": std.float(), "scale": torch.ones_like(mean, dtype=torch.float32)}
