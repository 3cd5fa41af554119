"""Builds the demo checkpoint's tokenizer: BPE with byte fallback and the real special tokens.

python examples/train_demo/tokenizer.py mlx_dgemma/demo/checkpoint
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from mlx_dgemma.demo.tasks import TASKS

VOCABULARY = 896
MARK = "▁"  # a space, as in every Gemma tokenizer

HEAD = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
CONTROL = [
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
]
CONTROL += ["<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"]
CONTROL += ["<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>"]
SPECIAL = HEAD + CONTROL
ROLES = {
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "boi_token": "<|image>",
    "eoa_token": "<audio|>",
    "eoc_token": "<channel|>",
    "eoi_token": "<image|>",
    "eot_token": "<turn|>",
    "escape_token": '<|"|>',
    "etc_token": "<tool_call|>",
    "etd_token": "<tool|>",
    "etr_token": "<tool_response|>",
    "image_token": "<|image|>",
    "soc_token": "<|channel>",
    "sot_token": "<|turn>",
    "stc_token": "<|tool_call>",
    "std_token": "<|tool>",
    "str_token": "<|tool_response>",
    "think_token": "<|think|>",
}
FORMAT_WORDS = [
    "system\n",
    "user\n",
    "model\n",
    "thought\n",
    "declaration:",
    "description:",
    "parameters:",
]
FORMAT_WORDS += [
    "properties:",
    "required:",
    "type:",
    "STRING",
    "OBJECT",
    "call:",
    "response:",
    "value:",
    "city:",
]


def corpus(examples_per_task: int = 4000) -> list[str]:
    """What the model reads and writes, without the special tokens."""
    rng = random.Random(0)
    texts = FORMAT_WORDS * examples_per_task
    for task in TASKS.values():
        for _ in range(examples_per_task):
            example = task.sample(rng)
            texts += [message["content"] for message in example.messages]
            texts.append(example.reply)
            for tool in example.tools or []:
                texts += [tool["function"]["name"] + "{", tool["function"]["description"]]
    for special in SPECIAL:
        texts = [text.replace(special, "\n") for text in texts]
    return texts


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """BPE inside words and runs of punctuation; digits, capitals and newlines stay alone."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", MARK)
    pieces = Regex(rf"{MARK}?[a-z]+|{MARK}?[^\sA-Za-z0-9_.\n{MARK}]+|[A-Z0-9_.\s{MARK}]")
    trained.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    alphabet = sorted({character for text in texts for character in text.replace(" ", MARK)})
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count, show_progress=False, initial_alphabet=alphabet
    )
    trained.train_from_iterator(texts, trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges][:count]


def build(texts: list[str]) -> Tokenizer:
    characters = ["\n", MARK, *(chr(code) for code in range(33, 127))]
    base = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    merges = learn_merges(texts, VOCABULARY - len(base))
    vocabulary = [*base, *dict.fromkeys(left + right for left, right in merges)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    model = models.BPE(
        vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    )
    return tokenizer


def settings() -> dict[str, object]:
    return {
        **ROLES,
        "backend": "tokenizers",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "extra_special_tokens": ["<|video|>"],
        "mask_token": "<mask>",
        "model_max_length": 8192,
        "model_specific_special_tokens": ROLES,
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "DiffusionGemma4Processor",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    build(corpus()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(), indent=2) + "\n")


if __name__ == "__main__":
    main()
