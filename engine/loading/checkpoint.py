"""Reading weights from a file: what is in it, without torch, and then one tensor at a time.

A pickled checkpoint (`.ckpt`, `.bin`) is a program that builds objects. Here it builds tensors' places in the file and
plain containers; every other name in it becomes an inert stub, so nothing of it is imported, called or executed,
whatever torch's own switches say.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Protocol

from latentmill.engine.types import EngineError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
_PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
_HEADER_LIMIT = 100 * 2**20

_STORAGE_DTYPES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
"""torch's storage classes: dtype and bytes per element."""

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""What stands before each member of a zip archive."""


class WeightsFile(Protocol):
    """A file of named tensors. `metadata` holds the file's own remarks, where the format has any."""

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
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _PICKLE_SUFFIXES:
        return PickledFile(path) if zipfile.is_zipfile(path) else LegacyPickledFile(path)
    raise EngineError(f"{path}: weights are read from .safetensors, {', '.join(_PICKLE_SUFFIXES)}; convert the file")


def _unreadable(path: Path, error: object) -> NoReturn:
    raise EngineError(f"{path} cannot be read: {error}; copy the file again")


class SafetensorsFile:
    """A `.safetensors` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                header = _safetensors_header(file)
                size = path.stat().st_size
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.shapes: dict[str, Shape] = {key: tuple(entry["shape"]) for key, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            _unreadable(path, error)
        if size < end:
            _unreadable(path, f"it ends after {size} bytes, before its tensors do")
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


def _safetensors_header(file: BinaryIO) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _HEADER_LIMIT:
        raise ValueError(f"its header claims {length} bytes")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise TypeError("its header is not a JSON object")
    return header


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of elements in the archive."""

    name: str
    dtype: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class _View:
    """Where a tensor lies in a storage, in elements."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


class _Stub:
    """Stands for any object but tensors and containers: takes whatever a pickle does to it, and does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __call__(self, *_args: object, **_kwargs: object) -> _Stub:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass


def _rebuild_tensor(storage: _Storage, offset: int, shape: Shape, stride: Shape, *_rest: object) -> _View:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor of it is malformed")
    return _View(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: _View, *_rest: object) -> _View:
    return data


_KNOWN_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
}
"""All that a pickle may name and get: functions of this module and constructors of containers."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return _KNOWN_NAMES.get((module, name), _Stub)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, (dtype, itemsize), name, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return _Storage(str(name), dtype, itemsize)


class PickledFile:
    """A checkpoint as torch.save writes it since 1.6: a zip archive of one pickle and the raw storages.

    Tensors of the top level, or of its `state_dict`, are the file's weights. Anything else beside them is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise ValueError("it is a zip archive, but not of a checkpoint: no data.pkl in it")
                root = pickles[0].removesuffix("data.pkl")
                self._members = {
                    info.filename.removeprefix(f"{root}data/"): info
                    for info in archive.infolist()
                    if info.filename.startswith(f"{root}data/")
                }
                if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                    raise ValueError("its numbers are big-endian")
                with archive.open(pickles[0]) as file:
                    content = _RestrictedUnpickler(file).load()
        # A pickle that is broken, or made to break its reader, can raise nearly anything while it is taken apart.
        except Exception as error:  # noqa: BLE001
            _unreadable(path, f"{type(error).__name__}: {error}")
        self._views = _tensors_of(content, _View)
        self.shapes: dict[str, Shape] = {key: view.shape for key, view in self._views.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, as it was saved."""
        import torch

        view = self._views[key]
        dtype, itemsize = getattr(torch, view.storage.dtype), view.storage.itemsize
        if math.prod(view.shape) == 0:
            return torch.empty(view.shape, dtype=dtype)
        member = self._members.get(view.storage.name)
        reach = 1 + sum((side - 1) * step for side, step in zip(view.shape, view.stride, strict=True))
        start, end = view.offset * itemsize, (view.offset + reach) * itemsize
        if member is None or member.compress_type != zipfile.ZIP_STORED or end > member.file_size:
            _unreadable(self.path, f"the numbers of {key} are not in it")
        try:
            with self.path.open("rb") as file:
                file.seek(member.header_offset + _LOCAL_HEADER.size - 4)
                # The archive's local header ends with the lengths of two fields that stand before the data.
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(name_length + extra_length + start, 1)
                data = bytearray(file.read(end - start))
        except (OSError, struct.error) as error:
            _unreadable(self.path, f"{key}: {error}")
        if len(data) < end - start:
            _unreadable(self.path, f"it ends within {key}")
        return torch.frombuffer(data, dtype=dtype).as_strided(view.shape, view.stride)


class LegacyPickledFile:
    """A checkpoint as torch wrote it before 1.6; read by torch, which refuses all but tensors and containers."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        self.metadata: dict[str, str] = {}
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        # As above: the file is foreign, and torch lets many kinds of error through.
        except Exception as error:  # noqa: BLE001
            _unreadable(path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self._tensors = _tensors_of(content, torch.Tensor)
        self.shapes: dict[str, Shape] = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, as it was saved."""
        tensor: Tensor = self._tensors[key]
        return tensor


def _tensors_of(content: Any, kind: type[Any]) -> dict[str, Any]:
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict):
        return {}
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, kind)}
