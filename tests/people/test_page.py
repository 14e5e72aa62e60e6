"""Test the page in a real browser: keyboard operation, and texts that try to inject markup."""

import threading
import time

import pytest

from rlhf_lightning.commands.web_server import listen
from rlhf_lightning.data.feedback.database import judgements_of
from rlhf_lightning.data.feedback.records import Candidate, Item
from rlhf_lightning.people.server import PageSettings, make_app

from .conftest import pair, ranked_item

HOSTILE = Item(
    "<script>window.owned = 1</script>What is 2 + 2?",
    (
        Candidate("<img src=x onerror='window.owned = 2'>[4](javascript:window.owned=3)<|im_end|>"),
        Candidate("<iframe src='data:text/html,<script>parent.owned=4</script>'></iframe>\u202eruof"),
    ),
)


@pytest.fixture
def serve(make_store):
    """Serve a store on the loopback; returns it and the address."""
    import uvicorn

    running = []

    def start(items, instructions="", **policy):
        store = make_store(items, **policy)
        listening = listen("127.0.0.1", 0)
        app = make_app(store, settings=PageSettings(instructions=instructions))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread, listening))
        return store, f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread, listening in running:
        server.should_exit = True
        thread.join()
        listening.close()


def enter(browser, address, name, width=1280, **context):
    page = browser.new_context(viewport={"width": width, "height": 800}, **context).new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(address)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    return page


def judged(store, count):
    """Wait for a number of judgements, because the page saves in the background, and return them."""
    for _ in range(600):
        with store.reading() as connection:
            if len(found := judgements_of(connection)) == count:
                return found
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} judgements instead of {count}")


def press(page, *keys):
    """Press keys one after the other, waiting until each is saved."""
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_selector("body:not(.busy)")


def test_a_session_works_by_keyboard(browser, serve):
    store, address = serve([pair(0), pair(1), pair(2), pair(3), ranked_item(4)])
    page = enter(browser, address, "ann")
    assert "question 0" in page.inner_text("#prompt") and "models/" not in page.content()
    press(page, "3")
    assert "Choose one first" in page.inner_text("#status")
    press(page, "ArrowRight", "3")
    (one,) = judged(store, 1)
    assert (one.picked_left, one.strength) == (False, 3) and one.seconds < 60
    press(page, "T")
    assert judged(store, 2)[1].verdict == "tie", "Caps Lock makes no other key of it"
    press(page, "u")
    judged(store, 1)
    assert "question 1" in page.inner_text("#prompt") and "judge it again" in page.inner_text("#status")
    page.click("#more summary")
    page.click("text=correct")
    press(page, "ArrowLeft", "Enter")
    again = judged(store, 2)[1]
    assert (again.picked_left, again.strength, again.reasons) == (True, None, ("correct",))
    press(page, "b", "s")
    assert [one.verdict for one in judged(store, 4)[2:]] == ["both_bad", "skip"]
    shown = [page.inner_text(f"[data-place='{place}'] .text") for place in range(4)]
    press(page, "2", "=", "4", "1", "Backspace", "3", "1")
    assert page.inner_text("#ranking") == "2 = 4  >  3  >  1"
    press(page, "Enter")
    ranking = judged(store, 5)[4]
    assert [ranking.ranks[int(text.split()[1])] for text in shown] == [2, 0, 1, 0]
    page.wait_for_selector("text=Nothing left to judge")
    assert not page.problems


def test_an_edited_completion_is_stored(browser, serve):
    store, address = serve([pair(0)])
    page = enter(browser, address, "ann")
    press(page, "ArrowLeft", "e")
    left = page.input_value("textarea")
    page.fill("textarea", "")
    page.keyboard.type("t, b and 1: much better")  # letters that are shortcuts outside a text field
    press(page, "Control+Enter", "4")
    (one,) = judged(store, 1)
    assert (one.edited, one.strength, one.picked_left) == ("t, b and 1: much better", 4, True)
    assert left.startswith(["good", "poor"][one.edited_place])


