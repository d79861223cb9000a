"""The folder's scheduler config as typed values: the noise levels that a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from latentmill.engine.loading.config import Json
from latentmill.engine.loading.fields import Fields, refuse_other_than
from latentmill.engine.loading.flow import FLOW_SPACINGS, FlowShift

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "original"]

DIFFUSION_PREDICTIONS = ("epsilon", "v_prediction", "sample")

TIMESTEPS_LIMIT = 100_000
"""The most timesteps of training: far above what was published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """The folder's `scheduler/scheduler_config.json`, less its `_class_name`: the sampler is the user's choice.

    The last two before `flow` are for models distilled for few steps (arXiv:2310.04378). No folder has the spacing
    `original`, which is the original command's: `ModelSpec.timestep_spacing` asks for it. A model of flow matching has
    `flow`, predicts `flow`, and has no betas.
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...] | None
    rescale_betas_zero_snr: bool
    prediction_type: PredictionType
    timestep_spacing: TimestepSpacing
    steps_offset: int
    set_alpha_to_one: bool
    clip_sample: bool
    clip_sample_range: float
    original_inference_steps: int
    timestep_scaling: float
    flow: FlowShift | None = None

    @classmethod
    def from_dict(cls, config: Json, where: str = "scheduler/scheduler_config.json") -> SchedulerConfig:
        """Parse a diffusers scheduler config. Raises EngineError for a switch that is not supported.

        What only says how to sample (Karras sigmas, the solver's order) is not read: the sampler's name says that.
        """
        refuse_other_than(
            config,
            where,
            {
                "thresholding": (False,),
                "prediction_type": DIFFUSION_PREDICTIONS,
                "timestep_spacing": get_args(TimestepSpacing),
                "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
                "timestep_type": ("discrete",),
                "interpolation_type": ("linear",),
                "sigma_min": (None,),
                "sigma_max": (None,),
                "use_flow_sigmas": (False,),
            },
        )
        fields = Fields(config, where)
        kind = config.get("_class_name", "DDIMScheduler")
        flow = FlowShift.from_dict(config, where) if str(kind).startswith("FlowMatch") else None
        timesteps = fields.whole("num_train_timesteps", 1000, TIMESTEPS_LIMIT)
        trained = fields.numbers("trained_betas", 1.0, length=TIMESTEPS_LIMIT)
        if trained is not None and len(trained) != timesteps:
            raise fields.refusal("trained_betas", f"{timesteps} numbers, as many as num_train_timesteps")
        return cls(
            num_train_timesteps=timesteps,
            beta_start=fields.number("beta_start", 0.0001, 1.0),
            beta_end=fields.number("beta_end", 0.02, 1.0),
            beta_schedule=config.get("beta_schedule", "linear"),
            trained_betas=trained,
            rescale_betas_zero_snr=fields.flag("rescale_betas_zero_snr", default=False),
            prediction_type="flow" if flow is not None else config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get(
                "timestep_spacing", _DEFAULT_SPACING.get(kind, "leading") if isinstance(kind, str) else "leading"
            ),
            steps_offset=fields.whole("steps_offset", 0, timesteps - 1, least=0),
            set_alpha_to_one=fields.flag("set_alpha_to_one", default=kind == "DDIMScheduler"),
            clip_sample=fields.flag("clip_sample", default=kind in ("DDIMScheduler", "DDPMScheduler")),
            clip_sample_range=fields.number("clip_sample_range", 1.0, 1e6),
            original_inference_steps=fields.whole("original_inference_steps", 50, TIMESTEPS_LIMIT),
            timestep_scaling=fields.number("timestep_scaling", 10.0, 1e6),
            flow=flow,
        )

    def overridden(self, prediction_type: str | None, timestep_spacing: str | None) -> SchedulerConfig:
        """With the caller's choices in place of the files'. Raises EngineError for one that does not go with them."""
        given = {"prediction_type": prediction_type, "timestep_spacing": timestep_spacing}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        refuse_other_than(
            changes,
            "the model is of flow matching, but the job" if self.flow is not None else "the job",
            {
                "prediction_type": DIFFUSION_PREDICTIONS if self.flow is None else ("flow",),
                "timestep_spacing": get_args(TimestepSpacing) if self.flow is None else FLOW_SPACINGS,
            },
        )
        return replace(self, **changes)


_DEFAULT_SPACING: dict[str, TimestepSpacing] = {
    "EulerDiscreteScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
    "FlowMatchEulerDiscreteScheduler": "linspace",
    "FlowMatchHeunDiscreteScheduler": "linspace",
}
"""What each diffusers class assumes when its config file says nothing; every other class assumes `leading`."""
