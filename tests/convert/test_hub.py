"""Sources on the Hub, against a stub: download, resume, refusals, headers by range request."""

import json
from collections import namedtuple
from pathlib import Path

import pytest

from mlx_dgemma.convert import convert
from mlx_dgemma.convert.inspection import inspect
from mlx_dgemma.errors import CheckpointError, ModelNotFoundError, ResourceError
from tests.hub.conftest import hub  # noqa: F401 (a fixture)

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
    with pytest.raises(ResourceError, match="GB"):
        convert(NAME, tmp_path / "out", quantize=True)
    assert not any(asked.path.endswith(".safetensors") for asked in stub.downloads())


def test_inspect_reads_headers_only(stub, checkpoint):
    found = inspect(NAME)
    local = inspect(checkpoint)
    assert found.rows == local.rows
    assert found.total_size == local.total_size
    weights = [asked for asked in stub.downloads() if asked.path.endswith(".safetensors")]
    assert weights
    assert all(asked.range and int(asked.range.split("-")[1]) < 200_000 for asked in weights)


def test_inspect_without_weights(hub):  # noqa: F811
    hub.add("someone/empty", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(CheckpointError, match="llama"):
        inspect("someone/empty")
    with pytest.raises(ModelNotFoundError, match="no Hub id"):
        inspect("no such folder")
