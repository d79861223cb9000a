"""A pickled checkpoint is foreign code: nothing of it runs, whatever torch's switches say; broken ones are refused."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from latentmill.engine.loading.checkpoint import open_weights
from latentmill.engine.types import EngineError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.randn(4, 4).half(), "n": torch.arange(5)}


class Runs:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture(params=["0", "1"])
def switches(request, monkeypatch):
    """torch's own switches, as someone may have left them in the environment."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", request.param)


def canaries(mark: Path):
    return {
        "system": Runs(os.system, f"mkdir {mark}"),
        "mkdir": Runs(os.mkdir, str(mark)),
        "exec": Runs(builtins.exec, f"import os; os.mkdir({str(mark)!r})"),
        "eval": Runs(builtins.eval, f"__import__('os').mkdir({str(mark)!r})"),
        "torch": Runs(torch.save, {}, str(mark)),
    }


@pytest.mark.parametrize("name", ["system", "mkdir", "exec", "eval", "torch"])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, switches, name, place):
    mark = tmp_path / "canary"
    canary = canaries(mark)[name]
    content = {"state_dict": dict(WEIGHTS), "callbacks": canary}
    if place == "inside":
        content = {"state_dict": {**WEIGHTS, "evil": canary}}
    torch.save(content, tmp_path / "model.ckpt")
    file = open_weights(tmp_path / "model.ckpt")
    assert {key: file.read(key).tolist() for key in file.shapes} == {key: t.tolist() for key, t in WEIGHTS.items()}
    assert not mark.exists()
    # The canary is alive: whoever unpickles it in earnest sets it off.
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert mark.exists()


def test_code_in_a_checkpoint_of_old_torch_does_not_run(tmp_path, switches):
    mark = tmp_path / "canary"
    torch.save(
        {**WEIGHTS, "evil": Runs(os.mkdir, str(mark))},
        tmp_path / "model.ckpt",
        _use_new_zipfile_serialization=False,
    )
    file = open_weights(tmp_path / "model.ckpt")
    assert {key: file.read(key).tolist() for key in file.shapes} == {key: t.tolist() for key, t in WEIGHTS.items()}
    assert not mark.exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_tensors_come_back_as_they_were_saved(tmp_path, zipped, nested):
    shared = torch.arange(12.0)
    weights = collections.OrderedDict(
        {
            **WEIGHTS,
            "view": shared[2:8].reshape(2, 3),
            "transposed": torch.randn(3, 5).T,
            "bf16": torch.randn(3).bfloat16(),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "parameter": torch.nn.Parameter(torch.randn(2)),
        }
    )
    torch.save(
        {"state_dict": weights} if nested else weights, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped
    )
    file = open_weights(tmp_path / "m.ckpt")
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == file.shapes
    for key, tensor in weights.items():
        found = file.read(key)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor.detach())


def test_what_is_in_a_file_is_told_without_torch(tmp_path):
    torch.save(WEIGHTS, tmp_path / "m.ckpt")
    code = (
        "import sys; from pathlib import Path; from latentmill.engine.loading.checkpoint import open_weights;"
        f"print(len(open_weights(Path({str(tmp_path / 'm.ckpt')!r})).shapes), 'torch' in sys.modules)"
    )
    python = Path(os.sys.executable)
    found = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert found.stdout.split() == ["3", "False"]


def broken(path: Path, kind: str) -> None:
    torch.save(WEIGHTS, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-400])
    elif kind == "no pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "garbage":
        path.write_bytes(b"\x80\x02garbage")
    elif kind == "pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": 1})[:-1])
    else:
        with zipfile.ZipFile(path) as archive:
            data = archive.read("m/data.pkl")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", data)


@pytest.mark.parametrize("kind", ["truncated", "no pickle", "garbage", "pickle", "no numbers"])
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "m.ckpt"
    broken(path, kind)
    with pytest.raises(EngineError, match=r"m\.ckpt cannot be read"):
        open_weights(path).read("a")


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "m.ckpt"
    torch.save(WEIGHTS, path)
    file = open_weights(path)
    view = file._views["a"]
    for changed in ({"offset": 10**12}, {"stride": (10**9, 1)}, {"shape": (10**6, 10**6)}):
        values = {"storage": view.storage, "offset": view.offset, "shape": view.shape, "stride": view.stride, **changed}
        file._views["a"] = type(view)(**values)
        with pytest.raises(EngineError, match="the numbers of 'a' are not in it"):
            file.read("a")
