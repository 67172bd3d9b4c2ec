"""Products of activations and weights, other than FP8 by FP8 (kernel.py's), and how CPUs get them fast.

With F.linear and @ in place of `linear` and `matmul` model.py would be as right, but slow on CPUs, in three
cases:

    a few rows, compiled    the time goes into reading W. With --compile, `matvec` is one pass over W as fast
                            as memory delivers it; F.linear is not (nor cuBLAS, for one row on a GPU)
    no products of bf16     x86 before AVX-512's bf16: oneDNN converts as it goes, and fp32 is 5 times as fast
    AMX                     Intel's units for products of bf16 tiles, up to 16 rows of 64 bytes. The right one
                            of two matrices must be rearranged, the left one need not: oneDNN is fastest at
                            W x^T, with rows in sixteens, and weights whose tiles have whole cache lines

Sections: 1 what a product is and which way it goes; 2 the pass over W; 3 AMX; 4 an MoE layer's experts.
Dimensions, a GEMM's, not model.py's: n output features, k input features; nb = ceil(n / 128), kb = ceil(k /
128); e experts, s rows sorted by expert. Only in `by_expert` n, m and k are model.py's.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel import BLOCK

FEW = 8            # rows up to which products compiled for a CPU are a multiply-and-sum
PIECE = 256        # rows up to which products are W x^T with AMX, if W is large and lies in whole cache lines
# Whether oneDNN has fast products of bf16 matrices. It says so of all of AVX-512, but where its bf16 part is
# missing (Skylake to Ice Lake), it converts as it goes, and fp32 runs 5 times as fast
MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
    not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported())
AMX = MULTIPLIES_BF16 and torch.cpu._is_amx_tile_supported()        # Intel's units for products of tiles

# ------------------------------------------------------------------------------------------------------------
# 1. Any product


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as F.linear: x [..., k], w [n, k], bias [n] -> [..., n]. Compiled for a few x, it is a
    single pass over W; where fp32 is faster, and x are more than 4, it is `matmul`, but with a part of W
    converted at a time; with AMX it may be W x^T.
    """
    rows = x.shape[:-1].numel()
    tiles = transposed(rows, x, w)
    if few(x) and not (tiles and rows > 4):
        y = matvec(x, w)
    elif fp32_is_faster(x) and rows > 4:                    # fewer wait for W, either way
        x32, y = x.float().flatten(0, -2), x.new_empty(rows, len(w))
        size = 1024 if w.shape[1] <= 4096 else 256          # in fp32 29 MB at most, for Llama-70B's w2
        for part, out in zip(w.split(size), y.split(size, dim=1)):
            # for few rows W x^T, as BLAS is faster with the longer side on the left
            out.copy_((part.float() @ x32.T).T if rows <= 256 else x32 @ part.float().T)
        y = y.unflatten(0, x.shape[:-1])
    elif tiles:
        x2 = x.flatten(0, -2)
        y = torch.mv(w, x2[0])[None] if rows == 1 else (w @ x2.T).T
        y = y.unflatten(0, x.shape[:-1])
    else:
        return F.linear(x, w, bias)
    return y if bias is None else y + bias


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, batched as @; in fp32 where that is faster: it holds products of bf16 numbers exactly."""
    return (a.float() @ b.float()).to(a.dtype) if fp32_is_faster(a) else a @ b


def fp32_is_faster(x) -> bool:
    """Whether x, with a dtype and a device, is bf16 on a CPU for which oneDNN has no products of bf16
    matrices, such as x86 before AVX-512's bf16. There fp32 runs 5 times as fast, batched up to 100 times."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not MULTIPLIES_BF16


# ------------------------------------------------------------------------------------------------------------
# 2. One pass over W, made to be compiled


def few(x: Tensor) -> bool:
    """Whether `matvec` is to multiply x [..., k]: a compiler is at work, and there are a few rows at most; on
    a GPU one, as cuBLAS is slower for one row and faster for more."""
    return torch.compiler.is_compiling() and x.shape[:-1].numel() <= (FEW if x.device.type == "cpu" else 1)


