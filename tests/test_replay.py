"""An objective's sums through a recording: those without one, whatever came before in the same memory."""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch

from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives import replayed as replayed_module
from sat.model.objectives.options import SelfCriticalOptions
from sat.model.objectives.replayed import LIMIT
from sat.model.objectives.self_critical import SelfCritical
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.recording import record_on_gpu
from sat.model.spec import CaptionerSpec, Sizes
from tests.helpers_captioner import all_attentions
from tests.helpers_kernels import needs_compiler

V, L, D = 23, 11, 37
WIDTHS = {"embedding_dim": 13, "lstm_dim": 21, "attention_dim": 19}
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
each_device = pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_compiler), ON_GPU])


def again(work):
    """In place of a CUDA graph: at the same addresses, by running it again."""
    work()
    return work


class Counted:
    """A recorder that counts."""

    def __init__(self, device):
        self.record, self.recorded, self.replayed = again if device == "cpu" else record_on_gpu(), 0, 0

    def __call__(self, work):
        play = self.record(work)
        self.recorded += 1

        def replay():
            self.replayed += 1
            play()

        return replay


@pytest.fixture
def replays(monkeypatch):
    """Objectives of a model on a device: one that is replayed, its recorder, and one that is not."""

    def make(device, preset="paper", kernels="auto", dtype=None, objective=TeacherForcing, **settings):
        torch.manual_seed(0)
        spec = CaptionerSpec.of_preset(preset, **WIDTHS | settings)
        model = Captioner(spec, Sizes(V, L, D), kernels)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        model.to(device=device, dtype=dtype or (torch.float64 if device == "cpu" else torch.float32))
        counted, replayed, plain = Counted(device), objective(model), objective(model)
        recorders = {id(replayed): counted}
        monkeypatch.setattr(replayed_module, "choose_recorder", lambda *_: recorders["now"])

        def take(objective, *batch, **how):
            recorders["now"] = recorders.get(id(objective))
            return step(objective, *batch, **how)

        return replayed, plain, counted, take

    return make


