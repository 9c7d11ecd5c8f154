"""Two lanes of tests: those that train, export, build or start servers, marked ``build``, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

import dyexport

BUILDERS = {
    ("dyexport.pipeline.build", "build_bundle"),
    ("dyexport.pipeline.build", "opened"),
    ("dyexport.pipeline.api", "build"),
    ("dyexport.demo", "run_demo"),
    ("tests.built", "built_once"),
    ("dyexport.training.finetuning", "finetune"),
    ("dyexport.training.trainer", "train_static"),
    ("dyexport.compilation.api", "compile_bundle"),
    ("dyexport.compilation.api", "compile_engines"),
    ("dyexport.exporters.onnx_graph", "export_onnx"),
    ("dyexport.exporters.torch_package", "build_package"),
    ("dyexport.exporters.torch_package", "compile_program"),
    ("dyexport.exporters.torch_program", "build_program"),
    ("dyexport.exporters.exported_program", "export_program"),
    ("dyexport.exporters.tensorrt_plan", "build_plan"),
}
"""Functions that take seconds; a test that can reach one belongs to the lane of builds."""


COLLECTED = pytest.StashKey[list[pytest.Item]]()
"""All tests of a run, before ``-m`` selects."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = [*items]
    reached: dict[Any, bool] = {}
    for item in items:
        if _marked(item) or _reaches(item, reached):
            item.add_marker("build")


def _marked(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) is not None for name in ("tensorrt", "triton"))


def _reaches(item: pytest.Item, reached: dict[Any, bool]) -> bool:
    if not isinstance(item, pytest.Function):
        return False
    return builds(item.function, reached) or any(builds(fixture.func, reached) for fixture in _fixtures(item))


def _fixtures(item: pytest.Function) -> Iterator[pytest.FixtureDef[Any]]:
    """Yield the fixtures that a test names, and those whose names are parameters, for ``request.getfixturevalue``."""
    for fixtures in item._fixtureinfo.name2fixturedefs.values():
        yield from fixtures
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = [name for name in parameters if isinstance(name, str)] if "request" in item.fixturenames else []
    followed: set[str] = set()
    while names:
        name = names.pop()
        if name not in followed:
            followed.add(name)
            for fixture in item.session._fixturemanager.getfixturedefs(name, item) or ():
                yield fixture
                names += fixture.argnames


def builds(function: Any, reached: dict[Any, bool] | None = None) -> bool:
    """Tell whether a function of the tests names a builder, itself or through functions and classes of the tests."""
    reached = {} if reached is None else reached
    function = getattr(function, "__wrapped__", function)
    if (getattr(function, "__module__", None), getattr(function, "__name__", None)) in BUILDERS:
        return True
    if isinstance(function, type) and function.__module__.startswith("tests."):
        return any(builds(value, reached) for value in vars(function).values() if isinstance(value, FunctionType))
    if not isinstance(function, FunctionType) or not function.__module__.startswith("tests."):
        return False
    if function not in reached:
        reached[function] = False  # of functions that call each other, the first decides
        reached[function] = any(builds(value, reached) for value in _named(function))
    return reached[function]


def _named(function: FunctionType) -> Iterator[Any]:
    """Yield what the names in a function's code stand for: globals, and the library's ``build``."""
    for code in _codes(function.__code__):
        if "build" in code.co_names and any(function.__globals__.get(name) is dyexport for name in code.co_names):
            yield dyexport.build
        for name in code.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
