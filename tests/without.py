"""As a script: dyexport on a machine that lacks some libraries. usage: python -m tests.without A,B,... COMMAND..."""

from __future__ import annotations

import sys
from typing import Any

from dyexport.cli import main


class Without:
    """A finder of modules that does not find some libraries."""

    def __init__(self, finder: Any, libraries: frozenset[str]) -> None:
        self.finder = finder
        self.libraries = libraries

    def find_spec(self, name: str, *arguments: Any) -> Any:
        return None if name.partition(".")[0] in self.libraries else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


if __name__ == "__main__":
    absent = frozenset(sys.argv[1].split(","))
    assert not absent & sys.modules.keys(), "imported before it was hidden"
    sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]
    sys.argv = ["dyexport", *sys.argv[2:]]
    main()
