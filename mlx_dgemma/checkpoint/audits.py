"""What an audit found of a checkpoint's magnitudes, where that is remembered, and what follows.

M1 and M2 have no arithmetic for bfloat16; MLX emulates it there. Matrix products in float16 are
faster, but numbers beyond 65,504 are infinite in it. `mlx_dgemma.doctor --audit MODEL` measures how
near a checkpoint comes (see benchmark.overflow). On those chips `load` then computes the products
of one that has passed in float16, the residual stream in float32, unless a dtype is asked for.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_dgemma.kernels import dispatch, verdicts

LIMIT = 65504.0
# Headroom for prompts that the audit did not see: of what a norm precedes, and of the branches'
# products, whose unit is chosen for it.
HEADROOM, UNIT_HEADROOM = 8, 32
MOST_UNIT = 64  # beyond it, small values lose digits to the unit
MOST_LOSS = 1e-3  # of a matrix's norm, in the cast of what is stored: half of bfloat16's own
_EMULATED = re.compile(r"applegpu_g1[34]")  # the architectures of M1 and M2
_log = logging.getLogger("mlx_dgemma")


@dataclass(frozen=True)
class Audit:
    """Largest magnitudes over some replies, in the checkpoint's own precision.

    largest, where: of all but the residual stream and the branches' products, and which tensor.
    branches: of the inputs and outputs of the layers' `down_proj`. loss: the largest relative
    error, by norm, of a stored tensor in float16. units: whether the branches can have a unit.
    replies: how many. when: seconds since 1970.
    """

    largest: float
    where: str
    branches: float
    loss: float
    units: bool
    replies: int
    when: float

    @property
    def unit(self) -> int:
        """The power of two that the branches' products must be divided by."""
        unit = 1
        while unit <= MOST_UNIT and self.branches / unit > LIMIT / UNIT_HEADROOM:
            unit *= 2
        return unit

    @property
    def failure(self) -> str | None:
        """Why the checkpoint is not for float16; None where it has passed."""
        if not self.largest <= LIMIT / HEADROOM:
            return f"{self.where} reaches {self.largest:,.0f}"
        if not self.branches <= MOST_UNIT * LIMIT / UNIT_HEADROOM:
            return f"down_proj reaches {self.branches:,.0f}"
        if self.unit > 1 and not self.units:
            return f"down_proj reaches {self.branches:,.0f}, in a packing without units"
        if not self.loss <= MOST_LOSS:
            return f"a stored tensor loses {self.loss:.1e} of its norm"
        return None


def choose(folder: Path, dtype: str | None, *, adapted: bool) -> tuple[str | None, int]:
    """(dtype to load a checkpoint in, unit of its branches), where `dtype` is asked for.

    adapted: an adapter changes what the audit measured.
    """
    emulated = _EMULATED.match(verdicts.chip()) is not None and dispatch.available()
    if adapted or dtype not in (None, "float16") or (dtype is None and not emulated):
        return dtype, 1
    found = recall(folder)
    if found is None or found.failure is not None:
        return dtype, 1
    if dtype is None:
        _log.info("float16 products: the checkpoint has passed its audit")
    return "float16", found.unit


def recall(folder: Path) -> Audit | None:
    """The audit of exactly this checkpoint on this machine, if there was one."""
    return everything().get(identity(folder))


def everything() -> dict[str, Audit]:
    """Every audit that is remembered and can be read."""
    stored = verdicts.read_cache(audit_file())
    return {key: Audit(**value) for key, value in stored.items() if verdicts.fits(value, _KINDS)}


_KINDS: verdicts.Kinds = {
    **dict.fromkeys(("largest", "branches", "loss", "replies", "when"), verdicts.is_number),
    "where": lambda value: type(value) is str,
    "units": lambda value: type(value) is bool,
}


def remember(folder: Path, audit: Audit) -> None:
    """Keep an audit with the checkpoint's identity; no error where it cannot be written."""
    stored = {**everything(), identity(folder): audit}
    try:
        verdicts.write_cache(audit_file(), {key: asdict(one) for key, one in stored.items()})
    except OSError as error:
        _log.info("the audit is not kept: %s", error)


def audit_file() -> Path:
    """Where audits are kept, beside the kernels' verdicts."""
    return verdicts.cache_file().with_name("audits.json")


def identity(folder: Path) -> str:
    """SHA-256 of the config and of bytes spread over every file of weights: another training, and
    most edits, give another."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for part in range(_PARTS):
                file.seek(max(size - _BYTES, 0) * part // (_PARTS - 1))
                digest.update(file.read(_BYTES))
    return digest.hexdigest()


_PARTS, _BYTES = 256, 256
