"""PyInstaller's hook: the demo checkpoint, the kernels' sources, modules that are imported by name,
and MLX's compiled kernels."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules, copy_metadata

hiddenimports = [*collect_submodules("mlx_dgemma"), *collect_submodules("mlx")]
datas = [
    *collect_data_files("mlx_dgemma"),
    *collect_data_files("mlx", includes=["**/*.metallib"]),
    *copy_metadata("mlx"),
]
# With the source of what launches the kernels beside it, a verdict holds for the bundled app and
# for the package too, so that `mlx_dgemma.doctor --check` can find it beforehand.
module_collection_mode = {"mlx_dgemma": "pyz+py"}
