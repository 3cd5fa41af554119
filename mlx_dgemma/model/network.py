"""The network: an encoder pass that extends the context, a decoder pass that denoises canvases.

Nothing here knows about sampling, schedules or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma import kernels
from mlx_dgemma.distributed.team import Leader, Team
from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.files import reading_weights
from mlx_dgemma.kernels.row_statistics import softcapped
from mlx_dgemma.model.backbone import Backbone, Layer
from mlx_dgemma.model.canvas_subset import Held
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.context import ContextCache
from mlx_dgemma.model.fingerprint import fingerprint
from mlx_dgemma.model.masks import image_blocks
from mlx_dgemma.model.passes import AHEAD, Begun, EncoderPass, is_sent
from mlx_dgemma.model.prompt_ids import chunks, token_ids
from mlx_dgemma.model.rope import RopeTables
from mlx_dgemma.model.share import Share
from mlx_dgemma.model.shared_context import SharedContext
from mlx_dgemma.model.vision import FeatureCache, ImagePatches

CHUNK = 2048  # prompt tokens per encoder pass


class Model(nn.Module):
    """DiffusionGemma. `load_model` fills it; `dtype` is what activations are computed in.

    sqrt(hidden) is rounded to that dtype before it multiplies an embedding, as the reference does
    when it is loaded in it: 53.0 in bfloat16, 53.066 in float32, for the published width.

    In float16 the residual stream stays in float32, since it can pass 65,504: float16 is for the
    operands of matrix products alone, which come from norms.
    """

    def __init__(self, config: ModelConfig, dtype: mx.Dtype = mx.float32, team: Team | None = None):
        """team: the processes that hold this model together; here rank 0's is the whole model to
        its users, and the others' take part in what rank 0 asks (model/following.py)."""
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.residual_dtype = mx.float32 if dtype == mx.float16 else dtype
        self.team = team
        self.number = 0  # by which the other ranks know it
        self.share = None if team is None else Share(team.rank, team.size)
        # The config of what this process holds.
        self.local = config if self.share is None else self.share.config(config)
        self.model = Backbone(self.local.text, self.local.vision, dtype)
        for layer in self.model.decoder.layers:
            layer.team = team
        root = mx.array(config.text.hidden_size**0.5, dtype)
        self.embed_scale: float = root.astype(mx.float32).tolist()  # type: ignore[assignment]
        self.rope = RopeTables(config.text, dtype)
        self._seen = FeatureCache()
        self.encoder_pass = EncoderPass()
        # Set by `load_model`: replaces the vision tower's tensors by unread ones.
        self.reread_vision: Callable[[Model], None] | None = None

    @property
    def layers(self) -> list[Layer]:
        """The text layers, as mlx-lm's tools look for them."""
        layers: list[Layer] = self.model.decoder.layers
        return layers

    # The obvious path, and the contract

    def make_cache(self, kv_bits: int | None = None) -> ContextCache:
        """An empty context of this model; kv_bits=8 keeps what grows of it in 8 bits."""
        text = self.config.text
        windows = [text.window_of(index) for index in range(text.num_hidden_layers)]
        slack = self.config.canvas_length
        if isinstance(self.team, Leader):
            return SharedContext(windows, slack, self.fingerprint, kv_bits, self.team, self.number)
        return ContextCache(windows, slack, self.fingerprint, kv_bits)

    def prefill(
        self,
        ids: mx.array | np.ndarray | Sequence[int] | Sequence[Sequence[int]],
        cache: ContextCache,
        images: Sequence[ImagePatches] | None = None,
        chunk_size: int = CHUNK,
        cancelled: Callable[[], bool] | None = None,
        *,
        dispatch: bool = True,
    ) -> None:
        """Extend the context by ids int [1, S] or [S], causally, in chunks that end on multiples of
        `chunk_size`, so that a reused prefix was computed exactly as a fresh one would be.

        images: one per run of image tokens, in order; a chunk never cuts a run. cancelled:
            asked before every chunk; reading ends when it says so. dispatch: see `hidden`.

        Raises InputError for ids of another shape, outside the vocabulary, or whose image tokens
        do not fit the images; CheckpointError for images without a vision tower.
        """
        tokens = token_ids(ids, self.config.text.vocab_size)
        blocks = self._image_blocks(tokens, images)
        if cancelled is not None and cancelled():
            return
        soft = self._soft_tokens(blocks, images)
        cache.expect(tokens.size)
        for start, stop in chunks(cache.offset, tokens.size, chunk_size, blocks):
            if cancelled is not None and cancelled():
                return
            part = None if blocks is None else blocks[start:stop]
            x = self._embed(tokens[start:stop], part, soft)
            self.through_encoder(x, cache, part, whole=False, dispatch=dispatch)
            evaluate = mx.eval if stop < tokens.size else mx.async_eval
            evaluate(cache.arrays)
            mx.clear_cache()

    def encode(
        self,
        ids: mx.array | np.ndarray | Sequence[int] | Sequence[Sequence[int]],
        cache: ContextCache,
        images: Sequence[ImagePatches] | None = None,
        *,
        dispatch: bool = False,
    ) -> mx.array:
        """[1, S, H] after the final norm: the encoder pass's hidden states at every position.

        Extends the context as `prefill` does, but in one pass and, unless `dispatch` is set,
        without evaluating anything, so that gradients flow through it. `raw_logits` and `softcap`
        give its logits. Raises what `prefill` raises.
        """
        tokens = token_ids(ids, self.config.text.vocab_size)
        blocks = self._image_blocks(tokens, images)
        x = self._embed(tokens, blocks, self._soft_tokens(blocks, images))
        cache.expect(tokens.size)
        x = self.through_encoder(x, cache, blocks, whole=True, dispatch=dispatch)
        return self._final(x)

    def denoise(
        self,
        canvas: mx.array,
        cache: ContextCache,
        self_conditioning_logits: mx.array | None = None,
    ) -> mx.array:
        """float32 logits [B, C, V] after the softcap, for canvases int [B, C].

        self_conditioning_logits: the previous step's tempered logits [B, C, V]; None on a
            block's first step.
        """
        soft = None
        if self_conditioning_logits is not None:
            soft = self.soft_embeddings(self_conditioning_logits)
        return self.softcap(self.raw_logits(self.hidden(canvas, cache, soft)))

    # Its pieces

    def hidden(
        self,
        canvas: mx.array,
        cache: ContextCache,
        soft_embeddings: mx.array | None = None,
        *,
        held: Held | None = None,
        begun: Begun | None = None,
        dispatch: bool = False,
    ) -> mx.array:
        """[B, C, H] after the final norm. Reads the context, commits nothing to it.

        held: where the canvases' keys and values are kept, and the positions to compute, for
            [B, S, H]: the others are seen as they were last computed, and nothing else is done
            with them. None keeps nothing and computes all.
        begun: what `begin` returned for the same arguments. dispatch: the graph is sent to the
            device piece by piece, which begins while Python builds the rest; otherwise all
            evaluation is left to the caller.
        """
        if begun is None:
            begun = self._entered(canvas, soft_embeddings, held)
        through = self.through_decoder(begun, len(self.layers), cache, dispatch=dispatch)
        return self._final(through.x)

    def begin(
        self,
        canvas: mx.array,
        cache: ContextCache,
        soft_embeddings: mx.array | None = None,
        *,
        held: Held | None = None,
    ) -> Begun:
        """Sends the first layers of the pass that `hidden` completes to the device, and returns
        while it works on them."""
        entered = self._entered(canvas, soft_embeddings, held)
        last = min(AHEAD, len(self.layers))
        return self.through_decoder(entered, last, cache, dispatch=True)

    def await_context(self, cache: ContextCache, length: int) -> None:
        """Waits until the device has written the context that canvases of `length` positions come
        after, and prepares meanwhile what the host adds to their first layer.

        A canvas' keys are written after the context's. Were these still being read, MLX would copy
        the whole buffer first.
        """
        self.rope.span(cache.offset, length)
        mx.eval(cache.arrays)

    def raw_logits(self, hidden: mx.array) -> mx.array:
        """[B, C, V] of the tied head, in the activation dtype, before float32 and softcap."""
        return self.model.decoder.embed_tokens.logits(hidden)

    def softcap(self, raw_logits: mx.array) -> mx.array:
        """float32 [..., V]."""
        cap = self.config.text.final_logit_softcapping
        return softcapped(raw_logits.astype(mx.float32), cap)

    def soft_embeddings(self, tempered_logits: mx.array) -> mx.array:
        """[B, C, H]: the mean embedding under softmax(tempered logits), times sqrt(hidden)."""
        logits = tempered_logits.astype(self.dtype).astype(mx.float32)
        probabilities = mx.softmax(logits, axis=-1).astype(self.dtype)
        mixed = self.model.decoder.embed_tokens.mix(probabilities)
        return mixed.astype(self.dtype) * self.embed_scale

    def embedding_rows(self, ids: mx.array) -> mx.array:
        """[..., H]: rows of the embedding table, unscaled."""
        return self.model.decoder.embed_tokens.rows(ids, self.dtype)

    def embedded(self, ids: mx.array) -> mx.array:
        """[..., H]: the rows times sqrt(hidden), as they enter the residual stream."""
        return self.embedding_rows(ids).astype(self.residual_dtype) * self.embed_scale

    @property
    def embedding_matrix(self) -> kernels.Matrix:
        """The embedding table as the fused operations take it."""
        return self.model.decoder.embed_tokens.matrix(self.dtype)

    def image_features(self, image: ImagePatches) -> mx.array:
        """[soft tokens, H] of one image, as they replace the image tokens' embeddings."""
        encoder = self.model.encoder
        # Unread weights are read first: otherwise a GPU waits for the disk during its work.
        with reading_weights("The vision tower"):
            mx.eval(encoder.vision_tower.parameters(), encoder.embed_vision.parameters())
        return encoder.embed_vision(encoder.vision_tower(image, self.dtype)).astype(self.dtype)

    def release_vision(self) -> None:
        """Free the vision tower's memory; the next image reads it from the files again."""
        if self.reread_vision is not None:
            self.reread_vision(self)
            mx.clear_cache()

    def prepare(self) -> None:
        """Join q/k/v and gate/up into one matrix each, and free the originals.

        The encoder's last layer needs keys and values alone, so that layer stays as it is.
        """
        decoder = self.model.decoder
        for layer in decoder.layers:
            layer.mlp.prepare()
            if layer is not decoder.layers[-1]:
                layer.self_attn.prepare()
        if "self_conditioning" in decoder:  # which rank 0 alone has
            decoder.self_conditioning.prepare()

    def fingerprint(self) -> str:
        """Identifies config, text weights and dtype; computed once."""
        known = getattr(self, "_fingerprint", None)
        if known is None:
            text = {"decoder": self.model.decoder, "encoder": self.model.encoder.language_model}
            for index, layer in enumerate(self.encoder_pass.layers or ()):
                text[f"encoder pass {index}"] = layer
            known = self._fingerprint = fingerprint(self.local.text, self.dtype, text)
        return known

    def _entered(
        self, canvas: mx.array, soft_embeddings: mx.array | None, held: Held | None
    ) -> Begun:
        if held is not None and held.subset is not None:
            canvas = held.subset.take(canvas)
            soft_embeddings = None if soft_embeddings is None else held.subset.take(soft_embeddings)
        conditioning = self.model.decoder.self_conditioning
        return Begun(conditioning.condition(self.embedded(canvas), soft_embeddings), 0, held)

    def through_decoder(
        self, begun: Begun, last: int, cache: ContextCache, *, dispatch: bool
    ) -> Begun:
        """The decoder pass up to and with its layer number `last`, which counts from 1.

        Of a model that several processes hold, all are asked to do the same, and the work is begun:
        whether or not its result is read, the others do theirs.
        """
        x, first, held = begun
        if isinstance(cache, SharedContext):
            x = cache.shared_decode(x, first, last, held)
        subset = None if held is None else held.subset
        rope = self.rope.span(cache.offset, x.shape[1] if subset is None else subset.length)
        if subset is not None:
            rope = {kind: subset.tables(table) for kind, table in rope.items()}
        for index in range(first, last):
            layer, hold = self.layers[index], None
            if held is not None:
                hold = partial(held.keys.hold, index, subset=held.subset)
            x = layer.decode(x, rope[layer.kind], cache.layers[index], hold)
            if dispatch and is_sent(index + 1):
                mx.async_eval(x)
        if self.team is not None:
            mx.async_eval(x)
        return Begun(x, last, held)

    # The encoder pass

    def through_encoder(
        self,
        x: mx.array,
        cache: ContextCache,
        blocks: np.ndarray | None,
        *,
        whole: bool,
        dispatch: bool,
    ) -> mx.array:
        """The pass over the residual stream x [1, L, H]. Without `whole` the last layer gives its
        keys and values alone, which is all that the context keeps, and the result is what enters
        it. As `through_decoder` where several processes hold the model."""
        if not self.config.text.bidirectional_images:
            blocks = None
        if isinstance(cache, SharedContext):
            ranges = None if blocks is None else blocks.tolist()
            x = cache.shared(x, "encode", blocks=ranges, whole=whole)
        scalars = self.model.encoder.language_model.layers
        rope = self.rope.span(cache.offset, x.shape[1])
        through = None if whole else -1
        layers = self.encoder_pass.layers or self.layers
        read = zip(layers[:through], scalars[:through], cache.layers[:through], strict=True)
        for index, (layer, scalar, context) in enumerate(read, 1):
            x = layer.encode(x, rope[layer.kind], context, blocks, scalar.layer_scalar)
            if dispatch and is_sent(index):
                mx.async_eval(x)
        if not whole:
            last = layers[-1]
            last.self_attn.extend(last.attention_input(x), rope[last.kind], cache.layers[-1])
        if self.team is not None:
            mx.async_eval(x, cache.arrays)
        return x

    def _final(self, x: mx.array) -> mx.array:
        """The residual stream after the final norm, in the activation dtype."""
        normed: mx.array = self.model.decoder.norm(x)
        return normed.astype(self.dtype)

    def _embed(
        self, tokens: np.ndarray, blocks: np.ndarray | None, soft: list[mx.array]
    ) -> mx.array:
        embedded = self.embedded(mx.array(tokens))
        if blocks is not None:
            for block in np.unique(blocks[blocks >= 0]):
                first, count = int(np.argmax(blocks == block)), int((blocks == block).sum())
                embedded[first : first + count] = soft[block]
        return embedded[None]

    def _image_blocks(
        self, tokens: np.ndarray, images: Sequence[ImagePatches] | None
    ) -> np.ndarray | None:
        if not images:
            return None
        if self.config.vision is None:
            raise CheckpointError("This checkpoint has no vision tower, so it cannot read images.")
        blocks = image_blocks(tokens == self.config.image_token_id)
        if blocks.max(initial=-1) + 1 != len(images):
            raise InputError(
                f"The prompt has {blocks.max(initial=-1) + 1} image placeholders "
                f"for {len(images)} images; they must match."
            )
        return blocks

    def _soft_tokens(
        self, blocks: np.ndarray | None, images: Sequence[ImagePatches] | None
    ) -> list[mx.array]:
        if blocks is None:
            return []
        soft = [self._seen.get(image, self.image_features) for image in images or ()]
        for index, tokens in enumerate(soft):
            expected = int((blocks == index).sum())
            if tokens.shape[0] != expected:
                raise InputError(
                    f"Image {index + 1} gives {tokens.shape[0]} soft tokens, but the prompt has "
                    f"{expected} placeholders for it."
                )
        return soft
