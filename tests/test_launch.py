"""The launch recipes: sound syntax, and commands that `train.py` and the topology agree with."""

import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dsv3_jax.cli import parse_train_args
from dsv3_jax.config import TrainConfig

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
CHIPS_A_HOST = 4  # v5p, v6e


def train_config(text: str) -> TrainConfig:
    """The configuration of the one `scripts/train.py` command in a recipe."""
    (command,) = re.findall(r"scripts/train\.py (configs/.*)", text)
    config, _, resume = parse_train_args(shlex.split(command))
    assert resume, "a recipe must continue where it was stopped"
    return config


def assert_mesh_fits(config: TrainConfig, devices: int) -> None:
    """The mesh spans the devices, and shares out every microbatch and the experts."""
    parallel = config.parallel
    sizes = [getattr(parallel, name) for name in ("replica", "fsdp", "expert", "tensor", "context")]
    known = math.prod(size for size in sizes if size != -1)
    assert devices % known == 0 and (-1 in sizes or known == devices)
    batch_ways = devices // (parallel.tensor * parallel.context)
    assert config.batch.microbatch_size % batch_ways == 0
    assert config.model.n_routed_experts % parallel.expert == 0


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["gcloud_tpu_vm.sh", "slurm.sbatch"])
def test_shell_recipes_parse(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def one_line(path: Path) -> str:
    """A shell script with its continued lines joined, and $OUT and quotes filled in."""
    text = path.read_text().replace("\\\n", " ")
    return text.replace('"$OUT"', "out").replace("$OUT", "out").replace('cache"', "cache")


def test_gcloud_recipe(in_root):
    text = one_line(LAUNCH / "gcloud_tpu_vm.sh")
    cores = int(re.search(r"^TYPE=v5p-(\d+)", text, re.M)[1])
    chips = cores // 2  # a v5p type counts TensorCores
    assert f"{chips:,} chips" in text and f"{chips // CHIPS_A_HOST} hosts" in text
    assert_mesh_fits(train_config(text), chips)
    usage = subprocess.run(["bash", LAUNCH / "gcloud_tpu_vm.sh"], capture_output=True, text=True)
    assert usage.returncode == 2 and "create|install|start" in usage.stderr


def test_gke_recipe(in_root):
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    a_host = container["resources"]["limits"]["google.com/tpu"]
    assert a_host == CHIPS_A_HOST
    assert job["parallelism"] == job["completions"] == chips // a_host
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0 < manifest["spec"]["failurePolicy"]["maxRestarts"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    (on_bad_input,) = manifest["spec"]["failurePolicy"]["rules"]
    assert on_bad_input["action"] == "FailJobSet"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    (shell,) = container["args"]
    assert shell.startswith("exec python scripts/train.py ")
    assert_mesh_fits(train_config(shell), chips * replicated["replicas"])


def test_slurm_recipe(in_root):
    text = one_line(LAUNCH / "slurm.sbatch")
    settings = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.M))
    tasks, gpus = settings["ntasks-per-node"], settings["gpus-per-node"]
    assert tasks == gpus
    assert_mesh_fits(train_config(text), int(settings["nodes"]) * int(gpus))
    # Settings after the first command would be ignored.
    assert text.rindex("#SBATCH --") < text.index("set -euo pipefail")


def restart(times: int, program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "scripts/restart.py", "--times", str(times), "--pause", "0"]
        + [sys.executable, "-c", program, "--resume", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Notes that it ran, then ends with the code that is left for this run.
_PROGRAM = """
import os, signal, sys
path, *codes = sys.argv[2:]
with open(path, "a+") as file:
    file.write("x")
    file.flush()
    code = int(codes[os.stat(path).st_size - 1])
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("times", "codes", "runs", "code"),
    [
        (5, "1 -9 0", 3, 0),
        (5, "0 1", 1, 0),
        (5, "2 0", 1, 2),
        (5, "1 2 0", 2, 2),
        (2, "1 1 1 0", 3, 1),
        (1, "-9 -9 0", 2, 128 + 9),
        (0, "1 0", 1, 1),
    ],
)
def test_restarts_after_failures_but_not_after_bad_input(tmp_path, times, codes, runs, code):
    process = restart(times, _PROGRAM, str(tmp_path / "runs"), *codes.split())
    _, err = process.communicate(timeout=60)
    assert (process.returncode, (tmp_path / "runs").stat().st_size) == (code, runs), err
    assert err.count("restart") == runs - 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_is_passed_on_and_not_followed_by_a_restart(number, code):
    program = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit({code}))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = restart(5, program)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "") and time.monotonic() - start < 20


def test_a_command_without_resume_is_refused():
    done = subprocess.run(
        [sys.executable, "scripts/restart.py", "--times", "3", "true"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "must have --resume" in done.stderr
