"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

from importlib.util import find_spec

from dyexport.errors import MissingDependencyError
from dyexport.report.contents import Report
from dyexport.report.width_map import RAMP

TEMPLATE, STYLE = "report.html.j2", "report.css"


def check_libraries() -> None:
    """Raise ``MissingDependencyError`` unless the extra ``report`` is installed."""
    for name in ("matplotlib", "jinja2"):
        if find_spec(name) is None:
            raise MissingDependencyError(name, "report")


def render(report: Report) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dyexport.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, _, _ = environment.loader.get_source(environment, STYLE)  # type: ignore[union-attr]
    colors = [f"rgb({red} {green} {blue})" for red, green, blue in RAMP]
    return environment.get_template(TEMPLATE).render(report=report, style=style, ramp=colors)
