"""The arithmetic between rows, axes, samples and chunks: prefix sums and mixed radices, never a list of samples.

A *class* is a set of rows that are alike in everything a row says about shape and loop (size, guided or not, steps,
sampler); a *group* is a class together with those axis values that complete the key. A group's samples are ordered by
row, then by the combinations of the axes, the last axis fastest, then by image. A *section* is all groups of one model
and shape, by steps and sampler: chunks are cut from it, one after the other, so that a chunk has one model, one shape,
and one loop unless it lies where two groups meet. In outputs of the first formats a section is one group.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentmill.engine import SAMPLER_CHOICES, SAMPLERS
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.axes import Axis, Dimension, count_combinations
from latentmill.jobs.manifests.fields import MODEL
from latentmill.jobs.plans.row_classes import LOOP_FIELDS, RowClass, class_fields, encode_value

MAX_GROUPS = 1024
MAX_SAMPLES = 10**10

Key = tuple[int, int, bool, int, str]
"""What a group's samples share: width, height, guided or not (their shape), steps and sampler (their loop)."""

_GroupEntry = tuple[tuple[int, Key], int, tuple[tuple[int, ...], ...]]
"""A group's model and key, its row class, and its places of the axes' values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Samples of one model, by its number, and of one key.

    `digits` holds, per dimension, the places of those values that belong here.

    They are at the positions [first, first + n_samples) of their section.
    """

    model: int
    key: Key
    row_class: int
    digits: tuple[tuple[int, ...], ...]
    first: int
    n_samples: int

    @property
    def combinations(self) -> int:
        """Samples per row and image in this group."""
        return math.prod(len(digits) for digits in self.digits)

    @property
    def loop(self) -> tuple[str, int]:
        """Its sampler and steps."""
        return self.key[4], self.key[3]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Groups that share a shape, and the chunks that are cut from their samples."""

    groups: tuple[Group, ...]
    n_samples: int
    first_chunk: int
    n_chunks: int

    def cut(self, start: int, stop: int) -> Iterator[tuple[Group, int, int]]:
        """The groups that have the section's positions [start, stop), each with the positions inside that group."""
        index = bisect_right(self.groups, start, key=lambda group: group.first) - 1
        while start < stop:
            group = self.groups[index]
            until = min(stop, group.first + group.n_samples)
            if until > start:
                yield group, start - group.first, until - group.first
            start, index = max(start, until), index + 1


