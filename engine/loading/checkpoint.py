"""Weights in a file: names and shapes without torch, then one tensor at a time.

A pickled checkpoint (`.ckpt`, `.bin`) is a program that builds objects. Only what it says about tensors is read (see
pickles.py): nothing in it is imported, called or executed.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from latentmill.engine.loading.files import check_regular, read_json, shown
from latentmill.engine.loading.pickles import PICKLE_LIMIT, View, read_pickle
from latentmill.engine.types import EngineError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
_PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
_HEADER_LIMIT = 16 * 2**20
"""Bytes of a safetensors header; the largest published ones take below 1 MB."""

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""What stands before each member of a zip archive."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""What torch wrote first before 1.6."""


class WeightsFile(Protocol):
    """A file of named tensors. `metadata` holds what the file says about itself, if its format allows that."""

    @property
    def path(self) -> Path: ...

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, as it was saved."""


def open_weights(path: Path) -> WeightsFile:
    """Open a safetensors or pickled file. Raises EngineError that names what is wrong with it."""
    try:
        check_regular(path)
    except OSError as error:
        _unreadable(path, error)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if is_index(path):
        return ShardedFile(path)
    if path.suffix in _PICKLE_SUFFIXES:
        return PickledFile(path)
    raise EngineError(f"{path}: weights are read from .safetensors, {', '.join(_PICKLE_SUFFIXES)}; convert the file")


def _unreadable(path: Path, error: object) -> NoReturn:
    raise EngineError(f"{path} cannot be read: {error}; copy the file again")


class SafetensorsFile:
    """A `.safetensors` file. The library holds its header to the format: no gap, overlap or end beyond the file."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if length > _HEADER_LIMIT:
                raise ValueError(f"its header claims {length} bytes, the limit is {_HEADER_LIMIT}")
            with safe_open(path, framework="np") as opened:
                self.metadata: dict[str, str] = opened.metadata() or {}
                keys = opened.keys()
                self.shapes: dict[str, Shape] = {key: tuple(opened.get_slice(key).get_shape()) for key in keys}
        except (SafetensorError, OSError, ValueError) as error:
            _unreadable(path, error)
        self._open: Any = None

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, as it was saved."""
        from safetensors import SafetensorError, safe_open

        try:
            if self._open is None:
                self._open = safe_open(self.path, framework="pt")
            tensor: Tensor = self._open.get_tensor(key)
        except (SafetensorError, OSError) as error:
            _unreadable(self.path, error)
        return tensor


def is_index(path: Path) -> bool:
    """Whether a file says which shards hold the weights."""
    return ".safetensors.index." in path.name and path.suffix == ".json"


def shard_paths(index: Path) -> list[Path]:
    """The files that an index of weights names, which lie beside it. Raises EngineError for any other name."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise EngineError(f"{index} has no weight_map of file names; copy the file again")
    names = sorted(set(named.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise EngineError(f"{index} names {shown(name)}: shards are .safetensors files beside it; copy it again")
        if not (index.parent / name).is_file():
            raise EngineError(f"{index.parent} lacks {name}, which {index.name} names")
    return [index.parent / name for name in names]


class ShardedFile:
    """Several `.safetensors` files as one, by the index that names them. No two hold the same key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self._shards: dict[str, SafetensorsFile] = {}
        for shard in map(SafetensorsFile, shard_paths(path)):
            twice = sorted(shard.shapes.keys() & self.shapes.keys())
            if twice:
                _unreadable(path, f"two of its shards hold {shown(twice[0])}")
            self.shapes |= shard.shapes
            self._shards |= dict.fromkeys(shard.shapes, shard)

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, as it was saved."""
        return self._shards[key].read(key)


class PickledFile:
    """A checkpoint as torch.save writes it: a pickle of what is where, and the raw storages.

    Since torch 1.6 they are members of a zip archive; before, they follow one another in one file. The weights are the
    tensors of the top level, or of its `state_dict`. Anything else is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        try:
            size = path.stat().st_size
            content, self._places = (_read_archive if zipfile.is_zipfile(path) else _read_legacy)(path)
        # A broken or hostile pickle can raise nearly anything while it is read.
        except Exception as error:  # noqa: BLE001 - it becomes one line
            _unreadable(path, f"{type(error).__name__}: {error}")
        self._views = _views_of(content)
        self.shapes: dict[str, Shape] = {key: view.shape for key, view in self._views.items()}
        # Two names may share a storage, but many would take more memory than the file has bytes.
        claimed = sum(math.prod(view.shape) * view.storage.itemsize for view in self._views.values())
        if claimed > 2 * size:
            _unreadable(path, f"its tensors claim {claimed} bytes, it has {size}")

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, as it was saved."""
        import torch

        view = self._views[key]
        dtype, itemsize = getattr(torch, view.storage.dtype), view.storage.itemsize
        count = math.prod(view.shape)
        if count == 0:
            return torch.empty(view.shape, dtype=dtype)
        place, length = self._places.get(view.storage.name, (0, 0))
        reach = 1 + sum((side - 1) * step for side, step in zip(view.shape, view.stride, strict=True))
        start, end = view.offset * itemsize, (view.offset + reach) * itemsize
        if end > length or count * itemsize > length:
            _unreadable(self.path, f"the numbers of {shown(key)} are not in it")
        try:
            with self.path.open("rb") as file:
                file.seek(place + start)
                data = bytearray(file.read(end - start))
        except OSError as error:
            _unreadable(self.path, f"{shown(key)}: {error}")
        if len(data) < end - start:
            _unreadable(self.path, f"it ends within {shown(key)}")
        return torch.frombuffer(data, dtype=dtype).as_strided(view.shape, view.stride)


Places = Mapping[str, tuple[int, int]]
"""Where each storage begins in the file, and its length, both in bytes."""


def _read_archive(path: Path) -> tuple[Any, Places]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        pickles = [info for info in archive.infolist() if f"/{info.filename}".endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive, but not of a checkpoint: no data.pkl in it")
        if pickles[0].file_size > PICKLE_LIMIT:
            raise ValueError(f"its pickle takes {pickles[0].file_size} bytes, the limit is {PICKLE_LIMIT}")
        root = pickles[0].filename.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist():
            with archive.open(f"{root}byteorder") as member:
                if member.read(16) != b"little":
                    raise ValueError("its numbers are big-endian")
        content, _ = read_pickle(io.BytesIO(archive.read(pickles[0])))
        places = {}
        for info in archive.infolist():
            if info.filename.startswith(f"{root}data/") and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + _LOCAL_HEADER.size - 4)
                # The archive's local header ends with the lengths of two fields that stand before the data.
                fields = struct.unpack("<HH", file.read(4))
                begin = info.header_offset + _LOCAL_HEADER.size + sum(fields)
                places[info.filename.removeprefix(f"{root}data/")] = _place(begin, info.file_size, path)
    return content, places


def _read_legacy(path: Path) -> tuple[Any, Places]:
    """Five pickles (a mark, a version, the system, the content, the storages' names), then the storages."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(PICKLE_LIMIT))
        magic, _, system, (content, storages), names = (read_pickle(head) for _ in range(5))
        if magic[0] != _LEGACY_MAGIC:
            raise ValueError("it is no checkpoint of torch")
        if system[0]["little_endian"] is not True:
            raise ValueError("its numbers are big-endian")
        places, begin = {}, head.tell()
        for name in names[0]:
            file.seek(begin)
            # Each storage stands behind the number of its elements.
            length = int.from_bytes(file.read(8), "little") * storages[name].itemsize
            places[name] = _place(begin + 8, length, path)
            begin += 8 + length
    return content, places


def _place(begin: int, length: int, path: Path) -> tuple[int, int]:
    if begin + length > path.stat().st_size:
        raise ValueError("it ends before its tensors do")
    return begin, length


def _views_of(content: Any) -> dict[str, View]:
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict):
        return {}
    return {key: value for key, value in state.items() if isinstance(value, View)}
