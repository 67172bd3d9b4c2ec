"""DeepSeek-R1 and its six distills, from tokens to logits, in one file.

    tokens [b, s] -> Embedding -> n_layers x Block -> RMSNorm -> head -> logits [b, s, vocab]

    Block (the same two lines for a 1.5B distill and for R1 with 671B):
        x = x + attention(norm(x))         GQA in the distills (Qwen2.5, Llama 3), MLA in R1
        x = x + feed_forward(norm(x))      MLP in the distills and R1's first 3 layers, MoE in R1's other 58

Read it top to bottom: 1 Config and Runtime, 2 norm and RoPE, 3 the cache, 4 linear layers, 5 GQA, 6 MLA,
7 MLP, gate and MoE, 8 Transformer. `Config` is what a checkpoint is, `Runtime` how we run it. Parameters are
only declared here; convert.py has the table from HuggingFace's names to these, and fills them. attention.py
has softmax(q k^T) v in fast forms, products.py x W^T, kernel.py FP8.

Equation numbers: "V3" DeepSeek-V3 report (arXiv 2412.19437), "V2" DeepSeek-V2 (2405.04434), "YaRN"
(2309.00071). What V3 needs for training only is not in here: balance loss (Eq. 17-20), bias updates, and
multi-token prediction (Eq. 21-25).

Dimension letters, the same in shape comments and einsums:

    b  batch rows            m  model dim                        c  latent dim
    s  query tokens          h  query heads                      e  experts
    t  cache slots (keys)    g  key/value heads                  k  experts chosen per token
    n  tokens, b * s         d  head dim (MLA: without r)        f  feed-forward dim
    P  ranks                 r  rotary dim (GQA: d)              v  value dim

Each of P tensor-parallel ranks holds h/P heads, f/P feed-forward channels, and vocab/P rows of embedding and
head; the rest whole: norms, gate, and MLA's projections to the latents. A forward pass communicates in two
all-reduces a layer (attention, feed-forward), one for the embedding, and one gather of the logits;
generate.py broadcasts the tokens that rank 0 draws.
"""
import math
from dataclasses import MISSING, dataclass, fields, is_dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import kernel
import products
from attention import attend, attend_latents

