"""Files of a model, which may be hostile: only regular files are opened, and reading is bounded."""

from __future__ import annotations

import json
import reprlib
import stat
from pathlib import Path
from typing import Any

from latentmill.engine.types import EngineError

JSON_LIMIT = 16 * 2**20
"""Bytes of a JSON file; the largest published ones, indexes of sharded weights, take a few hundred kilobytes."""

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxstring, _short.maxother = 3, 12, 12, 100, 100


def shown(value: object) -> str:
    """A value from a file as an error shows it: in one line, and cut to a short length."""
    return _short.repr(value)


def check_regular(path: Path) -> None:
    """Raises EngineError for a pipe or device, which could block or never end, and for a folder.

    A file that is missing raises FileNotFoundError.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise EngineError(f"{path} is a folder, a pipe or a device; put the model's own file there")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises EngineError if it is missing or broken.

    Infinities and NaN come through: published schedules hold them in fields that nothing here reads.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(JSON_LIMIT + 1)
        if len(data) > JSON_LIMIT:
            raise EngineError(f"{path} is larger than {JSON_LIMIT} bytes, which no model's JSON is; copy it again")
        content = json.loads(data.decode())
    except EngineError:
        raise
    except FileNotFoundError:
        raise EngineError(f"{path} is missing: the folder is not a whole diffusers model folder") from None
    except RecursionError:
        raise EngineError(f"{path} cannot be read as JSON: it is nested too deeply; copy the file again") from None
    except (ValueError, OSError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {error}; copy the file again") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content
