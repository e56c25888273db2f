"""The implementations of the kernels, as parameters of the tests that all of them must pass."""

import pytest

from sat.model.kernels import native, torch_kernels

needs_compiler = pytest.mark.skipif(native.library()[0] is None, reason=f"no native kernels: {native.library()[1]}")
every_kernels = pytest.mark.parametrize(
    "kernels",
    [pytest.param(torch_kernels, id="pytorch"), pytest.param(native, id="native", marks=needs_compiler)],
)
both_scores = pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "relu"])
