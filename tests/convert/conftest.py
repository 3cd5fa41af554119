"""Small random checkpoints in every form the converter reads, made without PyTorch."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.benchmark.synthetic import published_config, with_layers
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.parameters import parameter_shapes

ROOT = Path(__file__).parents[2]
for path in (ROOT / "studies", ROOT / "tests" / "oracles"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

ASSETS = ROOT.parent / "shared" / "assets" / "checkpoint-4bit"


def small_config():
    """The published settings in small; every quantized width is a multiple of 64, as there."""
    config = with_layers(published_config(), 6)
    config |= {"canvas_length": 8, "image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92}
    config["eos_token_id"] = [1, 2]
    config["text_config"] |= {
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "top_k_experts": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "sliding_window": 16,
        "max_position_embeddings": 4096,
    }
    config["vision_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 72,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 32,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 16,
    }
    return config


def random_tensors(config, seed=0):
    """Name -> float32 array in the Hugging Face layout, values that bfloat16 holds exactly."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, (shape, _) in parameter_shapes(ModelConfig.from_dict(config), "hf").items():
        values = generator.standard_normal(shape).astype(np.float32)
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        values = values * np.float32(scale) + np.float32(1.0 if len(shape) == 1 else 0.0)
        tensors[name] = np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32))
    return tensors


def write_checkpoint(folder, config, tensors, dtype=mx.bfloat16, shards=1):
    """Save tensors as one file or as shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "tokenizer_config.json").write_text("{}")
    names = list(tensors)
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        files = {
            f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards]
            for i in range(shards)
        }
        index = {"metadata": {}, "weight_map": {n: f for f, ns in files.items() for n in ns}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        arrays = {name: mx.array(tensors[name]).astype(dtype) for name in held}
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "pt"})
    return folder


@pytest.fixture
def config():
    return small_config()


@pytest.fixture(scope="session")
def tensors():
    return random_tensors(small_config())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tensors):
    """A bfloat16 checkpoint in the Hugging Face layout, one file, published dialect."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", small_config(), tensors)


@pytest.fixture(scope="session")
def write():
    return write_checkpoint


@pytest.fixture(scope="session")
def assets():
    if not ASSETS.exists():
        pytest.skip("the real checkpoint's config and index are not beside this clone")
    return ASSETS


@pytest.fixture(scope="session")
def read_tensors():
    """All tensors of a checkpoint folder by name."""

    def read(folder):
        found = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            found.update(mx.load(str(path)))
        return found

    return read


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    """Waiting for the disk is most of a small conversion's time and proves nothing here."""
    monkeypatch.setattr("os.fsync", lambda _: None)
