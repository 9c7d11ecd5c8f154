"""Contents of a report, ready to be shown: text, tables, charts and pictures."""

from __future__ import annotations

from dataclasses import dataclass

from dyexport.report.drawing import Chart


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the figures at the top. ``absent`` is shown where ``value`` is None."""

    name: str
    value: str | None
    note: str
    absent: str = "not measured"


@dataclass(frozen=True, kw_only=True)
class Headline:
    model: str
    budget: str
    sentence: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a data URI, for an ``img`` element."""

    uri: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of the bundle, and of its dense network from the same noise; ``dense`` is None without one.

    ``difference`` is the mean absolute difference of pixel values in [0, 1]; None for latents.
    """

    label: str
    seed: int
    slim: Picture
    dense: Picture | None
    difference: float | None


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples and how they were made.

    ``name`` is what the bundle's widths are: dynamic or static. ``small``: so few pixels that they are shown enlarged,
    without smoothing.
    """

    samples: tuple[Sample, ...]
    name: str
    caption: str
    small: bool


@dataclass(frozen=True, kw_only=True)
class TokenCell:
    """Tokens of one block at one step: ``skipped`` is an SVG path over the picture, one unit per token."""

    block: int
    kept: float
    skipped: str


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """Tokens that ran at a few steps (rows) in some blocks (columns), over a picture of ``columns`` x ``rows``."""

    picture: Picture
    rows: int
    columns: int
    steps: tuple[tuple[str, tuple[TokenCell, ...]], ...]
    caption: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names its rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Result of the comparison with the masked model. ``passed`` is None where nothing was compared."""

    passed: bool | None
    sentence: str
    table: Table | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page, in its order. None for what could not be shown; ``why`` says why, by section."""

    headline: Headline
    samples: Samples | None
    widths: Chart
    engines: Table
    token_map: TokenMap | None
    token_counts: Chart | None
    timeline: Chart
    steps: Table
    measurements: tuple[Chart, ...]
    layers: tuple[Table, ...]
    verified: Verified
    environment: Table
    command: str
    version: str
    warnings: tuple[str, ...]
    why: dict[str, str]
