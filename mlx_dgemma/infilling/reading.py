"""From a denoised canvas to the text in one hole, token by token."""

from __future__ import annotations

from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.infilling.filled import Filling, TokenInfo
from mlx_dgemma.infilling.template import Slot
from mlx_dgemma.prompt import Tokenizer


def read_filling(
    tokenizer: Tokenizer, edges: tuple[str, str], slot: Slot, result: BlockResult, at: int
) -> Filling:
    """A hole's text, without the literal text that its edges (left, right) took over.

    at: where the hole begins in the whole text, in characters.
    """
    ids = result.ids[slot.start : slot.end].tolist()
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.feed([token]) for token in ids]
    pieces[-1] += detokenizer.finish()
    whole = "".join(pieces)
    low, high = len(edges[0]), len(whole) - len(edges[1])
    tokens: list[TokenInfo] = []
    end = 0
    for offset, piece in enumerate(pieces, start=slot.start):
        start, end = end, end + len(piece)
        visible = min(max(start, low), high), min(max(end, low), high)
        assert result.scores is not None
        tokens.append(
            TokenInfo(
                text=whole[visible[0] : visible[1]],
                span=(at + visible[0] - low, at + visible[1] - low),
                logprob=float(result.scores.logprobs[offset]),
                entropy=float(result.entropy[offset]),
                settled=int(result.settled[offset]),
            )
        )
    text = whole[low:high]
    return Filling(text, (at, at + len(text)), slot.end - slot.start, tuple(tokens))
