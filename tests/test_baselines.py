"""What a model is held against never sees a picture."""

import pytest

from sat.evaluation.baselines import baselines, most_frequent_caption


def test_the_blind_baseline_gives_every_image_the_caption_of_another_one():
    for count in (2, 3, 7, 10):
        captions = {str(i): f"caption {i}" for i in range(count)}
        found = baselines(captions, ["a", "B b.", "b b", "c"])
        assert sorted(found["blind"].values()) == sorted(captions.values())
        assert all(found["blind"][i] != captions[i] for i in captions)
        assert set(found["most_frequent"].values()) == {"b b"}


def test_baselines_of_one_image_are_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        baselines({"1": "a"}, ["a"])


def test_the_most_frequent_caption_is_counted_without_case_and_punctuation():
    assert most_frequent_caption(["A dog.", "a cat", "a dog", "A cat!", "a  dog", ""]) == "a dog"
    assert most_frequent_caption(["b", "a"]) == "a"
    with pytest.raises(ValueError, match="no captions"):
        most_frequent_caption(["", "..."])
