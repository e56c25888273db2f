"""Grids in, captions out: beam search, greedy and sampling over many images at once, for one model or an ensemble.

All three are one loop. Every image owns `width` slots; a step scores the next words of all slots of all images in one
model call, a rule picks what fills the slots, and images whose best captions are settled leave the batch. The
surprising decision: a caption that ends keeps its slot, so its image goes on with one beam fewer, as in the code of
the paper's authors (https://github.com/kelvinxu/arctic-captions, `gen_sample`); so width 1 is always greedy.

Shapes: B images, n of them still open, k slots per image (1 before the first word), V words, L grid cells, T steps.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sat.evaluation.beams import (
    Beams,
    Continuations,
    Hypothesis,
    Trace,
    advance,
    are_settled,
    best_continuations,
    best_words,
    block_words,
    collect,
    drawn_continuations,
    log_probs,
    never_said,
    nothing_said,
    pick,
    refuse_broken,
)
from sat.evaluation.options import DecodeOptions
from sat.evaluation.replayed_search import recorder, search_replayed
from sat.model.captioner import Memory, State
from sat.model.draws import derive
from sat.model.kernels import native
from sat.text import END, START

BEAM_SEARCH = DecodeOptions()
CACHE_BYTES = {"cpu": 32 << 20}
"""Where attention's hidden layer [images, slots, L, A] is written out, it may take this much; other devices: 1 GiB."""


class Decodable(Protocol):
    """What decoding needs of a model: a `Captioner`, or one with its encoder in front."""

    training: bool

    @property
    def draws_locations(self) -> bool:
        """Whether a step looks where the keys of its `Memory` decide; they are to be others at each word."""

    def encode(self, grid: Tensor, order: Tensor | None = None, regions: Tensor | None = None) -> Memory:
        """What is computed once per image; of every tensor the first dimension is the image."""

    def init_state(self, memory: Memory) -> State:
        """The state before the first word, of one beam per image: [B, 1, ...]."""

    def step(self, memory: Memory, state: State, tokens: Tensor) -> tuple[Tensor, State, Tensor]:
        """Feed `tokens` int64 [B, k]: logits [B, k, V], the new state [B, k, ...] and attention [B, k, L]."""

    def gate_mean(self, state: State) -> Tensor | None:
        """How far the gate on what is seen will be open in the step from `state`, [B, k] in 0..1; None without one."""


