"""The page in a real Chromium: ask, watch, stop, open a passage, be refused; hostile text stays text."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from gateway.routes.page import POLICY
from inference import GenerationFailed, Overloaded
from tests.gateway.conftest import Live, running, until

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"there is no Chromium at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS.split(), "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, live: Live) -> Iterator:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.complaints = complaints
    page.goto(live.url)
    yield page
    context.close()


def ask(page, question: str = "When must the pump be primed?") -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")


def finished(page) -> None:
    page.wait_for_selector("#footer:not([hidden])")
    page.wait_for_selector("#send:not([hidden])")


def test_from_the_question_to_the_passage(page):
    from playwright.sync_api import expect

    expect(page.locator("#facts")).to_have_text("2 documents")
    expect(page.locator("#question")).to_be_focused()
    ask(page)
    finished(page)
    expect(page.locator(".quotes blockquote").first).to_have_text("The pump must be primed before starting.")
    expect(page.locator(".quotes figcaption").first).to_contain_text("Pumps")
    text = page.locator("#text")
    expect(text).to_contain_text("According to the document, The pump must be primed before starting")
    expect(page.locator(".unsupported")).to_have_text("Ice cream tastes wonderful.")
    number = page.locator("#text .chip").last.text_content()
    expect(page.locator("#sources li").nth(int(number) - 1)).to_have_class("cited")
    expect(page.locator("#sources mark").first).to_have_text("The pump must be primed before starting.")
    expect(page.locator("#footer")).to_contain_text("40 % of the prompt from cache")
    assert "q=When" in page.url
    page.locator("#text .chip").last.click()
    expect(page.locator("#drawer")).to_be_visible()
    expect(page.locator("#drawer-title")).to_have_text("Pumps")
    expect(page.locator("#document mark")).to_have_text("The pump must be primed before starting.")
    expect(page.locator("#document")).to_contain_text("The valve opens at two bars")
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).to_be_hidden()
    expect(text).to_contain_text("According")
    assert page.complaints == []


def test_a_passage_after_characters_outside_the_basic_plane(page, library):
    """The server counts characters, JavaScript UTF-16 units."""
    from playwright.sync_api import expect

    library.add("Faces", "😀😀😀 🚰\n\nThe kettle whistles 😀 when boiling. Another sentence follows here.")
    ask(page, "When does the kettle whistles boiling?")
    finished(page)
    expect(page.locator("#sources mark").first).to_have_text("The kettle whistles 😀 when boiling.")
    page.locator("#sources button").first.click()
    expect(page.locator("#document mark").first).to_have_text("The kettle whistles 😀 when boiling.")


def test_a_refusal_shows_no_answer_but_the_nearest_passages(page, backend):
    from playwright.sync_api import expect

    ask(page, "Do zebras dream of elephants?")
    expect(page.locator(".notice.refusal")).to_have_text("Nothing in the documents answers this.")
    expect(page.locator("#reply")).to_be_hidden()
    expect(page.locator("#quotes")).to_be_hidden()
    expect(page.locator("#sources-title")).to_have_text("Nearest passages, which may be unrelated")
    expect(page.locator("#sources li")).to_have_count(3)
    assert backend.requests == []


def test_hostile_text_stays_text(page, library, backend):
    from playwright.sync_api import expect

    evil = f"{HOSTILE} pump primed evil [x](javascript:alert(1)) {HOSTILE}"
    library.add(HOSTILE, evil, source=HOSTILE)
    backend.reply = [f"{HOSTILE} The pump", " is </div><b>primed</b> &lt; [1]"]
    ask(page, f"pump primed evil {HOSTILE}")
    finished(page)
    expect(page.locator("#text")).to_contain_text("<b>primed</b> &lt;")
    expect(page.locator("#sources")).to_contain_text(HOSTILE)
    page.locator("#sources button", has_text="evil").first.click()
    expect(page.locator("#document")).to_contain_text(HOSTILE)
    assert page.locator("main img, main script, dialog img, dialog script, main b").count() == 0
    assert page.evaluate("window.hacked") is None


def test_stop_keeps_the_text_and_ends_the_generation(page, backend):
    from playwright.sync_api import expect

    backend.reply = [f" word{number}" for number in range(1000)]
    backend.endless = True
    ask(page)
    expect(page.locator("#text")).to_contain_text("word2")
    page.locator("#stop").click()
    expect(page.locator(".notice.stopped")).to_contain_text("Stopped.")
    until(lambda: not backend.running)
    expect(page.locator("#text")).to_contain_text("word2")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".caret")).to_have_count(0)


def test_an_error_can_be_tried_again(page, backend):
    from playwright.sync_api import expect

    backend.error = Overloaded("all places are taken", 3)
    ask(page)
    expect(page.locator(".notice.error")).to_contain_text("All places are taken.")
    expect(page.locator(".quotes blockquote").first).to_be_visible()
    backend.error = None
    page.locator(".notice button").click()
    finished(page)
    expect(page.locator(".notice")).to_be_hidden()


def test_an_error_in_the_middle_keeps_what_had_arrived(page, backend):
    from playwright.sync_api import expect

    backend.error, backend.error_after = GenerationFailed("the step failed"), 3
    ask(page)
    expect(page.locator(".notice.error")).to_contain_text("The step failed.")
    expect(page.locator("#text")).to_contain_text("The pump must be primed")


def test_a_lost_connection_keeps_what_had_arrived(browser, config, library, backend):
    from playwright.sync_api import expect

    backend.reply = ["The pump", " must be primed"]
    context = browser.new_context()
    page = context.new_page()
    with running(config, library, backend) as live:
        page.goto(live.url)
        # A proxy that cuts the stream after its first events.
        page.route("**/v1/answers", lambda route: cut(route, live))
        ask(page)
        expect(page.locator(".notice.lost")).to_contain_text("The connection was lost. What had arrived is kept below.")
        expect(page.locator("#text")).to_contain_text("The pump")
        context.close()


def cut(route, live: Live) -> None:
    response = route.fetch()
    body = response.body()
    end = body.index(b"event: citations")
    route.fulfill(response=response, body=body[:end])


def test_the_keyboard(page):
    from playwright.sync_api import expect

    page.locator("#add").focus()
    page.keyboard.press("/")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("When must")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("the pump be primed?")
    expect(page.locator("#question")).to_have_value("When must\nthe pump be primed?")
    page.keyboard.press("Enter")
    finished(page)
    page.go_back()
    expect(page.locator("#results")).to_be_hidden()
    expect(page.locator("body")).to_have_attribute("data-state", "empty")


def test_escape_stops(page, backend):
    from playwright.sync_api import expect

    backend.gate = asyncio.Event()
    ask(page)
    until(lambda: backend.running)
    page.keyboard.press("Escape")
    expect(page.locator(".notice.stopped")).to_be_visible()
    until(lambda: not backend.running)


def test_a_link_with_a_question_asks_it(page, live):
    page.goto(f"{live.url}/?q=When+must+the+pump+be+primed%3F")
    finished(page)
    assert page.title().startswith("When must the pump")


def test_adding_a_document(page, library):
    from playwright.sync_api import expect

    files = [
        {"name": "tank.txt", "mimeType": "text/plain", "buffer": b"The tank holds ninety litres."},
        {"name": "odd.bin", "mimeType": "text/plain", "buffer": b"\xff\xfe"},
    ]
    page.set_input_files("#files", files)
    expect(page.locator("#uploads .good")).to_contain_text("Added “tank”")
    expect(page.locator("#uploads .bad")).to_contain_text("Odd.bin: it is not text.")
    expect(page.locator("#facts")).to_have_text("3 documents")


def test_an_empty_library_invites_to_add(page, library):
    from playwright.sync_api import expect

    library.texts.clear()
    page.reload()
    expect(page.locator("#facts")).to_have_text("No documents yet. Add one to begin.")


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (360, "dark"), (768, "light"), (1280, "dark")])
def test_nothing_is_wider_than_the_window(browser, live, library, width, scheme):
    library.add("W" * 200, "The pump must be primed " + "x" * 500, source="/very/long/" * 30)
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme)
    page = context.new_page()
    page.goto(live.url)
    ask(page)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#sources button").first.click()
    page.wait_for_selector(".passage")
    assert page.evaluate("document.getElementById('drawer').scrollWidth") <= width
    context.close()


def test_every_file_of_the_page_has_its_policy(client):
    for path in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg"):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
