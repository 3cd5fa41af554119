"""Schemas as zod 4 writes them: every text that their languages hold satisfies them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mlx_dgemma import Constraint
from tests.constraints.test_schemas import tokenizer, walk

NODE = Path(__file__).parents[1] / "server/node"

if shutil.which("node") is None:
    pytest.skip("node is not installed", allow_module_level=True)
if not (NODE / "node_modules" / "zod").is_dir():
    pytest.skip(f"run npm install --prefix {NODE}", allow_module_level=True)


def test_every_text_satisfies_what_zod_wrote() -> None:
    written = subprocess.run(
        ["node", "schemas.mjs"], cwd=NODE, capture_output=True, text=True, timeout=120, check=True
    )
    schemas: list[Any] = json.loads(written.stdout)
    assert len(schemas) == 9
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for schema in schemas:
        language = Constraint.json_schema(schema).language(tokenizer(), len(tokenizer()))
        assert not language.unchecked, schema
        for seed in range(10):
            value = json.loads(walk(language, random.Random(seed)))
            jsonschema.validate(value, schema, format_checker=checker)
