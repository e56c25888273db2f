"""A trained model is three files that say what they were trained on; all that does not fit is refused by name."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sat.config import load_config
from sat.export import best_folder, load_model, save_model
from sat.model.captioner import Captioner
from sat.model.spec import Sizes
from sat.text import build_tokenizer
from tests.helpers_shards import make_feature_dataset

SMALL = ["model.lstm_dim=8", "model.embedding_dim=6", "model.attention_dim=5"]


@pytest.fixture
def saved(tmp_path):
    tokenizer = build_tokenizer(["a red circle above a blue square"] * 2, 1)
    manifest = make_feature_dataset(tmp_path / "features")
    config = load_config(None, SMALL)
    torch.manual_seed(0)
    model = Captioner(config.model, Sizes(tokenizer.vocab_size, grid_size=4, feature_dim=8))
    save_model(tmp_path / "best", model.state_dict(), tokenizer, config, manifest.fingerprint, step=7)
    return tmp_path / "best", model, manifest


def test_what_is_loaded_computes_what_was_saved(saved):
    folder, model, _ = saved
    loaded = load_model(folder)
    grid = torch.randn(2, 4, 8)
    tokens = torch.tensor([[1, 4], [5, 6]])
    ours, theirs = (m.eval() for m in (loaded.model, model))
    with torch.inference_mode():
        results = []
        for m in (ours, theirs):
            memory = m.encode(grid)
            state = m.init_state(memory)
            state = type(state)(*(s.expand(-1, 2, -1) for s in state))
            results.append(m.step(memory, state, tokens)[0])
    assert torch.equal(*results)
    assert loaded.step == 7 and loaded.tokenizer.encode("red square", 9)


def test_saving_again_replaces_the_whole_folder_and_leaves_nothing_else(saved):
    folder, model, manifest = saved
    loaded = load_model(folder)
    save_model(folder, model.state_dict(), loaded.tokenizer, loaded.config, manifest.fingerprint, step=8)
    assert load_model(folder).step == 8
    assert sorted(path.name for path in folder.parent.iterdir()) == ["best", "features"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_model(saved[0])


def test_weights_of_another_shape_are_refused_naming_the_file(saved):
    about = json.loads((saved[0] / "config.json").read_text())
    about["config"]["model"]["lstm_dim"] = 9
    (saved[0] / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        load_model(saved[0])


def test_a_damaged_file_is_named(saved):
    (saved[0] / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        load_model(saved[0])
    (saved[0] / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json does not describe a trained model"):
        load_model(saved[0])


def test_a_folder_is_named_by_a_string_or_a_path_and_a_run_has_its_best_in_it(saved):
    assert load_model(str(saved[0])).step == load_model(best_folder(str(saved[0].parent))).step == 7
    assert best_folder(saved[0]) == saved[0]


def test_others_may_read_the_model_as_the_umask_says(saved):
    before = os.umask(0o027)
    try:
        loaded = load_model(saved[0])
        save_model(saved[0], loaded.model.state_dict(), loaded.tokenizer, loaded.config, saved[2].fingerprint, step=8)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved[0].iterdir()} == {0o640}


def test_features_of_another_kind_are_refused_by_the_model(saved, tmp_path):
    loaded = load_model(saved[0])
    loaded.refuse_unfit(saved[2])
    other = make_feature_dataset(tmp_path / "other", dtype="fp32")
    with pytest.raises(ValueError, match="its dtype is 'fp32', but 'fp16' is needed"):
        loaded.refuse_unfit(other)


EXPORT_AGAIN = """
import sys
from pathlib import Path
from sat import files
from sat.export import best_folder, load_model, save_model
from sat.shards.manifest import load_manifest
folder, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    files._exchange = lambda *_: False  # as on NFS
old = load_model(folder)
fingerprint = load_manifest(folder.parent / "features").fingerprint
save_model(folder, old.model.state_dict(), old.tokenizer, old.config, fingerprint, step=old.step + 1)
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("point", "how", "step"),
    [
        ("folder-written", "exchange", 7),
        ("folder-swapped", "exchange", 8),
        ("folder-written", "rename", 7),
        ("folder-set-aside", "rename", 7),
        ("folder-swapped", "rename", 8),
    ],
)
def test_a_kill_at_any_point_of_the_swap_leaves_a_whole_model_and_the_next_export_sweeps(saved, point, how, step):
    command = [sys.executable, "-c", EXPORT_AGAIN, str(saved[0]), how]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "SAT_CRASH_POINT": point}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    if point != "folder-set-aside":  # there the reader puts the old one back
        assert saved[0].is_dir()
    loaded = load_model(saved[0])
    assert loaded.step == step
    save_model(saved[0], loaded.model.state_dict(), loaded.tokenizer, loaded.config, saved[2].fingerprint, step=9)
    assert load_model(saved[0]).step == 9
    assert not list(saved[0].parent.glob("best.tmp-*"))
