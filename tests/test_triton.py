"""Claim: the Triton kernels of kernel.py compute what its plain PyTorch functions define (V3 section 3.3), on
GPUs that nobody needs to have in order to see it.

Numbers come from Triton's interpreter, which runs a kernel on the CPU, in a process of its own
(interpreted.py): it is chosen before Triton is imported. What the interpreter does not know is asked of the
compiler, for GPUs that are not there: whether products reach the FP8 tensor cores, and fit into shared memory
and registers.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import attention
import kernel

triton = pytest.importorskip("triton", reason="Triton is not installed")

if kernel.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set; the compiler is not at hand", allow_module_level=True)

TESTS = Path(__file__).parent
POINTERS = {**dict.fromkeys(("a", "w", "w1", "w2"), "*fp8e4nv"), "y": "*bf16",
            **dict.fromkeys(("a_scale", "w_scale", "w1_scale", "w2_scale", "scale"), "*fp32"),
            **dict.fromkeys(("order", "expert", "first", "stop"), "*i64")}
MULTIPLES = ("n", "k", "k_row", "k_slot", "k_head", "v_row", "v_slot", "v_head", "span")            # of 16
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_89": ("cuda", 89, 32), "sm_90": ("cuda", 90, 32),
           "rocm": ("hip", "gfx942", 64)}
TENSOR_CORES = {"sm_89": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3",
                "sm_90": "wgmma.mma_async.sync.aligned.m64n{}k32.f32.e4m3.e4m3", "rocm": "v_mfma_f32"}
# bytes a program may take; on gfx942 e4m3 becomes fp16 on its way to the matrix cores
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "rocm": 64 << 10}


def compiled(fn, kind: str, constants: dict, pointers: dict = POINTERS, **options):
    """The kernel `fn`, compiled as if for a GPU of this kind, all pointers and MULTIPLES multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in fn.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, (name, kind_) in enumerate(types.items())
                  if kind_[0] == "*" or name in MULTIPLES and name not in constants}
    return triton.compile(ASTSource(fn, types, constants, attributes), target=GPUTarget(*TARGETS[kind]),
                          options=options)


def spilled_bytes(binary, folder: Path) -> int:
    """Bytes of memory per thread that stand in for registers."""
    if "amdgcn" in binary.asm:
        return int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", binary.asm["amdgcn"])[1])
    (folder / "cubin").write_bytes(binary.asm["cubin"])
    command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", folder / "cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def version(package) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


@pytest.mark.skipif(version(triton) < (3, 7) and version(np) >= (2, 4),
                    reason="the interpreter of Triton before 3.7 needs NumPy before 2.4")
def test_numerics_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-x", "-p", "no:cacheprovider",
               TESTS / "interpreted.py"]                                # conftest.py imports transformers
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1", "FP8_PATH": "triton"},
                         capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-5000:] + run.stderr[-1000:]
    assert "skipped" not in run.stdout


def test_without_a_c_compiler_a_gpu_goes_without_triton(tmp_path):
    code = "import torch; torch.cuda.is_available = lambda: True; import kernel; print(kernel.triton)"
    env = {name: value for name, value in os.environ.items() if name != "CC"}
    for path, expected in ((str(tmp_path), "None"), (os.environ["PATH"], "<module 'triton'")):
        run = subprocess.run([sys.executable, "-c", code], env=env | {"PATH": path}, cwd=TESTS.parent,
                             capture_output=True, text=True)
        assert run.stdout.startswith(expected), run.stderr


MATMULS = [(fn, tile, kind) for fn in ("gemm", "grouped") for tile in range(4) for kind in ("sm_89", "sm_90")]
MATMULS += [("gemm", 0, "rocm"), ("grouped", 1, "rocm")]        # larger ones take the compiler 5 s each


