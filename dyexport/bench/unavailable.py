"""The reason why something cannot be measured on this machine."""

from __future__ import annotations


class Unavailable(Exception):
    """A counter or sensor that this machine does not have. The message becomes the reason in a report."""
