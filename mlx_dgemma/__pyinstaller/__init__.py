"""What PyInstaller must know to bundle an app that uses this package; it finds this by itself."""

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """The folder of the hook beside this file."""
    return [str(Path(__file__).parent)]
