"""launch/flickr8k.sh from a folder laid out like Flickr8k to its table, as small as it gets; what it refuses."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from preprocessing.synthetic import make_scenes
from tests.helpers_commands import ROOT

pytestmark = pytest.mark.end_to_end


def run(environment: dict[str, str], folder: Path, out: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    variables = environment | {"SIZE": "64", "OUT": str(out)}
    command = ["bash", "launch/flickr8k.sh", str(folder), *settings]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory) -> Path:
    """Rendered scenes in the layout of Flickr8k, its two folders and the lists of its splits."""
    root = tmp_path_factory.mktemp("flickr8k")
    scenes, pictures, text = root / "scenes", root / "folder/Flicker8k_Dataset", root / "folder/Flickr8k_text"
    make_scenes(scenes, {"train": 24, "val": 5}, 1, 64, 1)
    for folder in (pictures, text):
        folder.mkdir(parents=True)
    lines = []
    for split, name in (("train", "train"), ("val", "dev")):
        document = json.loads((scenes / f"annotations/captions_{split}.json").read_text())
        names = {row["id"]: f"{row['id']}_ab.jpg" for row in document["images"]}
        for row in document["images"]:
            shutil.copy(scenes / "images" / row["file_name"], pictures / names[row["id"]])
        for number, row in enumerate(document["annotations"]):
            lines.append(f"{names[row['image_id']]}#{number % 5}\t{row['caption']} .")
        (text / f"Flickr_8k.{name}Images.txt").write_text("\n".join(names.values()) + "\n")
    (text / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    return root / "folder"


def test_half_of_dev_chooses_and_the_other_half_is_reported(environment, flickr8k, tmp_path):
    small = ("train.epochs=1", "train.warmup_steps=0", "train.global_batch=8", "model.lstm_dim=16", "eval.beam_size=2")
    done = run(environment, flickr8k, tmp_path, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, data = tmp_path / "runs/flickr8k", tmp_path / "data/flickr8k"
    chosen, held_out = ((data / f"{name}.txt").read_text().split() for name in ("val", "held_out"))
    assert (len(chosen), len(held_out)) == (3, 2) and not set(chosen) & set(held_out)
    report = json.loads((folder / "evaluation-held_out.json").read_text())
    assert report["images"] == 2 and {"model", "blind"} <= report["scores"].keys()
    assert len(list((folder / "pictures").glob("*.png"))) == 2


def test_a_folder_that_is_not_flickr8k_is_refused_by_what_it_lacks(environment, tmp_path):
    for folder, lacks in ((tmp_path, "Flickr8k.token.txt"), (tmp_path / "none", "there is no folder")):
        done = run(environment, folder, tmp_path / "out")
        assert done.returncode == 1 and lacks in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
