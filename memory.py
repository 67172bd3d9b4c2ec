"""Memory, counted before it is needed: what one rank holds, and what its machine has left for it.

No weights are needed: the model is built without memory, and its tensors are counted. Weights and cache are
exact to the byte, but for gates that a checkpoint has in fp32 (R1 has not); activations are an upper bound on
the tensors that one prefill chunk holds at once. generate.py refuses with this what cannot fit, and
tools/plan.py prints it.
"""
import ctypes
import functools
import math
import os
import platform
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import kernel
import products
from decode import cache_slots
from model import Cache, Config, Runtime, Transformer

GIB = 2 ** 30


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank."""
    weights: int
    cache: int                  # of all rows at full length
    cache_per_token: int        # of one row
    activations: int
    step: int                   # read from memory to decode one token in every row

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        weights, cache, activations = self.weights / GIB, self.cache / GIB, self.activations / GIB
        return (f"{self.total / GIB:.2f} GiB (weights {weights:.2f}, cache {cache:.2f}, "
                f"activations {activations:.2f})")


def ran_out(error: Exception) -> bool:
    """Whether it says that there was no memory: numpy has a type for that, PyTorch not everywhere."""
    told = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return told or isinstance(error, MemoryError)


declared = functools.cache(Transformer)         # R1 takes 0.1 s, and `largest` asks 30 times


def plan(cfg: Config, rt: Runtime) -> Plan:
    """Count what one rank holds and reads; rt gives device, ranks, dtype, rows and lengths."""
    meta = replace(rt, device=torch.device("meta"), max_seq_len=cache_slots(rt))
    model, cache = declared(cfg, replace(meta, rows=1, max_seq_len=1)), Cache.allocate(cfg, meta)
    tensors = dict(model.state_dict())
    if cfg.tie_embeddings:
        del tensors["head.weight"]
    weights = sum(stored_bytes(name, t, cfg, rt) for name, t in tensors.items())
    held = sum(buffer.nbytes for layer in cache.layers for buffer in layer)
    matrices = [t for name, t in tensors.items()                # kept as FP8, and converted one at a time
                if t.dtype == kernel.FP8 and stored_bytes(name, t, cfg, rt) == t.nbytes]
    converted = rt.dtype.itemsize * max((t.shape[-2] * t.shape[-1] for t in matrices), default=0)
    return Plan(weights, held, cache.bytes_per_token(), converted + activations(model, rt),
                held + sum(read_bytes(name, t, cfg, rt) for name, t in tensors.items()))


def stored_bytes(name: str, tensor: torch.Tensor, cfg: Config, rt: Runtime) -> int:
    """As loaded: MLA's wkv_b, and with rt.fp8 "bf16" every matrix, dequantised; the rest as declared."""
    if cfg.fp8 and ("wkv_b" in name or rt.fp8 == "bf16"):
        if name.endswith(".scale"):
            return 0
        if tensor.dtype == kernel.FP8:
            return tensor.numel() * rt.dtype.itemsize
    return tensor.nbytes


def read_bytes(name: str, tensor: torch.Tensor, cfg: Config, rt: Runtime) -> int:
    """What a step reads of a tensor: of the embedding a row a token, of the experts those that are hit.

    With B tokens that choose k of e experts evenly, e * (1 - (1 - k/e)^B) are hit on average.
    """
    if name == "embed.weight" and not cfg.tie_embeddings:
        return rt.rows * tensor[0].nbytes
    if ".experts." in name:
        e, k = cfg.moe.n_routed_experts, cfg.moe.n_activated_experts
        return int(stored_bytes(name, tensor, cfg, rt) * (1 - (1 - k / e) ** rt.rows))
    return stored_bytes(name, tensor, cfg, rt)


