"""Names that no file can have, wherever one is given: one sentence, never the system's error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mlx_dgemma import generate, load
from mlx_dgemma.checkpoint.hub import repository_id
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.inspection import inspect
from mlx_dgemma.convert.verify import verify
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import CheckpointError, DGemmaError, ModelNotFoundError
from mlx_dgemma.headers import read_weight_map
from mlx_dgemma.replaying import replay

NAMES = ("a" * 300, "a/" * 3000, "a\0b", "x/" + "a" * 300, "./" + "a" * 300, "~" + "a" * 300)
Demo = tuple[Any, Any]
USES: dict[str, Callable[[Demo, str], Any]] = {
    "load": lambda demo, name: load(name),
    "adapter": lambda demo, name: load(adapter_path=name),
    "source": lambda demo, name: convert(name, "never"),
    "target": lambda demo, name: convert(CHECKPOINT, f"/tmp/{name}", dry_run=True),
    "verify": lambda demo, name: verify(name),
    "inspect": lambda demo, name: inspect(name),
    "image": lambda demo, name: generate(*demo, "a", images=[name], max_tokens=1),
    "trace": lambda demo, name: generate(*demo, "a", trace=name, max_tokens=1),
    "replay": lambda demo, name: replay(*demo, name),
    "cache": lambda demo, name: PromptCache.load(name, demo[0]),
    "saved cache": lambda demo, name: PromptCache(demo[0]).save(name),
}


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load()


@pytest.mark.parametrize("use", USES)
def test_a_name_that_no_file_can_have(
    use: str, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        if use == "target" and name.startswith("~"):
            continue  # a folder of that name is possible: it would be made
        with pytest.raises(DGemmaError) as raised:
            USES[use](demo, name)
        assert str(raised.value).endswith("."), (name[:20], str(raised.value))


def test_a_weight_map_names_files_that_can_be(tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "\u00e9" * 200}}))
    with pytest.raises(CheckpointError, match="no file of its folder"):
        read_weight_map(index)


IDS = ("a/b..c", "a/b--c", "a/b-", "a./b", "a/b.git", "a/\u00e9", "a/" + "b" * 97, "a/" + "b" * 96,
       "A-1/b_2.c", "a/b")  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_ids_of_repositories_are_those_that_the_hub_takes(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        with pytest.raises(ModelNotFoundError, match="There is no folder"):
            repository_id(name)
    else:
        assert repository_id(name) == name
