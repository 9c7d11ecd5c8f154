"""Slim against dense on one GPU, at real sizes with random weights, in whatever this machine can run them with.

    python -m benchmarks.gpu                          # everything, about 25 minutes on an H100
    python -m benchmarks.gpu --sections torch --cases dit-xl-2:all:2
    python -m benchmarks.gpu --device cpu --cases sit-digits:all:2 --out /tmp/gpu     # the same code, no GPU

Sections: ``torch`` (torch.compile under CUDA graphs, in bf16), ``onnxruntime`` (its CUDA provider), ``tensorrt-rtx``
and ``tensorrt`` (plans). A section or case that fails is one line of the table and the rest goes on. A case is
MODEL:TOKENS:BATCH[:ENGINES]; MODEL is a preset, FLUX's with a number of blocks if needed (``flux/4+8``); TOKENS is
``all`` (width only) or ``capacity``. Widths follow t as those of trained routers do, shifted to the budget.

Everything compared is timed in one run, in alternating blocks. What conditions the slim networks runs once for all
steps, and its share is added to each of their steps. ``realised`` is the speed-up times the share of FLOPs that is
left: 1.0 where every FLOP saved is time saved.
"""
