"""The examples in configs/cluster are what Ray, KubeRay, Slurm and cron take, and the commands in them exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import typer
import yaml

from latentmill import cli

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs/cluster"
CRD = "LATENTMILL_KUBERAY_CRD"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def known_to(verb: str, words: list[str]) -> bool:
    """Whether the command's verb takes every flag among the words."""
    parameters = typer.main.get_command(cli.app).commands[verb].params
    flags = {name for parameter in parameters for name in parameter.opts}
    return {word for word in words if word.startswith("--")} <= flags


def test_the_cluster_of_ray_up_is_what_its_schema_asks_for():
    config = load("cluster.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 3}, schema)
    filled = subprocess.run(
        [sys.executable, "-c", PREPARE, str(FOLDER / "cluster.yaml")], capture_output=True, text=True, check=True
    )
    assert json.loads(filled.stdout) == ["gpu", "head"]


PREPARE = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
config = prepare_config(yaml.safe_load(open(sys.argv[1])))
validate_config(config)
print(json.dumps(sorted(config["available_node_types"])))
"""


def test_every_node_of_that_cluster_asks_for_the_token():
    config = load("cluster.yaml")
    for role in ("head", "worker"):
        [start] = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_AUTH_TOKEN_PATH=~/ray-token" in start
    assert "--dashboard-host=127.0.0.1" in "".join(config["head_start_ray_commands"])
    assert config["head_node_type"] in config["available_node_types"]


def obj(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = obj(
    ("name",),
    name=TEXT,
    image=TEXT,
    ports=many(obj(("containerPort",), name=TEXT, containerPort=NUMBER)),
    env=many(obj(("name",), name=TEXT, value=TEXT)),
    envFrom=many(obj(secretRef=obj(name=TEXT))),
    resources=obj(requests=TEXTS, limits=TEXTS),
    volumeMounts=many(obj(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
POD = obj(
    ("spec",),
    spec=obj(
        ("containers",),
        containers=many(CONTAINER),
        volumes=many(obj(("name",), name=TEXT, emptyDir=obj(sizeLimit=TEXT))),
        tolerations=many(obj(key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect=TEXT)),
    ),
)
WORKERS = obj(
    ("groupName", "template"),
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    rayStartParams=TEXTS,
    template=POD,
)
RAYJOB = obj(
    ("apiVersion", "kind", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=obj(name=TEXT),
    spec=obj(
        entrypoint=TEXT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        backoffLimit=NUMBER,
        submissionMode={"type": "string"},
        rayClusterSpec=obj(
            ("headGroupSpec",),
            rayVersion=TEXT,
            authOptions=obj(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=obj(idleTimeoutSeconds=NUMBER),
            headGroupSpec=obj(("template",), rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=many(WORKERS),
        ),
    ),
)
"""What KubeRay 1.6.2 and 1.7.0 accept, of the fields that the example uses; any other is a slip of the pen."""


def test_the_rayjob_has_the_fields_of_kuberay_and_no_others():
    jsonschema.validate(load("rayjob.yaml"), RAYJOB)
    broken = load("rayjob.yaml")
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAYJOB)


@pytest.mark.skipif(CRD not in os.environ, reason=f"{CRD} does not name KubeRay's file ray.io_rayjobs.yaml")
def test_the_rayjob_is_valid_under_kuberays_own_definition():
    """The definition is 1.4 MB of another project's text and is not kept here; name a copy to check against it."""
    definition = yaml.load(Path(os.environ[CRD]).read_text(), Loader=yaml.CSafeLoader)
    [version] = [entry for entry in definition["spec"]["versions"] if entry["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(load("rayjob.yaml"), schema)


def strict(schema: Any) -> Any:
    """A definition's schema with unknown fields refused, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema
    return {name: strict(value) for name, value in schema.items()} | ({"additionalProperties": False} if closed else {})


def test_the_rayjob_runs_a_command_of_ours_and_holds_no_secret():
    spec = load("rayjob.yaml")["spec"]
    program, verb, *words = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("latentmill", "run")
    assert known_to(verb, words)
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    text = (FOLDER / "rayjob.yaml").read_text()
    assert not re.search(r"(KEY|TOKEN|SECRET)[A-Z_]*\s*[:=]\s*['\"]?(?!\.\.\.)[A-Za-z0-9]", text)


@pytest.mark.slow
def test_the_line_of_cron_runs_and_names_tonights_output(tmp_path: Path):
    [line] = [
        line for line in (FOLDER / "nightly.cron").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    *times, command = line.split(maxsplit=5)
    assert all(re.fullmatch(r"\*|[0-9]{1,2}", field) for field in times)
    assert "%" not in command  # to cron that is the end of the line
    (tmp_path / ".latentmill.env").write_text(
        f"export NIGHTLY_JOB={ROOT}/configs/jobs/nightly-sweep.yaml NIGHTLY_OUT={tmp_path}/sweep\n"
    )
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stub = bin_folder / "latentmill"
    stub.write_text(
        f'#!/bin/sh\necho "$@" >"{tmp_path}/said"\ntest "$1" = submit && shift\n'
        f'exec "{sys.executable}" -m latentmill plan "$@" --json\n'
    )
    stub.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(["/bin/sh", "-c", command], env=environment, cwd=ROOT, check=False)
    log = (tmp_path / "latentmill-nightly.log").read_text()
    assert done.returncode == 0, log
    verb, *words = (tmp_path / "said").read_text().split()
    assert verb == "submit"
    assert known_to(verb, words)
    assert re.fullmatch(rf"{tmp_path}/sweep/\d{{4}}-\d\d-\d\d", json.loads(log)["out"])


@pytest.mark.parametrize(("code", "told"), [(0, 0), (4, 0), (1, 1), (130, 130)])
def test_a_task_of_the_slurm_array_runs_its_shard_and_is_well_when_others_are_at_work(
    tmp_path: Path, code: int, told: int
):
    script = FOLDER / "slurm-array.sh"
    text = script.read_text(encoding="utf-8")
    [(first, last)] = re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", text, re.MULTILINE)
    [shards] = re.findall(r"^SHARDS=(\d+)\b", text, re.MULTILINE)
    assert (first, last) == ("1", shards)
    stub = tmp_path / "srun"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{tmp_path}/said"\nexit {code}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["/bin/sh", str(script), "my prompts.txt", f"{tmp_path}/out"], env=environment, check=False)
    assert done.returncode == told
    program, verb, *words = (tmp_path / "said").read_text().splitlines()
    assert (program, verb, words[0]) == ("latentmill", "run", "my prompts.txt")
    assert known_to(verb, words)
    assert words[words.index("--shard") + 1] == "3/8"