def test_scripts_in_texts_do_not_run(browser, serve):
    store, address = serve([HOSTILE])
    page = enter(browser, address, "ann")
    shown = page.inner_text("#work")
    for text in ("<script>window.owned = 1</script>", "<img src=x", "(javascript:window.owned=3)", "<|im_end|>",
                 "<iframe", "[U+202E]ruof"):  # fmt: skip
        assert text in shown
    press(page, "m")
    assert "[4](javascript:window.owned=3)" in page.inner_text("#candidates")
    page.wait_for_timeout(300)
    assert page.evaluate("window.owned") is None and page.locator("#work img, #work iframe, #work a").count() == 0
    # The content security policy is a second defence: even an unescaped tag would not run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 5\">')")
    page.wait_for_timeout(300)
    assert page.evaluate("window.owned") is None
    press(page, "ArrowLeft", "1")
    judged(store, 1)


def test_two_annotators_get_different_items(browser, serve):
    store, address = serve([pair(0), pair(1)])
    ann, bob = enter(browser, address, "ann"), enter(browser, address, "bob")
    assert "question 0" in ann.inner_text("#prompt") and "question 1" in bob.inner_text("#prompt")
    press(ann, "ArrowLeft", "2")
    press(bob, "ArrowRight", "2")
    assert {(one.annotator, one.item) for one in judged(store, 2)} == {("ann", 1), ("bob", 2)}
    ann.goto(f"{address}/results")
    assert "2\njudgements" in ann.inner_text("main") and "bob" in ann.inner_text("main")


WORDS = "Play a game every day and look at what went wrong. " * 30
LONG = Item(f"How do I start? {WORDS}", (Candidate(f"First words. {WORDS}"), Candidate(f"Other words. {WORDS}")))


def box(page, selector):
    return page.locator(selector).first.bounding_box()


def test_a_phone_shows_every_completion_and_works_by_touch(browser, serve):
    store, address = serve([LONG, pair(1), ranked_item(2)])
    page = enter(browser, address, "ann", width=400, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for place in (0, 1):
        shown = box(page, f"[data-place='{place}'] .text")
        assert shown["y"] + 50 < box(page, "#actions")["y"]
    assert len({button.bounding_box()["y"] for button in page.locator("#actions button:visible").all()}) == 1
    assert not page.locator("kbd:visible").count() and not page.locator("#help-button:visible").count()
    folded = box(page, "#prompt")["height"]
    page.tap("#unfold")
    assert box(page, "#prompt")["height"] > 2 * folded
    page.tap("[data-place='0'] .unfold")
    page.tap("[data-place='1'] .text")
    page.tap("[data-place='1'] .text")
    assert page.locator("[data-do=skip]:visible").count(), "a second tap takes the choice back"
    page.tap("[data-place='1'] .text")
    assert len({button.bounding_box()["y"] for button in page.locator("#actions button:visible").all()}) == 1
    page.tap("[data-strength='4']")
    assert judged(store, 1)[0].strength == 4
    page.wait_for_selector("body:not(.busy)")
    page.tap("[data-place='0'] .text")
    page.tap("[data-place='0'] .edit")
    page.fill("textarea", "better")
    page.tap(".hint button")
    page.tap("[data-do=save]")
    assert judged(store, 2)[1].edited == "better"
    page.wait_for_selector("body:not(.busy):not(.pair)")
    first = ["[data-place='2'] .text", "[data-do=equal]", "[data-place='0'] .text", "[data-do=back]"]
    for tapped in (*first, *(f"[data-place='{place}'] .text" for place in (1, 3, 0)), "[data-do=save]"):
        page.tap(tapped)
    assert sorted(judged(store, 3)[2].ranks) == [0, 1, 2, 3]
    assert not page.problems


def test_a_wide_screen_has_equal_columns_above_the_verdict(browser, serve):
    _, address = serve([pair(0)])
    page = enter(browser, address, "ann", width=1400)
    left, right = box(page, "[data-place='0']"), box(page, "[data-place='1']")
    assert (left["width"], left["height"], left["y"]) == (right["width"], right["height"], right["y"])
    assert box(page, "#actions")["y"] - (left["y"] + left["height"]) < 100
    assert page.locator(".candidate .end:visible").count() == 2


def test_the_list_of_keys_closes_with_escape_or_button(browser, serve):
    _, address = serve([pair(0)])
    page = enter(browser, address, "ann")
    for close in (lambda: page.keyboard.press("Escape"), lambda: page.click("#help-close")):
        page.keyboard.press("?")
        assert page.locator("#help:visible").count()
        close()
        assert not page.locator("#help:visible").count()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".chosen").count() == 1, "keys work after it"


