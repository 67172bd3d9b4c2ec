"""softmax(scale q k^T + bias) v (V3 Eq. 10), in several ways to one result, each the fastest in its place.

    attend          heads share keys and values in groups, or do not: GQA, and MLA's expanded form
    attend_latents  all heads share one key, of which the value is a part: MLA's absorbed form
    attend_runs     what both are when a CPU decodes, compiled: flash decoding
    attend_one      what both are when a GPU decodes: the same, as a Triton kernel

What attends to what, model.py says; nothing here is needed to understand it. Letters are model.py's, but d is
a key's whole width (MLA: d + r or c + r) and v its value's (MLA: v or c).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

import kernel
import products
from kernel import triton

if triton:
    import triton.language as tl

# ------------------------------------------------------------------------------------------------------------
# 1. In PyTorch


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, positions: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v: q [b, s, h, d], k [b, t, g, d], v [b, t, g, v] -> [b, s, h, v].

    Query head i uses key/value head i // (h/g). bias [b, 1, s, t] is 0 where a query may look, else -inf, as
    the queries' positions [b, s] say.
    """
    if can_attend_one(q, v):
        return attend_one(q, k, v, positions, scale)
    if can_attend_runs(q):
        return attend_runs(q, k, v, bias, scale)
    q = q.unflatten(2, (k.shape[2], -1))                                        # [b, s, g, h/g, d]
    if q.shape[1] == 1:         # the h/g heads as queries of one head, so that keys are read once
        q, k, v = q[:, 0], k.transpose(1, 2), v.transpose(1, 2)                # [b, g, h/g, d], [b, g, t, ..]
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).flatten(1, 2)[:, None]
    if products.fp32_is_faster(q):
        return attend_fused(q.float(), k.float(), v.float(), bias.float(), scale).to(q.dtype)
    return attend_fused(q, k, v, bias, scale)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`attend` by PyTorch's kernel, q [b, s, g, h/g, d]. With as many slots as queries, nothing came before
    them: then the mask is a plain triangle, and the fastest kernel does not read what that hides."""
    first, shared, size = q.shape[1] == k.shape[1], q.shape[3] > 1, v.shape[-1]
    if q.device.type == "cpu" and size < k.shape[-1]:               # there the fastest kernel wants v = d
        v = F.pad(v, (0, k.shape[-1] - size))
    # It lets heads share keys without copies of them, but on a GPU neither in fp32 nor with a mask
    grouped = shared and (q.device.type == "cpu" or first and q.dtype != torch.float32)
    if shared and not grouped:
        k, v = (x.repeat_interleave(q.shape[3], dim=2) for x in (k, v))
    k, v = k.transpose(1, 2), v.transpose(1, 2)                                     # [b, h or g, t, ..]
    q = q.flatten(2, 3).transpose(1, 2)                                                     # [b, h, s, d]
    o = F.scaled_dot_product_attention(q, k, v, None if first else bias, is_causal=first, scale=scale,
                                       enable_gqa=grouped)
    return o[..., :size].transpose(1, 2)                                                    # [b, s, h, v]


def attend_latents(q: Tensor, keys: Tensor, c: int, bias: Tensor, positions: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v of all heads with the same keys, whose first c numbers are the values:
    q [b, s, h, c+r], keys [b, t, c+r] -> [b, s, h, c]. bias and positions as in `attend`."""
    one_head = keys[:, :, None]                                                 # [b, t, 1, c+r]
    if can_attend_one(q, one_head[..., :c]):
        return attend_one(q, one_head, one_head[..., :c], positions, scale)
    if can_attend_runs(q):
        return attend_runs(q, one_head, one_head[..., :c], bias, scale)
    queries = q.flatten(1, 2)                   # as those of one head, so that keys are read once
    if kernel.device_kind(q.device) == "cpu":
        bias, keys = bias.repeat_interleave(q.shape[2], dim=2), keys[:, None]   # [b, 1, s*h, t], [.., t, c+r]
        # Whole keys as values, which are cut later: as in attend_fused, v = d
        o = F.scaled_dot_product_attention(queries[:, None], keys, keys, bias, scale=scale)[:, 0, :, :c]
    else:
        scores = (keys @ queries.mT).mT.unflatten(1, q.shape[1:3])                          # [b, s, h, t]
        scores = torch.add(bias.transpose(1, 2), scores.float(), alpha=scale)
        o = scores.softmax(dim=-1).to(q.dtype).flatten(1, 2) @ keys[..., :c]                # [b, s * h, c]
    return o.unflatten(1, q.shape[1:3])


# ------------------------------------------------------------------------------------------------------------
# 2. Flash decoding: one query a row. Keys are cut into runs, for which all processors work at once; each run
# gives the softmax-weighted mean of its values and the log-sum-exp of its scores (lse).


def join(parts: Tensor, lse: Tensor) -> Tensor:
    """The mean over all runs: parts [..., runs, v], lse fp32 [..., runs] -> fp32 [..., v]. A run's mean was
    divided by its own sum of e^score, which is e^lse: weighted with that, runs add up as if never cut."""
    return (lse.softmax(-1)[..., None] * parts).sum(-2)


def can_attend_runs(q: Tensor) -> bool:
    """Not in eager steps, where its calls take more time than they save for few keys."""
    return q.shape[1] == 1 and torch.compiler.is_compiling() and kernel.device_kind(q.device) == "cpu"


