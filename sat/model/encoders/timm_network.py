"""Any backbone of timm's as a grid encoder: feature maps and patch tokens, cut at a stage.

Stage 0 is what timm's `forward_features` gives; stage n the n-th entry of its `feature_info` (a ViT's n-th block).
Class and register tokens are dropped. Parameters carry timm's names; what the kept features do not need is left out.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sat.model.encoders.encoder import normalise, opened_stages
from sat.model.encoders.geometry import spec_of
from sat.model.encoders.opening import has_gradients, open_parts, run_twice
from sat.model.encoders.weights import INTERPOLATIONS, TIMM, Pixels
from sat.shards.features import EncoderSpec


class TimmNetwork(nn.Module):
    """A backbone without its pooling and classifier; a new one is random and open for training as a whole."""

    def __init__(self, architecture: str, stage: int = 0, pixels: Pixels | None = None) -> None:
        """ValueError for a name that timm does not have, a network without cells, or a stage that does not exist."""
        super().__init__()
        self.architecture, self.stage = architecture, stage
        with torch.device("meta"):
            self._ends = _cut(_network(architecture, num_classes=0), architecture, stage)
            unused = _unused_parts(architecture, stage)
        self.network: Any = _network(architecture, num_classes=0)
        _cut(self.network, architecture, stage)
        for name in unused:
            setattr(self.network, name, nn.Identity())
        self.stages = tuple(range(1, len(self._ends) + 1))
        self.fixed_size = bool(self.network.pretrained_cfg.get("fixed_input_size"))
        self.pixels = pixels or own_pixels(architecture)
        self._frozen_norms: list[nn.BatchNorm2d] = []

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures, float [B, 3, S, S] -> grid [B, L, D] in row-major order of the cells."""
        return _grid(self.network, self.stage, images)

    @cached_property
    def spec(self) -> EncoderSpec:
        """What its features are and where its cells look; see `geometry`."""
        return spec_of(self)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 of the same shape. ValueError for another type."""
        return normalise(images, self.pixels)

    def stage_module(self, stage: int) -> nn.ModuleList:
        """What a stage adds to the one before; the stem belongs to the first, all that follows the last to the last."""
        names = [name for name, _ in _units(self.network, self._ends)]
        first = names.index(self._ends[stage - 2]) + 1 if stage > 1 else 0
        last = len(names) if stage == self.stages[-1] else names.index(self._ends[stage - 1]) + 1
        return nn.ModuleList(module for _, module in list(_units(self.network, self._ends))[first:last])

    def open_for_training(
        self, stages: Sequence[int], freeze_batchnorm: bool = True, checkpointing: bool = False
    ) -> "TimmNetwork":
        """As `GridEncoder.open_for_training`; tokens and positions, which belong to no stage, stay closed."""
        parts = [self.stage_module(stage) for stage in opened_stages(self, stages)]
        self._frozen_norms = open_parts(self, parts, freeze_batchnorm)
        for stage in self.stages:
            for block in _blocks(self.stage_module(stage)):
                block.__dict__.pop("forward", None)
                if checkpointing and has_gradients(block):  # in place of the method, so that no parameter is renamed
                    block.__dict__["forward"] = partial(run_twice, block, MethodType(type(block).forward, block))
        return self.train(self.training)

    def train(self, mode: bool = True) -> "TimmNetwork":
        """As nn.Module.train, but frozen BatchNorms stay in eval mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self


def own_pixels(architecture: str) -> Pixels:
    """What timm's weights of this architecture expect of a picture."""
    with torch.device("meta"):
        config = _network(architecture, num_classes=0).pretrained_cfg
    wanted = config.get("interpolation", INTERPOLATIONS[0])
    interpolation = wanted if wanted in INTERPOLATIONS else INTERPOLATIONS[0]
    return Pixels(tuple(config["mean"]), tuple(config["std"]), interpolation, config["input_size"][-1])


