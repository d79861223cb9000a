"""Checkpoints in one file with the original key names: which model it is, by keys and shapes."""

from __future__ import annotations

from latentmill.engine.families.family import Family, SingleFile
from latentmill.engine.families.table import FAMILIES
from latentmill.engine.loading.blueprint import Blueprint, check_fit
from latentmill.engine.loading.checkpoint import WeightsFile
from latentmill.engine.loading.config import PredictionType, SchedulerConfig
from latentmill.engine.loading.files import shown
from latentmill.engine.types import EngineError


def recognise(file: WeightsFile, prediction_type: str | None) -> Blueprint:
    """The architecture of a single file. Raises EngineError for an unknown one, with the keys that were looked for."""
    family, version = _version_of(file)
    where = str(file.path)
    try:
        blueprint = Blueprint(
            family=family,
            denoiser=family.denoiser.read(version.denoiser(file.shapes), where),
            autoencoder=family.autoencoder.read(version.autoencoder(file.shapes), where),
            scheduler=SchedulerConfig.from_dict(
                {
                    **version.scheduler,
                    "rescale_betas_zero_snr": "ztsnr" in file.shapes,
                    "prediction_type": prediction_type or _prediction_type(file, version),
                }
            ),
            encoders=tuple(encoder.configured(encoder.config, where) for encoder in version.text_encoders(file.shapes)),
            force_zeros_for_empty_prompt=family.zeros_for_empty_prompt,
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
