"""The best words of a step found at once by a kernel: those of log-softmax and a search for the greatest."""

import pytest
import torch

from sat.evaluation import decoding
from sat.evaluation.beams import top_words
from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.model.kernels import native, triton_kernels
from tests.helpers_captioner import make_model
from tests.helpers_kernels import needs_compiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_kernel = pytest.mark.parametrize(
    "best_words", [pytest.param(native.best_words, marks=needs_compiler), triton_kernels.best_words], ids=["cpu", "gpu"]
)


def by(best_words, logits, *rest):
    """Where it runs; Triton's interpreter without a GPU."""
    device = "cpu" if best_words is native.best_words else DEVICE
    return (found.cpu() for found in best_words(logits.to(device), *rest))


def slowly(logits, blocked, count):
    """Values and ids of the words that may be said, [rows] lists."""
    logp = logits.log_softmax(-1)
    logp[..., blocked] = -torch.inf
    values, ids = top_words(logp, count)
    return [[(i, v) for i, v in zip(*row, strict=True) if v > -torch.inf] for row in zip(ids, values, strict=True)]


@pytest.mark.parametrize("V", [1, 2, 5, 63, 64, 65, 200, 3001])
@pytest.mark.parametrize("scale", [1.0, 0.2], ids=["rarely equal", "often equal"])
@pytest.mark.parametrize("blocked", [[], [0, 1], [0, 1, 3]])
@every_kernel
def test_the_words_are_those_of_the_slow_way(best_words, V, scale, blocked):
    generator, blocked = torch.Generator().manual_seed(V), [word for word in blocked if word < V]
    logits = torch.randn(9, V, generator=generator)
    if scale < 1:
        logits = (logits / scale).round() * scale  # equal words: the lower ids count
    logits[3, V // 2] = -torch.inf
    for count in {min(count, V) for count in (1, 2, 4, 9)}:
        values, ids = by(best_words, logits.view(3, 3, V), blocked, count)
        assert values.shape == ids.shape == (3, 3, count)
        for row, found in enumerate(zip(ids.view(9, count), values.view(9, count), strict=True)):
            said = [(int(word), value) for word, value in zip(*found, strict=True) if value > -torch.inf]
            expected = slowly(logits, blocked, count)[row]
            assert [word for word, _ in said] == [int(word) for word, _ in expected]
            for (_, one), (_, other) in zip(said, expected, strict=True):
                assert abs(one - other) < 3e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1, 77, 99])
@every_kernel
def test_a_row_that_is_not_finite_is_nan_and_no_other(best_words, bad, place):
    logits = torch.randn(5, 100)
    logits[2, place] = bad
    values, _ = by(best_words, logits, [0, 1], 4)
    assert values.isnan().any(1).tolist() == [False, False, True, False, False]
    values, _ = by(best_words, torch.full((1, 100), -torch.inf), [0], 4)
    assert values.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_type_may_lie_apart(dtype):
    whole = torch.randn(2, 3, 112, generator=torch.Generator().manual_seed(3)).to(dtype)
    together, apart = (list(by(triton_kernels.best_words, each, [0], 4)) for each in (whole[..., :100].clone(), whole))
    again = list(by(triton_kernels.best_words, whole[..., :100], [0], 4))
    assert all(map(torch.equal, together, again)) and not torch.equal(together[0], apart[0])
    values = whole[..., :100].float().log_softmax(-1).gather(-1, again[1])
    assert again[0].dtype == torch.float32 and torch.allclose(again[0], values, atol=3e-6)
    with pytest.raises(AssertionError):  # and not the words of other memory
        triton_kernels.best_words(whole.to(DEVICE)[..., ::2], [0], 4)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    logits, before = torch.randn(50, 777, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    expected = native.best_words(logits, [0, 1], 5)
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, native.best_words(logits, [0, 1], 5), expected))
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("options", [{"beam_size": 3, "n_best": 2}, {"method": "greedy"}, {"block_unk": True}], ids=str)
def test_captions_and_what_is_kept_of_them_are_those_of_the_slow_way(options, monkeypatch):
    model = make_model(torch.float32).eval()
    grid = torch.randn(11, model.sizes.grid_size, model.sizes.feature_dim, generator=torch.Generator().manual_seed(2))
    calls, best_words = [], native.best_words
    monkeypatch.setattr(decoding.native, "best_words", lambda *all: calls.append(1) or best_words(*all))
    found = decode(model, grid, DecodeOptions(max_length=8, keep_attention=True, **options))
    steps = len(calls)
    # No caption is so long that it could be blocked, but it is looked for.
    expected = decode(model, grid, DecodeOptions(max_length=8, keep_attention=True, block_ngram=20, **options))
    assert len(calls) == steps > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert [each.tokens for each in mine] == [each.tokens for each in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert abs(one.score - other.score) < 1e-5 and one.finished == other.finished
            assert torch.allclose(one.probabilities, other.probabilities, atol=1e-6)
            assert torch.equal(one.alphas, other.alphas) and torch.equal(one.gates, other.gates)


def test_broken_logits_are_refused():
    model = make_model(torch.float32).eval()
    with torch.no_grad():
        model.vocabulary.bias[5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        decode(model, torch.zeros(2, model.sizes.grid_size, model.sizes.feature_dim))