@pytest.mark.parametrize("fn, number, kind", MATMULS)
def test_products_reach_the_tensor_cores_within_shared_memory_and_registers(fn, number, kind, tmp_path):
    tile = kernel.TILES[number]
    constants = dict(K=7168, ROWS=tile.tokens, COLUMNS=tile.features, SWAP=tile.swap)
    if fn == "gemm":
        constants["STEPS"] = 56
    binary = compiled(getattr(kernel, fn + "_kernel"), kind, constants, num_warps=tile.warps,
                      num_stages=tile.stages[kind])
    text = binary.asm["amdgcn"] if kind == "rocm" else binary.asm["ptx"]
    assert TENSOR_CORES[kind].format(tile.tokens if tile.swap else tile.features) in text
    assert 0 < binary.metadata.shared <= SHARED_MEMORY[kind]
    assert spilled_bytes(binary, tmp_path) == 0


def test_the_naive_kernel_that_the_benchmark_compares_with_compiles():
    from benchmarks.fp8_gemm import naive_kernel
    binary = compiled(naive_kernel.fn, "sm_90", dict(K=7168, BM=64, BN=128), num_warps=8, num_stages=3)
    assert TENSOR_CORES["sm_90"].format(64) in binary.asm["ptx"]    # 2 groups of 4 warps share columns


@pytest.mark.parametrize("kind", ["sm_80", "sm_89", "sm_90", "rocm"])
def test_any_gpu_can_dequantise(kind, tmp_path):
    pointers = {"q": "*u8", "scale": "*fp32", "w": "*bf16"}
    binary = compiled(kernel.weight_dequant_kernel, kind, dict(ROWS=32), pointers)
    assert spilled_bytes(binary, tmp_path) == 0


@pytest.mark.parametrize("kind", ["sm_89", "sm_90", "rocm"])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_activations_are_quantised_by_divisions_that_round_as_pytorchs_do(kind, ue8m0, tmp_path):
    pointers = {"x": "*bf16", "q": "*fp8e4nv", "scale": "*fp32"}
    binary = compiled(kernel.act_quant_kernel, kind, dict(UE8M0=ue8m0, ROWS=16), pointers)
    assert spilled_bytes(binary, tmp_path) == 0
    if kind != "rocm":
        assert "div.rn.f32" in binary.asm["ptx"] and "div.full" not in binary.asm["ptx"]


@pytest.mark.parametrize("kind", ["sm_89", "sm_90", "rocm"])
def test_weights_are_quantised_without_spilling(kind, tmp_path):
    pointers = {"w": "*bf16", "q": "*fp8e4nv", "scale": "*fp32"}
    binary = compiled(kernel.weight_quant_kernel, kind, {}, pointers, num_warps=8)
    assert spilled_bytes(binary, tmp_path) == 0
    if kind != "rocm":
        assert "div.rn.f32" in binary.asm["ptx"] and "div.full" not in binary.asm["ptx"]


def test_split_sums_are_added_without_atomic_operations(tmp_path):
    tile = kernel.TILES[0]
    constants = dict(K=7168, STEPS=14, ROWS=tile.tokens, COLUMNS=tile.features, SWAP=tile.swap)
    parts = compiled(kernel.gemm_kernel, "sm_90", constants, POINTERS | {"y": "*fp32"}, num_stages=6)
    assert "st.global" in parts.asm["ptx"] and not re.search(r"\b(atom|red)\.", parts.asm["ptx"])


@pytest.mark.parametrize("model, constants", [
    ("R1", dict(GROUPS=1, HEADS=128, D=512, R=64, KEYS=32, SHARED=True)),
    ("Qwen-7B", dict(GROUPS=4, HEADS=7, D=128, R=0, KEYS=64, SHARED=False))])
@pytest.mark.parametrize("kind", TARGETS)
def test_attention_of_a_step_fits_on_tensor_cores(model, constants, kind, tmp_path):
    pointers = {**dict.fromkeys(("q", "k", "v"), "*bf16"), "positions": "*i64",
                **dict.fromkeys(("parts", "lse"), "*fp32")}
    binary = compiled(attention.attend_kernel, kind, dict(SCALE=0.1, **constants), pointers,
                      num_stages=2 if kind == "rocm" else 3)
    assert binary.metadata.shared <= SHARED_MEMORY[kind] and spilled_bytes(binary, tmp_path) == 0
    assert ("v_mfma_f32" in binary.asm["amdgcn"] if kind == "rocm" else
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16" in binary.asm["ptx"])
