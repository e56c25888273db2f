"""Random numbers by identity: what they are functions of, that all implementations agree, and that they look random."""

import itertools

import numpy as np
import pytest
import torch
import xxhash

from sat.data.captions import caption_keys
from sat.data.order import derive_key, derive_keys
from sat.data.rows import Rows
from sat.model.draws import Draws, Site, derive, dropout, mix, uniform
from sat.model.kernels import native, torch_kernels
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.packing import pack
from tests.helpers_captioner import LENGTHS, all_attentions, both_presets, make_batch, make_model
from tests.helpers_kernels import every_kernels, needs_compiler

MASK = (1 << 32) - 1
KEYS = torch.randint(-(1 << 63), (1 << 63) - 1, (40,), generator=torch.Generator().manual_seed(0))


def integer(key: int, element: int) -> int:
    """The random integer of one element of a row, in whole numbers of Python."""
    block, rest = divmod(element, 32)
    x = (key & MASK) + (16 * block + rest % 16) * 0x9E3779B9 & MASK
    x = (x ^ x >> 16) * 0x7FEB352D & MASK ^ key >> 32 & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    x ^= x >> 16
    return x >> 16 if rest >= 16 else x & 0xFFFF


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_integers_are_those_of_the_mix_however_wide_the_row(device):
    for width in (1, 16, 17, 32, 75):
        found = torch_kernels.random_integers(KEYS.to(device), width)
        assert found.tolist() == [[integer(key, e) for e in range(width)] for key in KEYS.tolist()]


def test_keys_go_on_as_those_of_the_sample_order_do():
    parts = torch.tensor([0, 1, 1 << 40])
    for key, part in itertools.product(KEYS.tolist(), parts.tolist()):
        expected = derive_keys(np.array([key % (1 << 64)], np.uint64), np.array([part], np.uint64))[0]
        assert derive(torch.tensor(key), torch.tensor(part)).item() % (1 << 64) == int(expected)
    begun = np.array([derive_key(3, 4)], np.uint64)
    assert int(derive_keys(begun, np.array([5], np.uint64), np.array([6], np.uint64))[0]) == derive_key(3, 4, 5, 6)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_native_and_pytorch_dropout_give_the_same_bits(dtype):
    for width, rate in itertools.product((1, 31, 32, 50, 512), (1e-9, 0.1, 0.5, 0.999999)):
        x = torch.randn(5, 8, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        found, expected = (kernels.dropout(x, KEYS.view(5, 8), rate) for kernels in (native, torch_kernels))
        assert torch.equal(found, expected) and found.dtype == dtype


@pytest.mark.gpu
def test_a_gpu_drops_what_a_cpu_drops():
    x = torch.randn(40, 512)
    found = torch_kernels.dropout(x.cuda(), KEYS.cuda(), 0.3)
    assert torch.equal(found.cpu(), torch_kernels.dropout(x, KEYS, 0.3))
    assert torch.equal(uniform(KEYS.cuda()).cpu(), uniform(KEYS)) and torch.equal(mix(KEYS.cuda()).cpu(), mix(KEYS))


@every_kernels
def test_dropout_keeps_the_mean_and_its_gradient_meets_the_same_elements(kernels):
    keys = mix(torch.arange(4000))
    x = torch.ones(4000, 100, dtype=torch.float64, requires_grad=True)
    for rate in (0.1, 0.5, 0.7):
        y = dropout(x, keys, rate, kernels)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y)
        share = y.eq(0).double().mean().item()
        assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / y.numel()) ** 0.5 + 1e-5)
        assert y.unique().tolist() == pytest.approx([0, 1 / (1 - rate)], rel=1e-4)
    assert dropout(x * torch.nan, keys, 0.5, kernels).isnan().all()


# ------------------------------------------------------------------ what a caption's numbers are functions of


def rows_of(image_ids: list[str], data_set: int = 7) -> Rows:
    return Rows(0, data_set, image_ids, image_ids, [], [], [], None)


