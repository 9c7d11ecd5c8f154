"""Two lanes of tests: those that build bundles or plans or start servers, marked ``build``, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

BUILDERS = {
    ("dyexport.pipeline.build", "build_bundle"),
    ("dyexport.pipeline.build", "opened"),
    ("dyexport.pipeline.api", "build"),
    ("dyexport.exporters.tensorrt_plan", "build_plan"),
}
"""Functions of the package that take seconds; a test that can reach one belongs to the lane of builds."""
BUILT_FIXTURES = {"sit_tiny"}
"""Fixtures that import a builder as they run."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reached: dict[Any, bool] = {}
    for item in items:
        if _marked(item) or _reaches(item, reached):
            item.add_marker("build")


def _marked(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) is not None for name in ("tensorrt", "triton"))


def _reaches(item: pytest.Item, reached: dict[Any, bool]) -> bool:
    if not isinstance(item, pytest.Function):
        return False
    if BUILT_FIXTURES & set(item.fixturenames):
        return True
    fixtures = (fixture for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures)
    return builds(item.function, reached) or any(builds(fixture.func, reached) for fixture in fixtures)


def builds(function: Any, reached: dict[Any, bool] | None = None) -> bool:
    """Tell whether a function of the tests names a builder, itself or through other functions of the tests."""
    reached = {} if reached is None else reached
    function = getattr(function, "__wrapped__", function)
    if (getattr(function, "__module__", None), getattr(function, "__name__", None)) in BUILDERS:
        return True
    if not isinstance(function, FunctionType) or not function.__module__.startswith("tests."):
        return False
    if function not in reached:
        reached[function] = False  # of functions that call each other, the first decides
        reached[function] = any(builds(value, reached) for value in _named(function))
    return reached[function]


def _named(function: FunctionType) -> Iterator[Any]:
    """Yield what the names in a function's code stand for: globals only."""
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
