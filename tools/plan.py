"""What a model needs before you buy or rent for it: memory per GPU, what fits, and how fast a step can be.

    python tools/plan.py --config config_671B.json --gpus 8 --gpu-gib 141 --batch 8 --seq 32768

No weights are needed: the model is built without memory, and its tensors are counted. Weights and cache are
exact to the byte; activations are an upper bound on what one prefill chunk holds at once.
"""
import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernel  # noqa: E402
from convert import Parser, load_config  # noqa: E402
from model import DTYPES, Cache, Config, Runtime, Shard, Transformer  # noqa: E402

GIB = 2 ** 30


@dataclass(frozen=True)
class Plan:
    """Bytes on one of `gpus` ranks."""
    weights: int
    cache: int                  # of all rows at full length
    cache_per_token: int        # of one row
    activations: int
    step: int                   # read from memory to decode one token in every row


def plan(cfg: Config, rt: Runtime) -> Plan:
    """Count what one rank holds and reads; rt gives ranks, dtype, rows, max_seq_len and prefill_chunk."""
    rt = replace(rt, device=torch.device("meta"))
    model, cache = Transformer(cfg, rt), Cache.allocate(cfg, rt)
    tensors = dict(model.state_dict())
    tensors.pop("head.weight" if cfg.tie_embeddings else "", None)
    weights = sum(stored_bytes(name, t, cfg, rt) for name, t in tensors.items())
    held = sum(buffer.nbytes for layer in cache.layers for buffer in layer)
    matrices = [t for name, t in tensors.items() if t.dtype == kernel.FP8 and "wkv_b" not in name]
    converted = max((t.shape[-2] * t.shape[-1] for t in matrices), default=0) * rt.dtype.itemsize   # one a time
    return Plan(weights, held, cache.bytes_per_token(), converted + activations(model, rt),
                held + sum(read_bytes(name, t, cfg, rt) for name, t in tensors.items()))


def stored_bytes(name: str, tensor: torch.Tensor, cfg: Config, rt: Runtime) -> int:
    """As loaded: MLA's wkv_b is kept dequantised, everything else as the model declares it."""
    if cfg.fp8 and "wkv_b" in name:
        return 0 if name.endswith("scale") else tensor.numel() * rt.dtype.itemsize
    return tensor.nbytes


def read_bytes(name: str, tensor: torch.Tensor, cfg: Config, rt: Runtime) -> int:
    """What a step reads of a tensor: of the embedding a row a token, of the experts those that are hit.

    With B tokens that choose k of e experts evenly, e * (1 - (1 - k/e)^B) are hit on average.
    """
    if name == "embed.weight" and not cfg.tie_embeddings:
        return rt.rows * tensor[0].nbytes
    if ".experts." in name:
        e, k = cfg.moe.n_routed_experts, cfg.moe.n_activated_experts
        return int(tensor.nbytes * (1 - (1 - k / e) ** rt.rows))
    return stored_bytes(name, tensor, cfg, rt)


