"""Target ``torch`` in short: a bundle is compiled, verified and run. `make packages` does the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyexport.compilation.api import compile_engines
from dyexport.errors import EngineBuildError, UsageError
from dyexport.runtime.loading import load
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.pipeline.tiny import TINY, build, tiny_settings
from tests.runtime.calls import predict


@pytest.mark.aot_inductor
def test_a_compiled_bundle_equals_the_masked_model(tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, model=replace(TINY, layers=1)))
    graphs = predict(load(bundle.root), 0.4)
    compiled = compile_engines(bundle.root, "torch")
    assert compiled.engine_paths("torch").keys() == {"segment-00", "conditioning"}
    settings = VerifySettings(timesteps=16, target="torch")
    assert verify_bundle(compiled.root, settings, reference=find_reference(bundle)).passed
    torch.testing.assert_close(predict(load(compiled.root, target="torch"), 0.4), graphs, atol=1e-5, rtol=0)


def test_quantized_bundles_are_refused(tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, quantize="int8"))
    with pytest.raises(EngineBuildError, match="quantized to int8"):
        compile_engines(bundle, "torch")
    with pytest.raises(UsageError, match="--quantize is for targets made from graphs, and torch is not"):
        tiny_settings(tmp_path, quantize="int8", targets=("torch",))