def batch(seed, images=5, captions=4, longest=9, device="cpu", regions=False, dtype=torch.float32):
    """Grid, captions and lengths, some of which are not there, regions and keys."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(-1, longest + 1, (images, captions), generator=generator).clamp(min=0)
    lengths[images // 2, captions // 2] = longest
    words = torch.randint(4, V, (images, captions, longest + 1), generator=generator)
    words[:, :, 0] = 1
    grid = torch.randn(images, L, D, generator=generator).to(device, dtype)
    real = torch.randint(1, L + 1, (images,), generator=generator).to(device) if regions else None
    return grid, words, lengths, 0.0, real, torch.randint(1 << 62, lengths.shape, generator=generator)


def step(objective, *of_batch, scale=1.0):
    """Sums by name and gradients of all parameters, in float64."""
    objective.zero_grad(set_to_none=True)
    sums = objective(*of_batch)
    lengths = of_batch[2]
    (scale * total_loss(sums, float(lengths.sum()), float((lengths > 0).sum()))).backward()
    found = {"per_token": sums.per_token.detach(), "per_caption": sums.per_caption.detach(), **sums.counts}
    found |= {f"of {name}": each.grad.clone() for name, each in objective.named_parameters() if each.grad is not None}
    return {name: each.double() for name, each in found.items()}


def assert_same(found, expected, tolerance=None):
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        tolerance = tolerance or (1e-10 if one.device.type == "cpu" else 5e-5)
        assert one.shape == other.shape and one.isfinite().all(), name
        assert float((one - other).norm()) <= tolerance * max(1.0, float(other.norm())), name


SIZES = [(5, 4, 9), (5, 4, 9), (11, 5, 6), (1, 1, 1), (5, 4, 13), (11, 5, 9), (4, 9, 9), (2, 40, 3), (5, 4, 9)]


@each_device
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("preset", ["paper", "tutorial"])
@all_attentions
def test_batches_of_any_lengths_one_after_the_other_get_what_they_get_without_a_recording(
    attention, preset, regions, device, replays
):
    sure = {"hard_exact": 1.0} if attention == "hard" and device == "cuda" else {}  # rounding would draw elsewhere
    settings = {"attention": attention, "label_smoothing": 0.1, "dropout": 0.4} | sure
    replayed, plain, counted, take = replays(device, preset, **settings)
    recorded = []
    for _ in range(3):
        for seed, sizes in enumerate(SIZES):
            given = batch(seed, *sizes, device=device, regions=regions)
            assert_same(take(replayed, *given), take(plain, *given))
        recorded.append(counted.recorded)
    assert counted.replayed == 2 * 3 * len(SIZES) + counted.recorded // 2  # a recording's forward direction serves it
    assert recorded[0] < 2 * len(SIZES) and recorded[1] == recorded[2]


@pytest.mark.parametrize("reward", ["caption", "later", "word", "mean"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_so_do_all_rewards_of_hard_attention_and_the_kernels_of_pytorch(kernels, reward, replays):
    settings = {"attention": "hard", "hard_reward": reward, "hard_exact": 0.3, "hard_entropy_weight": 0.1}
    replayed, plain, _, take = replays("cpu", kernels=kernels, **settings)
    for seed, sizes in enumerate(SIZES):
        given = batch(seed, *sizes)
        assert_same(take(replayed, *given), take(plain, *given))


@each_device
@pytest.mark.parametrize("attention", ["soft", "none"])
def test_so_do_samples_that_are_rewarded(attention, device, replays):
    def reward(samples, references):
        return [sum(words) % 7 + len(texts[0]) for words, texts in zip(samples, references, strict=True)]

    def objective(model):
        return SelfCritical(model, reward, SelfCriticalOptions(samples=3, max_length=9))

    replayed, plain, counted, take = replays(device, objective=objective, attention=attention, dropout=0.4)
    for seed, sizes in enumerate([*SIZES[:6], (6, 3, 2)]):
        given = *batch(seed, *sizes, device=device, regions=bool(seed % 2)), [["a" * b] for b in range(1, sizes[0] + 1)]
        found, expected = take(replayed, *given), take(plain, *given)
        for each in (found, expected):
            del each["sampling_seconds"], each["reward_seconds"]
        assert_same(found, expected)
    assert counted.replayed == 2 * 7 + counted.recorded // 2


@each_device
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
def test_so_do_stored_types_under_autocast(dtype, device, replays):
    replayed, plain, counted, take = replays(device, dtype=torch.float32)
    for seed in range(6):
        grid, *rest = batch(seed, device=device)
        given = (3 * grid).to(dtype), *rest
        with torch.autocast(device, torch.bfloat16, enabled=seed >= 3):
            found, expected = take(replayed, *given), take(plain, *given)
        assert_same(found, expected, 2e-2 if seed >= 3 else 5e-5)
    assert counted.replayed == 2 * 6 + counted.recorded // 2


@each_device
def test_a_gradient_that_is_scaled_or_added_to_is_right(device, replays):
    replayed, plain, _, take = replays(device)
    for seed in range(4):
        given = batch(seed, device=device)
        found, expected = take(replayed, *given, scale=2.0**seed), take(plain, *given, scale=2.0**seed)
        assert_same(found, expected)
    kept = []
    for objective in (replayed, plain):
        take(objective, *batch(0, device=device))
        for seed in (1, 2):
            given = batch(seed, device=device)
            total_loss(objective(*given), 7.0, 3.0).backward()
        kept.append({name: each.grad.double() for name, each in objective.named_parameters()})
    assert_same(*kept)


@each_device
def test_a_forward_pass_before_the_backward_pass_of_the_last_one_takes_nothing_from_it(device, replays):
    replayed, plain, counted, take = replays(device)
    take(replayed, *batch(0, device=device))
    before = counted.replayed
    one, other = batch(0, device=device), batch(1, device=device)
    take(replayed, *one)
    found = []
    for objective in (replayed, plain):
        objective.zero_grad()
        losses = [total_loss(objective(*each), 5.0, 5.0) for each in (one, other)] if objective is replayed else []
        if objective is plain:
            take(plain, *one)
            plain.zero_grad()
            losses = [total_loss(objective(*each), 5.0, 5.0) for each in (one, other)]
        for loss in reversed(losses):
            loss.backward()
        found.append({name: each.grad.double() for name, each in objective.named_parameters()})
    assert_same(*found)
    assert counted.replayed == before + 4  # two of a step, two of one of the later ones


@each_device
def test_nor_does_one_of_another_objective_as_they_share_memory(device, replays):
    replayed, plain, counted, take = replays(device)
    given, other = batch(0, device=device), TeacherForcing(replayed.model)
    expected = take(plain, *given)
    take(replayed, *given)
    before = counted.replayed
    replayed.zero_grad()
    for sums in [each(*given) for each in (replayed, other)]:
        (total_loss(sums, float(given[2].sum()), float((given[2] > 0).sum())) / 2).backward()
    assert counted.replayed == before + 2
    found = {f"of {name}": each.grad.double() for name, each in replayed.named_parameters()}
    assert_same(found, {name: each for name, each in expected.items() if name in found})


@each_device
def test_what_nobody_differentiates_is_not_replayed_and_a_pass_that_was_given_up_holds_nothing(device, replays):
    replayed, plain, counted, take = replays(device)
    given = batch(0, device=device)
    take(replayed, *given)
    before = counted.replayed
    with torch.no_grad():
        found = replayed(*given)
    assert counted.replayed == before
    sums = replayed(*given)
    assert counted.replayed == before + 1
    assert float(found.counts["nll"]) == pytest.approx(float(sums.counts["nll"]), rel=1e-6)
    del sums
    assert_same(take(replayed, *given), take(plain, *given))
    assert counted.replayed == before + 3


@each_device
def test_a_second_backward_pass_is_refused_as_its_words_may_be_gone(device, replays):
    replayed, _, _, take = replays(device)
    given = batch(0, device=device)
    take(replayed, *given)
    loss = total_loss(replayed(*given), 5.0, 5.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


@needs_compiler
def test_weights_that_change_between_the_passes_are_refused(replays):
    replayed, _, counted, take = replays("cpu")
    given = batch(0)
    counted.record = lambda work: (again(work), int)[1]  # a graph does not look at versions of weights either
    take(replayed, *given)
    loss = total_loss(replayed(*given), 5.0, 5.0)
    with torch.no_grad():
        replayed.model.vocabulary.bias.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_device
def test_a_batch_that_is_not_finite_leaves_nothing_behind(device, replays):
    replayed, plain, _, take = replays(device)
    for seed in range(3):
        grid, *rest = batch(seed, device=device)
        objective = replayed
        take(objective, grid, *rest)
        sums = objective(grid * float("nan"), *rest)
        assert sums.counts["nll"].isnan()
        total_loss(sums, 5.0, 5.0).backward()
        assert all(each.grad.isnan().any() for each in objective.parameters())
        given = batch(seed + 1, 4, 3, device=device)
        assert_same(take(replayed, *given), take(plain, *given))


@each_device
def test_weights_that_change_in_place_are_read_and_others_are_recorded_anew(device, replays):
    replayed, plain, counted, take = replays(device)
    given = batch(0, device=device)
    for change in (lambda each: each.mul_(0.9), lambda each: each.set_(each.clone())):
        take(replayed, *given)
        with torch.no_grad():
            for each in replayed.parameters():
                change(each)
        assert_same(take(replayed, *given), take(plain, *given))
    replayed.eval()
    assert_same(take(replayed, *given), take(plain, *given))
    replayed.train()
    replayed.model.embedding.weight.requires_grad_(False)
    found = take(replayed, *given)
    assert "of model.embedding.weight" not in found
    assert_same(found, take(plain, *given))
    assert counted.recorded == 8


@needs_compiler
def test_recordings_are_few_and_what_none_of_them_covers_is_not_replayed(replays):
    replayed, plain, counted, take = replays("cpu")
    for seed in range(56):
        grid, words, lengths, *rest = batch(seed, 13 - seed // 8 * 2, 33, 45)
        lengths.fill_(1 + 6 * (seed % 8))
        words = words[:, :, :1].expand(-1, -1, 45).contiguous()
        given = grid, words, lengths, *rest
        assert_same(take(replayed, *given), take(plain, *given))
    assert counted.recorded == 2 * LIMIT < 2 * 56


@each_device
def test_grids_of_regions_of_any_length_have_the_same_recordings(device, replays):
    replayed, plain, counted, take = replays(device)
    for longest in (L, 3, 7, 1, L, 5):
        grid, words, lengths, none, regions, keys = batch(0, device=device, regions=True)
        given = grid[:, :longest], words, lengths, none, regions.clamp(max=longest), keys
        assert_same(take(replayed, *given), take(plain, *given))
    assert counted.recorded == 2


@each_device
def test_regions_that_do_not_fit_are_refused_with_the_numbers_of_the_batch(device, replays):
    replayed, *_, take = replays(device)
    grid, *given, regions, keys = batch(0, device=device, regions=True)
    for wrong in (regions[:2], regions.repeat(2)):
        with pytest.raises(ValueError, match=f"of the {L} locations"):
            take(replayed, grid, *given, wrong, keys)
    with pytest.raises(ValueError, match=rf"got \[5, {L}, {D - 1}\]"):
        take(replayed, grid[..., 1:], *given, None, keys)


@needs_compiler
@pytest.mark.parametrize("fails", [1, 2])
def test_a_recording_that_failed_in_either_direction_is_made_again(fails, replays):
    replayed, plain, counted, take = replays("cpu")
    given = batch(0)

    def failing(work):
        if counted.recorded == fails - 1:
            raise torch.OutOfMemoryError
        return again(work)

    counted.record = failing
    with pytest.raises(torch.OutOfMemoryError):
        take(replayed, *given)
    counted.record = again
    assert_same(take(replayed, *given), take(plain, *given))


@each_device
def test_recordings_leave_their_results_in_the_same_memory(device, replays):
    replayed, _, counted, take = replays(device)
    for seed, sizes in enumerate(SIZES):
        take(replayed, *batch(seed, *sizes, device=device))
    recordings = replayed._replay._recordings.values()
    assert counted.recorded > 2 and len({each["gradient"].data_ptr() for each in recordings}) == 1 < len(recordings)


@each_device
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda objective: pickle.loads(pickle.dumps(objective))])
def test_a_copy_of_an_objective_records_for_itself(copied, device, replays):
    replayed, plain, counted, take = replays(device)
    given = batch(0, device=device)
    take(replayed, *given)
    other, before = copied(replayed), counted.recorded
    with torch.no_grad():
        for each in other.parameters():
            each.zero_()
    other(*given)
    assert counted.recorded == before + 2 and other._replay._model is other.model
    assert_same(take(replayed, *given), take(plain, *given))


def test_an_objective_that_nobody_holds_is_gone_at_once():
    objective = TeacherForcing(Captioner(CaptionerSpec.of_preset("paper", **WIDTHS), Sizes(V, L, D)))
    held = ref(objective)
    gc.disable()
    try:
        del objective
        assert held() is None
    finally:
        gc.enable()
