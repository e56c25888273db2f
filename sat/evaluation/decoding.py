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
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sat.evaluation.options import DecodeOptions
from sat.model.captioner import Memory, State
from sat.model.draws import derive
from sat.text import END, PAD, START, UNK

Rows = TypeVar("Rows", bound=NamedTuple)

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


@dataclass(frozen=True)
class Hypothesis:
    """One caption of an image."""

    tokens: list[int]
    """Word ids, without `<start>` and `<end>`."""
    score: float
    """Log-probability under the model (or ensemble), `<end>` included, / words ** length_penalty."""
    finished: bool
    """False: `max_length` came before `<end>`."""
    alphas: Tensor | None = field(default=None, compare=False)
    """Attention [steps, L] float32 if asked for: one row per word, then one for `<end>` if finished."""
    probabilities: Tensor | None = field(default=None, compare=False)
    """With it, [steps] float32: of each word after those before it."""
    gates: Tensor | None = field(default=None, compare=False)
    """With it, [steps] float32: how far the gate on what is seen was open, 0 to 1; None where no model has one."""


class _Beams(NamedTuple):
    """The open images and what fills their slots; tensors whose first dimension is the image, so that rows can go."""

    images: Tensor  # [n] position in the chunk
    logp: Tensor  # [n, k] float32, -inf: nothing in this slot
    ended: Tensor  # [n, k] bool
    words: Tensor  # [n, k, T] chosen words, END where it was chosen, PAD after
    parents: Tensor  # [n, k, T] the slot whose step chose that word

    def scores(self, penalty: float) -> Tensor:
        """[n, k]: log-probability / words ** penalty."""
        words = ((self.words != PAD) & (self.words != END)).sum(-1).clamp(min=1)
        return self.logp / words**penalty


class _Trace(NamedTuple):
    """What each step saw and chose, written once and never reordered: the beams' `parents` lead back through it."""

    alphas: Tensor  # [T, B, k, L] attention of the slot that a step began with
    gates: Tensor  # [T, B, k] its gate; NaN: there is none
    chosen: Tensor  # [T, B, k] log-probability of the word that the step put into the slot


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
    size = _images_per_chunk(memories, options.width)
    captions: list[list[Hypothesis]] = []
    for start in range(0, len(grid), size):
        chunk = slice(start, start + size)
        numbers = None if uniforms is None else uniforms[chunk]
        captions += _search(models, [_index(memory, chunk) for memory in memories], options, numbers)
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
    beams = _nothing_said(size, options.max_length, device)
    states = [model.init_state(memory) for model, memory in zip(models, memories, strict=True)]
    tokens = torch.full((size, 1), START, device=device)
    trace = _empty_trace(options, size, cells, device) if options.keep_attention else None
    captions: list[list[Hypothesis]] = [[] for _ in range(size)]
    for step in range(options.max_length):
        together = zip(models, memories, states, strict=True)
        outputs = [model.step(memory, state, tokens) for model, memory, state in together]
        if trace is not None:
            gates = [model.gate_mean(state) for model, state in zip(models, states, strict=True)]
            _record(trace, step, beams.images, [alpha for _, _, alpha in outputs], gates)
        logp = _log_probs([logits for logits, _, _ in outputs])
        _block(logp, beams.words[:, :, :step], options)
        if uniforms is None:
            parents, tokens, scores = _best(logp, beams, options.width)
        else:
            parents, tokens, scores = _draw(logp, beams, uniforms[beams.images, :, step], options)
        rows = torch.arange(len(parents), device=device)[:, None]
        if trace is not None:
            slots = torch.arange(parents.shape[1], device=device)
            trace.chosen[step, beams.images[:, None], slots] = logp[rows, parents, tokens]
        beams = _advance(beams, step, parents, tokens, scores)
        states = [_index(state, (rows, parents)) for _, state, _ in outputs]
        drawn = [model.draws_locations for model in models]
        memories = [_for_the_next_word(each) if draws else each for each, draws in zip(memories, drawn, strict=True)]

        settled = _settled(beams, options) | (step == options.max_length - 1)
        if settled.any():
            for image, found in _collect(_index(beams, settled), trace, options):
                captions[image] = found
            if settled.all():
                break
            beams, tokens = _index(beams, ~settled), tokens[~settled]
            memories = [_index(memory, ~settled) for memory in memories]
            states = [_index(state, ~settled) for state in states]
    return captions


