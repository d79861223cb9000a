"""What a scheduler's config says of flow matching: how far its levels are shifted towards noise. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentmill.engine.loading.fields import Fields, refuse_other_than

TOKENS_LIMIT = 2**24
"""Patches of a picture at most, far above any that was drawn."""

FLOW_SPACINGS = ("linspace", "trailing")
"""How levels are spaced, before the shift: from 1 to the lowest of the training, or to 1 / steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowShift:
    """How far flow matching's noise levels are shifted towards noise (arXiv:2403.03206, section 5.3.2).

    By one factor, or where `dynamic` by one that grows with the number of patches of the picture: its logarithm is
    `base_shift` at `base_tokens`, `max_shift` at `max_tokens`, and linear in between and beyond.
    """

    shift: float
    dynamic: bool
    base_shift: float
    max_shift: float
    base_tokens: int
    max_tokens: int

    def factor(self, tokens: int) -> float:
        """The factor for a picture of so many patches."""
        if not self.dynamic:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> FlowShift:
        """Parse the config of one of diffusers' schedulers for flow matching. Raises EngineError."""
        refuse_other_than(
            config,
            where,
            {
                "invert_sigmas": (False,),
                "shift_terminal": (None,),
                "stochastic_sampling": (False,),
                "time_shift_type": ("exponential",),
                "timestep_spacing": FLOW_SPACINGS,
                "use_beta_sigmas": (False, None),
                "use_exponential_sigmas": (False, None),
                "use_karras_sigmas": (False, None),
            },
        )
        fields = Fields(config, where)
        base_tokens = fields.whole("base_image_seq_len", 256, TOKENS_LIMIT)
        return cls(
            shift=fields.number("shift", 1.0, 1e3, least=1e-3),
            dynamic=fields.flag("use_dynamic_shifting", default=False),
            base_shift=fields.number("base_shift", 0.5, 10.0, least=-10.0),
            max_shift=fields.number("max_shift", 1.15, 10.0, least=-10.0),
            base_tokens=base_tokens,
            max_tokens=fields.whole("max_image_seq_len", 4096, TOKENS_LIMIT, least=base_tokens + 1),
        )