def attend_runs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`attend` for q [b, 1, h, d] and t a multiple of 16, on a CPU. PyTorch's kernel leaves a head's keys to
    one thread, so they are cut while threads are left. In MLA's absorbed form v is the front of k."""
    (b, _, g, d), size = k.shape, v.shape[-1]
    runs = 1 << min(4, max(1, torch.get_num_threads() // (b * g)).bit_length() - 1)     # 1, 2, 4, 8 or 16
    if size < d:
        v = k                                   # as the kernel wants v = d
    q = q.reshape(b * g, 1, -1, d).expand(-1, runs, -1, -1)                     # [b * g, runs, h/g, d]
    k, v = (x.transpose(1, 2).flatten(0, 1).unflatten(1, (runs, -1)) for x in (k, v))
    mask = bias.reshape(b, 1, runs, 1, -1).expand(-1, g, -1, q.shape[2], -1).flatten(0, 1)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = attention(q, k, v, attn_mask=mask, scale=scale)            # [b * g, runs, h/g, d], [.., h/g]
    lse = lse + mask[..., 0]        # where a run's first key is hidden, all are, and it counts for nothing
    o = join(o[..., :size].transpose(1, 2), lse.transpose(1, 2))                        # [b * g, h/g, v]
    return o.to(q.dtype).view(b, 1, -1, size)


def attend_one(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of one query a row, over the keys up to its position, on a GPU.

    q [b, 1, h, d], k [b, t, g, d], v [b, t, g, v], positions [b, 1] int64 -> [b, 1, h, v]. In MLA's absorbed
    form v is the front of k. Keys past a row's end are not read, and `positions` is read on the device: a
    graph for many slots is hardly slower than one for few.
    """
    parts, lse = _launch_attend(q, k, v, positions, scale)                  # [b, h, runs, v], [b, h, runs]
    return join(parts, lse).to(q.dtype)[:, None]


def can_attend_one(q: Tensor, v: Tensor) -> bool:
    """Whether attend_one can run: one query a row, on a GPU with Triton; v's width, and what a key has beyond
    it, must be powers of two from 16 to 512."""
    sizes = {v.shape[-1], q.shape[-1] - v.shape[-1]} - {0}
    return (q.shape[1] == 1 and sizes <= {16, 32, 64, 128, 256, 512} and kernel.device_kind(q.device) != "old"
            and kernel.path(q.device, multiply=False) == "triton")


if triton:
    @triton.jit(do_not_specialize=["runs"])
    def attend_kernel(q, k, v, positions, parts, lse, k_row, k_slot, k_head, v_row, v_slot, v_head, span,
                      runs, SCALE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                      R: tl.constexpr, KEYS: tl.constexpr, SHARED: tl.constexpr):
        """16 of the HEADS that share a key/value head, for `span` slots, KEYS at a time: online softmax.

        A key has D + R numbers, a value D; SHARED: values are the fronts of the keys, which are read once.
        """
        BLOCKS: tl.constexpr = (HEADS + 15) // 16
        program, run = tl.program_id(0), tl.program_id(1)
        row, group = (program // (BLOCKS * GROUPS)).to(tl.int64), program // BLOCKS % GROUPS
        heads, d = program % BLOCKS * 16 + tl.arange(0, 16), tl.arange(0, D)
        live, at = heads < HEADS, (row * GROUPS + group) * HEADS + heads
        start = run * span
        stop = tl.minimum(start + span, tl.load(positions + row).to(tl.int32) + 1)
        q += at[:, None] * (D + R)
        k += row * k_row + group * k_head
        v += row * v_row + group * v_head
        query = tl.load(q + d[None, :], mask=live[:, None], other=0.0)
        if R > 0:
            r = D + tl.arange(0, R)
            rest = tl.load(q + r[None, :], mask=live[:, None], other=0.0)
        largest, total = tl.full([16], -float("inf"), tl.float32), tl.zeros([16], tl.float32)
        acc = tl.zeros([16, D], tl.float32)
        for first in range(start, stop, KEYS):
            slots = first + tl.arange(0, KEYS)
            there = (slots < stop)[:, None]
            at_slot = slots.to(tl.int64)[:, None]
            key = tl.load(k + at_slot * k_slot + d[None, :], mask=there, other=0.0)
            scores = tl.dot(query, key.T, input_precision="ieee")
            if R > 0:
                key_rest = tl.load(k + at_slot * k_slot + r[None, :], mask=there, other=0.0)
                scores += tl.dot(rest, key_rest.T, input_precision="ieee")
            scores = tl.where((slots < stop)[None, :], scores * SCALE, -float("inf"))
            before, largest = largest, tl.maximum(largest, tl.max(scores, axis=1))
            weight, fade = tl.exp(scores - largest[:, None]), tl.exp(before - largest)
            value = key if SHARED else tl.load(v + at_slot * v_slot + d[None, :], mask=there, other=0.0)
            total = total * fade + tl.sum(weight, axis=1)
            acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        to = at * runs + run
        acc /= tl.maximum(total, 1e-30)[:, None]
        tl.store(parts + to[:, None] * D + d[None, :], acc, mask=live[:, None])
        tl.store(lse + to, largest + tl.log(total), mask=live)


def _launch_attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (b, _, h, d), (_, t, g, size) = q.shape, v.shape
    span = 256 * triton.cdiv(t, 256 * 64)       # 256 for t up to 16,384: there, results do not depend on t
    runs, keys = triton.cdiv(t, span), max(16, min(64, 2 ** 15 // (size * k.element_size())))       # 32 KB
    stages = 2 if kernel.device_kind(q.device) == "rocm" or k.dtype == torch.float32 else 3
    parts = torch.empty(b, h, runs, size, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, h, runs, dtype=torch.float32, device=q.device)
    attend_kernel[b * g * triton.cdiv(h // g, 16), runs](
        q.contiguous(), k, v, positions.contiguous(), parts, lse, *k.stride()[:3], *v.stride()[:3],
        span, runs, scale, g, h // g, size, d - size, keys, d > size, num_warps=4, num_stages=stages)
    return parts, lse
