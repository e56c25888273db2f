"""Image shards through the loader: pictures as the encoder sees them, and damage that is named."""

import io

import numpy as np
import pytest
import torch
from helpers_shards import encoded, picture, read_batches, self_describing_captions
from PIL import Image

from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.ownership import publish_plan
from preprocessing.sharding.plan import ImageRecord, ImageSettings, Plan, PlannedShard
from preprocessing.sharding.write import Sample, write_shard
from sat.data.loader import Pictures
from sat.text import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(self_describing_captions("train", 0), 1)


def make_image_dataset(root, count):
    """A finished data set of PNG pictures, `picture(index)` under the image id `index`."""
    shard = PlannedShard("train-000000.tar", "train", count, "0" * 64)
    plan = publish_plan(Plan(root, {"name": "pictures"}, ImageSettings(""), (shard,)))
    records = [ImageRecord(str(index), f"{index}.png", "train", ("red",), f"k{index}") for index in range(count)]
    samples = [Sample(each, encoded(picture(int(each.image_id)), "PNG"), "png", 64, 48) for each in records]
    write_shard(root, shard, plan.digest, samples)
    return finalize(plan)


def decode_crop(blob):
    array = np.asarray(Image.open(io.BytesIO(blob)).crop((0, 0, 32, 32)))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def test_image_shards_give_pictures_and_empty_rows_where_there_is_no_sample(tmp_path, tokenizer):
    manifest = make_image_dataset(tmp_path, 5)
    settings = {"pictures": Pictures(decode_crop, 32), "global_batch": 3, "num_workers": 1}
    seen = set()
    for rank in range(2):
        for batch in read_batches([(manifest, 1.0)], tokenizer, rank=rank, world_size=2, **settings):
            assert batch.grid.dtype == torch.uint8 and batch.grid.shape == (len(batch.sample_keys), 3, 32, 32)
            for row, image_id in enumerate(batch.image_ids):
                if image_id:
                    seen.add(image_id)
                    expected = np.asarray(picture(int(image_id)).crop((0, 0, 32, 32)))
                    assert np.array_equal(batch.grid[row].permute(1, 2, 0).numpy(), expected)
                else:
                    assert not batch.grid[row].any()
    assert seen == {str(i) for i in range(5)}


def test_a_picture_that_cannot_be_decoded_names_shard_and_key(tmp_path, tokenizer):
    manifest = make_image_dataset(tmp_path, 2)

    def refuse(blob):
        raise OSError("no picture")

    with pytest.raises(ValueError, match="train-000000.tar: key k[01]: its picture cannot be decoded: no picture"):
        read_batches([(manifest, 1.0)], tokenizer, pictures=Pictures(refuse, 32))
