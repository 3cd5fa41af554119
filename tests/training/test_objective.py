"""The passes over a padded batch and the objective, against the obvious path and PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.kernels.gradients import gradients
from mlx_dgemma.training import loss as losses
from mlx_dgemma.training.batches import Batches, Noise
from mlx_dgemma.training.data import Example
from mlx_dgemma.training.export import to_peft
from mlx_dgemma.training.forward import Passes
from mlx_dgemma.training.loss import (
    Objective,
    cross_entropy,
    obvious_cross_entropy,
    signal,
    value_and_gradient,
)
from mlx_dgemma.training.tensor_files import write_tensors
from mlx_dgemma.training.tuning import (
    ATTENTION,
    DENSE,
    EXPERTS,
    SELF_CONDITIONING,
    WEIGHTS,
    Tuning,
    attach,
    trained,
    write_config,
)

CANVAS, VOCABULARY = 8, 97
LENGTHS = ((5, 8), (21, 16), (3, 24), (30, 8))  # prompt, response; the window is 16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from random_checkpoint import Dims, write

    return write(tmp_path_factory.mktemp("base"), Dims(canvas=CANVAS))


@pytest.fixture
def model(base):
    return load_model(base, lazy=True, dtype=mx.float32)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    examples = [
        Example(*(rng.integers(3, VOCABULARY, count).astype(np.int32) for count in pair))
        for pair in LENGTHS
    ]
    made = Batches(examples, len(examples), Noise(CANVAS, VOCABULARY), seed=5).at(0)
    assert 0 < made.conditioned.sum() < len(examples)
    return made


def randomized(model, tuning):
    attach(model, tuning)
    mx.random.seed(1)
    drawn = [(name, mx.random.normal(t.shape) * 0.1) for name, t in trained(model).items()]
    model.load_weights(drawn, strict=False)
    return model


def test_a_padded_batch_is_the_network_that_inference_uses(model, batch):
    passes = Passes(model)
    encoded, context = passes.encode(batch)
    soft = mx.random.normal((4, CANVAS, model.config.text.hidden_size), key=mx.random.key(2))
    hidden = passes.decode(mx.array(batch.noisy), batch.starts, context, soft)
    for row in range(4):
        cache = model.make_cache()
        alone = model.encode(batch.tokens[row, : batch.lengths[row]], cache)
        assert mx.allclose(encoded[row, : batch.lengths[row]], alone[0], atol=1e-4)
        cache = model.make_cache()
        model.prefill(batch.tokens[row, : batch.starts[row]], cache)
        alone = model.hidden(mx.array(batch.noisy[row : row + 1]), cache, soft[row : row + 1])
        assert mx.allclose(hidden[row], alone[0], atol=1e-4)


def test_the_signal_is_the_obvious_one_and_zero_where_there_is_none(model, batch):
    passes = Passes(model)
    _, context = passes.encode(batch)
    sure = np.arange(4) == batch.conditioned.argmax()
    found = signal(passes, replace(batch, sure=sure), context, temperature=0.8)
    hidden = passes.decode(mx.array(batch.noisier), batch.starts, context, None)
    divisors = mx.array(np.where(sure, 0.8, 1).astype(np.float32))[:, None, None]
    obvious = model.soft_embeddings(model.softcap(model.raw_logits(hidden)) / divisors)
    for row, conditioned in enumerate(batch.conditioned):
        expected = obvious[row] if conditioned else mx.zeros_like(obvious[row])
        assert mx.allclose(found[row], expected, atol=1e-4)


@pytest.mark.parametrize("certainty", [None, mx.arange(13) % 3 * 1.5])
def test_cross_entropy_in_pieces_is_the_whole_with_its_gradient(model, monkeypatch, certainty):
    monkeypatch.setattr(losses, "HEAD_BYTES", 4 * 5 * VOCABULARY)
    hidden = mx.random.normal((13, model.config.text.hidden_size), key=mx.random.key(0))
    likeliest = model.raw_logits(hidden).argmax(axis=-1)
    targets = mx.where(mx.arange(13) % 2 == 0, likeliest, mx.arange(13) * 7 % VOCABULARY)
    weights = mx.random.uniform(shape=(13,), key=mx.random.key(1))
    values = []
    for function in (cross_entropy, obvious_cross_entropy):
        part = partial(function, model, targets=targets, weights=weights, certainty=certainty)
        values.append(mx.value_and_grad(part)(hidden))
    assert values[0][0].item() == pytest.approx(values[1][0].item(), rel=1e-5)
    assert mx.allclose(values[0][1], values[1][1], atol=1e-6)


KEYS = ATTENTION + DENSE + SELF_CONDITIONING
TUNINGS = {
    "linear": Tuning(rank=3, scale=2.0, keys=KEYS),
    "experts": Tuning(rank=2, scale=2.0, keys=("self_attn.q_proj", EXPERTS)),
    "dora": Tuning("dora", rank=2, scale=1.0, keys=ATTENTION),
    "last layers": Tuning(rank=2, num_layers=2, keys=DENSE),
    "full": Tuning("full", num_layers=1),
}


@pytest.mark.parametrize("kind", TUNINGS)
def test_checkpointed_layers_give_the_same_gradients(model, batch, kind):
    if kind == "full":
        attach(model, TUNINGS[kind])
    else:
        randomized(model, TUNINGS[kind])
    results = []
    for checkpoint in (False, True):
        passes = Passes(model, checkpoint=checkpoint)
        results.append(value_and_gradient(passes, Objective())(batch))
    (one, _), (other, _) = results[0][0], results[1][0]
    assert one.item() == pytest.approx(other.item(), rel=1e-5)
    first, again = (dict(tree_flatten(result[1])) for result in results)
    assert set(first) == set(trained(model)) == set(again)
    assert any(mx.abs(g).max().item() > 1e-4 for g in first.values())
    for name, gradient in first.items():
        assert mx.allclose(gradient, again[name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_gradients_and_losses_are_those_of_transformers_and_peft(
    model, base, batch, kind, tmp_path
):
    """One delta that acts in both passes gets the sum of what PEFT's two copies get."""
    import torch
    from peft import PeftModel
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    randomized(model, TUNINGS[kind])
    write_config(tmp_path, TUNINGS[kind])
    write_tensors(tmp_path / WEIGHTS, trained(model), {})
    to_peft(tmp_path, tmp_path / "peft")
    network = DiffusionGemmaForBlockDiffusion.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float32
    )
    network.set_experts_implementation("eager")
    wrapped = PeftModel.from_pretrained(network, tmp_path / "peft", is_trainable=True)
    wrapped.train(False)
    # the signal is given to both, so that it is the same
    passes = Passes(model)
    with gradients():
        _, context = passes.encode(batch)
        soft = signal(passes, batch, context)
    parts = torch_losses(wrapped, batch, np.array(soft))
    sum(parts).backward()

    (total, ours), slopes = value_and_gradient(passes, Objective())(batch)
    for mine, theirs in zip(ours.tolist(), parts, strict=True):
        assert mine == pytest.approx(theirs.item(), rel=1e-4)
    assert total.item() == pytest.approx(sum(ours.tolist()), rel=1e-5)
    found = dict(tree_flatten(slopes))
    reference = peft_gradients(wrapped, found)
    assert set(reference) == set(found)
    for name, gradient in found.items():
        error = np.linalg.norm(np.array(gradient) - reference[name])
        assert error < 1e-4 * np.linalg.norm(reference[name]), (name, error)
    assert max(np.abs(g).max() for g in reference.values()) > 1e-2