def keys_of(seed: int = 1, epoch: int = 0, images: int = 1, captions: int = 1, data_set: int = 7) -> np.ndarray:
    """int64 [images, captions]"""
    rows = rows_of([f"COCO_{i:012d}" for i in range(images)], data_set)
    which = np.tile(np.arange(captions), (images, 1))
    return caption_keys([(rows, i) for i in range(images)], which, seed, epoch)


def test_a_captions_key_depends_on_seed_epoch_data_set_image_and_caption_and_not_on_its_place():
    keys = [
        keys_of(seed, epoch, 20, 5, data_set) for seed in range(3) for epoch in range(3) for data_set in (7, 1 << 63)
    ]
    assert len(np.unique(keys)) == np.size(keys)
    rows = rows_of(["a", "b", "c"])
    which = np.array([[4, 2], [0, 1], [0, 0]])
    forth = caption_keys([(rows, 0), (None, 0), (rows, 2)], which, 5, 6)
    back = caption_keys([(rows, 2), (rows, 0)], which[[2, 0]], 5, 6)
    assert np.array_equal(forth[[2, 0]], back)
    image = xxhash.xxh3_64_intdigest(b"a")
    assert forth[0].view(np.uint64).tolist() == [derive_key(5, 6, 7, image, caption) for caption in (4, 2)]


def draws_of(lengths: torch.Tensor, keys: torch.Tensor) -> Draws:
    captions = torch.zeros(*lengths.shape, int(lengths.max()) + 1, dtype=torch.int64)
    return Draws.of(keys, pack(captions, lengths))


def by_word(draws: Draws, images: torch.Tensor) -> dict[tuple[int, int, int], list[int]]:
    """(image, caption, word) -> its keys at all sites; `images` are the names of the batch's."""
    packing = draws.packing
    sites = torch.stack([draws.of_words(site) for site in Site], 1).tolist()
    row = packing.word_row
    image = images[packing.images[packing.row_image[row]]].tolist()
    caption, word = packing.row_caption[row].tolist(), packing.word_step.tolist()
    return dict(zip(zip(image, caption, word, strict=True), sites, strict=True))


def test_each_part_of_a_batch_draws_what_the_whole_draws():
    keys = torch.from_numpy(keys_of(images=4, captions=3))
    whole = by_word(draws_of(LENGTHS, keys), torch.arange(4))
    drawn = {number for each in whole.values() for number in each}
    assert len(whole) == int(LENGTHS.sum()) and len(drawn) == len(Site) * len(whole)
    parts = {}
    for part in ([3, 0], [1, 2]):
        parts |= by_word(draws_of(LENGTHS[part], keys[part]), torch.tensor(part))
    assert parts == whole


@pytest.mark.parametrize("sampling", [0.0, 0.6])
@all_attentions
@both_presets
def test_sums_of_parts_add_up_with_dropout_sampling_and_hard_draws(preset, attention, sampling):
    grid, captions, lengths = make_batch()
    keys = torch.from_numpy(keys_of(images=4, captions=3))
    objective = TeacherForcing(make_model(**preset | {"attention": attention, "dropout": 0.5}))
    found = {}
    for name, parts in (("whole", [[0, 1, 2, 3]]), ("parts", [[3], [1], [2, 0]]), ("other", [[0, 1, 2, 3]])):
        used = keys + 1 if name == "other" else keys
        sums = [objective(grid[p], captions[p], lengths[p], sampling, None, used[p]) for p in parts]
        found[name] = [sum(getattr(each, part).item() for each in sums) for part in ("per_token", "per_caption")]
    assert found["parts"] == pytest.approx(found["whole"], rel=1e-9)
    assert found["other"][0] != pytest.approx(found["whole"][0], rel=1e-6)


def test_keys_of_another_shape_than_the_captions_are_refused():
    with pytest.raises(ValueError, match=r"keys \[B, K\] of \[4, 3\] expected, got \[4, 2\]"):
        TeacherForcing(make_model())(*make_batch(), 0.0, None, torch.zeros(4, 2, dtype=torch.int64))


# ------------------------------------------------------------------ that they look random

WIDTH = 64


