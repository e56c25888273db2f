"""What is frozen stays frozen: parts of an encoder opened for training, and blocks that are computed twice.

The surprising decision: a BatchNorm left in train mode silently replaces its statistics by those of the current batch,
the most common way to spoil a frozen encoder; every closed BatchNorm is therefore kept in eval mode through `train()`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def open_parts(encoder: nn.Module, parts: Sequence[nn.Module], freeze_batchnorm: bool) -> list[nn.BatchNorm2d]:
    """Let gradients into `parts` of the encoder and into nothing else; returns the BatchNorms that stay frozen."""
    encoder.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    opened = {id(module) for part in parts for module in part.modules()}
    frozen = [norm for norm in batchnorms(encoder) if freeze_batchnorm or id(norm) not in opened]
    for norm in frozen:
        norm.requires_grad_(False)
    return frozen


def batchnorms(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (child for child in module.modules() if isinstance(child, nn.BatchNorm2d))


def has_gradients(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def run_twice(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`forward` of `block`, of which the backward pass keeps the input alone and computes the rest again."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    contexts = partial(_contexts, block)
    result: Tensor = (
        checkpoint(forward, *args, **options, context_fn=contexts, **kwargs)
        if torch.is_grad_enabled()
        else forward(*args, **kwargs)
    )
    return result


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of `block`'s first pass and of its recomputation."""
    return nullcontext(), _as_in_the_first_pass(block, [norm for norm in batchnorms(block) if norm.training])


@contextmanager
def _as_in_the_first_pass(block: nn.Module, trained: list[nn.BatchNorm2d]) -> Iterator[None]:
    """Run `block` again, with `trained` its BatchNorms in train mode, without moving their statistics a second time."""
    before = [(norm, norm.training, norm.momentum) for norm in batchnorms(block)]
    counters = [(counter, counter.clone()) for norm in trained if (counter := norm.num_batches_tracked) is not None]
    for norm, _, _ in before:
        norm.train(any(norm is each for each in trained))
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, mode, momentum in before:
            norm.train(mode)
            norm.momentum = momentum
        for counter, batches in counters:
            counter.copy_(batches)
