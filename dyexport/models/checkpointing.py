"""Gradient checkpointing: a backward pass recomputes each block from its inputs, under the gates of its forward pass.

diffusers calls a function of our choice with every block and its inputs. So one function serves all backbones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyexport.models.gates import BlockGates, GatedPass
from dyexport.models.td_lora import BlockLora


class GatedBlock(NamedTuple):
    """A stock block and what its hooks read."""

    block: nn.Module
    gates: BlockGates
    lora: BlockLora | None


class BlockCheckpoints:
    """Function that diffusers calls in place of a block: it keeps the block's inputs and drops its activations.

    By the time of the backward pass the gates are closed. They are reopened with the masks and the noise of the
    forward pass, so that the gradients are those without checkpointing. With ``stop_early`` a recomputation leaves out
    what no gradient needs.
    """

    def __init__(self, blocks: Sequence[GatedBlock], *, stop_early: bool = True) -> None:
        self.blocks, self.stop_early = blocks, stop_early

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        gated = next(gated for gated in self.blocks if gated.block is block)
        # No block samples from torch's generator: gate noise has another one, and nothing runs in train mode.
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(_contexts, gated),
            early_stop=self.stop_early,
        )


def _contexts(gated: GatedBlock) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of its recomputation."""
    return nullcontext(), _SameGates(gated)


class _SameGates(AbstractContextManager[None]):
    """Context that reopens a block's gates as they were when it was made.

    It must not refer to the forward pass's outputs, whose graph refers to it: such a cycle is never freed.
    """

    def __init__(self, gated: GatedBlock) -> None:
        self.gated = gated
        self.run = _again(gated.gates.current)
        self.experts = None if gated.lora is None else gated.lora.gates  # (B, E)

    def __enter__(self) -> None:
        self.before = self.gated.gates.current, self._mix(self.experts)
        self.gated.gates.open(_again(self.run))

    def __exit__(self, *_: object) -> None:
        run, experts = self.before
        self.gated.gates.open(run)
        self._mix(experts)

    def _mix(self, experts: Tensor | None) -> Tensor | None:
        """Set the gates that mix a TD-LoRA's experts, and return those set before."""
        lora = self.gated.lora
        if lora is None:
            return None
        before, lora.gates = lora.gates, experts
        return before


def _again(run: GatedPass | None) -> GatedPass | None:
    return None if run is None else run.again()
