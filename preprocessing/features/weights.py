"""Find encoder weights and trust them only with a digest; imports no torch, so that a missing file is told at once.

The surprising decision: weights that were fetched or converted carry, in their own metadata, a digest of their tensors.
A file damaged in the cache is refused when it is used, not only when it was fetched.
"""

from pathlib import Path

from sat import files
from sat.model.encoders.weights import CONTENT_KEY, LITES, TIMM, content_digest, fetch_command, read_header

IMAGENET_FILE = "resnet50-imagenet.safetensors"
WEIGHTS_DIR = Path("weights")


def default_file(architecture: str) -> str:
    """Name of the file that holds the fetched weights of an architecture."""
    return IMAGENET_FILE if architecture == "resnet50" else f"{architecture.removeprefix(TIMM)}.safetensors"


def find_weights(weights: str, weights_dir: Path = WEIGHTS_DIR) -> Path:
    """`imagenet`, `lite0`, `lite2` or a path -> the file; a Lite is made from its package where it is not there.

    Raises ValueError, with the command to run, for a missing or damaged one.
    """
    named = {"imagenet": IMAGENET_FILE} | {name: default_file(architecture) for name, architecture in LITES.items()}
    path = weights_dir / named[weights] if weights in named else Path(weights)
    if weights in LITES and not path.exists():
        from preprocessing.features.lite import FAMILY, convert_lite

        convert_lite(FAMILY[weights], path)
    if not path.is_file():
        raise ValueError(
            f"encoder weights {path} do not exist; make them where there is internet: {fetch_command(path)}"
        )
    _check_content(path, required=weights in named)
    return path


def check_planned(path: Path, sha256: str) -> None:
    """ValueError unless this is the file, by its digest, that a plan was made with."""
    if not path.is_file() or files.sha256(path) != sha256:
        find_weights(str(path))  # says more of one that is missing or damaged
        raise ValueError(f"encoder weights {path}: not the file the features were planned with ({sha256[:12]})")


def _check_content(path: Path, required: bool) -> None:
    recorded = (read_header(path)[0].get("__metadata__") or {}).get(CONTENT_KEY)
    if recorded is None and not required:
        return
    if recorded is None or content_digest(path) != recorded:
        found = "has no digest" if recorded is None else "is damaged: its tensors do not have the recorded digest"
        raise ValueError(f"encoder weights {path}: the file {found}; delete it and run {fetch_command(path)}")
