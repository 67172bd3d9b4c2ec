"""What a model needs before you buy or rent for it: memory per GPU, what fits, and how fast a step can be.

    python tools/plan.py --config config_671B.json --gpus 8 --gpu-gib 139 --batch 8 --seq 32768

No weights are needed; memory.py says what is counted, and how exactly.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert import Parser, complain, load_config  # noqa: E402
from memory import GIB, largest, plan  # noqa: E402
from model import DTYPES, Config, Runtime, Shard  # noqa: E402


def report(cfg: Config, rt: Runtime, gpu_gib: float, reserve_gib: float,
           bandwidth: float | None) -> tuple[str, bool]:
    """The text, and whether it fits."""
    p, room = plan(cfg, rt), int((gpu_gib - reserve_gib) * GIB)
    rows, seq = largest(rt, cfg, room)
    lines = [f"{rt.tp.size} x {gpu_gib:g} GiB, {rt.rows} row{'s' * (rt.rows > 1)} of "
             f"{rt.max_seq_len:,} tokens, per GPU:", "",
             f"  weights      {p.weights / GIB:9.2f} GiB   {p.weights:,} bytes",
             f"  cache        {p.cache / GIB:9.2f} GiB   {p.cache_per_token:,} bytes a token",
             "  activations  "
             f"{p.activations / GIB:9.2f} GiB   at most, chunks of {rt.prefill_chunk:,} tokens",
             f"  reserved     {reserve_gib:9.2f} GiB   for the driver, NCCL and fragmentation",
             f"  needed       {p.total / GIB + reserve_gib:9.2f} GiB   of {gpu_gib:g}: "
             f"{'fits' if p.total <= room else 'DOES NOT FIT'}", "",
             f"  largest batch at this length:  {rows or 'none'}{' or more' if rows == 4096 else ''}",
             f"  longest context at this batch: {f'{seq:,}' if seq else 'none'} of {cfg.context_len:,}",
             f"  legal numbers of ranks:        {', '.join(map(str, cfg.legal_ranks()))}",
             f"  a decode step reads:           {p.step / 1e9:.2f} GB per GPU with all rows at full length"
             f"{', experts chosen evenly' if cfg.moe else ''}"]
    if bandwidth:
        seconds = p.step / (bandwidth * 1e9)
        lines.append(f"  at {bandwidth:,.0f} GB/s that takes:  {1e3 * seconds:12.2f} ms, so at most "
                     f"{1 / seconds:,.1f} steps/s, {rt.rows / seconds:,.1f} tokens/s")
    return "\n".join(lines), p.total <= room


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Memory and speed limits of a model on GPUs, from its config alone.")
    parser.add_argument("--config", type=Path, required=True, help="ours, or HuggingFace's, or its folder")
    parser.add_argument("--gpus", type=int, default=1, help="ranks (%(default)s)")
    parser.add_argument("--gpu-gib", type=float, required=True,
                        help="memory of one, as PyTorch counts it: about 79 for an H100, 139 for an H200")
    parser.add_argument("--batch", type=int, default=1, help="sequences that run together (%(default)s)")
    parser.add_argument("--seq", type=int, help="tokens of prompt and answer (40960, or the model's limit)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(%(default)s)")
    parser.add_argument("--fp8", choices=["stored", "bf16"], default="stored",
                        help="FP8 weights: as they are, or as convert.py --dtype bf16 has them (%(default)s)")
    parser.add_argument("--prefill-chunk", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--reserve-gib", type=float, default=2.0, help="left free (%(default)s)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of one GPU, e.g. 3350 or 4800")
    args = parser.parse_args(argv)
    parser.at_least(args, 1, "gpus", "gpu_gib", "batch", "seq", "prefill_chunk", "bandwidth")
    parser.at_least(args, 0, "reserve_gib")
    try:
        cfg = load_config(args.config / "config.json" if args.config.is_dir() else args.config)
        cfg = replace(cfg, fp8=cfg.fp8 and args.fp8 == "stored")
        seq = args.seq or min(40_960, cfg.context_len)
        if seq > cfg.context_len:
            raise ValueError(f"--seq is {seq}; this model was made for at most {cfg.context_len}")
        rt = Runtime(torch.device("cuda"), DTYPES[args.dtype], tp=Shard(0, args.gpus), rows=args.batch,
                     max_seq_len=seq, prefill_chunk=args.prefill_chunk)
        text, fits = report(cfg, rt, args.gpu_gib, args.reserve_gib, args.bandwidth)
    except (ValueError, OSError) as error:
        return complain("plan.py", error)
    print(text)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
