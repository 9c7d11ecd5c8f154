"""``dyexport models --memory``: what fine-tuning takes, by the options that save memory."""

from __future__ import annotations

import json

import pytest

from dyexport.cli import main
from dyexport.presets import get_preset
from dyexport.training.memory import CARDS, Division, memory_of, memory_table, run_of_recipe


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dyexport", "models", *words])
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 0
    return capsys.readouterr().out


def test_a_table_says_which_cards_hold_which_settings(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(printed(capsys, "--memory", "flux", "--json"))
    assert (result["model"], result["batch"], result["cards_gb"]) == ("flux", 8, list(CARDS))
    rows = {(row["base_precision"], row["optimizer"]): row for row in result["settings"]}
    assert len(rows) == 8
    assert rows["bf16", "adamw"]["cards"]["24"] is None
    assert rows["bf16", "adamw"]["cards"]["48"] == {"micro_batch": 2, "checkpointing": True}
    assert rows["nf4", "adamw"]["cards"]["24"] is not None
    assert rows["fp32", "adamw"]["cards"]["48"] is None
    parts = ("weights", "gradients", "optimizer", "activations")
    for row in rows.values():
        assert sum(row[f"{part}_bytes"] for part in parts) == pytest.approx(row["total_bytes"], abs=4)
    text = printed(capsys, "--memory", "flux")
    assert "nf4" in text
    assert "2*" in text


def test_the_table_fits_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = printed(capsys, "--memory", "flux").partition("A batch has")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table


def test_a_model_that_trains_all_weights_has_no_frozen_base() -> None:
    run = run_of_recipe(get_preset("dit-xl-2"))
    rows = memory_table(run)
    assert [(row["base_precision"], row["optimizer"]) for row in rows] == [("fp32", "adamw"), ("fp32", "adamw-8bit")]
    assert rows[0]["total_bytes"] == round(memory_of(run, Division(micro_batch=1, checkpointing=True)).total)