def whole_names(architecture: str) -> frozenset[str]:
    """timm's names of everything in a checkpoint, classifier included."""
    with torch.device("meta"):
        return frozenset(_network(architecture).state_dict())


def _network(architecture: str, **options: Any) -> Any:
    import timm

    name = architecture.removeprefix(TIMM)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ValueError(
            f"timm has no backbone {name!r}{'; it has e.g. ' + ', '.join(near) if near else ''}; "
            "python -c 'import timm; print(timm.list_models())' lists them"
        )
    logging.getLogger("timm").setLevel(logging.WARNING)
    return timm.create_model(name, pretrained=False, **options)


def _cut(network: Any, architecture: str, stage: int) -> list[str]:
    """Leave out of a network what comes after a stage (0: nothing); returns the names of the stages' last parts.

    ValueError for a network or stage without cells.
    """
    ends = [entry["module"] for entry in getattr(network, "feature_info", None) or []]
    if not ends or not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{architecture} gives no stages of cells; choose another backbone")
    if stage not in range(len(ends) + 1):
        raise ValueError(
            f"encoder stage {stage} of {architecture} does not exist; choose one of 1 to {len(ends)}, "
            "or 0 for its last features"
        )
    if stage:
        network.prune_intermediate_layers([stage - 1], prune_norm=True, prune_head=True)
    return ends[: stage or len(ends)]


def _grid(network: Any, stage: int, images: Tensor) -> Tensor:
    if stage:
        (x,) = network.forward_intermediates(
            images, indices=[stage - 1], stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )
    else:
        x = network.forward_features(images)
    if x.ndim == 3:  # [B, tokens, D]
        tokens: Tensor = x[:, getattr(network, "num_prefix_tokens", 0) :]
        return tokens
    if not stage and getattr(network, "output_fmt", "NCHW") == "NHWC":
        x = x.permute(0, 3, 1, 2)
    grid: Tensor = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view where x is channels_last
    return grid


def _unused_parts(architecture: str, stage: int) -> list[str]:
    """Names of the network's children that its features do not need; call it on the meta device."""
    network = _network(architecture, num_classes=0).eval()
    _cut(network, architecture, stage)
    used: set[str] = set()
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: used.add(name.split(".")[0]))
    with torch.no_grad():
        size = network.pretrained_cfg["input_size"][-1]
        _grid(network, stage, torch.empty(1, 3, size, size))
    return [
        name for name, child in network.named_children() if name not in used and any(True for _ in child.parameters())
    ]


def _units(network: nn.Module, ends: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The network's parts in order, split as far as the stages need: (name, module)."""
    inside = {".".join(parts[:depth]) for end in ends for parts in [end.split(".")] for depth in range(1, len(parts))}

    def split(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in inside:
                yield from split(f"{full}.", child)
            else:
                yield full, child

    return split("", network)


def _blocks(stage: nn.ModuleList) -> Iterator[nn.Module]:
    """The parts of a stage that are worth computing twice one by one."""
    for unit in stage:
        blocks = unit if isinstance(unit, nn.Sequential) else getattr(unit, "blocks", None)
        yield from blocks if isinstance(blocks, nn.Sequential) else [unit]


def where_published(architecture: str) -> tuple[str, str, str]:
    """(URL, Hugging Face's repository, file in it) of timm's weights of an architecture; empty where there is none."""
    with torch.device("meta"):
        config = _network(architecture, num_classes=0).pretrained_cfg
    return config.get("url") or "", config.get("hf_hub_id") or "", config.get("hf_hub_filename") or ""


def read_published(architecture: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a file that timm published, under the names of timm's network; nothing in it is executed.

    ValueError for one that does not fit.
    """
    import timm

    name = architecture.removeprefix(TIMM)
    try:
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    except (RuntimeError, KeyError, OSError) as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {str(error).splitlines()[0]}") from None
    tensors: dict[str, Tensor] = network.state_dict()
    return tensors