def _nothing_said(size: int, steps: int, device: torch.device) -> _Beams:
    return _Beams(
        images=torch.arange(size, device=device),
        logp=torch.zeros(size, 1, device=device),
        ended=torch.zeros(size, 1, dtype=torch.bool, device=device),
        words=torch.full((size, 1, steps), PAD, device=device),
        parents=torch.zeros(size, 1, steps, dtype=torch.long, device=device),
    )


def _empty_trace(options: DecodeOptions, size: int, cells: int, device: torch.device) -> _Trace:
    slots = (options.max_length, size, options.width)
    nothing = torch.full((2, *slots), math.nan, device=device)
    return _Trace(torch.zeros(*slots, cells, device=device), *nothing)


def _record(trace: _Trace, step: int, images: Tensor, alphas: list[Tensor], gates: list[Tensor | None]) -> None:
    """Write the models' mean attention [n, k, L] and mean gate [n, k] of a step."""
    mean = torch.stack([alpha.float() for alpha in alphas]).mean(0)
    trace.alphas[step, images, : mean.shape[1]] = mean
    if known := [gate.float() for gate in gates if gate is not None]:
        trace.gates[step, images, : mean.shape[1]] = torch.stack(known).mean(0)


def _index(tensors: Rows, where: slice | Tensor | tuple[Tensor, Tensor]) -> Rows:
    return tensors._make(None if tensor is None else tensor[where] for tensor in tensors)


def _log_probs(outputs: list[Tensor]) -> Tensor:
    """Logits [n, k, V] of every model -> log-probabilities of their mean probabilities, float32, a new tensor."""
    if len({logits.shape[-1] for logits in outputs}) > 1:
        raise ValueError(f"ensemble of different vocabularies: {[logits.shape[-1] for logits in outputs]} words")
    logp = [logits.log_softmax(-1, dtype=torch.float32) for logits in outputs]
    mean = logp[0] if len(logp) == 1 else torch.stack(logp).logsumexp(0) - math.log(len(logp))
    if mean[..., END].isnan().any():
        raise ValueError("the model's logits are not finite (NaN or inf): its weights or the features are broken")
    return mean


def _block(logp: Tensor, words: Tensor, options: DecodeOptions) -> None:
    """Set to -inf, in place, the log-probabilities [n, k, V] of words that may not follow `words` [n, k, step]."""
    for word in (PAD, START, UNK) if options.block_unk else (PAD, START):
        logp[..., word] = -math.inf
    n = options.block_ngram
    if n and words.shape[-1] >= n:
        ngrams = words.unfold(-1, n, 1)  # [n, k, step - n + 1, n]
        latest = words[..., None, words.shape[-1] - n + 1 :]
        repeated = (ngrams[..., :-1] == latest).all(-1)
        logp.scatter_(-1, ngrams[..., -1].where(repeated, PAD), -math.inf)


