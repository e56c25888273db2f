"""What a feature is: the table of types against numpy and torch, the geometry against the network, refusals."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.data.batch import GridRow
from sat.model.encoders.resnet import Encoder
from sat.shards.features import (
    GEOMETRY,
    NPY_HEADER,
    STORAGE,
    EncoderSpec,
    FeatureSpec,
    Transform,
    end_to_end_features,
)

ENCODER = EncoderSpec("resnet50", 4, weights_sha256="a" * 64)
SPEC = FeatureSpec("grid", (7, 7), 2048, "int8", ENCODER, Transform(224, "squash", "bicubic", "imagenet"), "b" * 64)
DOCUMENT = {
    "encoder": {"architecture": "resnet50", "stage": 4, "weights_sha256": "a" * 64},
    "transform": {"size": 224, "geometry": "squash", "resize": "bicubic", "normalise": "imagenet"},
    "grid": [7, 7],
    "dim": 2048,
    "dtype": "int8",
    "scale_sha256": "b" * 64,
}
OTHERS = {
    "encoder": {"encoder": replace(ENCODER, weights_sha256="c" * 64)},
    "transform": {"transform": Transform(224, "center_crop", "bicubic", "imagenet")},
    "grid": {"cells": (14, 14)},
    "dim": {"dim": 1024},
    "dtype": {"dtype": "fp16"},
    "scale_sha256": {"scale_sha256": "d" * 64},
}


@given(
    dtype=st.sampled_from(sorted(STORAGE)),
    height=st.integers(1, 100),
    width=st.integers(1, 100),
    dim=st.integers(1, 10_000),
)
@settings(deadline=None)
def test_the_header_is_the_one_numpy_writes_and_as_long_as_the_contract_says(dtype, height, width, dim):
    spec = FeatureSpec("grid", (height, width), dim, dtype, None, None)
    written = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(np.empty(spec.shape, spec.stored))
    np.lib.format.write_array_header_1_0(written, header)
    assert spec.npy_header == written.getvalue() and len(spec.npy_header) == NPY_HEADER


@pytest.mark.parametrize("dtype", sorted(STORAGE))
def test_what_is_written_numpy_reads_and_torch_sees_the_same_numbers(dtype):
    spec = FeatureSpec("grid", (2, 3), 5, dtype, None, None)
    numbers = torch.arange(30).view(6, 5).to(getattr(torch, spec.torch))
    stored = numbers.view(torch.uint8).numpy().reshape(-1).view(spec.stored).reshape(spec.shape)
    blob = spec.npy_bytes(stored)
    read = np.load(io.BytesIO(blob), allow_pickle=False)
    assert read.dtype == spec.stored and np.array_equal(read, stored)
    assert blob[NPY_HEADER:] == numbers.view(torch.uint8).numpy().tobytes()
    row = GridRow.of_features(spec)
    assert (row.shape, row.dtype, row.nbytes) == ((6, 5), numbers.dtype, len(blob) - NPY_HEADER)


@pytest.mark.parametrize("stage", sorted(GEOMETRY["resnet50"]))
@pytest.mark.parametrize("size", [32, 96])
def test_the_geometry_is_what_the_network_gives(stage, size):
    encoder = EncoderSpec("resnet50", stage)
    with torch.inference_mode():
        grid = Encoder(stage).eval()(torch.zeros(1, 3, size, size))
    rows, columns = encoder.cells(size)
    assert grid.shape == (1, rows * columns, encoder.dim)


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (ENCODER, 225, "size 225 is not a multiple of 32, the stride of stage 4; use e.g. 224 or 448"),
        (ENCODER, 0, "size 0 is not a multiple of 32"),
        (EncoderSpec("resnet50", 5), 224, "stage 5 is unknown; choose one of 1, 2, 3, 4"),
        (EncoderSpec("vgg19", 5), 224, "architecture 'vgg19' is unknown; choose one of resnet50"),
    ],
)
def test_a_picture_that_cells_do_not_cover_and_an_unknown_encoder_are_refused(spec, size, message):
    with pytest.raises(ValueError, match=message):
        spec.cells(size)


def test_the_view_of_a_document_gives_the_document_back():
    spec = FeatureSpec.from_fingerprint(DOCUMENT | {"source": "e" * 64, "compute": "bf16"})
    assert spec == SPEC and spec.to_fingerprint() == DOCUMENT
    assert (spec.locations, spec.shape, spec.stored, spec.torch) == (49, (49, 2048), np.int8, "int8")
    trained_too = end_to_end_features(448, "f" * 64)
    assert FeatureSpec.from_fingerprint(trained_too.to_fingerprint()) == trained_too
    assert trained_too.to_fingerprint() == {
        "encoder": {"architecture": "resnet50", "stage": 4, "trained_from": "f" * 64},
        "transform": {"size": 448, "geometry": "squash"},
        "grid": [14, 14],
        "dim": 2048,
    }


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_features_made_otherwise_are_refused_with_both_values(name):
    other = replace(SPEC, **OTHERS[name])
    SPEC.refuse(replace(SPEC), "data/set")
    with pytest.raises(ValueError, match="data/set: its ") as caught:
        SPEC.refuse(other, "data/set")
    ours, theirs = (str(spec.to_fingerprint()[name]) for spec in (SPEC, other))
    assert f"its {name} is " in str(caught.value)
    assert str(caught.value).index(theirs) < str(caught.value).index(ours)


def test_pictures_are_refused_where_features_are_needed():
    with pytest.raises(ValueError, match="data/set: it holds pictures, but features are needed"):
        SPEC.refuse(None, "data/set")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "does not say grid and dim"),
        (DOCUMENT | {"kind": "pyramid"}, "features of kind 'pyramid' are unknown"),
        (DOCUMENT | {"encoder": DOCUMENT["encoder"] | {"tiles": 4}}, "encoder says tiles, which this program does not"),
        (DOCUMENT | {"transform": {"size": 1, "geometry": "x", "flip": 1}}, "transform says flip"),
    ],
)
def test_a_document_that_says_what_this_program_does_not_know_is_refused(document, message):
    with pytest.raises(ValueError, match=message):
        FeatureSpec.from_fingerprint(document)


def test_features_that_are_never_stored_have_no_type_on_disk():
    with pytest.raises(ValueError, match="dtype '' is unknown; choose one of bf16, fp16, fp32, int8"):
        _ = end_to_end_features(224, "").stored
