"""Bring torchvision's ResNet-50 ImageNet weights to this machine, once, where there is internet (a login node).

    python -m preprocessing.fetch_weights --out weights/resnet50-imagenet.safetensors

The surprising decision: the default is the first set of weights (V1), not the more accurate V2. V2's training recipe
(label smoothing, mixup, long schedule) raises ImageNet accuracy and lowers the use of frozen features (Kornblith et al.
2021, arXiv:2010.16402).
"""

import re
import socket
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from preprocessing.console import run
from preprocessing.features.weights import CONTENT_KEY, IMAGENET_FILE, WEIGHTS_DIR, content_digest, find_weights
from sat import files

URLS = {
    "v1": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "v2": "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
}
"""torchvision's files; the digits in a name are the beginning of the file's sha256."""
_TIMEOUT_SECONDS = 30


def expected_digest(name: str) -> str:
    """The beginning of the sha256 that a name like `resnet50-0676ba61.pth` promises. Raises ValueError without one."""
    match = re.search(r"-([0-9a-f]{8,64})\.pth$", name)
    if match is None:
        raise ValueError(f"{name}: the name does not end in -DIGEST.pth, so nothing can be verified")
    return match[1]


def convert(source: Path, name: str, out: Path) -> None:
    """Check a downloaded .pth against the digest in `name` and write it as safetensors, whole or not at all.

    Nothing in the file is executed. Raises ValueError when the digest is another.
    """
    import torch
    from safetensors.torch import save_file

    expected, found = expected_digest(name), files.sha256(source)
    if not found.startswith(expected):
        raise ValueError(
            f"{source} has sha256 {found[:16]}..., expected {expected}...: damaged or another file; not used"
        )
    tensors = {
        key: value.contiguous() for key, value in torch.load(source, map_location="cpu", weights_only=True).items()
    }
    about = {"source": name, "source_sha256": found, "description": "ResNet-50 trained on ImageNet (torchvision)"}
    with files.replacing(out) as temporary:
        save_file(tensors, temporary)
        save_file(tensors, temporary, metadata=about | {CONTENT_KEY: content_digest(temporary)})


def main(
    out: Annotated[Path, typer.Option(help="safetensors file to write")] = WEIGHTS_DIR / IMAGENET_FILE,
    version: Annotated[str, typer.Option(help="v1 or v2 of torchvision's weights")] = "v1",
    file: Annotated[Path | None, typer.Option(help="a .pth downloaded by other means, under its original name")] = None,
) -> None:
    """Fetch, verify and convert the weights; a sound file that is there already is kept."""
    if version not in URLS:
        raise ValueError(f"version {version!r} is unknown; choose one of {', '.join(URLS)}")
    if out.exists():
        print(f"{find_weights(str(out))} is there already and sound")
        return
    if file is not None:
        convert(file, file.name, out)
    else:
        _download(URLS[version], out)
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB, verified")


def _download(url: str, out: Path) -> None:
    from torch.hub import download_url_to_file

    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    name = url.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as folder:
        try:
            download_url_to_file(url, f"{folder}/{name}", hash_prefix=expected_digest(name))
        except OSError as error:
            raise ValueError(
                f"{url} cannot be fetched ({error}); fetch it on a machine with internet and pass it with --file {name}"
            ) from None
        except RuntimeError as error:  # torch.hub's word for a wrong digest
            raise ValueError(f"{url}: {error}; not used") from None
        convert(Path(folder) / name, name, out)


if __name__ == "__main__":
    run(main)