class Piece(NamedTuple):
    """What a chunk has of a group: the samples at these places of the chunk."""

    chunk: int
    places: slice


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One sample: its row inside the part, the values' places in each dimension, the image of the row, the global
    ordinal.
    """

    row: int
    digits: tuple[int, ...]
    image: int
    ordinal: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All of a job's samples. `images[part, row_class]` sums the images per combination over the part's rows.

    A dimension is an axis, or axes that vary together. `models` are the values of the axis of models, if there is one.
    `with_models`: rows name theirs. `mixed` is False for outputs of the first formats, whose chunks have one loop each.
    """

    dimensions: tuple[Dimension, ...]
    classes: tuple[RowClass, ...]
    images: NDArray[np.int64]
    chunk_size: int
    mixed: bool = True
    models: tuple[str, ...] = ()
    with_models: bool = False

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes, those that vary together side by side."""
        return tuple(axis for dimension in self.dimensions for axis in dimension)

    @cached_property
    def combinations(self) -> int:
        """Samples per row and image."""
        return count_combinations(self.dimensions)

    @cached_property
    def n_samples(self) -> int:
        """All samples of the job."""
        return int(self.images.sum()) * self.combinations

    @property
    def n_chunks(self) -> int:
        """All chunks of the job."""
        last = self.sections[-1]
        return last.first_chunk + last.n_chunks

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups in order of execution, none empty."""
        return tuple(group for section in self.sections for group in section.groups)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections in order of execution, none empty."""
        totals = self.images.sum(axis=0)
        sections: list[Section] = []
        chunk = 0
        for entries in self._keys_by_section():
            groups: list[Group] = []
            first = 0
            for (model, key), row_class, digits in entries:
                samples = int(totals[row_class]) * math.prod(map(len, digits))
                groups.append(
                    Group(model=model, key=key, row_class=row_class, digits=digits, first=first, n_samples=samples)
                )
                first += samples
            chunks = -(-first // self.chunk_size)
            sections.append(Section(groups=tuple(groups), n_samples=first, first_chunk=chunk, n_chunks=chunks))
            chunk += chunks
        return tuple(sections)

    def check_limits(self) -> None:
        """Raise UsageError if there are too many groups or samples, without enumerating them."""
        count = len(self.classes) * math.prod(len(self._choices(dimension)) for dimension in self.dimensions)
        if count > MAX_GROUPS:
            raise UsageError(
                f"the job mixes {count:,} combinations of model, size, steps, sampler and guidance, the limit is "
                f"{MAX_GROUPS:,}; use fewer, or split the job"
            )
        if self.n_samples > MAX_SAMPLES:
            raise UsageError(f"the job has {self.n_samples:,} samples, the limit is {MAX_SAMPLES:,}; split it")

    def _keys_by_section(self) -> Iterator[list[_GroupEntry]]:
        """What each section consists of, in order of execution."""
        if self.mixed:
            ordered = sorted(self._keys(), key=lambda entry: entry[0])
        else:
            ordered = sorted(self._keys(), key=lambda entry: _order_before_mixed(entry[0][1]))
        for _, alike in itertools.groupby(ordered, lambda entry: self._section_key(*entry[0])):
            yield list(alike)

    def _section_key(self, model: int, key: Key) -> Hashable:
        """What groups of one section share. The folder's own sampler cannot share a batch with other loops."""
        return (model, *(key[:3] if self.mixed and key[4] in SAMPLERS else key))

    def _keys(self) -> Iterator[_GroupEntry]:
        fields = class_fields(self.axes, with_models=self.with_models)
        choices = [self._choices(dimension) for dimension in self.dimensions]
        for row_class, numbers in enumerate(self.classes):
            known: dict[str, Any] = dict(zip(fields, numbers, strict=True))
            for choice in itertools.product(*choices):
                values = known | {name: value for given, _ in choice for name, value in given.items()}
                shape = (values["width"], values["height"], bool(values["guided"]))
                key = (*shape, values["num_inference_steps"], SAMPLER_CHOICES[values["sampler"]])
                yield (values.get(MODEL, 0), key), row_class, tuple(digits for _, digits in choice)

    def _choices(self, dimension: Dimension) -> list[tuple[dict[str, int], tuple[int, ...]]]:
        """How a dimension splits into groups: the loop fields and models that it gives, and those values' places."""
        fields = [("guided" if axis.name == "guidance_scale" else axis.name, axis.values) for axis in dimension]
        fields = [(name, values) for name, values in fields if name in LOOP_FIELDS or name == MODEL]
        choices: dict[tuple[int, ...], list[int]] = {}
        for place in range(len(dimension[0].values)):
            given = tuple(
                self.models.index(str(values[place])) if name == MODEL else encode_value(name, values[place])
                for name, values in fields
            )
            choices.setdefault(given, []).append(place)
        names = [name for name, _ in fields]
        return [(dict(zip(names, given, strict=True)), tuple(places)) for given, places in choices.items()]

    def model_of(self, chunk: int) -> int:
        """The number of the model that draws the chunk."""
        return self.section_of(chunk)[0].groups[0].model

    def section_of(self, chunk: int) -> tuple[Section, int, int]:
        """The chunk's section and the positions [start, stop) of its samples in it."""
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"chunk {chunk} is outside 0..{self.n_chunks - 1}")
        section = self.sections[bisect_right(self.sections, chunk, key=lambda section: section.first_chunk) - 1]
        start = (chunk - section.first_chunk) * self.chunk_size
        return section, start, min(start + self.chunk_size, section.n_samples)

    def pace_of(self, chunk: int) -> tuple[Hashable, int]:
        """What chunks that take about as long have in common, and how many samples this one has."""
        section, start, stop = self.section_of(chunk)
        *_, (group, _, _) = section.cut(start, stop)
        return (group.model, *group.key), stop - start

    def pieces_of(self, section: Section, group: Group) -> Iterator[Piece]:
        """What chunks have of the section's group, in order."""
        end, size = group.first + group.n_samples, self.chunk_size
        for number in range(group.first // size, -(-end // size)):
            start = number * size
            places = slice(max(group.first - start, 0), min(end - start, size))
            yield Piece(section.first_chunk + number, places)

    def pieces(self, group: Group, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The parts that hold the group's positions [start, stop), each with the positions inside that part."""
        ends = self._ends_by_class[:, group.row_class] * group.combinations
        part = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            before = int(ends[part - 1]) if part else 0
            until = min(stop, int(ends[part]))
            if until > start:
                yield part, start - before, until - before
            start, part = max(start, until), part + 1

    def first_ordinal(self, part: int) -> int:
        """The ordinal of the part's first sample."""
        return int(self._images_before[part]) * self.combinations

    @cached_property
    def _ends_by_class(self) -> NDArray[np.int64]:
        return np.cumsum(self.images, axis=0)

    @cached_property
    def _images_before(self) -> NDArray[np.int64]:
        per_part = self.images.sum(axis=1)
        return np.asarray(np.cumsum(per_part) - per_part, dtype=np.int64)


def _order_before_mixed(key: Key) -> tuple[int, int, int, str, bool]:
    """The order of groups in outputs of the first formats."""
    width, height, guided, steps, sampler = key
    return width, height, steps, sampler, guided


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRows:
    """A part's rows for the arithmetic: each row's class and number of images."""

    classes: NDArray[np.int64]
    images: NDArray[np.int64]

    def places(self, grid: Grid, group: Group, part: int, start: int, stop: int) -> Iterator[Place]:
        """The samples at the group's positions [start, stop) inside this part."""
        rows = np.flatnonzero((self.classes == np.array(grid.classes[group.row_class])).all(axis=1))
        ends = np.cumsum(self.images[rows]) * group.combinations
        images_before = np.cumsum(self.images) - self.images
        first_ordinal = grid.first_ordinal(part)
        sizes = [len(dimension[0].values) for dimension in grid.dimensions]
        index = int(np.searchsorted(ends, start, side="right"))
        for position in range(start, stop):
            while position >= ends[index]:
                index += 1
            row = int(rows[index])
            count = int(self.images[row])
            inside = position - (int(ends[index - 1]) if index else 0)
            combination, image = divmod(inside, count)
            digits = _digits(combination, group.digits)
            ordinal = (
                first_ordinal + int(images_before[row]) * grid.combinations + _number(digits, sizes) * count + image
            )
            yield Place(row=row, digits=digits, image=image, ordinal=ordinal)


def _digits(combination: int, allowed: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The places of the axis values in the given combination of a group; the last axis varies fastest."""
    digits: list[int] = []
    for places in reversed(allowed):
        combination, digit = divmod(combination, len(places))
        digits.append(places[digit])
    return tuple(reversed(digits))


def _number(digits: Sequence[int], sizes: Sequence[int]) -> int:
    """The combination's number among all combinations of the job."""
    number = 0
    for digit, size in zip(digits, sizes, strict=True):
        number = number * size + digit
    return number
