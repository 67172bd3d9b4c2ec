"""Block-wise FP8, the number format of DeepSeek-V3 and R1 (V3 section 3.3): what it is, then how it is fast.

An e4m3 number has 4 exponent and 3 mantissa bits: it spans 2^-9 ... 448 and rounds by up to 1/16 of itself,
below 2^-6 by up to 2^-10. A whole weight matrix does not fit into so narrow a range, so every small block
gets a scale s of its own, chosen so that its largest element lands on 448: q = w / s, s = max|w| / 448.

    weights        one fp32 scale per block of 128 x 128            stored in the checkpoint
    activations    one fp32 scale per token and 128 channels        computed on the fly

Activations are cut finer, so that an outlier costs precision in 128 channels of its own token only. With
blocks so small all tensors can be e4m3; e5m2, which spans more, rounds by twice as much (V3 section 3.3.2).

A product of blocks j of A and W is then s_a[j] * s_w[j] * (q_a[j] . q_w[j]): the inner dot product runs on
FP8 operands, its result leaves the tensor core after N_C = 128 channels and is scaled and summed in fp32
(V3 Fig. 7).

Sections: 1 the definitions in plain PyTorch, which run everywhere; 2 the one place that decides what runs
instead; 3 Triton kernels, and the launches that call them. Kernels exist only where Triton is installed.

What stays out of FP8 (V3 section 3.3.1): embedding, output head, gate, norms and the attention itself. wkv_b
is FP8 in the checkpoint, but not once it is loaded: absorbed attention uses it in two parts, head by head.
Dimensions, a GEMM's, not model.py's: m tokens, n output features, k input features; nb = ceil(n / 128),
kb = ceil(k / 128); e experts, s slots (a token at one of its experts), t tiles of slots.
"""
import functools
import math
import os
import shutil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:         # no wheel for this system, or not wanted: section 1 does all the work
    triton = None
if torch.cuda.is_available() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
    triton = None           # on a GPU it compiles what starts its kernels

BLOCK = 128        # the edge of a weight block, and the run of channels that share an activation scale
E4M3_MAX = 448.0   # the largest finite e4m3fn number; there is no infinity to overflow to
FP8 = torch.float8_e4m3fn

# ------------------------------------------------------------------------------------------------------------
# 1. The definitions


def n_blocks(size: int) -> int:
    """Blocks along an axis of `size` elements; the last may be ragged (R1's wkv_a: 576 rows = 4.5 blocks)."""
    return -(-size // BLOCK)


def act_quant(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise activations per token and 128 channels (V3 section 3.3.2).

    x [..., k] in any float dtype -> (q [..., k] e4m3, scale [..., kb] fp32), with q * scale close to x.
    `ue8m0` rounds scales up to powers of two, which 8 exponent bits can hold (V3.1; R1 does not use it).
    """
    if path(x.device) == "triton" and not torch.compiler.is_compiling():    # a compiler merges what is below
        return _launch_act_quant(x, ue8m0)
    blocks = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # [..., kb, 128]
    scale = blocks.abs().amax(-1).clamp(min=1e-4) / E4M3_MAX    # DeepSeek's least, so no 0 / 0
    if ue8m0:   # adding a full mantissa carries into the exponent, unless the mantissa was zero
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    q = (blocks / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)
    return q.flatten(-2)[..., :x.shape[-1]], scale


def weight_quant(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight per 128 x 128 block, as DeepSeek's checkpoints are (V3 section 3.3.2).

    w [n, k] in any float dtype -> (q [n, k] e4m3, scale [nb, kb] fp32). Edge blocks are padded with zeros.
    The scale is the multiplier that undoes the division: HuggingFace files call it `weight_scale_inv`.
    """
    if path(w.device) == "triton":
        return _launch_weight_quant(w)
    n, k = w.shape
    padded = F.pad(w.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))         # [nb, 128, kb, 128]
    scale = (blocks.abs().amax((1, 3)) / E4M3_MAX).clamp(min=1e-12)        # an all-zero block: no 0 / 0
    q = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)
    return q.flatten(2).flatten(0, 1)[:n, :k].contiguous(), scale