def _best(logp: Tensor, beams: _Beams, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best continuations for the slots that have not ended: (parent slots, words, log-probabilities) [n, width]."""
    values, words = _top(logp, min(width, logp.shape[-1]))
    scores = (values + beams.logp[..., None]).masked_fill(beams.ended[..., None], -math.inf).flatten(1)
    if scores.shape[1] < width:  # more slots than continuations: some stay empty
        scores = torch.nn.functional.pad(scores, (0, width - scores.shape[1]), value=-math.inf)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    # The j-th best goes to the j-th slot that is free.
    free = ~beams.ended.expand(-1, width)
    rank = (free.cumsum(-1) - 1).clamp(min=0)
    order, scores = order.gather(1, rank), scores.gather(1, rank)
    exists = order < words[0].numel()
    parents = (order // words.shape[-1]).where(exists, 0)
    return parents, words.flatten(1).gather(1, order.where(exists, 0)), scores


def _top(logp: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of every row and their ids, in order of id; of equal ones the lower ids.

    topk promises nothing about equals, and with bf16 logits they are frequent; so rows tied at the cut are sorted.
    """
    values, ids = logp.topk(min(count + 1, logp.shape[-1]))
    tied = (values[..., count - 1] == values[..., -1]) & (values[..., -1] > -math.inf)
    if count < values.shape[-1] and tied.any():
        ordered = logp[tied].sort(descending=True, stable=True)
        values[tied], ids[tied] = ordered.values[:, : count + 1], ordered.indices[:, : count + 1]
    ids, order = ids[..., :count].sort()
    return values.gather(-1, order), ids


def _draw(logp: Tensor, beams: _Beams, uniforms: Tensor, options: DecodeOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Continue every slot with a word drawn by its uniform number [n, width]: (parents, words, log-probabilities)."""
    ranked, ids = (logp / options.temperature).sort(descending=True, stable=True)
    keep = options.top_k or ranked.shape[-1]
    chances = ranked[..., :keep].double().softmax(-1)  # float32 would lose the tail of the running sum
    running = chances.cumsum(-1)
    running = running.where(running - chances < options.top_p, -1).cummax(-1).values  # ends where top_p is reached
    size, width = uniforms.shape
    running, logp, ids = (x.expand(size, width, -1).contiguous() for x in (running, logp, ids))
    place = torch.searchsorted(running, uniforms[..., None] * running[..., -1:], right=True)
    words = ids.gather(-1, place)
    scores = beams.logp + logp.gather(-1, words).squeeze(-1)
    parents = torch.arange(width, device=logp.device).expand(size, -1).clamp(max=beams.logp.shape[1] - 1)
    return parents, words.squeeze(-1), scores


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


def _advance(beams: _Beams, step: int, parents: Tensor, tokens: Tensor, scores: Tensor) -> _Beams:
    """The beams after this step's choices; slots that had ended keep what they hold."""
    slots = torch.arange(parents.shape[1], device=parents.device)
    ended = beams.ended.expand_as(parents)
    source = slots.where(ended, parents)[..., None].expand(-1, -1, beams.words.shape[-1])
    words, history = beams.words.gather(1, source), beams.parents.gather(1, source)
    words[..., step] = tokens.masked_fill(ended, PAD)
    history[..., step] = parents
    logp = beams.logp.expand_as(scores).where(ended, scores)
    return _Beams(beams.images, logp, ended | (tokens == END) & (logp > -math.inf), words, history)


def _settled(beams: _Beams, options: DecodeOptions) -> Tensor:
    """[n] bool: no open slot can still reach the n best finished captions.

    Log-probabilities only fall while the divisor grows, so an open slot's hope is its own / max_length ** penalty;
    comparing at its present length would stop too early. Samples all run to their end.
    """
    best = beams.scores(options.length_penalty).masked_fill(~beams.ended, -math.inf).topk(options.n_best).values[:, -1]
    longest: float = options.max_length**options.length_penalty
    return best >= beams.logp.masked_fill(beams.ended, -math.inf).amax(-1) / longest


def _collect(beams: _Beams, trace: _Trace | None, options: DecodeOptions) -> list[tuple[int, list[Hypothesis]]]:
    """The captions of settled images: (position in the chunk, hypotheses best first)."""
    found = []
    columns = (beams.images, beams.scores(options.length_penalty), beams.ended, beams.words)
    images = zip(*(column.tolist() for column in columns), strict=True)
    for row, (image, scores, ended, words) in enumerate(images):
        hypotheses = []
        for slot in range(len(scores)):
            if scores[slot] == -math.inf:
                continue
            tokens = [word for word in words[slot] if word not in (PAD, END)]
            path = beams.parents[row, slot, : len(tokens) + ended[slot]]
            kept = {} if trace is None else _follow(trace, image, slot, path)
            hypotheses.append(Hypothesis(tokens, scores[slot], ended[slot], **kept))
        hypotheses.sort(key=lambda h: (not h.finished, -h.score, len(h.tokens), h.tokens))
        found.append((image, hypotheses[: options.n_best]))
    return found


def _follow(trace: _Trace, image: int, slot: int, path: Tensor) -> dict[str, Tensor | None]:
    """The fields of a hypothesis that ended in `slot`, its steps having begun in the slots `path` int64 [steps]."""
    steps = torch.arange(len(path), device=path.device)
    ends = torch.cat([path[1:], path.new_tensor([slot])])[: len(path)]  # a step ends where the next one begins
    gates = trace.gates[steps, image, path]
    return {
        "alphas": trace.alphas[steps, image, path],
        "probabilities": trace.chosen[steps, image, ends].exp(),
        "gates": None if gates.isnan().any() else gates,
    }
