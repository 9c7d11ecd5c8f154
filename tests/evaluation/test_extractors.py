"""Feature extractors, classifiers and CLIP: each against the library that the network comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyexport.errors import CheckpointError
from dyexport.evaluation.clip import ClipScore
from dyexport.evaluation.extractors.base import open_classifier, open_features
from tests.evaluation.networks import Inception, Maps, Means, save_classifier, save_clip, save_dino, save_script

pytestmark = pytest.mark.build  # importing transformers takes seconds

GRAY = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
COLOR = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    """What a processor makes of pictures of its own size, in eight bits."""
    return (pictures * 255).round() / 255 * 2 - 1


def test_a_torchscript_file_computes_features_and_classes(tmp_path: Path) -> None:
    file = str(save_script(Means(), tmp_path / "means.pt"))
    features = open_features(file)(GRAY)
    assert features.shape == (3, 4)
    assert features[:, 0].numpy() == pytest.approx(GRAY.mean(dim=(1, 2, 3)).numpy(), rel=1e-5)
    assert torch.equal(features[:, 0], features[:, 2]), "gray pictures have three equal channels"
    assert open_classifier(file)(COLOR).tolist() == open_features(file)(COLOR).argmax(dim=1).tolist()
    assert open_features(file).name == "means.pt"


def test_inception_files_take_eight_bits(tmp_path: Path) -> None:
    file = str(save_script(Inception(), tmp_path / "inception.pt"))
    expected = (COLOR * 255).mean(dim=(2, 3))
    assert open_features(file)(COLOR).numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    assert open_classifier(file)(COLOR).tolist() == expected.argmin(dim=1).tolist()


def test_files_that_are_no_extractors_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"cannot read .*weights\.pt as TorchScript.*torch\.jit\.save"):
        open_features(str(tmp_path / "weights.pt"))
    maps = open_features(str(save_script(Maps(), tmp_path / "maps.pt")))
    with pytest.raises(CheckpointError, match=r"maps\.pt returns shape \[3, 3, 8, 8\]; features must be \(batch, d\)"):
        maps(GRAY)
    with pytest.raises(CheckpointError, match=r"cannot read AutoModel from .*nothing"):
        open_features(str(tmp_path / "nothing"))


def test_a_directory_of_transformers_computes_features_and_classes(tmp_path: Path) -> None:
    from transformers import Dinov2Model, ViTForImageClassification

    dino, vit = save_dino(tmp_path / "dino"), save_classifier(tmp_path / "vit")
    with torch.no_grad():
        pooled = Dinov2Model.from_pretrained(dino).eval()(normalized(COLOR)).pooler_output
        logits = ViTForImageClassification.from_pretrained(vit).eval()(normalized(COLOR)).logits
    assert open_features(str(dino))(COLOR).numpy() == pytest.approx(pooled.numpy(), rel=1e-4, abs=1e-5)
    assert open_classifier(str(vit))(COLOR).tolist() == logits.argmax(dim=1).tolist()


def test_pictures_of_another_size_are_resized_as_the_processor_says(tmp_path: Path) -> None:
    from transformers import Dinov2Model

    dino = save_dino(tmp_path / "dino")
    images = [Image.fromarray((value * 255).round().astype(np.uint8)) for value in GRAY.squeeze(1).numpy()]
    resized = [image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR) for image in images]
    pictures = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).movedim(-1, 1) / 255
    with torch.no_grad():
        pooled = Dinov2Model.from_pretrained(dino).eval()(normalized(pictures)).pooler_output
    assert open_features(str(dino))(GRAY).numpy() == pytest.approx(pooled.numpy(), rel=1e-3, abs=1e-4)


def test_clip_features_and_scores(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    directory, texts = save_clip(tmp_path / "clip"), ["a cat", "a dog on a mat", "rain"]
    model = CLIPModel.from_pretrained(directory).eval()
    tokenizer = CLIPTokenizer.from_pretrained(directory)
    expected = []
    with torch.no_grad():
        for picture, text in zip(COLOR, texts, strict=True):
            output = model(pixel_values=normalized(picture[None]), **tokenizer(text, return_tensors="pt"))
            expected.append((output.image_embeds[0].double().numpy(), output.text_embeds[0].double().numpy()))
    images = np.stack([image / np.linalg.norm(image) for image, _ in expected])
    features = open_features(str(directory))(COLOR).numpy()
    assert features / np.linalg.norm(features, axis=1, keepdims=True) == pytest.approx(images, rel=1e-3, abs=1e-4)
    cosines = [image @ text / np.linalg.norm(image) / np.linalg.norm(text) for image, text in expected]
    scores = ClipScore(str(directory))(COLOR, texts).numpy()
    assert scores == pytest.approx([max(100 * cosine, 0) for cosine in cosines], rel=1e-3, abs=1e-2)
    assert len(set(scores.tolist())) > 1
