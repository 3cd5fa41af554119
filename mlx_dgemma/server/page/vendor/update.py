"""Fetches the page's libraries from npm again, at the versions in vendor.json, and checks them.

python mlx_dgemma/server/page/vendor/update.py            # the same versions, digests compared
python mlx_dgemma/server/page/vendor/update.py marked=18.2.1    # another one; writes its digest
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def packed(package: str, version: str, folder: Path) -> Path:
    """The package's archive, as `npm pack` downloads it."""
    done = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package}@{version}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / done.stdout.strip().splitlines()[-1]


def main(changes: dict[str, str]) -> int:
    libraries = json.loads((HERE / "vendor.json").read_text())
    for name, library in libraries.items():
        version = changes.get(library["package"], library["version"])
        with tempfile.TemporaryDirectory() as folder:
            archive = packed(library["package"], version, Path(folder))
            with tarfile.open(archive) as opened:
                file = opened.extractfile(f"package/{library['path']}")
                assert file is not None
                content = file.read()
        digest = hashlib.sha256(content).hexdigest()
        if version == library["version"] and digest != library["sha256"]:
            print(f"{name}: npm gives other bytes than vendor.json says", file=sys.stderr)
            return 1
        library.update(version=version, sha256=digest)
        (HERE / name).write_bytes(content)
        print(f"{name}: {library['package']} {version}")
    (HERE / "vendor.json").write_text(json.dumps(libraries, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(dict(argument.split("=", 1) for argument in sys.argv[1:])))
