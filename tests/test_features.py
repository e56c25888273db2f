"""What a feature is: the table of types against numpy and torch, the geometry against the network, refusals."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.data.batch import GridRow
from sat.model.encoders.table import build_encoder
from sat.shards.features import (
    NPY_HEADER,
    STORAGE,
    EncoderSpec,
    FeatureSpec,
    Transform,
)

ENCODER = EncoderSpec("resnet50", 4, 2048, 32.0, 0.0, weights_sha256="a" * 64)
TRANSFORM = Transform(224, "squash", "by torch", "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
SPEC = FeatureSpec("grid", (7, 7), 2048, "int8", ENCODER, TRANSFORM, "b" * 64)
REGIONS = FeatureSpec("regions", (0, 0), 2048, "fp16", None, None, max_regions=36, boxes=True)
DOCUMENT = {
    "encoder": {
        "architecture": "resnet50",
        "stage": 4,
        "dim": 2048,
        "stride": 32.0,
        "first_centre": 0.0,
        "weights_sha256": "a" * 64,
    },
    "transform": {
        "size": 224,
        "geometry": "squash",
        "resize": "by torch",
        "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
    },
    "grid": [7, 7],
    "dim": 2048,
    "dtype": "int8",
    "scale_sha256": "b" * 64,
}
OTHERS = {
    "encoder": {"encoder": replace(ENCODER, weights_sha256="c" * 64)},
    "transform": {"transform": replace(TRANSFORM, mean=(0.5, 0.5, 0.5))},
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


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [32, 96])
def test_the_geometry_is_what_the_network_gives(stage, size):
    network = build_encoder("resnet50", stage).eval()
    with torch.inference_mode():
        grid = network(torch.zeros(1, 3, size, size))
    encoder = network.spec
    rows, columns = encoder.cells(size)
    assert grid.shape == (1, rows * columns, encoder.dim)


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (ENCODER, 225, "size 225 is not a multiple of 32, the stride of resnet50's stage 4; use e.g. 224 or 448"),
        (ENCODER, 0, "size 0 is not a multiple of 32"),
        (replace(ENCODER, stride=14.0), 225, "not a multiple of 14, .*use e.g. 224 or 448"),
        (replace(ENCODER, stride=24.0), 225, "not a multiple of 24, .*use e.g. 216 or 456"),
    ],
)
def test_a_picture_that_cells_do_not_cover_is_refused(spec, size, message):
    with pytest.raises(ValueError, match=message):
        spec.cells(size)


def test_the_view_of_a_document_gives_the_document_back():
    spec = FeatureSpec.from_fingerprint(DOCUMENT | {"source": "e" * 64, "compute": "bf16"})
    assert spec == SPEC and spec.to_fingerprint() == DOCUMENT
    assert (spec.locations, spec.shape, spec.stored, spec.torch) == (49, (49, 2048), np.int8, "int8")
    trained_too = replace(SPEC, encoder=replace(ENCODER, weights_sha256="", trained_from="f" * 64), dtype="")
    assert FeatureSpec.from_fingerprint(trained_too.to_fingerprint()) == trained_too
    assert "dtype" not in trained_too.to_fingerprint()
    assert FeatureSpec.from_fingerprint(json.loads(json.dumps(REGIONS.to_fingerprint()))) == REGIONS
    assert (REGIONS.locations, REGIONS.shape) == (36, (36, 2048)) and "grid" not in REGIONS.to_fingerprint()


def test_the_centres_are_those_of_the_cells_in_row_major_order():
    spec = replace(SPEC, cells=(2, 3), encoder=replace(ENCODER, stride=32.0, first_centre=31.0))
    assert spec.centres().tolist() == [[31, 31], [63, 31], [95, 31], [31, 63], [63, 63], [95, 63]]
    assert spec.centres().dtype == np.float64
    for unknown in (REGIONS, replace(SPEC, encoder=None)):
        with pytest.raises(ValueError, match="is not known"):
            unknown.centres()


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
        (DOCUMENT | {"kind": "regions"}, "does not say max_regions"),
        (DOCUMENT | {"kind": "clips"}, "features of kind 'clips' are unknown"),
        (DOCUMENT | {"encoder": {"architecture": "resnet50", "stage": 4}}, "encoder does not say dim, stride, first_"),
        (DOCUMENT | {"encoder": DOCUMENT["encoder"] | {"tiles": 4}}, "encoder says tiles, which this program does not"),
        (DOCUMENT | {"transform": {"size": 1, "geometry": "x", "flip": 1}}, "transform says flip"),
    ],
)
def test_a_document_that_says_what_this_program_does_not_know_is_refused(document, message):
    with pytest.raises(ValueError, match=message):
        FeatureSpec.from_fingerprint(document)


def test_features_that_are_never_stored_have_no_type_on_disk():
    with pytest.raises(ValueError, match="dtype '' is unknown; choose one of bf16, fp16, fp32, int8"):
        _ = replace(SPEC, dtype="").stored
