"""DDP and ZeRO 1, 2, 3 on 1, 2 and 3 ranks, over batches that leave ranks empty: one loss curve, one set of weights.

And from any of them to any other: what one has saved, another continues. One launch per number of ranks.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sat.config import load_config
from sat.export import save_model
from sat.learner import build_learner
from sat.training_data import open_data
from tests.helpers_engines import launch_variants, small_config
from tests.helpers_training import engine_alone

ENGINES = ("ddp", "zero1", "zero2", "zero3")
SAMPLING_ENGINES = ("ddp", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload")
RANKS = (1, 2, 3)
BATCHES = ("train.global_batch=7", "model.dropout=0.5")
"""22 images: the fourth and last batch holds one, so all ranks but one, and all micro-batches but one, are empty."""
TWICE = "train.accumulation_steps=2"
SPOILT = ("train.global_batch=6", "infinite=1", "nan=2", "train.ema=0.5")
LAUNCHERS = {1: "deepspeed_zero1_cpu", 2: "deepspeed_zero3_cpu", 3: "deepspeed_zero2_cpu"}
BF16, FP16 = ("train.precision=bf16",), ("train.precision=fp16", "train.kernels=torch")
TOLERANCE = 0.02
"""In bf16, of the loss per token after four steps at a rate of 0.01, against float32."""


def kept(root: Path, engine: str, ranks: int = 2) -> str:
    return str(root / f"{engine}-on-{ranks}.safetensors")


def variants(root: Path, ranks: int) -> list[tuple[str, ...]]:
    """Two ranks come first and keep their states, with which each engine goes on itself; then others do."""
    found = [(f"engine={engine}", *BATCHES, TWICE) for engine in ENGINES]
    if ranks == 2:
        found += [(f"engine={engine}", *BATCHES, f"keep={kept(root, engine)}") for engine in ENGINES]
        found += [(f"engine={engine}", *BATCHES) for engine in OFFLOADED]
        found += [(f"engine={engine}", *BATCHES, f"go_on={kept(root, engine)}") for engine in ENGINES]
        found += [(f"engine={engine}", *SPOILT) for engine in ENGINES]
        found += [(f"engine={engine}", *BATCHES, *precision) for engine in ENGINES for precision in (BF16, FP16)]
    found += [(f"engine={engine}", *sampling(root)) for engine in SAMPLING_ENGINES]
    if ranks != 2:
        found += [(f"engine={engine}", *BATCHES, f"keep={kept(root, engine, ranks)}") for engine in ENGINES]
        found += [(f"engine={engine}", *BATCHES, f"go_on={kept(root, engine, ranks)}") for engine in ENGINES]
        found += [(f"engine={to}", *BATCHES, f"go_on={kept(root, of)}") for of, to in pairs(ranks)]
    return found


def sampling(root: Path) -> tuple[str, ...]:
    """Self-critical training, from a model that `begun_model` has left; at a rate that keeps engines near each other:
    a word that another rounding draws is another word.
    """
    said = ("train.objective=self_critical", f"train.start_from={root}/begun", "train.learning_rate=0.0005")
    return (*said, *BATCHES, "self_critical.samples=3", "self_critical.length=0.5", "self_critical.max_length=8")


def begun_model(config: Path, alone) -> None:
    """A run folder that a training can start from, beside the configuration."""
    settings = load_config(config)
    data = open_data(settings)
    state = build_learner(settings, data, alone).model.state_dict()
    save_model(config.parent / "begun/best", state, data.tokenizer, settings, data.features, 1)


def pairs(ranks: int) -> list[tuple[str, str]]:
    """(saved by, continued by): with 1 and 3 ranks each engine continues two others."""
    return [(of, ENGINES[(i + (1 if ranks == 1 else 2)) % 4]) for i, of in enumerate(ENGINES)]


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """(ranks, *settings) -> what four steps did."""
    root = tmp_path_factory.mktemp("engines")
    config = small_config(root)
    with engine_alone() as engine:
        begun_model(config, engine)
    found = {}
    for ranks in (2, 1, 3):
        chosen = variants(root, ranks)
        for settings, values in launch_variants(config, LAUNCHERS[ranks], ranks, chosen).items():
            found[ranks, *settings] = values
    return root, found


@pytest.fixture(scope="module")
def alone(taken):
    root, found = taken
    return found[1, "engine=ddp", *BATCHES, f"keep={kept(root, 'ddp', 1)}"]


def assert_same_weights(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To rounding; where a gradient is almost zero Adam makes up to 1 % of its step of 0.01 from rounding alone."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("ranks", "engine", "accumulation"),
    [(ranks, engine, each) for ranks in RANKS for engine in ENGINES for each in ((), (TWICE,))]
    + [(2, engine, ()) for engine in OFFLOADED],
)
def test_the_loss_curve_and_the_weights_are_those_of_one_process(taken, alone, ranks, engine, accumulation):
    root, found = taken
    keep = (f"keep={kept(root, engine, ranks)}",) if not accumulation and engine in ENGINES else ()
    split = found[ranks, f"engine={engine}", *BATCHES, *accumulation, *keep]
    torch.testing.assert_close(split["lines"], alone["lines"], rtol=1e-5, atol=1e-6)
    assert_same_weights(split["weights"], alone["weights"])
    assert (alone["weights"][-1] - alone["weights"][-2]).abs().max() > 1e-3  # the step that leaves ranks empty moves


@pytest.mark.parametrize("engine", SAMPLING_ENGINES)
@pytest.mark.parametrize("ranks", RANKS)
def test_captions_are_drawn_and_rewarded_alike_on_any_engine_and_ranks(taken, ranks, engine):
    root, found = taken
    split, whole = found[ranks, f"engine={engine}", *sampling(root)], found[1, "engine=ddp", *sampling(root)]
    torch.testing.assert_close(split["lines"], whole["lines"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split["weights"], whole["weights"], rtol=0, atol=1e-5)
    assert whole["lines"][:, 2].min() > 1e-3 and (whole["weights"][-1] - whole["weights"][-2]).abs().max() > 1e-5
    if engine == "ddp":
        scale = whole["gradients"].abs().amax(1, keepdim=True)
        torch.testing.assert_close(split["gradients"] / scale, whole["gradients"] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_same_engine_and_ranks_go_on_bit_by_bit(taken, ranks, engine):
    root, found = taken
    whole = found[ranks, f"engine={engine}", *BATCHES, f"keep={kept(root, engine, ranks)}"]
    halves = found[ranks, f"engine={engine}", *BATCHES, f"go_on={kept(root, engine, ranks)}"]
    assert torch.equal(halves["weights"], whole["weights"][2:]) and torch.equal(halves["lines"], whole["lines"][2:])


@pytest.mark.parametrize(("ranks", "of", "to"), [(ranks, *pair) for ranks in (1, 3) for pair in pairs(ranks)])
def test_what_two_ranks_of_an_engine_saved_others_go_on_with(taken, alone, ranks, of, to):
    root, found = taken
    halves = found[ranks, f"engine={to}", *BATCHES, f"go_on={kept(root, of)}"]
    torch.testing.assert_close(halves["lines"][:, 0], alone["lines"][2:, 0], rtol=1e-6, atol=1e-6)
    assert_same_weights(halves["weights"], alone["weights"][2:])


def test_all_engines_save_the_same_names_shapes_and_types(taken):
    root, _ = taken
    first, *others = (load_file(kept(root, engine)) for engine in ENGINES)
    assert first["step"].item() == 2 and first["weights/embedding.weight"].dtype == torch.float32
    for other in others:
        assert {name: (value.shape, value.dtype) for name, value in other.items()} == {
            name: (value.shape, value.dtype) for name, value in first.items()
        }
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_on_any_rank_moves_nothing(taken, engine):
    split = taken[1][2, f"engine={engine}", *SPOILT]
    assert split["lines"][:, 3].tolist() == [0, 1, 1, 0]
    assert not split["lines"][1:3, 2].isfinite().any() and split["lines"][[0, 3], :3].isfinite().all()
    for name in ("weights", "averages"):
        first, *after = split[name]
        assert torch.equal(after[0], first) and torch.equal(after[1], first) and not torch.equal(after[2], first)
    other = taken[1][2, "engine=ddp", *SPOILT]
    torch.testing.assert_close(split["averages"], other["averages"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_is_near_float32_and_every_engine_rounds_alike(taken, alone, engine):
    ddp, split = (taken[1][2, f"engine={each}", *BATCHES, *BF16] for each in ("ddp", engine))
    torch.testing.assert_close(split["lines"][:, 0], alone["lines"][:, 0], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(split["lines"][:, 0], ddp["lines"][:, 0], rtol=1e-3, atol=0)
    assert not torch.equal(split["lines"], alone["lines"])


@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_scales_its_loss_alike_under_every_engine(taken, engine):
    """On a CPU, where `start` refuses it for its slowness; the rule is the same."""
    ddp, split = (taken[1][2, f"engine={each}", *BATCHES, *FP16] for each in ("ddp", engine))
    assert torch.equal(split["lines"][:, 3], ddp["lines"][:, 3])
    torch.testing.assert_close(split["lines"][:, 0], ddp["lines"][:, 0], rtol=5e-3, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_fp16_on_a_gpu_scales_its_loss_under_every_engine(tmp_path):
    config = small_config(tmp_path)
    chosen = [(f"engine={engine}", *BATCHES, *precision) for engine in ENGINES for precision in ((), FP16)]
    found = launch_variants(config, "deepspeed_zero2", 1, chosen)
    whole = found["engine=ddp", *BATCHES]
    for engine in ENGINES:
        half = found[f"engine={engine}", *BATCHES, *FP16]
        good = half["lines"][:, 3] == 0
        torch.testing.assert_close(half["lines"][good][:1, 0], whole["lines"][:1, 0], rtol=TOLERANCE, atol=0)
        assert half["weights"].isfinite().all()


@pytest.mark.gpu
def test_what_is_offloaded_from_a_gpu_to_the_cpu_learns_as_what_stays_there(tmp_path):
    """Adam's rounding there is another one, and gradients are summed in no fixed order; DeepSpeed compiles nothing."""
    config = small_config(tmp_path)
    state = {engine: f"{tmp_path}/{engine}.safetensors" for engine in OFFLOADED}
    chosen = [
        ("engine=ddp", *BATCHES),
        *((f"engine={engine}", *BATCHES, f"keep={state[engine]}") for engine in OFFLOADED),
    ]
    halves = [(f"engine={engine}", *BATCHES, f"go_on={state[of]}") for of in OFFLOADED for engine in (of, "ddp")]
    found = launch_variants(config, "deepspeed_zero3_offload", 1, [*chosen, *halves])
    whole = found[chosen[0]]
    for variant in (*chosen[1:], *halves):
        first = 2 if variant in halves else 0
        torch.testing.assert_close(found[variant]["lines"], whole["lines"][first:], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[variant]["weights"], whole["weights"][first:], rtol=0, atol=2e-3)
