"""Documents that carry their own checksum: canonical JSON, in which any changed bit can be seen."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


class Damaged(ValueError):
    """A file that is not as it was written; over a network it is asked for again, because an answer can be cut."""


def seal(document: Mapping[str, Any]) -> bytes:
    """Canonical JSON of the document with its own sha256 inside: any change of the file can be seen."""
    checksum = hashlib.sha256(canonical(document)).hexdigest()
    return canonical({**document, "checksum": checksum})


def unseal(blob: bytes) -> dict[str, Any]:
    """The document in a sealed file; Damaged (a ValueError) when one bit differs from what `seal` wrote."""
    try:
        document = json.loads(blob)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if not isinstance(document, dict) or "checksum" not in document:
        raise Damaged("it has no checksum")
    document.pop("checksum")
    if seal(document) != blob:
        raise Damaged("its checksum does not fit")
    return document


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one way to write a document as JSON: digests are taken of these bytes."""
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()
