"""Sizes and hashes of Arrow columns, independent of their layout in memory and of Arrow's version."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def plain_type(type_: Any) -> Any:
    """The type without its encoding: dictionaries, views and extensions become the type of their values."""
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType):
        return plain_type(type_.storage_type)
    if pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    return type_


def can_carry(type_: Any) -> bool:
    """Whether a plain type can be measured and hashed: flat types, and lists and structs of them, but no maps."""
    if pa.types.is_null(type_) or pa.types.is_boolean(type_) or _is_bytes(type_):
        return True
    if _is_list(type_):
        return can_carry(type_.value_type)
    if pa.types.is_struct(type_):
        return all(can_carry(entry.type) for entry in type_)
    return bool(pa.types.is_primitive(type_) or pa.types.is_decimal(type_) or pa.types.is_fixed_size_binary(type_))


def to_plain(array: pa.Array) -> pa.Array:
    """The array with its plain type."""
    if isinstance(array, pa.ExtensionArray):
        return to_plain(array.storage)
    if pa.types.is_dictionary(array.type):
        return to_plain(array.dictionary_decode())
    wanted = plain_type(array.type)
    return array if wanted.equals(array.type) else array.cast(wanted)


def row_bytes(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Bytes of data in each row, independent of how the batch was cut."""
    total = np.zeros(len(batch), dtype=np.int64)
    for column in batch.columns:
        total += _value_bytes(column)
    return total


def _value_bytes(array: pa.Array) -> NDArray[np.int64]:
    type_ = array.type
    if pa.types.is_null(type_):
        return np.zeros(len(array), dtype=np.int64)
    if pa.types.is_boolean(type_):
        return np.ones(len(array), dtype=np.int64)
    if _is_bytes(type_):
        return _filled(pc.binary_length(array)) + 4
    if _is_list(type_):
        lengths = _filled(pc.list_value_length(array))
        inner = np.concatenate([[0], np.cumsum(_value_bytes(array.flatten()))])
        ends = np.cumsum(lengths)
        return np.asarray(inner[ends] - inner[ends - lengths] + 4, dtype=np.int64)
    if pa.types.is_struct(type_):
        total = np.ones(len(array), dtype=np.int64)
        for part in array.flatten():
            total += _value_bytes(part)
        return total
    return np.full(len(array), type_.bit_width // 8, dtype=np.int64)


def update_digest(digest: Any, array: pa.Array) -> None:
    """Feed one column into a hash: type, length, which values are present, and the values that are."""
    type_ = array.type
    digest.update(f"{_type_name(type_)}:{len(array)};".encode())
    if pa.types.is_null(type_):
        return
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(type_):
        for position in range(type_.num_fields):
            update_digest(digest, array.flatten()[position])
        return
    present = array.drop_null() if array.null_count else array
    if _is_list(type_):
        digest.update(_filled(pc.list_value_length(present)).astype("<i8").tobytes())
        update_digest(digest, present.flatten())
    elif _is_bytes(type_):
        digest.update(_filled(pc.binary_length(present)).astype("<i8").tobytes())
        digest.update(_joined(present))
    elif pa.types.is_boolean(type_):
        digest.update(np.packbits(present.to_numpy(zero_copy_only=False)).tobytes())
    elif len(present):
        width = type_.bit_width // 8
        start = present.offset * width
        digest.update(present.buffers()[1][start : start + len(present) * width])


def schema_digest(schema: pa.Schema) -> str:
    """A hash of names and types, in order."""
    text = "".join(
        f"{struct.pack('<I', len(entry.name.encode())).hex()}{entry.name}{_type_name(entry.type)}" for entry in schema
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _is_bytes(type_: Any) -> bool:
    types = pa.types
    return any(
        check(type_) for check in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _is_list(type_: Any) -> bool:
    types = pa.types
    return any(check(type_) for check in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def _type_name(type_: Any) -> str:
    # names of the type's values only: the name of a list's inner field differs between writers
    if _is_list(type_):
        return f"list<{_type_name(type_.value_type)}>"
    if pa.types.is_struct(type_):
        return f"struct<{','.join(f'{entry.name}:{_type_name(entry.type)}' for entry in type_)}>"
    return str(type_)


def _filled(lengths: Any) -> NDArray[np.int64]:
    return np.asarray(lengths.fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _joined(present: pa.Array) -> memoryview:
    """The bytes of all the values, one after the other; `present` has no nulls."""
    _, offsets, data = present.buffers()
    if data is None or not len(present):
        return memoryview(b"")
    wide = pa.types.is_large_string(present.type) or pa.types.is_large_binary(present.type)
    positions = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)
    first, last = positions[present.offset], positions[present.offset + len(present)]
    return memoryview(data)[int(first) : int(last)]
