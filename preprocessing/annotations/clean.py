"""Captions are cleaned here, once, because characters that look harmless (U+2028, \\r, NUL, half a surrogate pair)
later shift or break the tools that score captions. What is cleaned, cut or dropped is counted in the notes.
"""

import html
import re
import unicodedata
from collections import Counter

from sat.text import normalise

MAX_CHARACTERS = 100_000
"""Characters kept of a caption, at the end of a word where there is one: a longer text is a file that went astray.

How many words are learnt is the training's own setting (`data.max_caption_length`); a reference is scored whole."""
RULES = 2
"""Version of the rules by which annotations become records; part of the fingerprint."""
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ENTITIES_IN_ENTITIES = 3
"""Times that entities are replaced: texts are escaped again by every program they went through."""
_DROPPED = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Unicode categories that become a space: controls, lone surrogates, line and paragraph separators."""


def clean_caption(raw: str, notes: Counter[str] | None = None) -> str:
    """The caption in NFC on one line with single spaces; empty when it has no letter or digit.

    HTML entities become what they stand for; `|||`, which separates captions in the METEOR protocol, becomes a space.
    """
    notes = Counter() if notes is None else notes
    unescaped = _unescape(raw)
    plain = unescaped.replace("|||", " ")
    if not plain.isprintable():
        plain = "".join(" " if unicodedata.category(char) in _DROPPED else char for char in plain)
    whole = text = " ".join(unicodedata.normalize("NFC", plain).split())
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS].rpartition(" ")[0] or text[:MAX_CHARACTERS]
    if not any(map(str.isalnum, text)) and not normalise(text):  # the first is enough for nearly all, and fast
        notes["captions dropped: no letter or digit"] += 1
        return ""
    if len(text) < len(whole):
        notes["captions cut"] += 1
    elif unescaped != raw:
        notes["captions with HTML entities, unescaped"] += 1
    elif text != raw.strip():
        notes["captions cleaned"] += 1
    return text


def _unescape(text: str) -> str:
    if "&" not in text:
        return text
    for _ in range(_ENTITIES_IN_ENTITIES):
        before, text = text, _ENTITY.sub(lambda match: html.unescape(match[0]), text)
        if text == before:
            break
    return text
