"""Beam search on a GPU without Python between the words: one step is recorded as a CUDA graph, the others replay it.

A step is some hundred and fifty small launches, each dearer for Python than its work is for the GPU. Surprising: images
whose captions are settled stay in the batch, as a graph's sizes are fixed; what their other slots go on with comes
behind what settled them, so the captions are those of a search that lets them go.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sat.evaluation.beams import (
    Beams,
    Hypothesis,
    advance,
    are_settled,
    best_continuations,
    best_words,
    block_words,
    collect,
    log_probs,
    never_said,
    nothing_said,
    pick,
    refuse_broken,
)
from sat.evaluation.options import DecodeOptions
from sat.model.captioner import Memory, State
from sat.model.kernels import triton_kernels
from sat.model.recording import Record, record_on_gpu
from sat.text import END, START

AT_ONCE = 16
"""Most words that are searched for one after the other in one program."""
LOOKS_EVERY = 4
"""Steps from one look at whether all captions are settled to the next: the host waits for the GPU then."""


class Steps(Protocol):
    """What such a search needs of a model."""

    def init_state(self, memory: Memory) -> State:
        """The state before the first word, of one beam per image: [B, 1, ...]."""

    def step(self, memory: Memory, state: State, tokens: Tensor) -> tuple[Tensor, State, Tensor]:
        """Feed `tokens` int64 [B, k]: logits [B, k, V], the new state [B, k, ...] and attention [B, k, L]."""


def recorder(memory: Memory, options: DecodeOptions) -> Record | None:
    """What records a search through `memory`; None where it is not served: on a CPU, or not by kernels of our own.

    Words that are drawn, kept attention and n-grams that are blocked are served word by word alone.
    """
    plain = options.method != "sample" and not (options.keep_attention or options.block_ngram)
    if not plain or memory.grid.device.type != "cuda" or not memory.prepared.numel() or memory.keys is not None:
        return None
    return _recorder(torch.cuda.current_device())


@functools.cache
def _recorder(device: int) -> Record:
    """Of the current `device`; what is recorded later takes the memory of what is done."""
    del device
    return record_on_gpu()


class _Search:
    """Its state, which stays where it is."""

    def __init__(self, model: Steps, memory: Memory, options: DecodeOptions) -> None:
        (images, *_), device = memory.grid.shape, memory.grid.device
        self._model, self._memory, self._options = model, memory, options
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        begin = nothing_said(images, options.max_length, device)
        first = torch.full((images, 1), START, device=device)
        self.beams, self._state, self._tokens = self._next(begin, model.init_state(memory), first)

    def _next(self, beams: Beams, state: State, tokens: Tensor) -> tuple[Beams, State, Tensor]:
        logits, after, _ = self._model.step(self._memory, state, tokens)
        values, words = _best_words(logits, self._options)
        self.broken |= values.isnan().any()
        chosen = best_continuations(values, words, beams, self._options.width)
        beams = advance(beams, self._at, chosen)
        self._at += 1
        rows = torch.arange(len(chosen.parents), device=chosen.parents.device)[:, None]
        return beams, pick(after, (rows, chosen.parents)), chosen.words

    def step(self) -> None:
        """One word on, in place."""
        beams, state, tokens = self._next(self.beams, self._state, self._tokens)
        mine = (*self.beams[1:], *self._state, self._tokens)  # but for the images, which stay
        for here, found in zip(mine, (*beams[1:], *state, tokens), strict=True):
            here.copy_(found)


def search_replayed(model: Steps, memory: Memory, options: DecodeOptions, record: Record) -> list[list[Hypothesis]]:
    """The captions of every image of `memory`, as `sat.evaluation.decoding.decode` gives them."""
    search = _Search(model, memory, options)
    play: Callable[[], object] | None = None
    for step in range(1, options.max_length):
        if play is None:
            with _without_cached_casts(memory.grid.device.type):
                play = record(search.step)
        else:
            play()
        if step % LOOKS_EVERY == 0 and are_settled(search.beams, options).all():
            break
    refuse_broken(search.broken)
    captions: list[list[Hypothesis]] = [[] for _ in range(len(memory.grid))]
    for image, found in collect(search.beams, None, options):
        captions[image] = found
    return captions


def _best_words(logits: Tensor, options: DecodeOptions) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the best words for each slot of `logits` [B, k, V], in order of ids; NaN: broken."""
    V, count = logits.shape[-1], min(options.width, logits.shape[-1])
    if logits.device.type == "cuda" and V <= triton_kernels.MOST_WORDS and count <= AT_ONCE:
        return triton_kernels.best_words(logits, never_said(options), count)
    logp = log_probs([logits])
    broken = logp[..., END].isnan()
    block_words(logp, logp.new_empty(0), options)
    values, words = best_words(logp, options.width)
    return values.masked_fill(broken[..., None], math.nan), words


def _without_cached_casts(device: str) -> torch.autocast:
    """Autocast as it is, but each weight is cast where it is used: a graph must not hold a cast that goes away."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
