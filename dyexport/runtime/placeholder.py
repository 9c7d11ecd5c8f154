from __future__ import annotations

import torch


def offloading_placeholder(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """A parameter of no elements: accelerate's offloading asks a module's first parameter where the module is."""
    return torch.nn.Parameter(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)
