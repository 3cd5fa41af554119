"""One small whole file of every kind, for `damaged_files.py` to damage."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any


def build(whole: Path) -> None:
    """One whole file of every kind."""
    import mlx.core as mx

    from mlx_dgemma import load, stream_generate
    from mlx_dgemma.benchmark.synthetic import published_config, with_layers
    from mlx_dgemma.context.prompt_cache import PromptCache
    from mlx_dgemma.convert import convert
    from mlx_dgemma.demo import CHECKPOINT
    from mlx_dgemma.model.config import ModelConfig
    from mlx_dgemma.model.parameters import parameter_shapes

    config = _small(with_layers(published_config(), 2))
    model = whole / "model"
    model.mkdir(parents=True)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in (*names, "generation_config.json", "processor_config.json"):
        shutil.copyfile(CHECKPOINT / name, model / name)
    processor = json.loads((model / "processor_config.json").read_text())
    text = json.dumps(processor)
    text = re.sub(r'"patch_size": \d+', '"patch_size": 4', text)
    text = re.sub(r'"pooling_kernel_size": \d+', '"pooling_kernel_size": 2', text)
    (model / "processor_config.json").write_text(text)
    (model / "config.json").write_text(json.dumps(config))
    tensors = {
        name: mx.random.normal(shape).astype(mx.bfloat16) * 0.05
        for name, (shape, _) in parameter_shapes(ModelConfig.from_dict(config), "hf").items()
    }
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[number % 2] for number, name in enumerate(tensors)}
    for shard in shards:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        mx.save_safetensors(str(model / shard), held, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": weight_map})
    )
    convert(model, whole / "packed", recipe="4bit")
    _write_adapter(whole / "adapter", tensors)
    demo = load()
    cache = PromptCache(demo[0])
    demo[0].prefill(list(range(3, 40)), cache.cache)
    cache.mark(list(range(3, 40)))
    cache.save(whole / "cache.safetensors")
    for _ in stream_generate(*demo, "Hello", max_tokens=8, seed=1, trace=whole / "trace.json"):
        pass


def _small(config: dict[str, Any]) -> dict[str, Any]:
    """The published settings in small; every quantized width is a multiple of 64, as there."""
    config |= {"canvas_length": 8, "image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92}
    config["text_config"] |= {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "sliding_window": 16,
        "max_position_embeddings": 4096,
        # As transformers writes the full layer's shape.
        "per_layer_config": {"1": {"head_dim": 64, "num_key_value_heads": 1}},
    }
    config["vision_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 72,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 16,
    }
    return config


def _write_adapter(folder: Path, tensors: dict[str, Any]) -> None:
    import mlx.core as mx

    folder.mkdir()
    pairs = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "mlp.up_proj.weight")) and "decoder" in name:
            rows, columns = tensor.shape
            a, b = mx.random.normal((2, columns)) * 0.1, mx.random.normal((rows, 2)) * 0.1
            for side in ("decoder", "encoder.language_model"):
                module = name.removesuffix(".weight").replace("decoder", side)
                lora = f"base_model.model.{module}.lora_"
                pairs |= {f"{lora}A.weight": a, f"{lora}B.weight": b}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), pairs)
    mlx = folder.with_name("mlx")
    mlx.mkdir()
    turned = {
        name.removeprefix("base_model.model.").removesuffix(".weight").lower(): matrix.T
        for name, matrix in pairs.items()
        if ".encoder." not in name
    }
    mx.save_safetensors(str(mlx / "adapters.safetensors"), turned)
    (mlx / "adapter_config.json").write_text(
        json.dumps(
            {
                "fine_tune_type": "lora",
                "num_layers": 2,
                "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0},
            }
        )
    )
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 3, r"layers\.0\.mlp\.up_proj": 2},
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