# ------------------------------------------------------------------------------------------------------------
# 1. Config: what a checkpoint is. Runtime: how we run it.


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `plain`, `llama3` (Llama 3.1's scaling) or `yarn` (R1: 4k -> 160k context)."""
    kind: str                           # plain | llama3 | yarn
    theta: float
    factor: float = 1.0                 # how far the context was stretched; R1: 40
    original_context_len: int = 0       # context before stretching; R1: 4096
    beta_fast: float = 32.0             # yarn: pairs with more turns than this per original context are kept
    beta_slow: float = 1.0              # yarn: pairs with fewer turns than this are slowed down by `factor`
    mscale: float = 0.0                 # yarn: temperature on cos and sin, relative to mscale_all_dim
    mscale_all_dim: float = 0.0         # yarn: temperature on the softmax scale; R1: 1.0
    low_freq_factor: float = 1.0        # llama3: wavelengths over original_context_len / low are slowed down
    high_freq_factor: float = 4.0       # llama3: wavelengths under original_context_len / high are kept

    def __post_init__(self):
        if self.kind not in ("plain", "llama3", "yarn"):
            raise ValueError(f"rope.kind is {self.kind!r}; known: plain, llama3, yarn")
        if self.kind != "plain" and not (self.factor >= 1 and self.original_context_len > 0):
            raise ValueError(f"rope.kind {self.kind} needs factor >= 1 and original_context_len > 0; "
                             f"got {self.factor} and {self.original_context_len}")
        if self.kind != "yarn" and self.mscale_all_dim:
            raise ValueError(f"rope.mscale_all_dim is {self.mscale_all_dim}; only kind yarn has one")
        if self.theta <= 1:
            raise ValueError(f"rope.theta is {self.theta}; it must be over 1")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"rope.low_freq_factor is {self.low_freq_factor}; it must be under "
                             f"high_freq_factor, {self.high_freq_factor}")


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention of the distills."""
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool                      # true for Qwen2, false for Llama


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention of V3 / R1. Numbers: R1."""
    q_lora_rank: int | None             # 1536; None: queries are projected directly
    kv_lora_rank: int                   # 512   c
    qk_nope_head_dim: int               # 128   d
    qk_rope_head_dim: int               # 64    r
    v_head_dim: int                     # 128   v
    latent_norm_eps: float = 1e-6       # the norms on the two latents do not follow norm_eps


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts of V3 / R1. Numbers: R1."""
    n_dense_layers: int                 # 3     leading layers with a plain MLP
    n_routed_experts: int               # 256   e
    n_shared_experts: int               # 1     experts that see every token
    n_activated_experts: int            # 8     k
    n_expert_groups: int                # 8     groups of consecutive experts (in training a node each)
    n_limited_groups: int               # 4     a token may use experts of this many groups
    moe_inter_dim: int                  # 2048  f of one expert
    route_scale: float                  # 2.5
    norm_topk_prob: bool                # true: the k weights of a token sum to 1 before route_scale

    def __post_init__(self):
        per_group, rest = divmod(self.n_routed_experts, self.n_expert_groups)
        if rest or per_group < 2 or not 1 <= self.n_limited_groups <= self.n_expert_groups:
            raise ValueError(f"moe: n_routed_experts {self.n_routed_experts} must fill n_expert_groups "
                             f"{self.n_expert_groups} with at least 2 experts each, and n_limited_groups "
                             f"{self.n_limited_groups} be at most n_expert_groups")
        if not 1 <= self.n_activated_experts <= per_group * self.n_limited_groups:
            raise ValueError(f"moe: n_activated_experts {self.n_activated_experts} must be between 1 and the "
                             f"{per_group * self.n_limited_groups} experts of {self.n_limited_groups} groups")


@dataclass(frozen=True)
class Config:
    """What a checkpoint is. Read from JSON with strict keys; exactly one of `gqa` and `mla` is present."""
    vocab_size: int
    dim: int                            # m
    inter_dim: int                      # f of the MLP layers
    n_layers: int
    n_heads: int                        # h
    norm_eps: float
    context_len: int                    # positions that the model was made for
    tie_embeddings: bool                # the head is the embedding matrix
    dtype: str                          # what the checkpoint's high-precision tensors are stored in
    rope: RopeConfig
    gqa: GQAConfig | None = None
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    fp8: bool = False                   # weights of Linear are block-wise e4m3 (kernel.py: what is not)
    ue8m0: bool = False                 # scales of FP8 activations are powers of two (V3.1; not R1)

    def __post_init__(self):
        if (self.gqa is None) == (self.mla is None):
            raise ValueError(f"a config needs one of the groups 'gqa' and 'mla'; this one has "
                             f"{'both' if self.gqa else 'neither'}")
        if self.gqa and self.n_heads % self.gqa.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of gqa.n_kv_heads {self.gqa.n_kv_heads}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.rope_dim % 2:
            raise ValueError(f"RoPE rotates pairs: the rotary dimension {self.rope_dim} must be even")

    @property
    def rope_dim(self) -> int:
        return self.mla.qk_rope_head_dim if self.mla else self.gqa.head_dim

    @classmethod
    def from_dict(cls, data: dict) -> "Config":
        """From our own JSON: config_671B.json, configs/, or a converted folder's (convert.load_config reads
        these, and HuggingFace's). ValueError names a key that is unknown, missing, or of another type."""
        return _from_dict(cls, data)

    def legal_ranks(self) -> list[int]:
        """Numbers of ranks that cut every sharded dimension evenly, and FP8 weights between their blocks."""
        unit = kernel.BLOCK if self.fp8 else 1
        cuts = [(self.vocab_size, 1), (self.n_heads, 1), (self.inter_dim, unit)]
        if self.gqa:
            cuts += [(self.gqa.n_kv_heads, 1)]
        if self.mla:
            d, r, v = self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim, self.mla.v_head_dim
            cuts += [(self.n_heads * size, unit) for size in (d + r, d + v, v)]         # wq_b, wkv_b, wo
        if self.moe:
            cuts += [(self.moe.moe_inter_dim, unit)]
        return [1] + [ranks for ranks in range(2, self.n_heads + 1)
                      if all(size % (ranks * unit) == 0 for size, unit in cuts)]


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
MAY_BE_ZERO = {"n_dense_layers", "n_shared_experts", "original_context_len", "mscale", "mscale_all_dim"}


def _from_dict(cls, data: dict, where: str = ""):
    """Build the dataclass `cls` from JSON, every key known, every required key there, every type right."""
    if not isinstance(data, dict):
        raise ValueError(f"a config must be a JSON object; it is {data!r}")
    known = {field.name: field for field in fields(cls)}
    if unknown := data.keys() - known.keys():
        raise ValueError(f"unknown key {where + min(unknown)!r}; known: {', '.join(known)}")
    if missing := [name for name, f in known.items() if f.default is MISSING and name not in data]:
        raise ValueError(f"missing key {where + missing[0]!r}")
    values = {}
    for name, value in data.items():
        kinds = getattr(known[name].type, "__args__", (known[name].type,))      # `int | None` -> two kinds
        if isinstance(value, dict) and is_dataclass(kinds[0]):
            value = _from_dict(kinds[0], value, f"{where}{name}.")
        if type(value) is int and float in kinds and abs(value) < 2 ** 63:
            value = float(value)
        if type(value) not in kinds:
            accepted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"key {where + name!r} is {value!r}; it must be {accepted}")
        limit = 2 ** 31 if type(value) is int else math.inf
        if type(value) in (int, float) and not (0 < value < limit or value == 0 and name in MAY_BE_ZERO):
            raise ValueError(f"key {where + name!r} is {value!r}; it must be a positive number")
        values[name] = value
    return cls(**values)


@dataclass(frozen=True)
class Shard:
    """This process's place among the tensor-parallel ranks, which are all of the default process group."""
    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Runtime:
    """How we run a checkpoint: where, how precisely, how much at once; not what it computes."""
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.bfloat16     # of activations, cache and all weights that are not FP8
    fp8: str = "dequant"                    # FP8 weights meet FP8 activations ("gemm"), or are converted to
                                            # `dtype` for each product ("dequant"), or at load ("bf16")
    tp: Shard = Shard()
    rows: int = 1                           # sequences that the cache holds
    max_seq_len: int = 4096                 # tokens that the cache holds per sequence
    prefill_chunk: int = 2048               # prompt tokens per forward pass; activations grow with this
    compile: bool = False                   # decode steps as C++ on a CPU, CUDA graphs on a GPU: decode.py

    def __post_init__(self):
        for name, value, known in (("device", type(self.device), [torch.device]),
                                   ("dtype", self.dtype, DTYPES.values()),
                                   ("fp8", self.fp8, ["gemm", "dequant", "bf16"])):
            if value not in known:
                raise ValueError(f"{name} is {value}; accepted: {', '.join(map(str, known))}")


