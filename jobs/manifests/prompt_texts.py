"""From the texts of rows and axes to those that are drawn: templates expanded, searched texts replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.axes import Axis
from latentmill.jobs.manifests.axis_values import MAX_AXIS_VALUES, MAX_VALUES_BYTES
from latentmill.jobs.manifests.fields import MAX_TEXT_BYTES, shorten
from latentmill.jobs.manifests.replacements import FIELDS_WITH_TEXT, Replacements, replaced_by, replacements_of
from latentmill.jobs.manifests.template_tree import COUNT_LIMIT
from latentmill.jobs.manifests.templates import MAX_VARIANTS, TemplateError
from latentmill.jobs.manifests.wildcards import Lines, Templates

TEMPLATES = ("none", "dynamic", "dynamic-all")
"""How prompts are read: as they are, as templates of which each sample draws one text by its seed, or of which all are
drawn."""

TEMPLATE_COLUMN = "prompt_template"
"""The column of records that keeps the text before it was expanded."""


@dataclass(frozen=True, kw_only=True)
class PromptTexts:
    """How the texts of one job come about. `template` is one of TEMPLATES; it concerns prompts only."""

    template: str
    templates: Templates
    replaced: Mapping[str, Replacements]
    prompts_from_axis: bool

    @property
    def counts_variants(self) -> bool:
        """Whether rows stand for several prompts each."""
        return self.template == "dynamic-all" and not self.prompts_from_axis

    @property
    def from_templates(self) -> bool:
        """Whether a text that is given is not yet one to draw."""
        return self.template == "dynamic" or self.counts_variants

    def changes(self, name: str) -> bool:
        """Whether texts of that field are drawn otherwise than they are given."""
        return bool(self.replaced[name].axes) or (name == "prompt" and self.from_templates)

    def prompt(self, text: str, seed: int, variant: int, chosen: Mapping[str, Any]) -> str:
        """What a sample draws. `chosen` has the axes' values by name; `variant` counts the texts of the template."""
        if self.counts_variants:
            text = self.templates.text(text, variant)
        elif self.from_templates:
            text = self.templates.draw(text, seed)
        return self.replaced["prompt"].replace(text, chosen)

    def negative(self, text: str, chosen: Mapping[str, Any]) -> str:
        """What a sample is kept from."""
        return self.replaced["negative_prompt"].replace(text, chosen)

    def variants(self, text: str) -> int:
        """How many prompts a row's text stands for. Raises TemplateError if they are too many."""
        if not self.counts_variants:
            return 1
        count = self.templates.parse(text).count
        if count > MAX_VARIANTS:
            shown = f"{count:,}" if count < COUNT_LIMIT else f"{COUNT_LIMIT:,} or more"
            raise TemplateError(
                f"the template stands for {shown} prompts, the limit is {MAX_VARIANTS:,}; shorten it, or draw some of "
                f"them: --template dynamic"
            )
        return count

    def fault(self, name: str, text: str) -> str | None:
        """Why a given text cannot be drawn, or None."""
        replaced = self.replaced[name]
        if name == "negative_prompt" or not self.from_templates:
            return replaced.fault(name, text)
        try:
            longest = self.templates.parse(text).longest * replaced.worst_growth
            self.variants(text)
        except TemplateError as error:
            return str(error)
        if longest <= MAX_TEXT_BYTES:
            return None
        return f"the template can become {longest:,.0f} bytes long, the limit is {MAX_TEXT_BYTES:,}; shorten it"

    def longest(self, name: str, text: str) -> str:
        """About the longest text that can come of a given one."""
        if name == "prompt" and self.from_templates:
            text = self.templates.parse(text).longest_text()
        replaced = self.replaced[name]
        return replaced.replace(text, replaced.longest_choice())


def prompt_texts(template: str, wildcards: Lines, axes: Sequence[Axis]) -> PromptTexts:
    """How texts come about with these axes."""
    values = {axis.name: axis.values for axis in axes}
    return PromptTexts(
        template=template,
        templates=Templates(wildcards),
        replaced={name: replacements_of(name, values) for name in FIELDS_WITH_TEXT},
        prompts_from_axis="prompt" in values,
    )


def added_columns(template: str, axes: Sequence[Axis]) -> list[str]:
    """The columns of records, beside our own, that keep what a row's texts came of."""
    replacing = [axis.name for axis in axes if replaced_by(axis.name) is not None]
    return replacing if template == "none" else [*replacing, TEMPLATE_COLUMN]


def expand_axes(template: str, templates: Templates, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes, where all prompts of templates are drawn with those of a prompt axis as its values."""
    if template != "dynamic-all":
        return tuple(axes)
    return tuple(replace(axis, values=_expanded(axis, templates)) if axis.name == "prompt" else axis for axis in axes)


def _expanded(axis: Axis, templates: Templates) -> tuple[str, ...]:
    try:
        nodes = [templates.parse(str(value)) for value in axis.values]
    except TemplateError as error:
        raise UsageError(f"sweep axis prompt: {error}") from None
    count = sum(node.count for node in nodes)
    if count > MAX_AXIS_VALUES:
        raise UsageError(
            f"sweep axis prompt: its templates stand for {count:,} prompts, the limit is {MAX_AXIS_VALUES:,}; shorten "
            f"them, or put them into the manifest instead"
        )
    for node, value in zip(nodes, axis.values, strict=True):
        if node.longest > MAX_TEXT_BYTES:
            raise UsageError(
                f"sweep axis prompt: {shorten(value)} can become {node.longest:,} bytes long, the limit is "
                f"{MAX_TEXT_BYTES:,}; shorten it"
            )
    size = sum(node.count * node.longest for node in nodes)
    if size > MAX_VALUES_BYTES:
        raise UsageError(
            f"sweep axis prompt: its templates stand for up to {size:,} bytes of prompts, the limit is "
            f"{MAX_VALUES_BYTES:,}; put them into the manifest instead"
        )
    return tuple(dict.fromkeys(node.text(number) for node in nodes for number in range(node.count)))
