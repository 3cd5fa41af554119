"""From the flags of a command to one recipe, refusing flags that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_dgemma.convert.recipes import RECIPES, Recipe, Rule, custom, mix, recipe_named
from mlx_dgemma.errors import InputError


def choose_recipe(
    *,
    quantize: bool = False,
    recipe: str | Recipe | None = None,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    quant_predicate: str | None = None,
    rules: Sequence[Rule] = (),
    dequantize: bool = False,
    to_hf: bool = False,
) -> Recipe:
    """One recipe from the flags.

    Raises InputError when two of them ask for different things.
    """
    numbers = q_bits is not None or q_group_size is not None or q_mode is not None
    asked = [
        flag
        for flag, given in (
            ("--recipe", recipe is not None),
            ("--quant-predicate", quant_predicate is not None),
            ("--q-bits, --q-group-size or --q-mode", numbers and quant_predicate is None),
            ("-d", dequantize),
        )
        if given
    ]
    if len(asked) > 1:
        raise InputError(f"{asked[0]} and {asked[1]} each choose a precision; give one of them.")
    if dequantize and (quantize or rules):
        raise InputError("-d removes quantization; it cannot be combined with -q or rules.")
    if quant_predicate is not None:
        if q_bits is not None or q_mode not in (None, "affine"):
            raise InputError("a mix has its own bits and is affine; drop --q-bits and --q-mode.")
        chosen = mix(quant_predicate, q_group_size or 64)
    elif isinstance(recipe, Recipe):
        chosen = recipe
    elif recipe is not None:
        chosen = recipe_named(recipe)
    elif quantize or numbers:
        chosen = custom(q_bits, q_group_size, q_mode or "affine")
    else:
        chosen = RECIPES["bf16"]
    chosen = chosen.with_rules(rules)
    if to_hf and (chosen.default is not None or any(rule.precision for rule in chosen.rules)):
        raise InputError("the Hugging Face layout is not quantized; --to-hf goes without -q.")
    return chosen