# ------------------------------------------------------------------------------------------------------------
# 2. Norm and rotary positions


def declare(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory (meta device); convert.load_model puts the real tensor in its place."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: scales tokens to a root mean square of 1; no mean is taken off."""

    def __init__(self, dim: int, eps: float, rt: Runtime):
        super().__init__()
        self.eps = eps
        self.weight = declare(dim, dtype=rt.dtype)

    def forward(self, x: Tensor) -> Tensor:                                     # [..., dim]
        h = F.rms_norm(x, self.weight.shape, eps=self.eps)      # in fp32, then rounded to x's dtype before
        return self.weight * h                                  # the product, as HuggingFace does it


def yarn_mscale(factor: float, strength: float) -> float:
    """YaRN section 3.4: a stretched context needs sharper attention, by this factor on q and on k, so squared
    (R1: 1.3689^2 = 1.874). `strength` is a config's mscale or mscale_all_dim. V2 section 3.1.4 had 0.0707 in
    place of 0.1."""
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Angle per position of each of the dim/2 pairs, fp32 [r/2], and a factor on cos and sin (R1: 1.0).

    The config decides, never the length of the run: R1 was trained with YaRN, so short prompts need it, too.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    freqs = 1.0 / rope.theta ** exponent                                        # [r/2] 1 to nearly 1/theta
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / freqs
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((rope.original_context_len / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * freqs / rope.factor + keep * freqs, 1.0
    if rope.kind == "yarn":
        # YaRN Definition 2, "NTK by parts": fast pairs keep their frequency, slow ones are divided by factor.
        # The paper ramps between them in turns per context; DeepSeek's code, and this, in the pair's index.
        # Pair i turns L theta^(-2i/dim) / 2 pi times in L = original_context_len tokens; solved for i:
        def pair_turning(turns: float) -> float:
            wavelength = rope.original_context_len / turns
            return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))
        low = max(math.floor(pair_turning(rope.beta_fast)), 0)                  # R1: 10
        high = min(math.ceil(pair_turning(rope.beta_slow)), dim - 1)            # R1: 23
        ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
        slow = ramp.clamp(0, 1)                                                 # [r/2] 0 keep, 1 slow down
        freqs = freqs * (1 - slow) + freqs / rope.factor * slow
        mscale = yarn_mscale(rope.factor, 1.0)
        if rope.mscale and rope.mscale_all_dim:     # R1: 1.0, the whole temperature sits in the softmax scale
            mscale = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
        return freqs, mscale
    return freqs, 1.0


def both_angles(angles: Tensor) -> Tensor:
    """[..., r/2] -> [..., r]: the angle a of a pair as -a, a, for the real form in apply_rope."""
    return torch.stack((-angles, angles), dim=-1).flatten(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3) ... of x [b, s, h, r], in fp32, by cos, sin [b, s, 1, r] of angles
    -a, a: as complex numbers, to (x0 + i x1) (cos(a) + i sin(a)).

    Convention: pairs are interleaved, as in DeepSeek's checkpoints. HuggingFace's Qwen and Llama pair
    (i, i + r/2); convert.py permutes their q and k rows once, so that this is the only rotation.
    """
    # TorchInductor has real numbers only. In prompts the complex form takes a third of the real one's time
    if torch.compiler.is_compiling():           # x0 cos(-a) + x1 sin(-a), x1 cos(a) + x0 sin(a), ...
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)                 # x1, x0, x3, x2, ...
        return (x * cos + swapped * sin).to(x.dtype)                            # [b, s, h, r]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))             # [b, s, h, r/2]
    rotated = pairs * torch.complex(cos[..., 1::2], sin[..., 1::2])             # 1::2 are a's [b, s, h, r/2]
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)                  # [b, s, h, r]


# ------------------------------------------------------------------------------------------------------------
# 3. The cache


def zeros(*shape: int, rt: Runtime) -> Tensor:
    """A zeroed buffer. Not `empty`: a masked slot has weight 0, but if memory holds a NaN, 0 * NaN is NaN."""
    if rt.device.type != "cpu":
        return torch.zeros(shape, dtype=rt.dtype, device=rt.device)
    # numpy asks the system for zeroed pages, which take memory once they are used; torch would write them all
    flat = np.zeros(math.prod(shape) * rt.dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(rt.dtype).view(shape)


@dataclass
class Cache:
    """Keys and values of the tokens so far. Rows of one batch may stand at different positions.

    Each layer has a tuple of buffers [rows, slots, ...]: MLA one of width c + r (the latent and the shared
    rotary key), GQA keys and values [rows, slots, g/P, d]. A forward pass reads every slot of the cache that
    it is given and masks what lies behind a row's end, so whoever passes a narrower `view` pays for fewer
    slots (attention.attend_one alone leaves out the others).
    """
    layers: list[tuple[Tensor, ...]]
    lengths: Tensor                         # [rows] int64: tokens stored; every forward pass advances it

    @classmethod
    def allocate(cls, cfg: Config, rt: Runtime) -> "Cache":
        """An empty cache of rt.rows x rt.max_seq_len. R1, bf16: 61 * 576 * 2 = 70,272 bytes a token."""
        shape = (cfg.n_layers, rt.rows, rt.max_seq_len)

        def latents() -> Tensor:
            return zeros(*shape, cfg.mla.kv_lora_rank + cfg.mla.qk_rope_head_dim, rt=rt)

        def heads() -> Tensor:
            g, d = cfg.gqa.n_kv_heads // rt.tp.size, cfg.gqa.head_dim
            if rt.device.type == "cpu":     # in memory head by head, as they are read: 10 % faster
                return zeros(*shape[:2], g, rt.max_seq_len, d, rt=rt).transpose(2, 3)
            return zeros(*shape, g, d, rt=rt)

        buffers = (latents(),) if cfg.mla else (heads(), heads())       # of all layers, which are cut apart
        layers = list(zip(*(buffer.unbind() for buffer in buffers)))
        return cls(layers, torch.zeros(rt.rows, dtype=torch.int64, device=rt.device))

    def view(self, rows: slice, slots: int) -> "Cache":
        """The same memory, narrowed to `rows` and to the first `slots` slots."""
        layers = [tuple(buffer[rows, :slots] for buffer in layer) for layer in self.layers]
        return Cache(layers, self.lengths[rows])

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` a clone of the first `length` tokens of row `source`."""
        for layer in self.layers:
            for buffer in layer:
                buffer[target, :length] = buffer[source, :length]
        self.lengths[target] = length

    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this rank's cache, all layers together."""
        return sum(buffer[0, 0].nbytes for layer in self.layers for buffer in layer)


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share."""
    positions: Tensor       # [b, s]         where the new tokens stand in their rows
    bias: Tensor            # [b, 1, s, t]   0 where a query may look (itself and its past), else -inf
    rows: Tensor            # [b, s]         which of the buffers' rows: 0 for the first sequence, then 1, ...
    cos: Tensor             # [b, s, 1, r]   apply_rope's
    sin: Tensor             # [b, s, 1, r]

    def store(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write new [b, s, ...] into buffer [b, >= t, ...] at the tokens' positions; return [b, t, ...]."""
        buffer.index_put_((self.rows, self.positions), new)
        return buffer[:, :self.bias.shape[-1]]


# ------------------------------------------------------------------------------------------------------------
# 4. Linear layers and the two collectives


def all_reduce(x: Tensor, tp: Shard) -> Tensor:
    """Sum the ranks' partial results."""
    if tp.size > 1:
        x = x.contiguous()      # memory is added up as it lies, so it must lie alike on all ranks
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor, tp: Shard) -> Tensor:
    """Join the ranks' slices of the last axis: [..., vocab/P] -> [..., vocab]."""
    if tp.size == 1:
        return x
    slices = [torch.empty_like(x) for _ in range(tp.size)]
    dist.all_gather(slices, x.contiguous())
    return torch.cat(slices, dim=-1)


