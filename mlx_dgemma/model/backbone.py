"""The modules that hold the weights: layers, decoder, encoder, named as in the checkpoint.

Both passes share every weight except the layers' scalars.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma import kernels
from mlx_dgemma.distributed.team import Team
from mlx_dgemma.kernels import BranchNorms, Epsilons, Norms
from mlx_dgemma.kernels.gradients import rms_norm
from mlx_dgemma.model.attention import Attention, Hold
from mlx_dgemma.model.config import TextConfig, VisionConfig
from mlx_dgemma.model.experts import Experts, Router
from mlx_dgemma.model.layer_context import LayerContext
from mlx_dgemma.model.layers import Embedding, GatedMLP
from mlx_dgemma.model.rope import Table
from mlx_dgemma.model.vision import VisionProjection, VisionTower


class Layer(nn.Module):
    """Attention, then a dense and an expert branch side by side.

    The residual stream may be wider than `dtype`, in which every matrix product runs.

    team: the processes that hold this layer's weights together; each computes its heads and its
    columns of the branches, and what they give is summed: twice a layer, before the norms.
    """

    def __init__(self, text: TextConfig, index: int, dtype: mx.Dtype):
        super().__init__()
        self.team: Team | None = None
        eps = self.eps = text.rms_norm_eps
        self.dtype = dtype
        hidden = text.hidden_size
        self.kind = text.layer_types[index]
        self.self_attn = Attention(text, index)
        self.mlp = GatedMLP(hidden, text.intermediate_size)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, eps)
        self.router = Router(text, dtype)
        self.experts = Experts(text)
        self.post_feedforward_layernorm_1 = nn.RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps)
        self.layer_scalar = mx.zeros((1,))
        self.unit = 1.0  # of the branches' outputs (see model.float16)

    def encode(
        self,
        x: mx.array,
        rope: Table,
        context: LayerContext,
        blocks: np.ndarray | None,
        scalar: mx.array,
    ) -> mx.array:
        """Encoder pass of x [1, L, H]; its keys and values enter the context."""
        mixed = self.self_attn.encode(self.attention_input(x), rope, context, blocks)
        return self.feed_forward(x, mixed, scalar)

    def decode(
        self, x: mx.array, rope: Table, context: LayerContext, hold: Hold | None = None
    ) -> mx.array:
        """Decoder pass of canvases x [B, C, H], which see the context and themselves; hold: see
        Attention.decode."""
        mixed = self.self_attn.decode(self.attention_input(x), rope, context, hold)
        return self.feed_forward(x, mixed, self.layer_scalar)

    def attention_input(self, x: mx.array) -> mx.array:
        """[B, L, H] in the activation dtype: the norm of the residual stream x [B, L, H]."""
        return rms_norm(x, self.input_layernorm.weight, self.eps).astype(self.dtype)

    def feed_forward(self, x: mx.array, mixed: mx.array, scalar: mx.array) -> mx.array:
        """What leaves the layer that x entered, from attention's output `mixed`, both [B, L, H]:
        the two branches side by side, the router on the raw residual. scalar: the pass' own, [1].
        """
        norms = Norms(
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            self.pre_feedforward_layernorm_2.weight,
            self.router.scale,
        )
        flat = x.reshape(-1, x.shape[-1])
        mixed = mixed.reshape(flat.shape)
        if self.team is not None:
            (mixed,) = self.team.sum(mixed)
        read = kernels.after_attention(flat, mixed, norms, self.eps)
        after = BranchNorms(
            self.post_feedforward_layernorm_1.weight,
            self.post_feedforward_layernorm_2.weight,
            self.post_feedforward_layernorm.weight,
        )
        dense = self.mlp(read.dense)
        routed = self.experts(read.experts, self.router(read.router, self.team))
        if self.team is not None:
            dense, routed = self.team.sum(dense, routed)
        eps = Epsilons(self.eps, self.eps / self.unit**2)
        out = kernels.after_branches(read.residual, dense, routed, after, scalar, eps)
        return out.reshape(x.shape)


class SelfConditioning(GatedMLP):
    """The previous step's prediction, as soft embeddings, added to the canvas embeddings."""

    def __init__(self, text: TextConfig):
        nn.Module.__init__(self)
        self.eps = text.rms_norm_eps
        self.pre_norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self._declare(text.hidden_size, text.intermediate_size)

    def condition(self, embedded: mx.array, soft: mx.array | None) -> mx.array:
        """[B, C, H]: norm of `embedded` plus the signal of the soft embeddings, [B, C, H] each;
        without them (a first step) of embedded alone."""
        if soft is not None:
            embedded = embedded + self(rms_norm(soft, self.pre_norm.weight, self.eps))
        return rms_norm(embedded, None, self.eps)


class Decoder(nn.Module):
    """Every text weight; the encoder pass uses them too."""

    def __init__(self, text: TextConfig, dtype: mx.Dtype):
        super().__init__()
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size)
        self.layers = [Layer(text, index, dtype) for index in range(text.num_hidden_layers)]
        self.norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.self_conditioning = SelfConditioning(text)


class LayerScalar(nn.Module):
    """The one number per layer that the encoder does not share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.zeros((1,))


class EncoderText(nn.Module):
    def __init__(self, text: TextConfig):
        super().__init__()
        self.layers = [LayerScalar() for _ in range(text.num_hidden_layers)]


class Encoder(nn.Module):
    def __init__(self, text: TextConfig, vision: VisionConfig | None):
        super().__init__()
        self.language_model = EncoderText(text)
        if vision is not None:
            self.vision_tower = VisionTower(vision)
            self.embed_vision = VisionProjection(vision, text.hidden_size)


class Backbone(nn.Module):
    """Everything that a checkpoint stores; it says what tensors there are and how large."""

    def __init__(self, text: TextConfig, vision: VisionConfig | None, dtype: mx.Dtype):
        super().__init__()
        self.decoder = Decoder(text, dtype)
        self.encoder = Encoder(text, vision)
