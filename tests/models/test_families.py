"""Test small models of transformers' families: results are right or refused, never silently wrong."""

import re
from pathlib import Path

import pytest

from models.families import COLUMNS, MATTER, NOT_SMALL, PAGE, QUICK, measure, names

RIGHT = {"right", "padded instead"}


@pytest.mark.parametrize("name", MATTER)
def test_a_core_model_family_passes_all_checks(name: str, tmp_path: Path) -> None:
    found = measure(name, tmp_path, QUICK)
    assert not found["path"].startswith("refused")
    assert {found[column] for column in QUICK} <= RIGHT, found


@pytest.mark.parametrize(
    ("name", "column"), [("git", "in groups"), ("phi4_multimodal", "in groups"), ("xlstm", "exported")]
)
def test_a_multimodal_or_specially_initialised_family_passes_all_checks(name: str, column: str, tmp_path: Path) -> None:
    assert measure(name, tmp_path, (column,))[column] == "right"


def test_the_page_has_a_row_for_every_family() -> None:
    rows = dict(re.findall(r"^\| (\S+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE))
    rows.pop("family")
    assert set(rows) == set(names()), "run python tests/models/families.py"
    assert {name for name, path in rows.items() if path.startswith("not built")} == set(NOT_SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_family_matches_its_row_on_the_page(name: str, tmp_path: Path) -> None:
    found = measure(name, tmp_path)
    (row,) = re.findall(rf"^\| {re.escape(name)} \| .*$", PAGE.read_text(), re.MULTILINE)
    shown = [cell.strip().replace("✓", "right") for cell in row.strip("|").split("|")]
    assert shown == [name, *(found.get(column, "") for column in ("path", *COLUMNS))]
