"""Cluster templates: they parse, use existing options only, and the Slurm script requeues itself."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

import train
from nanogpt import ROOT, presets

OPTIONS = frozenset(train.Config.__dataclass_fields__)

TEMPLATES = ROOT / "cluster"
SCRIPTS = sorted([*TEMPLATES.glob("*.sh"), *TEMPLATES.glob("*.sbatch")])
YAML = sorted(TEMPLATES.glob("*.yaml"))
PAGE = ROOT / "docs" / "scale.md"


def program(template: Path) -> str:
    """Return the shell commands of a template or a documentation page."""
    if template.suffix == ".md":
        return "\n".join(re.findall(r"```sh\n(.*?)```", template.read_text(encoding="utf-8"), re.DOTALL))
    if template.suffix != ".yaml":
        return template.read_text(encoding="utf-8")
    content = yaml.safe_load(template.read_text(encoding="utf-8"))
    if "run" in content:
        return content["run"]
    replicas = content["spec"]["pytorchReplicaSpecs"].values()
    containers = [c for r in replicas for c in r["template"]["spec"]["containers"]]
    assert len({c["args"][0] for c in containers}) == 1  # all pods run the same script
    return containers[0]["args"][0]


def commands(text: str) -> list[list[str]]:
    """Return the words of each command, including commands in comments, which users type."""
    joined = re.sub(r"\\\n\s*", "", text).replace("\n#", "\n").replace("'", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.count('"') % 2 == 0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_pass_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--shell=bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", [*SCRIPTS, *YAML, PAGE], ids=lambda path: path.name)
def test_every_option_exists(template):
    text = program(template)
    ours, theirs = OPTIONS, set(get_args_parser()._option_string_actions)
    checked = 0
    for words in commands(text):
        places = [i for i, word in enumerate(words) if word == "train.py"]
        for word in words[places[0] + 1 :] if places else []:
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in ours, word
                checked += 1
            elif word.endswith(".py") and word != "train.py":
                presets.find(word)
        if "torchrun" in words:
            for word in words[words.index("torchrun") + 1 : places[0] if places else None]:
                assert not word.startswith("--") or word.partition("=")[0] in theirs, word
                checked += 1
    assert checked


@pytest.mark.parametrize("template", [*SCRIPTS, *YAML], ids=lambda path: path.name)
def test_every_template_resumes_automatically(template):
    assert "--init_from=auto" in program(template)


def test_kubernetes_requests_match_the_started_processes():
    content = yaml.safe_load((TEMPLATES / "kubernetes.yaml").read_text(encoding="utf-8"))
    replicas = content["spec"]["pytorchReplicaSpecs"]
    words = shlex.split(program(TEMPLATES / "kubernetes.yaml"))
    assert sum(r["replicas"] for r in replicas.values()) == int(value(words, "--nnodes"))
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(value(words, "--nproc_per_node"))
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
    assert content["spec"]["nprocPerNode"] == value(words, "--nproc_per_node")


def value(words: list[str], option: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"{option}="))


@pytest.fixture
def slurm(tmp_path):
    """Run the batch script with an srun that exits with the given codes in turn; return the script's exit
    code, its output and its calls of Slurm commands."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "srun").write_text(
        'echo "srun $*" >> "$CALLS"\n'
        'code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"\n'
        'for word; do shift; [ "$word" = bash ] && break; done\n'
        'SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 bash "$@" >> "$CALLS"\n'
        "exit $code\n"
    )
    (bin_ / "scontrol").write_text(
        'echo "scontrol $*" >> "$CALLS"; [ "$1" != show ] || printf "n1\\nn2\\n"\n'
    )
    (bin_ / "python").write_text('echo "$MASTER_ADDR:$MASTER_PORT $RANK $LOCAL_RANK $WORLD_SIZE $*"\n')
    for path in bin_.iterdir():
        path.write_text("#!/usr/bin/env bash\n" + path.read_text())
        path.chmod(0o755)

    def run(*codes, **environment):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "calls").write_text("")
        about = {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        about |= {"CALLS": str(tmp_path / "calls"), "CODES": str(tmp_path / "codes"), **environment}
        done = subprocess.run(
            ["bash", TEMPLATES / "slurm.sbatch", "config/train_gpt2.py", "--out_dir=a run"],
            env={**os.environ, **about},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, (tmp_path / "calls").read_text()

    return run


def test_slurm_starts_one_process_per_gpu(slurm):
    code, _, calls = slurm(0)
    assert code == 0 and "scontrol requeue" not in calls
    assert "n1:32345 9 1 16 train.py config/train_gpt2.py --out_dir=a run --init_from=auto" in calls


def test_slurm_requeues_a_stopped_run(slurm):
    code, _, calls = slurm(75)
    assert code == 0 and "scontrol requeue 12345" in calls and calls.count("srun ") == 1
    code, said, calls = slurm(75, SLURM_RESTART_COUNT="100")
    assert code == 75 and "scontrol requeue" not in calls and "run sbatch again" in said


@pytest.mark.parametrize("code", [2, 70])
def test_slurm_does_not_retry_permanent_errors(slurm, code):
    left, _, calls = slurm(code)
    assert left == code and "scontrol requeue" not in calls and calls.count("srun ") == 1


def test_slurm_restarts_after_lost_processes(slurm):
    code, _, calls = slurm(76, 137, 74, 0)
    assert code == 0 and calls.count("srun ") == 4
    code, _, calls = slurm(*[137] * 9, TRIES="3")
    assert code == 137 and calls.count("srun ") == 3 and "scontrol requeue" not in calls
