"""Decoding with the real model: the same rules as with the toy, its attention, ensembles, and the benchmark."""

import json
from dataclasses import replace

import pytest
import torch

from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.model import captioner as captioner_module
from sat.model.captioner import Captioner
from sat.model.spec import PRESETS, CaptionerSpec, Sizes
from sat.text import END
from tests.helpers_decoding import assert_same, log_probs, one_thread, slow_beam_search  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")

PRESETS_AND_KINDS = [("paper", "soft"), ("tutorial", "soft"), ("paper", "hard"), ("tutorial", "none")]


def captioner(preset="paper", kind="soft", seed=0, vocab_size=40, **changes) -> Captioner:
    """A small real model whose words are peaked, so that rounding does not decide, and whose captions end."""
    torch.manual_seed(seed)
    widths = {"embedding_dim": 16, "lstm_dim": 16, "attention_dim": 8}
    spec = CaptionerSpec.of_preset(preset, attention=kind, **widths | changes)
    model = Captioner(spec, Sizes(vocab_size, 4, 12)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    with torch.no_grad():
        model.vocabulary.bias[END] += 4
    return model


@pytest.mark.parametrize("preset, kind", PRESETS_AND_KINDS)
def test_the_captioners_images_at_once_equal_a_beam_search_per_image(preset, kind):
    model, grid = captioner(preset, kind), torch.randn(10, 4, 12)
    options = DecodeOptions(beam_size=4, n_best=4, max_length=8, length_penalty=0.5)
    with torch.inference_mode():
        for image, found in zip(grid, decode(model, grid, options)):
            assert_same(found, slow_beam_search(model, image[None], options))


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_the_captioners_captions_do_not_depend_on_the_batch(method):
    model, grid, ids = captioner(), torch.randn(12, 4, 12), list("abcdefghijkl")
    options = DecodeOptions(method=method, n_best=1 if method == "greedy" else 3, keep_attention=True)
    together = decode(model, grid, options, ids)
    for place, found in enumerate(together):
        alone = decode(model, grid[place : place + 1], options, ids[place : place + 1])[0]
        assert_same(found, alone)
        for mine, theirs in zip(found, alone):
            torch.testing.assert_close(mine.alphas, theirs.alphas)


def test_where_hard_attention_samples_depends_on_the_seed_and_the_image_alone():
    models = [captioner(kind="hard", seed=seed, hard_inference="sample") for seed in (0, 1)]
    grid, ids = torch.randn(12, 4, 12), list("abcdefghijkl")
    options = DecodeOptions(n_best=3, keep_attention=True)
    together = decode(models, grid, options, ids)
    torch.manual_seed(99)  # no generator is asked
    for place in reversed(range(len(ids))):
        (alone,) = decode(models, grid[place : place + 1], options, ids[place : place + 1])
        assert_same(together[place], alone)
    others = decode(models, grid, replace(options, seed=1), ids), decode(models, grid, options, ids[1:] + ids[:1])
    for other in others:
        assert sum(a[0].tokens != b[0].tokens for a, b in zip(together, other)) > 3
    with pytest.raises(ValueError, match="image_ids must name the 12 images, got none"):
        decode(models, grid, options)


def test_hard_attention_draws_anew_for_each_image_word_beam_and_model(monkeypatch):
    drawn, plain = [], captioner_module.attend_for_inference

    def keeping(*arguments):
        drawn.append(arguments[-1].flatten())
        return plain(*arguments)

    monkeypatch.setattr(captioner_module, "attend_for_inference", keeping)
    models = [captioner(kind="hard", seed=seed, hard_inference="sample") for seed in (0, 1)]
    decode(models, torch.randn(50, 4, 12), DecodeOptions(max_length=6), [str(number) for number in range(50)])
    numbers = torch.cat(drawn)
    assert len(numbers) > 1000 and len(numbers.unique()) == len(numbers)
    assert numbers.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / len(numbers)) ** 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["beam", "sample"])
def test_a_gpu_finds_the_captions_of_the_cpu(method):
    model, grid, ids = captioner(), torch.randn(12, 4, 12), list("abcdefghijkl")
    options = DecodeOptions(method=method, n_best=3, block_ngram=2, keep_attention=True)
    expected = decode(model, grid, options, ids)
    for found, on_cpu in zip(decode(model.cuda(), grid.cuda(), options, ids), expected):
        assert_same(found, on_cpu)


def test_the_captioners_attention_has_one_distribution_per_word_and_end():
    for found in decode(captioner(), torch.randn(6, 4, 12), DecodeOptions(n_best=3, keep_attention=True)):
        for hypothesis in found:
            assert hypothesis.alphas.shape == (len(hypothesis.tokens) + hypothesis.finished, 4)
            torch.testing.assert_close(hypothesis.alphas.sum(1), torch.ones(len(hypothesis.alphas)))


@pytest.mark.parametrize(("preset", "gate"), [("paper", "scalar"), ("tutorial", "vector"), ("paper", "none")])
def test_the_gate_is_the_one_that_scales_the_context(preset, gate):
    model = captioner(preset=preset, gate=gate)
    assert model.spec.gate == gate
    with torch.no_grad():
        state = model.init_state(model.encode(torch.randn(5, 4, 12)))
        found = model.gate_mean(state)
    if gate == "none":
        assert found is None
        assert decode(model, torch.randn(1, 4, 12), DecodeOptions(keep_attention=True))[0][0].gates is None
        return
    expected = 1 / (1 + (-state.h @ model.gate.weight.T - model.gate.bias).exp())  # [5, 1, 1 or D]
    torch.testing.assert_close(found, expected.mean(-1))
    assert found.shape == (5, 1)


def test_captioners_of_different_shape_make_an_ensemble():
    models, grid = [captioner("paper"), captioner("tutorial", "none")], torch.randn(3, 4, 12)
    options = DecodeOptions(n_best=2, max_length=6)
    for image, found in zip(grid, decode(models, grid, options)):
        for hypothesis in found:
            words, total = hypothesis.tokens + [END] * hypothesis.finished, 0.0
            with torch.inference_mode():
                for place, word in enumerate(words):
                    chances = [log_probs(model, image[None], words[:place])[word].exp() for model in models]
                    total += (sum(chances) / 2).log().item()
            assert hypothesis.score == pytest.approx(total, abs=1e-4)


def test_the_benchmark_compares_equal_captions_and_writes_its_rows(tmp_path):
    from sat.bench.decode import run

    for preset in PRESETS:
        rows = run(tmp_path / "rows.json", grids="2x2", images=3, rounds=1, preset=preset, width=64, vocab_size=300)
        assert json.loads((tmp_path / "rows.json").read_text()) == rows
        assert [(row["grid"], row["precision"], row["identical"]) for row in rows] == [("2x2", "fp32", True)]
        assert rows[0]["ratio"] > 0 and 5 < rows[0]["words_per_caption"] < 25
