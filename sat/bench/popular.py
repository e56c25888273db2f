"""The training loop of the popular re-implementation, which `sat bench step` compares with.

As its users run it: 32 captions at a time, longest first, of which each word meets those alone that have one; one copy
of the grid per caption, projected again at every word; the logits of all words; standard Adam.
https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, `models.py` and `train.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

TOGETHER = 32
"""Captions of a batch."""


class PerCaptionLoop(nn.Module):
    """Its decoder (preset `tutorial`), one `nn.LSTMCell` step a word."""

    def __init__(self, vocabulary: int, width: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.project, self.query, self.score = nn.Linear(features, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.init_h, self.init_c = nn.Linear(features, width), nn.Linear(features, width)
        self.gate = nn.Linear(width, features)
        self.cell = nn.LSTMCell(width + features, width)
        self.dropout, self.vocabulary = nn.Dropout(0.5), nn.Linear(width, vocabulary)

    def forward(self, grid: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        """Loss of `captions` [N, T + 1] of `lengths` [N], each with its own copy of the `grid` [N, L, D]."""
        lengths, order = lengths.sort(descending=True)
        grid, captions = grid[order], captions[order]
        words = self.embedding(captions)
        h, c = self.init_h(grid.mean(1)), self.init_c(grid.mean(1))
        running: list[int] = lengths.tolist()
        logits = grid.new_zeros(len(grid), running[0], self.vocabulary.out_features)
        alphas = grid.new_zeros(len(grid), running[0], grid.shape[1])
        for t in range(running[0]):
            n = sum(length > t for length in running)
            hidden = torch.relu(self.project(grid[:n]) + self.query(h[:n])[:, None])
            alpha = self.score(hidden).squeeze(2).softmax(1)
            context = (grid[:n] * alpha[..., None]).sum(1)
            context = torch.sigmoid(self.gate(h[:n])) * context
            h, c = self.cell(torch.cat([words[:n, t], context], 1), (h[:n], c[:n]))
            logits[:n, t] = self.vocabulary(self.dropout(h)).to(logits.dtype)
            alphas[:n, t] = alpha.to(alphas.dtype)
        said = pack_padded_sequence(logits, running, batch_first=True).data
        targets = pack_padded_sequence(captions[:, 1:], running, batch_first=True).data
        return F.cross_entropy(said, targets) + ((1 - alphas.sum(1)) ** 2).mean()


def popular_step(
    model: PerCaptionLoop, features: Tensor, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype, device: str
) -> Callable[[], None]:
    """A function that takes the loop over all captions of the next of `batches`, an optimizer step for every 32.

    `features` [B, L, D] are those of every batch, captions and lengths int64 [B, K, T + 1] and [B, K].
    """
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
    grid = features.to(device).float()
    captions_per_image = batches[0][1].shape[1]
    shuffled = torch.randperm(batches[0][1].numel(), generator=torch.Generator().manual_seed(0)).to(device)
    upcoming = iter([(captions.to(device), lengths.to(device)) for captions, lengths in batches])

    def step() -> None:
        captions, lengths = next(upcoming)
        for part in shuffled.split(TOGETHER):
            mine = lengths.flatten()[part]
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                loss = model(grid[part // captions_per_image], captions.flatten(0, 1)[part], mine)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    return step
