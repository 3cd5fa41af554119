"""Adapters: read in PEFT's and mlx-lm's form, put beside the weights, or merged into them.

PEFT sees the encoder's and the decoder's copy of one tied weight as two modules and trains a
delta for each, or for one of them; mlx-lm's form was trained on the shared weight, so its delta
acts in both passes. Loaded adapters stay beside the weights, each in its pass. Only where both
passes have the same delta can it be merged into the weight that they share.

A large adapter is as large as a small model: its matrices stay in their file until they are used.

DoRA's deltas come with the norm that each row of weight and delta is brought to. Layers that were
trained whole replace those of the checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import regex

from mlx_dgemma.checkpoint.adapter_folder import (
    ADVICE,
    CONFIG,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    check_there,
)
from mlx_dgemma.checkpoint.parts import cut
from mlx_dgemma.checkpoint.peft_settings import PeftScales, refuse_kinds
from mlx_dgemma.checkpoint.tensorfile import TensorFile
from mlx_dgemma.checkpoint.whole_layers import check_whole
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import read_json
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.low_rank import LAYERS, Factors, attach
from mlx_dgemma.model.names import is_tied_duplicate, tied_to
from mlx_dgemma.model.network import Model
from mlx_dgemma.model.parameters import matrices
from mlx_dgemma.model.section import MOST_NUMBER, Section
from mlx_dgemma.model.share import Part, Share
from mlx_dgemma.untrusted_json import printable

_PEFT_KEY = regex.compile(
    r"(?:base_model\.model\.)?(?P<module>[\w.]+?)(?P<nested>(?:\.base_layer)*)"
    r"\.lora_(?:(?P<side>[AB])(?:\.default)?\.weight"
    r"|(?P<side>magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_MLX_KEY = regex.compile(r"(?P<module>[\w.]+)\.(?:lora_(?P<side>[ab])|(?P<side>m))")
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Delta:
    """What is added to one weight [out, in], or [E, out, in]; not read yet.

    a, b: names in the file. peft: whether they lie as PEFT's A [r, in] (experts: [E * r, in]) and
    B [out, r] (experts: [out, r * E]), else as mlx-lm's lora_a [in, r] (experts: [E, r, in]) and
    lora_b [r, out] (experts: [E, out, r]). magnitude: DoRA's, float32 [out].
    """

    shape: tuple[int, ...]
    file: TensorFile
    a: str
    b: str
    scale: float
    peft: bool
    magnitude: str | None = None

    @property
    def nbytes(self) -> int:
        names = (self.a, self.b, *([self.magnitude] if self.magnitude else ()))
        return sum(self.file.entries[name].nbytes for name in names)

    def read(self, dtype: mx.Dtype | None = None) -> Factors:
        """The factors from the file, as stored or in `dtype`."""
        a, b = self.file.mlx(self.a), self.file.mlx(self.b)
        if dtype is not None:
            a, b = a.astype(dtype), b.astype(dtype)
        if len(self.shape) == 2:
            magnitude = None
            if self.magnitude is not None:
                magnitude = self.file.mlx(self.magnitude).astype(mx.float32).reshape(-1)
            a, b = (a.T, b.T) if self.peft else (a, b)
            return Factors(a, b, self.scale, magnitude)
        experts, outputs, inputs = self.shape
        if self.peft:  # A's rows are grouped by expert, B's columns by rank
            a = a.reshape(experts, -1, inputs)
            return Factors(
                a.swapaxes(1, 2), b.reshape(outputs, -1, experts).transpose(2, 1, 0), self.scale
            )
        return Factors(a.swapaxes(1, 2), b.swapaxes(1, 2), self.scale)


class Adapter:
    """An adapter's deltas by the name of the weight (MLX-community layout), for each pass.

    A weight that one pass alone has (vision, self-conditioning) is in that pass's table. whole:
    the file with the parameters that replace the checkpoint's, if any do.
    """

    def __init__(
        self,
        folder: Path,
        encoder: dict[str, Delta],
        decoder: dict[str, Delta],
        whole: TensorFile | None = None,
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self.decoder = decoder
        self.whole = whole
        # The rows of a weight are merged slice by slice: its factors are read once.
        self._latest: tuple[str, Factors] | None = None

    @property
    def deltas(self) -> dict[str, Delta]:
        """By weight, of either pass; what is merged once `check_mergeable` agrees."""
        return {**self.encoder, **self.decoder}

    @property
    def replaced(self) -> frozenset[str]:
        """The parameters that were trained whole."""
        return frozenset(() if self.whole is None else self.whole.entries)

    def own_parameters(self, share: Share | None, config: ModelConfig) -> dict[str, mx.array]:
        """The parameters that were trained whole, or a rank's share of them."""
        found = {}
        for name in self.replaced:
            if self.whole is None or not (share is None or share.holds(name)):
                continue
            part = None if share is None else share.part(config, name)
            tensor = self.whole.mlx(name)
            found[name] = tensor if part is None else cut(tensor, part)
        return found

    def changes(self, name: str) -> bool:
        """Whether the parameter is another one with the adapter."""
        return name in self.replaced or name in self.encoder or name in self.decoder

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices, each counted once."""
        unique = {(d.file.path, d.a): d for d in (*self.encoder.values(), *self.decoder.values())}
        return sum(delta.nbytes for delta in unique.values())

    def check_mergeable(self) -> None:
        """Raises CheckpointError when the passes that share a weight would need two of it."""
        for name in sorted({*self.encoder, *self.decoder}):
            pair = self.encoder.get(name), self.decoder.get(name)
            if name.startswith(LAYERS) and not _same(*pair):
                alone = [w for w, d in zip(("encoder", "decoder"), pair, strict=True) if d]
                how = "differently" if len(alone) == 2 else f"in the {alone[0]} alone"
                raise CheckpointError(
                    f"{self.folder} changes {name} {how}, and encoder and decoder share that "
                    "weight, so it cannot be merged; convert without the adapter and give "
                    "--adapter-path when the model is loaded."
                )

    def merged(self, name: str, rows: mx.array, start: int) -> mx.array:
        """Rows [n, ...] of weight `name` from `start` on, with its delta added in float32."""
        if self.whole is not None and name in self.whole.entries:
            return self.whole.mlx(name, start, start + (rows.shape[0] if rows.ndim else 1))
        delta = self.deltas.get(name)
        if delta is None:
            return rows
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, delta.read())
        return self._latest[1].merged(rows, start)

    def attach(self, model: Model) -> None:
        """Puts the deltas beside a filled model's weights, each in its pass.

        In float32 they are computed in float32, else as they are stored.
        """
        dtype = mx.float32 if model.dtype == mx.float32 else None
        share = model.share
        known: dict[str, Factors] = {}
        sides: list[dict[str, Factors]] = []
        for deltas in (self.encoder, self.decoder):
            side = {}
            for name, delta in deltas.items():
                if share is not None and not share.holds(name):
                    continue
                if name in known and _same(self.encoder.get(name), self.decoder.get(name)):
                    side[name.removesuffix(".weight")] = known[name]
                    continue
                factors = delta.read(dtype)
                part = None if share is None else share.part(model.config, name)
                if part is not None:
                    factors = _part_of(factors, part)
                mx.eval(factors.a, factors.b)
                known[name] = side[name.removesuffix(".weight")] = factors
            sides.append(side)
        attach(model, *sides)


def _part_of(factors: Factors, part: Part) -> Factors:
    """The delta of some rows or columns of a weight.

    Raises CheckpointError for DoRA's, which need the norms of whole rows.
    """
    if factors.magnitude is not None:
        raise CheckpointError(
            "A DoRA adapter cannot be divided over several machines: merge it with mlx_dgemma.fuse "
            "first, and load the merged model."
        )
    if part.axis == "rows":
        return replace(factors, b=cut(factors.b, replace(part, axis="columns")))
    return replace(factors, a=cut(factors.a, replace(part, axis="rows")))


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """Read an adapter (LoRA, DoRA, whole layers) of PEFT's or mlx-lm's form for a model of this
    config.

    Raises ModelNotFoundError without a folder, CheckpointError for an adapter that is damaged,
    made for another model, or of another kind.
    """
    folder = Path(folder)
    check_there(folder)
    settings = Section(read_json(folder / CONFIG), str(folder / CONFIG))
    peft = settings.get("peft_type") is not None
    if peft:
        refuse_kinds(settings)
    kind = "lora" if peft else settings.text("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise settings.refuse("fine_tune_type", "is not supported; lora, dora and full are")
    path = folder / (PEFT_WEIGHTS if peft else MLX_WEIGHTS)
    file = TensorFile(path, ADVICE)
    if kind == "full":
        check_whole(file, config)
        return Adapter(folder, {}, {}, file)
    shapes = matrices(config)
    found = _peft_deltas(file, shapes, settings) if peft else _mlx_deltas(file, shapes, settings)
    encoder: dict[str, Delta] = {}
    decoder: dict[str, Delta] = {}
    for module, delta in found:
        tied = is_tied_duplicate(f"{module}.weight")
        name = tied_to(f"{module}.weight") if tied else f"{module}.weight"
        expected = shapes.get(name.removesuffix(".weight"))
        if delta.shape != expected:
            fits = "no such weight" if expected is None else f"a weight of {list(expected)}"
            raise CheckpointError(
                f"{path}: the delta of {printable(module)} is {list(delta.shape)} and the model "
                f"has {fits}; the adapter was trained on another model."
            )
        factors = delta.read()
        parts = (factors.a, factors.b, *([factors.magnitude] if delta.magnitude else ()))
        if not all(mx.isfinite(part).all().item() for part in parts):
            raise CheckpointError(f"{path}: the delta of {module} holds NaN or Inf.")
        in_encoder = tied or not name.startswith("model.decoder.")
        if in_encoder or (not peft and name.startswith(LAYERS)):
            encoder[name] = delta
        if not in_encoder:
            decoder[name] = delta
    return Adapter(folder, encoder, decoder)


_Found = Iterator[tuple[str, Delta]]


def _peft_deltas(file: TensorFile, shapes: _Shapes, settings: Section) -> _Found:
    """(module, delta) for every adapted matrix, by the names and shapes of the file alone."""
    scales, dora = PeftScales(settings), settings.flag("use_dora", False)
    pairs: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key, entry in file.entries.items():
        match = _key(_PEFT_KEY, key, file.path)
        if len(entry.shape) != 2 - (match["side"] == "magnitude_vector"):
            raise CheckpointError(f"{file.path}: {printable(key)} is no low-rank delta.")
        pairs[match["module"]][match["nested"]][match["side"]] = key
    for module, wrappers in pairs.items():
        for pair in wrappers.values():
            _check_pair(pair, module, file.path, "magnitude_vector" if dora else None)
            a, b = pair["A"], pair["B"]
            (a_rows, inputs), (outputs, b_columns) = file.entries[a].shape, file.entries[b].shape
            name, experts = module, 1
            shape: tuple[int, ...] = (outputs, inputs)
            magnitude = pair.get("magnitude_vector")
            _check_magnitude(magnitude, shape, file, module)
            if module.endswith(".experts"):
                name, experts = _experts_weight(module, shape, shapes, file.path)
                shape = (experts, *shape)
            elif len(wrappers) > 1:
                raise CheckpointError(f"{file.path}: {module} is adapted twice.")
            if a_rows != b_columns or a_rows % experts or not a_rows:
                raise CheckpointError(f"{file.path}: A and B of {module} have different ranks.")
            scale = scales.of(name, a_rows // experts)
            yield name, Delta(shape, file, a, b, scale, peft=True, magnitude=magnitude)


def _mlx_deltas(file: TensorFile, shapes: _Shapes, settings: Section) -> _Found:
    """The same for mlx-lm's form, whose names are this network's."""
    parameters = settings.section("lora_parameters")
    scale = parameters.number("scale", 20.0, minimum=-MOST_NUMBER)
    third = "m" if settings.text("fine_tune_type", "lora") == "dora" else None
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for key in file.entries:
        match = _key(_MLX_KEY, key, file.path)
        pairs[match["module"]][match["side"]] = key
    for module, pair in pairs.items():
        _check_pair(pair, module, file.path, third)
        a, b = file.entries[pair["a"]].shape, file.entries[pair["b"]].shape
        if len(a) == len(b) == 2 and a[1] == b[0] > 0:
            shape: tuple[int, ...] = (b[1], a[0])
        elif len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2] > 0:
            shape = (a[0], b[1], a[2])
        else:
            raise CheckpointError(
                f"{file.path}: lora_a {list(a)} and lora_b {list(b)} of {module} do not fit."
            )
        magnitude = pair.get("m")
        _check_magnitude(magnitude, shape, file, module)
        yield (
            module,
            Delta(shape, file, pair["a"], pair["b"], scale, peft=False, magnitude=magnitude),
        )


def _key(pattern: regex.Pattern[str], key: str, path: Path) -> regex.Match[str]:
    if "embed_tokens" in key or "lm_head" in key:
        raise CheckpointError(
            f"{path}: adapts the embedding table, which is also the output head and the "
            "self-conditioning table; such an adapter cannot be applied."
        )
    match = pattern.fullmatch(key) if len(key) < 500 else None
    if match is None:
        raise CheckpointError(f"{path}: {printable(key)} is no low-rank delta of a linear layer.")
    return match


def _check_pair(pair: Mapping[str, str], module: str, path: Path, third: str | None) -> None:
    """third: DoRA's magnitudes, where they belong to the pair."""
    low_rank = [side for side in pair if side in "abAB"]
    if len(low_rank) == 1:
        raise CheckpointError(f"{path}: {module} has lora_{low_rank[0]} only.")
    if not low_rank or (third is not None) != (len(pair) == 3):
        have = "has no magnitudes" if third is not None and low_rank else "has magnitudes"
        raise CheckpointError(f"{path}: {module} {have}, which its adapter_config.json denies.")


