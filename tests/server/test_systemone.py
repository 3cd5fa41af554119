"""/v1/systemone: the public conformance suite, its SDKs, and what a client may get wrong."""

import base64
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import system_one
import typesafe_sdk
from PIL import Image

from mlx_dgemma import Noul, decide, load
from mlx_dgemma.runtime import Runtime

from .test_clients import running

KEY = "a-key"
PATIENCE = 3600  # seconds; a machine that others use may be slow, which is no fault of the server
ASKED = {
    "money": {"type": "noul", "instructions": "Does the writer want money back?"},
    "team": {"type": "choice", "instructions": "Who helps?", "criteria": {"A": "x", "B": None}},
    "anger": {"type": "score", "instructions": "How angry?", "criteria": ["calm", "furious"]},
}


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as runtime:
        yield runtime


@pytest.fixture
def url(runtime, monkeypatch):
    monkeypatch.setattr(runtime, "close", lambda: None)  # the next test's server has it, too
    with running(runtime) as url:
        yield url


def post(url: str, body: Any, **options: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/systemone", json=body, timeout=PATIENCE, **options)


@pytest.mark.slow
def test_the_conformance_suite_passes_whole(runtime, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "close", lambda: None)
    report = tmp_path / "report.json"
    program = "import sys; from jevcompat.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "test"]
    with running(runtime, api_key=KEY) as url:
        run = subprocess.run(
            [*command, url, "--key", KEY, "--timeout", str(PATIENCE), "--json", str(report)],
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stdout + run.stderr
    states = {one["id"]: one["status"] for one in json.loads(report.read_text())["results"]}
    assert len(states) == 48
    # A server with a key cannot show this one; every other test here does.
    untested = {"auth.ignored-when-off"}
    assert {name for name, state in states.items() if state != "pass"} == untested


def test_a_key_is_ignored_where_none_is_asked_for(url):
    given = {"authorization": "Bearer anything"}
    assert post(url, {"state": "x", "questions": ASKED}, headers=given).status_code == 200


def test_typesafe_sdk(url):
    with typesafe_sdk.TypeSafeClient(api_key="none", base_url=url, timeout=PATIENCE) as client:
        reply = client.system_one(
            state="Hello.",
            questions={
                "n": typesafe_sdk.Noul(instructions="Is this a greeting?"),
                "c": typesafe_sdk.Choice(instructions="Which?", criteria={"a": "x", "b": "y"}),
                "s": typesafe_sdk.Score(instructions="How warm?", criteria=["cold", "warm"]),
            },
        )
    assert 0 <= reply.nouls["n"].noul <= 1
    assert reply.choices["c"].choice in ("a", "b")
    assert 0 <= reply.scores["s"].score <= 1


def test_system_one_sdk(url):
    config = system_one.HTTPConfig(base_url=url, model="jev-latest", timeout=PATIENCE)
    reply = system_one.SystemOne(config).ask(
        "Hello.",
        {
            "n": system_one.Noul(instructions="Is this a greeting?"),
            "c": system_one.Choice(instructions="Which?", criteria={"a": "x", "b": "y"}),
        },
    )
    assert 0 <= reply.answers["n"].noul <= 1
    assert reply.answers["c"].choice in ("a", "b")


def test_the_answers_are_those_of_python_and_a_state_is_read_once(url):
    state = "I was charged twice. " * 5
    first, again = (post(url, {"state": state, "questions": ASKED}).json() for _ in range(2))
    expected = decide(*load(), state, ASKED).to_json()
    for name, answer in first["answers"].items():
        assert answer == json.loads(json.dumps(expected[name]))
    assert again["answers"] == first["answers"]
    assert first["usage"]["x_cached_tokens"] == 0
    assert again["usage"]["x_cached_tokens"] > 20


def picture(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_pictures_come_with_the_request_as_parts_or_assets(url):
    red = {"type": "image", "format": "png", "data_base64": picture("red")}
    asked = {"q": ASKED["money"]}
    placed = post(
        url, {"state": "<image:1> See.", "questions": asked, "assets": {"<image:1>": red}}
    )
    assert placed.status_code == 200, placed.text
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture('red')}"}}
    parts = [part, {"type": "text", "text": " See."}]
    assert (
        post(url, {"state": parts, "questions": asked}).json()["answers"]
        == (placed.json()["answers"])
    )


def test_an_assets_name_may_begin_with_anothers(url):
    image = {name: {"data_base64": picture(name)} for name in ("red", "blue")}
    asked = {"questions": {"q": ASKED["money"]}}
    one = {"state": "pic-10", "assets": {"pic-1": image["red"], "pic-10": image["blue"]}}
    other = {"state": "blue", "assets": {"blue": image["blue"]}}
    first, second = (post(url, {**asked, **body}).json() for body in (one, other))
    assert first["answers"] == second["answers"]


def test_no_file_of_this_machine_is_read(url, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    for source in (str(secret), f"file://{secret}", "http://127.0.0.1:1/x.png"):
        for part in (
            {"type": "image", "image": source},
            {"type": "image_url", "image_url": {"url": source}},
        ):
            found = post(url, {"state": [part], "questions": {"q": ASKED["money"]}})
            assert found.status_code == 422, found.text


@pytest.mark.parametrize(
    ("change", "location"),
    [
        ({"state": None}, ["body", "state"]),
        ({"state": 3}, ["body", "state"]),
        ({"questions": {}}, ["body", "questions"]),
        ({"questions": {"q": {"type": "x"}}}, ["body", "questions", "q", "type"]),
        ({"x_orders": 0}, ["body", "x_orders"]),
        ({"assets": {"a": {}}}, ["body", "assets.a"]),
        ({"assets": {"": {"data_base64": ""}}}, ["body", "assets"]),
        ({"state": "a" * 65, "assets": {"a": {"data_base64": picture("red")}}}, ["body", "state"]),
        ({"state": ["x", {"type": "image", "image": "/x"}]}, ["body", "state[1]"]),
        ({"questions": {"q": {"type": "noul", "instructions": "a " * 90_000}}}, ["body"]),
    ],
)
def test_a_bad_request_is_422_and_says_where(url, change, location):
    found = post(url, {"state": "x", "questions": {"q": ASKED["money"]}, **change})
    assert found.status_code == 422
    (detail,) = found.json()["detail"]
    assert detail["loc"] == location
    assert detail["msg"].endswith(".")


def test_another_model_is_404(url):
    found = post(url, {"state": "x", "questions": ASKED, "model": "other"})
    assert found.status_code == 404
    assert set(found.json()["detail"]) == {"error_type", "message"}


def test_many_clients_at_once_get_their_own_answers(url):
    states = [f"State number {i}." for i in range(12)]
    asked = {"q": ASKED["money"]}
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda s: post(url, {"state": s, "questions": asked}), states))
    model, tokenizer = load()
    for state, response in zip(states, found, strict=True):
        assert response.status_code == 200
        expected = decide(model, tokenizer, state, {"q": Noul(ASKED["money"]["instructions"])})
        assert response.json()["answers"]["q"]["noul"] == expected.answers["q"].p


def form(value, files, boundary="b0undary"):
    """A multipart body and its content type."""
    parts = [("request", "application/json", json.dumps(value).encode()), *files]
    lines = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n'
        f"Content-Type: {kind}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, kind, content in parts
    )
    return lines + f"--{boundary}--\r\n".encode(), f'multipart/form-data; boundary="{boundary}"'


