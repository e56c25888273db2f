"""Self-critical training against the policy gradient written out: all captions of a tiny model, one by one."""

import itertools
import math

import pytest
import torch

from sat.model.at_rest import PackableLinear
from sat.model.captioner import Captioner
from sat.model.draws import Draws
from sat.model.kernels import torch_kernels
from sat.model.loss import linear_cross_entropy, total_loss
from sat.model.objectives import sampling, self_critical
from sat.model.objectives.options import SelfCriticalOptions
from sat.model.objectives.rollout import roll_out, word_losses
from sat.model.objectives.sampling import Samples, draw_samples
from sat.model.objectives.self_critical import SelfCritical
from sat.model.packing import pack
from tests.helpers_captioner import PAPER, TUTORIAL, D, L, Reference, V, both_presets, make_model

START, END = 1, 2
ONE = torch.ones(1, 1, dtype=torch.int64)


def every_caption(longest: int) -> list[tuple[int, ...]]:
    """All that `without_start` may draw: `<end>` after fewer than `longest` words, or `longest` words."""
    words = [word for word in range(V) if word not in (START, END)]
    ended = [(*said, END) for n in range(longest) for said in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=longest))


def without_start(**settings) -> Captioner:
    """A model that never says `<start>`, which as a word in the middle would be one that the paper does not know."""
    model = make_model(**settings)
    with torch.no_grad():
        model.vocabulary.bias[START] = -1e4
    return model


def worth(caption: tuple[int, ...]) -> float:
    """A reward without any structure."""
    return math.sin(sum((place + 2.3) * (word + 1.7) for place, word in enumerate(caption)))


def grids(count: int = 1) -> torch.Tensor:
    return torch.randn(1, L, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64).expand(count, -1, -1)


def log_probability(reference: Reference, caption: tuple[int, ...]) -> torch.Tensor:
    logits = reference.caption(grids()[0], [START, *caption])[3]
    return sum(each.log_softmax(0)[word] for each, word in zip(logits, caption, strict=True))


def as_samples(captions: list[list[tuple[int, ...]]], longest: int) -> Samples:
    padded = [[[START, *each] + [0] * (longest - len(each)) for each in mine] for mine in captions]
    return Samples(torch.tensor(padded), torch.tensor([[len(each) for each in mine] for mine in captions]))


@pytest.mark.parametrize(
    ("settings", "baseline", "n", "longest"),
    [
        (PAPER, "others", 2, 2),
        (PAPER, "others", 3, 1),
        (PAPER, "greedy", 1, 2),
        (TUTORIAL, "greedy", 1, 2),
        (PAPER | {"attention": "none"}, "greedy", 1, 2),
    ],
    ids=["pairs", "triples", "greedy", "tutorial", "without attention"],
)
def test_the_expected_gradient_is_that_of_the_expected_reward(settings, baseline, n, longest, monkeypatch):
    """Over all that can be drawn, each by its probability: an image of its own, whose rewards weigh so much."""
    model = without_start(**settings)
    reference, everything = Reference(model, settings), every_caption(longest)
    logs = [log_probability(reference, caption) for caption in everything]
    chances = {caption: each.exp().item() for caption, each in zip(everything, logs, strict=True)}
    assert sum(chances.values()) == pytest.approx(1)
    expected = -sum(log.exp() * worth(caption) for caption, log in zip(everything, logs, strict=True))

    drawn = list(itertools.product(everything, repeat=n))
    weights = [math.prod(chances[each] for each in mine) for mine in drawn]
    greedy = [max(everything, key=lambda caption: chances[caption])] if baseline == "greedy" else []
    samples = as_samples([[*mine, *greedy] for mine in drawn], longest)
    monkeypatch.setattr(self_critical, "draw_samples", lambda *_: samples)
    options = SelfCriticalOptions(samples=n, baseline=baseline)

    def reward(captions, references):
        each = [weight for weight in weights for _ in range(n + len(greedy))]
        assert references == [["no word is read"]] * len(captions)
        return [weight * worth(tuple(caption)) for weight, caption in zip(each, captions, strict=True)]

    objective, lengths = SelfCritical(model, reward, options), ONE.expand(len(drawn), 1)
    references = [["no word is read"] for _ in drawn]
    sums = objective(grids(len(drawn)), ONE.new_zeros(len(drawn), 1, 2), lengths, keys=lengths, references=references)
    assert objective.weighs(lengths) == (0, n * len(drawn))
    total_loss(sums, 0, n).backward()
    gradients = torch.autograd.grad(expected, list(reference.p.values()), allow_unused=True)
    for name, gradient in zip(reference.p, gradients, strict=True):
        ours = model.get_parameter(name).grad
        theirs = torch.zeros_like(ours) if gradient is None else gradient  # of what serves further words alone
        assert (ours - theirs).norm() <= 1e-9 * max(theirs.norm(), 1e-3), name
    assert max(parameter.grad.abs().max() for parameter in model.parameters()) > 1e-3


