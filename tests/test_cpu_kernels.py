"""cpu_kernels.cpp: compilation and caching, fallback without a compiler, equal results on any CPU."""

import hashlib
import json
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nanogpt.inference import cpu_kernels
from nanogpt.inference.cpu_kernels import GROUP, packed
from tests import launch

ROOT = Path(__file__).resolve().parent.parent
compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"
)
compiled = pytest.mark.skipif(
    cpu_kernels.library() is None, reason=f"cpu_kernels.cpp: {cpu_kernels.why_not()}"
)
PROGRAM = """
import json, sys, torch
from nanogpt.inference import cpu_kernels
from nanogpt.inference.quantize import Packed, PackedInt8
torch.manual_seed(0)
weight, bias, x = torch.randn(70, 96), torch.randn(70), torch.randn(9, 96)
found = {"why": cpu_kernels.why_not()}
if cpu_kernels.library():
    found["int8"] = PackedInt8(weight, bias)(x).tolist()
    largest = torch.tensor([1.0, -1.0]).expand(3072, 2).T  # every digit at an end of its range
    found["largest"] = PackedInt8(largest)(largest).tolist()
    found["float32"] = Packed(weight, bias)(x).tolist()
    found["bfloat16"] = Packed(weight.bfloat16(), bias.bfloat16())(x.bfloat16()).tolist()
print(json.dumps(found))
"""


