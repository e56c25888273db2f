"""Plans of the time loop that go through more than what exists."""

import pytest
import torch

from sat.model.objectives.replayed import ROWS, covers, new_room
from sat.model.packing import Room, pack
from tests.test_replay import batch


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


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_counts_what_runs_at_each_step(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (seed, 1 + seed % 4), generator=generator) * (
        torch.rand(seed, 1, generator=generator) > 0.3
    )
    plan = pack(torch.zeros(*lengths.shape, 9, dtype=torch.int64), lengths)
    for t in range(9):
        running = lengths > t
        expected = (int(running.sum()), int(running.any(1).sum()), int(running.sum(1).max()) if seed else 0)
        found = (plan.rows, plan.images_running, plan.slots_running)
        assert tuple(each[t] if t < len(each) else 0 for each in found) == expected


@pytest.mark.parametrize("images", [3, 65_535, 65_536, 65_537])
def test_rows_are_grouped_by_image_for_any_number_of_images(images):
    lengths = torch.tensor([2, 1]).expand(images, 2)
    ends, rows = pack(torch.zeros(images, 2, 3, dtype=torch.int64), lengths).rows_by_image
    assert torch.equal(ends, 2 * torch.arange(images + 1))
    assert torch.equal(rows.view(images, 2), torch.arange(2 * images).view(2, images).t())
