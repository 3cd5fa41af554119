"""Images in requests: every dialect, and no way through the server to what is not public."""

import base64
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_dgemma.prompt.download import public_address
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.pictures import Access
from mlx_dgemma.server.request_images import MAX_IMAGES
from tests.prompt.drawings import photograph, saved

from .conftest import Open, Script, config, user

FILE = saved(photograph(50, 40))
DATA = "data:image/png;base64," + base64.b64encode(FILE).decode()
TEXT = {"type": "text", "text": "What is this?"}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def part(url: str = DATA) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(script: Script) -> PreparedPrompt:
    prompt = script.seen[-1]["prompt"]
    assert isinstance(prompt, PreparedPrompt)
    return prompt


@pytest.fixture
def pictures() -> Iterator[str]:
    """A host on loopback that has one picture under every path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FILE)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://pictures.example:{running.server_port}"
        running.shutdown()


def test_every_dialect_shows_the_same_picture(serve: Open) -> None:
    script = Script("A dog.")
    client = serve(script)
    answer = client.post(CHAT, json={"messages": user([part(), TEXT]), "seed": 1})
    assert answer.status_code == 200
    expected = asked(script)
    soft_tokens = expected.images[0].soft_tokens
    assert answer.json()["usage"]["prompt_tokens"] == len(expected.ids) > soft_tokens

    words = {"type": "input_text", "text": TEXT["text"]}
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": DATA}, words]}]
    assert client.post(RESPONSES, json={"input": items}).status_code == 200
    assert asked(script).keys == expected.keys

    source = {"type": "base64", "media_type": "image/png", "data": DATA.partition(",")[2]}
    block = {"type": "image", "source": source}
    body = {"messages": user([block, TEXT]), "max_tokens": 9}
    assert client.post(MESSAGES, json=body).status_code == 200
    assert asked(script).keys == expected.keys
    counted = client.post(f"{MESSAGES}/count_tokens", json=body).json()
    assert counted["input_tokens"] == len(expected.ids)


def test_a_tool_may_give_a_picture(serve: Open) -> None:
    script = Script("A dog.")
    source = {"type": "base64", "media_type": "image/png", "data": DATA.partition(",")[2]}
    blocks = [{"type": "text", "text": "see"}, {"type": "image", "source": source}]
    messages = [
        *user("look"),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "u", "name": "look"}]},
        *user([{"type": "tool_result", "tool_use_id": "u", "content": blocks}]),
    ]
    answer = serve(script).post(MESSAGES, json={"messages": messages, "max_tokens": 9})
    assert answer.status_code == 200
    assert len(asked(script).images) == 1


def test_choices_and_formats_see_the_picture_too(serve: Open) -> None:
    script = Script("A dog.")
    body = {"messages": user([part(), TEXT]), "n": 2, "stream": True, "image_tokens": 140}
    assert serve(script).post(CHAT, json=body).status_code == 200
    first, second = (seen["prompt"] for seen in script.seen)
    assert first is second
    assert first.images[0].soft_tokens > config().vision_soft_tokens_per_image // 2


def test_pictures_of_public_hosts(serve: Open, pictures: str) -> None:
    script = Script("A dog.")
    access = Access(files=False, resolve=lambda host, port: ["127.0.0.1"])
    client = serve(script, image_access=access)
    body = {"messages": user([part(f"{pictures}/dog.png"), TEXT])}
    assert client.post(CHAT, json=body).status_code == 200
    assert asked(script).media[0].name == "dog.png"
    block = {"type": "image", "source": {"type": "url", "url": f"{pictures}/dog.png"}}
    body = {"messages": user([block]), "max_tokens": 9}
    assert client.post(MESSAGES, json=body).status_code == 200


def rebinding(host: str, port: int) -> list[str]:
    """A name that has a public and a private address."""
    answers = [(0, 0, 0, "", (address, port)) for address in ("93.184.216.34", "127.0.0.1")]
    return public_address(host, port, lambda *_, **__: answers)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/a.png", "not a public address"),
        ("http://localhost/a.png", "not a public address"),
        ("http://169.254.169.254/latest/meta-data", "not a public address"),
        ("http://[::1]/a.png", "not a public address"),
        ("http://[::ffff:10.0.0.1]/a.png", "not a public address"),
        ("http://2130706433/a.png", "not a public address"),
        ("/etc/passwd", "not as a path"),
        ("file:///etc/passwd", "http and https"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
        (DATA[: DATA.index(",") + 401], "damaged or truncated"),
        ("", "not as a path"),
    ],
)
def test_what_is_not_read(serve: Open, url: str, words: str) -> None:
    answer = serve(Script("x")).post(CHAT, json={"messages": user([part(url), TEXT])})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_one_private_address_is_enough(serve: Open) -> None:
    client = serve(Script("x"), image_access=Access(files=False, resolve=rebinding))
    answer = client.post(CHAT, json={"messages": user([part("http://both.example/a.png"), TEXT])})
    assert answer.status_code == 400
    assert "not a public address" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": user([part()] * (MAX_IMAGES + 1))}, "65 images; 64 are the most"),
        ({"messages": user([{"type": "video_url", "video_url": {"url": DATA}}])}, "frames"),
        ({"messages": user([{"type": "image_url"}])}, "has no image"),
        ({"messages": user([part()]), "image_tokens": 71}, "71 image tokens"),
        ({"messages": user([part()]), "image_tokens": 7}, "image_tokens must be"),
    ],
)
def test_requests_that_cannot_be_served(serve: Open, fields: Any, words: str) -> None:
    answer = serve(Script("x")).post(CHAT, json=fields)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


DAMAGED = part(DATA[: DATA.index(",") + 401])


@pytest.mark.parametrize("damaged", [1, 2, 5])
def test_an_earlier_image_that_cannot_be_read_does_not_end_a_conversation(
    serve: Open, damaged: int
) -> None:
    script = Script("x")
    earlier = [part(), *[DAMAGED] * damaged, TEXT]
    body = {"messages": [*user(earlier), *user([part(), TEXT])]}
    answer = serve(script).post(CHAT, json=body)
    assert answer.status_code == 200
    said = answer.json()["x_warnings"]
    assert "messages[0].content[1]" in "".join(said)
    # After three attempts none of the earlier ones is read any more.
    assert len(asked(script).images) == (2 if damaged <= 2 else 1)
    assert len(said) == (damaged if damaged <= 2 else damaged + 1)


def test_a_tools_image_that_cannot_be_read_does_not_end_a_conversation(serve: Open) -> None:
    function = {"name": "look", "arguments": "{}"}
    calls = [{"id": "1", "type": "function", "function": function}]
    messages = [
        *user("look"),
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": [DAMAGED]},
    ]
    answer = serve(Script("x")).post(CHAT, json={"messages": messages})
    assert answer.status_code == 200
    assert "damaged or truncated" in answer.json()["x_warnings"][0]


def test_a_conversation_may_have_had_more_images_than_are_read(serve: Open) -> None:
    script = Script("x")
    body = {"messages": [*user([part()] * MAX_IMAGES), *user([part(), TEXT])], "image_tokens": 70}
    answer = serve(script).post(CHAT, json=body)
    assert answer.status_code == 200
    assert len(asked(script).images) == MAX_IMAGES
    assert answer.json()["x_warnings"] == [
        "the image at messages[0].content[0] was left out: only 64 images are read"
    ]


def test_an_image_of_the_system_is_left_out_with_a_warning(
    serve: Open, conversations: list[Any]
) -> None:
    script = Script("x")
    asked = {"messages": [{"role": "system", "content": [part()]}, *user()]}
    answer = serve(script).post(CHAT, json=asked)
    assert answer.json()["x_warnings"] == ["messages[0].content[0] is an image of a system message"]
    assert conversations[0][0]["content"][0]["text"] == "[an image was left out]"


def test_a_model_without_a_tower(serve: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    script = Script("x")
    script.model.config = replace(config(), vision=None)
    answer = serve(script).post(CHAT, json={"messages": user([part(), TEXT])})
    assert answer.status_code == 400
    assert "no vision tower" in answer.json()["error"]["message"]
    earlier = {"messages": [*user([part(), TEXT]), *user("go on")]}
    assert "no vision tower" in serve(script).post(CHAT, json=earlier).json()["x_warnings"][0]


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "https://localhost/", 3])
def test_a_refused_image_is_named_by_its_place(serve: Open, url: Any) -> None:
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
    answer = serve(Script("x")).post("/v1/chat/completions", json={"messages": user(parts)})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[1]"
    assert "numpy" not in answer.json()["error"]["message"]
