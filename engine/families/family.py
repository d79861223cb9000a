"""What a family declares: networks, text encoders, key names, single files, further conditions. No torch here."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from latentmill.engine.loading.config import Json
from latentmill.engine.loading.scheduler_config import PredictionType
from latentmill.engine.types import EngineError, GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from latentmill.engine.networks.interface import Autoencoder

Config = TypeVar("Config")
Network_co = TypeVar("Network_co", covariant=True)

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a file, by key."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a weight comes from: a key of the file, one third of it where `third` is given, or its transpose.

    `rows` are the first and the one after the last of the rows that are taken. Of `swapped` ones the second half comes
    first.
    """

    key: str
    third: int | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    swapped: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderSpec(ABC):
    """One text encoder: its parts in a folder, its config.json once it has been read, and all that its kind needs.

    `pad_id` overrides the tokenizer's own padding. The states of an encoder that `follows` are further tokens; those of
    others are further features of the same tokens. An `optional` one may be left out, and zeros stand for its states.
    `tokenizer_class` is a class of transformers, `usual_tokenizer` the hub id of the vocabulary that such encoders were
    trained with. `marks` counts the tokens around a prompt. `spare_tokens` tells whether the network may know tokens
    that its vocabulary has not. `alias` is its name in the keys of single files, where those have one.
    """

    component: str
    tokenizer: str
    config: Json = field(default_factory=dict)
    pad_id: int | None = None
    follows: bool = False
    optional: bool = False
    alias: str = ""

    tokenizer_class: ClassVar[str]
    usual_tokenizer: ClassVar[str]
    marks: ClassVar[int] = 2
    spare_tokens: ClassVar[bool] = False

    @property
    @abstractmethod
    def width(self) -> int:
        """Features of one token's state; 0 where no token's state is used."""

    @property
    def pooled_width(self) -> int:
        """Features of the prompt's pooled embedding; 0 where there is none."""
        return 0

    @property
    def max_tokens(self) -> int:
        """Tokens per prompt, start and end marks included."""
        return int(self.config.get("max_position_embeddings", 77))

    def configured(self, config: Json, where: str) -> Self:
        """The same encoder with a config. Raises EngineError for a field that is not what it should be."""
        return replace(self, config=self.checked_config(config, where))

    @staticmethod
    @abstractmethod
    def checked_config(config: Json, where: str) -> dict[str, Any]:
        """What shapes the network, each field checked. Raises EngineError."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, without weights."""

    @abstractmethod
    def encode(self, network: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids `(n, l)` -> token states `(n, l, width)`, and the pooled state `(n, pooled_width)` if any."""

    @abstractmethod
    def folder_name(self, key: str) -> str | None:
        """Our name of a key of a folder's file; None for a key that no picture depends on."""

    @abstractmethod
    def original_name(self, prefix: str, key: str) -> Origin:
        """Where one of our weights lies in a single file whose encoder has this prefix."""

    @abstractmethod
    def original_facts(self) -> tuple[str, tuple[tuple[str, Any, Any], ...]]:
        """The class in configs of the original command, and its parameters: name, value, the class's default."""


def _without_names(_: object, ours: Iterable[str]) -> dict[str, Origin]:
    raise unnamed(next(iter(ours)))


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec(Generic[Config, Network_co]):
    """A denoiser or an autoencoder: its folder, how its config.json becomes a network, and its weights' names in files.

    `read` takes the JSON and its place, and raises EngineError; what the engine asks of the value is DenoiserConfig or
    AutoencoderConfig. `build` makes the network without weights. `folder_name` is our name of a key of a folder's file,
    or None for a key that no picture depends on. `original_names` says where our weights lie in a single file, and is
    not needed where there are none.
    """

    component: str
    read: Callable[[Json, str], Config]
    build: Callable[[Config], Network_co]
    folder_name: Callable[[str], str | None] = str
    original_names: Callable[[Config, Iterable[str]], dict[str, Origin]] = _without_names


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleFile:
    """One version of a family as a single file: how it is told by its keys, and what no shape shows.

    All of `markers` must be in the file. `denoiser`, `autoencoder` and `text_encoders` read configs from its
    shapes; they raise KeyError, IndexError or ValueError for a file that is not of this version. What is None is not in
    the file, and comes from a folder of the same family. `prediction_type` is None where the files do not say what the
    denoiser predicts: then `prediction_hint` says what to give. `prefix` begins the denoiser's keys, and
    `autoencoder_prefix` the autoencoder's, unless their own names have it.
    """

    title: str
    markers: tuple[str, ...]
    denoiser: Callable[[Shapes], Json]
    autoencoder: Callable[[Shapes], Json] | None
    text_encoders: Callable[[Shapes], tuple[TextEncoderSpec, ...]] | None
    scheduler: Json
    prefix: str = ""
    autoencoder_prefix: str = ""
    prediction_type: PredictionType | None = "epsilon"
    prediction_hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Everything that the engine knows of one family.

    `pipelines` are the classes of its model_index.json, `text_encoders` those of a folder, still without configs.
    `encoder_prefix` begins the keys of the encoder `{index}` or `{alias}` in a single file, `ignored` are patterns of
    keys that no picture depends on, `ignored_of` more of them for a first encoder, and `refused` says of a key which
    known but unsupported model it belongs to. `conditions` gives the denoiser's further arguments, for a pooled state
    and a request. `zeros_for_empty_prompt`: an empty negative prompt means zeros, unless the folder says otherwise.
    `scheduler` is what its pipelines take for granted of a folder's scheduler config. `plain_prompts`: brackets are
    text to its encoders, and a prompt is never encoded in several chunks. `as_trained` changes an encoder to what the
    denoiser's config says that it was trained with.
    """

    name: str
    pipelines: tuple[str, ...]
    text_encoders: tuple[TextEncoderSpec, ...]
    denoiser: NetworkSpec[Any, nn.Module]
    autoencoder: NetworkSpec[Any, Autoencoder]
    single_files: tuple[SingleFile, ...] = ()
    encoder_prefix: str = ""
    ignored: tuple[str, ...] = ()
    ignored_of: Callable[[TextEncoderSpec], tuple[str, ...]] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    conditions: Callable[[Tensor, GenerationRequest], Mapping[str, Tensor]] | None = None
    zeros_for_empty_prompt: bool = False
    scheduler: Json = field(default_factory=dict)
    plain_prompts: bool = False
    as_trained: Callable[[Any, TextEncoderSpec], TextEncoderSpec] | None = None


def renamed(key: str, table: Mapping[str, str]) -> str:
    """The key with the first pattern that it begins with replaced."""
    for pattern, replacement in table.items():
        name, changes = re.subn(f"^{pattern}", replacement, key)
        if changes:
            return name
    return key


def unnamed(key: str) -> EngineError:
    """The error for a weight of ours that single files have no name for."""
    return EngineError(f"{key} has no name in the original checkpoints")


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that the pattern's group takes among the keys; 0 if it matches none.

    Patterns take three digits: a key with more belongs to no known model, and is refused as unexpected.
    """
    matches = map(re.compile(pattern).match, shapes)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)
