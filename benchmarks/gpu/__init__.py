"""Slim against dense on one GPU, at real sizes with random weights, in whatever this machine can run them with.

    python -m benchmarks.gpu                                             # everything, at most 150 s a section
    python -m benchmarks.gpu --sections graphs --cases dit-xl-2:all:2@0.3
    python -m benchmarks.gpu --rehearse --device cpu --out /tmp/gpu      # the same code at small sizes, no GPU

Fifteen minutes on a GPU, in two runs of at most ten (the build takes CPUs and no GPU, so it runs next to the others):

    python -m benchmarks.gpu --sections build --limit 900 & python -m benchmarks.gpu --sections graphs,torch --limit 240
    python -m benchmarks.gpu --sections bundle,onnxruntime-fused,onnxruntime-primitive,finetune --limit 120

    cat RUN-*/gpu.jsonl > benchmarks/results/gpu.jsonl; python -m benchmarks.gpu --tables       # several runs as one

Sections, most valuable figures first:

``graphs``        slim and dense torch modules in bf16, captured in CUDA graphs without compilation
``torch``         the same under torch.compile
``build``         bundles of random weights, on the CPU
``bundle``        the shipped path: such a bundle compiled, loaded, sampled from, verified and timed by its commands
``onnxruntime-fused``, ``onnxruntime-primitive``   graphs in ONNX Runtime's CUDA provider, by the form of attention
``finetune``      steps of fine-tuning FLUX: seconds, and peak memory next to the estimate that a build prints
``tensorrt``, ``tensorrt-rtx``   plans

Every record is written at once: a run that is cut leaves what it measured. A section, case or step that fails is a
line of the table with its message, and the rest goes on. A case is not begun if it would not fit into ``--limit``.

A case of networks is MODEL:TOKENS:BATCH[:ENGINES][@LAMBDA]; MODEL is a preset, FLUX's with a number of blocks if needed
(``flux/4+8``); TOKENS is ``all`` (width only) or ``capacity``. Widths follow t as those of trained routers do, shifted
to the budget. A case of ``build`` is MODEL:PRECISION; of ``bundle``, MODEL:PRECISION:TARGET; of ``finetune``,
MODEL:BATCH.

Everything compared is timed in one run, in alternating blocks. What conditions the slim networks runs once for all
steps, and its share is added to each of their steps. ``realised`` is the speed-up times the share of FLOPs that is
left: 1.0 where every FLOP saved is time saved.
"""
