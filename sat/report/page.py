"""HTML of our pages: one style, every word escaped, nothing loaded from anywhere."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: object) -> str:
    """A template of `templates/` with these values. What is not marked as HTML is escaped, none may be missing."""
    text: str = _environment().get_template(template).render(**values)
    return text


def script_policy(script: str) -> str:
    """The Content-Security-Policy of a page that loads nothing and runs this script of `templates/` alone."""
    digest = base64.b64encode(hashlib.sha256((TEMPLATES / script).read_bytes()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _html(text: str) -> Any:
    """A file of ours, which is no text to be escaped."""
    from markupsafe import Markup

    return Markup(text)


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["inline"] = lambda name: _html((TEMPLATES / name).read_text())
    environment.filters["number"] = lambda value, digits=3: "-" if value is None else f"{value:.{digits}f}"
    return environment
