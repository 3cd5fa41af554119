"""Sources and targets on the Hub, against a stub: download, resume, upload, refusals, headers."""

import json
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dgemma.cli.convert import main
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.inspection import inspect
from mlx_dgemma.convert.verify import verify
from mlx_dgemma.errors import CheckpointError, InputError, ModelNotFoundError, ResourceError
from tests.checkpoint.conftest import hub, point_to  # noqa: F401 (a fixture)

NAME = "someone/diffusion"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def stub(hub, checkpoint):  # noqa: F811
    hub.add(NAME, {**contents(checkpoint), "original/consolidated.pth": b"x" * 1000})
    return hub


def test_a_repository_is_converted_like_its_folder(stub, checkpoint, tmp_path):
    report = convert(NAME, tmp_path / "out", quantize=True)
    convert(checkpoint, tmp_path / "local", quantize=True)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()
    commit = stub.repositories[NAME].commit("main")
    assert report.revision == commit
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {NAME}" in card
    assert commit in card
    assert not any("consolidated" in asked.path for asked in stub.downloads())


def test_a_broken_download_goes_on(stub, checkpoint, tmp_path):
    stub.repositories[NAME].break_after = 50_000
    convert(NAME, tmp_path / "out")
    asked = [asked for asked in stub.downloads() if asked.path.endswith("model.safetensors")]
    assert len(asked) == 2
    convert(checkpoint, tmp_path / "local")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("out", "local"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_revision_by_name(stub, checkpoint, tmp_path):
    stub.add(NAME, {**contents(checkpoint), "tokenizer_config.json": b'{"v": 2}'}, revision="v2")
    report = convert(NAME, tmp_path / "out", quantize=True, revision="v2")
    assert report.revision == stub.repositories[NAME].commit("v2")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"v": 2}
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        convert(NAME, tmp_path / "none", quantize=True, revision="v9")


def test_gated_private_and_unreachable(stub, checkpoint, tmp_path):
    stub.add("someone/gated", contents(checkpoint), gated=True)
    stub.add("someone/private", contents(checkpoint), token="secret")
    for name in ("someone/gated", "someone/private", "someone/absent"):
        for look in (lambda name: convert(name, tmp_path / "out", quantize=True), inspect):
            with pytest.raises(ModelNotFoundError) as caught:
                look(name)
            assert "\n" not in str(caught.value)
            assert name in str(caught.value)
    stub.down = True
    with pytest.raises(ModelNotFoundError):
        convert("someone/other", tmp_path / "out", quantize=True)
    assert not list(tmp_path.glob("out*"))


def test_disk_for_the_output_is_checked_before_the_download(stub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 50_000_000))
    with pytest.raises(ResourceError, match="MB are needed and 50 MB are free"):
        convert(NAME, tmp_path / "out", quantize=True)
    assert not any(asked.path.endswith(".safetensors") for asked in stub.downloads())


