"""Pretrained weights from outside a model: a state_dict, a model, a file, a folder, or the local cache of the hub."""

from __future__ import annotations

import copy
import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .evidence import names_by_parameter
from .names import unwrapped
from .pieces import Piece, is_distributed, local, own_piece

Source = Mapping[str, Tensor] | nn.Module | str | Path

# What a folder of a checkpoint may hold, the first that is there.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Pretrained:
    """Finds the pretrained tensor of a model's parameter in a source, under any of the parameter's names.

    Names may differ by what wrappers add, and by a prefix: that of a model inside another one, or ``base_model_prefix``
    which transformers leaves out when it saves a model without its head. Where transformers itself gives a checkpoint
    other names than its model has, a folder or hub id is loaded by ``type(model).from_pretrained``.

    Raises:
        TypeError: for a source of another kind.
        ValueError: for one without any parameter.
        FileNotFoundError: for a path or a hub id where there is no checkpoint on this machine.
    """

    def __init__(self, function: str, source: Source, model: nn.Module) -> None:
        self._function = function
        self._model = model
        self._folder: Path | None = None
        self._names = names_by_parameter(model)
        self._prefixes = _prefixes(model)
        self._loaded: dict[str, Tensor] | None = None  # by transformers
        self.state: Mapping[str, Tensor]
        if isinstance(source, nn.Module):
            self.state = dict(source.named_parameters(remove_duplicate=False))
        elif isinstance(source, (str, Path)):
            path = _local(function, source)
            self._folder = path if path.is_dir() else None
            self.state = _Files(function, path)
        elif isinstance(source, Mapping):
            self.state = source
        else:
            raise TypeError(
                f"{function}: targets: expected a state_dict, a model or a path, got {type(source).__name__}"
            )
        self._keys = {unwrapped(key): key for key in self.state}
        if not self._keys:
            raise ValueError(
                f"{function}: targets: expected pretrained parameters, got a {type(source).__name__} with none"
            )
        self.summary = f"{len(self.state)} others such as {next(iter(self.state))!r}"

    def find(self, parameter: Tensor, *, expected: bool = True) -> Tensor | None:
        """The pretrained tensor, or None where the source has none; checked to be a tensor of the parameter's shape.

        Of a parameter that is sharded, this rank's piece: of a file nothing else is read.
        ``expected=False``, for a layer that is new by its name, spares a load by transformers that would not find it.
        """
        names = self._names[id(parameter)]
        key = next((key for name in names for key in self._spellings(name) if key in self._keys), None)
        found: Any = None if key is None else self._entry(self._keys[key])
        fits = isinstance(found, (Tensor, _OnDisk)) and found.shape == parameter.shape
        if not fits and expected and (loaded := self._load_by_transformers()) is not None:
            return next((own_piece(loaded[name], parameter) for name in names if name in loaded), None)
        if key is None:
            return None
        if not isinstance(found, (Tensor, _OnDisk)):
            raise TypeError(
                f"{self._function}: targets: expected a tensor for {names[0]!r}, got {type(found).__name__}"
            )
        if not fits:
            raise ValueError(
                f"{self._function}: targets: expected {list(parameter.shape)} for {names[0]!r}, got {list(found.shape)}"
            )
        return own_piece(found, parameter).detach() if isinstance(found, Tensor) else found.read(parameter)

    def _entry(self, key: str) -> Any:
        return self.state.entry(key) if isinstance(self.state, _Files) else self.state[key]

    def _spellings(self, name: str) -> Iterator[str]:
        name = unwrapped(name)
        yield name
        for prefix in self._prefixes:
            if name.startswith(prefix):
                yield name.removeprefix(prefix)
            yield prefix + name

    def _load_by_transformers(self) -> Mapping[str, Tensor] | None:
        if self._loaded is None and self._folder is not None and _is_of_transformers(self._model):
            self._loaded = _loaded_parameters(self._model, self._folder)
        return self._loaded


