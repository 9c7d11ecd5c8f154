"""Base of engines over files that were built for one GPU, whose description can be read without that GPU."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from dyexport.bundle.plan_info import PlanInfo
from dyexport.engines.base import Engine, EngineIO, WeightSpan
from dyexport.engines.tensorrt_fit import plan_info


class PlanEngine(Engine):
    """An engine over a built file at ``path`` that includes its weights."""

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