class Linear(nn.Module):
    """y = x W^T + b with this rank's part of W, in the run's dtype or in FP8 with a scale per block.

    Sizes are local. Cutting the outputs over ranks needs no communication; cutting the inputs leaves a
    partial sum, which Block adds up. With `experts` the weight is a stack [e, out, in], of which a call names
    one for all tokens or, by a tensor of ids [...], one for each.
    """

    def __init__(self, n_in: int, n_out: int, cfg: Config, rt: Runtime, bias: bool = False,
                 experts: tuple = ()):
        super().__init__()
        self.fp8, self.ue8m0 = rt.fp8, cfg.ue8m0
        self.weight = declare(*experts, n_out, n_in, dtype=kernel.FP8 if cfg.fp8 else rt.dtype)
        self.bias = declare(n_out, dtype=rt.dtype) if bias else None
        blocks = (*experts, kernel.n_blocks(n_out), kernel.n_blocks(n_in))
        scale = torch.empty(blocks, dtype=torch.float32, device="meta") if cfg.fp8 else None
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor, expert: int | Tensor | None = None) -> Tensor:     # [..., in] -> [..., out]
        weight, scale = self.weight, self.scale
        if isinstance(expert, Tensor):
            return products.matvec(x, weight, scale, expert)
        if expert is not None:
            weight, scale = weight[expert], scale if scale is None else scale[expert]
        if scale is None:
            return products.linear(x, weight, self.bias)
        if self.fp8 == "gemm":                                  # no bias: convert.py reads no FP8 for GQA
            return kernel.fp8_gemm(*kernel.act_quant(x, self.ue8m0), weight, scale, x.dtype)
        if products.few(x):                                     # compiled: one pass over W as FP8
            return products.matvec(x, weight, scale)
        return products.linear(x, kernel.weight_dequant(weight, scale, x.dtype))

    def dequantise(self, dtype: torch.dtype) -> None:
        """Replace an FP8 weight by its high-precision form, for good."""
        if self.scale is not None:
            weight = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
            stack = (t if t.dim() == 3 else t[None] for t in (weight, self.weight, self.scale))
            for w, q, scale in zip(*stack):                                     # experts one by one
                w.copy_(kernel.weight_dequant(q, scale, dtype))
            self.weight, self.scale = nn.Parameter(weight, requires_grad=False), None


