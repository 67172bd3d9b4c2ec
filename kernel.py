"""Block-wise FP8, the number format of DeepSeek-V3 and R1 (V3 section 3.3): what it is, in plain PyTorch.

An e4m3 number has 4 exponent and 3 mantissa bits: it spans 2^-9 ... 448 and rounds by up to 1/16 of itself.
A whole weight matrix does not fit into so narrow a range, so every small block gets a scale s of its own,
chosen so that its largest element lands on 448: q = w / s, s = max|w| / 448.

    weights        one fp32 scale per block of 128 x 128            stored in the checkpoint
    activations    one fp32 scale per token and 128 channels        computed on the fly

A product of blocks k of A and W is then s_a[k] * s_w[k] * (q_a[k] . q_w[k]): the inner dot product runs on
FP8 operands, its result leaves the tensor core after N_C = 128 channels and is scaled and summed in fp32
(V3 Fig. 7).

What stays out of FP8 (V3 section 3.3.1): embedding, output head, gate, norms and the attention itself.
Dimensions: m tokens, n output features, k input features; nb = ceil(n / 128), kb = ceil(k / 128).
"""
import torch
import torch.nn.functional as F

BLOCK = 128        # the edge of a weight block, and the run of channels that share an activation scale
E4M3_MAX = 448.0   # the largest finite e4m3fn number; there is no infinity to overflow to
FP8 = torch.float8_e4m3fn


def n_blocks(size: int) -> int:
    """Blocks along an axis of `size` elements; the last may be ragged (R1's wkv_a: 576 rows = 4.5 blocks)."""
    return -(-size // BLOCK)


def act_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations per token and 128 channels (V3 section 3.3.2).

    x [..., k] in any float dtype -> (q [..., k] e4m3, scale [..., kb] fp32), with q * scale close to x.
    """
    blocks = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # [..., kb, 128]
    scale = blocks.abs().amax(-1).clamp(min=1e-4) / E4M3_MAX    # the clamp keeps an all-zero block from 0 / 0
    q = (blocks / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)
    return q.flatten(-2)[..., :x.shape[-1]], scale


def weight_quant(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight per 128 x 128 block, as DeepSeek's checkpoints are (V3 section 3.3.2).

    w [n, k] in any float dtype -> (q [n, k] e4m3, scale [nb, kb] fp32). Edge blocks are padded with zeros.
    The scale is the multiplier that undoes the division: HuggingFace files call it `weight_scale_inv`.
    """
    n, k = w.shape
    padded = F.pad(w.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))         # [nb, 128, kb, 128]
    scale = (blocks.abs().amax((1, 3)) / E4M3_MAX).clamp(min=1e-12)        # an all-zero block: no 0 / 0
    q = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)
    return q.flatten(2).flatten(0, 1)[:n, :k].contiguous(), scale


def weight_dequant(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo weight_quant: q [n, k] e4m3, scale [nb, kb] fp32 -> w [n, k] of `dtype`.

    Multiplied in fp32 and rounded once, a row of blocks at a time: the fp32 copy never exceeds 128 rows.
    """
    check_scale(q, scale)
    w = torch.empty(q.shape, dtype=dtype, device=q.device)
    for i, row in enumerate(scale):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        w[rows] = q[rows].float() * row.repeat_interleave(BLOCK)[:q.shape[1]]   # [128, k] * [k]
    return w


def fp8_gemm(a: torch.Tensor, a_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor,
             dtype: torch.dtype) -> torch.Tensor:
    """y = A W^T on FP8 operands, every 128-channel partial sum promoted to fp32 (V3 section 3.3.2).

    a [..., k] e4m3, a_scale [..., kb] fp32 (act_quant); w [n, k] e4m3, w_scale [nb, kb] fp32 (weight_quant)
    -> y [..., n] of `dtype`. Products of e4m3 numbers are exact in fp32, so this is the definition, not a
    model of it.
    """
    check_scale(w, w_scale)
    y = torch.zeros(*a.shape[:-1], w.shape[0], dtype=torch.float32, device=a.device)
    for i in range(w_scale.shape[1]):
        k = slice(i * BLOCK, (i + 1) * BLOCK)
        partial = a[..., k].float() @ w[:, k].float().T                         # [..., n]
        w_row = w_scale[:, i].repeat_interleave(BLOCK)[:w.shape[0]]             # [n]
        y += partial * (a_scale[..., i, None] * w_row)
    return y.to(dtype)


def check_scale(w: torch.Tensor, scale: torch.Tensor) -> None:
    """ValueError unless w [n, k] is e4m3 and scale [nb, kb] fp32: a mismatch would scale the wrong blocks."""
    expected = [n_blocks(size) for size in w.shape]
    if w.dtype != FP8 or scale.dtype != torch.float32 or list(scale.shape) != expected:
        raise ValueError(f"an e4m3 weight {list(w.shape)} needs an fp32 scale {expected}; "
                         f"got a {w.dtype} weight and a {scale.dtype} scale {list(scale.shape)}")
