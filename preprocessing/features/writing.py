"""Write encoder weights: a safetensors file that says what it is and carries a digest of its own tensors.

The surprising decision: its header is written here, sorted. safetensors itself gives metadata another order in every
process, and a model knows its encoder by the digest of the whole file: the same weights have to give the same file.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sat import files
from sat.model.encoders.weights import CONTENT_KEY, AboutWeights, content_digest, read_header

ALIGNMENT = 8
"""The tensors begin at a multiple of so many bytes."""


def write_weights(tensors: Mapping[str, Tensor], out: Path, about: AboutWeights, source_sha256: str) -> None:
    """Write the file whole or not at all, readable by the umask; `source_sha256` is of what it was made from."""
    with files.replacing(out) as temporary:
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        metadata = about.to_metadata() | {"source_sha256": source_sha256, CONTENT_KEY: content_digest(temporary)}
        header, offset = read_header(temporary)
        data = temporary.read_bytes()[offset:]
        text = json.dumps({"__metadata__": metadata} | header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + data)
