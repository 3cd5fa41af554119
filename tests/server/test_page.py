"""The page in a real browser: a reply appears, its canvas can be replayed, nothing leaks out."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.prompt.drawings import photograph

from .conftest import Open, Script
from .test_clients import running

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 120_000  # milliseconds: the machine may be busy with other tests
REPLY = "<|channel>thought\nhm, hm\n<channel|>Hello <b>there</b>, reader."


def test_the_page_is_served_with_its_policy(serve: Open) -> None:
    client = serve(Script("x"), api_key="k")
    for path, kind in (("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert kind in answer.headers["content-type"]
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert client.get("/page/../app.py").status_code == 404


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: sudo apt-get install chromium")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            timeout=PATIENCE,
        )
        yield launched
        launched.close()


def test_a_conversation_in_the_browser(browser: Any, tmp_path: Path) -> None:
    script = Script(REPLY, pause=0.01)
    with running(script, prefix_cache_bytes=0) as url:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        problems: list[str] = []
        asked: list[str] = []
        page.on(
            "console", lambda message: message.type == "error" and problems.append(message.text)
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.get_by_label("Message").fill("Hi")
        page.get_by_text("Settings").click()
        page.get_by_label("Denoising steps").fill("7")
        page.get_by_label("Think before").check()
        page.get_by_label("Message").press("Enter")
        page.get_by_text("Reply complete.").wait_for()

        # Words are words: the reply's markup is shown, not obeyed.
        assert page.locator(".text").inner_text() == "Hello <b>there</b>, reader."
        assert page.locator(".thinking p").text_content() == "hm, hm"
        assert (script.seen[0]["max_denoising_steps"], script.seen[0]["enable_thinking"]) == (
            7,
            True,
        )

        # The slider goes back to the first draft, which the script gave in reverse.
        last = page.locator(".cells").inner_text()
        slider = page.get_by_label("Step", exact=True)
        slider.fill("0")
        assert "step 1" in page.locator(".where").inner_text()
        assert page.locator(".cells").inner_text() != last
        assert page.locator(".cells .stable").count() == 0

        # A second turn carries the first one along.
        page.get_by_label("Message").fill("More")
        page.get_by_role("button", name="Send").click()
        page.locator("article.assistant").nth(1).locator(".facts", has_text="seed").wait_for()
        assert [message["role"] for message in script.seen[1]["prompt"]] == [
            "user",
            "assistant",
            "user",
        ]
        page.screenshot(path=str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 5000
        assert problems == []
        assert all(address.startswith(url) for address in asked)


def test_a_picture_is_attached_and_dropped(browser: Any, tmp_path: Path) -> None:
    script = Script("A dog.")
    photograph(50, 40).save(tmp_path / "dog.png")
    with running(script, prefix_cache_bytes=0) as url:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        problems: list[str] = []
        page.on(
            "console", lambda message: message.type == "error" and problems.append(message.text)
        )
        page.goto(url)
        page.locator("#files").set_input_files(str(tmp_path / "dog.png"))
        page.get_by_role("button", name="Remove dog.png").wait_for()
        files = "[new File(['hi'], 'letter.txt', {type: 'text/plain'})]"
        dropped = page.evaluate_handle(
            f"() => {{ const d = new DataTransfer(); {files}.map(f => d.items.add(f)); return d; }}"
        )
        page.dispatch_event("#composer", "drop", {"dataTransfer": dropped})
        page.get_by_text("letter.txt is not an image.").wait_for()
        page.get_by_label("Message", exact=True).fill("What is this?")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Reply complete.").wait_for()
        (image,) = script.seen[0]["prompt"].images
        assert (image.width, image.height) == (50, 40)
        shown = page.locator(".user img")
        assert shown.get_attribute("alt") == "dog.png"
        assert shown.evaluate("image => image.naturalWidth") == 50  # its policy lets it show
        assert page.locator("#attached li").count() == 0
        assert problems == []


def test_errors_and_stopping_are_shown(browser: Any) -> None:
    with running(Script("word " * 300, pause=0.05), api_key="k", prefix_cache_bytes=0) as url:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.get_by_label("Message").fill("Hi")
        page.get_by_role("button", name="Send").click()
        page.locator(".error", has_text="API key is missing").wait_for()
        page.get_by_text("Settings").click()
        page.get_by_label("API key").fill("k")
        page.get_by_label("Message").fill("Again")
        page.get_by_role("button", name="Send").click()
        page.locator(".cells span").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
