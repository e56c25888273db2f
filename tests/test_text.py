"""Captions to ids and back."""

import json
import random

import pytest

from sat.text import END, PAD, START, UNK, CaptionTokenizer, build_tokenizer, normalise

CAPTIONS = ["A man rides a horse.", "a man, a plan", "The horse's hat!", "a 2nd horse"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's T-shirt, 2 dogs!", "a man s t shirt 2 dogs"),
        ("  tabs\tand\nlines\r\u2028here ", "tabs and lines here"),
        ("ÉTÉ e\u0301te\u0301", "été été"),
        ("हिन्दी שלום 日本語", "हिन्दी שלום 日本語"),
        ("a ||| b \x00 c", "a b c"),
        ("<start> <unk> <end>", "start unk end"),
        ("😀 !?", ""),
        ("", ""),
    ],
)
def test_normalised_captions_are_lower_case_words_of_letters_and_digits(caption, words):
    assert normalise(caption) == words


def test_the_vocabulary_is_the_words_of_min_count_by_frequency_then_alphabet():
    tokenizer = build_tokenizer(CAPTIONS, min_count=2)
    assert tokenizer.words == ["<pad>", "<start>", "<end>", "<unk>", "a", "horse", "man"]
    assert (PAD, START, END, UNK) == (0, 1, 2, 3) and tokenizer.vocab_size == 7


def test_encode_cuts_marks_unknown_words_and_adds_no_specials():
    tokenizer = build_tokenizer(CAPTIONS, min_count=2)
    assert tokenizer.encode("A man, unseen, HORSE", max_words=50) == [4, 6, UNK, 5]
    assert tokenizer.encode("a man a man a man", max_words=3) == [4, 6, 4]
    assert tokenizer.encode("!!", max_words=3) == []


def test_decode_stops_at_end_and_skips_specials():
    tokenizer = build_tokenizer(CAPTIONS, min_count=2)
    assert tokenizer.decode([START, 4, UNK, PAD, 6, END, 5]) == "a <unk> man"
    ids = tokenizer.encode(CAPTIONS[1], 50)
    assert tokenizer.decode(ids) == "a man a <unk>"


def test_the_saved_file_is_equal_whatever_the_order_of_the_captions(tmp_path):
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    for name, captions in (("a", CAPTIONS), ("b", shuffled)):
        build_tokenizer(captions, 1).save(tmp_path / name / "tokenizer.json")
    blobs = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert blobs[0] == blobs[1] and json.loads(blobs[0])
    loaded = CaptionTokenizer.load(tmp_path / "a" / "tokenizer.json")
    built = build_tokenizer(CAPTIONS, 1)
    assert loaded.words == built.words and loaded.digest == built.digest
    assert [loaded.encode(text, 50) for text in CAPTIONS] == [built.encode(text, 50) for text in CAPTIONS]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer.json"]


def test_another_vocabulary_has_another_digest():
    assert build_tokenizer(CAPTIONS, 1).digest != build_tokenizer(CAPTIONS, 2).digest


def test_a_missing_damaged_or_foreign_file_is_named(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    with pytest.raises(ValueError, match="none.json.*build_vocab"):
        CaptionTokenizer.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match="cut.json"):
        CaptionTokenizer.load(tmp_path / "cut.json")
    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "foreign.json"))
    with pytest.raises(ValueError, match="foreign.json.*not a caption tokenizer"):
        CaptionTokenizer.load(tmp_path / "foreign.json")
