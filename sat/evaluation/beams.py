"""What a search keeps of its captions, and the rules by which it goes on: score, continue, end, settle, collect.

Shapes: n images still open, k slots per image, V words, T steps, L grid cells.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sat.evaluation.options import DecodeOptions
from sat.text import END, PAD, START, UNK

Rows = TypeVar("Rows", bound=NamedTuple)


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


class Beams(NamedTuple):
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


class Trace(NamedTuple):
    """What each step saw and chose, written once and never reordered: the beams' `parents` lead back through it."""

    alphas: Tensor  # [T, B, k, L] attention of the slot that a step began with
    gates: Tensor  # [T, B, k] its gate; NaN: there is none
    chosen: Tensor  # [T, B, k] log-probability of the word that the step put into the slot


def nothing_said(size: int, steps: int, device: torch.device) -> Beams:
    return Beams(
        images=torch.arange(size, device=device),
        logp=torch.zeros(size, 1, device=device),
        ended=torch.zeros(size, 1, dtype=torch.bool, device=device),
        words=torch.full((size, 1, steps), PAD, device=device),
        parents=torch.zeros(size, 1, steps, dtype=torch.long, device=device),
    )


def pick(tensors: Rows, where: slice | Tensor | tuple[Tensor, Tensor]) -> Rows:
    return tensors._make(None if tensor is None else tensor[where] for tensor in tensors)


def log_probs(outputs: list[Tensor]) -> Tensor:
    """Logits [n, k, V] of every model -> log-probabilities of their mean probabilities, float32, a new tensor."""
    if len({logits.shape[-1] for logits in outputs}) > 1:
        raise ValueError(f"ensemble of different vocabularies: {[logits.shape[-1] for logits in outputs]} words")
    logp = [logits.log_softmax(-1, dtype=torch.float32) for logits in outputs]
    return logp[0] if len(logp) == 1 else torch.stack(logp).logsumexp(0) - math.log(len(logp))


def refuse_broken(broken: Tensor) -> None:
    """Raise ValueError where a word's log-probability is NaN, as bool `broken` says; it is waited for."""
    if broken:
        raise ValueError("the model's logits are not finite (NaN or inf): its weights or the features are broken")


def never_said(options: DecodeOptions) -> tuple[int, ...]:
    """Words that no caption holds."""
    return (PAD, START, UNK) if options.block_unk else (PAD, START)


def block_words(logp: Tensor, words: Tensor, options: DecodeOptions) -> None:
    """Set to -inf, in place, the log-probabilities [n, k, V] of words that may not follow `words` [n, k, step]."""
    for word in never_said(options):
        logp[..., word] = -math.inf
    n = options.block_ngram
    if n and words.shape[-1] >= n:
        ngrams = words.unfold(-1, n, 1)  # [n, k, step - n + 1, n]
        latest = words[..., None, words.shape[-1] - n + 1 :]
        repeated = (ngrams[..., :-1] == latest).all(-1)
        logp.scatter_(-1, ngrams[..., -1].where(repeated, PAD), -math.inf)


class Continuations(NamedTuple):
    """What the slots of a width go on with, [n, width] each; -inf: with nothing."""

    parents: Tensor
    """Slots that they continue."""
    words: Tensor
    scores: Tensor
    """Log-probability of the caption so far."""
    chances: Tensor
    """Of the word alone."""


