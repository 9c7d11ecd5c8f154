"""dyexport next to what else a deployer would run on a CPU: fewer steps, static widths, a step cache, torch.compile.

    python -m benchmarks.rivals --model sit-digits --train-only   # hours on a CPU; goes on where it stopped
    python -m benchmarks.rivals --model sit-digits                # samples, scores and times; minutes the second time
    python -m benchmarks.rivals --model sit-digits --no-train     # what is trained so far; lists what is missing
    python -m benchmarks.rivals --bundles BUNDLE [BUNDLE ...]     # times of any bundles, without quality

All variants start from the same static model, and are sampled from the same noise and labels:

``dense``           the static model
``control``         the static model, trained for as long as the slim ones: also at fewer steps of the same FLOPs
``static``          one slim network for all timesteps (``--widths static``), of the same recipe and budget
``dynamic``         dyexport's: widths and tokens that follow the timestep
``reuse``           the dense model under TeaCache's rule (arXiv 2411.19108), applied to whole outputs of the network:
                    relative changes of its input add up, and below a threshold the last output is used again
``cache-dit``       the dense diffusers module under cache-dit, eager; needs that package
``dynamic-reuse``   the dynamic model under the rule of ``reuse``
``compile``         the dense diffusers module under torch.compile, only timed; with bundles if --models has it

Cost and time are in evaluations of the dense network. Times are of engines that alternate in blocks of one run. They
are ratios to the dense ONNX graph of that run, and one that rounds disagree about is not printed. Writes
``benchmarks/results/rivals_MODEL.json``, ``.md``, ``.csv`` and ``.svg``; ``--publish`` puts a summary and the chart
into README and docs.
"""