class Embedding(nn.Module):
    """Token ids -> vectors. Each rank holds vocab/P rows; a token is looked up by the rank that has it."""

    def __init__(self, cfg: Config, rt: Runtime):
        super().__init__()
        self.tp = rt.tp
        self.weight = declare(cfg.vocab_size // rt.tp.size, cfg.dim, dtype=rt.dtype)

    def forward(self, tokens: Tensor) -> Tensor:                                # [b, s] -> [b, s, m]
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tp.rank * self.weight.shape[0]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])               # [b, s]
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight)           # [b, s, m]
        return all_reduce(x.masked_fill(elsewhere[..., None], 0), self.tp)


# ------------------------------------------------------------------------------------------------------------
# 5. Grouped-query attention: the distills


class GQA(nn.Module):
    """Attention in which h/g query heads share a key/value head (arXiv 2305.13245).

    The cache takes 2 * g * d numbers a token and layer: in bf16 57 KB a token for Qwen-7B, 328 KB for
    Llama-70B.
    """

    def __init__(self, cfg: Config, rt: Runtime):
        super().__init__()
        a, ranks = cfg.gqa, rt.tp.size
        self.head_dim = a.head_dim
        self.wq = Linear(cfg.dim, cfg.n_heads * a.head_dim // ranks, cfg, rt, bias=a.qkv_bias)
        self.wk = Linear(cfg.dim, a.n_kv_heads * a.head_dim // ranks, cfg, rt, bias=a.qkv_bias)
        self.wv = Linear(cfg.dim, a.n_kv_heads * a.head_dim // ranks, cfg, rt, bias=a.qkv_bias)
        self.wo = Linear(cfg.n_heads * a.head_dim // ranks, cfg.dim, cfg, rt)

    def forward(self, x: Tensor, step: Step, cache: tuple[Tensor, ...]) -> Tensor:
        """x [b, s, m], cache: keys and values [b, >= t, g/P, d] -> this rank's partial sum [b, s, m]."""
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))                       # [b, s, h/P, d]
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))                       # [b, s, g/P, d]
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))                       # [b, s, g/P, d]
        both = apply_rope(torch.cat([q, k], dim=2), step.cos, step.sin)         # fewer operations than two
        q, k = both.split([q.shape[2], k.shape[2]], dim=2)                      # [b, s, h/P, d], [.., g/P, d]
        keys = step.store(cache[0], k)                                          # [b, t, g/P, d]
        values = step.store(cache[1], v)                                        # [b, t, g/P, d]
        # o = softmax(q k^T / sqrt(d) + bias) v, query head i with key/value head i // (h/g)  [b, s, h/P, d]
        o = attend(q, keys, values, step.bias, step.positions, self.head_dim ** -0.5)
        return self.wo(o.flatten(2))                                            # [b, s, m]


# ------------------------------------------------------------------------------------------------------------
# 6. Multi-head latent attention: R1


def per_head(x: Tensor, w: Tensor) -> Tensor:
    """A matrix for each head: x [b, s, h, in], w [h, in, out] -> [b, s, h, out]."""
    y = products.matmul(x.flatten(0, 1).transpose(0, 1), w)                     # [h, b * s, out]
    return y.transpose(0, 1).unflatten(0, x.shape[:2])


