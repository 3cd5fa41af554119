"""The compiler the emulator and the lint need: clang 19, or the clang inside the ziglang wheel."""

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
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


@functools.cache
def cxx() -> list[str]:
    """The C++ compiler's command: MSL_CXX, else clang++-19, else `zig c++`, which is clang."""
    return _command("MSL_CXX", "clang++-19", "c++")


@functools.cache
def clang() -> list[str]:
    """The same for the front end alone, which needs no system headers: MSL_CLANG, clang-19, zig."""
    return _command("MSL_CLANG", "clang-19", "clang")


@functools.cache
def version() -> str:
    """The C++ compiler's own words: what one compiled, another does not load."""
    return subprocess.run([*cxx(), "--version"], capture_output=True, text=True, check=True).stdout


def _command(variable: str, name: str, verb: str) -> list[str]:
    if variable in os.environ:
        return shlex.split(os.environ[variable])
    if found := shutil.which(name):
        return [found]
    if (ziglang := importlib.util.find_spec("ziglang")) and ziglang.origin:
        return [str(Path(ziglang.origin).with_name("zig")), verb]
    raise RuntimeError(
        f"neither {name} nor the ziglang wheel is there; run `pip install ziglang` "
        "or `apt-get install -y --no-install-recommends clang-19`"
    )
