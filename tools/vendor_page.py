"""Fetch the page's libraries from the npm registry, check them against this table, and put them where the page is.

    python tools/vendor_page.py [--check | --axe]

Without an option: src/llamita/serve/page/vendor is written anew, byte for byte what the packages hold.
--check: compares what is there with the table, without a network. --axe: fetches axe-core for the tests, into build/.
To take a newer version, change its line, run this, and put the hash that it shows here after looking at the change.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
VENDOR = ROOT / "src" / "llamita" / "serve" / "page" / "vendor"
CACHE = ROOT / "build" / "page"
SECONDS = 120  # that npm may take


class VendoredFile(NamedTuple):
    """A file of an npm package, as it is stored here."""

    package: str
    version: str
    path: str  # inside the package
    name: str  # here
    sha256: str


MARKED, HIGHLIGHT, AXE = ("marked", "18.2.1"), ("@highlightjs/cdn-assets", "11.12.0"), ("axe-core", "4.14.1")
FILES = [
    VendoredFile(
        *MARKED,
        "lib/marked.esm.js",
        "marked.esm.js",
        "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de",
    ),
    VendoredFile(
        *MARKED, "LICENSE", "marked.LICENSE.txt", "8e3a3f82f59a60958f56ca08f445647c32a4733dc7ca6c2c46f6eb898471ab9c"
    ),
    VendoredFile(
        *HIGHLIGHT,
        "es/highlight.min.js",
        "highlight.min.js",
        "1ed8fc5256b738b8875b74e4d3f0754f60d6411fb034d618dfbc4e6e6c9999d7",
    ),
    VendoredFile(
        *HIGHLIGHT,
        "LICENSE",
        "highlight.LICENSE.txt",
        "6c081431591d9df696c82dc598fe1423765b8a299b200ed00b281afd0f64c490",
    ),
]
# Looks for mistakes that keep people out (MPL-2.0). Tests run it, the wheel does not hold it.
AXE_FILE = VendoredFile(
    *AXE, "axe.min.js", "axe.min.js", "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
)


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def faults(files: list[VendoredFile], folder: Path) -> list[str]:
    """Return a line for each file that is missing or is not what the table says."""
    found = {file: sha256(folder / file.name) if (folder / file.name).is_file() else "no file" for file in files}
    wrong = {file: hash_ for file, hash_ in found.items() if hash_ != file.sha256}
    return [f"{file.name}: expected {file.sha256}, found {hash_}" for file, hash_ in wrong.items()]


def fetch(files: list[VendoredFile], folder: Path) -> None:
    """Write files of their packages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm: not found; it comes with Node.js (apt-get install npm)")
    with tempfile.TemporaryDirectory() as scratch:
        for package, version in dict.fromkeys((file.package, file.version) for file in files):
            pack = subprocess.run(
                [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", scratch],
                capture_output=True, text=True, timeout=SECONDS,
            )  # fmt: skip
            if pack.returncode:
                raise SystemExit(f"npm pack {package}@{version} failed: {pack.stderr.strip()[-300:]}")
            with tarfile.open(Path(scratch) / pack.stdout.split()[-1]) as archive:
                for file in files:
                    member = archive.extractfile(f"package/{file.path}") if file.package == package else None
                    if member is not None:
                        (folder / file.name).write_bytes(member.read())


def axe() -> Path:
    """Return axe-core's file; it is fetched at the first call. Raises SystemExit with the reason if that fails."""
    if faults([AXE_FILE], CACHE):
        fetch([AXE_FILE], CACHE)
    if found := faults([AXE_FILE], CACHE):
        raise SystemExit("\n".join(found))
    return CACHE / AXE_FILE.name


def main() -> None:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    if arguments == ["--axe"]:
        print(axe())
        return
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    if not arguments:
        fetch(FILES, VENDOR)
    if found := faults(FILES, VENDOR):
        raise SystemExit("\n".join(found))
    print(f"{len(FILES)} files as the table says")


if __name__ == "__main__":
    main()
