"""Initial weights: those of the paper's authors, or those of the popular re-implementation.

Surprising: under `normal` each of the four recurrent blocks is orthogonal (authors' code); stacked they are not.
"""

from torch import nn

NORMAL_STD = 0.01
UNIFORM_BOUND = 0.1


def initialise(
    model: nn.Module, kind: str, *, embedding: nn.Embedding, vocabulary: nn.Linear, recurrent: nn.Linear
) -> None:
    """Set the weights of `model` in place, drawing from the default generator; the layers named are parts of it.

    `normal`: N(0, 0.01), recurrent blocks orthogonal, biases zero. `uniform`: embedding and vocabulary layer
    U(-0.1, 0.1) with a zero bias, everything else as torch initialises it.
    """
    if kind == "uniform":
        nn.init.uniform_(embedding.weight, -UNIFORM_BOUND, UNIFORM_BOUND)
        nn.init.uniform_(vocabulary.weight, -UNIFORM_BOUND, UNIFORM_BOUND)
        nn.init.zeros_(vocabulary.bias)
        return
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=NORMAL_STD)
    for block in recurrent.weight.data.chunk(4):
        nn.init.orthogonal_(block)
