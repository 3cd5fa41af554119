"""A small task for lm-evaluation-harness, of the demo model's own questions; nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

LETTERS = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["###"], max_gen_toks: 64, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""
CHOICES = """
task: orders
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""
WORDS = ("CANVAS", "ORANGE", "WINDOW", "GARDEN")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task files `letters` (written replies) and `orders` (multiple choice)."""
    folder = tmp_path_factory.mktemp("tasks")
    replies = [{"question": f"Reverse the letters {w}", "answer": w[::-1]} for w in WORDS]
    ways = [{"question": f"Reverse the letters {w}", "choices": [w, w[::-1]], "label": 1}
            for w in WORDS]  # fmt: skip
    for name, text, rows in (("letters", LETTERS, replies), ("orders", CHOICES, ways)):
        data = folder / f"{name}.json"
        data.write_text(json.dumps(rows))
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm-eval and its data sets keep to this machine, and to a folder of the tests'."""
    cache = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        if importlib.util.find_spec("datasets"):
            patch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))  # where it is imported
        yield
