"""The wheel, used outside of the checkout, and the `nanogpt` command."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch
from tests.conftest import words

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a wheel built from a copy of the checkout was installed."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in ("nanogpt", "config", "web"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    copied = [*ROOT.glob("*.py"), *ROOT.glob("data/**/prepare.py"), *ROOT.glob("*.toml"), ROOT / "README.md"]
    for path in copied:
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, source / path.relative_to(ROOT))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def nanogpt(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return launch.run(["-m", "nanogpt", *arguments], folder, {"PYTHONPATH": str(installed)})


def test_a_wheel_prepares_trains_and_samples_in_the_current_folder(installed, tmp_path):
    before = sorted(path.relative_to(installed).as_posix() for path in installed.rglob("*.py"))
    assert {"nanogpt/programs/train.py", "nanogpt/programs/config/quickstart.py"} <= set(before)
    assert (installed / "nanogpt" / "inference" / "cpu_kernels.cpp").is_file()
    assert (installed / "nanogpt" / "convert" / "model_card.md").is_file()
    assert (installed / "nanogpt" / "programs" / "web" / "index.html").is_file()
    (tmp_path / "novel.txt").write_text(words(900), encoding="utf-8")
    done = nanogpt(installed, tmp_path, "prepare", "novel.txt", "--out=data/novel")
    assert done.returncode == 0, done.stderr
    assert "nanogpt train config/quickstart.py --dataset=data/novel" in done.stdout
    sizes = ["--dataset=data/novel", "--block_size=16", "--batch_size=2", "--n_layer=1", "--n_embd=16"]
    done = nanogpt(installed, tmp_path, "train", "quickstart", "--max_iters=3", *sizes)
    assert done.returncode == 0 and "saved out-quickstart/step-000003" in done.stdout, done.stderr
    done = nanogpt(installed, tmp_path, "sample", "--out_dir=out-quickstart", "--num_samples=1")
    assert done.returncode == 0 and "-" * 15 in done.stdout, done.stderr
    done = nanogpt(installed, tmp_path, "bench", "quickstart", "--steps=1", "--warmup_steps=0", *sizes)
    assert done.returncode == 0 and "tokens/s" in done.stdout, done.stderr  # it imports train.py
    after = sorted(path.relative_to(installed).as_posix() for path in installed.rglob("*.py"))
    assert after == before and {path.name for path in tmp_path.iterdir()} == {
        "novel.txt",
        "data",
        "out-quickstart",
    }


def test_the_command_lists_programs_and_presets_and_names_near_ones(installed, tmp_path):
    done = nanogpt(installed, tmp_path)
    assert done.returncode == 0 and "nanogpt train " in done.stdout and "nanogpt presets" in done.stdout
    done = nanogpt(installed, tmp_path, "presets")
    assert len(done.stdout.splitlines()) == len(list((ROOT / "config").glob("*.py")))
    for name in ("--help", "presets"):  # as `| head` when it has read enough
        reader = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE)
        reader.wait()
        piped = [sys.executable, "-m", "nanogpt", name]
        done = subprocess.run(piped, cwd=ROOT, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    done = nanogpt(installed, tmp_path, "prepare", "shakespear")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: no text or dataset 'shakespear'; give PATH"
    )
    assert "shakespeare_char" in done.stderr and done.stderr.count("\n") == 1
    done = nanogpt(installed, tmp_path, "plot")
    assert done.stderr == "error: 0 runs given; expected run folders: nanogpt plot out\n"
    for unknown, near in {"trian": "train", "quickstart": "train quickstart"}.items():
        done = nanogpt(installed, tmp_path, unknown)
        error = f"error: unknown program {unknown!r}; did you mean nanogpt {near}?\n"
        assert (done.returncode, done.stderr) == (2, error)
    done = nanogpt(installed, tmp_path, "train", "--help")
    assert "    nanogpt train config/train_shakespeare_char.py  " in done.stdout
    done = nanogpt(installed, tmp_path, "prepare", "shakespeare", "--help")
    assert "    nanogpt prepare shakespeare --input=" in done.stdout and ".py" not in done.stdout
    done = nanogpt(installed, tmp_path, "train", "shakespear_char")
    assert done.returncode == 2 and "did you mean train_shakespeare_char" in done.stderr
    done = nanogpt(installed, tmp_path, "train", "--dataset=shakespeare_char")
    assert done.returncode == 2 and "nanogpt prepare shakespeare_char" in done.stderr


def test_an_editable_install_uses_the_checkout():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import nanogpt; from nanogpt import command; print(nanogpt.ROOT, command('prepare x'))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split(maxsplit=1) == [str(ROOT), "python data/x/prepare.py\n"]
