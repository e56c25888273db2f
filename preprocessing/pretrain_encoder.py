"""Train the ResNet-50 itself on rendered scenes, in minutes on two cores, where there are no ImageNet weights.

    python -m preprocessing.pretrain_encoder --out data/demo/encoder.safetensors

Linear heads name the shape, colour, size and place that each grid cell looks at, and the ground and arrangement of the
picture; then they are dropped. The surprising decision: cells are taught, not pictures. A scene of nine objects gives
49 answers for one forward pass, and the decoder attends to cells later, so this is what it needs to tell apart.

The file says of itself that it is pre-trained on the scene generator, not on ImageNet. An interrupted run goes on
from a file beside it; a whole file of the same recipe is kept.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from preprocessing.console import progress_line, run
from preprocessing.crowds import CELL_CLASSES, PICTURE_CLASSES, LabelledBatch, labelled_batch
from preprocessing.scenes import SIZE
from sat.model.encoder import STAGES, Encoder, normalise

VERSION = 1
"""Raised by every change that alters the weights a recipe gives."""
DESCRIPTION = "ResNet-50 pre-trained on the scene generator of preprocessing.synthetic, not on ImageNet"
WEIGHT_OF_NOTHING = 0.1
"""Loss of an empty cell against that of a cell with an object: most cells are empty."""
WEIGHT_OF_CONTEXT = 0.3
"""Loss of place, ground and arrangement, which are easy, against that of shape, colour and size."""
CALIBRATION_BATCHES = 12
"""Batches of ordinary scenes over which BatchNorm's statistics are taken at the end."""
SAVE_EVERY = 50
"""Steps between two writes of the file from which an interrupted run goes on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights."""

    steps: int = 500
    batch_size: int = 4
    size: int = SIZE
    """Side of the pictures in pixels; features are taken at the same size later."""
    crowded: float = 0.6
    """Share of the pictures that are crowds of objects."""
    learning_rate: float = 2e-3
    """Peak rate: linear warm-up, then a cosine to zero."""
    warmup: float = 0.1
    """Share of the steps spent warming up."""
    weight_decay: float = 0.05
    seed: int = 1
    version: int = VERSION

    def digest(self) -> str:
        """Names the recipe in the weights file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(self.steps * self.warmup))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Pretrainer(nn.Module):
    """The encoder with one linear head on each cell and one on the mean of all cells."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.cell_head = nn.Linear(self.encoder.feature_dim, sum(CELL_CLASSES.values()))
        self.picture_head = nn.Linear(self.encoder.feature_dim, sum(PICTURE_CLASSES.values()))
        for head in (self.cell_head, self.picture_head):
            nn.init.zeros_(head.weight)
        for stage in STAGES:  # each block starts as the identity: Goyal et al. 2017, arXiv:1706.02677, section 5.1
            for block in self.encoder.stage_module(stage):
                nn.init.zeros_(block.bn3.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pictures [B, 3, S, S] -> scores per cell [B, L, sum of CELL_CLASSES] and per picture [B, ...]."""
        grid = self.encoder(images).float()  # [B, L, D]
        return self.cell_head(grid), self.picture_head(grid.mean(dim=1))


def pretraining_loss(cell_scores: Tensor, picture_scores: Tensor, batch: LabelledBatch) -> Tensor:
    """Weighted sum of the cross entropies of all heads."""
    total = cell_scores.new_zeros(())
    parts = cell_scores.flatten(0, 1).split(list(CELL_CLASSES.values()), dim=-1)
    for index, (name, scores) in enumerate(zip(CELL_CLASSES, parts, strict=True)):
        labels = torch.from_numpy(batch.cells[..., index]).flatten().to(scores.device)
        if name in ("row", "column"):
            total = total + WEIGHT_OF_CONTEXT * F.cross_entropy(scores, labels)
        else:
            weights = scores.new_ones(scores.shape[-1])
            weights[-1] = WEIGHT_OF_NOTHING
            total = total + F.cross_entropy(scores, labels, weights)
    for index, scores in enumerate(picture_scores.split(list(PICTURE_CLASSES.values()), dim=-1)):
        labels = torch.from_numpy(batch.pictures[:, index]).to(scores.device)
        total = total + WEIGHT_OF_CONTEXT * F.cross_entropy(scores, labels)
    return total


def pretrain(recipe: Recipe, state_file: Path) -> Encoder:
    """Train by `recipe`, going on from `state_file` where it fits; returns the encoder in eval mode, in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    model = Pretrainer().to(device, memory_format=torch.channels_last).train()
    optimizer = _make_optimizer(model, recipe)
    first = _restore(state_file, recipe, model, optimizer)
    with progress_line(recipe.steps, "pre-training the encoder", "steps") as advance:
        advance(first)
        for step in range(first, recipe.steps):
            _train_step(model, optimizer, recipe, step, device)
            advance(1)
            if (step + 1) % SAVE_EVERY == 0:
                _save_state(state_file, recipe, step + 1, model, optimizer)
    calibrate_batchnorm(model.encoder, recipe, device)
    return model.encoder.eval().cpu()


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def _train_step(model: Pretrainer, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, device) -> None:
    batch = labelled_batch(f"pretrain/{recipe.seed}/{step}", recipe.batch_size, recipe.size, recipe.crowded)
    with _autocast(device):
        cell_scores, picture_scores = model(_images(batch, device))
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    pretraining_loss(cell_scores.float(), picture_scores.float(), batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def _images(batch: LabelledBatch, device: torch.device) -> Tensor:
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).to(device)
    return normalise(pixels).contiguous(memory_format=torch.channels_last)


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the processor computes in it; elsewhere it would only be slower."""
    fast = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@torch.no_grad()
def calibrate_batchnorm(encoder: Encoder, recipe: Recipe, device: torch.device) -> None:
    """Replace BatchNorm's running statistics by plain averages over ordinary scenes, such as will be encoded.

    The running ones lag behind weights that moved quickly, and come from crowds.
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    encoder.train()
    for number in range(CALIBRATION_BATCHES):
        batch = labelled_batch(f"calibrate/{recipe.seed}/{number}", recipe.batch_size, recipe.size, crowded=0.0)
        with _autocast(device):
            encoder(_images(batch, device))
    for norm in norms:
        norm.momentum = 0.1


def _save_state(path: Path, recipe: Recipe, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"recipe": recipe.digest(), "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _restore(path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Steps already done by an interrupted run of the same recipe; 0 where there was none."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != recipe.digest():
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def is_made_by(path: Path, recipe: Recipe) -> bool:
    """Whether `path` is a whole weights file of this recipe."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("recipe") == recipe.digest()
    except (FileNotFoundError, SafetensorError):
        return False


def make_encoder(out: Path, recipe: Recipe) -> bool:
    """Bring `out` to the weights of `recipe`; returns whether they had to be trained."""
    if is_made_by(out, recipe):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    state_file = out.with_name(out.name + ".unfinished")
    encoder = pretrain(recipe, state_file)
    settings = json.dumps(asdict(recipe), sort_keys=True)
    metadata = {"description": DESCRIPTION, "recipe": recipe.digest(), "settings": settings}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, temporary, metadata)
    os.replace(temporary, out)
    state_file.unlink(missing_ok=True)
    return True


def main(
    out: Annotated[Path, typer.Option(help="weights file to write (safetensors, torchvision's names)")],
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = Recipe.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures per step")] = Recipe.batch_size,
    size: Annotated[int, typer.Option(min=64, help="side of the pictures, a multiple of 32")] = Recipe.size,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="peak rate of AdamW")] = Recipe.learning_rate,
    seed: Annotated[int, typer.Option(help="seeds weights and pictures")] = Recipe.seed,
) -> None:
    """Train a ResNet-50 on rendered scenes and write it without its heads; a second run keeps a whole file."""
    if size % 32:
        raise ValueError(f"--size {size} is not a multiple of 32; use {size // 32 * 32} or {size // 32 * 32 + 32}")
    recipe = Recipe(steps=steps, batch_size=batch_size, size=size, learning_rate=learning_rate, seed=seed)
    trained = make_encoder(out, recipe)
    print(f"{out}: {DESCRIPTION}; {'trained now' if trained else 'reused'}")


if __name__ == "__main__":
    run(main)