def _prefixes(model: nn.Module) -> list[str]:
    prefixes = ["model."]
    for name, module in model.named_modules():
        base = getattr(module, "base_model_prefix", None)
        if isinstance(base, str):  # one of transformers' models
            inner = unwrapped(name)
            prefixes += [f"{prefix}." for prefix in (inner, base, f"{inner}.{base}".strip(".")) if prefix]
    return list(dict.fromkeys(prefixes))


def _local(function: str, source: str | Path) -> Path:
    """The path itself, or the folder of this hub id in the local cache; nothing is downloaded."""
    path = Path(source)
    if path.exists():
        return path
    looks_like_an_id = isinstance(source, str) and source.count("/") <= 1 and not source.startswith((".", "/", "~"))
    if looks_like_an_id and not path.suffix:
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(str(source), local_files_only=True))
        except (ImportError, OSError, ValueError):  # huggingface_hub's own errors are of these
            pass
    raise FileNotFoundError(
        f"{function}: targets: expected a checkpoint, got no file at {path}, nor a model of this name in the local "
        "cache of the hub"
    )


class _Files(Mapping[str, Tensor]):
    """The entries of a checkpoint's files, each read when it is asked for."""

    def __init__(self, function: str, path: Path) -> None:
        if path.is_dir():
            folder = path
            path = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
            if not path.is_file():
                raise FileNotFoundError(
                    f"{function}: targets: expected a checkpoint, got no file at {path}, nor {', '.join(_FILES[1:])}"
                )
        self._open: dict[Path, Mapping[str, Tensor]] = {}
        if path.suffix == ".json":
            shards = json.loads(path.read_text())["weight_map"]
            self._file_of = {key: path.parent / shard for key, shard in shards.items()}
        else:
            self._file_of = dict.fromkeys(self._opened(path), path)

    def __getitem__(self, key: str) -> Tensor:
        return self._opened(self._file_of[key])[key]

    def entry(self, key: str) -> Tensor | _OnDisk:
        """What is read of it is only what is asked for."""
        opened = self._opened(self._file_of[key])
        return opened.entry(key) if isinstance(opened, _Safetensors) else opened[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _opened(self, file: Path) -> Mapping[str, Tensor]:
        if file not in self._open:
            self._open[file] = _Safetensors(file) if file.suffix == ".safetensors" else _torch_file(file)
        return self._open[file]


class _OnDisk:
    """A tensor in a safetensors file, of which a block can be read without the rest."""

    def __init__(self, file: Any, key: str) -> None:
        self._file, self._key = file, key
        self.shape = torch.Size(file.get_slice(key).get_shape())

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's piece of it, if the parameter is sharded."""
        if not is_distributed(parameter) or not local(parameter).numel():
            return own_piece(self._file.get_tensor(self._key), parameter)
        return self._file.get_slice(self._key)[Piece.of(parameter).slices]


class _Safetensors(Mapping[str, Tensor]):
    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(file, framework="pt")
        self._keys = list(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def entry(self, key: str) -> _OnDisk:
        return _OnDisk(self._file, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _torch_file(file: Path) -> Mapping[str, Tensor]:
    # weights_only: a pickle is data. mmap: only what is asked for is read; the old format cannot.
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for key in ("state_dict", "model"):  # training checkpoints of Lightning and of timm
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            return state[key]
    return state


def _is_of_transformers(model: nn.Module) -> bool:
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__)


def _loaded_parameters(model: Any, folder: Path) -> dict[str, Tensor]:
    """The parameters that transformers itself loads from the folder, under this model's names."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the layers that the folder lacks: apply_mixout reports them
            loaded = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), local_files_only=True)
    finally:
        transformers.logging.set_verbosity(level)
    return {
        name: parameter.detach()
        for name, parameter in loaded.named_parameters(remove_duplicate=False)
        if getattr(parameter, "_is_hf_initialized", False)
    }
