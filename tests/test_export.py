"""A trained model is three files that say what they were trained on; all that does not fit is refused by name."""

import json

import pytest
import torch

from sat.config import load_config
from sat.evaluate import baselines
from sat.export import load_model, save_model
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


def test_the_blind_baseline_gives_every_image_the_caption_of_another_one():
    for count in (2, 3, 7, 10):
        captions = {str(i): f"caption {i}" for i in range(count)}
        found = baselines(captions, {i: [] for i in captions}, ["a", "B b.", "b b", "c"])
        assert sorted(found["blind"].values()) == sorted(captions.values())
        assert all(found["blind"][i] != captions[i] for i in captions)
        assert set(found["most_frequent"].values()) == {"b b"}


def test_baselines_of_one_image_are_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        baselines({"1": "a"}, {"1": ["a"]}, ["a"])
