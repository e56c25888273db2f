"""Documents that carry their own checksum: canonical JSON, in which any changed bit can be seen.

The checksum is a line of its own, so a document is checked by hashing the file without that line: nothing is written
again to be compared.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_CHECKSUM = "checksum"
_LINE = re.compile(rb'(,?)\n "checksum": "([0-9a-f]{64})"(,?)\n')
"""Of the outermost object, whose entries alone stand behind one space."""


class Damaged(ValueError):
    """A file that is not as it was written; over a network it is asked for again, because an answer can be cut."""


def seal(document: Mapping[str, Any]) -> bytes:
    """Canonical JSON of the document with its own sha256 inside: any change of the file can be seen."""
    body = canonical(document)
    line = f' "{_CHECKSUM}": "{hashlib.sha256(body).hexdigest()}"'.encode()
    after = min((name for name in document if name > _CHECKSUM), default=None)
    if after is not None:
        place = body.index(f"\n {json.dumps(after)}: ".encode())
        return body[:place] + b"\n" + line + b"," + body[place:]
    return (body[:-3] + b"," if document else b"{") + b"\n" + line + b"\n}\n"


def unseal(blob: bytes) -> dict[str, Any]:
    """The document in a sealed file; Damaged (a ValueError) when one bit differs from what `seal` wrote."""
    try:
        document = json.loads(blob)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if not isinstance(document, dict) or _CHECKSUM not in document:
        raise Damaged("it has no checksum")
    checksum = document.pop(_CHECKSUM)
    if checksum != _checksum_of(blob):
        raise Damaged("its checksum does not fit")
    return document


def _checksum_of(blob: bytes) -> str:
    """sha256, hex, of a sealed file without its line of the checksum; empty where that is not where `seal` puts it."""
    line = _LINE.search(blob)
    if line is None:
        return ""
    begin, end = line.span()
    before, after = line.group(1, 3)
    between = (before + b"\n" if after else b"\n") if before or after else b""  # alone: an object without entries
    return hashlib.sha256(blob[:begin] + between + blob[end:]).hexdigest()


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one way to write a document as JSON: digests are taken of these bytes."""
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()
