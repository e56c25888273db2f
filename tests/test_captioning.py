"""Pictures in, captions out: bytes, paths and pixels alike, in batches, from a model's folder and its encoder alone."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sat import caption, files
from sat.captioning import Captioning
from sat.config import load_config, save_config
from sat.evaluation.attention_file import read_attention
from sat.export import save_model
from sat.model.at_rest import PackableLinear
from sat.model.captioner import Captioner
from sat.model.encoders.resnet import ResNet
from sat.model.spec import Sizes
from sat.shards.features import EncoderSpec, FeatureSpec, Transform
from sat.shards.pictures import BadPicture
from sat.text import UNK, build_tokenizer

SMALL = ["model.lstm_dim=8", "model.embedding_dim=6", "model.attention_dim=5", "eval.max_length=6", "eval.beam_size=2"]
WORDS = "a red circle above the blue square near one green star"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A folder with `best/`, a model whose words depend on the picture, and `encoder.safetensors`; nothing of a run."""
    root = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    save_file(ResNet(stage=1).state_dict(), root / "encoder.safetensors")
    tokenizer, config = build_tokenizer([WORDS], 1), load_config(None, SMALL)
    model = Captioner(config.model, Sizes(tokenizer.vocab_size, grid_size=64, feature_dim=256))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=3 / parameter.shape[-1] ** 0.5, generator=generator)
    encoder = EncoderSpec("resnet50", 1, 256, 4.0, 0.0, weights_sha256=files.sha256(root / "encoder.safetensors"))
    transform = Transform(32, "squash", "", "bicubic")
    features = FeatureSpec("grid", (8, 8), 256, "fp16", encoder, transform).to_fingerprint()
    save_model(root / "best", model.state_dict(), tokenizer, config, features, step=3)
    return root


