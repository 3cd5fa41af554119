"""A Hub repository by its config.json and the headers of its files, without a weight."""

from __future__ import annotations

from pathlib import Path

from mlx_dgemma.checkpoint.hub import explained, repository_id, resolve_model
from mlx_dgemma.checkpoint.tensorfile import TensorFile
from mlx_dgemma.checkpoint.weights import read_headers as read_local_headers
from mlx_dgemma.errors import CheckpointError, DGemmaError
from mlx_dgemma.files import read_json
from mlx_dgemma.headers import check_ranges, read_entry
from mlx_dgemma.model.config import ModelConfig


def read_headers(
    repository: str, revision: str | None
) -> tuple[Path, ModelConfig, dict[str, TensorFile]]:
    """The folder of the repository's config.json, what that says, and the weight files by name.

    Of the files, range requests read the headers. Offline, the copy in the Hub's cache is read.
    Raises ModelNotFoundError or CheckpointError.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import NotASafetensorsRepoError

    repository = repository_id(repository)
    if constants.HF_HUB_OFFLINE:
        folder = resolve_model(repository, revision=revision, to_load=False)
        return folder, ModelConfig.from_folder(folder), local_files(folder)
    api = HfApi()
    try:
        # Says at once that the Hub cannot be reached; a download tries for half a minute.
        api.model_info(repository, revision=revision, timeout=15)
        path = Path(api.hf_hub_download(repository, "config.json", revision=revision))
        config = ModelConfig.from_dict(read_json(path), source=f"{repository}/config.json")
        found = api.get_safetensors_metadata(repository, revision=revision)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{repository} has no safetensors weights on the Hub.") from error
    except DGemmaError:
        raise
    except Exception as error:
        raise explained(repository, error, revision) from error
    files = {}
    for name, file in found.files_metadata.items():
        called = Path(f"{repository}/{name}")
        entries = {
            # Offsets in the data: how long the header is, the Hub's client does not say.
            tensor: read_entry(
                tensor,
                {
                    "dtype": info.dtype,
                    "shape": info.shape,
                    "data_offsets": list(info.data_offsets),
                },
                0,
                called,
            )
            for tensor, info in file.tensors.items()
        }
        check_ranges(entries.values(), 0, called)
        files[name] = TensorFile.elsewhere(name, entries)
    return path.parent, config, files


def local_files(folder: Path) -> dict[str, TensorFile]:
    """A checkpoint folder's weight files by name."""
    paths = sorted({header.path for header in read_local_headers(folder).values()})
    return {path.name: TensorFile(path) for path in paths}
