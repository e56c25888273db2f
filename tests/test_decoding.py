"""Decoding against slow, obvious searches over a table-driven toy model."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import sat.evaluation.decoding
from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.text import END, PAD, START, UNK
from tests.helpers_decoding import (
    CELLS,
    State,
    Toy,
    assert_same,
    exhaustive,
    grid_of,
    log_probs,
    one_thread,  # noqa: F401  (a fixture)
    repeats,
    rescored,
    slow_beam_search,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("blocking", [{}, {"block_unk": True}, {"block_ngram": 1}, {"block_ngram": 2}])
def test_beam_as_wide_as_the_space_equals_exhaustive_search(penalty, blocking):
    model = Toy(vocab_size=7, seed=3)
    for n_best in (1, 20):
        options = DecodeOptions(beam_size=400, max_length=4, length_penalty=penalty, n_best=n_best, **blocking)
        for image in (1, 2):
            grid = grid_of(image)
            assert_same(decode(model, grid, options)[0], exhaustive(model, grid, options, vocab_size=7))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("width, n_best", [(1, 1), (2, 1), (3, 3), (5, 2), (12, 12)])
@pytest.mark.parametrize("blocking", [{}, {"block_unk": True, "block_ngram": 2}])
def test_many_images_at_once_equal_a_beam_search_per_image(penalty, width, n_best, blocking):
    images = list(range(12))
    for seed in range(3):
        model = Toy(vocab_size=9, seed=seed, end_bias=1.0)
        options = DecodeOptions(beam_size=width, max_length=7, length_penalty=penalty, n_best=n_best, **blocking)
        for image, found in zip(images, decode(model, grid_of(*images), options)):
            assert_same(found, slow_beam_search(model, grid_of(image), options))


@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_beam_of_one_equals_greedy(penalty):
    model, images = Toy(seed=5), range(20)
    beam = decode(model, grid_of(*images), DecodeOptions(beam_size=1, length_penalty=penalty))
    greedy = decode(model, grid_of(*images), DecodeOptions(method="greedy", length_penalty=penalty))
    assert beam == greedy
    for image, (found,) in zip(images, greedy):
        words: list[int] = []
        while len(words) < 20 and END not in words:
            best = log_probs(model, grid_of(image), words)
            best[[PAD, START]] = -math.inf
            words.append(int(best.argmax()))
        assert found.tokens + [END] * found.finished == words


def test_without_an_ended_beam_the_best_unfinished_caption_is_returned_and_marked():
    model = Toy(end_bias=-1e4)
    options = DecodeOptions(beam_size=3, max_length=5, n_best=3)
    for image, found in enumerate(decode(model, grid_of(0, 1, 2), options)):
        assert [h.finished for h in found] == [False] * 3 and all(len(h.tokens) == 5 for h in found)
        assert_same(found, slow_beam_search(model, grid_of(image), options))


def test_unfinished_captions_come_after_finished_ones():
    found = decode(Toy(seed=1, end_bias=0.5), grid_of(*range(40)), DecodeOptions(beam_size=4, max_length=3, n_best=4))
    kinds = {tuple(h.finished for h in hypotheses) for hypotheses in found}
    assert any(len(set(kind)) == 2 for kind in kinds)
    assert all(list(kind) == sorted(kind, reverse=True) for kind in kinds)


def test_more_slots_than_continuations_leave_slots_empty():
    found = decode(Toy(vocab_size=4), grid_of(1), DecodeOptions(beam_size=6, max_length=1, n_best=6))[0]
    assert sorted(h.tokens for h in found) == [[], [UNK]]  # <end> at once, or the only word


class Scripted(Toy):
    """Probabilities written down by hand: words so far -> {word: probability}."""

    def __init__(self, script: dict[tuple, dict[int, float]]):
        super().__init__()
        names = list(script)
        self.step_of = {(names.index(name[:-1]), name[-1]): names.index(name) for name in names if name}
        self.table = torch.stack([self.row(script[name]) for name in names])

    def row(self, chances: dict[int, float]) -> Tensor:
        return torch.tensor([chances.get(word, 1e-6) for word in range(7)]).log()

    def init_state(self, memory):
        return State(torch.zeros(len(memory.grid), 1, 1, dtype=torch.long))

    def step(self, memory, state, tokens):
        self.rows.append(len(tokens))
        prefix = state.prefix.clone()
        for row, slot in itertools.product(range(tokens.shape[0]), range(tokens.shape[1])):
            key = (int(state.prefix[row, slot]), int(tokens[row, slot]))
            prefix[row, slot] = self.step_of.get(key, 0)
        return self.table[prefix.squeeze(-1)].clone(), State(prefix), torch.zeros(*tokens.shape, CELLS)


A, B, C = 4, 5, 6
SHORT_OR_LONG = {(): {A: 0.9, C: 0.1}, (A,): {END: 0.6, B: 0.4}, (A, B): {C: 1.0}, (A, B, C): {END: 1.0}}


def test_normalised_search_goes_on_until_no_longer_caption_can_win():
    # log-probability: "a" -0.62, "a b c" -1.02; per word: "a" -0.62, "a b c" -0.34.
    plain, normalised = (
        decode(Scripted(SHORT_OR_LONG), grid_of(0), DecodeOptions(beam_size=2, max_length=6, length_penalty=penalty))
        for penalty in (0.0, 1.0)
    )
    assert plain[0][0].tokens == [A]
    assert normalised[0][0].tokens == [A, B, C]
    assert normalised[0][0].score == pytest.approx(math.log(0.9 * 0.4) / 3, abs=1e-4)  # <end> is no word


def test_plain_search_stops_as_soon_as_nothing_can_win():
    model = Scripted(SHORT_OR_LONG)
    decode(model, grid_of(0), DecodeOptions(beam_size=2, max_length=6))
    assert len(model.rows) == 2


def test_n_best_captions_differ_are_sorted_and_carry_their_own_score():
    model = Toy(vocab_size=30, seed=2)
    options = DecodeOptions(beam_size=6, n_best=6, length_penalty=0.8)
    for image, found in enumerate(decode(model, grid_of(0, 1, 2), options)):
        assert len({(tuple(h.tokens), h.finished) for h in found}) == 6
        for finished in (True, False):
            scores = [h.score for h in found if h.finished == finished]
            assert scores == sorted(scores, reverse=True)
        for hypothesis in found:
            assert hypothesis.score == pytest.approx(rescored(model, grid_of(image), hypothesis, 0.8), abs=1e-4)


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_blocked_words_never_come_and_scores_stay_true_probabilities(method):
    model, images = Toy(vocab_size=6, seed=4, end_bias=-3.0), range(30)
    ids = [str(image) for image in images]
    common = {"method": method, "n_best": 3, "max_length": 8}
    free = decode(model, grid_of(*images), DecodeOptions(**common), ids)
    blocked = decode(model, grid_of(*images), DecodeOptions(**common, block_unk=True, block_ngram=2), ids)
    assert any(UNK in h.tokens for found in free for h in found)
    assert any(repeats(h.tokens, 2) for found in free for h in found)
    for image, found in zip(images, blocked):
        for hypothesis in found:
            assert UNK not in hypothesis.tokens and not repeats(hypothesis.tokens, 2)
            assert hypothesis.score == pytest.approx(rescored(model, grid_of(image), hypothesis, 0.0), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(beam_size=4, n_best=4, length_penalty=0.5, keep_attention=True),
        DecodeOptions(method="greedy", keep_attention=True),
        DecodeOptions(method="sample", n_best=3, temperature=1.3, top_p=0.9, keep_attention=True),
    ],
)
def test_captions_do_not_depend_on_the_batch(options, monkeypatch):
    model, images = Toy(vocab_size=20, seed=6, end_bias=1.0), list(range(12))
    together = decode(model, grid_of(*images), options, [str(image) for image in images])
    alone = [decode(model, grid_of(image), options, [str(image)])[0] for image in images]
    backwards = decode(model, grid_of(*images[::-1]), options, [str(image) for image in images[::-1]])[::-1]
    monkeypatch.setattr(sat.evaluation.decoding, "CACHE_BYTES", {"cpu": 4 * options.width * CELLS * 7})
    chunked = decode(model, grid_of(*images), options, [str(image) for image in images])
    assert together == alone == backwards == chunked
    for other in (alone, backwards, chunked):
        for mine, theirs in zip(itertools.chain(*together), itertools.chain(*other)):
            assert torch.equal(mine.alphas, theirs.alphas)


def test_finished_images_leave_the_batch():
    model = Toy(vocab_size=20, seed=6, end_bias=2.0)
    decode(model, grid_of(*range(30)), DecodeOptions(method="greedy"))
    found = [len(decode(model, grid_of(image), DecodeOptions(method="greedy"))[0][0].tokens) for image in range(30)]
    assert model.rows[: max(found) + 1] == [sum(length >= step for length in found) for step in range(max(found) + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_word_whatever_the_batch(dtype):
    model = Toy(vocab_size=50, dtype=dtype, scale=0.0, end_bias=-1.0)  # all words equally good: topk may take any
    options = DecodeOptions(beam_size=3, n_best=3, max_length=2)
    for images in (1, 64):
        for found in decode(model, grid_of(*range(images)), options):
            assert [h.tokens for h in found] == [[UNK, 3], [UNK, 4], [UNK, 5]]


def test_ties_between_slots_go_to_the_lower_slot_whatever_the_batch():
    model = Toy(vocab_size=2000, scale=0.0)
    model.table[:, 1500:1510] = 5.0  # exactly the ten words kept, in whatever order topk gives them
    options = DecodeOptions(beam_size=10, n_best=10, max_length=2)
    for images in (1, 64):
        for found in decode(model, grid_of(*range(images)), options):
            assert [h.tokens for h in found] == [[1500, word] for word in range(1500, 1510)]


def test_log_probabilities_are_float32_even_of_bf16_logits():
    model = Toy(vocab_size=200, seed=8, dtype=torch.bfloat16)
    for image, found in enumerate(decode(model, grid_of(0, 1), DecodeOptions(max_length=10))):
        assert found[0].score == pytest.approx(rescored(model, grid_of(image), found[0], 0.0), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(beam_size=4, n_best=4, keep_attention=True),
        DecodeOptions(method="sample", n_best=3, temperature=1.4, keep_attention=True),
    ],
    ids=["beam", "sample"],
)
def test_attention_gate_and_probability_are_those_of_the_returned_caption_step_by_step(options):
    model, images = Toy(vocab_size=12, seed=9, end_bias=1.0), range(8)
    for image, found in zip(images, decode(model, grid_of(*images), options, list(map(str, images)))):
        for hypothesis in found:
            memory = model.encode(grid_of(image))
            state, alphas, gates, chances = model.init_state(memory), [], [], []
            words = hypothesis.tokens + [END] * hypothesis.finished
            for word, following in zip([START, *words], words):
                gates.append(model.gate_mean(state)[0, 0])
                logits, state, alpha = model.step(memory, state, torch.tensor([[word]]))
                alphas.append(alpha[0, 0])
                chances.append(logits[0, 0].softmax(-1)[following])
            if words:
                assert torch.equal(hypothesis.alphas, torch.stack(alphas))
                assert torch.equal(hypothesis.gates, torch.stack(gates))
                torch.testing.assert_close(hypothesis.probabilities, torch.stack(chances))
            total = hypothesis.probabilities.double().log().sum().item()
            assert total == pytest.approx(hypothesis.score, abs=1e-4), "no length penalty: they multiply to the score"


def test_attention_gate_and_probability_are_kept_only_when_asked():
    found = decode(Toy(), grid_of(1), DecodeOptions())[0][0]
    assert found.alphas is found.gates is found.probabilities is None


def test_samples_follow_the_models_distribution():
    model, count = Toy(vocab_size=8, seed=3, scale=1.0), 4000
    options = DecodeOptions(method="sample", n_best=count, max_length=1, temperature=0.8)
    found = decode(model, grid_of(1), options, ["a"])[0]
    drawn = torch.bincount(torch.tensor([h.tokens[0] if h.tokens else END for h in found]), minlength=8) / count
    expected = log_probs(model, grid_of(1), []) / 0.8
    expected[[PAD, START]] = -math.inf
    expected = expected.softmax(-1)
    assert (drawn - expected).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("limits", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.6}])
def test_limits_leave_exactly_the_most_probable_words(limits):
    model = Toy(vocab_size=8, seed=3, scale=1.0)
    options = DecodeOptions(method="sample", n_best=2000, max_length=1, **limits)
    chances = log_probs(model, grid_of(1), [])
    chances[[PAD, START]] = -math.inf
    ranked = chances.argsort(descending=True)[: limits.get("top_k", 8)]
    shares = chances[ranked].softmax(-1)
    needed = int((shares.cumsum(0) < limits.get("top_p", 1.0)).sum()) + 1
    found = decode(model, grid_of(1), options, ["a"])[0]
    assert {h.tokens[0] if h.tokens else END for h in found} == set(ranked[:needed].tolist())


def test_samples_depend_on_seed_and_image_and_not_on_how_many_are_drawn():
    def draw(seed, name, n_best=4, max_length=20):
        options = DecodeOptions(method="sample", n_best=n_best, seed=seed, max_length=max_length)
        found = decode(Toy(vocab_size=40, seed=1, end_bias=4.0), grid_of(1), options, [name])[0]
        assert all(h.finished for h in found)
        return {tuple(h.tokens) for h in found}

    assert draw(0, "a") == draw(0, "a")
    assert draw(0, "a") != draw(1, "a") and draw(0, "a") != draw(0, "b")
    assert draw(0, "a") < draw(0, "a", n_best=12, max_length=40)


def test_one_word_to_choose_from_equals_greedy():
    model, ids = Toy(seed=2), list("abcdef")
    sampled = decode(model, grid_of(*range(6)), DecodeOptions(method="sample", top_k=1, temperature=3.0), ids)
    assert sampled == decode(model, grid_of(*range(6)), DecodeOptions(method="greedy"))


def test_ensemble_averages_probabilities():
    models = [Toy(seed=1), Toy(seed=2)]
    options = DecodeOptions(beam_size=3, n_best=3, max_length=4, keep_attention=True)
    found = decode(models, grid_of(1), options)[0]
    for hypothesis in found:
        words, total = hypothesis.tokens + [END] * hypothesis.finished, 0.0
        for place, word in enumerate(words):
            chances = [log_probs(model, grid_of(1), words[:place])[word].exp().item() for model in models]
            total += math.log(sum(chances) / 2)
        assert hypothesis.score == pytest.approx(total, abs=1e-4)
        assert hypothesis.alphas.shape == (len(words), CELLS)
        assert hypothesis.probabilities.prod().log().item() == pytest.approx(total, abs=1e-3)


def test_ensemble_of_one_model_twice_is_that_model():
    options = DecodeOptions(beam_size=4, n_best=4)
    once, twice = decode(Toy(), grid_of(1, 2), options), decode([Toy(), Toy()], grid_of(1, 2), options)
    for one, two in zip(once, twice):
        assert_same(two, one)


def test_no_images_give_no_captions():
    assert decode(Toy(), grid_of(), DecodeOptions()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "bean"}, "'bean'; choose one of beam, greedy, sample"),
        ({"beam_size": 0}, "beam_size is 0"),
        ({"beam_size": 2.5}, "beam_size is 2.5"),
        ({"max_length": 0}, "max_length is 0"),
        ({"block_ngram": -1}, "block_ngram is -1"),
        ({"length_penalty": -0.5}, "length_penalty is -0.5"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"method": "sample", "temperature": 0}, "temperature is 0"),
        ({"method": "sample", "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 0.5}, "no effect on method beam"),
        ({"n_best": 4}, "raise beam_size"),
        ({"method": "greedy", "n_best": 2}, "method beam or sample"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        DecodeOptions(**settings)


def test_what_decode_cannot_use_is_refused():
    with pytest.raises(ValueError, match="image_ids must name the 2 images, got none"):
        decode(Toy(), grid_of(1, 2), DecodeOptions(method="sample"))
    with pytest.raises(ValueError, match=r"different vocabularies: \[7, 9\]"):
        decode([Toy(7), Toy(9)], grid_of(1), DecodeOptions())
    with pytest.raises(ValueError, match="not finite"):
        decode(Toy(scale=math.nan), grid_of(1), DecodeOptions())
    with pytest.raises(ValueError, match=r"must be \[B, L, D\]"):
        decode(Toy(), torch.zeros(2, 3), DecodeOptions())
    training = Toy()
    training.training = True
    with pytest.raises(ValueError, match="call model.eval"):
        decode(training, grid_of(1), DecodeOptions())
