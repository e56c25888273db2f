"""A bucket of a real S3 API (moto's server on loopback, through s3fs), from the shards to the trained model."""

import json

import pytest

from preprocessing.build_vocab import captions_of
from sat import train
from sat.config import load_config
from sat.data.loader import read_references
from sat.shards.manifest import load_manifest
from sat.shards.ranges import serves_ranges
from tests.helpers_s3 import in_bucket
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("s3")
    make_feature_dataset(root / "data", {"train": 18, "val": 4}, shard_size=3)
    return root


@pytest.fixture(scope="module")
def bucket(folder):
    with in_bucket(folder / "data") as url:
        yield url


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["nll_per_token"] for line in lines if "nll_per_token" in line]


@pytest.mark.parametrize("share, num_workers", [(2.0, 0), (0.5, 2)])
def test_a_training_from_a_bucket_is_the_training_from_the_folder(folder, bucket, alone, tmp_path, share, num_workers):
    size = sum(shard.bytes for shard in load_manifest(folder / "data").shards)
    given = [*SMALL, *with_tokenizer(folder), f"data.num_workers={num_workers}"]
    remote = [f"data.features={bucket}", f"data.cache_dir={tmp_path}/cache", f"data.cache_gb={share * size / 1e9}"]
    for name, more in (("local", []), ("remote", remote)):
        train.train(load_config(None, [*given, f"train.run_dir={tmp_path / name}", *more]), alone)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local") and len(losses(tmp_path / "local")) == 3
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar"))
    assert 0.2 * size < kept <= min(share, 1) * size


def test_a_bucket_gives_ranges_references_and_a_vocabulary(folder, bucket):
    assert serves_ranges(bucket, "manifest.json")
    local, remote = load_manifest(folder / "data"), load_manifest(bucket)
    assert read_references(remote, "val") == read_references(local, "val")
    assert list(captions_of(bucket, ["train"])) == list(captions_of(str(folder / "data"), ["train"]))


@pytest.mark.faults
def test_a_bucket_or_a_set_that_is_not_there_is_said_in_a_sentence(bucket):
    for url in ("s3://nobody/coco", "s3://pictures/flickr"):
        with pytest.raises(ValueError, match=f"{url}: not a finished data set .no manifest.json"):
            load_manifest(url)