def activations(model: Transformer, rt: Runtime) -> int:
    """Upper bound for a prefill chunk of s tokens that sees t slots: attention or feed-forward, the larger.

    Counts every tensor of a sublayer as alive at once, in numbers of rt.dtype, next to the residual stream,
    the mask and logits, in bytes.
    """
    cfg = model.cfg
    s, t, ranks, size = min(rt.prefill_chunk, rt.max_seq_len), rt.max_seq_len, rt.tp.size, rt.dtype.itemsize
    heads, seen = cfg.n_heads // ranks, t
    if cfg.mla:             # seen: the most slots that s queries expand; few: the most queries that absorb t
        a, absorbs = cfg.mla, model.layers[0].attn.absorbs
        seen = s + bisect_left(range(s, t), True, key=lambda slots: absorbs(s, slots))
        few = bisect_left(range(2, s + 1), True, key=lambda queries: not absorbs(queries, t)) + 1
        qk, v, kv_heads = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim, heads
        latent = (a.q_lora_rank or 0) + 2 * (a.kv_lora_rank + a.qk_rope_head_dim)
        projected = s * (heads * (3 * qk + 2 * v) + latent)
        expanded = seen * heads * (qk + a.qk_nope_head_dim + v)
    else:
        qk, v, kv_heads = cfg.gqa.head_dim, cfg.gqa.head_dim, cfg.gqa.n_kv_heads // ranks
        projected, expanded = s * qk * (4 * heads + 4 * kv_heads), 0
    # attention.attend: keys and values for every head, on a CPU in the order in which it multiplies bf16;
    # without bf16 products instead queries, keys, values, mask and result in fp32
    if products.fp32_is_faster(rt):
        copies = (2 * s * heads * qk + seen * kv_heads * (2 * qk + v) + s * seen) * 4 // size
    else:
        copies = seen * heads * (qk + v) * (kv_heads < heads or rt.device.type == "cpu")
    attention = expanded + copies
    if cfg.mla:
        score = size if rt.device.type == "cpu" else 3 * 4      # the mask for each head; or scores in fp32
        absorbed = max(rt.rows, few) * heads * t * score // size
        attention = max(absorbed, attention)
    attention += projected
    inner = cfg.inter_dim if not cfg.moe else max(
        cfg.inter_dim, (cfg.moe.n_shared_experts + cfg.moe.n_activated_experts) * cfg.moe.moe_inter_dim)
    feed_forward = 3 * s * inner // ranks
    if cfg.moe:             # every choice's input and output, that in the tokens' order, and in fp32
        k, e = cfg.moe.n_activated_experts, cfg.moe.n_routed_experts
        feed_forward += s * (k * (3 * size + 4) + 2 * (size + 4)) * cfg.dim // size
        spare = 0
        if products.multiplies_tiles(rt):                       # rows, at most: products.by_expert
            spare = 15 * e if s * k > 64 * e else 30 * e + s * k
        feed_forward += spare * (2 * cfg.dim + 3 * cfg.moe.moe_inter_dim // ranks)
    stream = s * cfg.dim * (3 * size + 3 * 4)                   # residual and sums; the norm's copies in fp32
    mask = s * t * (1 + size)                                   # of bools, and of zeros and infinities
    # fp32; sampling sorts and sums copies of them, a GPU all, with their ids and a scratch copy of both
    logits = rt.rows * cfg.vocab_size * 4 * (12 if rt.device.type == "cuda" else 4)
    return max(attention, feed_forward) * size + stream + mask + logits


def largest(rt: Runtime, cfg: Config, room: int) -> tuple[int, int]:
    """The most rows at this length, and the longest context at these rows, that take `room` bytes or less."""
    def fits(rows: int, seq: int) -> bool:
        return plan(cfg, replace(rt, rows=rows, max_seq_len=seq)).total <= room

    def search(good, top: int) -> int:                          # the largest n <= top with good(n), or 0
        low, high = 0, top + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low

    rows = search(lambda rows: fits(rows, rt.max_seq_len), 4096)
    return rows, search(lambda seq: fits(rt.rows, seq), cfg.context_len)


def free(device: torch.device, root: Path = Path("/")) -> float:
    """Bytes that this rank may still take; infinite where the system does not say.

    On CPUs what Linux calls available, or what the container's limit (cgroup v2 or v1) leaves if that is
    less; all there is on macOS; the ranks of one machine share it. Pages of files do not count as taken:
    they are given back.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    groups, room = root / "sys/fs/cgroup", math.inf
    if (info := root / "proc/meminfo").exists():
        room = 1024 * numbers(info)["MemAvailable:"]
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder, limit, used in ((groups, "memory.max", "memory.current"),
                                (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        if (folder / limit).exists() and (text := (folder / limit).read_text()).strip() != "max":
            stat = numbers(folder / "memory.stat")
            files = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            room = min(room, int(text) - int((folder / used).read_text()) + files)
    return room / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_freed() -> None:
    """Let the C library of Linux, glibc, keep up to 1 GiB of what this process frees, for what it takes next.

    By default it returns large blocks, so that activations are new pages each time, which the system has to
    find and to zero: about a quarter of a prompt's time. The settings are those of `man mallopt`; if the
    environment has any (MALLOC_TRIM_THRESHOLD_ and the like), they stay.
    """
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if glibc and not any(name.startswith("MALLOC_") for name in os.environ):
        m_trim_threshold, m_mmap_threshold, libc = -1, -3, ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2 ** 25)                 # larger blocks than this cannot be kept
        libc.mallopt(m_trim_threshold, 2 ** 30)


def numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by its first word."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if (words := line.split())}