@both_presets
def test_captions_are_drawn_by_their_probability(preset):
    model = without_start(**preset).eval()
    reference, count = Reference(model, preset), 20_000
    keys = torch.arange(count)[None]
    with torch.no_grad():
        samples = draw_samples(model, model.encode(grids()), keys, 2, greedy=True)
        chances = {each: log_probability(reference, each).exp().item() for each in every_caption(2)}
    found = [
        tuple(words[1 : length + 1]) for words, length in zip(*(each[0].tolist() for each in samples), strict=True)
    ]
    first = {word: sum(chance for each, chance in chances.items() if each[0] == word) for word in range(V)}
    best = max(first, key=first.__getitem__)
    assert found[-1][0] == best and found[-1] == max(
        (each for each in chances if each[0] == best), key=chances.__getitem__
    )
    surplus = sum((found[:-1].count(each) - count * p) ** 2 / (count * p) for each, p in chances.items())
    assert surplus < len(chances) + 5 * math.sqrt(2 * len(chances))  # chi squared: mean and five deviations


def test_samples_are_drawn_with_the_weights_at_rest(monkeypatch):
    model, found = make_model(**PAPER), []
    layers = [each for each in model.modules() if isinstance(each, PackableLinear)]

    def drawn(*given):
        found.extend(each.kernels_at_rest for each in layers)
        return draw_samples(*given)

    monkeypatch.setattr(self_critical, "draw_samples", drawn)
    objective = SelfCritical(model, lambda samples, _: [0.0] * len(samples), SelfCriticalOptions(samples=2))
    objective(grids(), ONE.new_zeros(1, 1, 2), ONE, references=[["no word is read"]])
    assert found == [model.kernels] * len(layers) and {each.kernels_at_rest for each in layers} == {None}


def test_a_sample_is_a_function_of_its_key_and_picture_whatever_else_is_drawn():
    model = make_model(torch.float32, **PAPER | {"dropout": 0.5}).train()
    generator = torch.Generator().manual_seed(1)
    grid = torch.randn(7, L, D, generator=generator)
    keys = torch.randint(-(1 << 62), 1 << 62, (7, 6), generator=generator)
    with torch.no_grad():
        whole = draw_samples(model, model.encode(grid), keys, 9, greedy=False)
        assert len({tuple(each) for each in whole.captions.flatten(0, 1).tolist()}) > 30
        for images, n in ((slice(2, 5), 6), (slice(6, 7), 2)):
            part = draw_samples(model, model.encode(grid[images]), keys[images, :n], 9, greedy=True)
            assert torch.equal(part.lengths[:, :n], whole.lengths[images, :n])
            shared = min(part.captions.shape[2], whole.captions.shape[2])
            assert torch.equal(part.captions[:, :n, :shared], whole.captions[images, :n, :shared])


