"""The published repositories of the real model, and the memory that each needs."""

from __future__ import annotations

from dataclasses import dataclass

COMMUNITY = "mlx-community/diffusiongemma-26B-A4B-it"
DEMO_NAME = "demo"  # what `--model` calls the bundled checkpoint
GOOGLE = "google/diffusiongemma-26B-A4B-it"

# Beside the weights: an 8k context (0.5 GB) and a denoising step's working memory (0.6 GB).
BESIDE_WEIGHTS = 1_097_072_640
# The longest context by itself, exactly and in 8 bits.
LONGEST_CONTEXT = 262_144
LONGEST_CONTEXT_BYTES = {None: 5_693_767_680, 8: 3_172_270_080}


@dataclass(frozen=True)
class KnownRepository:
    """A repository of the real model. weight_bytes: tensors; exact where the index is known."""

    id: str
    weight_bytes: int
    exact: bool
    about: str

    @property
    def short(self) -> str:
        """What stands for its id in `--model`."""
        return self.id.removeprefix(f"{COMMUNITY}-") if self.id != GOOGLE else "google"

    @property
    def memory_bytes(self) -> int:
        """With an 8k context and the working memory of a step."""
        return self.weight_bytes + BESIDE_WEIGHTS


# The 4-bit size is its index's total_size; the others are computed from the model's shapes with
# every quantized matrix in the named precision and the 4-bit repository's 8-bit modules.
KNOWN_REPOSITORIES = (
    KnownRepository(
        f"{COMMUNITY}-4bit", 16_542_844_632, True, "experts in 4 bits, what every token uses in 8"
    ),
    KnownRepository(f"{COMMUNITY}-mxfp4", 15_828_498_648, False, "4-bit floats"),
    KnownRepository(f"{COMMUNITY}-nvfp4", 16_542_844_632, False, "4-bit floats, finer scales"),
    KnownRepository(f"{COMMUNITY}-5bit", 19_400_228_568, False, "experts in 5 bits"),
    KnownRepository(f"{COMMUNITY}-6bit", 22_257_612_504, False, "experts in 6 bits"),
    KnownRepository(f"{COMMUNITY}-mxfp8", 27_258_034_392, False, "8-bit floats"),
    KnownRepository(f"{COMMUNITY}-8bit", 27_972_380_376, False, "everything in 8 bits"),
    KnownRepository(f"{COMMUNITY}-bf16", 51_647_562_456, False, "not quantized"),
    KnownRepository(GOOGLE, 51_647_562_456, False, "the original, to convert from"),
)
