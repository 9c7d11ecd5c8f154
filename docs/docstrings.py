"""Makes Markdown of the docstrings that the reference shows: columns become lists, and examples become code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

FIELDS = re.compile(r"(?:^[a-z_]+(?:, [a-z_]+)*  +\S.*\n?(?:^ +\S.*\n?)*)+", re.MULTILINE)
EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^\S.*\n?)*)+", re.MULTILINE)
FIELD = re.compile(r"^([a-z_]+(?:, [a-z_]+)*)  +", re.MULTILINE)


class DocstringMarkdown(Extension):
    """Rewrites docstrings as they are collected."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """Return a docstring with its columns of names and texts as definition lists, and its examples in fences."""
    text = FIELDS.sub(_definitions, docstring.expandtabs())
    return EXAMPLE.sub(lambda match: f"```python\n{match[0].rstrip()}\n```\n", text)


def _definitions(match: re.Match[str]) -> str:
    """Turn ``name   text`` into a term and its definition; continued lines are indented."""
    terms = []
    for part in re.split(r"^(?=[a-z_])", match[0], flags=re.MULTILINE):
        if match := FIELD.match(part):
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            terms.append(f"{names}\n:   {' '.join(part[match.end() :].split())}\n")
    return "\n" + "\n".join(terms) + "\n"
