"""Bring an encoder's ImageNet (or CLIP) weights to this machine, once, where there is internet (a login node).

    python -m preprocessing.fetch_weights resnet50
    python -m preprocessing.fetch_weights timm/vit_base_patch32_clip_224 --out weights/clip.safetensors

Each download is compared with a digest that was there before it: the one in the file's name (torchvision's, and timm's
on GitHub), else the SHA-256 that Hugging Face records for the file. `timm/tf_efficientnet_lite0` and `_lite2` need no
internet: they are converted from installed packages, whose digests stand in `features.lite`.

The surprising decision: of ResNet's weights the default is the first set (V1), not the more accurate V2. V2's training
recipe (label smoothing, mixup, long schedule) raises ImageNet accuracy and lowers the use of frozen features (Kornblith
et al. 2021, arXiv:2010.16402).
"""

import re
import socket
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from preprocessing.console import run
from preprocessing.features.lite import FAMILY, convert_lite
from preprocessing.features.weights import WEIGHTS_DIR, default_file, find_weights
from sat import files
from sat.model.encoders.weights import LITES, RESNETS, TIMM, AboutWeights, Pixels, refuse_unknown

URLS = {
    ("resnet50", "v1"): "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    ("resnet50", "v2"): "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
    ("resnet101", "v1"): "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    ("resnet101", "v2"): "https://download.pytorch.org/models/resnet101-cd907fc2.pth",
    ("resnet152", "v1"): "https://download.pytorch.org/models/resnet152-394f9c45.pth",
    ("resnet152", "v2"): "https://download.pytorch.org/models/resnet152-f82ba261.pth",
}
"""torchvision's files; the digits in a name are the beginning of the file's sha256."""
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Origin:
    """A file to download, and the beginning of the SHA-256 it has to have."""

    url: str
    name: str
    sha256: str


def main(
    name: Annotated[str, typer.Argument(help="resnet50, resnet101, resnet152, or timm/NAME")] = RESNETS[0],
    out: Annotated[Path | None, typer.Option(help="safetensors file to write; default: weights/NAME")] = None,
    version: Annotated[str, typer.Option(help="v1 or v2 of torchvision's weights")] = "v1",
    file: Annotated[Path | None, typer.Option(help="a file downloaded by other means, under its original name")] = None,
) -> None:
    """Fetch, verify and convert the weights; a sound file that is there already is kept."""
    refuse_unknown(name)
    target = out or WEIGHTS_DIR / default_file(name)
    if name in RESNETS and (name, version) not in URLS:
        raise ValueError(f"version {version!r} is unknown; choose one of v1, v2")
    if target.exists():
        print(f"{find_weights(str(target))} is there already and sound")
        return
    if name in LITES.values() and file is None:
        convert_lite(next(lite for lite in FAMILY.values() if LITES[lite.name] == name), target)
    elif file is not None:
        convert(file, _origin_of_file(name, file), name, target)
    else:
        _download(origin_of(name, version), name, target)
    print(f"{target}: {target.stat().st_size / 1e6:.0f} MB, verified")


def origin_of(name: str, version: str = "v1") -> Origin:
    """Where an encoder's weights are to be had, with the digest recorded there. ValueError where there are none."""
    if name in RESNETS:
        url = URLS[name, version]
        return Origin(url, url.rpartition("/")[2], promised_digest(url))
    from sat.model.encoders.timm_network import where_published

    url, hub_id, hub_file = where_published(name)
    if hub_id:
        return _hub_origin(hub_id, hub_file or "model.safetensors")
    if not url:
        raise ValueError(f"timm publishes no weights of {name.removeprefix(TIMM)}; choose another backbone")
    return Origin(url, url.rpartition("/")[2], promised_digest(url))


def promised_digest(name: str) -> str:
    """The beginning of the sha256 that a name like `resnet50-0676ba61.pth` promises. Raises ValueError without one."""
    match = re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$", name)
    if match is None:
        raise ValueError(f"{name}: the name does not end in -DIGEST.pth, so nothing can be verified")
    return match[1]


def convert(source: Path, origin: Origin, name: str, out: Path) -> None:
    """Check a downloaded file against its digest and write it as safetensors, whole or not at all.

    Nothing in the file is executed. Raises ValueError when the digest is another.
    """
    found = files.sha256(source)
    if not found.startswith(origin.sha256):
        raise ValueError(
            f"{source} has sha256 {found[:16]}..., expected {origin.sha256}...: damaged or another file; not used"
        )
    from preprocessing.features.writing import write_weights

    if name in RESNETS:
        import torch

        tensors = torch.load(source, map_location="cpu", weights_only=True)
        about = AboutWeights(name, Pixels(), f"{origin.name}: {name} trained on ImageNet (torchvision)")
    else:
        from sat.model.encoders.timm_network import own_pixels, read_published

        tensors = read_published(name, source)
        about = AboutWeights(name, own_pixels(name), f"{origin.url or origin.name}: {name} (timm)")
    write_weights(tensors, out, about, found)
    if name not in RESNETS and (centres := _centres(out)):
        write_weights(tensors, out, replace(about, centres=centres), found)


def _centres(weights: Path) -> dict[int, float]:
    """Where the cells of each stage look, measured for networks with one-sided padding; else none."""
    from sat.model.encoders.geometry import measure_centre, pads_one_side
    from sat.model.encoders.table import load_encoder

    encoder = load_encoder(weights)
    if not pads_one_side(encoder):
        return {}
    return {stage: measure_centre(load_encoder(weights, stage=stage)) for stage in (0, *encoder.stages)}


def _origin_of_file(name: str, file: Path) -> Origin:
    """Of a file that the user brought: its name promises a digest, or Hugging Face's is asked."""
    if re.search(r"-[0-9a-f]{8,64}\.\w+$", file.name) or name in RESNETS:
        return Origin("", file.name, promised_digest(file.name))
    return origin_of(name)


def _hub_origin(hub_id: str, hub_file: str) -> Origin:
    """A file on Hugging Face with the SHA-256 that is recorded there: its ETag, as for every large file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(hub_id, hub_file)
    try:
        digest = get_hf_file_metadata(url, timeout=_TIMEOUT_SECONDS).etag or ""
    except Exception as error:  # the hub's own and its HTTP library's exceptions share no useful base class
        raise ValueError(f"{url} cannot be asked ({error}); fetch it on a machine with internet") from None
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{url} has no recorded SHA-256, so nothing can be verified; not used")
    return Origin(url, hub_file, digest)


def _download(origin: Origin, name: str, out: Path) -> None:
    from torch.hub import download_url_to_file

    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        fetched = Path(folder) / origin.name
        try:
            download_url_to_file(origin.url, str(fetched), hash_prefix=origin.sha256)
        except OSError as error:
            raise ValueError(
                f"{origin.url} cannot be fetched ({error}); fetch it on a machine with internet and pass it "
                f"with --file {origin.name}"
            ) from None
        except RuntimeError as error:  # torch.hub's word for a wrong digest
            raise ValueError(f"{origin.url}: {error}; not used") from None
        convert(fetched, origin, name, out)


if __name__ == "__main__":
    run(main)
