"""The one-pass training forward gives the reference model's logits."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "mlx_dgemma/demo/checkpoint"
sys.path.insert(0, str(ROOT / "examples/train_demo"))

from network import Batch, Network  # noqa: E402
from transformers import DiffusionGemmaForBlockDiffusion  # noqa: E402


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(2)
    return DiffusionGemmaForBlockDiffusion.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.parametrize("length", [9, 63, 64, 100])
@torch.no_grad()
def test_same_logits_as_the_reference(reference, length):
    """Shorter and longer than the sliding window, beside a longer prompt that pads the row."""
    settings = json.loads((FOLDER / "config.json").read_text())
    vocabulary = settings["text_config"]["vocab_size"]
    network = Network(reference.state_dict(), settings)
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randint(vocabulary, shape, generator=generator)  # noqa: E731
    prompts, longer = draw(1, length), draw(length + 13).tolist()
    canvases = draw(2, 2, 32)
    previous = 4 * torch.randn(2, 64, vocabulary, generator=generator)
    batch = Batch.of([prompts[0].tolist(), longer], canvases, network.shape.window)
    for signal, logits in ((None, None), (previous.softmax(-1), previous)):
        ours = network(batch, signal)
        for k in range(2):
            part = slice(32 * k, 32 * k + 32)
            given = {} if logits is None else {"self_conditioning_logits": logits[:1, part]}
            theirs = reference(input_ids=prompts, decoder_input_ids=canvases[:1, k], **given).logits
            assert (ours[:1, part] - theirs).abs().max() < 1e-4 * theirs.abs().max()
