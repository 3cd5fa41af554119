"""The compiler the emulator and the lint need, and whether its absence is a failure or a reason to
skip.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
CXX = os.environ.get("MSL_CXX", "clang++-19")
CLANG = os.environ.get("MSL_CLANG", "clang-19")
ADDR2LINE = next((t for t in ("addr2line", "llvm-addr2line-19") if shutil.which(t)), "addr2line")
BUILD = Path(
    os.environ.get("MSL_BUILD")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_dgemma" / "msl"
)


def mlx_headers() -> Path:
    """The Metal headers inside the installed MLX (the Linux wheel ships them too)."""
    for entry in sys.path:
        folder = Path(entry) / "mlx" / "include"
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the installed mlx has no include folder")


def reason_to_skip() -> str | None:
    """Why the emulator cannot run here; None where it must run, compiler or not."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return None
    here = f"{platform.machine()} {platform.system()}"
    return f"the emulator's runtime is for x86-64 Linux, this is {here}"


def require() -> None:
    """Raise where the emulator must run but its compiler is missing."""
    missing = [tool for tool in (CXX, CLANG, ADDR2LINE) if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} not found; run "
            "`apt-get install -y --no-install-recommends clang-19 binutils`"
        )
