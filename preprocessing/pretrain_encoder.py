"""Train the ResNet-50 itself on rendered objects, in minutes on two cores, where there are no ImageNet weights.

    python -m preprocessing.pretrain_encoder --out weights/scenes.safetensors

Linear heads on the mean of the grid name the shape, colour, size and ground of crops with one object each; then they
are dropped. The surprising decision: BatchNorm keeps the statistics of the crops, not those of whole scenes. A cell of
a scene's grid should answer an object as it did in a crop, however empty the rest of the scene is.

The file says of itself that it is pre-trained on the scene generator, not on ImageNet. An interrupted run goes on
from a file beside it; a whole file of the same recipe is kept.
"""

import hashlib
import json
import math
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
from preprocessing.scenes.crops import CLASSES, LabelledCrops, labelled_crops
from sat import files
from sat.model.encoders.resnet import STAGES, Encoder, normalise

VERSION = 1
"""Raised by every change that alters the weights a recipe gives."""
DESCRIPTION = "ResNet-50 pre-trained on the scene generator of preprocessing.synthetic, not on ImageNet"
WEIGHT_OF_GROUND = 0.3
"""Loss of the ground, which is easy, against that of shape, colour and size."""
LAST_RATE = 0.2
"""Share of the peak learning rate at the last step."""
SAVE_EVERY = 50
"""Steps between two writes of the file from which an interrupted run goes on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights."""

    steps: int = 320
    batch_size: int = 96
    size: int = 48
    """Side of the crops in pixels."""
    learning_rate: float = 2e-3
    """Peak rate: linear warm-up, then half a cosine to LAST_RATE of it."""
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
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        return self.learning_rate * (LAST_RATE + (1 - LAST_RATE) * cosine)


class Pretrainer(nn.Module):
    """The encoder with one linear head on the mean of its grid."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(self.encoder.feature_dim, sum(map(len, CLASSES.values())))
        nn.init.zeros_(self.head.weight)
        for stage in STAGES:  # each block starts as the identity: Goyal et al. 2017, arXiv:1706.02677, section 5.1
            for block in self.encoder.stage_module(stage):
                last = block.get_submodule("bn3")
                assert isinstance(last, nn.BatchNorm2d)
                nn.init.zeros_(last.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised crops [B, 3, C, C] -> scores [B, sum of the classes]."""
        scores: Tensor = self.head(self.encoder(images).float().mean(dim=1))
        return scores


def pretraining_loss(scores: Tensor, crops: LabelledCrops) -> Tensor:
    """Weighted sum of the cross entropies of all heads."""
    labels = torch.from_numpy(crops.labels).to(scores.device)
    parts = torch.split(scores, [len(classes) for classes in CLASSES.values()], dim=1)
    losses = [
        F.cross_entropy(part, labels[:, index]) * (WEIGHT_OF_GROUND if name == "background" else 1)
        for index, (name, part) in enumerate(zip(CLASSES, parts, strict=True))
    ]
    return sum(losses, start=torch.zeros((), device=scores.device))


def pretrain(recipe: Recipe, state_file: Path) -> Encoder:
    """Train by `recipe`, going on from `state_file` where it fits; returns the encoder in eval mode, in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    model = Pretrainer().to(device).to(memory_format=torch.channels_last).train()
    optimizer = _make_optimizer(model, recipe)
    first = _restore(state_file, recipe, model, optimizer)
    with progress_line(recipe.steps, "pre-training the encoder", "steps") as advance:
        advance(first)
        for step in range(first, recipe.steps):
            _train_step(model, optimizer, recipe, step, device)
            advance(1)
            if (step + 1) % SAVE_EVERY == 0:
                _save_state(state_file, recipe, step + 1, model, optimizer)
    encoder: Encoder = model.encoder.eval().cpu()
    return encoder


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def _train_step(
    model: Pretrainer, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, device: torch.device
) -> None:
    crops = labelled_crops(f"pretrain/{recipe.seed}/{step}", recipe.batch_size, recipe.size)
    with _autocast(device):
        scores = model(_images(crops, device))
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    torch.autograd.backward(pretraining_loss(scores.float(), crops))
    optimizer.step()
    optimizer.zero_grad()


def _images(crops: LabelledCrops, device: torch.device) -> Tensor:
    pixels = torch.from_numpy(crops.pixels).permute(0, 3, 1, 2).to(device)
    return normalise(pixels).contiguous(memory_format=torch.channels_last)


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the processor computes in it; elsewhere it would only be slower."""
    fast = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def _save_state(path: Path, recipe: Recipe, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"recipe": recipe.digest(), "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with files.replacing(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Steps already done by an interrupted run of the same recipe; 0 where there was none."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != recipe.digest():
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step: int = state["step"]
    return step


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
    state_file = out.with_name(out.name + ".unfinished")
    encoder = pretrain(recipe, state_file)
    settings = json.dumps(asdict(recipe), sort_keys=True)
    metadata = {"description": DESCRIPTION, "recipe": recipe.digest(), "settings": settings}
    with files.replacing(out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, temporary, metadata)
    state_file.unlink(missing_ok=True)
    return True


def main(
    out: Annotated[Path, typer.Option(help="weights file to write (safetensors, torchvision's names)")],
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = Recipe.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="crops per step")] = Recipe.batch_size,
    size: Annotated[int, typer.Option(min=32, help="side of the crops in pixels")] = Recipe.size,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="peak rate of AdamW")] = Recipe.learning_rate,
    seed: Annotated[int, typer.Option(help="seeds weights and pictures")] = Recipe.seed,
) -> None:
    """Train a ResNet-50 on rendered objects and write it without its heads; a second run keeps a whole file."""
    recipe = Recipe(steps=steps, batch_size=batch_size, size=size, learning_rate=learning_rate, seed=seed)
    trained = make_encoder(out, recipe)
    print(f"{out}: {DESCRIPTION}; {'trained now' if trained else 'reused'}")


if __name__ == "__main__":
    run(main)
