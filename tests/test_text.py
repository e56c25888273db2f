"""Captions to ids and back."""

import json
import random

import pytest

from sat.text import (
    END,
    PAD,
    SPECIALS,
    START,
    UNK,
    WORD_RULES,
    CaptionTokenizer,
    build_tokenizer,
    count_words,
    looks_unsegmented,
    normalise,
)
from tests.helpers_shards import real_data

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
        ("می\u200cروم \u200cشب\u200d", "می\u200cروم شب"),
        ("ශ්\u200dරී, soft\u00adly 👩\u200d👧 x", "ශ්\u200dරී softly x"),
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


@pytest.mark.parametrize("rule", WORD_RULES)
def test_encode_finds_the_words_that_the_rule_finds_in_the_whole_caption(rule, monkeypatch):
    monkeypatch.setattr("sat.text.REMEMBERED", 40)  # some are forgotten and met again
    signs = [
        *"aB é一只ม2👩",
        "e\u0301",
        "Σ\u0301",
        "\u0301",
        "'",
        "<unk>",
        "<<pad>",
        "\u00ad",
        "\u200c",
        "\u200d",
        "\x00",
    ]
    spaces = [" ", " ", "\t", "\n", "\x1c", "\x85", "\u00a0", "\u2001", "\u2028", "\u3000", ""]
    draw = random.Random(1)
    captions = ["".join(draw.choice(signs) + draw.choice(spaces) for _ in range(9)) for _ in range(300)]
    tokenizer = build_tokenizer(captions[:150], 2, rule)
    index = {word: number for number, word in enumerate(tokenizer.words)}
    for caption in captions:
        expected = [index.get(word, UNK) for word in normalise(caption, rule).split()]
        assert tokenizer.encode(caption, 99) == expected == tokenizer.encode(caption, 99), caption


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
    Tokenizer(WordLevel({word: n for n, word in enumerate(SPECIALS)}, unk_token="<unk>")).save(
        str(tmp_path / "whole.json")
    )
    with pytest.raises(ValueError, match="whole.json.*words must be split by spaces"):
        CaptionTokenizer.load(tmp_path / "whole.json")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("一只狗。在跑", "一 只 狗 在 跑"),
        ("2 Dogs和T恤", "2 dogs 和 t 恤"),
        ("หมาสีดำ", "ห ม า สี ด ำ"),
        ("ガ\u3099ラーメン", "ガ\u3099 ラ ー メ ン"),
        ("A man's hat", "a man s hat"),
    ],
)
def test_characters_of_scripts_without_spaces_become_words_and_other_words_stay(caption, words):
    assert normalise(caption, "characters") == words


def test_none_takes_words_as_they_are_split_and_no_caption_can_write_a_special():
    assert normalise("  Une  L'eau , vive !", "none") == "Une L'eau , vive !"
    texts = [f"{before}{special}{after}" for special in SPECIALS for before in ("", "<", "<<") for after in ("", ">")]
    assert not set(SPECIALS) & set(normalise(" ".join(texts), "none").split())


@pytest.mark.parametrize("rule", WORD_RULES)
def test_the_rule_of_words_is_saved_with_the_vocabulary(tmp_path, rule):
    captions = ["一只狗 A dog", "狗 <unk>"]
    build_tokenizer(captions, 1, rule).save(tmp_path / "t.json")
    loaded = CaptionTokenizer.load(tmp_path / "t.json")
    assert loaded.word_rule == rule
    assert set(loaded.words[4:]) == {word for text in captions for word in normalise(text, rule).split()}
    assert loaded.encode("狗", 9) == [loaded.words.index("狗")]


def test_an_unknown_rule_of_words_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="words 'letters' is unknown; choose one of basic, characters, none"):
        normalise("a", "letters")


def test_words_that_are_sentences_are_told_from_words():
    sentences = ["一只棕色的狗在绿色的草地上奔跑", "两个孩子在公园里踢足球玩得很开心"]
    assert looks_unsegmented(count_words(sentences))
    assert not looks_unsegmented(count_words(sentences, "characters")) and not looks_unsegmented(count_words([]))
    german = ["Ein Feuerwehrmann steht neben dem Krankenwagen auf der Straße", "Zwei Hunde rennen durch die Wiese"]
    assert not looks_unsegmented(count_words(CAPTIONS)) and not looks_unsegmented(count_words(german))


def test_the_vocabulary_of_the_real_captions_of_coco_val2017_stays():
    """Words of ordinary English, and with them every number ever trained, do not move."""
    document = json.loads((real_data() / "coco_val2017" / "captions_val2017.json").read_text())
    tokenizer = build_tokenizer([each["caption"] for each in document["annotations"]], 5)
    assert tokenizer.digest == "8654b583ae2f99b573e93f519e5f460289ad43d553b96d5b81980f561d43a82a"
