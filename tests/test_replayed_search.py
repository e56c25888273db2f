"""Beam search whose steps are a recording: the captions of the search that is obvious, on any model."""

import math

import pytest
import torch

from sat.evaluation.beams import top_words, top_words_unseen
from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.evaluation.replayed_search import recorder, search_replayed
from tests.helpers_decoding import Toy, assert_same, grid_of, one_thread, slow_beam_search  # noqa: F401  (a fixture)
from tests.test_decoding_captioner import captioner

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted:
    """In place of a CUDA graph: the same work again, counted."""

    def __init__(self):
        self.steps = 0

    def __call__(self, work):
        def again():
            work()
            self.steps += 1

        again()
        return again


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("width, n_best", [(1, 1), (2, 1), (3, 3), (5, 2), (12, 12)])
@pytest.mark.parametrize("blocking", [{}, {"block_unk": True}])
@pytest.mark.parametrize("longest", [1, 2, 7, 12])
def test_many_images_at_once_equal_a_beam_search_per_image(penalty, width, n_best, blocking, longest):
    images = list(range(12))
    for seed in range(3):
        model = Toy(vocab_size=9, seed=seed, end_bias=1.0)
        options = DecodeOptions(beam_size=width, max_length=longest, length_penalty=penalty, n_best=n_best, **blocking)
        grid = grid_of(*images)
        with torch.inference_mode():
            found = search_replayed(model, model.encode(grid), options, Counted())
        assert [len(each) for each in found] == [len(each) for each in decode(model, grid, options)]
        for image, captions in zip(images, found, strict=True):
            assert_same(captions, slow_beam_search(model, grid_of(image), options))


def test_a_search_ends_soon_after_all_captions_are_settled():
    model, record = Toy(vocab_size=9, end_bias=6.0), Counted()
    with torch.inference_mode():
        search_replayed(model, model.encode(grid_of(*range(5))), DecodeOptions(max_length=200), record)
    assert record.steps <= 12


def test_logits_that_are_not_finite_are_refused():
    model = Toy()
    model.table[:, 4] = math.nan
    with torch.inference_mode(), pytest.raises(ValueError, match="not finite"):
        search_replayed(model, model.encode(grid_of(1, 2)), DecodeOptions(), Counted())


@pytest.mark.parametrize("seed", range(8))
def test_the_best_words_are_found_without_a_look_at_them(seed):
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(6, 3, 200, generator=generator).mul(2).round().div(2).clamp(max=0)  # many are equal
    logp[logp < -1.4] = -math.inf
    logp[0, 0, ::3] = -0.0
    logp[1, 1] = -torch.rand(200, generator=generator) * 1e-30
    for count in (1, 5, 19):
        values, words = top_words_unseen(logp, count)
        expected = top_words(logp.clone(), count)
        assert torch.equal(values, expected[0]) and torch.equal(words, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["paper", "tutorial"])
def test_a_graph_finds_the_captions_that_are_found_word_by_word(preset, dtype, monkeypatch):
    model, grids, found = captioner(preset).cuda(), torch.randn(3, 20, 4, 12).cuda(), {}
    options, served = DecodeOptions(beam_size=4, n_best=4, max_length=12), []
    for name, who in (("replayed", recorder), ("word by word", lambda *_: None)):
        monkeypatch.setattr(
            "sat.evaluation.decoding.recorder", lambda *x, who=who: served.append(who(*x)) or served[-1]
        )
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            found[name] = [[h.tokens for h in each] for grid in grids for each in decode(model, grid, options)]
    assert all(served[:3]) and not any(served[3:])
    same = sum(one == other for one, other in zip(*found.values(), strict=True))
    assert same == 60 if dtype == torch.float32 else same >= 48