def found_with(cache: Path, **environment: str) -> dict:
    """Return the results of a new process that uses `cache` as its cache folder."""
    variables = {"CXX": "g++", "NANOGPT_CACHE": str(cache), **environment}
    done = launch.run(["-c", PROGRAM], ROOT, variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled_here(tmp_path_factory) -> tuple[Path, dict]:
    """A cache with the compiled library, and the results of the process that compiled it."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, found_with(cache)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.int8, 4)])
def test_packed_layout_keeps_four_bytes_of_a_row_together(dtype, unit):
    weight = torch.arange(70 * 8).view(70, 8).to(dtype)
    flat = packed(weight).flatten()
    for row, column in ((0, 0), (31, 7), (32, 3), (69, 5)):
        group, lane = divmod(row, GROUP)
        place = group * GROUP * 8 + column // unit * GROUP * unit + lane * unit + column % unit
        assert flat[place] == weight[row, column]
    assert len(flat) == 3 * GROUP * 8 and not packed(weight)[2, :, 6:].any()


@compiled
@pytest.mark.parametrize("lengths", [[1], [40], [3, 40, 17], [20] * 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 16), (torch.float32, 48), (torch.bfloat16, 64)])
def test_batched_attention_equals_attention_per_sequence(dtype, size, heads, kv_heads, lengths):
    torch.manual_seed(0)
    B = len(lengths)
    keys, values = torch.randn(2, B + 1, kv_heads, 50, size).to(dtype)
    both = torch.randn(B, heads + 2 * kv_heads, size).to(dtype)
    q, kv = both[:, :heads], both[:, heads:].view(B, 2, kv_heads, size).transpose(0, 1)
    before = keys.clone()
    y = cpu_kernels.attend(q, kv, keys, values, torch.tensor(lengths))
    assert y.dtype == dtype and y.shape == (B, heads * size)
    for text, length in enumerate(lengths):
        assert torch.equal(keys[text, :, length - 1], kv[0, text])
        assert torch.equal(values[text, :, length - 1], kv[1, text])
        before[text, :, length - 1] = kv[0, text]
        k, v = (kept[text : text + 1, :, :length].double() for kept in (keys, values))
        exact = F.scaled_dot_product_attention(
            q[text, None, :, None].double(), k, v, enable_gqa=heads != kv_heads
        )
        bound = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(y[text].double(), exact.flatten(), atol=bound, rtol=bound)
        alone = [x[text : text + 1] for x in (q, kv.transpose(0, 1), keys, values)]
        alone[1] = alone[1].transpose(0, 1)
        assert torch.equal(cpu_kernels.attend(*alone, torch.tensor([length]))[0], y[text])
    assert torch.equal(keys, before)  # nothing else was written


@compiled
def test_supported_head_sizes_and_dtypes():
    assert cpu_kernels.attends(torch.float32, 64) and cpu_kernels.attends(torch.bfloat16, 256)
    wrong = [(torch.float32, 24), (torch.bfloat16, 48), (torch.float16, 64), (torch.float32, 512)]
    assert not any(cpu_kernels.attends(*each) for each in wrong)


@compiler
def test_library_is_compiled_once_and_cached(compiled_here, tmp_path):
    cache, first = compiled_here
    (file,) = (cache / "kernels").iterdir()
    made = file.stat().st_mtime_ns
    assert found_with(cache) == first and first["why"] == ""
    assert found_with(tmp_path / "other", CXX="env g++") == first  # multi-word command, as "ccache g++"
    assert [f.stat().st_mtime_ns for f in (cache / "kernels").iterdir()] == [made]


@compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="selects an x86-64 CPU model")
@pytest.mark.parametrize("architecture", ["x86-64", "haswell"])  # without vector instructions, with AVX2
def test_results_are_equal_on_older_processors(compiled_here, tmp_path, architecture):
    if architecture == "haswell" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor lacks AVX2")
    cache, best = compiled_here
    both = shutil.copytree(cache, tmp_path / "both")
    plain = found_with(both, CXX=f"g++ -march={architecture}")
    assert len(list((both / "kernels").iterdir())) == 2
    assert plain["largest"] == [[3072, -3072], [-3072, 3072]]
    for dtype, bound in (("int8", 1e-6), ("float32", 1e-5), ("bfloat16", 2**-7)):
        torch.testing.assert_close(
            torch.tensor(best[dtype]), torch.tensor(plain[dtype]), atol=10 * bound, rtol=bound
        )


@compiler
def test_unusable_cache_falls_back(compiled_here, tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("a file where the folder should be")
    assert found_with(cache) == compiled_here[1]


@compiler
@pytest.mark.parametrize("content", [b"nothing that could be loaded"])
def test_damaged_library_is_compiled_again(compiled_here, tmp_path, content):
    cache = shutil.copytree(compiled_here[0], tmp_path / "cache")
    (file,) = (cache / "kernels").iterdir()
    whole = file.read_bytes()
    file.write_bytes(content)
    assert found_with(cache) == compiled_here[1]
    assert (cache / "kernels" / file.name).read_bytes() == whole


@pytest.fixture
def planted(compiled_here, tmp_path) -> tuple[Path, Path, Path]:
    """A cache, a library of another origin in it that has the right name, and the file that it creates when
    it is loaded."""
    cache = shutil.copytree(compiled_here[0], tmp_path / "cache")
    (file,) = (cache / "kernels").iterdir()
    trace, source = tmp_path / "executed", tmp_path / "planted.cpp"
    source.write_text(
        f'#include <fstream>\nstatic bool done = [] {{ std::ofstream("{trace}"); return true; }}();\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", "-o", file, source], check=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return cache, file.rename(file.with_stem(f"{file.stem.rpartition('-')[0]}-{digest}")), trace


@compiler
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_library_in_a_folder_that_others_can_write_is_not_loaded(planted, mode):
    cache, _, trace = planted
    (cache / "kernels").chmod(mode)
    assert "can be written by others" in found_with(cache)["why"] and not trace.exists()


@compiler
@pytest.mark.parametrize("way", ["linked folder", "writable file"])
def test_library_that_others_may_have_written_is_not_loaded(planted, way, compiled_here):
    cache, file, trace = planted
    if way == "linked folder":
        (cache / "kernels").rename(cache / "elsewhere").chmod(0o700)
        (cache / "kernels").symlink_to(cache / "elsewhere")
        assert "can be written by others" in found_with(cache)["why"]
    else:
        file.chmod(0o666)
        assert found_with(cache) == compiled_here[1]
    assert not trace.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux only")
def test_missing_compiler_is_reported_with_a_hint(tmp_path):
    assert found_with(tmp_path, CXX="no-such-compiler") == {
        "why": "C++ compiler no-such-compiler not found (apt install g++, or set CXX)"
    }
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: error: no OpenMP here' >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (why,) = found_with(tmp_path, CXX=str(script)).values()
    assert why.endswith("could not compile cpu_kernels.cpp: x.cpp:1: error: no OpenMP here")
