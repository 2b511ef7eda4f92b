"""products.cpp: compiled where a compiler is, done without where none is, the same on any processor."""

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt.native import GROUP, packed

ROOT = Path(__file__).resolve().parent.parent
compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"
)
PROGRAM = """
import json, sys, torch
from nanogpt import native
from nanogpt.quantize import Packed, PackedInt8
torch.manual_seed(0)
weight, bias, x = torch.randn(70, 96), torch.randn(70), torch.randn(9, 96)
found = {"why": native.why_not()}
if native.library():
    found["int8"] = PackedInt8(weight, bias)(x).tolist()
    found["float32"] = Packed(weight, bias)(x).tolist()
    found["bfloat16"] = Packed(weight.bfloat16(), bias.bfloat16())(x.bfloat16()).tolist()
print(json.dumps(found))
"""


def found_with(cache: Path, **environment: str) -> dict:
    """What a fresh process finds, with its cache in a folder of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "NANOGPT_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.int8, 4)])
def test_four_bytes_of_each_row_of_a_group_lie_together(dtype, unit):
    weight = torch.arange(70 * 8).view(70, 8).to(dtype)
    flat = packed(weight).flatten()
    for row, column in ((0, 0), (31, 7), (32, 3), (69, 5)):
        group, lane = divmod(row, GROUP)
        place = group * GROUP * 8 + column // unit * GROUP * unit + lane * unit + column % unit
        assert flat[place] == weight[row, column]
    assert len(flat) == 3 * GROUP * 8 and not packed(weight)[2, :, 6:].any()


@compiler
def test_it_is_compiled_once_and_kept(tmp_path):
    first = found_with(tmp_path)
    (file,) = (tmp_path / "native").iterdir()
    made = file.stat().st_mtime_ns
    assert found_with(tmp_path) == first and first["why"] == ""
    assert [f.stat().st_mtime_ns for f in (tmp_path / "native").iterdir()] == [made]


@compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of this family")
def test_processors_without_instructions_for_it_give_the_same(tmp_path):
    best, plain = found_with(tmp_path), found_with(tmp_path, CXX="g++ -march=x86-64")
    assert len(list((tmp_path / "native").iterdir())) == 2
    for dtype, bound in (("int8", 1e-6), ("float32", 1e-5), ("bfloat16", 2**-7)):
        torch.testing.assert_close(
            torch.tensor(best[dtype]), torch.tensor(plain[dtype]), atol=10 * bound, rtol=bound
        )


@compiler
@pytest.mark.parametrize("broken", ["a file where the folder should be", "no library"])
def test_a_cache_that_cannot_be_used_is_done_without(tmp_path, broken):
    cache = tmp_path / "cache"
    expected = found_with(tmp_path / "good")
    if broken == "no library":
        shutil.copytree(tmp_path / "good", cache)
        (file,) = (cache / "native").iterdir()
        file.write_text("nothing that could be loaded")
    else:
        cache.write_text("")
    assert found_with(cache) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is compiled")
def test_without_a_compiler_it_says_what_would_help(tmp_path):
    assert found_with(tmp_path, CXX="no-such-compiler") == {
        "why": "there is no C++ compiler no-such-compiler (apt install g++, or set CXX)"
    }
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: error: no OpenMP here' >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (why,) = found_with(tmp_path, CXX=str(script)).values()
    assert why.endswith("could not compile products.cpp: x.cpp:1: error: no OpenMP here")
