"""Built-in data sets that models are scored against, by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dyexport.bundle.spec import ModelSpec
from dyexport.digits import Digits, Split, load_digits, samples_digits
from dyexport.emoji import Emoji, load_emoji, samples_emoji

DIGITS, EMOJI = "digits", "emoji"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Real pictures with values in [0, 1], and the models whose samples are compared with them."""

    load: Callable[[Split], Digits | Emoji]
    fits: Callable[[ModelSpec], bool]


DATA_SETS: Mapping[str, DataSet] = {
    DIGITS: DataSet(load=load_digits, fits=samples_digits),
    EMOJI: DataSet(load=load_emoji, fits=samples_emoji),
}


def data_set_of(spec: ModelSpec) -> str | None:
    """Return the name of the data set that a model samples; None for any other model."""
    return next((name for name, data in DATA_SETS.items() if data.fits(spec)), None)
