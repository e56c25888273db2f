"""How widely attention is spread: counted right in training and in decoding, written down, and warned of once."""

import json
import math

import pytest
import torch

from sat import train
from sat.config import load_config
from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.evaluation.split import _attention_use
from sat.meter import AttentionUse
from tests.helpers_captioner import PAPER, D, L, Reference, all_attentions, loss_sums, make_batch, make_model
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> list[str]:
    """Settings of a training of 12 steps, three an epoch."""
    root = tmp_path_factory.mktemp("features")
    make_feature_dataset(root / "data", {"train": 18, "val": 4})
    return [*SMALL, *with_tokenizer(root), "train.learning_rate=0.01", "train.patience=0", "train.epochs=4"]


def slow_counts(model, settings) -> tuple[float, float]:
    """Entropy and greatest weight of each word's alpha, by the equations, one word at a time."""
    grid, captions, lengths = make_batch()
    alphas, reference = [], Reference(model, settings)
    for b, k in lengths.nonzero().tolist():
        reference.caption(grid[b], captions[b, k, : lengths[b, k] + 1].tolist(), choose=alphas.append)
    found = [alpha.tolist() for alpha in alphas]
    entropy = -sum(weight * math.log(weight) for alpha in found for weight in alpha)
    return entropy, sum(max(alpha) for alpha in found)


@pytest.mark.parametrize("how", ["fast, native", "fast, torch", "step by step"])
def test_training_counts_the_entropy_and_the_top_cell_of_every_word(how, monkeypatch):
    settings = PAPER | {"attention": "soft"}
    model = make_model(**settings, kernels="torch" if how == "fast, torch" else "auto")
    if how == "step by step":
        monkeypatch.setattr("sat.model.objectives.rollout.fast", train_step_by_step)
    counts = loss_sums(model, *make_batch()).counts
    entropy, top = slow_counts(model, settings)
    assert counts["entropy"].item() == pytest.approx(entropy, rel=1e-9)
    assert counts["top"].item() == pytest.approx(top, rel=1e-9)
    assert not counts["entropy"].requires_grad and not counts["top"].requires_grad


def train_step_by_step(model, memory, packing):
    from sat.model.objectives.rollout import step_by_step

    return step_by_step(model, memory, packing, 0.0)


@all_attentions
def test_there_is_nothing_to_count_without_attention(attention):
    counts = loss_sums(make_model(attention=attention), *make_batch()).counts
    assert ({"entropy", "top"} <= counts.keys()) == (attention != "none")


def test_a_cell_that_weighs_nothing_adds_no_entropy():
    model = make_model(**PAPER)
    with torch.no_grad():
        model.attention.score.weight.fill_(1e4)  # one cell has all the weight, the others underflow
    counts = loss_sums(model, *make_batch()).counts
    assert counts["entropy"].item() == pytest.approx(0, abs=1e-6) and counts["top"] == counts["tokens"]


def test_decoding_sums_over_the_words_of_the_best_caption_and_its_end():
    model = make_model(**PAPER).float().eval()
    ((best, *_),) = decode([model], torch.randn(1, L, D), DecodeOptions(keep_attention=True, max_length=5))
    use = _attention_use(best)
    assert use.words == len(best.tokens) + best.finished
    assert use.entropy == pytest.approx(-float((best.alphas * best.alphas.log()).sum()), rel=1e-5)
    assert use.values()["top_cell"] == pytest.approx(float(best.alphas.amax(1).mean()), rel=1e-5)


def test_even_attention_has_all_cells_and_no_words_have_none():
    assert AttentionUse(4, 4 * math.log(49), 4 / 49).values() == pytest.approx(
        {"effective_cells": 49, "top_cell": 1 / 49}
    )
    assert AttentionUse(2, 0.0, 2.0).values() == {"effective_cells": 1, "top_cell": 1}
    assert AttentionUse().values() == {} and math.isnan(AttentionUse().effective_cells)


def run(given, folder, alone, capsys, *more: str) -> tuple[list[dict], list[str]]:
    """The journal of a training, and its warnings."""
    train.train(load_config(None, [*given, f"train.run_dir={folder}", *more]), alone)
    said = capsys.readouterr()
    warnings = [line for line in (said.out + said.err).splitlines() if "attention is flat" in line]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], warnings


def test_training_and_evaluation_write_it_down(features, alone, tmp_path, capsys):
    lines, _ = run(features, tmp_path / "run", alone, capsys)
    training = [line for line in lines if "nll_per_token" in line]
    evaluation = [line for line in lines if "val/CIDEr" in line]
    assert len(training) == 12 and len(evaluation) == 4
    for line, label in [(line, "attention") for line in training] + [(line, "val") for line in evaluation]:
        cells, top = line[f"{label}/effective_cells"], line[f"{label}/top_cell"]
        assert 1 <= cells <= 4.001 and 0.249 <= top <= 1, label


def test_the_scores_of_the_best_step_stand_beside_the_last_ones(features, alone, tmp_path, capsys):
    lines, _ = run(features, tmp_path / "run", alone, capsys)
    best = -1.0
    for line in (line for line in lines if "val/CIDEr" in line):
        better = line["val/CIDEr"] > best
        best = max(best, line["val/CIDEr"])
        assert ("best/CIDEr" in line) == better
        if better:
            assert line.pop("best/step") == line["step"]
            assert {n: v for n, v in line.items() if n.startswith("best/")} == {
                n.replace("val/", "best/"): v for n, v in line.items() if n.startswith("val/") and n != "val/unfinished"
            }


def test_flat_soft_attention_is_warned_of_once_and_after_a_fifth_of_the_training(features, alone, tmp_path, capsys):
    _, said = run(features, tmp_path / "run", alone, capsys)  # N(0, 0.01) begins flat
    assert len(said) == 1 and "step 3 of 12" in said[0] and "model.penalty_weight, now 1" in said[0]
    _, said = run(features, tmp_path / "run", alone, capsys, "train.epochs=5")  # goes on, and has said it
    assert not said
    _, said = run(features, tmp_path / "free", alone, capsys, "model.penalty_weight=0", "train.log_every=100")
    assert len(said) == 1 and "step 12 of 12" in said[0] and "penalty_weight is 0 already" in said[0]


@pytest.mark.parametrize("attention", ["hard", "none"])
def test_other_attention_is_not_warned_of(features, alone, tmp_path, capsys, attention):
    lines, said = run(features, tmp_path / "run", alone, capsys, f"model.attention={attention}", "train.epochs=1")
    assert not said
    assert any("effective_cells" in name for line in lines for name in line) == (attention == "hard")


def test_sharp_attention_is_not_warned_of(features, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "FLAT_SHARE", 1.1)
    assert not run(features, tmp_path / "run", alone, capsys, "train.epochs=1")[1]
