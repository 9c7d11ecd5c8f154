"""A small ``node_modules`` folder in the layout of the packages of emoji, for tests without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dyexport.emoji_packages import INDEX, PACKAGES, Package

CATEGORIES = (
    ("Smileys & Emotion", "face-smiling"),
    ("People & Body", "person-role"),
    ("People & Body", "hands"),
    ("Animals & Nature", "animal-bird"),
    ("Food & Drink", "drink"),
    ("Travel & Places", "hotel"),
    ("Objects", "tool"),
    ("Symbols", "arrow"),
    ("Flags", "flag"),
)
"""One category and subcategory for each class."""

EACH = 4  # emoji of a class
TONE = "1F3FB"


def entries() -> list[dict[str, Any]]:
    """Return emoji in the form of emoji.json; every second hand has one skin tone."""
    listed = []
    for row, (category, subcategory) in enumerate(CATEGORIES):
        for column in range(EACH):
            code = f"{0x1F000 + 16 * row + column:X}"
            entry = {"unified": code, "image": f"{code.lower()}.png", "category": category, "subcategory": subcategory}
            if subcategory == "hands" and column % 2:
                image = f"{code}-{TONE}.png".lower()
                entry["skin_variations"] = {TONE: {"unified": f"{code}-{TONE}", "image": image}}
            listed.append(entry)
    return listed


def color_of(entry: dict[str, Any]) -> tuple[int, int, int]:
    """Return the color of an emoji in every package: red tells the class, green the emoji."""
    row, column = divmod(int(entry["unified"], 16) - 0x1F000, 16)
    return 28 * row, 80 * column, 0


def make_packages(folder: Path) -> Path:
    """Write all packages: every picture is a square of one color with a transparent border on top."""
    listed = entries()
    for package in PACKAGES:
        for entry in listed:
            for image in (entry, *entry.get("skin_variations", {}).values()):
                _save(color_of(entry), folder / package.name / path_of(package, image["image"]))
        if package.pictures.startswith("img"):
            (folder / package.name / INDEX).write_text(json.dumps(listed))
    return folder


def path_of(package: Package, image: str) -> str:
    return package.pictures.format(image.removesuffix(".png"))


def _save(color: tuple[int, int, int], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (64, 64), (*color, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 64, 4))
    picture.save(path, lossless=True) if path.suffix == ".webp" else picture.save(path)