def activations(model: Transformer, rt: Runtime) -> int:
    """Upper bound for a prefill chunk of s tokens that sees t slots: attention or feed-forward, the larger.

    Counts every tensor of a sublayer as alive at once, next to the residual stream and the mask.
    """
    cfg = model.cfg
    s, t, ranks, size = min(rt.prefill_chunk, rt.max_seq_len), rt.max_seq_len, rt.tp.size, rt.dtype.itemsize
    heads = cfg.n_heads // ranks
    if cfg.mla:
        a = cfg.mla
        qk = a.qk_nope_head_dim + a.qk_rope_head_dim
        attention = s * heads * (3 * qk + 2 * a.v_head_dim)
        attention += t * heads * (qk + a.qk_nope_head_dim + a.v_head_dim)
        attention += s * ((a.q_lora_rank or 0) + 2 * (a.kv_lora_rank + a.qk_rope_head_dim))
        queries = max(rt.rows, min(s, model.layers[0].attn.absorb_up_to))       # absorbed: scores in fp32
        attention = max(attention, 3 * queries * heads * t * 4 // size)
    else:
        attention = s * cfg.gqa.head_dim * (4 * heads + 4 * cfg.gqa.n_kv_heads // ranks)
    inner = cfg.inter_dim if not cfg.moe else max(
        cfg.inter_dim, (cfg.moe.n_shared_experts + cfg.moe.n_activated_experts) * cfg.moe.moe_inter_dim)
    feed_forward = 3 * s * inner // ranks
    if cfg.moe:                                                 # every choice's output, weighted in fp32
        feed_forward += s * (cfg.moe.n_activated_experts + 2) * cfg.dim * (size + 4) // size
    stream = s * cfg.dim * (3 * size + 3 * 4)                   # residual and sums; the norm's copies in fp32
    logits = rt.rows * cfg.vocab_size * 4 * 4                   # fp32; sampling sorts and sums copies of them
    return max(attention, feed_forward) * size + stream + s * t + logits


def largest(rt: Runtime, cfg: Config, room: int) -> tuple[int, int]:
    """The most rows at this length, and the longest context at these rows, that take `room` bytes or less."""
    def fits(rows: int, seq: int) -> bool:
        p = plan(cfg, replace(rt, rows=rows, max_seq_len=seq))
        return p.weights + p.cache + p.activations <= room

    def search(good, top: int) -> int:                          # the largest n <= top with good(n), or 0
        low, high = 0, top + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low

    rows = search(lambda rows: fits(rows, rt.max_seq_len), 4096)
    return rows, search(lambda seq: fits(rt.rows, seq), cfg.context_len)


def report(cfg: Config, rt: Runtime, gpu_gib: float, reserve_gib: float,
           bandwidth: float | None) -> tuple[str, bool]:
    """The text, and whether it fits."""
    p, room = plan(cfg, rt), int((gpu_gib - reserve_gib) * GIB)
    need = p.weights + p.cache + p.activations
    rows, seq = largest(rt, cfg, room)
    lines = [f"{rt.tp.size} x {gpu_gib:g} GiB, {rt.rows} rows of {rt.max_seq_len:,} tokens, per GPU:", "",
             f"  weights      {p.weights / GIB:9.2f} GiB   {p.weights:,} bytes",
             f"  cache        {p.cache / GIB:9.2f} GiB   {p.cache_per_token:,} bytes a token",
             "  activations  "
             f"{p.activations / GIB:9.2f} GiB   at most, chunks of {rt.prefill_chunk:,} tokens",
             f"  reserved     {reserve_gib:9.2f} GiB   for the driver, NCCL and fragmentation",
             f"  needed       {need / GIB + reserve_gib:9.2f} GiB   of {gpu_gib:g}: "
             f"{'fits' if need <= room else 'DOES NOT FIT'}", "",
             f"  largest batch at this length:  {rows or 'none'}{' or more' if rows == 4096 else ''}",
             f"  longest context at this batch: {f'{seq:,}' if seq else 'none'} of {cfg.context_len:,}",
             f"  legal numbers of ranks:        {', '.join(map(str, cfg.legal_ranks()))}",
             f"  a decode step reads:           {p.step / 1e9:.2f} GB per GPU with all rows at full length"]
    if bandwidth:
        seconds = p.step / (bandwidth * 1e9)
        lines.append(f"  at {bandwidth:,.0f} GB/s that takes:  {1e3 * seconds:12.2f} ms, so at most "
                     f"{1 / seconds:,.1f} steps/s, {rt.rows / seconds:,.1f} tokens/s")
    return "\n".join(lines), need <= room


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Memory and speed limits of a model on GPUs, from its config alone.")
    parser.add_argument("--config", type=Path, required=True, help="ours, or a HuggingFace config.json")
    parser.add_argument("--gpus", type=int, default=1, help="ranks (%(default)s)")
    parser.add_argument("--gpu-gib", type=float, required=True, help="memory of one, e.g. 80 or 141")
    parser.add_argument("--batch", type=int, default=1, help="sequences that run together (%(default)s)")
    parser.add_argument("--seq", type=int, default=40_960, help="tokens of prompt and answer (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prefill-chunk", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--reserve-gib", type=float, default=2.0, help="left free (%(default)s)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of one GPU, e.g. 3350 or 4800")
    args = parser.parse_args(argv)
    for name in ("gpus", "gpu_gib", "batch", "seq", "prefill_chunk", "reserve_gib", "bandwidth"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
    try:
        cfg = load_config(args.config)
        if args.seq > cfg.context_len:
            raise ValueError(f"--seq is {args.seq}; this model was made for at most {cfg.context_len}")
        rt = Runtime(dtype=DTYPES[args.dtype], tp=Shard(0, args.gpus), rows=args.batch, max_seq_len=args.seq,
                     prefill_chunk=args.prefill_chunk)
        text, fits = report(cfg, rt, args.gpu_gib, args.reserve_gib, args.bandwidth)
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
