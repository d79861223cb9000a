"""The table of families. Nothing outside this folder names one."""

from __future__ import annotations

from collections.abc import Mapping

from latentmill.engine.families import flux, ldm, sd, sd3, sdxl
from latentmill.engine.families.family import Family

FAMILIES = (sd.FAMILY, sdxl.FAMILY, sd3.FAMILY, flux.FAMILY, ldm.FAMILY)

PIPELINES: Mapping[str, Family] = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}
"""The pipelines that the engine runs itself, by their class's name in model_index.json."""
