"""Where a pickle's tensors lie, read without running it.

A pickle is a program for a small stack machine that may import, call and build anything. This reader does none of that:
it makes dicts, lists, tuples and texts, notes where tensors lie, and uses one inert placeholder for everything else. So
the file need not be trusted, and the number of steps bounds time and memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pickletools import genops
from typing import Any, BinaryIO, Final

PICKLE_LIMIT = 16 * 2**20
"""Bytes of a checkpoint's pickle, its tensors' numbers not counted; published ones take below 1 MB."""

STEPS_LIMIT = 400_000
"""Steps of one pickle. A tensor takes about 30 of them: published files, averages and all, stay below 100,000."""

_DIMENSIONS_LIMIT = 16

STORAGE_DTYPES = {
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


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in the file."""

    name: str
    dtype: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class View:
    """Where a tensor lies in a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Name(str):
    """A class or function that the pickle names. It is never looked up."""

    __slots__ = ()


class _Mark:
    """The stack machine's mark: where the items of a container begin."""


_INERT: Final = object()
"""The placeholder for anything that is not a container, text, number or tensor."""

_MARK: Final = _Mark()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK, "EMPTY_SET": _INERT}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_FILLS = {"SETITEM": 2, "APPEND": 1, "SETITEMS": 0, "APPENDS": 0, "ADDITEMS": 0}
"""Opcodes that fill a container, and how many items they take: 0 for all since the mark."""

_DROPS = {"POP": 1, "BUILD": 1, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_REFUSED = ("INST", "PERSID", "EXT1", "EXT2", "EXT4")
_REBUILDERS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")


def read_pickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """The content of the pickle at the file's position, which moves behind it, and the storages that it names.

    Can raise nearly anything for a broken or hostile pickle; never takes more than STEPS_LIMIT steps.
    """
    machine = _Machine()
    for step, (opcode, argument, _) in enumerate(genops(file)):
        if opcode.name == "STOP":
            return machine.stack.pop(), machine.storages
        if step >= STEPS_LIMIT:
            raise pickle.UnpicklingError(f"its pickle takes more than {STEPS_LIMIT} steps")
        machine.run(opcode.name, argument)
    raise pickle.UnpicklingError("its pickle has no end")


class _Machine:
    """The stack machine: its stack, its memo, and the storages that were named."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, name: str, argument: Any) -> None:
        """One step of the program. Opcodes that no checkpoint has are refused."""
        stack = self.stack
        if name in _PUTS:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name in ("PROTO", "FRAME"):
            pass
        elif argument is not None and name not in _REFUSED:
            stack.append(argument)  # a text, a number or bytes
        else:
            self._run_effect(name)

    def _run_effect(self, name: str) -> None:
        """The steps that would import, call or fill something when the pickle is run."""
        stack = self.stack
        if name in _FILLS:
            items = self._pop(_FILLS[name]) if _FILLS[name] else self._pop_to_mark()
            _fill(stack[-1], items)
        elif name in _DROPS:
            self._pop(_DROPS[name])
            if name in ("NEWOBJ", "NEWOBJ_EX"):
                stack.append(_INERT)
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(_result(function, arguments))
        elif name == "BINPERSID":
            storage = _storage(stack.pop())
            self.storages[storage.name] = storage
            stack.append(storage)
        elif name == "STACK_GLOBAL":
            module, qualified = self._pop(2)
            stack.append(_Name(f"{module} {qualified}") if isinstance(module, str) else _INERT)
        elif name in ("POP_MARK", "FROZENSET"):
            self._pop_to_mark()
            if name == "FROZENSET":
                stack.append(_INERT)
        else:
            raise pickle.UnpicklingError(f"its pickle has the opcode {name}, which no checkpoint has")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise pickle.UnpicklingError("its pickle takes more than is on its stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


def _fill(container: object, items: Sequence[Any]) -> None:
    if type(container) is list:
        container.extend(items)
    elif type(container) is dict:
        pairs = zip(items[::2], items[1::2], strict=True)
        # Only texts are used as keys; hashing another type could run its code.
        container.update((key, value) for key, value in pairs if type(key) is str)


def _result(function: object, arguments: Any) -> Any:
    """The result of a call that makes a tensor or a dict of tensors; the placeholder for any other."""
    if function == "collections OrderedDict":
        return {}
    if function in _REBUILDERS:
        return _view(*arguments[:4])
    if function == "torch._utils _rebuild_parameter":
        return arguments[0]
    return _INERT


def _storage(identity: Any) -> Storage:
    kind, name, key, *_ = identity
    module, _, storage = str(name).partition(" ")
    if kind != "storage" or module != "torch" or storage not in STORAGE_DTYPES:
        raise pickle.UnpicklingError(f"its pickle has an unknown kind of storage {str(name)[:80]!r}")
    return Storage(str(key), *STORAGE_DTYPES[storage])


def _view(storage: Any, offset: Any, shape: Any, stride: Any) -> View:
    sized = all(isinstance(sides, tuple | list) and len(sides) <= _DIMENSIONS_LIMIT for sides in (shape, stride))
    if not isinstance(storage, Storage) or not sized or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor of it is malformed")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor of it is malformed")
    return View(storage, offset, tuple(shape), tuple(stride))