def send(url, body, kind, **headers):
    return httpx2.post(
        f"{url}/v1/systemone",
        content=body,
        headers={"content-type": kind, **headers},
        timeout=PATIENCE,
    )


UPLOADED = {
    "state": "<image:1> See.",
    "questions": {"q": ASKED["money"]},
    "assets": {"<image:1>": {"type": "image", "part": "asset-0"}},
}


def test_a_picture_is_uploaded_beside_the_request(url):
    """Bytes with line breaks and dashes in them, as the same answer as in base64."""
    raw = base64.b64decode(picture("red"))
    sent = send(url, *form(UPLOADED, [("asset-0", "image/png", raw)]))
    assert sent.status_code == 200, sent.text
    inline = {"type": "image", "format": "png", "data_base64": picture("red")}
    placed = post(url, {**UPLOADED, "assets": {"<image:1>": inline}})
    assert sent.json()["answers"] == placed.json()["answers"]


def test_the_sdk_uploads_a_picture(url, tmp_path):
    path = tmp_path / "red.jpeg"
    Image.new("RGB", (64, 64), "red").save(path)
    with typesafe_sdk.TypeSafeClient(api_key="none", base_url=url, timeout=PATIENCE) as client:
        found = client.system_one(
            state=["See.", typesafe_sdk.Image(path)],
            questions={"q": typesafe_sdk.Noul(instructions="Is it red?")},
        )
    assert 0 <= found.nouls["q"].noul <= 1


def test_a_form_that_does_not_fit_is_refused(url):
    one, other = ("asset-0", "image/png", b"x"), ("other", "image/png", b"x")
    for value, files in (
        (UPLOADED, []),
        (UPLOADED, [one, other]),
        (UPLOADED, [one]),
        ({**UPLOADED, "assets": {}}, [one]),
        (UPLOADED, [one, one]),
        ([], [one]),
        (UPLOADED, [(f"p{i}", "image/png", b"x") for i in range(70)]),
    ):
        assert send(url, *form(value, files)).status_code == 422
    body, kind = form(UPLOADED, [one])
    assert send(url, body[:-4], kind).status_code == 422
    assert send(url, body, "multipart/form-data").status_code == 422
    assert send(url, b"", kind).status_code == 422
    assert send(url, body, kind, origin="http://evil.example").status_code == 415
    chat = httpx2.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": kind})
    assert chat.status_code == 415
