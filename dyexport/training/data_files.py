"""Files of training data: checks before anything is loaded, and prompts for synthetic data. Imports no torch."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from dyexport.backbones.base import Preset
from dyexport.digits import SHAPE, samples_digits
from dyexport.emoji import CLASSES, samples_emoji
from dyexport.emoji import SHAPE as EMOJI_SHAPE
from dyexport.errors import DataError
from dyexport.training.data_record import check_record

DIGITS = "digits"
EMOJI = "emoji"
BUILT_IN = (DIGITS, EMOJI)
SHOWN = 200  # characters of a name in a message
SUBJECTS = (
    "a red fox", "an old sailor", "a glass of water", "a steam train", "a city street in the rain", "a bowl of fruit",
    "a mountain lake", "two children playing chess", "a woman reading a letter", "a robot in a workshop",
    "a bicycle against a brick wall", "a flock of birds", "a wooden house", "a cup of coffee", "a dancer on a stage",
    "a sign that says OPEN", "a desert road", "an astronaut", "a cat asleep on a sofa", "a market full of people",
    "a lighthouse", "a vintage car", "a slice of cake", "a dog catching a ball", "a violin on a table",
)  # fmt: skip
SETTINGS = (
    "photograph, natural light", "close-up, shallow depth of field", "at night, neon lights", "oil painting",
    "watercolour on paper", "pencil sketch", "isometric 3D render", "seen from above, wide angle",
    "black and white film", "flat vector illustration", "in thick fog at dawn", "studio lighting, plain background",
)  # fmt: skip


def check_source(spec: str, preset: Preset) -> None:
    """Raise ``DataError`` if ``spec``, a name or a directory, has no training data for a model."""
    if spec not in BUILT_IN:
        shard_files(Path(spec))
        check_record(Path(spec), preset.classes, preset.name)
    elif spec == DIGITS and not samples_digits(preset):
        raise DataError(f"digits are {SHAPE} and {preset.name} takes {preset.latent_shape}; use --model dit-digits")
    elif spec == EMOJI and not samples_emoji(preset):
        raise DataError(
            f"emoji are {EMOJI_SHAPE} in {len(CLASSES)} classes and {preset.name} takes {preset.latent_shape} in "
            f"{preset.classes}; use --model sit-emoji"
        )


def shard_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory. Raises ``DataError`` if there are none."""
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix == ".safetensors")
    except (FileNotFoundError, NotADirectoryError):
        files = []
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(directory)[:SHOWN]!r}: {str(error)[:SHOWN]}; give another") from error
    if not files:
        problem = "holds no .safetensors files" if directory.is_dir() else "is no directory"
        raise DataError(
            f"{directory} {problem}; give a directory of latents or pictures, or 'digits', 'emoji' or 'synthetic'"
        )
    return files


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """Read one prompt per line; without a file return 300 built-in prompts. Raises ``DataError``."""
    if file is None:
        return tuple(f"{subject}, {setting}" for subject, setting in product(SUBJECTS, SETTINGS))
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}; give --data synthetic:FILE with one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DataError(f"{file} holds no prompts; write one a line")
    return prompts
