"""What may be a password, a token or a signature in a URL is shown to nobody."""

import re
from typing import Any

SECRETS = re.compile(r"(//)[^/@\s]*@|([?&][^=&\s'\"]+=)[^&\s'\"),]+")
"""In a URL: the name and password before the host, and the values of its query, which may be a signature."""


def shown(text: str) -> str:
    """The URL, or the text with URLs in it, without what may be a credential."""
    return SECRETS.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", text)


def masked(value: Any) -> Any:
    """A setting, or lists and dictionaries of them, with every text `shown`."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {name: masked(each) for name, each in value.items()}
    return [masked(each) for each in value] if isinstance(value, list) else value
