"""The CLIP score of pictures and their prompts: 100 times the cosine of their embeddings (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dyexport.evaluation.extractors.pretrained import as_images, image_processor, open_pretrained


class ClipScore:
    """Agreement of pictures with texts, by a CLIP model of transformers.

    Not torchmetrics' CLIPScore: it opens models of a few names alone, and takes what ``get_image_features`` returned
    before transformers 5. Negative cosines count as 0, as there and as published.
    """

    def __init__(self, source: str) -> None:
        self.name = source
        self._module: Any = open_pretrained(source, "CLIPModel").eval()
        self._images: Any = image_processor(source)
        self._texts: Any = open_pretrained(source, "AutoTokenizer")

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Score pictures (n, C, H, W) with values in [0, 1], each against its text: (n,)."""
        module, device = self._module.to(pictures.device), pictures.device
        images = self._images(images=as_images(pictures), return_tensors="pt")["pixel_values"]  # (n, 3, h, w)
        tokens = self._texts(list(texts), return_tensors="pt", padding=True, truncation=True)
        output = module(
            pixel_values=images.to(device, module.dtype),
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
        )
        cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)  # (n,)
        return (100 * cosines).clamp(min=0).cpu()
