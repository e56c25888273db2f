"""Word vectors reach the rows of their words and no others; a broken file is named with its line."""

import pytest
import torch
from torch import nn

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
