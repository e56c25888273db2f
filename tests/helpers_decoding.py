"""Slow, obvious searches, and a table-driven toy model whose scores are exact, for the tests of decoding."""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sat.evaluation.beams import Hypothesis
from sat.evaluation.options import DecodeOptions
from sat.text import END, PAD, START, UNK

CELLS = 3


@pytest.fixture
def one_thread():
    """On tensors this small threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Memory(NamedTuple):
    grid: Tensor
    projection: Tensor
    prepared: Tensor


class State(NamedTuple):
    prefix: Tensor  # [B, k, 1] int64 hash of the words so far


class Toy:
    """Logits are a random table looked up by (image, words so far); keeps the interface of the Captioner."""

    training = draws_locations = False

    def __init__(self, vocab_size=7, seed=0, end_bias=0.0, scale=2.0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.table = (torch.randn(997, vocab_size, generator=generator) * scale).to(dtype)
        self.table[:, END] += end_bias
        self.rows: list[int] = []

    def encode(self, grid):
        return Memory(grid, grid, grid[:, :, :0])

    def init_state(self, memory):
        return State(memory.grid[:, :1, :1].long())

    def gate_mean(self, state):
        return (state.prefix.squeeze(-1) / 997).float()

    def step(self, memory, state, tokens):
        self.rows.append(len(tokens))
        prefix = (state.prefix * 31 + tokens[..., None] * 7 + 11) % 997
        alpha = (prefix + torch.arange(CELLS)).float().cos().softmax(-1)
        return self.table[prefix.squeeze(-1)].clone(), State(prefix), alpha


def grid_of(*images: int) -> Tensor:
    """A grid [B, L, 1] whose first number is the image's identity."""
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 1).expand(-1, CELLS, 1)


def log_probs(model, grid: Tensor, words: list[int]) -> Tensor:
    """[V] log-probabilities after `words` for one image, and nothing else: the slow reference's only access."""
    memory = model.encode(grid)
    state = model.init_state(memory)
    for word in [START, *words]:
        logits, state, _ = model.step(memory, state, torch.tensor([[word]]))
    return logits[0, 0].float().log_softmax(-1)


def rescored(model, grid: Tensor, hypothesis: Hypothesis, penalty: float) -> float:
    words = hypothesis.tokens + [END] * hypothesis.finished
    total = sum(log_probs(model, grid, words[:place])[word].item() for place, word in enumerate(words))
    return total / max(1, len(hypothesis.tokens)) ** penalty


def repeats(words: list[int], n: int) -> bool:
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) < len(grams)


def allowed(words: list[int], options: DecodeOptions) -> bool:
    banned = {PAD, START, UNK} if options.block_unk else {PAD, START}
    return not banned & set(words) and not (options.block_ngram and repeats(words, options.block_ngram))


def exhaustive(model, grid: Tensor, options: DecodeOptions, vocab_size: int) -> list[Hypothesis]:
    """Every caption there is, scored one by one."""
    after = functools.cache(lambda prefix: log_probs(model, grid, list(prefix)).tolist())
    found = []
    for length in range(options.max_length + 1):
        for words in itertools.product(range(3, vocab_size), repeat=length):
            if allowed(list(words), options):
                finished = length < options.max_length
                predicted = [*words, END] if finished else words
                total = sum(after(words[:place])[word] for place, word in enumerate(predicted))
                found.append(Hypothesis(list(words), total / max(1, length) ** options.length_penalty, finished))
    return sorted(found, key=lambda h: (not h.finished, -h.score))[: options.n_best]


def slow_beam_search(model, grid: Tensor, options: DecodeOptions) -> list[Hypothesis]:
    """One image, lists of words, a full sort at every step; a finished caption takes its beam along; no early stop."""
    live, finished = [(0.0, [])], []
    for _ in range(options.max_length):
        continued = []
        for total, words in live:
            for word, logp in enumerate(log_probs(model, grid, words).tolist()):
                if word == END or allowed([*words, word], options):
                    continued.append((total + logp, [*words, word]))
        continued.sort(key=lambda candidate: -candidate[0])
        kept = continued[: options.width - len(finished)]
        finished += [(total, words[:-1]) for total, words in kept if words[-1] == END]
        live = [(total, words) for total, words in kept if words[-1] != END]
    scored = [
        Hypothesis(words, total / max(1, len(words)) ** options.length_penalty, ended)
        for captions, ended in ((finished, True), (live, False))
        for total, words in captions
    ]
    return sorted(scored, key=lambda h: (not h.finished, -h.score))[: options.n_best]


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [(h.tokens, h.finished) for h in found] == [(h.tokens, h.finished) for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-4)
