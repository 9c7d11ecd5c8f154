"""Models of transformers as feature extractors and classifiers: DINOv2, CLIP, ViT and others of pictures."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

from dyexport.errors import CheckpointError, missing_extras, reason
from dyexport.evaluation.extractors.base import in_color, whole


class PretrainedNetwork:
    """A model of transformers with its image processor. Raises ``CheckpointError`` if they cannot be read."""

    def __init__(self, source: str, kind: str) -> None:
        self.name = source
        self._module: Any = open_pretrained(source, kind).eval()
        self._processor = image_processor(source)

    @torch.inference_mode()
    def inputs(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Resize and normalize pictures (B, C, H, W) as the model's processor says."""
        processed = self._processor(images=as_images(pictures), return_tensors="pt")
        self._module.to(pictures.device)
        return {"pixel_values": processed["pixel_values"].to(pictures.device, self._module.dtype)}  # (B, 3, h, w)


class PretrainedFeatures(PretrainedNetwork):
    """Features by a model of transformers: its pooled output, of CLIP the embedding of the picture, (B, d)."""

    def __init__(self, source: str) -> None:
        super().__init__(source, "AutoModel")

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        inputs = self.inputs(pictures)
        compares_text = hasattr(self._module, "get_image_features")
        output = self._module.get_image_features(**inputs) if compares_text else self._module(**inputs)
        pooled = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
        if pooled is None:
            raise CheckpointError(f"{self.name} has no pooled output; give a model that has one, such as DINOv2")
        return whole(pooled.double(), self.name)  # (B, d)


class PretrainedClassifier(PretrainedNetwork):
    """Classes by an image classifier of transformers."""

    def __init__(self, source: str) -> None:
        super().__init__(source, "AutoModelForImageClassification")

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        classes: torch.Tensor = self._module(**self.inputs(pictures)).logits.argmax(dim=1)  # (B,)
        return classes


@missing_extras()
def image_processor(source: str) -> Any:
    """Open the image processor of a model, in PIL: the fast ones need torchvision, and resize otherwise."""
    in_pil = {"backend": "pil"} if int(version("transformers").partition(".")[0]) >= 5 else {"use_fast": False}
    return open_pretrained(source, "AutoImageProcessor", **in_pil)


@missing_extras()
def open_pretrained(source: str, kind: str, **options: Any) -> Any:
    """Open a directory or hub repository by a class of transformers. Raises ``CheckpointError``."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"cannot read {kind} from {source}: {reason(error)}; give a directory or hub id of transformers, "
            "or a TorchScript file"
        ) from error


def as_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Return pictures (B, C, H, W) as PIL images, in eight bits as files hold them."""
    values = (in_color(pictures).movedim(1, -1) * 255).round().to(torch.uint8).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(value) for value in values]
