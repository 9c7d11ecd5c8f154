"""Models are placed by a GPU's memory for calibration, and a placed model is there as a whole.

There is no GPU here. The meta device stands for one: torch refuses operands of two devices there too.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.backbones import BACKBONES
from dyexport.checkpoints.dynamic import load_dynamic, save_dynamic
from dyexport.checkpoints.placement import load_placed, on_cpu, on_gpu
from dyexport.lora import LoraSpec
from dyexport.models.devices import bf16_products
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from tests.factories import tiny_preset

FLUX, GB = get_preset("flux"), 1e9
FLUX_ROWS = FLUX.tokens + FLUX.text_tokens
WHOLE, BF16, STREAMED = ((False, "fp32"), (False, "bf16"), (True, "fp32"))
LORA = LoraSpec(rank=2, experts=2, alpha=2)


def save(backbone: str, folder: Path, lora: LoraSpec | None = None) -> NoisedInputs:
    preset = tiny_preset(backbone)
    save_dynamic(random_dynamic(preset, td_lora=lora), folder, preset)
    return NoisedInputs(preset=preset, batch_size=2)


@pytest.mark.parametrize(
    ("room", "bf16", "expected"),
    [
        (112, True, WHOLE),  # this and the next ones as docs/howto/memory.md says
        (111, True, BF16),
        (60, True, BF16),
        (58, True, STREAMED),
        (7, True, STREAMED),
        (141, False, WHOLE),
        (141, True, WHOLE),
        (80, True, BF16),
        (80, False, STREAMED),
        (48, True, STREAMED),
        (24, True, STREAMED),
        (8, True, STREAMED),
    ],
)
def test_a_gpu_holds_both_models_or_reads_them_for_every_pass(
    room: float, bf16: bool, expected: tuple[bool, str]
) -> None:
    placement = on_gpu(FLUX, FLUX_ROWS, room * GB, bf16=bf16)
    assert placement is not None
    assert (placement["stream"], placement["base"]) == expected
    assert placement["device"] == "cuda"


def test_a_gpu_without_room_for_a_pass_is_not_used() -> None:
    assert on_gpu(FLUX, FLUX_ROWS, 4 * GB, bf16=True) is None
    assert on_gpu(get_preset("dit-s-2"), 2048, 4 * GB, bf16=False) is not None
    assert on_cpu(FLUX, 0) == {"device": "cpu", "stream": True, "base": "fp32"}


@torch.no_grad()
@pytest.mark.parametrize("lora", [None, LORA], ids=["", "td-lora"])
@pytest.mark.parametrize("placement", [WHOLE, STREAMED], ids=["whole", "streamed"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_of_a_model_is_on_its_device(
    backbone: str, placement: tuple[bool, Any], lora: LoraSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    inputs, (stream, base) = save(backbone, tmp_path / "model", lora), placement
    place = {"device": "meta", "stream": stream, "base": base}
    model, preset = load_dynamic(tmp_path / "model", **place)
    on_device = {name: value.to("meta") for name, value in inputs.at(0.4).items() if name != "img_shapes"}
    arguments = {**inputs.at(0.4), **on_device}  # sizes of pictures are numbers, which are read anywhere
    output = model(arguments)
    assert output.sample.device == output.tokens.device == torch.device("meta")
    dense = load_placed(str(tmp_path / "model"), preset, **place)
    assert model.adapter.run(dense, arguments).device == torch.device("meta")


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_base_in_bf16_computes_what_products_in_bf16_do(backbone: str, tmp_path: Path) -> None:
    inputs = save(backbone, tmp_path / "model", LORA)
    lowered, whole = (load_dynamic(tmp_path / "model", base=base)[0] for base in ("bf16", "fp32"))
    with bf16_products(torch.device("cpu"), enabled=True):
        found, expected = lowered(inputs.at(0.4)), whole(inputs.at(0.4))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_on_a_gpu_a_model_computes_much_the_same(backbone: str, stream: bool, tmp_path: Path) -> None:
    inputs = save(backbone, tmp_path / "model", LORA)
    placed, _ = load_dynamic(tmp_path / "model", device="cuda", stream=stream)
    expected, _ = load_dynamic(tmp_path / "model")
    found = placed(inputs.at(0.4, device="cuda")).sample.cpu()
    assert torch.allclose(found, expected(inputs.at(0.4)).sample, atol=1e-4)
