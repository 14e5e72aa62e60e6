"""Look at the pages of reports in a real browser: long names and texts fit narrow windows."""

import pytest

from rlhf_lightning.evaluation.report import Section, pyplot, save_figure, write_report
from rlhf_lightning.evaluation.reward_models import KnownPair

NAME = "scorer=runs/quickstart/reward_weak/version_0/model,kl_coef=0.0,kl_target=null,early_stop_kl=0.1"
ROW = {"completion": "word" * 40, "score": 0.5, "length": 160, "finished": False, "kl": 1.0, "verdict": 1.0}
PAGES = {
    "compare.html.jinja": {"samples": [
        {"prompt": "ask" * 50, "sides": [(NAME, "word" * 40, 0.5), (NAME, "said", None)]}]},
    "evaluate.html.jinja": {"items": [{"prompt": "ask" * 50, "sides": [(NAME, [ROW]), (f"{NAME}2", [ROW])]}]},
    "reward.html.jinja": {"items": [
        {"pair": KnownPair(0, "ask", "word" * 40, "said", "all", False, 1.0), "prompt": "ask" * 50,
         "margins": [(NAME, 0.5)]}]},
}  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("template", PAGES)
def test_pages_are_as_wide_as_the_window_and_pictures_are_not_enlarged(template, width, browser, tmp_path):
    figure, axis = pyplot().subplots(figsize=(4, 3))
    axis.plot([0, 1])
    picture = save_figure(figure, tmp_path / "small.png", dpi=100)
    section = Section(f"Differences from {NAME}", ["metric", NAME, f"{NAME}2"], [[NAME, 0.5, NAME]], "note")
    write_report(tmp_path, template, "Report", ["note"], [section], {}, {"Small": picture}, **PAGES[template])
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"file://{tmp_path / 'report.html'}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(one => one.clientWidth <= one.naturalWidth)")
    tables = page.evaluate("[...document.querySelectorAll('table')].map(one => one.scrollWidth)")
    assert tables and (width < 1000 or max(tables) <= width), "long headings and names make a table scroll"
    page.close()
