"""From a name to a folder: what is asked first, what is fetched, and what a failure says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_dgemma.checkpoint import hub as module
from mlx_dgemma.checkpoint.hub import demo_path, resolve_model
from mlx_dgemma.checkpoint.known_repositories import KNOWN_REPOSITORIES
from mlx_dgemma.cli.generate import main as generate
from mlx_dgemma.errors import InputError, ModelNotFoundError, ResourceError
from mlx_dgemma.machine.hardware import machine
from tests.checkpoint.conftest import point_to
from tests.checkpoint.stub import HubStub, Sparse

NAME = "someone/tiny-diffusion"
INDEX = {
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
}
FILES = {
    "config.json": b'{"model_type": "diffusion_gemma"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": b"second",
}
NOT_NEEDED = {
    "README.md": b"card",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"a copy in another layout",
    "onnx/model.safetensors": b"another format",
}


def with_memory(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(module, "machine", lambda: replace(machine(), memory=memory))


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path


def test_nothing_is_the_demo() -> None:
    assert resolve_model(None) == demo_path()
    assert (demo_path() / "config.json").is_file()


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nowhere", "/nowhere"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str, hub: HubStub) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no folder"):
        resolve_model(name)
    assert hub.requests == []


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelNotFoundError, match="is a file; give the folder"):
        resolve_model(file)


def test_only_the_needed_files_come(hub: HubStub) -> None:
    hub.add(NAME, {**FILES, **NOT_NEEDED})
    folder = resolve_model(NAME)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == bytes(range(256)) * 40


def test_the_cache_serves_the_second_time(hub: HubStub) -> None:
    hub.add(NAME, FILES)
    first = resolve_model(NAME)
    count = len(hub.downloads())
    assert resolve_model(NAME) == first
    assert len(hub.downloads()) == count


def test_an_interrupted_download_resumes(hub: HubStub) -> None:
    # huggingface-hub writes in pieces of 10 MB; one must be on the disk when the line breaks.
    big = bytes(range(256)) * 90_000
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": big}, break_after=15_000_000)
    folder = resolve_model(NAME)
    assert (folder / "model.safetensors").read_bytes() == big
    resumed = [asked.range for asked in hub.downloads() if asked.range]
    assert any(int(text.removeprefix("bytes=").split("-")[0]) > 0 for text in resumed)


def test_a_revision_is_honoured(hub: HubStub) -> None:
    hub.add(NAME, FILES)
    hub.add(NAME, {**FILES, "config.json": b'{"old": 1}'}, revision="v1")
    assert (resolve_model(NAME, revision="v1") / "config.json").read_bytes() == b'{"old": 1}'
    assert (resolve_model(NAME) / "config.json").read_bytes() == FILES["config.json"]
    commit = hub.repositories[NAME].commit("v1")
    assert resolve_model(NAME, revision=commit).name == commit


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder on this machine and has no revision v1"):
        resolve_model(tmp_path, revision="v1")


def test_an_unknown_revision(hub: HubStub) -> None:
    hub.add(NAME, FILES)
    with pytest.raises(ModelNotFoundError, match="has no revision 'nope'"):
        resolve_model(NAME, revision="nope")


def test_an_unknown_repository(hub: HubStub) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no repository someone/else"):
        resolve_model("someone/else")


def test_a_private_repository_needs_the_token(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, FILES, token="hf_secret")
    with pytest.raises(ModelNotFoundError, match="or it is private"):
        resolve_model(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelNotFoundError, match="private and your token"):
        resolve_model(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (resolve_model(NAME) / "config.json").is_file()


def test_a_gated_repository(hub: HubStub) -> None:
    hub.add(NAME, FILES, gated=True)
    with pytest.raises(ModelNotFoundError, match="is gated: accept its terms"):
        resolve_model(NAME)


def test_a_hub_that_does_not_answer(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        resolve_model(NAME)


def test_without_the_hub_a_complete_copy_serves(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, FILES)
    folder = resolve_model(NAME)
    point_to("http://127.0.0.1:9", monkeypatch)
    assert resolve_model(NAME) == folder


def test_a_hub_in_trouble(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    hub.down = True
    with pytest.raises(ModelNotFoundError, match=r"answered 503|cannot be reached"):
        resolve_model(NAME)


def test_offline_mode_asks_nobody(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    folder = resolve_model(NAME)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME) == folder
    with pytest.raises(ModelNotFoundError, match=r"not in the local Hub cache .* HF_HUB_OFFLINE"):
        resolve_model("someone/else")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"lacks model-00002-of-00002.safetensors"):
        resolve_model(NAME)
    assert len(hub.requests) == asked


def test_offline_a_whole_snapshot_serves_whatever_refs_say(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, FILES)
    folder = resolve_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # Another program fetched the config of a newer commit, and nothing else.
    newer = folder.parent / ("f" * 40)
    newer.mkdir()
    (newer / "config.json").write_bytes((folder / "config.json").read_bytes())
    main = folder.parents[1] / "refs" / "main"
    main.write_text(newer.name)
    assert resolve_model(NAME) == folder
    main.unlink()
    main.parent.rmdir()
    assert resolve_model(NAME) == folder
    with pytest.raises(ModelNotFoundError):
        resolve_model(NAME, revision="main")


def test_a_plan_needs_no_weights(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (demo_path() / "config.json").read_bytes()
    hub.add(NAME, {"config.json": config, "model.safetensors": Sparse(16_542_844_632)})
    assert generate(["--model", NAME, "--dry-run"]) == 0
    assert f"{NAME} needs 40 MB (5 MB weights" in capsys.readouterr().out
    assert [asked.path.rsplit("/", 1)[-1] for asked in hub.downloads()] == ["config.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert generate(["--model", NAME, "--dry-run"]) == 0


def test_a_full_disk_refuses_before_the_first_byte(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": Sparse(16_542_844_632)})
    with_memory(monkeypatch, 64 << 30)
    usage = type("Usage", (), {"free": 10_000_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"16\.5 GB more on the disk and 10\.0 GB is free"):
        resolve_model(NAME)
    assert hub.downloads() == []


def test_too_little_memory_refuses_before_the_first_byte(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": Sparse(51_647_562_456)})
    with_memory(monkeypatch, 24 << 30)
    with pytest.raises(ResourceError, match=r"needs 52\.7 GB .*-5bit fits \(20\.5 GB\)"):
        resolve_model(NAME)
    with_memory(monkeypatch, 16 << 30)
    with pytest.raises(ResourceError, match=r"the smallest, .*-mxfp4, needs 16\.9 GB"):
        resolve_model(NAME)
    assert hub.downloads() == []


def test_converting_does_not_ask_for_memory(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    with_memory(monkeypatch, 1000)
    assert (resolve_model(NAME, to_load=False) / "config.json").is_file()


def test_repositories_that_are_no_models(hub: HubStub) -> None:
    hub.add(NAME, {"README.md": b"card"})
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        resolve_model(NAME)
    hub.add(NAME, {"config.json": b"{}", "model.gguf": b"gguf"})
    with pytest.raises(ModelNotFoundError, match="has no safetensors files"):
        resolve_model(NAME)
    hub.add(NAME, {name: FILES[name] for name in list(FILES)[:4]})
    with pytest.raises(ModelNotFoundError, match=r"index names model-00002-of-00002.safetensors"):
        resolve_model(NAME)


def test_a_read_only_cache(hub: HubStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache's folder should be")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(blocked))
    with pytest.raises(ResourceError, match="cannot be written to"):
        resolve_model(NAME)


def test_the_table_of_repositories() -> None:
    table = {known.id: known for known in KNOWN_REPOSITORIES}
    assert table["mlx-community/diffusiongemma-26B-A4B-it-4bit"].weight_bytes == 16_542_844_632
    assert len(table) == len(KNOWN_REPOSITORIES)
    assert all(known.memory_bytes > known.weight_bytes for known in KNOWN_REPOSITORIES)
