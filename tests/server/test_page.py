"""The page in a real browser: a reply appears, its canvas can be replayed, nothing leaks out."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_dgemma.runtime import Runtime
from mlx_dgemma.server import app
from mlx_dgemma.server.app import PAGE
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
    for path in PAGE:
        kind = {"/": "text/html", ".js": "javascript", ".css": "text/css"}[Path(path).suffix or "/"]
        answer = client.get(path)
        assert answer.status_code == 200
        assert kind in answer.headers["content-type"]
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert vendored(path) or not {"http://", "https://"} & set(answer.text.split('"'))
    assert client.get("/page/../app.py").status_code == 404


def vendored(path: str) -> bool:
    return path.startswith("/vendor/")


def test_the_libraries_are_the_ones_that_are_named() -> None:
    folder = Path(app.__file__).parent / "page" / "vendor"
    libraries = json.loads((folder / "vendor.json").read_text())
    assert {path.name for path in folder.glob("*.js")} == set(libraries)
    licenses = (folder / "LICENSES.txt").read_text()
    for name, library in libraries.items():
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert digest == library["sha256"], name
        assert f"==== {library['package']}\n" in licenses


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


def test_a_conversation_in_the_browser(
    browser: Any, tmp_path: Path, conversations: list[Any]
) -> None:
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
        assert [message["role"] for message in conversations[1]] == [
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


HOSTILE = """# Title

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return "<script>alert(1)</script>"
```

Area $\\pi r^2$ and \\(x+1\\), costs $5 and $6.

<img src=x onerror="window.hit=1"><script>window.hit=1</script>
[here](javascript:window.hit=1) [there](https://example.com/a) ![pixel](https://example.com/p.png)
<a href="#" onclick="window.hit=1" style="position:fixed">x</a><form action="/"><input></form>
<svg><animate onbegin="window.hit=1" attributeName=x dur=1s></svg>
$\\href{javascript:window.hit=1}{x}$ $\\htmlStyle{color:red}{y}$
"""


def open_page(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """A page with what went wrong on it."""
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    problems: list[str] = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    return page, problems


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    page.get_by_text("Reply complete.").wait_for()


def test_a_reply_is_markdown_and_cannot_do_harm(browser: Any) -> None:
    with running(Script(HOSTILE), prefix_cache_bytes=0) as url:
        page, problems = open_page(browser, url)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        say(page, "Hi")
        text = page.locator(".text")
        assert text.locator("h1").inner_text() == "Title"
        assert text.locator("td").all_inner_texts() == ["1", "2"]
        code = text.locator("pre code")
        assert "<script>alert(1)</script>" in code.inner_text()
        assert code.locator(".hljs-keyword").first.inner_text() == "def"
        assert text.locator("math").count() >= 2
        assert "costs $5 and $6" in text.inner_text()
        # HTML of a reply is shown as words.
        assert '<img src=x onerror="window.hit=1">' in text.inner_text()
        assert (
            text.locator("img, script, form, input, svg, [onclick], [style], [onerror]").count()
            == 0
        )
        links = text.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
        assert [link for link in links if link] == ["https://example.com/a"]
        page.wait_for_timeout(100)
        assert page.evaluate("window.hit") is None
        assert problems == []
        assert all(address.startswith(url) for address in asked)


def test_conversations_are_kept_edited_and_answered_again(
    browser: Any, conversations: list[Any]
) -> None:
    script = Script("First.", "Second.", "Third.", "Fourth.")
    with running(script, prefix_cache_bytes=0) as url:
        page, problems = open_page(browser, url)
        say(page, "One")
        page.get_by_role("button", name="Answer again").click()
        page.locator(".text", has_text="Second.").wait_for()
        page.get_by_text("Reply complete.").wait_for()
        assert page.locator("article").count() == 2
        page.get_by_role("button", name="Edit").click()
        assert page.get_by_label("Message", exact=True).input_value() == "One"
        say(page, "Two")
        assert [m["content"] for m in conversations[2]] == ["Two"]
        page.reload()
        page.get_by_text("Conversations").click()
        page.get_by_role("button", name="One", exact=True).click()
        assert page.locator(".text").inner_text() == "Third."
        page.get_by_role("button", name="New conversation").click()
        assert page.locator("article").count() == 0
        page.get_by_text("Conversations").click()
        page.get_by_role("button", name="Remove One").click()
        assert page.locator("#kept li").count() == 0
        assert problems == []


def test_the_page_is_accessible_in_both_schemes_and_on_a_phone(
    browser: Any, tmp_path: Path
) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed"
    )
    with running(Script(HOSTILE), prefix_cache_bytes=0) as url:
        for scheme in ("light", "dark"):
            phone = {"width": 360, "height": 740}
            page, _ = open_page(browser, url, color_scheme=scheme, viewport=phone)
            say(page, "Hi")
            page.get_by_text("Settings").click()
            page.get_by_text("Ask for decisions").click()
            found = axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 360, f"{width} pixels wide"
            page.screenshot(path=str(tmp_path / f"{scheme}.png"), full_page=True)


def test_decisions_and_constraints_have_their_boxes(browser: Any) -> None:
    with Runtime() as runtime, running(runtime) as url:
        page, problems = open_page(browser, url)
        page.get_by_text("Ask for decisions").click()
        page.get_by_label("Text", exact=True).fill("I was charged twice.")
        page.get_by_label("Questions, one a line").fill("Is it urgent?\nTeam? [Billing | Sales]")
        page.get_by_role("button", name="Decide").click()
        page.locator("#decisions td").nth(3).wait_for()
        answers = page.locator("#decisions td").all_inner_texts()
        assert answers[0] == "Is it urgent?"
        assert answers[1].startswith(("yes, ", "no, "))
        assert answers[2] == "Team?"
        assert "Billing" in answers[3]
        page.get_by_text("Settings").click()
        page.get_by_label("Answer must be").select_option("json")
        page.get_by_label("Lines, expression or schema").fill("{")
        page.get_by_label("Message", exact=True).fill("Hi")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("alert").get_by_text("The schema is not valid JSON").wait_for()
        assert problems == []


def test_the_page_goes_on_when_the_server_is_back(browser: Any) -> None:
    with running(Script("Yes."), prefix_cache_bytes=0) as url:
        page, _ = open_page(browser, url)
        page.route("**/v1/**", lambda route: route.abort())
        page.route("**/health", lambda route: route.abort())
        page.get_by_label("Message", exact=True).fill("Hi")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("alert").get_by_text("The server does not answer").wait_for()
        page.unroute("**/health")
        page.unroute("**/v1/**")
        page.get_by_text("The server is back").wait_for()
        page.get_by_role("button", name="Answer again").click()
        page.locator(".text", has_text="Yes.").wait_for()


def test_a_selection_is_rewritten_between_its_neighbours(browser: Any) -> None:
    with running(Script("The small cat sleeps."), prefix_cache_bytes=0) as url:
        page, _ = open_page(browser, url)
        say(page, "Hi")
        sent: list[Any] = []

        def fill(route: Any) -> None:
            sent.append(route.request.post_data_json)
            route.fulfill(json={"choices": [{"text": "large dog"}]})

        page.route("**/v1/completions", fill)
        page.get_by_role("button", name="Rewrite a part").click()
        page.get_by_text("Select some plain words").wait_for()
        page.evaluate(
            "() => { const node = document.querySelector('.text p').firstChild;"
            "getSelection().setBaseAndExtent(node, 4, node, 13); }"
        )
        page.evaluate("document.querySelector('.rewrite').click()")
        page.get_by_text("Rewritten.").wait_for()
        assert page.locator(".text").inner_text() == "The large dog sleeps."
        assert (sent[0]["prompt"], sent[0]["suffix"]) == ("The ", " sleeps.")