@both_presets
@pytest.mark.parametrize("attention", ["soft", "none"])
def test_samples_are_scored_under_the_dropout_that_they_were_drawn_under(preset, attention, monkeypatch):
    """Where the best word is taken instead of a drawn one, scoring them again finds each of them to be the best."""
    model = make_model(torch.float32, **preset | {"dropout": 0.5, "attention": attention}).train()
    monkeypatch.setattr(sampling, "choose", lambda logits, _: logits.argmax(-1))
    grid = torch.randn(5, L, D, generator=torch.Generator().manual_seed(2))
    keys = torch.arange(20).view(5, 4) * 7919
    with torch.no_grad():
        memory = model.encode(grid)
        captions, lengths = draw_samples(model, memory, keys, 8, greedy=True)
        packing = pack(captions[:, :4], lengths[:, :4])
        draws = Draws.of(keys, packing)
        words = word_losses(model, roll_out(model, memory.pick(packing.images), draws, 0.0), draws, 0.0)
        assert int(words.correct.sum()) == int(lengths[:, :4].sum())
        greedy = draw_samples(model.eval(), model.encode(grid), keys[:, :1], 8, greedy=False)
    width = greedy.captions.shape[2]
    assert torch.equal(captions[:, 4, :width], greedy.captions[:, 0]) and not captions[:, 4, width:].any()
    assert (captions[:, 0] != captions[:, 4]).any()  # dropout does change captions


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_words_count_as_often_as_their_factors_say(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes, targets = ((11, 5), (V, 5), (V,)), torch.arange(11)
    tensors = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    factors = torch.randn(11, generator=generator).to(torch.promote_types(dtype, torch.float32))
    words = linear_cross_entropy(*tensors, targets, 0.0, torch_kernels, factors)
    found = torch.autograd.grad(words.objective, tensors)
    wide = [each.detach().double().requires_grad_() for each in tensors]
    nll = torch.nn.functional.cross_entropy(wide[0] @ wide[1].t() + wide[2], targets, reduction="none")
    expected = torch.autograd.grad((factors * nll).sum(), wide)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(words.nll.double(), nll.detach(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def lengths_of_words(samples, _):
    return [float(len(each)) for each in samples]


def test_pictures_without_captions_are_not_sampled_and_weigh_nothing():
    model = make_model(**PAPER)
    objective = SelfCritical(model, lengths_of_words, SelfCriticalOptions(samples=3, max_length=6))
    grid = torch.randn(4, L, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    captions, keys = torch.zeros(4, 2, 3, dtype=torch.int64), torch.arange(8).view(4, 2)
    some, texts = torch.tensor([[0, 0], [2, 0], [0, 0], [1, 2]]), [["a"]] * 4
    spoilt = grid.clone()
    spoilt[::2] = torch.nan
    whole = objective(spoilt, captions, some, keys=keys, references=texts)
    alone = objective(grid[1::2], captions[1::2], some[1::2], keys=keys[1::2], references=texts[:2])
    assert objective.weighs(some) == objective.weighs(some[1::2]) == (0, 6)
    untimed = {name for name in whole.counts if not name.endswith("seconds")}
    assert all(torch.equal(whole.counts[name], alone.counts[name]) for name in untimed)
    assert int(whole.counts["captions"]) == 6 and whole.counts["reward"] > 6
    assert whole.per_caption.item() == pytest.approx(alone.per_caption.item())

    nothing = objective(spoilt[::2].nan_to_num(), captions[::2], some[::2], keys=keys[::2], references=texts[:2])
    assert nothing.counts.keys() == whole.counts.keys() and not any(map(bool, nothing.counts.values()))
    total_loss(nothing, 1, 1).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples": 1}, "draw at least 2, or set self_critical.baseline=greedy"),
        ({"cider_d": 0}, "nothing is rewarded"),
        ({"baseline": "none"}, "self_critical.baseline is 'none'; choose one of others, greedy"),
        ({"samples": 0}, "self_critical.samples is 0; it must be above 0"),
        ({"length": -1.0}, "self_critical.length"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SelfCriticalOptions(**settings)


def test_logits_that_are_not_finite_are_named():
    model = make_model(**PAPER)
    with torch.no_grad():
        model.vocabulary.bias[3] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            draw_samples(model, model.encode(grids()), ONE, 3, greedy=False)


@pytest.mark.gpu
@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_a_gpu_draws_and_learns_what_a_cpu_does(baseline):
    """In float64, so that no word falls to the other side of a rounding."""
    grid = torch.randn(4, L, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lengths, keys = torch.tensor([[1, 2], [0, 0], [2, 0], [1, 1]]), torch.arange(8).view(4, 2)
    options, found = SelfCriticalOptions(samples=3, max_length=6, baseline=baseline), []
    for device in ("cpu", "cuda"):
        model = make_model(**PAPER | {"dropout": 0.5, "kernels": "torch"}).to(device).train()
        objective = SelfCritical(model, lengths_of_words, options)
        captions = torch.zeros(4, 2, 3, dtype=torch.int64)
        sums = objective(grid.to(device), captions, lengths, 0.0, None, keys.to(device), [["a"]] * 4)
        total_loss(sums, 0, 9).backward()
        gradient = torch.cat([each.grad.flatten() for each in model.parameters()])
        counts = {name: float(count) for name, count in sums.counts.items() if not name.endswith("seconds")}
        found.append((counts, gradient.cpu()))
    assert found[1][0] == pytest.approx(found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-9, atol=1e-12)
    assert found[0][1].abs().max() > 1e-3
