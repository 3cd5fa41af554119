"""The model card of a converted checkpoint, and its upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_dgemma.checkpoint.hub import progress_bars
from mlx_dgemma.convert.plan import Plan, grouped
from mlx_dgemma.convert.recipes import MIXES, RECIPES
from mlx_dgemma.errors import ResourceError


def model_card(plan: Plan, provenance: dict[str, Any]) -> str:
    """README.md: metadata for the Hub, how to run the model, and where it came from."""
    source = provenance["source"]
    library = "mlx" if plan.layout == "mlx" else "transformers"
    header = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if source["from_hub"]:
        header += [f"base_model: {source['name']}"]
    header += ["tags:", f"- {library}", "- diffusion_gemma", "---"]

    rows = {
        "source": f"`{source['name']}`" if source["from_hub"] else "a local folder",
        "source revision": f"`{source['revision']}`" if source["revision"] else "unknown",
        "recipe": f"`{plan.recipe}`: {_summary(plan.recipe)}",
        "unquantized tensors": plan.dtype,
        "size": f"{plan.total_size / 1e9:.2f} GB in {len(plan.shards)} files, "
        f"{plan.bits_per_weight:.2f} bits per weight",
        "made with": ", ".join(
            f"{name} {number}" for name, number in provenance["versions"].items()
        ),
    }
    if provenance["adapter"] is not None:
        digests = provenance["adapter"]["sha256"]
        rows["merged LoRA adapter"] = ", ".join(
            f"`{name}` sha256 `{digest[:16]}…`" for name, digest in digests.items()
        )
    lines = [
        *header,
        "",
        "# DiffusionGemma, converted",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
        "`conversion.json` holds the digest of every file;"
        " `mlx_dgemma.convert verify FOLDER` checks them.",
        "",
    ]
    if plan.alternatives:
        lines += ["Not as the recipe asked, because a width did not allow it:", ""]
        lines += [f"- {line}" for line in grouped(plan.alternatives)] + [""]
    if plan.layout == "mlx":
        lines += ["```sh", 'mlx_dgemma.generate --model FOLDER --prompt "Hello"', "```", ""]
    return "\n".join(lines)


def _summary(name: str) -> str:
    if name in RECIPES:
        return RECIPES[name].summary
    return "one of mlx-lm's mixes" if name in MIXES else "chosen on the command line"


def upload(folder: Path, repository: str, *, progress: bool = False) -> str:
    """Upload a finished folder to the Hub with the user's token; returns the repository's id.

    progress: show huggingface-hub's bars on standard error.
    Raises ResourceError with the reason and what to do; the local folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        api = HfApi()
        name: str = api.create_repo(repository, exist_ok=True).repo_id
        with progress_bars(progress):
            api.upload_folder(repo_id=name, folder_path=folder, repo_type="model")
    # A file that fails reaches us as a RuntimeError, a refused name or answer as a ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"{folder} is finished but was not uploaded to {repository}: {_reason(error)}; then "
            f"run `hf upload {repository} {folder}`."
        ) from error
    return name


def _reason(error: BaseException) -> str:
    """Why an upload failed and what to do, as the end of a sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return "the Hub does not know who you are (401), log in with `hf auth login`"
        if status == 403:
            return "your token may not write there (403), use one that may or another name"
        return f"the Hub answered {status}, try later"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return "the Hub cannot be reached, check the connection"
    return str(error).strip().splitlines()[0].rstrip(".")
