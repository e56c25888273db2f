"""Find encoder weights and trust them only with a digest; imports no torch, so that a missing file is told at once.

The surprising decision: ImageNet weights carry, in their own metadata, a digest of their tensors. A file damaged in the
cache is refused when it is used, not only when it was fetched.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from sat import files

IMAGENET_FILE = "resnet50-imagenet.safetensors"
WEIGHTS_DIR = Path("weights")
CONTENT_KEY = "content_sha256"
"""Metadata entry with `content_digest` of the file."""


def find_weights(weights: str, weights_dir: Path = WEIGHTS_DIR) -> Path:
    """`imagenet` or a path -> the file. Raises ValueError, with the command to run, for a missing or damaged one."""
    imagenet = weights == "imagenet"
    path = weights_dir / IMAGENET_FILE if imagenet else Path(weights)
    if not path.is_file():
        command = (
            f"python -m preprocessing.fetch_weights --out {path}"
            if imagenet
            else f"python -m preprocessing.pretrain_encoder --out {path}"
        )
        raise ValueError(f"encoder weights {path} do not exist; make them where there is internet: {command}")
    _check_content(path, required=imagenet)
    return path


def check_planned(path: Path, sha256: str) -> None:
    """ValueError unless this is the file, by its digest, that a plan was made with."""
    if files.sha256(find_weights(str(path))) != sha256:
        raise ValueError(f"encoder weights {path}: not the file the features were planned with ({sha256[:12]})")


def content_digest(path: Path) -> str:
    """sha256 of a safetensors file but for its metadata: names, types and places of the tensors, their bytes; hex."""
    header, offset = _read_header(path)
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    with open(path, "rb") as file:
        file.seek(offset)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header, offset of the tensors) of a safetensors file; ValueError when it is none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(100 << 20, path.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        return header, 8 + length
    except ValueError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _check_content(path: Path, required: bool) -> None:
    recorded = _read_header(path)[0].get("__metadata__", {}).get(CONTENT_KEY)
    if recorded is None and not required:
        return
    if recorded is None or content_digest(path) != recorded:
        found = "has no digest" if recorded is None else "is damaged: its tensors do not have the recorded digest"
        raise ValueError(
            f"encoder weights {path}: the file {found}; delete it and run "
            f"python -m preprocessing.fetch_weights --out {path}"
        )
