"""Linear layers of slim blocks: cut along their outputs or inputs, quantizable, with an optional TD-LoRA path.

These layers alone are quantized. Any other ``nn.Linear`` of a network keeps the model's precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.lora import LoraSpec
from dyexport.slicing.slim_lora import LowRankPath, QkvPath


class BlockLinear(nn.Module):
    """A linear layer of a slim block: rows (R, in) -> (R, out), plus its low-rank path where it has one.

    Quantization applies to ``weight`` of every subclass. ``low_rank`` is None without TD-LoRA.
    """

    weight: nn.Parameter
    low_rank: LowRankPath | QkvPath | None

    def updated(self, out: Tensor, rows: Tensor, experts: Tensor | None) -> Tensor:
        """Add the low-rank path on rows (R, in) at expert gates (E,) to the layer's output (R, out)."""
        if self.low_rank is None:
            return out
        assert experts is not None
        return out + self.low_rank(rows, experts)


class SlimLinear(BlockLinear):
    """A linear layer whose outputs are cut to the kept units."""

    def __init__(self, inputs: int, outputs: int, td_lora: LoraSpec | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.low_rank = None if td_lora is None else LowRankPath(inputs, outputs, td_lora)

    def forward(self, rows: Tensor, experts: Tensor | None = None) -> Tensor:
        """Compute (R, in), expert gates (E,) -> (R, out)."""
        return self.updated(F.linear(rows, self.weight, self.bias), rows, experts)


class QkvLinear(SlimLinear):
    """Query, key and value of the kept heads in one product, interleaved head by head: (R, C) -> (R, H' * 3 * D)."""

    def __init__(self, channels: int, heads: int, head_dim: int, td_lora: LoraSpec | None = None) -> None:
        super().__init__(channels, 3 * heads * head_dim)
        self.low_rank = None if td_lora is None else QkvPath(channels, heads, head_dim, td_lora)


class TransposedLinear(BlockLinear):
    """A linear layer whose inputs are cut to the kept units.

    Its weight is stored (in, out), so that the first units are a contiguous run of it. Without ``bias`` the
    caller passes what the product is added to.
    """

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, td_lora: LoraSpec | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.low_rank = None if td_lora is None else LowRankPath(inputs, outputs, td_lora)

    def forward(self, rows: Tensor, experts: Tensor | None = None, *, addend: Tensor | None = None) -> Tensor:
        """Compute (R, in), expert gates (E,), addend (R, out) in place of the bias -> (R, out)."""
        base = self.bias if addend is None else addend
        assert base is not None
        return self.updated(torch.addmm(base, rows, self.weight), rows, experts)
