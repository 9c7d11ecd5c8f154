"""Strict parsing of the command line: no argument is dropped, and none that has no effect is accepted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from dyexport.arguments import shown
from dyexport.errors import UsageError

MAY_BE_EMPTY = {"prompt"}  # an empty prompt asks for any picture


class ExplicitOptions:
    """Options that are on the command line, without those at their defaults."""

    def __init__(self, context: typer.Context) -> None:
        self._context = context

    def __contains__(self, name: str) -> bool:
        source = self._context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    def values(self) -> Mapping[str, Any]:
        """Return the values by the names of the parameters."""
        return {name: value for name, value in self._context.params.items() if name in self}

    def refuse(self, useless: bool, because: str, *names: str) -> None:
        """Raise ``UsageError`` for the first of these parameters that is given, if they are ``useless``."""
        for name in names:
            if useless and name in self:
                option = next(param for param in self._context.command.params if param.name == name)
                raise UsageError(f"{written(option)} does nothing here: {because}; leave it out")


class StrictCommand(TyperCommand):
    """A command that refuses empty values and options given twice, of which the parser would keep the last.

    A value that the parser refuses is named with its cure: the closest of the choices, or a number.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(order).items():
            flag_or_list = getattr(parameter, "is_flag", False) or getattr(parameter, "multiple", False)
            if times > 1 and parameter.param_type_name == "option" and not flag_or_list:
                raise UsageError(f"{written(parameter)} is given {times} times; give it once")
            value = values.get(parameter.name)
            if parameter.name not in MAY_BE_EMPTY and (value == "" or (isinstance(value, list) and "" in value)):
                raise UsageError(f"{written(parameter)} is empty; give a value, or leave it out")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if isinstance(value := values.get(getattr(error.param, "name", "")), str):
                cure = _cure(value, error.message)
                raise UsageError(f"{written(error.param)} is {shown(value)!r}; {cure}") from error
            raise


def _cure(value: str, message: str) -> str:
    """Return what to give instead of a value that the parser refuses with ``message``."""
    if choices := re.findall(r"'([^']*)'", message.partition(" is not one of ")[2]):
        close = get_close_matches(value.lower(), choices, n=1)
        return f"did you mean {close[0]!r}?" if close else f"use {', '.join(choices[:-1])} or {choices[-1]}"
    if "integer" in message:
        return "give a whole number"
    return "give a number" if "number" in message or "float" in message else message


def written(parameter: Any) -> str:
    """Return a parameter as a caller writes it: ``--compute-capability``."""
    return str(max(parameter.opts, key=len))


def epilog(examples: Sequence[str]) -> str:
    """Return the examples at the end of a command's help."""
    return "\n\n".join(("Examples:", "\n".join(f"  {escape(example)}" for example in examples)))