def matvec(x: Tensor, w: Tensor, scale: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """x W^T as a multiply-and-sum: x [..., k], w [..., n, k] -> [..., n]; an e4m3 w has scale [..., nb, kb],
    and k a multiple of 4. Of a stack w [e, n, k], `ids` [...] int64 name a matrix for each x.

    Made to be compiled, where it becomes one pass over w in the time of reading it, which looks up a matrix
    of a stack as it goes. For one x the pass goes through the quarters of w side by side, because memory
    serves four readers faster than one; a few x that have one w [n, k] in common share each number read.
    """
    if scale is not None:
        return matvec_fp8(x, w, scale, ids)
    w, x32 = w if ids is None else w[ids], stored(x.float())
    rows = x32.view(-1, x.shape[-1]).unbind() if w.dim() == 2 else [x32[..., None, :]]
    parts = [part.float() for part in streams(w, len(rows))]
    y = torch.cat([sums(row * part) for row in rows for part in parts], dim=-1).to(x.dtype)
    return y.view(*x.shape[:-1], -1) if w.dim() == 2 else y


def matvec_fp8(x: Tensor, w: Tensor, scale: Tensor, ids: Tensor | None) -> Tensor:
    """Four e4m3 codes of w are read as a number, and x meets them as four vectors, times their blocks' scales.
    One pass goes through the quarters of all blocks, as in `matvec`. NaN codes do not become NaN here."""
    n, rest, shared = w.shape[-2], w.shape[-2] % BLOCK, w.dim() == 2
    if rest < n and rest:                               # the last block of rows is a ragged one
        parts = [(w[..., :n - rest, :], scale[..., :-1, :]), (w[..., n - rest:, :], scale[..., -1:, :])]
        return torch.cat([matvec_fp8(x, *part, ids) for part in parts], dim=-1)
    w = w.view(torch.float32)                                                               # [..., n, k/4]
    w, scale = (w, scale) if ids is None else (w[ids], scale[ids])
    w = w.unflatten(-2, (scale.shape[-2], -1))                                      # [..., nb, 128, k/4]
    scale = scale.repeat_interleave(BLOCK, -1)[..., :x.shape[-1]] * 2.0 ** 60               # [..., nb, k]
    x4 = (x.float()[..., None, :] * scale).unflatten(-1, (-1, 4)).movedim(-1, 0)            # [4, .., nb, k/4]
    x4 = stored(x4.contiguous())[..., None, :]
    rows = x4.view(4, -1, *x4.shape[-3:]).unbind(1) if shared else [x4]
    parts = [decoded(part) for part in streams(w, len(rows))]
    y = [torch.cat([sums(sum(x32 * code for x32, code in zip(row, codes))) for codes in parts], dim=-1)
         for row in rows]                                                                   # [..., nb, 128]
    y = (torch.stack(y).view(*x.shape[:-1], n) if shared else y[0].flatten(-2)) * 2.0 ** 60
    return y.to(x.dtype)                # 2^60 twice, for decoded's 2^-120: at once something would overflow


def streams(w: Tensor, rows: int) -> tuple[Tensor, ...]:
    """The parts of w [..., n, k] through which one pass goes side by side, for so many rows of x."""
    together = w.shape[-2] % 16 == 0 and w.device.type == "cpu"
    return w.chunk(max(1, 4 // rows) if together else 1, dim=-2)


def decoded(w: Tensor) -> list[Tensor]:
    """Each number's four codes as four tensors: fp32, values times 2^-120 (the exponents' biases: 7, 127).

    w is a float, though not used as one, because PyTorch reads vectors of integers several times slower;
    `clamp`, which changes no float, makes that choice stay.
    """
    w = w.clamp(min=torch.finfo(w.dtype).min).view(torch.int32)
    codes = [w << shift >> 4 & -0x78100000 for shift in (24, 16, 8, 0)]     # seeeemmm, as s0000eeeemmm0...
    return [code.view(torch.float32) for code in codes]


def sums(x: Tensor) -> Tensor:
    """x.sum(-1); on a CPU in runs of up to 4096 numbers, as the compiler sums longer ones in a slower way."""
    if x.device.type != "cpu":
        return x.sum(-1)
    runs = math.gcd(x.shape[-1], 1 << ((x.shape[-1] - 1) // 4096).bit_length())
    return x.sum(-1) if runs == 1 else x.unflatten(-1, (runs, -1)).sum(-1).sum(-1)


def stored(x: Tensor) -> Tensor:
    """x, in memory: merged with what uses it, the compiler would convert x again for each row of a matrix."""
    return x.as_strided(x.shape, x.stride())


# ------------------------------------------------------------------------------------------------------------
# 3. AMX


def multiplies_tiles(x) -> bool:
    """Whether products of x, with a dtype and a device, are AMX's."""
    return AMX and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def transposed(rows: int, x: Tensor, w: Tensor) -> bool:
    """Whether so many rows of x go as W x^T, with AMX: up to 64; if W lies in whole cache lines up to 128, or
    up to PIECE if W has three times as many rows. oneDNN reads W 1.2 to 1.7 times as fast so; for more than
    4 rows faster, too, than what is compiled."""
    if not multiplies_tiles(x):
        return False
    return rows <= (max(128, min(PIECE, w.shape[-2] // 3)) if in_lines(w) else 64)


def in_lines(w: Tensor) -> bool:
    """Whether w begins with a cache line: a file may have it elsewhere, and then a tile's rows, of 64 bytes,
    take two each. Weights that are copied do, and convert.py's files are made so. A compiler does not know:
    False."""
    return not torch.compiler.is_compiling() and w.data_ptr() % 64 == 0


def by_pieces(mlp: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    """mlp(x) for x [..., k], an MLP whose first matrix is w: at once, but with AMX PIECE rows of many at a
    time. Then its three products are W x^T, each in the order in which the next one reads it, and what is
    between them stays in a cache."""
    rows, x2 = x.shape[:-1].numel(), x.flatten(0, -2)
    if rows > PIECE and w.dtype == x.dtype and transposed(PIECE, x, w):
        return torch.cat([by_pieces(mlp, piece, w) for piece in x2.split(PIECE)]).view_as(x)
    spare = spare_rows(rows, x) if rows <= PIECE else 0
    return mlp(F.pad(x2, (0, 0, 0, spare)))[:rows].view_as(x) if spare else mlp(x)


def spare_rows(rows: int, x: Tensor) -> int:
    """How many rows to add to so many of x, to be left out of the result. With AMX, whose tiles have 16 rows,
    they save time (72 rows take 1.3 times as long as 80), and the 2 ms in which oneDNN compiles a product for
    each number of rows that occurs."""
    return -rows % 16 if multiplies_tiles(x) and rows > FEW and not torch.compiler.is_compiling() else 0


# ------------------------------------------------------------------------------------------------------------
# 4. An MoE layer's experts


def by_expert(x: Tensor, ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, m] once for each choice ids [n, k], those of an expert next to each other -> [s, m]; the choices'
    rows there [n, k]; and each expert's end, int32 [e].

    With AMX an expert's rows are sixteens, the first of them spare, and s, up to 64 e, is a power of two, the
    last ones spare: oneDNN compiles anew for each number of rows, and each stride of a result of `grouped`.
    """
    chosen, tiles = ids.flatten(), multiplies_tiles(x)
    rows, counts = chosen.argsort(stable=True).argsort(), chosen.bincount(minlength=n_experts)
    if tiles:
        spare = -counts % 16
        rows, counts = rows + spare.cumsum(0)[chosen], counts + spare
    ends, rows = counts.cumsum(0, dtype=torch.int32), rows.view_as(ids)
    size = int(ends[-1])
    if tiles and size <= 64 * n_experts:
        size = 1 << (size - 1).bit_length()
    by_row = x.new_zeros(size, x.shape[1])
    by_row[rows] = x[:, None]
    return by_row, rows, ends


def can_group(x: Tensor, *stacks: Tensor) -> bool:
    """Whether `grouped` is to multiply x with these weights: it saves time with AMX, and wants all rows to
    begin at multiples of 16 bytes."""
    return multiplies_tiles(x) and all(w.dtype == x.dtype and w.data_ptr() % 16 == w.shape[-1] % 8 == 0
                                       for w in stacks)


def grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x W^T with one matrix of w [e, n, k] for each of e runs of rows x [s, k], int32 ends [e] -> [s, n].
    PyTorch goes from one to the next, in less time than Python does. Up to 64 rows a matrix are W x^T."""
    return F.grouped_mm(w, x.T, offs=ends).T if len(x) <= 64 * len(w) else F.grouped_mm(x, w.mT, offs=ends)
