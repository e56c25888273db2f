"""Captions drawn from the model's own distribution, over all words of the vocabulary: what a policy gradient needs.

A sample is a function of its key and of the weights alone: each word has a number of its own in [0, 1), which falls to
a word by its share. In train mode dropout takes part by the same keys as where the samples are scored again, so they
are drawn from the very distribution that is scored. Surprising: nothing is left out of the vocabulary, `<unk>` and
`<pad>` are words like any other; what is never drawn could not be unlearnt.

B images, n samples of each, k = n and 1 if there is a greedy caption too, V words, T steps.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sat.model.captioner import END, START, Captioner, Memory, State
from sat.model.draws import Site, at_step, uniform


class Samples(NamedTuple):
    """Captions as an objective takes them."""

    captions: Tensor
    """int64 [B, k, T + 1]: `<start>`, the words, `<end>` unless it was cut; zeros follow. The greedy one comes last."""
    lengths: Tensor
    """int64 [B, k], at least 1: words, and `<end>`."""

    def cpu(self) -> "Samples":
        """On the host; waits for the device."""
        return Samples(self.captions.cpu(), self.lengths.cpu())

    def listed(self) -> list[list[list[int]]]:
        """The words, and `<end>`, of each image's captions."""
        pairs = zip(self.captions[..., 1:].tolist(), self.lengths.tolist(), strict=True)
        return [[words[:length] for words, length in zip(*image, strict=True)] for image in pairs]


@torch.no_grad()
def draw_samples(model: Captioner, memory: Memory, keys: Tensor, max_length: int, greedy: bool) -> Samples:
    """A caption of at most `max_length` words for each of int64 `keys` [B, n], and the greedy one where asked for.

    `memory` as `Captioner.for_decoding` leaves it. The greedy one knows no dropout. Raises ValueError where the model's
    logits are not finite.
    """
    size, k, device = len(keys), keys.shape[1] + greedy, keys.device
    captions = torch.zeros(size, k, max_length + 1, dtype=torch.int64, device=device)
    captions[..., 0] = START
    lengths = torch.zeros(size, k, dtype=torch.int64, device=device)
    images, ended = torch.arange(size, device=device), torch.zeros(size, k, dtype=torch.bool, device=device)
    state, tokens = _begin(model, memory, keys, greedy), captions[..., 0]
    for step in range(max_length):
        logits, state, _ = model.step(memory, state, tokens, partial(_dropped, model, keys, step))
        tokens = choose(logits, uniform(at_step(keys, Site.SAMPLED_WORD, step)))
        lengths[images] += ~ended
        captions[images, :, step + 1] = tokens.masked_fill(ended, 0)
        ended = ended | (tokens == END)
        there = ~ended.all(1)
        if not there.any():
            break
        if not there.all():  # images all of whose captions have ended leave the batch
            images, ended, keys, tokens = images[there], ended[there], keys[there], tokens[there]
            memory, state = memory.pick(there), State(state.h[there], state.c[there])
    return Samples(captions[..., : int(lengths.max()) + 1 if size else 1], lengths)


def choose(logits: Tensor, numbers: Tensor) -> Tensor:
    """The word that each of float64 `numbers` [B, n] falls to by the words' shares; of a k-th row the best: [B, k].

    `logits` [B, k, V].
    """
    n = numbers.shape[1]
    ends = logits[:, :n].softmax(-1).double().cumsum(-1)
    if ends[..., -1].isnan().any():
        raise ValueError("the model's logits are not finite (NaN or inf): its weights or the features are broken")
    place = torch.searchsorted(ends, numbers[..., None] * ends[..., -1:], right=True).squeeze(-1)
    words = place.clamp(max=logits.shape[-1] - 1)
    return torch.cat([words, logits[:, n:].argmax(-1)], 1)


def _begin(model: Captioner, memory: Memory, keys: Tensor, greedy: bool) -> State:
    """The state [B, k, H] before the first word; dropout is the image's, by the key of its first sample."""
    drawn = model.init_state(memory, lambda site: at_step(keys[:, 0], site, 0))
    parts = [[each.expand(-1, keys.shape[1], -1) for each in drawn]]
    if greedy:
        parts.append(list(model.init_state(memory)))
    return State(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))


def _dropped(model: Captioner, keys: Tensor, step: int, features: Tensor) -> Tensor:
    """`features` [B, k, W] of a step after dropout, but for the greedy caption's."""
    n = keys.shape[1]
    drawn = model.dropped(features[:, :n].contiguous(), lambda site: at_step(keys, site, step), Site.OUTPUT)
    return torch.cat([drawn, features[:, n:]], 1)
