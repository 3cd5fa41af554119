"""The training forward: prompt and canvases in one pass over the reference model's own weights.

The encoder and the decoder share every weight but the layer scalars, and a decoder layer attends to
the same layer of the encoder. So a row [prompt | canvas 1 | ... | canvas K] goes through the layers
once, under a mask that lets the prompt see itself causally and every canvas see the prompt and
itself. tests/demo/test_training_forward.py compares this with the reference class.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: tuple[int, ...]  # by layer
    head_dim: tuple[int, ...]
    sliding: tuple[bool, ...]
    window: int
    experts: int
    top_k: int
    canvas: int
    softcap: float
    image_token: int

    @classmethod
    def of(cls, settings: dict) -> "Shape":
        text = settings["text_config"]
        sliding = tuple(kind == "sliding_attention" for kind in text["layer_types"])
        pick = lambda local, everywhere: tuple(text[local if s else everywhere] for s in sliding)  # noqa: E731
        return cls(
            hidden=text["hidden_size"],
            heads=text["num_attention_heads"],
            kv_heads=pick("num_key_value_heads", "num_global_key_value_heads"),
            head_dim=pick("head_dim", "global_head_dim"),
            sliding=sliding,
            window=text["sliding_window"],
            experts=text["num_experts"],
            top_k=text["top_k_experts"],
            canvas=settings["canvas_length"],
            softcap=text["final_logit_softcapping"],
            image_token=settings["image_token_id"],
        )


@dataclass
class Batch:
    """ids and positions [B, L], masks [B, 1, L, L] by layer kind."""

    ids: Tensor
    positions: Tensor
    full_mask: Tensor
    sliding_mask: Tensor
    prompt: int  # width of the prompt part
    pictures: Tensor | None  # [soft tokens, hidden], in the order of their placeholders

    @classmethod
    def of(
        cls,
        prompts: list[list[int]],
        canvases: Tensor,
        shape: Shape,
        pictures: Tensor | None = None,
    ) -> "Batch":
        """canvases [B, K, C]; prompts are padded on the right, and nothing sees the padding.

        pictures: what stands for the image placeholders, one run of them a picture.
        """
        B, K, C = canvases.shape  # noqa: N806
        P = -(-max(map(len, prompts)) // 2) * 2  # noqa: N806
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = torch.zeros(B, P, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        positions = torch.cat(
            [torch.arange(P).expand(B, P), (lengths[:, None] + torch.arange(C)).repeat(1, K)], 1
        )
        at = torch.arange(P + K * C)
        query, key = at[:, None], at[None, :]
        owner = torch.where(at < P, -1, (at - P) // C)
        causal = ((owner[:, None] == -1) & (key <= query))[None]
        near = causal & (query - key < shape.window)
        if pictures is not None:  # the soft tokens of a picture see one another
            soft = F.pad(padded == shape.image_token, (1, K * C))
            run = (soft[:, 1:] & ~soft[:, :-1]).cumsum(-1).masked_fill(~soft[:, 1:], -1)
            together = (run[:, :, None] == run[:, None, :]) & (run >= 0)[:, :, None]
            causal, near = causal | together, near | together
        same_canvas = (owner[:, None] == owner[None, :]) & (owner[:, None] >= 0)
        known = (key < P)[None] & (at[None, None, :] < lengths[:, None, None])  # real prompt keys
        from_canvas = (owner >= 0)[None, :, None]
        full = causal | same_canvas[None] | (from_canvas & known)
        recent = at[None, None, :] > (lengths[:, None, None] - shape.window)
        sliding = near | same_canvas[None] | (from_canvas & known & recent)
        return cls(
            torch.cat([padded, canvases.reshape(B, K * C)], 1),
            positions,
            full[:, None],
            sliding[:, None],
            P,
            pictures,
        )


def rope_tables(
    shape: Shape, settings: dict, length: int = 512
) -> dict[bool, tuple[Tensor, Tensor]]:
    """cos and sin [length, head_dim] for sliding (True) and full (False) layers."""
    tables = {}
    parameters = settings["text_config"]["rope_parameters"]
    for layer, sliding in enumerate(shape.sliding):
        dim = shape.head_dim[layer]
        spec = parameters["sliding_attention" if sliding else "full_attention"]
        rates = spec["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
        turning = int(spec.get("partial_rotary_factor", 1.0) * dim // 2)
        rates = torch.where(torch.arange(dim // 2) < turning, rates, 0.0)
        angles = torch.arange(length).float()[:, None] * rates
        tables[sliding] = (
            torch.cat([angles, angles], -1).cos(),
            torch.cat([angles, angles], -1).sin(),
        )
    return tables


def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return scaled if weight is None else scaled * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def project(x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv: int, dim: int, w: list[Tensor]):
    """x [N, hidden] -> q [N, heads, dim], k and v [N, kv, dim]; full layers have no v_proj."""
    input_norm, q_norm, k_norm, q_proj, k_proj, *v_proj = w
    x = norm(x, input_norm)
    q = rotate(norm(F.linear(x, q_proj).view(-1, heads, dim), q_norm), cos[:, None], sin[:, None])
    raw = F.linear(x, k_proj).view(-1, kv, dim)
    k = rotate(norm(raw, k_norm), cos[:, None], sin[:, None])
    v = norm(F.linear(x, v_proj[0]).view(-1, kv, dim) if v_proj else raw)
    return q, k, v


def before_experts(x: Tensor, mixed: Tensor, w: list[Tensor]):
    """Attention output to residual, dense branch, expert input and router scores."""
    o_proj, post_attention, pre_ff, gate, up, down, post_ff1, pre_ff2, scale, router = w
    x = x + norm(F.linear(mixed, o_proj), post_attention)
    h = norm(x, pre_ff)
    dense = norm(
        F.linear(F.gelu(F.linear(h, gate), approximate="tanh") * F.linear(h, up), down), post_ff1
    )
    scores = F.linear(norm(x) * (scale * x.shape[-1] ** -0.5), router)
    return x, dense, norm(x, pre_ff2), scores


def experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows sorted by expert, one product per expert; x [N, H], index and weight [N, k]."""
    N, k = index.shape  # noqa: N806
    flat = index.reshape(-1)
    order = torch.argsort(flat)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    rows = x.index_select(0, order // k)
    outputs = []
    for expert, part in enumerate(rows.split(counts)):
        gate, up = F.linear(part, gate_up[expert]).chunk(2, -1)
        outputs.append(F.linear(F.gelu(gate, approximate="tanh") * up, down[expert]))
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    out = torch.cat(outputs).index_select(0, back).view(N, k, -1)
    return (out * weight[..., None]).sum(1)


def after_experts(
    x: Tensor, dense: Tensor, mixed: Tensor, scalar: Tensor, w: list[Tensor]
) -> Tensor:
    post_ff2, post_ff = w
    return (x + norm(dense + norm(mixed, post_ff2), post_ff)) * scalar


def compile_rows(function, rows: int):
    """Compiles for any number of rows in the first `rows` arguments."""
    torch._dynamo.config.recompile_limit = 64
    fast = torch.compile(function, dynamic=None)

    def call(*arguments):
        for argument in arguments[:rows]:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
        return fast(*arguments)

    return call


class Network:
    """The forward over a dictionary of float32 tensors named as in the checkpoint."""

    def __init__(self, weights: Weights, settings: dict, compiled: bool = False):
        self.weights = weights
        self.shape = Shape.of(settings)
        self.rope = rope_tables(self.shape, settings)
        wrap = compile_rows if compiled else (lambda function, rows: function)
        self.project, self.before = wrap(project, 3), wrap(before_experts, 2)
        self.after = wrap(after_experts, 4)
        self.balance: list[Tensor] = []

    def _of(self, prefix: str, names: str) -> list[Tensor]:
        return [
            self.weights[prefix + name + (".weight" if "." not in name else "")]
            for name in names.split()
        ]

    def embed(self, batch: Batch, signal: Tensor | None) -> Tensor:
        """signal [B, K*C, vocabulary]: probabilities of the previous step, zero rows for none."""
        w = self.weights
        table = w["model.decoder.embed_tokens.weight"]
        root = self.shape.hidden**0.5
        x = F.embedding(batch.ids, table) * root
        prompt, canvas = x[:, : batch.prompt], x[:, batch.prompt :]
        if batch.pictures is not None:
            soft = (batch.ids[:, : batch.prompt] == self.shape.image_token)[..., None]
            prompt = prompt.masked_scatter(soft, batch.pictures)
        if signal is not None:
            pre, gate, up, down = self._of(
                "model.decoder.self_conditioning.", "pre_norm gate_proj up_proj down_proj"
            )
            soft = norm(signal @ table * root, pre)
            canvas = canvas + F.linear(
                F.gelu(F.linear(soft, gate), approximate="tanh") * F.linear(soft, up), down
            )
        return torch.cat([prompt, norm(canvas)], 1)

    def __call__(self, batch: Batch, signal: Tensor | None = None) -> Tensor:
        """Logits after the softcap for the canvases, [B, K*C, vocabulary]."""
        s, w = self.shape, self.weights
        B, L = batch.ids.shape  # noqa: N806
        in_canvas = (torch.arange(L) >= batch.prompt).float().repeat(B)[:, None]
        x = self.embed(batch, signal).reshape(B * L, -1)
        flat_positions = batch.positions.reshape(-1)
        tables = {
            kind: (cos[flat_positions], sin[flat_positions])
            for kind, (cos, sin) in self.rope.items()
        }
        self.balance = []
        for layer, sliding in enumerate(s.sliding):
            p = f"model.decoder.layers.{layer}."
            cos, sin = tables[sliding]
            names = "input_layernorm self_attn.q_norm.weight self_attn.k_norm.weight"
            names += (
                " self_attn.q_proj.weight self_attn.k_proj.weight"
                + " self_attn.v_proj.weight" * sliding
            )
            kv, dim = s.kv_heads[layer], s.head_dim[layer]
            q, k, v = self.project(x, cos, sin, s.heads, kv, dim, self._of(p, names))
            q, k, v = (t.view(B, L, -1, dim).transpose(1, 2) for t in (q, k, v))
            k, v = (t.repeat_interleave(s.heads // kv, 1) for t in (k, v))
            mask = batch.sliding_mask if sliding else batch.full_mask
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
            mixed = mixed.transpose(1, 2).reshape(B * L, -1)
            names = "self_attn.o_proj.weight post_attention_layernorm pre_feedforward_layernorm"
            names += " mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"
            names += " post_feedforward_layernorm_1"
            names += " pre_feedforward_layernorm_2 router.scale router.proj.weight"
            x, dense, h, scores = self.before(x, mixed, self._of(p, names))
            chosen, index = scores.topk(s.top_k, -1)
            self.balance.append(scores)
            share = chosen.softmax(-1) * w[p + "router.per_expert_scale"][index]
            routed = experts(
                h, index, share, w[p + "experts.gate_up_proj"], w[p + "experts.down_proj"]
            )
            encoder = w[f"model.encoder.language_model.layers.{layer}.layer_scalar"]
            scalar = encoder + (w[p + "layer_scalar"] - encoder) * in_canvas
            x = self.after(
                x,
                dense,
                routed,
                scalar,
                self._of(p, "post_feedforward_layernorm_2 post_feedforward_layernorm"),
            )
        canvas = x.view(B, L, -1)[:, batch.prompt :]
        logits = (
            norm(canvas, w["model.decoder.norm.weight"]) @ w["model.decoder.embed_tokens.weight"].T
        )
        return torch.tanh(logits / s.softcap) * s.softcap
