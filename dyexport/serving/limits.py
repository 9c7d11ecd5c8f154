"""Limits of a served model. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a request may ask for, so that no request blocks the server or fills its memory.

    max_steps   denoising steps
    max_pixels  height times width
    max_prompt  characters; text encoders read some 2500, and tokenizing a longer text takes time
    """

    max_steps: int = 100
    max_pixels: int = 2048 * 2048
    max_prompt: int = 4000
