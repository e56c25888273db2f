"""The real programs one after the other, as a user would call them, on a tiny set of scenes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sat.model.encoders.resnet import ResNet
from tests.helpers_launch import start
from tests.test_two_process import launch

pytestmark = pytest.mark.end_to_end


def run(*arguments: object, expect: int = 0) -> str:
    """A program of ours in a process of its own, in the repository's root."""
    code, said = start(["-m", *arguments])
    assert code == expect, f"{' '.join(map(str, arguments))}\n{said}"
    return said


def annotations_of(scenes: Path) -> list[str]:
    splits = ("train", "val", "test")
    return [x for split in splits for x in ("--annotations", f"{split}={scenes}/annotations/captions_{split}.json")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Scenes, image shards, the encoder of the package registry, feature shards and a vocabulary."""
    root = tmp_path_factory.mktemp("end_to_end")
    run("preprocessing.synthetic", "--out", root / "scenes", "--train", 160, "--val", 9, "--test", 31)
    run(
        "preprocessing.shard_images",
        *annotations_of(root / "scenes"),
        "--images",
        root / "scenes/images",
        "--out",
        root / "images",
    )
    run("preprocessing.fetch_weights", "timm/tf_efficientnet_lite0", "--out", root / "weights/lite0.safetensors")
    run(
        "preprocessing.extract_features",
        "--images",
        root / "images",
        "--weights",
        root / "weights/lite0.safetensors",
        "--out",
        root / "features",
        "--size",
        96,
    )
    run(
        "preprocessing.build_vocab", "--features", root / "features", "--out", root / "tokenizer.json", "--min-count", 2
    )
    return root


def settings(root: Path, run_dir: Path) -> list[str]:
    return [
        "configs/demo.yaml",
        f"data.features={root}/features",
        f"data.tokenizer={root}/tokenizer.json",
        f"train.run_dir={run_dir}",
        "model.lstm_dim=96",
        "model.embedding_dim=64",
        "model.attention_dim=64",
        "model.dropout=0.2",
        "train.epochs=10",
        "train.global_batch=16",
        "train.learning_rate=0.003",
        "train.warmup_steps=20",
        "train.eval_every=50",
        "train.patience=0",
        "data.num_workers=0",
        "eval.metrics=[CIDEr,BLEU]",
    ]


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_the_model_sees_more_than_its_blind_baseline(prepared, engine):
    run_dir = prepared / f"run-{engine}"
    untracked = ["tracking.mlflow_uri=none"] if engine == "zero2" else []
    launch(["-m", "sat.train", *settings(prepared, run_dir), *untracked], 2, engine)
    launch(["-m", "sat.evaluate", str(run_dir), "--split", "test", "--baselines"], 2, engine)
    report = json.loads((run_dir / "evaluation-test.json").read_text())
    assert report["images"] == 31
    scores = report["scores"]
    assert {"CIDEr", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L"} <= scores["model"].keys() and not report["missing"]
    assert scores["model"]["CIDEr"] > 1.2 * scores["blind"]["CIDEr"]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_pictures_are_captioned_and_a_bad_one_is_named(prepared, tmp_path):
    run_dir = prepared / "run-ddp"
    pictures = sorted((prepared / "scenes/images/test").iterdir())[:2]
    broken = tmp_path / "broken.jpg"
    broken.write_text("<html>not a picture</html>")
    out = run(
        "sat.caption",
        *pictures,
        broken,
        "--model",
        run_dir,
        "--weights",
        prepared / "weights",
        "--out",
        tmp_path / "out",
        expect=1,
    )
    assert "broken.jpg" in out and "HTML" in out
    captions = json.loads((tmp_path / "out/captions.json").read_text())
    assert [Path(each["file"]).name for each in captions] == [path.name for path in pictures]
    assert all(
        each["caption"] and (tmp_path / "out" / f"{path.stem}.png").stat().st_size > 10_000
        for each, path in zip(captions, pictures)
    )


def test_the_summary_holds_the_scores_of_the_evaluation(prepared):
    run_dir = prepared / "run-ddp"
    printed = run("sat.summary", run_dir, "--split", "test", "--minutes", 1.5)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["minutes"] == 1.5
    assert summary["scores"] == json.loads((run_dir / "evaluation-test.json").read_text())["scores"]
    assert f"{summary['scores']['model']['CIDEr']:.3f}" in printed


def test_features_of_another_encoder_are_refused(prepared, tmp_path):
    torch.manual_seed(9)
    save_file(ResNet(stage=1).state_dict(), tmp_path / "other.safetensors")
    run(
        "preprocessing.extract_features",
        "--images",
        prepared / "images",
        "--weights",
        tmp_path / "other.safetensors",
        "--out",
        tmp_path / "features",
        "--size",
        96,
        "--stage",
        1,
    )
    out = run("sat.evaluate", prepared / "run-ddp", "--features", tmp_path / "features", expect=1)
    assert "its encoder is" in out and "extract the features again" in out


def test_a_wrong_setting_ends_before_any_process_group_starts(prepared):
    out = run("sat.train", "configs/demo.yaml", "train.learning_rat=1", expect=1)
    assert "nearest valid one is 'train.learning_rate'" in out and "Traceback" not in out


def test_a_missing_data_set_is_named(tmp_path):
    out = run(
        "sat.train", "configs/demo.yaml", f"data.features={tmp_path}/nowhere", f"train.run_dir={tmp_path}/run", expect=1
    )
    assert "nowhere" in out and "Traceback" not in out