def best_continuations(values: Tensor, words: Tensor, beams: Beams, width: int) -> Continuations:
    """The best ones for the slots that have not ended, of the best words of each, [n, k, w], and their values."""
    scores = (values + beams.logp[..., None]).masked_fill(beams.ended[..., None], -math.inf).flatten(1)
    if scores.shape[1] < width:  # more slots than continuations: some stay empty
        scores = torch.nn.functional.pad(scores, (0, width - scores.shape[1]), value=-math.inf)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    # The j-th best goes to the j-th slot that is free.
    free = ~beams.ended.expand(-1, width)
    rank = (free.cumsum(-1) - 1).clamp(min=0)
    order, scores = order.gather(1, rank), scores.gather(1, rank)
    exists = order < words[0].numel()
    parents, order = (order // words.shape[-1]).where(exists, 0), order.where(exists, 0)
    return Continuations(parents, words.flatten(1).gather(1, order), scores, values.flatten(1).gather(1, order))


def best_words(logp: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of log-probabilities [n, k, V] those of the best words for so many slots, and their ids in order."""
    top = top_words if logp.device.type == "cpu" else top_words_unseen
    return top(logp, min(width, logp.shape[-1]))


def top_words(logp: Tensor, count: int) -> tuple[Tensor, Tensor]:
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


def top_words_unseen(logp: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`top_words` of float32 `logp` [..., V] without a look at it: a GPU is not waited for.

    Of numbers whose upper half orders as the value does and whose lower half falls with the id, none are equal.
    """
    bits = (logp + 0.0).view(torch.int32)  # the zero makes one of the two zeros
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)
    ids = torch.arange(logp.shape[-1], device=logp.device)
    found = ((ordered.long() << 32) - ids).topk(count).indices.sort().values
    return logp.gather(-1, found), found


def drawn_continuations(logp: Tensor, beams: Beams, uniforms: Tensor, options: DecodeOptions) -> Continuations:
    """Continue every slot with a word drawn by its uniform number [n, width]."""
    ranked, ids = (logp / options.temperature).sort(descending=True, stable=True)
    keep = options.top_k or ranked.shape[-1]
    chances = ranked[..., :keep].double().softmax(-1)  # float32 would lose the tail of the running sum
    running = chances.cumsum(-1)
    running = running.where(running - chances < options.top_p, -1).cummax(-1).values  # ends where top_p is reached
    size, width = uniforms.shape
    running, logp, ids = (x.expand(size, width, -1).contiguous() for x in (running, logp, ids))
    place = torch.searchsorted(running, uniforms[..., None] * running[..., -1:], right=True)
    words = ids.gather(-1, place)
    chances = logp.gather(-1, words).squeeze(-1)
    parents = torch.arange(width, device=logp.device).expand(size, -1).clamp(max=beams.logp.shape[1] - 1)
    return Continuations(parents, words.squeeze(-1), beams.logp + chances, chances)


def advance(beams: Beams, step: Tensor, chosen: Continuations) -> Beams:
    """The beams after the choices of `step`, int64 [1]; slots that had ended keep what they hold."""
    parents, tokens, scores, _ = chosen
    slots = torch.arange(parents.shape[1], device=parents.device)
    ended = beams.ended.expand_as(parents)
    source = slots.where(ended, parents)[..., None].expand(-1, -1, beams.words.shape[-1])
    words, history = beams.words.gather(1, source), beams.parents.gather(1, source)
    words.index_copy_(2, step, tokens.masked_fill(ended, PAD)[..., None])
    history.index_copy_(2, step, parents[..., None])
    logp = beams.logp.expand_as(scores).where(ended, scores)
    return Beams(beams.images, logp, ended | (tokens == END) & (logp > -math.inf), words, history)


def are_settled(beams: Beams, options: DecodeOptions) -> Tensor:
    """[n] bool: no open slot can still reach the n best finished captions.

    Log-probabilities only fall while the divisor grows, so an open slot's hope is its own / max_length ** penalty;
    comparing at its present length would stop too early. Samples all run to their end.
    """
    best = beams.scores(options.length_penalty).masked_fill(~beams.ended, -math.inf).topk(options.n_best).values[:, -1]
    longest: float = options.max_length**options.length_penalty
    return best >= beams.logp.masked_fill(beams.ended, -math.inf).amax(-1) / longest


def collect(beams: Beams, trace: Trace | None, options: DecodeOptions) -> list[tuple[int, list[Hypothesis]]]:
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


def _follow(trace: Trace, image: int, slot: int, path: Tensor) -> dict[str, Tensor | None]:
    """The fields of a hypothesis that ended in `slot`, its steps having begun in the slots `path` int64 [steps]."""
    steps = torch.arange(len(path), device=path.device)
    ends = torch.cat([path[1:], path.new_tensor([slot])])[: len(path)]  # a step ends where the next one begins
    gates = trace.gates[steps, image, path]
    return {
        "alphas": trace.alphas[steps, image, path],
        "probabilities": trace.chosen[steps, image, ends].exp(),
        "gates": None if gates.isnan().any() else gates,
    }
