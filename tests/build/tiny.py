"""The smallest model that has everything: two blocks, four heads, 16 tokens. As a script: dyexport that knows it."""

from __future__ import annotations

from dataclasses import replace

from dyexport.cli import main
from dyexport.presets import PRESETS

TINY = replace(PRESETS["sit-digits"], name="sit-tiny", depth=2, hidden_size=48, heads=4, sample_size=4)
PRESETS[TINY.name] = TINY

if __name__ == "__main__":
    main()
