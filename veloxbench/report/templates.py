"""Pages whose prose stands in a template beside the code: figures are filled in, none is typed there."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def filled(package: str, template: str, **facts: Any) -> str:
    """A template of a package's ``templates`` folder; the facts of an HTML page are escaped.

    Templates format figures as Python does: ``{{ format(share, ".1%") }}``.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=template.endswith(".md.j2"),
    )
    return environment.get_template(template).render(format=format, **facts)