def weight_dequant(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo weight_quant: q [n, k] e4m3, scale [nb, kb] fp32 -> w [n, k] of `dtype`.

    Multiplied in fp32 and rounded once, a row of blocks at a time: the fp32 copy never exceeds 128 rows.
    """
    check_scale(q, scale)
    if path(q.device, multiply=False) == "triton":
        return _launch_weight_dequant(q, scale, dtype)
    w = torch.empty(q.shape, dtype=dtype, device=q.device)
    for i, row in enumerate(scale):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        w[rows] = widen(q[rows]) * row.repeat_interleave(BLOCK)[:q.shape[1]]    # [128, k] * [k]
    return w


def widen(q: Tensor) -> Tensor:
    """e4m3 -> fp32, exactly as q.float(), which PyTorch computes several times slower on a CPU.

    An e4m3 number seeeemmm is the fp16 number s0eeeemmm0000000, but for their exponents' bias, 7 and 15:
    the factor 2^8. That holds for subnormals, too. In NaN, s1111111, one more 1 carries into the gap.
    """
    bits = (q.view(torch.int8).to(torch.int16) << 7) & ~0x4000
    return (bits | (bits + 0x80) & 0x4000).view(torch.float16).float() * 256


def fp8_gemm(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y = A W^T on FP8 operands, every 128-channel partial sum promoted to fp32 (V3 section 3.3.2).

    a [..., k] e4m3, a_scale [..., kb] fp32 (act_quant); w [n, k] e4m3, w_scale [nb, kb] fp32 (weight_quant)
    -> y [..., n] of `dtype`. Products of e4m3 numbers are exact in fp32, so this is the definition, not a
    model of it. Hopper's tensor cores keep about 14 bits of a sum, hence the promotion (V3 section 3.5.2).
    """
    check_scale(w, w_scale)
    if path(a.device) == "triton":
        rows, scales = (t.reshape(-1, t.shape[-1]) for t in (a, a_scale))       # [m, k], [m, kb]
        launch = _launch_scaled_mm if scaled_mm_wins(len(rows), w, dtype) else _launch_gemm
        return launch(rows, scales, w, w_scale, dtype).view(*a.shape[:-1], len(w))
    y = torch.zeros(*a.shape[:-1], w.shape[0], dtype=torch.float32, device=a.device)
    for i in range(w_scale.shape[1]):
        k = slice(i * BLOCK, (i + 1) * BLOCK)
        partial = widen(a[..., k]) @ widen(w[:, k]).T                           # [..., n]
        w_row = w_scale[:, i].repeat_interleave(BLOCK)[:w.shape[0]]             # [n]
        y += partial * (a_scale[..., i, None] * w_row)
    return y.to(dtype)


class Groups(NamedTuple):
    """Which token goes to which expert, and the tiles of tokens in which a GPU works that off."""
    ids: Tensor         # [s] expert of slot i; a token has s / m neighbouring slots
    order: Tensor       # [s] slots, those of a tile next to each other
    expert: Tensor      # [t] expert of each tile; n_experts: a tile that is not needed
    first: Tensor       # [t] a tile covers order[first:stop]
    stop: Tensor        # [t]


def group(ids: Tensor, n_experts: int) -> Groups:
    """Plan grouped_fp8_gemm for ids [m, experts per token] int64.

    Only shapes are known to the host, so the plan has as many tiles as the worst distribution needs, and
    nothing waits for the device.
    """
    m, ids = len(ids), ids.flatten()
    if m == 1:                                                  # a token's experts differ: a tile for each
        slot = (ids >= 0).cumsum(0) - 1                 # 0, 1, ... by a kernel that reads: decode.fuse
        return Groups(ids, slot, ids, slot, slot + 1)
    rows = tile_for(len(ids) // n_experts).tokens
    count = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    count.scatter_add_(0, ids, torch.ones_like(ids))            # not bincount, which waits for the device
    n_tiles = (count + rows - 1) // rows                                        # [e]
    stop, last = count.cumsum(0), n_tiles.cumsum(0)                             # [e] in slots, in tiles
    tile = torch.arange(min(len(ids), n_experts) + len(ids) // rows, device=ids.device)         # [t]
    expert = torch.searchsorted(last, tile, right=True)
    e = expert.clamp(max=n_experts - 1)
    first = stop[e] - count[e] + (tile - last[e] + n_tiles[e]) * rows
    return Groups(ids, ids.argsort(stable=True), expert, first, torch.minimum(first + rows, stop[e]))


def grouped_fp8_gemm(a: Tensor, a_scale: Tensor, weights: list[Tensor], scales: list[Tensor], groups: Groups,
                     dtype: torch.dtype) -> list[Tensor]:
    """fp8_gemm for all experts of an MoE layer in one launch: slot i has y[i] = A[token of i] W[ids[i]]^T.

    a [m, k] e4m3 and a_scale [m, kb], of tokens or, with m = s, of slots; one or two stacks of weights of one
    shape [e, n, k] (w1 and w3 read the same activations) with scales [e, nb, kb] -> for each stack y [s, n].
    """
    for w, scale in zip(weights, scales):
        check_scale(w, scale)
    if path(a.device) == "triton":
        return _launch_grouped(a, a_scale, weights, scales, groups, dtype)
    outputs = [torch.empty(len(groups.ids), w.shape[1], dtype=dtype, device=a.device) for w in weights]
    for expert in groups.ids.unique().tolist():
        slots = torch.where(groups.ids == expert)[0]
        tokens = slots // (len(groups.ids) // len(a))
        for y, w, scale in zip(outputs, weights, scales):
            y[slots] = fp8_gemm(a[tokens], a_scale[tokens], w[expert], scale[expert], dtype)
    return outputs


def check_scale(w: Tensor, scale: Tensor) -> None:
    """ValueError unless w [..., n, k] is e4m3 and scale [..., nb, kb] fp32, or scales would miss blocks."""
    expected = [*w.shape[:-2], *(n_blocks(size) for size in w.shape[-2:])]
    if w.dtype != FP8 or scale.dtype != torch.float32 or list(scale.shape) != expected:
        raise ValueError(f"an e4m3 weight {list(w.shape)} needs an fp32 scale {expected}; "
                         f"got a {w.dtype} weight and a {scale.dtype} scale {list(scale.shape)}")


# ------------------------------------------------------------------------------------------------------------
# 2. What runs where: decided here, by capability. FP8_PATH=torch, triton or scaled_mm overrules it, where the
# device is able to.

FORCED = os.environ.get("FP8_PATH")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # Triton's interpreter runs kernels on the CPU


capability = functools.cache(torch.cuda.get_device_capability)


def device_kind(device: torch.device) -> str:
    """cpu | rocm: AMD's with e4m3 products in Triton (gfx94: as fp16) | sm_90: Hopper, datacenter Blackwell
    (227 KB of shared memory) | sm_89: NVIDIA's others with e4m3 (99 KB) | sm_80: with bf16 | old: rest."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "rocm" if name.startswith(("gfx94", "gfx95", "gfx12")) else "old"
    if capability(device)[0] in (9, 10):
        return "sm_90"
    return "sm_89" if capability(device) >= (8, 9) else "sm_80" if capability(device) >= (8, 0) else "old"


def path(device: torch.device, multiply: bool = True) -> str:
    """triton | torch, for tensors on `device`. GPUs before sm_89 cannot multiply e4m3, but dequantise it."""
    if FORCED not in (None, "torch", "triton", "scaled_mm"):
        raise ValueError(f"FP8_PATH is {FORCED!r}; known: torch, triton, scaled_mm")
    kind = device_kind(device)
    unable = kind == "cpu" and not INTERPRETED or kind in ("sm_80", "old") and multiply
    return "torch" if triton is None or FORCED == "torch" or unable else "triton"


def scaled_mm_wins(m: int, w: Tensor, dtype: torch.dtype) -> bool:
    """Whether cuBLASLt's kernel for this format is to multiply m tokens with w: many of them, on Hopper.

    It needs CUDA 12.9 and whole blocks of channels. The 256 is from other projects' measurements.
    """
    wanted = FORCED == "scaled_mm" or FORCED is None and m > 256
    if not wanted or m == 0:
        return False
    return (hasattr(F, "scaled_mm") and device_kind(w.device) == "sm_90" and dtype == torch.bfloat16
            and capability(w.device)[0] == 9 and w.shape[1] % BLOCK == 0
            and w.shape[0] % 16 == 0 and [*map(int, torch.version.cuda.split(".")[:2])] >= [12, 9])


def default_mode(device: torch.device) -> str:
    """FP8 activations where Triton multiplies e4m3, weights dequantised elsewhere (README: FP8)."""
    return "gemm" if path(device) == "triton" else "dequant"


class Tile(NamedTuple):
    """A block of outputs that one program computes: `tokens` x `features`, 128 channels at a time."""
    up_to: float        # tokens (of an expert, on average) that the tile serves
    tokens: int
    features: int
    swap: bool          # (W A^T)^T instead of A W^T: Hopper's FP8 products want 64 rows on their left
    warps: int
    stages: dict        # by device_kind: loads that run ahead of the products, in shared memory


# A table, no autotuning: no pause at run time, and 1 to 16 tokens share a tile, so that a token's result does
# not depend on how many there are.
TILES = [Tile(16, 16, 64, True, 4, {"sm_89": 4, "sm_90": 6, "rocm": 2}),
         Tile(32, 32, 128, True, 4, {"sm_89": 4, "sm_90": 5, "rocm": 2}),
         Tile(256, 64, 128, False, 4, {"sm_89": 2, "sm_90": 4, "rocm": 2}),
         Tile(math.inf, 128, 128, False, 8, {"sm_89": 2, "sm_90": 3, "rocm": 2})]


def tile_for(tokens: int) -> Tile:
    return next(tile for tile in TILES if tokens <= tile.up_to)


def n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def n_splits(tiles: int, kb: int, device: torch.device) -> int:
    """Into how many runs of channels to cut a product, so that its tiles keep all processors busy."""
    processors = n_processors(device)
    fits = [s for s in range(1, 9) if kb % s == 0 and (s == 1 or kb // s >= 4)]
    return next((s for s in fits if tiles * s >= processors), fits[-1])


# ------------------------------------------------------------------------------------------------------------
# 3. Triton

if triton:
    @triton.jit(do_not_specialize=["m", "k_stride"])
    def act_quant_kernel(x, q, scale, m, k, k_stride, UE8M0: tl.constexpr, ROWS: tl.constexpr):
        """ROWS tokens x 128 channels. The scales are stored [kb, m]: coalesced, and what cuBLASLt reads."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        channels = tl.program_id(1) * 128 + tl.arange(0, 128)
        offsets = rows.to(tl.int64)[:, None] * k + channels[None, :]
        mask = (rows < m)[:, None] & (channels < k)[None, :]
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-4)
        s = tl.div_rn(largest, tl.full([ROWS], 448.0, tl.float32))
        if UE8M0:
            s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        # No clamp: |x| / s rounds to 448 at most, and a clamp would turn a NaN into a number
        quotient = tl.div_rn(values, tl.broadcast_to(s[:, None], [ROWS, 128]))
        tl.store(q + offsets, quotient.to(tl.float8e4nv), mask=mask)
        tl.store(scale + tl.program_id(1).to(tl.int64) * k_stride + rows, s, mask=rows < m)

    @triton.jit
    def weight_quant_kernel(w, q, scale, n, k, kb):
        """One block of 128 x 128 weights and its scale."""
        rows = tl.program_id(0) * 128 + tl.arange(0, 128)
        channels = tl.program_id(1) * 128 + tl.arange(0, 128)
        offsets = rows.to(tl.int64)[:, None] * k + channels[None, :]
        mask = (rows < n)[:, None] & (channels < k)[None, :]
        values = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.maximum(tl.div_rn(tl.max(tl.abs(values)), 448.0), 1e-12)
        quotient = tl.div_rn(values, tl.zeros([128, 128], tl.float32) + s)
        tl.store(q + offsets, quotient.to(tl.float8e4nv), mask=mask)
        tl.store(scale + tl.program_id(0) * kb + tl.program_id(1), s)

    @triton.jit
    def weight_dequant_kernel(q, scale, w, n, k, kb, ROWS: tl.constexpr):
        """ROWS x 128 weights under one scale; `widen` once more, so that any GPU can do it."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        channels = tl.program_id(1) * 128 + tl.arange(0, 128)
        offsets = rows.to(tl.int64)[:, None] * k + channels[None, :]
        mask = (rows < n)[:, None] & (channels < k)[None, :]
        code = tl.load(q + offsets, mask=mask, other=0).to(tl.int16)            # 0seeeemmm
        fp16 = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = tl.where(code & 0x7F == 0x7F, float("nan"), fp16.to(tl.float32) * 256)
        s = tl.load(scale + tl.program_id(0) * ROWS // 128 * kb + tl.program_id(1))
        tl.store(w + offsets, (value * s).to(w.dtype.element_ty), mask=mask)

    @triton.jit
    def place(pid, tiles_m, tiles_n):
        """Program -> tile, 8 tiles of tokens per tile of weights, so that both are still in the L2 cache."""
        span = 8 * tiles_n
        above = pid // span * 8
        height = tl.minimum(tiles_m - above, 8)
        return above + pid % span % height, pid % span // height

    @triton.jit
    def multiply(a, a_scale, w, w_scale, rows, live, column, n, m_stride, k_stride, first, K: tl.constexpr,
                 STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr):
        """A[rows] W[column:column + COLUMNS]^T over STEPS blocks of channels from block `first` on, in fp32.

        64-bit offsets: a stack of R1's experts has 3.8e9 elements. What lies outside is masked, not wrapped.
        """
        columns = column + tl.arange(0, COLUMNS)
        channels = first * 128 + tl.arange(0, 128)
        a += rows.to(tl.int64)[:, None] * K + channels[None, :]
        w += columns.to(tl.int64)[:, None] * K + channels[None, :]
        a_scale += rows.to(tl.int64) * m_stride + first * k_stride
        w_scale += column // 128 * ((K + 127) // 128) + first
        acc = tl.zeros([COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS], tl.float32)
        for i in range(STEPS):              # a promotion each: no dot product starts from the one before it
            a_mask, w_mask = live[:, None], (columns < n)[:, None]
            if K % 128 != 0:
                inside = (channels + i * 128 < K)[None, :]
                a_mask, w_mask = a_mask & inside, w_mask & inside
            a_tile = tl.load(a + i * 128, mask=a_mask, other=0.0)
            w_tile = tl.load(w + i * 128, mask=w_mask, other=0.0)
            # one factor per token: a tile of weights lies within one block's rows
            s = tl.load(a_scale + i * k_stride, mask=live, other=0.0) * tl.load(w_scale + i)
            if SWAP:
                acc = tl.fma(tl.dot(w_tile, a_tile.T), tl.broadcast_to(s[None, :], acc.shape), acc)
            else:
                acc = tl.fma(tl.dot(a_tile, w_tile.T), tl.broadcast_to(s[:, None], acc.shape), acc)
        return acc.T if SWAP else acc

    @triton.jit(do_not_specialize=["m", "k_stride"])
    def gemm_kernel(a, a_scale, w, w_scale, y, m, n, m_stride, k_stride, K: tl.constexpr, STEPS: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr):
        """One tile of y [splits, m, n]: split i sums the i-th run of STEPS blocks of channels."""
        row_tile, column_tile = place(tl.program_id(0), tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS))
        split, column = tl.program_id(1), column_tile * COLUMNS
        rows, columns = row_tile * ROWS + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        acc = multiply(a, a_scale, w, w_scale, rows, rows < m, column, n, m_stride, k_stride, split * STEPS,
                       K, STEPS, ROWS, COLUMNS, SWAP)
        y += split.to(tl.int64) * m * n + rows.to(tl.int64)[:, None] * n + columns[None, :]
        tl.store(y, acc.to(y.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])

    @triton.jit(do_not_specialize=["m", "k_stride", "n_tiles", "slots_per_row"])
    def grouped_kernel(a, a_scale, w1, w2, w1_scale, w2_scale, y, order, expert, first, stop, m, n, m_stride,
                       k_stride, n_experts, n_tiles, slots_per_row, K: tl.constexpr, ROWS: tl.constexpr,
                       COLUMNS: tl.constexpr, SWAP: tl.constexpr):
        """One tile of y [1 or 2, m slots, n]: rows are gathered by the plan and scattered back by it. Of two
        stacks of weights w1 and w2 (an MLP's w1 and w3) programs of axis 1 choose one."""
        tile, column_tile = place(tl.program_id(0), n_tiles, tl.cdiv(n, COLUMNS))
        e = tl.load(expert + tile)
        if e >= n_experts:
            return
        KB: tl.constexpr = (K + 127) // 128
        which, column = tl.program_id(1), column_tile * COLUMNS
        w = (w2 if which == 1 else w1) + e.to(tl.int64) * n * K
        w_scale = (w2_scale if which == 1 else w1_scale) + e * tl.cdiv(n, 128) * KB
        at = tl.load(first + tile) + tl.arange(0, ROWS)
        live = at < tl.load(stop + tile)
        slots, columns = tl.load(order + at, mask=live, other=0), column + tl.arange(0, COLUMNS)
        acc = multiply(a, a_scale, w, w_scale, slots // slots_per_row, live, column, n, m_stride, k_stride,
                       0, K, KB, ROWS, COLUMNS, SWAP)
        y += which.to(tl.int64) * m * n + slots.to(tl.int64)[:, None] * n + columns[None, :]
        tl.store(y, acc.to(y.dtype.element_ty), mask=live[:, None] & (columns < n)[None, :])


def _launch_act_quant(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    k, m = x.shape[-1], x.numel() // x.shape[-1]
    stride = -(-m // 4) * 4                                     # cuBLASLt wants tokens in fours
    q = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(n_blocks(k), stride, dtype=torch.float32, device=x.device)
    act_quant_kernel[triton.cdiv(m, 16), n_blocks(k)](x.contiguous(), q, scale, m, k, stride, ue8m0, ROWS=16)
    return q, scale.T[:m].reshape(*x.shape[:-1], n_blocks(k))       # [..., kb], strides (.., 1, stride)


def _launch_weight_quant(w: Tensor) -> tuple[Tensor, Tensor]:
    (n, k), q = w.shape, torch.empty(w.shape, dtype=FP8, device=w.device)
    scale = torch.empty(n_blocks(n), n_blocks(k), dtype=torch.float32, device=w.device)
    weight_quant_kernel[n_blocks(n), n_blocks(k)](w.contiguous(), q, scale, n, k, n_blocks(k), num_warps=8)
    return q, scale


def _launch_weight_dequant(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    (n, k), w = q.shape, torch.empty(q.shape, dtype=dtype, device=q.device)
    weight_dequant_kernel[triton.cdiv(n, 32), n_blocks(k)](
        q.contiguous().view(torch.uint8), scale.contiguous(), w, n, k, n_blocks(k), ROWS=32)
    return w


def _launch_gemm(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    (m, k), n, tile = a.shape, len(w), tile_for(len(a))
    tiles = triton.cdiv(m, tile.tokens) * triton.cdiv(n, tile.features)
    splits = n_splits(tiles, n_blocks(k), a.device)
    parts = torch.empty(splits, m, n, dtype=torch.float32 if splits > 1 else dtype, device=a.device)
    gemm_kernel[tiles, splits](
        a.contiguous(), a_scale, w.contiguous(), w_scale.contiguous(), parts, m, n, *a_scale.stride(), k,
        n_blocks(k) // splits, tile.tokens, tile.features, tile.swap, num_warps=tile.warps,
        num_stages=tile.stages.get(device_kind(a.device)))
    return parts[0] if splits == 1 else parts.sum(0).to(dtype)      # repeatable, unlike atomic additions


def _launch_scaled_mm(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """cuBLASLt reads scales [m, kb] with strides (1, m), and [kb, nb] with (1, kb); m and kb in fours."""
    extra, kind = -len(a) % 4, F.ScalingType
    if extra:
        a = F.pad(a.view(torch.uint8), (0, 0, 0, extra)).view(FP8)
    a_scale = F.pad(a_scale.T, (0, extra)).contiguous().T
    w_scale = F.pad(w_scale, (0, -w_scale.shape[1] % 4)).T
    y = F.scaled_mm(a, w.T, a_scale, kind.BlockWise1x128, w_scale, kind.BlockWise128x128, output_dtype=dtype)
    return y[:len(y) - extra]


def _launch_grouped(a: Tensor, a_scale: Tensor, weights: list[Tensor],
                    scales: list[Tensor], groups: Groups, dtype: torch.dtype) -> list[Tensor]:
    (n_experts, n, k), slots, n_tiles = weights[0].shape, len(groups.ids), len(groups.expert)
    tile = tile_for(slots // n_experts)
    y = torch.empty(len(weights), slots, n, dtype=dtype, device=a.device)
    grouped_kernel[n_tiles * triton.cdiv(n, tile.features), len(weights)](
        a.contiguous(), a_scale, weights[0], weights[-1], scales[0], scales[-1], y, *groups[1:], slots, n,
        *a_scale.stride(), n_experts, n_tiles, slots // max(len(a), 1), k, tile.tokens, tile.features,
        tile.swap, num_warps=tile.warps, num_stages=tile.stages.get(device_kind(a.device)))
    return list(y)
