"""A sample as a piece of a tar: its data members, then its .json member; no clock, user or machine in it."""

import json
import tarfile
from collections.abc import Mapping, Sequence

TAR_BLOCK = 512
END_OF_TAR = bytes(2 * TAR_BLOCK)
"""What follows the last member."""


def sample_bytes(
    key: str,
    data: Mapping[str, bytes],
    *,
    image_id: str | int,
    file_name: str,
    captions: Sequence[str],
    width: int,
    height: int,
    **more: str,
) -> bytes:
    """The members KEY.EXTENSION of `data`, by extension, and KEY.json of the rest, with headers and padding.

    `more`: what there is to say of the data.
    """
    about = {"image_id": image_id, "file_name": file_name, "captions": list(captions), "width": width, "height": height}
    about |= more
    text = json.dumps(about, ensure_ascii=False, sort_keys=True).encode()
    parts: list[bytes] = []
    for suffix, content in (*data.items(), ("json", text)):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size, member.mode, member.mtime = len(content), 0o644, 0
        parts += [member.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % TAR_BLOCK)]
    return b"".join(parts)


def name_in(header: bytes | memoryview) -> bytes:
    """The name that a tar header gives to its member."""
    return bytes(header[:100]).partition(b"\0")[0]


def size_in(header: bytes | memoryview) -> int | None:
    """The size that a tar header gives to its member; None where it is no number."""
    digits = bytes(header[124:135])
    return int(digits, 8) if digits.isdigit() else None


def content_of(member: memoryview) -> bytes:
    """What a member holds that begins with its header; nothing where that gives no size."""
    return bytes(member[TAR_BLOCK : TAR_BLOCK + (size_in(member) or 0)])


def read_members(blob: bytes | memoryview, where: str) -> dict[str, bytes]:
    """Members of a sample by extension, from its bytes in the tar. Raises ValueError naming `where` on anything odd."""
    members: dict[str, bytes] = {}
    position, end = 0, len(blob)
    while position < end:
        try:
            member = tarfile.TarInfo.frombuf(bytes(blob[position : position + TAR_BLOCK]), "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: damaged tar header ({error})") from None
        start = position + TAR_BLOCK
        position = start + member.size + -member.size % TAR_BLOCK
        if not member.isreg() or position > end:
            raise ValueError(f"{where}: member {member.name!r} is no plain file inside the sample")
        members[member.name.partition(".")[2]] = bytes(blob[start : start + member.size])
    return members
