"""Options as the caller gave them: none is dropped, and none that would do nothing is accepted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand

from dyexport.errors import UsageError

MAY_BE_EMPTY = {"prompt"}  # which then asks for any picture


class Given:
    """Options that were given on the command line, without defaults."""

    def __init__(self, context: typer.Context) -> None:
        self._context = context

    def __contains__(self, name: str) -> bool:
        source = self._context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    def refuse(self, useless: bool, because: str, *names: str) -> None:
        """Raises ``UsageError`` for the first of these parameters that was given, where they are ``useless``."""
        for name in names:
            if useless and name in self:
                option = next(each for each in self._context.command.params if each.name == name)
                raise UsageError(f"{written(option)} does nothing here: {because}; leave it out")


class OnceEach(TyperCommand):
    """A command that refuses an option given twice, of which the parser would keep the last, and an empty one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(order).items():
            flag_or_list = getattr(parameter, "is_flag", False) or getattr(parameter, "multiple", False)
            if times > 1 and parameter.param_type_name == "option" and not flag_or_list:
                raise UsageError(f"{written(parameter)} is given {times} times; give it once")
            value = values.get(parameter.name)
            if parameter.name not in MAY_BE_EMPTY and (value == "" or (isinstance(value, list) and "" in value)):
                raise UsageError(f"{written(parameter)} is empty; give a value, or leave it out")
        return super().parse_args(ctx, args)


def written(parameter: Any) -> str:
    """``compute_capability`` as a caller writes it: ``--compute-capability``."""
    return str(max(parameter.opts, key=len))
