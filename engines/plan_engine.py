"""What an engine knows of a file that was built for one GPU, from the description beside it and without that GPU."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from dyexport.bundle.plan_info import PlanInfo
from dyexport.engines.base import Engine, EngineIO, WeightSpan
from dyexport.engines.tensorrt_fit import plan_info


class PlanEngine(Engine):
    """``path`` is the built file, which holds its own weights."""

    path: Path

    @cached_property
    def info(self) -> PlanInfo:
        return plan_info(self.path)

    @cached_property
    def io(self) -> EngineIO:
        return EngineIO(inputs=self.info.inputs, outputs=self.info.outputs)

    @property
    def weights(self) -> tuple[WeightSpan, ...]:
        return (WeightSpan(path=self.path, offset=0, length=self.path.stat().st_size),)

    @property
    def shares_weights(self) -> bool:
        return False
