"""Beam search over many images at once against one image at a time, as popular implementations do it.

The latter runs in a process of its own, with PyTorch's default settings. Surprising: the model is not trained but made
to behave like one. Plain random weights give nearly equal words and captions that never end: rounding would choose
them. Here the words are peaked and a hidden unit counts up to `<end>`.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional

from sat.bench.harness import InOwnProcess, alternated_medians, peak_memory_mb, report, traffic
from sat.evaluation.beams import Hypothesis
from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.machine import speed_up
from sat.model.at_rest import weights_at_rest
from sat.model.captioner import CLAMP, Captioner, Memory
from sat.model.spec import PRESETS, CaptionerSpec, Sizes
from sat.text import END, PAD, START

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGITS_STD = 6.0
"""Makes the best of 10,000 random words about as probable as a trained model's."""


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    grids: Annotated[str, typer.Option(help="Grids, comma-separated.")] = "7x7,14x14",
    images: Annotated[int, typer.Option(help="Images decoded.")] = 64,
    beam_size: Annotated[int, typer.Option(help="Beams per image.")] = 5,
    rounds: Annotated[int, typer.Option(help="Turns of both contenders; the medians count.")] = 3,
    preset: Annotated[str, typer.Option(help="Preset of the model, see `sat.config`.")] = "paper",
    width: Annotated[int, typer.Option(help="Width of embedding, LSTM and attention.")] = 512,
    vocab_size: Annotated[int, typer.Option(help="Words.")] = 10_000,
    precisions: Annotated[
        str, typer.Option(help="Of ours, comma-separated: fp32, bf16. The other's is fp32.")
    ] = "fp32",
) -> list[dict[str, object]]:
    """Measure both in turn, on a GPU where there is one, and compare their captions; one row per grid and precision."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose from {', '.join(PRESETS)}")
    if unknown := set(precisions.split(",")) - set(PRECISIONS):
        raise ValueError(f"{', '.join(sorted(unknown))} is unknown; choose from {', '.join(PRECISIONS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{preset} model, beam {beam_size}; {speed_up('auto', device)}", flush=True)
    options = DecodeOptions(beam_size=beam_size, max_length=30)
    rows = []
    for name in grids.split(","):
        cells = math.prod(map(int, name.split("x")))
        model = model_with_endings(preset, cells, width, vocab_size).to(device)
        grid = torch.randn(images, cells, len(model.feature_mean)).exp().to(device)  # positive, skewed: as after a ReLU
        for precision in precisions.split(","):
            row = _compare(model, grid, options, rounds, PRECISIONS[precision])
            rows.append({"grid": name, "precision": precision, **row})
    report(rows, json_file)
    return rows


def _compare(
    model: Captioner, grid: Tensor, options: DecodeOptions, rounds: int, dtype: torch.dtype
) -> dict[str, object]:
    here = copy.deepcopy(model).cpu(), grid.cpu()  # what crosses to another process lies on the host
    one_by_one = InOwnProcess(one_image_at_a_time, *here, options, grid.device.type, device=grid.device.type)
    device = grid.device.type

    def ours() -> list[list[Hypothesis]]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32), weights_at_rest([model]):
            return decode(model, grid, options)

    contenders: dict[str, Callable[[], object]] = {"ours": ours, "baseline": one_by_one}
    seconds = alternated_medians(contenders, rounds=rounds, device=device)
    memory, asked = peak_memory_mb(ours, device), traffic(ours, device)
    captions = [found[0].tokens for found in ours()]
    others = one_by_one()
    assert isinstance(others, list)
    same = sum(mine == theirs for mine, theirs in zip(captions, others, strict=True))
    one_by_one.close()
    row: dict[str, object] = {
        "images": len(grid),
        "beam": options.beam_size,
        "words_per_caption": sum(map(len, captions)) / len(grid),
        "images_per_s": len(grid) / seconds["ours"],
        "baseline_images_per_s": len(grid) / seconds["baseline"],
        "ratio": seconds["baseline"] / seconds["ours"],
        "same_captions": same,
        "identical": same == len(grid),
        "peak_memory_mb": memory,
    }
    if asked:
        row |= {"launches": asked.launches, "synchronisations": asked.synchronisations, "busy_ms": 1e3 * asked.busy_s}
    return row


def one_image_at_a_time(
    model: Captioner, grid: Tensor, options: DecodeOptions, device: str
) -> Callable[[], list[list[int]]]:
    """A function that finds the caption of every image of `grid` [B, L, D], one after another, on `device`."""
    model, grid = model.to(device), grid.to(device)

    @torch.inference_mode()
    def search() -> list[list[int]]:
        return [search_one_image(model, image, options.beam_size, options.max_length) for image in grid]

    return search


def search_one_image(model: Captioner, grid: Tensor, beam_size: int, max_length: int) -> list[int]:
    """Best caption of one image [L, D], as popular implementations find it: the list of its words.

    One copy of the grid per beam, projected anew at every word, until as many captions have ended as there were beams.
    """
    attention, gate, live = model.attention, model.gate, beam_size
    assert attention and gate
    grid = ((grid - model.feature_mean) / model.feature_std).clamp(-CLAMP, CLAMP)
    h, c = (x[0].expand(live, -1) for x in model.init_state(Memory(grid[None], grid[None], grid[None])))
    grid = grid.expand(live, -1, -1)  # [k, L, D]
    sequences, totals = torch.full((live, 1), START, device=grid.device), torch.zeros(live, 1, device=grid.device)
    finished: list[tuple[float, list[int]]] = []
    for step in range(max_length):
        words = model.embed(sequences[:, -1])
        hidden = attention.project(grid) + attention.query(h)[:, None]  # [k, L, A]
        hidden = hidden.tanh() if attention.tanh else hidden.relu()
        alpha = attention.score(hidden).softmax(1)  # [k, L, 1]
        context = (alpha * grid).sum(1) * gate(h).sigmoid()  # [k, D]
        h, c = model.lstm(model.word_gates(words), context, h, c)
        scores = functional.log_softmax(model.vocabulary(model.output_features(words, h, context)), dim=1)
        scores[:, [PAD, START]] = -torch.inf
        scores = totals + scores  # [k, V]
        best, places = (scores[0] if step == 0 else scores.view(-1)).topk(live)
        parents, words = places // scores.shape[1], places % scores.shape[1]
        sequences = torch.cat([sequences[parents], words[:, None]], dim=1)
        ended = words == END
        finished += zip(best[ended].tolist(), sequences[ended].tolist(), strict=True)
        live -= int(ended.sum())
        if live == 0:
            break
        going_on = parents[~ended]
        sequences, totals = sequences[~ended], best[~ended][:, None]
        h, c, grid = h[going_on], c[going_on], grid[going_on]
    if finished:
        return max(finished)[1][1:-1]
    unfinished: list[int] = sequences[totals[:, 0].argmax()][1:].tolist()
    return unfinished


@torch.no_grad()
def model_with_endings(preset: str, grid_size: int, width: int, vocab_size: int) -> Captioner:
    """A model in eval mode with random but peaked words, whose captions end after about ten of them."""
    torch.manual_seed(0)
    spec = CaptionerSpec.of_preset(preset, embedding_dim=width, lstm_dim=width, attention_dim=width)
    model = Captioner(spec, Sizes(vocab_size, grid_size)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # keep the variance through every layer
            torch.nn.init.normal_(parameter, std=1.0 if name == "embedding.weight" else parameter.shape[1] ** -0.5)
    memory = model.encode(torch.randn(8, grid_size, model.feature_mean.numel()))
    logits, *_ = model.step(memory, model.init_state(memory), torch.arange(8)[:, None] + 4)
    model.vocabulary.weight *= LOGITS_STD / logits.std()
    _end_after_ten_words(model)
    return model


def _end_after_ten_words(model: Captioner) -> None:
    """The last LSTM unit's cell grows by 0.1 a word, whatever it sees; only `<end>` looks at it, and at it alone."""
    assert model.context_gates and model.init_c
    gates = (model.word_gates, model.state_gates, model.context_gates)
    for gate, bias in enumerate((10.0, 10.0, 0.1, 10.0)):  # input, forget, cell, output
        row = (gate + 1) * model.state_gates.in_features - 1
        for layer in gates:
            layer.weight[row] = 0
        model.word_gates.bias[row] = bias
    last = [layer for layer in model.init_c.modules() if isinstance(layer, torch.nn.Linear)][-1]
    last.weight[-1], last.bias[-1] = 0, 0
    if model.output_state and model.output_context:  # carry the unit to the last output feature, alone
        model.embedding.weight[:, -1], model.output_context.weight[-1] = 0, 0
        model.output_state.weight[-1], model.output_state.weight[-1, -1] = 0, 1
    model.vocabulary.weight[:, -1], model.vocabulary.weight[END] = 0, 0
    # The best of 10,000 words is near 3.7 standard deviations; the unit shows tanh(1) after ten words.
    model.vocabulary.weight[END, -1] = 100
    model.vocabulary.bias[END] = 3.7 * LOGITS_STD - 100 * math.tanh(1.0)
