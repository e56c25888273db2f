"""Training step of this project against a straightforward per-caption loop, on this machine.

The loop is written as a user would write it from the equations: 32 captions at a time, padded to the longest, one copy
of the grid per caption, projected again at every word, full logits, standard Adam; in fp32 and with PyTorch's default
settings, in a process of its own. Surprising: `ratio` is against that one loop in every row, so bf16 counts as a gain;
`ratio_same_precision` is against the loop under autocast to the row's precision. Both train the same model on the same
captions.
"""

import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from sat.bench.harness import InOwnProcess, alternated_medians, gemm_peak, peak_memory_mb, report
from sat.machine import speed_up
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import CaptionerSpec, Sizes
from sat.optim import build_optimizer

IMAGES, CAPTIONS, VOCABULARY, WIDTH, FEATURES = 32, 5, 10_000, 512, 2048
GRIDS = {"7x7": 49, "14x14": 196}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
COCO_WORDS = {
    7: 0.82,
    8: 16.0,
    9: 22.2,
    10: 21.4,
    11: 15.2,
    12: 10.0,
    13: 5.81,
    14: 3.4,
    15: 1.87,
    16: 1.1,
    17: 0.7,
    18: 0.44,
    19: 0.28,
    20: 0.18,
    21: 0.12,
    22: 0.1,
    23: 0.09,
    24: 0.06,
    25: 0.05,
    26: 0.03,
    28: 0.02,
    30: 0.02,
    36: 0.02,
    44: 0.01,
}
"""Words per caption of COCO val2017, in per cent: stands in where the captions themselves are not at hand."""


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    grids: Annotated[str, typer.Option(help="Grids, comma-separated: 7x7, 14x14.")] = "7x7,14x14",
    precisions: Annotated[str, typer.Option(help="Precisions, comma-separated: fp32, bf16.")] = "fp32,bf16",
    rounds: Annotated[int, typer.Option(help="Turns of both contenders, each on another batch; medians count.")] = 3,
) -> list[dict[str, object]]:
    """Measure both in turn, on a GPU where there is one; one row per precision and grid."""
    chosen = grids.split(","), precisions.split(",")
    for names, known in zip(chosen, (list(GRIDS), list(PRECISIONS)), strict=True):
        if unknown := set(names) - set(known):
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown; choose from {', '.join(known)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches, source = caption_batches(rounds + 1)
    print(f"{IMAGES} images x {CAPTIONS} captions a step, {source}; {speed_up('auto', device)}", flush=True)
    rows = [measure(grid, precision, batches, rounds, device) for precision in chosen[1] for grid in chosen[0]]
    report(rows, json_file)
    return rows


def measure(
    grid: str, precision: str, batches: list[tuple[Tensor, Tensor]], rounds: int, device: str
) -> dict[str, object]:
    """One row of the table: both contenders on the same batches, the first of which only warms up."""
    torch.manual_seed(0)
    features = torch.randn(IMAGES, GRIDS[grid], FEATURES, device=device).relu().bfloat16()
    batches = [(captions.to(device), lengths.to(device)) for captions, lengths in batches]
    ours = our_step(features, batches, PRECISIONS[precision])
    memory = peak_memory_mb(lambda: [ours() for _ in batches], device)
    loops = {
        name: InOwnProcess(baseline_step, features, batches, PRECISIONS[name], device=device)
        for name in {"fp32", precision}
    }
    seconds = alternated_medians({"ours": ours, **loops}, rounds=rounds, device=device)
    for loop in loops.values():
        loop.close()
    operations = sum(gflop(GRIDS[grid], *batch) for batch in batches) / len(batches)
    peak = gemm_peak(PRECISIONS[precision], device=device)
    return {
        "grid": grid,
        "precision": precision,
        "captions_per_s": IMAGES * CAPTIONS / seconds["ours"],
        "baseline_captions_per_s": IMAGES * CAPTIONS / seconds["fp32"],
        "ratio": seconds["fp32"] / seconds["ours"],
        "ratio_same_precision": seconds[precision] / seconds["ours"],
        "gflop_per_caption": operations / (IMAGES * CAPTIONS),
        "gflops_per_s": operations / seconds["ours"],
        "peak_gflops_per_s": peak,
        "share_of_peak": operations / seconds["ours"] / peak,
        "peak_memory_mb": memory,
    }


def our_step(features: Tensor, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Callable[[], None]:
    """A function that takes one optimizer step over the whole of the next batch."""
    device = features.device
    spec = CaptionerSpec.of_preset("tutorial", embedding_dim=WIDTH, lstm_dim=WIDTH, attention_dim=WIDTH)
    model = Captioner(spec, Sizes(VOCABULARY, features.shape[1], FEATURES)).to(device)
    objective = TeacherForcing(model)
    optimizer = build_optimizer(model, learning_rate=4e-4, weight_decay=0.0, encoder_learning_rate=0.0)

    upcoming = itertools.cycle(batches)

    def step() -> None:
        captions, lengths = next(upcoming)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            sums = objective(features, captions, lengths)
        optimizer.zero_grad()
        total_loss(sums, sums.counts["tokens"], sums.counts["captions"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


class PerCaptionLoop(nn.Module):
    """The popular implementation's decoder (preset `tutorial`), one `nn.LSTMCell` step a word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.project, self.query, self.score = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.init_h, self.init_c = nn.Linear(FEATURES, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.gate = nn.Linear(WIDTH, FEATURES)
        self.cell = nn.LSTMCell(WIDTH + FEATURES, WIDTH)
        self.dropout, self.vocabulary = nn.Dropout(0.5), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, grid: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        """Loss of `captions` [N, T + 1] of `lengths` [N], each with its own copy of the `grid` [N, L, D]."""
        words = self.embedding(captions)
        h, c = self.init_h(grid.mean(1)), self.init_c(grid.mean(1))
        logits, alphas = [], []
        for t in range(captions.shape[1] - 1):
            hidden = torch.relu(self.project(grid) + self.query(h)[:, None])
            alpha = self.score(hidden).squeeze(2).softmax(1)
            context = (grid * alpha[..., None]).sum(1)
            context = torch.sigmoid(self.gate(h)) * context
            h, c = self.cell(torch.cat([words[:, t], context], 1), (h, c))
            logits.append(self.vocabulary(self.dropout(h)))
            alphas.append(alpha)
        valid = torch.arange(len(logits), device=grid.device) < lengths[:, None]
        targets = captions[:, 1:].masked_fill(~valid, -100)
        loss = F.cross_entropy(torch.stack(logits, 1).flatten(0, 1), targets.flatten())
        return loss + ((1 - (torch.stack(alphas, 1) * valid[..., None]).sum(1)) ** 2).mean()


def baseline_step(features: Tensor, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Callable[[], None]:
    """A function that takes the loop over all captions of the next batch, an optimizer step for every 32."""
    device = features.device
    model = PerCaptionLoop().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
    grid = features.float()
    shuffled = torch.randperm(IMAGES * CAPTIONS, generator=torch.Generator().manual_seed(0)).to(device)
    upcoming = itertools.cycle(batches)

    def step() -> None:
        captions, lengths = next(upcoming)
        for part in shuffled.split(32):
            mine = lengths.flatten()[part]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(grid[part // CAPTIONS], captions.flatten(0, 1)[part, : mine.max() + 1], mine)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    return step


def gflop(locations: int, captions: Tensor, lengths: Tensor) -> float:
    """GFLOP of one training step that does nothing twice: 2 per multiply-add, forward once, backward twice.

    No gradient flows to the frozen grid, which halves its backward pass; equal words of the batch pass the gates once.
    """
    tokens, distinct = int(lengths.sum()), len(captions.unique())
    per_token = 4 * WIDTH * (WIDTH + FEATURES) + WIDTH * (WIDTH + FEATURES) + WIDTH * VOCABULARY
    per_token += locations * (FEATURES + WIDTH)
    per_image = locations * FEATURES * WIDTH + 2 * FEATURES * WIDTH
    return (6 * (tokens * per_token + distinct * 4 * WIDTH * WIDTH) + 4 * IMAGES * per_image) / 1e9


def caption_batches(count: int) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """`count` batches of captions int64 [B, K, T + 1] with lengths int64 [B, K], and where they are from.

    COCO's own captions where they are at hand, else words by Zipf's law in captions as long as COCO's.
    """
    rng = random.Random(0)
    root = Path(os.environ.get("SAT_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    file = root / "coco_val2017" / "captions_val2017.json"
    if file.exists():
        images, source = _real_captions(file), "captions of COCO val2017"
    else:
        ranks = range(4, VOCABULARY)
        zipf = list(itertools.accumulate(1 / rank for rank in ranks))
        sizes = rng.choices(list(COCO_WORDS), list(COCO_WORDS.values()), k=count * IMAGES * CAPTIONS)
        sentences = [rng.choices(ranks, cum_weights=zipf, k=size) for size in sizes]
        images = [sentences[i : i + CAPTIONS] for i in range(0, len(sentences), CAPTIONS)]
        source = "lengths as in COCO, words by Zipf's law"
    chosen = rng.sample(images, count * IMAGES)
    return [_padded(chosen[i : i + IMAGES]) for i in range(0, len(chosen), IMAGES)], source


def _padded(images: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([[len(caption) + 1 for caption in captions] for captions in images])
    captions = torch.zeros(*lengths.shape, int(lengths.max()) + 1, dtype=torch.int64)
    for b, image in enumerate(images):
        for k, caption in enumerate(image):
            captions[b, k, : len(caption) + 2] = torch.tensor([1, *caption, 2])
    return captions, lengths


def _real_captions(file: Path) -> list[list[list[int]]]:
    """Word ids, by frequency, of five captions of every image."""
    by_image: dict[int, list[list[str]]] = {}
    for annotation in json.loads(file.read_text())["annotations"]:
        words = re.findall(r"[a-z0-9']+", annotation["caption"].lower())[:50]
        by_image.setdefault(annotation["image_id"], []).append(words)
    frequency = Counter(word for captions in by_image.values() for caption in captions for word in caption)
    ids = {word: 4 + rank for rank, (word, _) in enumerate(frequency.most_common(VOCABULARY - 4))}
    return [[[ids.get(w, 3) for w in words] for words in by_image[image][:CAPTIONS]] for image in sorted(by_image)]