def _check_magnitude(
    name: str | None, shape: tuple[int, ...], file: TensorFile, module: str
) -> None:
    expert = len(shape) == 3 or module.endswith(".experts")
    if name is not None and (expert or file.entries[name].shape != shape[:1]):
        raise CheckpointError(f"{file.path}: the magnitudes of {module} do not fit its delta.")


def _experts_weight(
    module: str, shape: tuple[int, ...], shapes: _Shapes, path: Path
) -> tuple[str, int]:
    """Which of the two expert weights a delta belongs to, by its widths, and for how many experts.

    PEFT wraps the second parameter around the first, so a name says `experts` or
    `experts.base_layer` whichever was adapted; the widths are unambiguous.
    """
    decoder = tied_to(module) if is_tied_duplicate(module) else module
    for projection in ("gate_up_proj", "down_proj"):
        weight = shapes.get(f"{decoder}.{projection}")
        if weight is not None and weight[1:] == shape:
            return f"{module}.{projection}", weight[0]
    raise CheckpointError(
        f"{path}: the delta of {module} maps {shape[1]} to {shape[0]}, which no expert weight of "
        "this model does; the adapter was trained on another model."
    )


def _same(one: Delta | None, other: Delta | None) -> bool:
    """Whether two passes get the same weight; an untrained delta (B = 0) counts as none."""
    if one is other:
        return True
    some = one or other
    assert some is not None
    factors = [None if delta is None else delta.read() for delta in (one, other)]
    magnitudes = [part.magnitude for part in factors if part and part.magnitude is not None]
    if magnitudes:
        ours, *others = magnitudes
        if not others or not mx.allclose(ours, others[0], rtol=1e-5).item():
            return False
    step = some.shape[0] if len(some.shape) == 2 else 1
    for start in range(0, some.shape[0], step):
        ours, theirs = (
            mx.array(0.0) if part is None else part.rows(start, start + step) for part in factors
        )
        if not mx.allclose(ours, theirs, rtol=1e-5, atol=1e-8).item():
            return False
    return True
