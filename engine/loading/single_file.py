"""Checkpoints in one file with the original key names: which model it is, by keys and shapes."""

from __future__ import annotations

from latentmill.engine.families.family import Family, SingleFile
from latentmill.engine.families.table import FAMILIES
from latentmill.engine.loading.blueprint import Blueprint, check_fit
from latentmill.engine.loading.checkpoint import WeightsFile
from latentmill.engine.loading.files import shown
from latentmill.engine.loading.scheduler_config import PredictionType, SchedulerConfig
from latentmill.engine.types import EngineError


def is_partial(file: WeightsFile) -> bool:
    """Whether the file holds some of the parts alone. Raises EngineError as `recognise`."""
    _, version = _version_of(file)
    return version.autoencoder is None or version.text_encoders is None


def held_parts(file: WeightsFile, blueprint: Blueprint) -> frozenset[str]:
    """The parts of the blueprint whose weights are in the file."""
    family, version = _version_of(file)
    elsewhere = set() if version.autoencoder is not None else {family.autoencoder.component}
    if version.text_encoders is None:
        elsewhere |= {encoder.component for encoder in blueprint.encoders}
    return frozenset(blueprint.components) - elsewhere


def recognise(file: WeightsFile, prediction_type: str | None, companion: Blueprint | None = None) -> Blueprint:
    """The architecture of a single file, and of a companion's parts where the file does not hold its own.

    Raises EngineError for an unknown one, with the keys that were looked for, and for a companion of another family.
    """
    family, version = _version_of(file)
    where = str(file.path)
    if companion is not None and companion.family is not family:
        raise EngineError(
            f"{where} is {version.title}, but the folder with its other parts is of {companion.family.name}; name one "
            f"of {family.name} as tokenizer"
        )
    try:
        denoiser = family.denoiser.read(version.denoiser(file.shapes), where)
        if version.text_encoders is None:
            encoders = _other(companion, file, version).encoders
        else:
            found = version.text_encoders(file.shapes)
            encoders = tuple(encoder.configured(encoder.config, where) for encoder in found)
        if family.as_trained is not None:
            encoders = tuple(family.as_trained(denoiser, encoder) for encoder in encoders)
        blueprint = Blueprint(
            family=family,
            denoiser=denoiser,
            autoencoder=(
                _other(companion, file, version).autoencoder
                if version.autoencoder is None
                else family.autoencoder.read(version.autoencoder(file.shapes), where)
            ),
            scheduler=SchedulerConfig.from_dict(
                {
                    **family.scheduler,
                    **version.scheduler,
                    "rescale_betas_zero_snr": "ztsnr" in file.shapes,
                    "prediction_type": prediction_type or _prediction_type(file, version),
                }
            ),
            encoders=encoders,
            force_zeros_for_empty_prompt=family.zeros_for_empty_prompt,
            empty_tokens=sum(
                encoder.max_tokens
                for encoder in family.text_encoders
                if encoder.optional and encoder.component not in {other.component for other in encoders}
            ),
            denoiser_prefix=version.prefix,
            autoencoder_prefix=version.autoencoder_prefix,
        )
    except KeyError as error:
        raise EngineError(f"{file.path} looks like {version.title}, but has no key {error}") from None
    except EngineError:
        raise
    except (IndexError, ValueError) as error:
        raise EngineError(
            f"{file.path} looks like {version.title}, but its tensors have not the shapes of one: {error}"
        ) from None
    check_fit(blueprint, file.path)
    return blueprint


def _other(companion: Blueprint | None, file: WeightsFile, version: SingleFile) -> Blueprint:
    if companion is None:
        raise EngineError(
            f"{file.path} is {version.title}, and holds no text encoders or no autoencoder; name a diffusers folder of "
            "the same family as tokenizer, which has them"
        )
    return companion


def _version_of(file: WeightsFile) -> tuple[Family, SingleFile]:
    known = [(family, version) for family in FAMILIES for version in family.single_files]
    for family, version in known:
        if all(marker in file.shapes for marker in version.markers):
            return family, version
    for marker, reason in (entry for family in FAMILIES for entry in family.refused.items()):
        if marker in file.shapes:
            raise EngineError(f"{file.path} is {reason}")
    markers = dict.fromkeys(marker for _, version in known for marker in version.markers)
    raise EngineError(
        f"{file.path} is not a checkpoint that this version knows ({len(file.shapes)} tensors, first "
        f"{shown(next(iter(file.shapes), None))}): looked for some of {', '.join(markers)}"
    )


def _prediction_type(file: WeightsFile, version: SingleFile) -> PredictionType:
    remark = file.metadata.get("modelspec.prediction_type")
    if remark in ("v", "v_prediction") or "v_pred" in file.shapes:
        return "v_prediction"
    if remark == "epsilon":
        return "epsilon"
    if version.prediction_type is None:
        raise EngineError(
            f"{file.path} is {version.title}, whose files do not say what the denoiser predicts; give prediction_type: "
            f"{version.prediction_hint}"
        )
    return version.prediction_type
