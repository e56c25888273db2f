"""The making of a CUDA graph, with a graph that is none."""

import gc

import pytest
import torch

from sat.model import recording


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_until_a_graph_is_whole_and_the_first_error_is_the_one_that_is_seen(fails, monkeypatch):
    class Graph:
        def capture_begin(self, **_):
            assert not gc.isenabled()

        def capture_end(self):
            assert not gc.isenabled()
            if fails:
                raise RuntimeError("failed due to a previous error")

    def work():
        if fails:
            raise ValueError("the first one")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    if fails:
        with pytest.raises(ValueError, match="the first one"):
            recording._captured(work, None)
    else:
        recording._captured(work, None)
    assert gc.isenabled()
