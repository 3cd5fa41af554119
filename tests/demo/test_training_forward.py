"""The one-pass training forward gives the reference model's logits."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "mlx_dgemma/demo/checkpoint"
sys.path.insert(0, str(ROOT / "examples/train_demo"))

from checkpoint import untrained  # noqa: E402
from data import Encoder  # noqa: E402
from network import Batch, Network  # noqa: E402
from train import soft_tokens, trainable  # noqa: E402
from transformers import DiffusionGemmaForBlockDiffusion  # noqa: E402

from mlx_dgemma.demo.tasks import PICTURE  # noqa: E402


@pytest.fixture(scope="module")
def reference():
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
    batch = Batch.of([prompts[0].tolist(), longer], canvases, network.shape)
    for signal, logits in ((None, None), (previous.softmax(-1), previous)):
        ours = network(batch, signal)
        for k in range(2):
            part = slice(32 * k, 32 * k + 32)
            given = {} if logits is None else {"self_conditioning_logits": logits[:1, part]}
            theirs = reference(input_ids=prompts, decoder_input_ids=canvases[:1, k], **given).logits
            assert (ours[:1, part] - theirs).abs().max() < 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_same_logits_with_a_picture():
    """Soft tokens in place of their placeholders, and each picture's see one another."""
    settings = json.loads((FOLDER / "config.json").read_text())
    model = untrained(settings).eval()
    encoder, examples = Encoder(FOLDER), PICTURE.held_out(3)
    assert len({(e.picture.width, e.picture.height) for e in examples}) > 1
    network = Network(trainable(model), settings)
    pixels = encoder.pixels([example.picture for example in examples])
    soft = soft_tokens(model, pixels)
    prompts = [encoder.prompt_of(e, n) for e, n in zip(examples, pixels.counts, strict=True)]
    canvases = torch.randint(settings["text_config"]["vocab_size"], (3, 2, 32))
    ours = network(Batch.of(prompts, canvases, network.shape, soft))
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        alone = encoder.pixels([example.picture])
        ids = torch.tensor([prompt])
        kinds = (ids == settings["image_token_id"]).long()
        masks = model.model.encoder.create_masks_for_generate(
            model.config.text_config,
            model.model.encoder.get_input_embeddings()(ids),
            torch.ones_like(ids),
            None,
            torch.arange(ids.shape[1])[None],
            kinds,
        )
        for k in range(2):
            theirs = model(
                input_ids=ids,
                pixel_values=alone.patches,
                image_position_ids=alone.positions,
                mm_token_type_ids=kinds,
                attention_mask=masks,
                decoder_input_ids=canvases[row : row + 1, k],
            ).logits
            part = ours[row, 32 * k : 32 * k + 32]
            assert (part - theirs[0]).abs().max() < 1e-4 * theirs.abs().max()