class MLA(nn.Module):
    """Attention that caches one small latent vector per token, not keys and values per head (V2 section 2.1).

    Keys and values of all heads are linear functions of a shared latent c_kv, which is stored in their place.
    R1 caches 512 + 64 numbers a token and layer where 128 heads of keys (192) and values (128) would take
    40,960, 71 times as many: 70 KB a token over 61 layers instead of 5.0 MB. Ranks split the heads; each
    keeps every latent.

    The same function has two orders of evaluation. Expanded: make keys and values from the latents, then
    attend; cheaper for many queries. Absorbed: move the up-projections W^UK and W^UV over to the query and
    the output and attend among the latents, so that nothing is expanded; cheaper for few queries among many
    slots (R1: up to 170), as when it decodes.

    RoPE on the expanded keys would put a rotation, for each distance another one, between the query and W^UK,
    which then could not move over. So position travels apart, in one rotary key k_pe for all heads, stored
    beside the latent: the 64 numbers (V2 section 2.1.3).
    """

    def __init__(self, cfg: Config, rt: Runtime):
        super().__init__()
        a, self.heads = cfg.mla, cfg.n_heads // rt.tp.size
        self.c, self.d, self.r, self.v = a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
        q_out = self.heads * (self.d + self.r)
        self.compress_q = a.q_lora_rank is not None     # saves parameters and training activations, not cache
        if not self.compress_q:
            self.wq = Linear(cfg.dim, q_out, cfg, rt)
        else:
            self.wq_a = Linear(cfg.dim, a.q_lora_rank, cfg, rt)                 # W^DQ
            self.q_norm = RMSNorm(a.q_lora_rank, a.latent_norm_eps, rt)
            self.wq_b = Linear(a.q_lora_rank, q_out, cfg, rt)                   # W^UQ and W^QR, per head
        self.wkv_a = Linear(cfg.dim, self.c + self.r, cfg, rt)                  # W^DKV, then W^KR
        self.kv_norm = RMSNorm(self.c, a.latent_norm_eps, rt)
        self.wkv_b = Linear(self.c, self.heads * (self.d + self.v), cfg, rt)    # W^UK and W^UV, per head
        self.wo = Linear(self.heads * self.v, cfg.dim, cfg, rt)
        mscale = yarn_mscale(cfg.rope.factor, cfg.rope.mscale_all_dim)
        self.scale = (self.d + self.r) ** -0.5 * mscale ** 2                    # R1: 192^-1/2 * 1.874 = 0.135

    def forward(self, x: Tensor, step: Step, cache: tuple[Tensor, ...]) -> Tensor:
        """x [b, s, m], cache: one buffer [b, >= t, c+r] -> this rank's partial sum [b, s, m]."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.compress_q else self.wq(x)     # V3 Eq. 6-7
        q = q.unflatten(-1, (self.heads, -1))                                   # [b, s, h/P, d+r]
        q_nope, q_pe = q.split([self.d, self.r], dim=-1)
        c_kv, k_pe = self.wkv_a(x).split([self.c, self.r], dim=-1)              # V3 Eq. 1 [b, s, c], [.., r]
        c_kv = self.kv_norm(c_kv)               # in no equation: V2 section 3.1.2 adds norms on both latents
        pe = apply_rope(torch.cat([q_pe, k_pe[:, :, None]], dim=2), step.cos, step.sin)
        q_pe, k_pe = pe.split([self.heads, 1], dim=2)       # V3 Eq. 8, 3 [b, s, h/P, r], [b, s, 1, r]
        latents = step.store(cache[0], torch.cat([c_kv, k_pe[:, :, 0]], dim=-1))        # [b, t, c+r]
        order = self._absorbed if self.absorbs(x.shape[1], latents.shape[1]) else self._expanded
        o = order(q_nope, q_pe, latents, step)                                  # [b, s, h/P, v]
        return self.wo(o.flatten(2))                                            # V3 Eq. 11 [b, s, m]

    def absorbs(self, s: int, t: int) -> bool:
        """Whether s queries among t slots are cheaper absorbed, in multiply-adds per head: one query always,
        a prompt's first chunk, where s = t, never (R1)."""
        project = self.c * (self.d + self.v)            # W^UK and W^UV: for each query, or for each slot
        absorbed = s * project + s * t * (2 * self.c + self.r)
        expanded = t * project + s * t * (self.d + self.r + self.v)
        return s == 1 or absorbed <= expanded

    def _expanded(self, q_nope: Tensor, q_pe: Tensor, latents: Tensor, step: Step) -> Tensor:
        """V3 Eq. 10 as written: per-head keys and values from the latents, then ordinary attention."""
        c_kv, k_pe = latents.split([self.c, self.r], dim=-1)
        kv = self.wkv_b(c_kv).unflatten(-1, (self.heads, -1))                   # V3 Eq. 2, 5
        k_nope, v = kv.split([self.d, self.v], dim=-1)                          # [b, t, h/P, d], [.., v]
        k_pe = k_pe[:, :, None].expand(-1, -1, self.heads, -1)                  # one rotary key for all heads
        k = torch.cat([k_nope, k_pe], dim=-1)                                   # V3 Eq. 4 [b, t, h/P, d+r]
        q = torch.cat([q_nope, q_pe], dim=-1)                                   # V3 Eq. 9 [b, s, h/P, d+r]
        return attend(q, k, v, step.bias, step.positions, self.scale)           # [b, s, h/P, v]

    def _absorbed(self, q_nope: Tensor, q_pe: Tensor, latents: Tensor, step: Step) -> Tensor:
        """V2 section 2.1.2: q . (W^UK c_kv) = (W^UK^T q) . c_kv, and sum_j p_j (W^UV c_kv_j) =
        W^UV sum_j p_j c_kv_j, so the latents themselves are keys and values."""
        # W^UK [h/P, d, c] and W^UV [h/P, v, c] alternate in wkv_b head by head. kernel.py has no FP8 product
        # for each head, so convert.load_model dequantises it
        w_k, w_v = self.wkv_b.weight.unflatten(0, (self.heads, -1)).split([self.d, self.v], dim=1)
        q_c = per_head(q_nope, w_k)                             # W^UK absorbed into the query [b, s, h/P, c]
        q = torch.cat([q_c, q_pe], dim=-1)                                      # [b, s, h/P, c+r]
        # V3 Eq. 10 with one key for all heads, [c_kv; k_pe], and c_kv as its value          [b, s, h/P, c]
        o_c = attend_latents(q, latents, self.c, step.bias, step.positions, self.scale)
        return per_head(o_c, w_v.mT)                            # W^UV applied to the output   [b, s, h/P, v]


# ------------------------------------------------------------------------------------------------------------
# 7. Feed-forward: MLP, and a mixture of experts


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x). With `experts`, a stack of which a call names one."""

    def __init__(self, inter_dim: int, cfg: Config, rt: Runtime, experts: tuple = ()):
        super().__init__()
        local = inter_dim // rt.tp.size
        self.w1 = Linear(cfg.dim, local, cfg, rt, experts=experts)              # "gate_proj" in HuggingFace
        self.w2 = Linear(local, cfg.dim, cfg, rt, experts=experts)              # "down_proj"
        self.w3 = Linear(cfg.dim, local, cfg, rt, experts=experts)              # "up_proj"

    def forward(self, x: Tensor, expert: int | Tensor | None = None) -> Tensor:
        """x [..., m] -> this rank's partial sum [..., m]."""
        def swiglu(x: Tensor) -> Tensor:
            inner = F.silu(self.w1(x, expert)) * self.w3(x, expert)             # [..., f/P]
            return self.w2(inner, expert)
        return products.by_pieces(swiglu, x, self.w1.weight)                    # swiglu(x)


