"""The page in a real browser: everything by keyboard, and texts that try to take it over."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_lightning.commands.web_server import listen
from rlhf_lightning.data.feedback.database import judgements_of
from rlhf_lightning.data.feedback.records import Candidate, Item
from rlhf_lightning.people.server import make_app

from .conftest import pair, ranked_item

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
if CHROMIUM is None:
    pytest.skip("there is no Chromium to show the page in", allow_module_level=True)

HOSTILE = Item(
    "<script>window.owned = 1</script>What is 2 + 2?",
    (
        Candidate("<img src=x onerror='window.owned = 2'>[4](javascript:window.owned=3)<|im_end|>"),
        Candidate("<iframe src='data:text/html,<script>parent.owned=4</script>'></iframe>\u202eruof"),
    ),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def serve(make_store):
    """Serve a store on the loopback; returns it and the address."""
    import uvicorn

    running = []

    def start(items, **policy):
        store = make_store(items, **policy)
        listening = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(make_app(store), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread, listening))
        return store, f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread, listening in running:
        server.should_exit = True
        thread.join()
        listening.close()


def enter(browser, address, name):
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(address)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    return page


def judged(store, count):
    """The judgements, once there are so many: the page saves in the background."""
    for _ in range(600):
        with store.reading() as connection:
            if len(found := judgements_of(connection)) == count:
                return found
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} judgements instead of {count}")


def press(page, *keys):
    """Press keys one after the other, waiting for what each saves."""
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_selector("body:not(.busy)")


def test_a_session_by_keyboard(browser, serve):
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


def test_writing_how_it_should_have_been(browser, serve):
    store, address = serve([pair(0)])
    page = enter(browser, address, "ann")
    press(page, "ArrowLeft", "e")
    left = page.input_value("textarea")
    page.fill("textarea", "")
    page.keyboard.type("t, b and 1: much better")  # letters that would judge, were they not being written
    press(page, "Control+Enter", "4")
    (one,) = judged(store, 1)
    assert (one.edited, one.strength, one.picked_left) == ("t, b and 1: much better", 4, True)
    assert left.startswith(["good", "poor"][one.edited_place])


def test_hostile_texts_do_nothing(browser, serve):
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
    # The policy is a second wall: even a tag that got in would not run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 5\">')")
    page.wait_for_timeout(300)
    assert page.evaluate("window.owned") is None
    press(page, "ArrowLeft", "1")
    judged(store, 1)


def test_two_people_at_once(browser, serve):
    store, address = serve([pair(0), pair(1)])
    ann, bob = enter(browser, address, "ann"), enter(browser, address, "bob")
    assert "question 0" in ann.inner_text("#prompt") and "question 1" in bob.inner_text("#prompt")
    press(ann, "ArrowLeft", "2")
    press(bob, "ArrowRight", "2")
    assert {(one.annotator, one.item) for one in judged(store, 2)} == {("ann", 1), ("bob", 2)}
    ann.goto(f"{address}/results")
    assert "2\njudgements" in ann.inner_text("main") and "bob" in ann.inner_text("main")
