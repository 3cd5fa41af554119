"""The demo model's shape and its checkpoint folder in the published dialect.

python examples/train_demo/checkpoint.py mlx_dgemma/demo/checkpoint  # configs, untrained weights
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

HEADS = 4


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.token_to_id(token) for token in ("<eos>", "<turn|>", "<|tool_response>")]


def generation_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "confidence_threshold": 0.005,
        "eos_token_id": stop_ids(tokenizer),
        "max_denoising_steps": 48,
        "max_new_tokens": 256,
        "pad_token_id": 0,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "stability_threshold": 1,
        "t_max": 0.8,
        "t_min": 0.4,
        "transformers_version": "5.8.0.dev0",
    }


def model_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 64,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "max_position_embeddings": 8192,
        "model_type": "diffusion_gemma_text",
        "moe_intermediate_size": 64,
        "num_attention_heads": HEADS,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1e6,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": 64,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "vocab_size": tokenizer.get_vocab_size(),
    }
    vision = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "default_output_length": 70,
        "dtype": "bfloat16",
        "global_head_dim": 32,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 8192,
        "model_type": "gemma4_vision",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": True,
        "use_clipped_linears": False,
    }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "boi_token_id": tokenizer.token_to_id("<|image>"),
        "canvas_length": 32,
        "dtype": "bfloat16",
        "eoi_token_id": tokenizer.token_to_id("<image|>"),
        "eos_token_id": stop_ids(tokenizer),
        "generation_config": generation_settings(tokenizer),
        "image_token_id": tokenizer.token_to_id("<|image|>"),
        "initializer_range": 0.02,
        "model_type": "diffusion_gemma",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.8.0.dev0",
        "vision_config": vision,
        "vision_soft_tokens_per_image": 70,
    }


def processor_settings() -> dict[str, Any]:
    return {
        "image_processor": {
            "do_convert_rgb": True,
            "do_normalize": False,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_processor_type": "Gemma4ImageProcessor",
            "image_seq_length": 70,
            "image_std": [1.0, 1.0, 1.0],
            "max_soft_tokens": 70,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": 224, "width": 224},
        },
        "image_seq_length": 70,
        "processor_class": "DiffusionGemma4Processor",
    }


def untrained(settings: dict[str, Any], seed: int = 0) -> DiffusionGemmaForBlockDiffusion:
    """The reference model with every matrix drawn so that it keeps the size of its input."""
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(settings)).float()
    for name, value in model.named_parameters():
        if value.ndim >= 2 and "position_embedding_table" not in name:
            torch.nn.init.normal_(value, std=value.shape[-1] ** -0.5)
        if "position_embedding_table" in name:
            torch.nn.init.normal_(value, std=0.02)
    return model


def published_tensors(model: DiffusionGemmaForBlockDiffusion) -> dict[str, torch.Tensor]:
    """bf16 tensors under the published names, each tied weight once."""
    tensors = {}
    for name, value in model.state_dict().items():
        tied = name == "lm_head.weight" or (
            name.startswith("model.encoder.language_model.") and not name.endswith("layer_scalar")
        )
        if not tied:
            tensors[name] = value.detach().to(torch.bfloat16).contiguous().clone()
    return tensors


def write_settings(folder: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = model_settings(tokenizer)
    files = {
        "config.json": settings,
        "generation_config.json": generation_settings(tokenizer),
        "processor_config.json": processor_settings(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return settings


def write_weights(model: DiffusionGemmaForBlockDiffusion, folder: Path) -> None:
    save_file(
        published_tensors(model), str(folder / "model.safetensors"), metadata={"format": "pt"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_weights(untrained(write_settings(folder)), folder)


if __name__ == "__main__":
    main()