@torch.inference_mode()
def decode(
    models: Decodable | Sequence[Decodable],
    grid: Tensor,
    options: DecodeOptions = BEAM_SEARCH,
    image_ids: Sequence[str] | None = None,
    regions: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """The `n_best` captions of every image of `grid` [B, L, D], best first: finished ones, then unfinished ones.

    `grid` is what `models` encode: features as stored, or uint8 pictures [B, 3, S, S] for `EndToEnd`; with `regions`
    int64 [B] only the first so many locations of an image are real, and the others get no attention. Several models
    vote by the mean of their probabilities (float32); alphas are averaged too. An image gets fewer captions only where
    fewer exist. `<pad>` and `<start>` are never chosen, blocked words keep their share of the probability: scores are
    true log-probabilities. Equal scores go to the lower slot, then the lower word id, so captions do not depend on
    which images share a batch, except where the rounding of a matrix product decides. `image_ids`, one per image, is
    needed to sample words, and where hard attention samples its locations: with the seed it decides all draws.

    Raises ValueError for a model in training mode, an ensemble of different vocabularies or logits that are not finite.
    """
    models = list(models) if isinstance(models, Sequence) else [models]
    _check(models, grid)
    uniforms = _uniforms(options, image_ids, len(grid)).to(grid.device) if options.method == "sample" else None
    more = {} if regions is None else {"regions": regions}
    memories = [model.encode(grid, **more) for model in models]  # once per image, not per word
    for number, model in enumerate(models):
        if model.draws_locations:
            keys = _location_keys(options.seed, number, _named(image_ids, len(grid)))
            memories[number] = memories[number]._replace(keys=keys.to(grid.device))
    if len(models) == 1 and (record := recorder(memories[0], options)):
        return search_replayed(models[0], memories[0], options, record)
    size = _images_per_chunk(memories, options.width)
    captions: list[list[Hypothesis]] = []
    for start in range(0, len(grid), size):
        chunk = slice(start, start + size)
        numbers = None if uniforms is None else uniforms[chunk]
        captions += _search(models, [pick(memory, chunk) for memory in memories], options, numbers)
    return captions


def _check(models: list[Decodable], grid: Tensor) -> None:
    if not models:
        raise ValueError("decode needs at least one model")
    if any(model.training for model in models):
        raise ValueError("a model is in training mode, dropout would change its captions; call model.eval() first")
    if grid.dim() not in (3, 4):
        raise ValueError(
            f"grid must be [B, L, D], or pictures [B, 3, S, S] for EndToEnd; got shape {tuple(grid.shape)}"
        )


def _images_per_chunk(memories: list[Memory], width: int) -> int:
    """Images searched together: all, unless attention writes out its hidden layer; then as many as its cache holds."""
    if all(memory.prepared.numel() for memory in memories):
        return len(memories[0].grid)  # the fused kernel serves: more rows make better matrix products
    hidden = max(math.prod(memory.projection.shape[1:]) for memory in memories)  # L * A; 0 without attention
    cache: int = CACHE_BYTES.get(memories[0].grid.device.type, 1 << 30)
    return max(1, cache // max(1, 4 * width * hidden))


def _search(
    models: list[Decodable], memories: list[Memory], options: DecodeOptions, uniforms: Tensor | None
) -> list[list[Hypothesis]]:
    (size, cells), device = memories[0].grid.shape[:2], memories[0].grid.device
    beams = nothing_said(size, options.max_length, device)
    states = [model.init_state(memory) for model, memory in zip(models, memories, strict=True)]
    tokens = torch.full((size, 1), START, device=device)
    trace = _empty_trace(options, size, cells, device) if options.keep_attention else None
    captions: list[list[Hypothesis]] = [[] for _ in range(size)]
    native_serves = bool(memories[0].prepared.numel()) and device.type == "cpu"
    at_once = len(models) == 1 and native_serves
    for step in range(options.max_length):
        together = zip(models, memories, states, strict=True)
        outputs = [model.step(memory, state, tokens) for model, memory, state in together]
        if trace is not None:
            gates = [model.gate_mean(state) for model, state in zip(models, states, strict=True)]
            _record(trace, step, beams.images, [alpha for _, _, alpha in outputs], gates)
        numbers = None if uniforms is None else uniforms[beams.images, :, step]
        chosen = _choose([logits for logits, _, _ in outputs], beams, step, options, numbers, at_once)
        if trace is not None:
            trace.chosen[step, beams.images, : chosen.words.shape[1]] = chosen.chances
        beams = advance(beams, torch.full((1,), step, device=device), chosen)
        rows, tokens = torch.arange(len(tokens), device=device)[:, None], chosen.words
        states = [pick(state, (rows, chosen.parents)) for _, state, _ in outputs]
        drawn = [model.draws_locations for model in models]
        memories = [_for_the_next_word(each) if draws else each for each, draws in zip(memories, drawn, strict=True)]

        settled = are_settled(beams, options) | (step == options.max_length - 1)
        if settled.any():
            for image, found in collect(pick(beams, settled), trace, options):
                captions[image] = found
            if settled.all():
                break
            beams, tokens = pick(beams, ~settled), tokens[~settled]
            memories = [pick(memory, ~settled) for memory in memories]
            states = [pick(state, ~settled) for state in states]
    return captions


def _choose(
    outputs: list[Tensor], beams: Beams, step: int, options: DecodeOptions, numbers: Tensor | None, at_once: bool
) -> Continuations:
    """What the slots go on with, by the models' logits [n, k, V]; `numbers` [n, width] draw it.

    `at_once`: by the native kernel that finds the best words of one model without writing probabilities down.
    """
    (first, *_), width = outputs, options.width
    if at_once and numbers is None and not options.block_ngram and first.dtype == torch.float32:
        values, words = native.best_words(first, never_said(options), min(width, first.shape[-1]))
        refuse_broken(values.isnan().any())
        return best_continuations(values, words, beams, width)
    logp = log_probs(outputs)
    refuse_broken(logp[..., END].isnan().any())
    block_words(logp, beams.words[:, :, :step], options)
    if numbers is None:
        return best_continuations(*best_words(logp, width), beams, width)
    return drawn_continuations(logp, beams, numbers, options)


def _empty_trace(options: DecodeOptions, size: int, cells: int, device: torch.device) -> Trace:
    slots = (options.max_length, size, options.width)
    nothing = torch.full((2, *slots), math.nan, device=device)
    return Trace(torch.zeros(*slots, cells, device=device), *nothing)


def _record(trace: Trace, step: int, images: Tensor, alphas: list[Tensor], gates: list[Tensor | None]) -> None:
    """Write the models' mean attention [n, k, L] and mean gate [n, k] of a step."""
    mean = torch.stack([alpha.float() for alpha in alphas]).mean(0)
    trace.alphas[step, images, : mean.shape[1]] = mean
    if known := [gate.float() for gate in gates if gate is not None]:
        trace.gates[step, images, : mean.shape[1]] = torch.stack(known).mean(0)


def _uniforms(options: DecodeOptions, image_ids: Sequence[str] | None, images: int) -> Tensor:
    """Numbers in [0, 1) for every image, sample and step, float64 [B, n_best, T]: a hash of (seed, sample, image id).

    No generator: its stream would tie a caption to the order of the images, and to the version of the library.
    """
    names = [
        f"{options.seed}/{sample}/{image_id}"
        for image_id in _named(image_ids, images)
        for sample in range(options.n_best)
    ]
    draws = b"".join(hashlib.shake_256(name.encode()).digest(8 * options.max_length) for name in names)
    numbers = (np.frombuffer(draws, "<u8") >> 12) * 2.0**-52  # 52 bits: 1 cannot come out by rounding
    return torch.from_numpy(numbers).view(images, options.n_best, options.max_length)


def _location_keys(seed: int, model: int, image_ids: Sequence[str]) -> Tensor:
    """int64 [B], of where a model of the ensemble looks at the first word: a hash of (seed, model, image id)."""
    names = [f"look/{seed}/{model}/{image_id}" for image_id in image_ids]
    draws = b"".join(hashlib.shake_256(name.encode()).digest(8) for name in names)
    return torch.from_numpy(np.frombuffer(draws, "<i8").astype(np.int64))


def _for_the_next_word(memory: Memory) -> Memory:
    assert memory.keys is not None
    return memory._replace(keys=derive(memory.keys, torch.zeros_like(memory.keys)))


def _named(image_ids: Sequence[str] | None, images: int) -> Sequence[str]:
    """`image_ids`. Raises ValueError unless they name the images."""
    if image_ids is None or len(image_ids) != images:
        count = "none" if image_ids is None else len(image_ids)
        raise ValueError(f"sampling is seeded by image: image_ids must name the {images} images, got {count}")
    return image_ids