def torch_losses(wrapped, batch, soft):
    """Canvas and encoder loss by transformers' forward passes, an example at a time."""
    import torch
    import torch.nn.functional as functional
    from transformers import DynamicCache

    network = wrapped.get_base_model()
    cap = network.final_logit_softcapping

    def logits(hidden):
        return torch.tanh(network.lm_head(hidden) / cap) * cap

    canvas, encoder = 0.0, 0.0
    decoder = network.model.decoder
    for row in range(len(batch.tokens)):
        length, start = int(batch.lengths[row]), int(batch.starts[row])
        tokens = torch.tensor(batch.tokens[row : row + 1, :length]).long()
        cache = DynamicCache(config=network.config.text_config)
        read = network.model.encoder(
            input_ids=tokens, past_key_values=cache, position_ids=torch.arange(length)[None]
        )
        learned = torch.tensor(batch.learned[row, : length - 1])
        encoder = encoder + functional.cross_entropy(
            logits(read.last_hidden_state[0, :-1])[learned], tokens[0, 1:][learned], reduction="sum"
        )
        cache = DynamicCache(config=network.config.text_config)
        network.model.encoder(
            input_ids=tokens[:, :start],
            past_key_values=cache,
            position_ids=torch.arange(start)[None],
        )
        hooked = decoder.self_conditioning.register_forward_pre_hook(
            lambda _, inputs, r=row: (inputs[0], torch.tensor(soft[r : r + 1])),
        )
        given = torch.zeros(1, CANVAS, VOCABULARY)
        denoised = network(
            past_key_values=cache,
            decoder_input_ids=torch.tensor(batch.noisy[row : row + 1]).long(),
            decoder_position_ids=torch.arange(start, start + CANVAS)[None],
            self_conditioning_logits=given,
        ).logits
        hooked.remove()
        canvas = canvas + functional.cross_entropy(
            denoised[0], torch.tensor(batch.clean[row]).long(), reduction="sum"
        )
    return canvas * batch.canvas_weight, encoder * batch.encoder_weight


def peft_gradients(wrapped, names):
    """By our names: the sum of the gradients of PEFT's copies, in our layout."""
    experts = 8
    found = {}
    for key, parameter in wrapped.named_parameters():
        if "lora_" not in key:
            continue
        module = key.removeprefix("base_model.model.").split(".lora_")[0]
        module = module.replace("model.encoder.language_model.layers.", "model.decoder.layers.")
        side = "a" if ".lora_A." in key else "b"
        gradient = parameter.grad.numpy()
        if module.endswith((".experts", ".experts.base_layer")):
            inner = module.endswith(".base_layer")
            which = ".gate_up_proj" if inner else ".down_proj"
            module = module.removesuffix(".base_layer") + which
            if side == "a":
                gradient = gradient.reshape(experts, -1, gradient.shape[-1])
            else:
                gradient = gradient.reshape(len(gradient), -1, experts).transpose(2, 0, 1)
        else:
            gradient = gradient.T
        name = f"{module}.lora_{side}"
        found[name] = found.get(name, 0) + gradient
    return found