class Gate(nn.Module):
    """Chooses k of e experts for each token, and how much each one counts (V3 section 2.1.2).

    R1 picks 8 of 256, from at most 4 of 8 groups. In training a group is a node, so a token travels to at
    most 4 nodes. The bias b_i balances the experts' load, nearly without a loss term: training nudges it up
    for idle experts, down for busy ones. It takes part in the choice only, as it tells how busy an expert is,
    not how well it suits a token: weights come from unbiased scores.
    """

    def __init__(self, cfg: Config, rt: Runtime):
        super().__init__()
        self.moe = cfg.moe
        # e_i of V3 Eq. 15. convert.load_model keeps it in fp32 if the checkpoint has it so; R1's is in bf16
        self.weight = declare(cfg.moe.n_routed_experts, cfg.dim, dtype=rt.dtype)
        bias = torch.empty(cfg.moe.n_routed_experts, dtype=torch.float32, device="meta")
        self.register_buffer("bias", bias)                                      # b_i of V3 Eq. 16

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, m] -> weights fp32 [n, k], expert ids int64 [n, k]. All in fp32: choices flip on rounding."""
        moe = self.moe
        scores = products.linear(x.float(), self.weight.float()).sigmoid()      # V3 Eq. 15 [n, e]
        biased = scores + self.bias                                             # V3 Eq. 16 [n, e]
        biased = biased.unflatten(-1, (moe.n_expert_groups, -1))                # [n, G, e/G], G groups
        # V3 section 2.1.2: a group is as good as its k/M best experts. R1: k = 8, from M = 4 of G = 8 groups,
        # so 2; which DeepSeek's code, and this, takes for any numbers
        votes = biased.topk(2, dim=-1).values.sum(-1)                           # [n, G]
        kept = votes.topk(moe.n_limited_groups, dim=-1).indices                 # [n, M]
        groups = torch.arange(moe.n_expert_groups, device=x.device)             # [G]
        dropped = (kept[..., None] != groups).all(1)                            # [n, G]
        # -inf, not 0: a negative bias may take a kept expert below 0, and it must still beat the dropped ones
        biased = biased.masked_fill(dropped[..., None], -math.inf).flatten(1)   # [n, e]
        experts = biased.topk(moe.n_activated_experts, dim=-1).indices          # V3 Eq. 16, not 14 [n, k]
        weights = scores.gather(1, experts)                                     # V3 Eq. 16: s_i, without b_i
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)     # V3 Eq. 13 [n, k]
        return weights * moe.route_scale, experts           # route_scale = 2.5 is in no equation


class MoE(nn.Module):
    """One shared expert for every token plus k routed ones of many (V3 Eq. 12): R1 holds 256 and reads 8 + 1.

    One such layer of R1 has 11.3 B parameters, of which a token uses 0.40 B. Every rank holds a slice of
    every expert, as of any MLP, so all work equally whatever the gate decides, and share one all-reduce.
    """

    def __init__(self, cfg: Config, rt: Runtime):
        super().__init__()
        moe = cfg.moe
        self.ue8m0 = cfg.ue8m0
        self.gate = Gate(cfg, rt)
        self.experts = MLP(moe.moe_inter_dim, cfg, rt, experts=(moe.n_routed_experts,))     # w1 [e, f/P, m]
        self.shared = MLP(moe.n_shared_experts * moe.moe_inter_dim, cfg, rt) if moe.n_shared_experts else None
        self.grouped = cfg.fp8 and rt.fp8 == "gemm" and kernel.path(rt.device) == "triton"

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, m] -> this rank's partial sum [b, s, m], added up in fp32."""
        tokens = x.flatten(0, 1)                                                # [n, m]
        weights, experts = self.gate(tokens)                                    # [n, k] each
        if self.shared:
            y = self.shared(tokens).float()                                     # [n, m]
        else:
            y = torch.zeros_like(tokens, dtype=torch.float32)
        if self.grouped:
            routed = self._grouped(tokens, weights, experts)                    # [n, m]
        elif torch.compiler.is_compiling():                 # decode: the host does not ask who was chosen
            out = self.experts(tokens[:, None], experts)                        # [n, k, m]
            routed = (weights[..., None] * out).sum(1)                          # V3 Eq. 12 [n, m]
        else:
            routed = self._sorted(tokens, weights, experts)                     # [n, m]
        return (y + routed).to(x.dtype).view_as(x)

    def _sorted(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The routed experts' sum [n, m] in fp32, expert by expert; only those that were hit are read. Here s
        are rows sorted by expert, n * k and with AMX spare ones."""
        w1, w2, w3 = self.experts.w1.weight, self.experts.w2.weight, self.experts.w3.weight
        x, rows, ends = products.by_expert(tokens, experts, len(w1))            # [s, m], [n, k], [e]
        if products.can_group(x, w1, w2, w3):
            x = F.silu(products.grouped(x, w1, ends)) * products.grouped(x, w3, ends)       # [s, f/P]
            x = products.grouped(x, w2, ends)                                   # [s, m]
        else:
            parts = enumerate(x.tensor_split(ends.tolist())[:-1])
            x = torch.cat([self.experts(part, expert) for expert, part in parts if len(part)])
        return torch.bmm(weights[:, None], x[rows].float())[:, 0]               # V3 Eq. 12

    def _grouped(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The same sum; its products take two launches, and the host need not know the choice. Here a group
        is an expert's tokens, and a slot one of the n * k choices."""
        w1, w2, w3 = self.experts.w1, self.experts.w2, self.experts.w3
        groups = kernel.group(experts, n_experts=len(w1.weight))                # slots [n * k], by expert
        gate, up = kernel.grouped_fp8_gemm(*kernel.act_quant(tokens, self.ue8m0), [w1.weight, w3.weight],
                                           [w1.scale, w3.scale], groups, tokens.dtype)      # [n * k, f/P]
        inner = kernel.act_quant(F.silu(gate) * up, self.ue8m0)
        out, = kernel.grouped_fp8_gemm(*inner, [w2.weight], [w2.scale], groups, tokens.dtype)   # [n * k, m]
        return (weights[..., None] * out.unflatten(0, weights.shape)).sum(1)    # V3 Eq. 12


# ------------------------------------------------------------------------------------------------------------
# 8. Block and Transformer


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normed copy and added to the residual stream."""

    def __init__(self, layer: int, cfg: Config, rt: Runtime):
        super().__init__()
        self.tp = rt.tp
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps, rt)
        self.attn = MLA(cfg, rt) if cfg.mla else GQA(cfg, rt)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps, rt)
        is_moe = cfg.moe and layer >= cfg.moe.n_dense_layers
        self.ffn = MoE(cfg, rt) if is_moe else MLP(cfg.inter_dim, cfg, rt)

    def forward(self, x: Tensor, step: Step, cache: tuple[Tensor, ...]) -> Tensor:      # [b, s, m]
        x = x + all_reduce(self.attn(self.attn_norm(x), step, cache), self.tp)
        return x + all_reduce(self.ffn(self.ffn_norm(x)), self.tp)


class Transformer(nn.Module):
    """The whole model, or this rank's part of it. R1: 671.0 B parameters; a token uses 36.6 B of them,
    without the embedding, of which it reads a row."""

    def __init__(self, cfg: Config, rt: Runtime):
        super().__init__()
        if rt.tp.size not in cfg.legal_ranks():
            raise ValueError(f"this model cannot be cut over {rt.tp.size} ranks; it can over "
                             f"{', '.join(map(str, cfg.legal_ranks()))}")
        self.cfg, self.rt = cfg, rt
        self.embed = Embedding(cfg, rt)
        self.layers = nn.ModuleList(Block(layer, cfg, rt) for layer in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps, rt)
        # The head stays out of FP8 and is cut along the vocabulary, like the embedding it may be tied to.
        self.head = self.embed if cfg.tie_embeddings else Embedding(cfg, rt)
        freqs, self.rope_factor = rope_frequencies(cfg.rope, cfg.rope_dim)
        self.rope_freqs = both_angles(freqs).to(rt.device)                      # [r]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: Cache, last: int | None = None) -> Tensor:
        """Run tokens int64 [b, s], which follow what the b rows of `cache` hold, and append them to it.

        Returns fp32 logits [b, s, vocab], or [b, last, vocab] for the last tokens only; the same on every
        rank. Rows may stand at different positions; all need s free slots in the cache that is passed.
        ValueError: the cache has another number of rows.
        """
        if len(tokens) != len(cache.lengths):
            raise ValueError(f"tokens have {len(tokens)} rows, and the cache {len(cache.lengths)}: pass "
                             f"cache.view(slice(0, {len(tokens)}), slots)")
        step = self.step(tokens.shape[1], cache.lengths, cache.layers[0][0].shape[1])
        x = self.embed(tokens)                                                  # [b, s, m]
        for block, layer_cache in zip(self.layers, cache.layers):
            x = block(x, step, layer_cache)
        cache.lengths += tokens.shape[1]
        return self.logits(x if last is None else x[:, -last:])                 # [b, s or last, vocab]

    def logits(self, x: Tensor) -> Tensor:                                      # [b, s, m] -> [b, s, vocab]
        return all_gather(products.linear(self.norm(x), self.head.weight), self.rt.tp).float()

    def step(self, n_new: int, lengths: Tensor, slots: int) -> Step:
        """For n_new tokens after each row's `lengths` [b], among `slots` slots: positions, mask, angles."""
        device = lengths.device
        positions = lengths[:, None] + torch.arange(n_new, device=device)       # [b, s]
        visible = torch.arange(slots, device=device) <= positions[..., None]    # [b, s, t]
        hidden = torch.full((), -math.inf, dtype=self.rt.dtype, device=device)
        bias = torch.where(visible, 0.0, hidden)                                # [b, s, t]
        angles = (positions[..., None].float() * self.rope_freqs)[:, :, None]   # [b, s, 1, r]
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        rows = torch.arange(len(lengths), device=device)[:, None]
        rows = rows.expand_as(positions).contiguous()           # else a GPU copies it again for each `store`
        return Step(positions, bias[:, None], rows, cos, sin)
