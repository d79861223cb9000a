"""`--filter`: a small language of comparisons over the columns of a row, read by Python's parser and run by Arrow.

Nothing is evaluated as Python: names are columns, and only what is listed here is understood.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import nearest, shorten

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_MAX_LETTERS = 4096
_GRAMMAR = (
    "it takes columns, numbers, 'texts', True, False, None, < <= > >= == !=, in [...], 'text' in column, is None, "
    "and, or, not"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which rows to keep. `columns` are those that it looks at."""

    text: str
    columns: tuple[str, ...]
    _node: ast.expr

    def mask(self, table: pa.Table) -> pa.Array:
        """True for each row for which it holds; what is compared with a null does not."""
        found = pc.fill_null(_truth(self._node, table), fill_value=False)
        return found if isinstance(found, pa.ChunkedArray | pa.Array) else pa.repeat(found, table.num_rows)


def parse_filter(text: str, schema: pa.Schema) -> Filter:
    """The filter in a text. Raises UsageError that names the part that is not understood, or the unknown column."""
    try:
        if len(text) > _MAX_LETTERS:
            raise _NotUnderstoodError(f"it has more than {_MAX_LETTERS:,} letters")
        node = ast.parse(text.strip(), mode="eval").body
        columns = tuple(dict.fromkeys(part.id for part in ast.walk(node) if isinstance(part, ast.Name)))
        unknown = next((name for name in columns if name not in schema.names), None)
        if unknown is not None:
            known = ", ".join(schema.names)
            raise _NotUnderstoodError(f"there is no column {unknown!r}{nearest(unknown, schema.names)}; known: {known}")
        made = Filter(text=text, columns=columns, _node=node)
        made.mask(schema.empty_table())
    except SyntaxError as error:
        raise UsageError(f"filter {shorten(text)} is not understood: {error.msg}; {_GRAMMAR}") from None
    except (RecursionError, MemoryError):
        raise UsageError(f"filter {shorten(text)} is nested too deeply; write it flat") from None
    except (_NotUnderstoodError, ValueError) as error:  # a NUL character, or a number that is too large to be read
        raise UsageError(f"filter {shorten(text)}: {error}") from None
    return made


class _NotUnderstoodError(ValueError):
    """A part of a filter that its language does not have, or a comparison that makes no sense."""


def _truth(node: ast.expr, table: pa.Table) -> Any:
    """A column of true, false and null for what can be true of a row."""
    match node:
        case ast.BoolOp(op=operator, values=parts):
            join = pc.and_kleene if isinstance(operator, ast.And) else pc.or_kleene
            found = _truth(parts[0], table)
            for part in parts[1:]:
                found = join(found, _truth(part, table))
            return found
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return pc.invert(_truth(part, table))
        case ast.Compare(left=left, ops=operators, comparators=rights):
            found = None
            for comparison, right in zip(operators, rights, strict=True):
                one = _comparison(left, comparison, right, table)
                found, left = one if found is None else pc.and_kleene(found, one), right
            return found
        case ast.Name(id=name) if pa.types.is_boolean(table.schema.field(name).type):
            return table.column(name)
        case _:
            raise _NotUnderstoodError(f"{shorten(ast.unparse(node))} is not true or false; {_GRAMMAR}")


def _comparison(left: ast.expr, operator: ast.cmpop, right: ast.expr, table: pa.Table) -> Any:
    named = [side.id for side in (left, right) if isinstance(side, ast.Name)]
    if not named:
        raise _NotUnderstoodError(f"{shorten(ast.unparse(left))} is compared with no column; {_GRAMMAR}")
    type_ = table.schema.field(named[0]).type
    try:
        match operator:
            case ast.Is() | ast.IsNot():
                if not (isinstance(left, ast.Name) and _is_none(right)):
                    raise _NotUnderstoodError("`is` and `is not` are followed by None")
                null = pc.is_null(table.column(left.id))
                return null if isinstance(operator, ast.Is) else pc.invert(null)
            case ast.In() | ast.NotIn():
                found = _membership(left, right, table, type_)
                return found if isinstance(operator, ast.In) else pc.invert(found)
            case _:
                return _COMPARISONS[type(operator)](_value(left, table, type_), _value(right, table, type_))
    except (pa.ArrowException, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise _NotUnderstoodError(
            f"column {named[0]!r} is of type {type_}, and cannot be compared so: {reason}"
        ) from None


def _membership(left: ast.expr, right: ast.expr, table: pa.Table, type_: Any) -> Any:
    """`column in [...]`, or `'text' in column`."""
    if isinstance(left, ast.Constant) and isinstance(left.value, str) and isinstance(right, ast.Name):
        return pc.match_substring(table.column(right.id), left.value)
    if not isinstance(left, ast.Name) or not isinstance(right, ast.List | ast.Tuple | ast.Set):
        raise _NotUnderstoodError(f"{shorten(ast.unparse(right))} is no list; {_GRAMMAR}")
    values = pa.array([_value(item, table, type_).as_py() for item in right.elts], type_)
    return pc.if_else(pc.is_valid(table.column(left.id)), pc.is_in(table.column(left.id), values), None)


def _value(node: ast.expr, table: pa.Table, type_: Any) -> Any:
    """A column, or a constant in the column's type where that is of floating point: `guidance_scale == 3.3` holds."""
    match node:
        case ast.Name(id=name):
            return table.column(name)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return _scalar(-value, type_)
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return _scalar(value, type_)
        case ast.Constant(value=None):
            raise _NotUnderstoodError("None is compared by `is None` or `is not None`")
        case _:
            raise _NotUnderstoodError(f"{shorten(ast.unparse(node))} is neither a column nor a constant; {_GRAMMAR}")


def _scalar(value: bool | float | str, type_: Any) -> pa.Scalar:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return pa.scalar(float(value), type_) if is_number and pa.types.is_floating(type_) else pa.scalar(value)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
