"""Run the checks of public bug reports of other projects; see `outside_reports`."""

from pathlib import Path

import pytest
from outside_reports import PAGE, Tried, everything, page


@pytest.mark.parametrize("one", everything(), ids=lambda one: one.check.__name__)
def test_a_reported_bug_does_not_occur(one: Tried, tmp_path: Path) -> None:
    one.check(tmp_path)


def test_the_page_shows_every_report() -> None:
    assert PAGE.read_text() == page(), "run python tests/outside_reports.py"
