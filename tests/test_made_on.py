"""Features that were computed on machines that differ: said where it is so, and no repair changes bytes unasked."""

import shutil

import pytest
import torch

from preprocessing.extract_features import extract_stripe, finalize_features
from preprocessing.features.plan import plan_features
from preprocessing.features.recipe import FeatureOptions
from preprocessing.sharding.made_on import MADE_ON, Machines, made_on, processor
from preprocessing.sharding.plan import load_plan
from preprocessing.sharding.verify import verify
from preprocessing.sharding.write import read_sidecar
from preprocessing.verify_shards import main as verify_shards
from preprocessing.verify_shards import repair
from sat.shards.manifest import load_manifest
from sat.shards.schema import Sidecar
from tests.helpers_shards import make_coco, run_program, snapshot
from tests.test_extract_features import SMALL, make_images, random_weights

OLDER = {"ONEDNN_MAX_CPU_ISA": "SSE41"}
"""oneDNN then computes as on a processor that can do no more."""

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the network does not run on oneDNN")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A set whose first shards were computed here, the others as on an older processor."""
    root = tmp_path_factory.mktemp("mixed")
    make_coco(root / "coco", {"train": 6, "val": 2})
    make_images(root / "coco", root / "images", shard_size=4)
    options = FeatureOptions(**SMALL, dtype="fp32")
    plan = plan_features(root / "images", root / "set", random_weights(root / "weights.safetensors"), options)
    extract_stripe(plan, stripe="0/3")
    run_program("extract_features", "--out", root / "set", "--step", "shards", **OLDER)
    return root


@pytest.fixture
def features(mixed, tmp_path):
    return shutil.copytree(mixed / "set", tmp_path / "set")


def test_every_shard_says_on_what_it_was_computed_and_a_mixed_set_is_told(features, capsys):
    plan = load_plan(features)
    machines = [read_sidecar(features, shard).extra[MADE_ON] for shard in plan.shards]
    assert machines[1] == machines[2] != machines[0] == made_on("cpu")
    assert machines[1].replace(", ONEDNN_MAX_CPU_ISA=SSE41", "") == machines[0]
    finalize_features(plan)
    verify_shards([features], num_workers=1)
    said = capsys.readouterr().out
    assert said.count(f":   2 shards: {machines[1]}\n") == said.count(f":   1 shards: {machines[0]}\n") == 2
    assert "sound" in said


def test_a_repair_that_would_change_bytes_asks_and_changes_nothing_until_then(features, capsys):
    manifest = finalize_features(load_plan(features))
    here, elsewhere = (manifest.shards[index].name for index in (0, 1))
    (features / here).unlink()
    repair(features, verify(features))
    assert load_manifest(features).digest == manifest.digest, "the same machine, so the same bytes"
    (features / elsewhere).unlink()
    before = snapshot(features)
    with pytest.raises(ValueError, match=rf"{elsewhere}: key .* other bytes .*SSE41.*; this is .*--allow-new-bytes"):
        repair(features, verify(features))
    assert snapshot(features) == before
    verify_shards([features], repair_faults=True, new_bytes=True, num_workers=1)
    assert not verify(features).faults and load_manifest(features).digest != manifest.digest


def test_a_set_of_one_machine_has_one_line_and_pictures_have_none():
    machines = Machines()
    for made in ("x", "x", None):
        extra = {} if made is None else {MADE_ON: made}
        machines.add(Sidecar("a.tar", "train", "", 1, 1, "", (), (), extra))
    assert machines.lines() == ["its shards were computed on x"] and not machines.differ
    assert Machines().lines() == []


@pytest.mark.parametrize(
    ("flags", "called"),
    [
        ("sse avx2 avx512f avx512_bf16 amx_bf16", "AMX"),
        ("avx2 avx512f avx512_bf16", "AVX512_BF16"),
        ("avx avx2", "AVX2"),
    ],
)
def test_a_processor_is_called_by_the_most_it_can(tmp_path, flags, called):
    text = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    (tmp_path / "cpuinfo").write_text(text)
    assert processor(tmp_path / "cpuinfo") == ("Some CPU", called)
    assert processor(tmp_path / "none")[1] == "no vector instructions known"
