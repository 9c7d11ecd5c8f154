"""What a Triton server adds to sampling, and what batching gives back.

    dyexport deploy triton BUNDLE models --name served
    tritonserver --model-repository models
    python benchmarks/triton_overhead.py BUNDLE served --url localhost:8000

The server must run on this machine; both sides are timed in alternating blocks of one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import tritonclient.http as http

from dyexport.bench.latency import Blocks, time_variants
from dyexport.bench.report import as_markdown
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import sample


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("model")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--requests", type=int, default=8, help="at once, against one after another")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    transformer = load(options.bundle)
    client = http.InferenceServerClient(options.url, concurrency=options.requests, network_timeout=600)
    asked = _inputs(label=1, seed=0, steps=options.steps)

    def alone() -> None:
        sample(transformer, transformer.spec, [1], steps=options.steps, guidance_scale=1.5, seed=[0])

    def request() -> None:
        client.infer(options.model, asked)

    def one_by_one() -> None:
        for _ in range(options.requests):
            request()

    def at_once() -> None:
        waiting = [client.async_infer(options.model, asked) for _ in range(options.requests)]
        for each in waiting:
            each.get_result()

    variants = {"alone": alone, "request": request, "one by one": one_by_one, "at once": at_once}
    seconds = time_variants(variants, Blocks(rounds=options.rounds))
    rows = [
        ("a request over `sample` in the client's process", f"{seconds['request'] / seconds['alone']:.2f}x"),
        (
            f"{options.requests} requests one after another over as many at once",
            f"{seconds['one by one'] / seconds['at once']:.2f}x",
        ),
    ]
    print(f"{transformer.spec.name}, {options.steps} steps, guidance 1.5\n")
    print(as_markdown(("ratio of times", ""), rows))


def _inputs(**values: int) -> list[http.InferInput]:
    made = []
    for name, value in values.items():
        tensor = http.InferInput(name, [1, 1], "INT32" if name == "steps" else "INT64")
        tensor.set_data_from_numpy(np.array([[value]], np.int32 if name == "steps" else np.int64))
        made.append(tensor)
    return made


if __name__ == "__main__":
    main()
