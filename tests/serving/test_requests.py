"""What a request may ask for, and which requests are drawn together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dyexport.errors import UsageError
from dyexport.serving.limits import Limits
from dyexport.serving.requests import Request, RequestParser, Settings, group_by_settings, split_rows

LABELS = RequestParser(classes=10, defaults=Settings(steps=50, guidance=1.5))
USUAL = Settings(steps=28, guidance=3.5, height=512, width=512)
PROMPTS = RequestParser(classes=0, defaults=USUAL, limits=Limits(max_pixels=512 * 512))


def arrays(**values: Any) -> dict[str, np.ndarray]:
    """As Triton hands them over: (B, 1), texts as bytes."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return {
        name: np.array(rows, np.object_ if isinstance(rows[0], (str, bytes)) else None)[:, None]
        for name, rows in lists.items()
    }


def test_what_is_left_out_is_the_models_own() -> None:
    order = LABELS.parse(arrays(label=[3, 9]))
    assert order.labels_or_prompts == (3, 9)
    assert order.settings == LABELS.defaults
    assert len(order) == 2


def test_seeds_are_drawn_where_none_are_given() -> None:
    seeds = [seed for _ in range(20) for seed in LABELS.parse(arrays(label=[1, 1])).seeds]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_everything_given_counts() -> None:
    text = "a café".encode()
    order = PROMPTS.parse(arrays(prompt=[text], seed=7, steps=4, guidance=1.0, height=256, width=512))
    settings = Settings(steps=4, guidance=1.0, height=256, width=512)
    assert order == Request(labels_or_prompts=("a café",), seeds=(7,), settings=settings)


@pytest.mark.parametrize(
    ("book", "values", "message"),
    [
        (LABELS, {"label": 10}, "label is 10; this model has classes 0 to 9"),
        (LABELS, {"label": -1}, "label is -1"),
        (LABELS, {"label": [1, 2], "seed": [1]}, "seed has 1 rows and label 2"),
        (LABELS, {"label": 1, "seed": -3}, "seed is -3; give 0 or more"),
        (LABELS, {"label": 1, "steps": 0}, "steps is 0; this server takes 1 to 100"),
        (LABELS, {"label": 1, "steps": 101}, "steps is 101"),
        (LABELS, {"label": [1, 2], "steps": [3, 4]}, "steps differs between the rows"),
        (LABELS, {"label": 1, "guidance": float("nan")}, "guidance is nan"),
        (LABELS, {"label": 1, "guidance": float("inf")}, "guidance is inf"),
        (LABELS, {"label": 1, "guidance": -1e38}, "guidance is -1e"),
        (LABELS, {"seed": 1}, "label is missing"),
        (LABELS, {"seed": 1, "steps": 2, "guidance": 1.0}, "label is missing"),
        (LABELS, {}, "label is missing"),
        (LABELS, {"label": [1, 2, 3], "steps": [4, 4]}, "steps has 2 rows and label 3"),
        (PROMPTS, {"seed": 1}, "prompt is missing"),
        (PROMPTS, {"prompt": "a" * 4001}, "prompt has 4001 characters; this server takes up to 4000"),
        (PROMPTS, {"prompt": "ä" * 4001}, "prompt has 4001 characters"),
        (PROMPTS, {"prompt": b"\xff" * 10_000_000}, "prompt has 10000000 bytes; this server takes up to 4000"),
        (PROMPTS, {"prompt": ["a", "b" * 5000], "seed": [1, 2]}, "prompt has 5000 characters"),
        (PROMPTS, {"prompt": b"\xff"}, "prompt is not UTF-8"),
        (PROMPTS, {"prompt": "a", "height": 100}, "height is 100; give a multiple of 16"),
        (PROMPTS, {"prompt": "a", "width": -16}, "width is -16"),
        (PROMPTS, {"prompt": "a", "width": 1024, "height": 1024}, "1024 x 1024 are 1048576 pixels"),
        (PROMPTS, {"prompt": "a", "width": 65536}, "512 x 65536 are"),
    ],
)
def test_what_cannot_be_drawn_is_refused(book: RequestParser, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        book.parse(arrays(**values))


def test_a_prompt_may_be_as_long_as_the_limit_says() -> None:
    longest = "本" * PROMPTS.limits.max_prompt
    assert PROMPTS.parse(arrays(prompt=longest.encode())).labels_or_prompts == (longest,)
    short = RequestParser(classes=0, defaults=USUAL, limits=Limits(max_prompt=3))
    assert short.parse(arrays(prompt="abc")).labels_or_prompts == ("abc",)
    with pytest.raises(UsageError, match="takes up to 3"):
        short.parse(arrays(prompt="abcd"))


@pytest.mark.parametrize("name", ["label", "seed", "steps"])
def test_a_tensor_without_rows_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="rows"):
        LABELS.parse({**arrays(label=1, seed=1, steps=1), name: np.zeros((0, 1), np.int64)})


def test_orders_of_the_same_settings_are_drawn_together() -> None:
    wanted = {0: 5, 1: 7, 3: 5, 4: 5}
    orders = {key: LABELS.parse(arrays(label=1, steps=steps)) for key, steps in wanted.items()}
    assert group_by_settings(orders) == [[0, 3, 4], [1]]


def test_rows_go_back_to_their_orders() -> None:
    rows = np.arange(12).reshape(6, 2)
    parts = split_rows(rows, [1, 3, 2])
    assert [len(part) for part in parts] == [1, 3, 2]
    np.testing.assert_array_equal(np.concatenate(parts), rows)


def test_a_request_chooses_one_of_the_budgets() -> None:
    several = RequestParser(classes=10, defaults=Settings(steps=50, guidance=1.5, budget=0.5), budgets=(0.3, 0.5))
    assert several.parse(arrays(label=1)).settings.budget == 0.5
    low = several.parse({**arrays(label=1), "budget": np.array([[0.3]], np.float32)})
    assert low.settings.budget == 0.3
    with pytest.raises(UsageError, match=r"budget is 0\.4; this model has 0\.3, 0\.5"):
        several.parse(arrays(label=1, budget=0.4))
    with pytest.raises(UsageError, match="budget differs between the rows"):
        several.parse(arrays(label=[1, 2], budget=[0.3, 0.5]))
    assert group_by_settings({0: several.parse(arrays(label=1)), 1: low}) == [[0], [1]]