@pytest.fixture(scope="module")
def captioning(pretrained) -> Captioning:
    return Captioning.from_pretrained(str(pretrained), weights=str(pretrained))


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Five pictures of different sizes and colours."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(2)
    for number in range(5):
        pixels = random.integers(0, 256, (4, 4 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40 + number, 50)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_the_weights_are_at_rest(captioning):
    model = captioning.trained.model
    assert {each.kernels_at_rest for each in model.modules() if isinstance(each, PackableLinear)} == {model.kernels}


def test_bytes_paths_and_pixels_of_a_picture_have_the_same_caption(captioning, pictures):
    path = pictures[0]
    with Image.open(path) as image:
        pixels = np.asarray(image)
    found = captioning([path, str(path), path.read_bytes(), pixels])
    assert [each.image_id for each in found] == [str(path), str(path), "picture 2", "picture 3"]
    assert len({each.caption for each in found}) == len({each.log_probability for each in found}) == 1
    assert found[0].picture.shape == (32, 32, 3) and found[0].picture.dtype == np.uint8
    assert found[0].caption == " ".join(found[0].words) and found[0].attention is None


def test_captions_do_not_depend_on_the_batch(captioning, pictures):
    one_by_one = [captioning([path])[0] for path in pictures]
    assert len({each.caption for each in one_by_one}) > 1, "the pictures must differ to the model"
    for size in (1, 2, 5, 16):
        batched = Captioning(captioning.trained, captioning.encoder, captioning.options, size)(pictures)
        assert [each.caption for each in batched] == [each.caption for each in one_by_one]
        expected = [each.log_probability for each in one_by_one]
        assert [each.log_probability for each in batched] == pytest.approx(expected, rel=1e-4)


def test_attention_and_further_captions_come_when_they_are_asked_for(captioning, pictures):
    (found,) = captioning.with_options(beam_size=3, n_best=3, keep_attention=True, length_penalty=0.7)([pictures[0]])
    for each in (found, *found.others):
        assert each.attention.shape == (len(each.words), 64)
        np.testing.assert_allclose(each.attention.sum(1), 1, rtol=1e-5)
        assert each.score == pytest.approx(each.log_probability / max(len(each.words), 1) ** 0.7)
    assert len({found.caption, *(each.caption for each in found.others)}) == 3
    assert [each.score for each in found.others] == sorted((e.score for e in found.others), reverse=True)
    assert captioning([pictures[0]])[0].others == ()


def test_a_picture_that_cannot_be_read_is_named_or_stands_as_an_error_in_its_place(captioning, pictures, tmp_path):
    broken, missing = tmp_path / "broken.jpg", tmp_path / "missing.jpg"
    broken.write_text("<html>not a picture</html>")
    grey = np.zeros((5, 5), np.uint8)
    given = [pictures[0], broken, b"", missing, grey, pictures[1]]
    found = captioning(given, bad="return")
    assert [isinstance(each, BadPicture) for each in found] == [False, True, True, True, True, False]
    said = [str(each) for each in found if isinstance(each, BadPicture)]
    assert said[0].startswith(f"{broken}: not a picture") and said[1] == "picture 2: empty file"
    assert said[2] == f"{missing}: cannot be read: No such file or directory" and "uint8 [5, 5]" in said[3]
    assert [found[0].caption, found[5].caption] == [each.caption for each in captioning([pictures[0], pictures[1]])]
    with pytest.raises(BadPicture, match=r"broken\.jpg"):
        captioning(given)
    assert captioning([]) == []


def test_the_encoder_is_found_by_its_digest_or_missed_by_name(pretrained, tmp_path):
    save_file(ResNet(stage=1).state_dict(), tmp_path / "another.safetensors")
    with pytest.raises(ValueError, match=r"no encoder with SHA-256 .* --weights FILE"):
        Captioning.from_pretrained(pretrained, tmp_path)
    shutil.copy(pretrained / "encoder.safetensors", tmp_path / "renamed.safetensors")
    assert Captioning.from_pretrained(pretrained / "best", tmp_path).encoder is not None
    with pytest.raises(ValueError, match="is not a trained model"):
        Captioning.from_pretrained(tmp_path)


# ------------------------------------------------------------------ the program


def run(pretrained: Path, given: list[Path], out: Path, **options) -> dict[str, dict]:
    """`sat caption`; what it wrote by file."""
    caption.main(given, model=pretrained, weights=pretrained, out=out, **options)
    return {row["file"]: row for row in json.loads((out / "captions.json").read_text())}


def test_the_program_writes_what_captioning_says_and_a_picture_of_the_attention_each(
    pretrained, captioning, pictures, tmp_path, capsys
):
    rows = run(pretrained, [pictures[0].parent], tmp_path / "out", limit=3)
    assert list(rows) == [str(path) for path in pictures[:3]]
    for path, expected in zip(pictures, captioning(pictures[:3])):
        assert rows[str(path)]["caption"] == expected.caption
        assert f"{path}: {expected.caption}" in capsys.readouterr().out or path != pictures[0]
        assert Image.open(tmp_path / "out" / rows[str(path)]["plot"]).width > 200


def test_captioning_ones_own_pictures_leaves_the_run_and_its_mlflow_alone(pretrained, pictures, tmp_path, monkeypatch):
    """The run folder is a tracked one, and stays as it is byte by byte; MLflow cannot even be loaded."""
    folder, tracked = tmp_path / "run", [*SMALL, f"tracking.mlflow_uri=sqlite:///{tmp_path}/mlflow.db"]
    shutil.copytree(pretrained, folder)
    save_config(load_config(None, tracked), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert len(run(folder, pictures[:1], tmp_path / "out")) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "mlflow.db").exists()


def test_the_search_can_be_chosen_and_further_captions_are_kept(pretrained, captioning, pictures, tmp_path, capsys):
    asked = {"n_best": 2, "beam_size": 4, "max_length": 3, "length_penalty": 0.5}
    (row,) = run(pretrained, pictures[:1], tmp_path / "out", **asked).values()
    (found,) = captioning.with_options(**asked, block_unk=True)(pictures[:1])
    assert (row["caption"], row["others"][0]["caption"]) == (found.caption, found.others[0].caption)
    assert row["others"][0]["log_probability"] == pytest.approx(found.others[0].log_probability, rel=1e-4)
    assert f"\n    {found.others[0].caption}\n" in capsys.readouterr().out
    drawn = {"method": "sample", "temperature": 3.0, "seed": 2}
    (row,) = run(pretrained, pictures[:1], tmp_path / "out", **drawn).values()
    assert "others" not in row
    assert row["caption"] == captioning.with_options(**drawn, block_unk=True)(pictures[:1])[0].caption
    with pytest.raises(ValueError, match="n_best 2 captions cannot come from a width of 1"):
        run(pretrained, pictures[:1], tmp_path / "out", method="greedy", n_best=2)


def test_no_file_of_the_user_is_overwritten_and_no_plot_is_lost(pretrained, pictures, tmp_path):
    folder = tmp_path / "here"
    (folder / "below").mkdir(parents=True)
    for name in ("x.png", "x.bmp", "below/x.png", "y.png"):
        Image.open(pictures[0]).save(folder / name)
    users = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = [folder / "x.png", folder / "x.bmp", folder / "below/x.png"]
    rows = run(pretrained, given, folder)
    assert len({row["plot"] for row in rows.values()}) == 3
    assert all((folder / row["plot"]).is_file() for row in rows.values())
    again = run(pretrained, given, folder)
    assert again == rows, "our own earlier plots are replaced"
    whole = run(pretrained, [folder], folder)
    assert sorted(whole) == [str(folder / name) for name in ("x.bmp", "x.png", "y.png")], "plots are not captioned"
    assert {path: path.read_bytes() for path in users} == users


def test_an_empty_folder_and_a_missing_picture_are_said(pretrained, tmp_path, capsys):
    with pytest.raises(ValueError, match="no pictures in the folder"):
        run(pretrained, [tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="no picture .*nowhere"):
        run(pretrained, [tmp_path / "nowhere.jpg"], tmp_path / "out")
    (tmp_path / "folder/below").mkdir(parents=True)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "folder/a.png")
    run(pretrained, [tmp_path / "folder"], tmp_path / "out")
    assert "not captioned without --recursive: its sub-folders below" in capsys.readouterr().err


def test_sub_folders_are_captioned_when_asked_for(pretrained, pictures, tmp_path):
    for name in ("a/x.png", "a/b/x.png", "c/x.png"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(pictures[0]).save(tmp_path / "folder" / name)
    with pytest.raises(ValueError, match="its sub-folders are captioned with --recursive: a, c"):
        run(pretrained, [tmp_path / "folder"], tmp_path / "out")
    out = tmp_path / "folder/out"
    rows = run(pretrained, [tmp_path / "folder"], out, recursive=True)
    assert sorted(rows) == sorted(str(tmp_path / "folder" / name) for name in ("a/x.png", "a/b/x.png", "c/x.png"))
    assert len({row["plot"] for row in rows.values()}) == 3
    assert run(pretrained, [tmp_path / "folder"], out, recursive=True) == rows, "our own plots are not captioned"


def test_the_attention_is_kept_for_programs_outside(pretrained, captioning, pictures, tmp_path):
    run(pretrained, pictures[:3], tmp_path / "out", attention=True)
    expected = captioning.with_options(keep_attention=True)(pictures[:3])
    with np.load(tmp_path / "out/attention.npz", allow_pickle=False) as found:
        assert found["image_ids"].tolist() == [str(path) for path in pictures[:3]]
        assert found["words"].tolist() == [word for each in expected for word in each.words]
        assert np.diff(found["starts"]).tolist() == [len(each.words) for each in expected]
        np.testing.assert_allclose(found["attention"], np.concatenate([each.attention for each in expected]), rtol=1e-4)
        for name in ("probabilities", "gates"):
            values = np.concatenate([getattr(each, name) for each in expected])
            np.testing.assert_allclose(found[name], values, rtol=1e-4)
        assert found["centres"].shape == (64, 2) and found["geometry"] == "squash"
    again = read_attention(tmp_path / "out/attention.npz")
    assert [each.words for each in again.predictions] == [each.words for each in expected]
    assert [each.score for each in again.predictions] == pytest.approx([each.score for each in expected], rel=1e-4)


def test_files_of_the_users_with_our_names_are_not_overwritten(pretrained, pictures, tmp_path):
    for name, content in (("captions.json", b'{"images": []}'), ("captions.json", b"mine"), ("attention.npz", b"mine")):
        out = tmp_path / f"{len(content)}-{name}"
        out.mkdir()
        (out / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not of an earlier `sat caption`; choose another --out"):
            run(pretrained, pictures[:1], out, attention=True)
        assert [path.read_bytes() for path in out.iterdir()] == [content]


def test_format_and_references_are_the_users(pretrained, pictures, tmp_path):
    known = {"0.png": ["what a person says"], str(pictures[1]): ["what another says"]}
    files.write_json(tmp_path / "references.json", known)
    rows = run(pretrained, pictures[:3], tmp_path / "out", format="svg", references=tmp_path / "references.json")
    pages = [(tmp_path / "out" / rows[str(path)]["plot"]).read_text() for path in pictures[:3]]
    assert ["reference: what a person says" in page for page in pages] == [True, False, False]
    assert "reference: what another says" in pages[1] and "reference" not in pages[2]
    for content, wrong in (
        ("[", "is no JSON"),
        ("[]", "no object of the form"),
        ('{"a": "b"}', "no object of the form"),
    ):
        (tmp_path / "references.json").write_text(content)
        with pytest.raises(ValueError, match=f"references.json {'is ' * wrong.startswith('no ')}{wrong}"):
            run(pretrained, pictures[:1], tmp_path / "out", references=tmp_path / "references.json")
    with pytest.raises(ValueError, match="format 'jpg' cannot be drawn"):
        run(pretrained, pictures[:1], tmp_path / "out", format="jpg")


def test_pictures_that_cannot_be_read_are_named_after_the_others_are_captioned(pretrained, pictures, tmp_path):
    bad = io.BytesIO(pictures[1].read_bytes()[:60])
    pictures[1].write_bytes(bad.getvalue())
    with pytest.raises(ValueError, match=rf"not captioned: {pictures[1]}"):
        run(pretrained, pictures, tmp_path / "out")
    assert len(json.loads((tmp_path / "out/captions.json").read_text())) == 4


def test_the_program_never_says_unk(pretrained, pictures, tmp_path):
    shutil.copytree(pretrained, tmp_path / "model")
    weights = load_file(tmp_path / "model/best/model.safetensors")
    weights["vocabulary.bias"][UNK] = 50
    save_file(weights, tmp_path / "model/best/model.safetensors")
    assert "<unk>" in Captioning.from_pretrained(tmp_path / "model", pretrained)(pictures[:1])[0].caption
    rows = run(tmp_path / "model", pictures, tmp_path / "out")
    assert len(rows) == 5 and not any("<unk>" in row["caption"] for row in rows.values())