def table(**counts: int) -> torch.Tensor:
    """Integers [seed, epoch, image, caption, word, element] of dropout before the vocabulary, as training draws."""
    sizes = {"seeds": 1, "epochs": 1, "images": 1, "captions": 1, "words": 1} | counts
    lengths = torch.full((sizes["images"], sizes["captions"]), sizes["words"])
    found = []
    for seed, epoch in itertools.product(range(sizes["seeds"]), range(sizes["epochs"])):
        keys = torch.from_numpy(keys_of(seed, epoch, sizes["images"], sizes["captions"]))
        words = draws_of(lengths, keys).of_words(Site.OUTPUT)  # time first, then images and captions in their order
        integers = torch_kernels.random_integers(words.view(sizes["words"], *lengths.shape), WIDTH)
        found.append(integers.permute(1, 2, 0, 3))
    return torch.stack(found).view(sizes["seeds"], sizes["epochs"], *found[0].shape).double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard deviations of what independent numbers would have."""
    a, b = a.flatten() - 32767.5, b.flatten() - 32767.5
    return float((a * b).mean() / (65536**2 / 12) * a.numel() ** 0.5)


AXES = ["seeds", "epochs", "images", "captions", "words"]


@pytest.mark.parametrize("axis", range(6), ids=[*AXES, "elements"])
def test_mean_and_neighbours_along_every_coordinate_are_those_of_independent_numbers(axis):
    sizes = dict.fromkeys(AXES, 3) | ({AXES[axis]: 60} if axis < 5 else {"words": 60})
    numbers = table(**sizes)
    sigma = 65536 / 12**0.5 / numbers.numel() ** 0.5
    assert numbers.mean().item() == pytest.approx(32767.5, abs=4.5 * sigma)
    for lag in (1, 2, 16, 32):
        if lag < numbers.shape[axis]:
            n = numbers.shape[axis] - lag
            assert abs(correlation(numbers.narrow(axis, 0, n), numbers.narrow(axis, lag, n))) < 4.5, lag
    bits = ((numbers.long()[..., None] >> torch.arange(16)) & 1).double().flatten(0, -2).mean(0)
    assert ((bits - 0.5).abs() < 4.5 * 0.5 / numbers.numel() ** 0.5).all()


def test_no_two_sites_draw_alike():
    keys = torch.from_numpy(keys_of(images=60, captions=5))
    draws = draws_of(torch.full((60, 5), 8), keys)
    of_site = {
        (how, site): torch_kernels.random_integers(getattr(draws, how)(site)[:60], WIDTH).double()
        for how in ("of_images", "of_captions", "of_words")
        for site in Site
    }
    for (one, a), (other, b) in itertools.combinations(of_site.items(), 2):
        if one[1] != other[1]:
            assert abs(correlation(a, b)) < 5, (one, other)


def chi_square(counts: torch.Tensor) -> float:
    """In standard deviations beyond what even chances give."""
    expected = counts.sum() / counts.numel()
    degrees = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


def test_bytes_and_pairs_of_neighbouring_bytes_are_evenly_spread():
    numbers = table(epochs=4, images=50, captions=5, words=12).long()
    for shift in (0, 8):
        byte = numbers >> shift & 255
        assert abs(chi_square(byte.flatten().bincount(minlength=256).double())) < 5
        for axis in range(2, 6):
            high = byte >> 4
            pairs = high.narrow(axis, 0, byte.shape[axis] - 1) * 16 + high.narrow(axis, 1, byte.shape[axis] - 1)
            assert abs(chi_square(pairs.flatten().bincount(minlength=256).double())) < 5, axis
    shares = (uniform(mix(torch.arange(100_000))) * 256).long().bincount(minlength=256).double()
    assert abs(chi_square(shares)) < 5


def test_how_many_elements_two_rows_share_is_what_chance_gives():
    """Counter-based streams could overlap, shifted: no run of a row is met again in another."""
    rows = torch_kernels.random_integers(mix(torch.arange(3000)), 512)
    numbers = rows.view(3000, -1, 2, 16).transpose(2, 3).flatten(1, 2)  # [rows, counters, halves]
    seen = (numbers[..., 0].long() | numbers[..., 1].long() << 16).flatten()
    pairs = len(seen) ** 2 / 2 / 2**32
    assert len(seen) - len(seen.unique()) == pytest.approx(pairs, abs=6 * pairs**0.5)