def test_a_target_that_is_taken_is_found_before_the_download(stub, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists; choose another"):
        convert(NAME, tmp_path / "out", quantize=True)
    assert not any(asked.path.endswith(".safetensors") for asked in stub.downloads())


@pytest.mark.parametrize("look", [inspect, lambda name: convert(name, "out", quantize=True)])
def test_an_unreachable_hub_is_said_at_once(look, stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    point_to("http://127.0.0.1:9", monkeypatch)
    began = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        look("someone/other")
    assert time.monotonic() - began < 20  # a download would try for half a minute


def test_inspect_reads_headers_only(stub, checkpoint):
    found = inspect(NAME)
    local = inspect(checkpoint)
    assert found.rows == local.rows
    assert found.total_size == local.total_size
    weights = [asked for asked in stub.downloads() if asked.path.endswith(".safetensors")]
    assert weights
    assert all(asked.range and int(asked.range.split("-")[1]) < 200_000 for asked in weights)


def test_a_dry_run_reads_headers_only(stub, checkpoint, tmp_path, capsys):
    planned = convert(NAME, tmp_path / "out", recipe="mxfp4", dry_run=True)
    weights = [asked for asked in stub.downloads() if asked.path.endswith(".safetensors")]
    assert weights
    assert all(asked.range and int(asked.range.split("-")[1]) < 200_000 for asked in weights)
    assert not (tmp_path / "out").exists()
    written = convert(NAME, tmp_path / "out", recipe="mxfp4")
    assert replace(planned, seconds=0, written=True) == replace(written, seconds=0)
    assert main(["--hf-path", NAME, "--mlx-path", str(tmp_path / "two"), "-d", "--dry-run"]) == 2
    assert f"{NAME} is not quantized" in capsys.readouterr().err


def test_offline_the_cached_copy_is_looked_at(stub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        inspect(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    online, planned = inspect(NAME), convert(NAME, "out", quantize=True, dry_run=True)
    convert(NAME, tmp_path / "out", quantize=True)
    asked = len(stub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert inspect(NAME) == online
    again = convert(NAME, "out", quantize=True, dry_run=True)
    assert replace(again, seconds=0) == replace(planned, seconds=0)
    assert len(stub.requests) == asked


def test_a_hub_file_of_a_foreign_dtype(hub, checkpoint):  # noqa: F811
    header = json.dumps(
        {"model.norm.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    ).encode()
    file = len(header).to_bytes(8, "little") + header + b"x"
    hub.add(NAME, {**contents(checkpoint), "model.safetensors": file})
    with pytest.raises(CheckpointError, match='dtype "F4"'):
        inspect(NAME)


def test_inspect_without_weights(hub):  # noqa: F811
    hub.add("someone/empty", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(CheckpointError, match="llama"):
        inspect("someone/empty")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no such folder", "There is no folder no such folder; give"),
        ("README.md", "README.md is a file"),
        ("~nobody-of-this-name/model", "cannot be opened"),
        ("x" * 300, "cannot be opened: File name too long"),
    ],
)
@pytest.mark.parametrize("look", [["inspect"], ["verify"], ["--dry-run", "--hf-path"]])
def test_names_that_are_neither_folder_nor_repository(
    look, name, said, stub, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("README.md").touch()
    assert main([*look, name]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not stub.requests


@pytest.fixture
def writable(hub, monkeypatch):  # noqa: F811
    """The stub, to which the token "mine" may write under "me"; large files go by Git LFS."""
    hub.writers = {"mine": "me"}
    monkeypatch.setenv("HF_TOKEN", "mine")
    # Where hf-xet is installed huggingface-hub sends large files by a protocol of its own.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub


def test_the_result_is_uploaded(writable, checkpoint, tmp_path, capsys):
    flags = ["--hf-path", str(checkpoint), "--mlx-path", str(tmp_path / "out"), "-q", "--json"]
    assert main([*flags, "--upload-repo", "mine"]) == 0
    assert json.loads(capsys.readouterr().out)["uploaded_to"] == "me/mine"
    assert writable.repositories["me/mine"].files("main") == contents(tmp_path / "out")
    verified = convert("me/mine", tmp_path / "back", dequantize=True)
    assert verified.revision == writable.repositories["me/mine"].commit("main")


def test_an_upload_sends_what_is_not_there_yet(writable, checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out", quantize=True, upload_repo="me/mine")
    sent = [asked for asked in writable.requests if asked.method == "PUT"]
    assert len(sent) == 1
    convert(checkpoint, tmp_path / "again", quantize=True, upload_repo="me/mine")
    assert [asked for asked in writable.requests if asked.method == "PUT"] == sent


@pytest.mark.parametrize(
    ("repository", "token", "reason"),
    [
        ("me/mine", None, "does not know who you are (401), log in with `hf auth login`"),
        ("me/mine", "stolen", "does not know who you are (401)"),
        ("them/theirs", "mine", "may not write there (403)"),
        ("me/two words", "mine", "Repo id must"),
    ],
)
def test_an_upload_that_is_refused(
    repository, token, reason, writable, checkpoint, tmp_path, monkeypatch, capsys
):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    flags = ["--hf-path", str(checkpoint), "--mlx-path", str(tmp_path / "out"), "-q"]
    assert main([*flags, "--upload-repo", repository]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said
    assert f"hf upload {repository}" in said
    assert not writable.objects
    assert verify(tmp_path / "out", forward=False).ok


def test_an_upload_to_a_hub_that_is_not_there(writable, checkpoint, tmp_path, monkeypatch):
    writable.down = True
    with pytest.raises(ResourceError, match="the Hub answered 503"):
        convert(checkpoint, tmp_path / "out", upload_repo="me/mine")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match="cannot be reached"):
        convert(checkpoint, tmp_path / "two", upload_repo="me/mine")
