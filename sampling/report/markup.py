"""HTML from the templates beside this file; what comes from a sweep is escaped in all of it."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


def breakable(text: object) -> Markup:
    """Text in which a line may break before a schedule's moves, or after a comma in brackets."""
    return escape(text).replace("+", Markup("<wbr/>+")).replace(",", Markup(",<wbr/>"))


def code(text: object) -> Markup:
    """Text as a name: of a schedule, an example or a file."""
    return Markup("<code>{}</code>").format(breakable(text))


def render(template: str, **values: object) -> str:
    """A template with these values."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "code": code}
    return environment.get_template(template).render(values)
