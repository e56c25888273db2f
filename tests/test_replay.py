"""An objective's sums through a recording: those without one, whatever came before in the same memory."""

import pytest
import torch

from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives import replayed as replayed_module
from sat.model.objectives.options import SelfCriticalOptions
from sat.model.objectives.replayed import LIMIT, ROWS, covers, new_room
from sat.model.objectives.self_critical import SelfCritical
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.packing import Room, pack
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
    for seed in range(LIMIT + 20):
        grid, words, lengths, *rest = batch(seed, 9 - seed // 8, 33, 30)
        lengths.fill_(1 + 4 * (seed % 8))
        words = words[:, :, :1].expand(-1, -1, 30).contiguous()
        given = grid, words, lengths, *rest
        assert_same(take(replayed, *given), take(plain, *given))
    assert counted.recorded == 2 * LIMIT


@pytest.mark.parametrize("seed", range(20))
def test_a_room_covers_its_batch_in_steps_of_rows_that_only_fall(seed):
    _, words, lengths, *_ = batch(seed, 3 + 7 * seed, 1 + seed % 6, 1 + seed)
    plain = pack(words, lengths)
    needed = Room(len(plain.images), plain.rows)
    room = new_room(needed)
    assert covers(room, needed) and covers(room, room) and list(room.rows) == sorted(room.rows, reverse=True)
    assert room.rows[0] < needed.rows[0] + ROWS and all(rows % ROWS == 0 for rows in room.rows)
    more = Room(room.images + 2, tuple(32 + rows for rows in room.rows))
    assert covers(more, room) and not covers(room, more)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_with_room_holds_the_words_of_the_plan_without(seed):
    _, words, lengths, *_ = batch(seed, 2 + seed, 1 + seed % 6, 1 + seed)
    plain = pack(words, lengths)
    roomy = pack(words, lengths, None, lambda needed: new_room(Room(needed.images + seed % 3, needed.rows)))
    real = roomy.real.bool()
    assert not plain.roomy and roomy.roomy and plain.real.all() and int(real.sum()) == len(plain.targets)
    for name in ("inputs", "targets", "word_row", "word_step"):
        assert torch.equal(getattr(roomy, name)[real], getattr(plain, name)), name
    for name in ("images", "row_image", "row_caption", "row_lengths"):
        mine, theirs = getattr(roomy, name), getattr(plain, name)
        assert torch.equal(mine[: len(theirs)], theirs), name
    assert not roomy.row_lengths[plain.rows[0] :].any() and not roomy.inputs[~real].any()
    ends, rows = roomy.rows_by_image
    for image in range(len(roomy.images)):
        mine = rows[ends[image] : ends[image + 1]]
        assert (roomy.row_image[mine] == image).all() and roomy.row_slot[mine].tolist() == list(range(len(mine)))
    before = torch.cat([torch.arange(roomy.rows[0]), torch.arange(len(roomy.inputs))])[roomy.previous]
    rowwise = torch.cat([torch.arange(roomy.rows[0]), roomy.word_row])[roomy.previous]
    assert torch.equal(rowwise, roomy.word_row) and (before >= 0).all()
