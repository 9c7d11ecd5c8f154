"""A bundle of ordered routers: right at every t, and four engines in the bytes of one."""

from __future__ import annotations

from pathlib import Path

from dyexport.bundle.reader import Bundle
from dyexport.exporters.onnx_graph import STORE
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import build, tiny_settings


def store_bytes(bundle: Bundle) -> int:
    return bundle.manifest.files[f"graphs/{STORE}"].bytes


def test_four_engines_are_right_and_store_no_more_than_one(tmp_path: Path) -> None:
    one = build(tiny_settings(tmp_path, router="ordered", token_path="compact"))
    wide = store_bytes(one)
    four = build(tiny_settings(tmp_path, router="ordered", token_path="compact", engines=4))
    assert len({segment.groups for segment in four.manifest.plan.segments}) > 1
    assert store_bytes(four) == wide
    report = verify_bundle(four.root, VerifySettings(timesteps=16))
    assert report.passed
    assert report.wrong_gates == 0