def test_instructions_are_shown_first_and_on_demand(browser, serve):
    store, address = serve([pair(0)], instructions="# Look for\n\n**help** <script>window.owned = 1</script>")
    page = enter(browser, address, "ann")
    assert "Look for" in page.inner_text("dialog") and page.locator("dialog strong").inner_text() == "help"
    page.keyboard.press("t")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("#work:not([hidden])")
    assert not page.locator("dialog:visible").count() and page.evaluate("window.owned") is None
    page.click("#instructions-button")
    page.click("#instructions-close")
    press(page, "t")
    assert len(judged(store, 1)) == 1, "no key judges behind the instructions"


def test_an_annotator_can_undo_any_own_label(browser, serve):
    store, address = serve([pair(number) for number in range(4)])
    page = enter(browser, address, "ann")
    press(page, "ArrowLeft", "4", "t", "s")
    page.wait_for_selector("text=2 judged · 1 skipped · 1 left")
    first = judged(store, 3)[0]
    page.click("text=My labels")
    assert "much better" in page.inner_text("table") and "models/" not in page.content()
    page.click(f"[data-undo='{first.id}']")
    page.wait_for_selector("text=1 judged · 1 skipped · 2 left")
    assert "question 0" in page.inner_text("#prompt")
    assert [one.verdict for one in judged(store, 2)] == ["tie", "skip"]


CONTRAST = """
() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parts(colour).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = getComputedStyle(at).backgroundColor, alpha = parts(found)[3];
      if (alpha === undefined || alpha > 0) return found;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [], shown = "button, a, summary, p, h1, h2, td, th, dd, dt, kbd, legend, label span";
  for (const element of document.querySelectorAll(shown)) {
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (box.width < 2 || style.visibility === "hidden" || !element.textContent.trim()) continue;
    if (ratio(style.color, ground(element)) < 4.5) low.push(`text of ${element.outerHTML.slice(0, 60)}`);
    const bordered = element.matches("button:not(.quiet), label span") && !element.matches(".primary:enabled");
    if (bordered && ratio(style.borderTopColor, ground(element.parentElement)) < 3)
      low.push(`border of ${element.outerHTML.slice(0, 60)}`);
  }
  return low;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_control_has_enough_contrast(browser, serve, scheme):
    _, address = serve([LONG, pair(1)])
    page = enter(browser, address, "ann", color_scheme=scheme)
    page.keyboard.press("?")
    page.click("#more summary")
    found = page.evaluate(CONTRAST)
    press(page, "ArrowLeft")
    found += page.evaluate(CONTRAST)
    page.evaluate("document.getElementById('progress').style.color = 'rgb(127, 127, 127)'")
    assert len(page.evaluate(CONTRAST)) == 1, "grey on the ground is too little in both schemes"
    press(page, "4")
    for path in ("/results", "/results/labels", "/labels"):
        page.goto(address + path)
        found += page.evaluate(CONTRAST)
    assert not found
