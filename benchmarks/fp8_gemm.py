"""How fast are R1's FP8 products? Ours beside bf16, cuBLASLt and a kernel of the official structure.

    python benchmarks/fp8_gemm.py                   on a GPU: R1's shapes, a table in benchmarks/results/
    python benchmarks/fp8_gemm.py --output DIR      on a CPU: a few small shapes, to see that it works

Weights come cold from memory: calls rotate among copies that exceed the L2 cache together. On a GPU, 20 calls
or more are recorded in a CUDA graph, so no launch is timed; the figure is the median over replays. Only the
loop over experts cannot be recorded, as it waits for the device, and is timed with its launches. Activations
of single products are quantised beforehand, those of experts within. What the device can do at best is
measured first.
"""
import argparse
import itertools
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernel  # noqa: E402
from convert import load_config  # noqa: E402
from model import Config, MoE, MoEConfig, Runtime  # noqa: E402

if kernel.triton:
    import triton
    import triton.language as tl

R1 = {"wq_a": (1536, 7168), "wkv_a": (576, 7168), "wq_b": (24576, 1536), "wo": (7168, 16384),
      "dense w1, w3": (18432, 7168), "dense w2": (7168, 18432),
      "shared w1, w3": (2048, 7168), "shared w2": (7168, 2048),
      # one of 8 ranks
      "wq_b / 8": (3072, 1536), "wo / 8": (7168, 2048), "dense w1, w3 / 8": (2304, 7168),
      "dense w2 / 8": (7168, 2304), "shared w1, w3 / 8": (256, 7168), "shared w2 / 8": (7168, 256)}
TOKENS, EXPERT_TOKENS = (1, 2, 16, 64, 128, 512, 4096), (1, 16, 256, 4096)
SMALL = {"whole blocks": (256, 512), "edge blocks": (300, 200)}         # for CPUs
CALLS = 20                                                              # in one CUDA graph, at least

# ------------------------------------------------------------------------------------------------------------
# The competitors


if kernel.triton:
    @triton.autotune([triton.Config({"BM": m, "BN": n}, num_warps=8, num_stages=s)
                      for m, n, s in itertools.product((16, 32, 64), (64, 128), (4,))], key=["m", "n", "K"],
                     do_bench=partial(triton.testing.do_bench, warmup=5, rep=20))
    @triton.jit(do_not_specialize=["m", "n"])
    def naive_kernel(a, a_scale, w, w_scale, y, m, n, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """How DeepSeek's own inference code goes about it: rows wrap around at the edges, both scales are
        vectors and multiply one after the other, tiles in plain order, the best tile found by trying all."""
        rows = (tl.program_id(0) * BM + tl.arange(0, BM)) % m
        columns = (tl.program_id(1) * BN + tl.arange(0, BN)) % n
        channels, blocks = tl.arange(0, 128), tl.cdiv(K, 128)
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(blocks):
            at, left = i * 128 + channels, K - i * 128
            a_tile = tl.load(a + rows[:, None] * K + at[None, :], mask=channels[None, :] < left, other=0.0)
            w_tile = tl.load(w + columns[None, :] * K + at[:, None], mask=channels[:, None] < left, other=0.0)
            by_row = tl.load(a_scale + rows * blocks + i)
            by_column = tl.load(w_scale + columns // 128 * blocks + i)
            acc += tl.dot(a_tile, w_tile) * by_row[:, None] * by_column[None, :]
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        tl.store(y + rows[:, None] * n + columns[None, :], acc.to(y.dtype.element_ty),
                 mask=(rows < m)[:, None] & (columns < n)[None, :])


def naive(a, a_scale, w, w_scale):
    (m, k), n = a.shape, len(w)
    y = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    naive_kernel[lambda meta: (triton.cdiv(m, meta["BM"]), triton.cdiv(n, meta["BN"]))](
        a.contiguous(), a_scale.contiguous(), w, w_scale, y, m, n, k)
    return y


def forced(choice: str, a, a_scale, w, w_scale):
    """Our product, with FP8_PATH=choice."""
    with mock.patch.object(kernel, "FORCED", choice):
        return kernel.fp8_gemm(a, a_scale, w, w_scale, torch.bfloat16)


def competitors(m: int, w: torch.Tensor) -> dict:
    """Name -> function of (x, a, a_scale, w, w_scale, bf16 w), for what this device can run."""
    fp8 = {"ours": partial(forced, None)}
    if kernel.path(w.device) == "triton":
        fp8 |= {"naive": naive, "triton": partial(forced, "triton")}
        with mock.patch.object(kernel, "FORCED", "scaled_mm"):
            if kernel.scaled_mm_wins(m, w, torch.bfloat16):
                fp8["scaled_mm"] = partial(forced, "scaled_mm")
    wrapped = {name: lambda x, *operands, f=f: f(*operands[:4]) for name, f in fp8.items()}
    return {"bf16": lambda x, *operands: F.linear(x, operands[4]), **wrapped}


# ------------------------------------------------------------------------------------------------------------
# The clock


def seconds(calls: list, device: torch.device, graph: bool = True) -> float:
    """Median time of a call; `calls` do the same work on different copies of its operands, and take turns."""
    rotation = list(itertools.islice(itertools.cycle(calls), max(CALLS, len(calls))))
    if device.type != "cuda":
        times = []
        for call in calls + rotation[:7]:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times[len(calls):])
    for call in calls:                          # compiles, and fills the allocator's pools
        call()
    torch.cuda.synchronize()
    run = lambda: [call() for call in rotation]  # noqa: E731
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            run()
        run = recorded.replay
    run()
    times = []
    for _ in range(11):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(rotation))
    return statistics.median(times)


def limits(device: torch.device) -> tuple[float, float]:
    """What the device does at best: bytes copied (read and written) and bf16 operations, per second."""
    size, edge = (1 << 30, 8192) if device.type == "cuda" else (1 << 22, 256)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(2))
    return (2 * size / seconds([lambda: target.copy_(source)], device),
            2 * edge ** 3 / seconds([lambda: a @ b], device))


# ------------------------------------------------------------------------------------------------------------
# The measurements


def random_fp8(*shape: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Any finite codes, and scales of the size of real weights'. Zeros would run faster than numbers do."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    codes[codes & 127 == 127] = 0x38
    blocks = (*shape[:-2], *map(kernel.n_blocks, shape[-2:]))
    return codes.view(kernel.FP8), torch.rand(blocks, device=device) * 1e-3 + 1e-4


def n_copies(n_bytes: int, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(4, math.ceil(3 * cache / n_bytes))


def measure_products(shapes: dict, tokens: tuple, device: torch.device) -> list[dict]:
    rows = []
    for name, (n, k) in shapes.items():
        weights = [random_fp8(n, k, device=device) for _ in range(n_copies(n * k, device))]
        weights = [(*pair, kernel.weight_dequant(*pair, torch.bfloat16)) for pair in weights]
        for m in tokens:
            rows += [dict(what=name, n=n, k=k, tokens=m, **measured) for measured in race(m, weights)]
            print(f"{name} {n} x {k}, {m} tokens", file=sys.stderr)
    return rows


def race(m: int, weights: list[tuple]) -> list[dict]:
    """All competitors on m tokens and the same `weights`, copies of (w, w_scale, w in bf16)."""
    (n, k), device = weights[0][0].shape, weights[0][0].device
    x = torch.randn(m, k, device=device).bfloat16()
    operands, rows = (x, *kernel.act_quant(x)), []
    expected = forced("torch", *operands[1:], *weights[0][:2]).double()
    for who, product in competitors(m, weights[0][0]).items():
        calls = [partial(product, *operands, *copy) for copy in weights]
        error = ((calls[0]().double() - expected).norm() / expected.norm()).item()
        if not error <= (0.1 if who == "bf16" else 0.004):      # bf16 activations are other ones than FP8's
            raise AssertionError(f"{n} x {k}, {m} tokens: {who} is off by {error:.1%}")
        n_bytes = (2 if who == "bf16" else 1) * (n * k + m * k) + 2 * m * n
        rows.append(dict(who=who, seconds=seconds(calls, device), bytes=n_bytes, operations=2 * m * n * k))
    return rows


def expert_layer(dim: int, f: int, experts: int, k: int, device: torch.device) -> MoE:
    """The routed experts of one layer of a model with R1's architecture, random, on `device`."""
    cfg = load_config(ROOT / "config_671B.json").__dict__
    moe = {**cfg["moe"].__dict__, "n_routed_experts": experts, "n_activated_experts": k, "moe_inter_dim": f}
    cfg = Config(**{**cfg, "dim": dim, "moe": MoEConfig(**{**moe, "n_expert_groups": min(8, experts // 2)})})
    layer = MoE(cfg, Runtime(device=device, fp8="gemm"))
    for linear in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
        w, linear.scale = random_fp8(*linear.weight.shape, device=device)
        linear.weight = torch.nn.Parameter(w, requires_grad=False)
    return layer


def loop(layer: MoE, tokens: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Expert by expert, as in the official code: the host waits for the list of those that were chosen."""
    y = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    for expert in ids.unique().tolist():
        n, k = torch.where(ids == expert)
        y.index_add_(0, n, weights[n, k, None] * layer.experts(tokens[n], expert))
    return y


def measure_experts(sizes: dict, tokens: tuple, device: torch.device) -> list[dict]:
    rows = []
    for name, (dim, f, e, k) in sizes.items():
        layer = expert_layer(dim, f, e, k, device)
        for m in tokens:
            copies = []                                         # other tokens choose other experts: cold, too
            for _ in range(4):
                ids = torch.rand(m, e, device=device).topk(k).indices
                x, weights = torch.randn(m, dim, device=device).bfloat16(), torch.rand(m, k, device=device)
                copies.append((x, weights, ids))
            ours, expected = layer._grouped(*copies[0]), loop(layer, *copies[0])
            if not (ours - expected).norm() <= 0.02 * expected.norm():
                raise AssertionError(f"{name}, {m} tokens: the grouped experts are off")
            hit = statistics.mean(len(ids.unique()) for _, _, ids in copies)
            for who, graph, function in (("loop", False, partial(loop, layer)),
                                         ("ours", True, layer._grouped)):
                taken = seconds([partial(function, *copy) for copy in copies], device, graph)
                rows.append(dict(what=name, n=f, k=dim, tokens=m, who=who, seconds=taken,
                                 bytes=int(hit * 3 * f * dim), operations=6 * m * k * f * dim))
            print(f"{name}, {m} tokens", file=sys.stderr)
    return rows


# ------------------------------------------------------------------------------------------------------------
# The report


def table(rows: list[dict], copy: float, peak: float) -> list[str]:
    lines = ["| what | n x k | tokens | who | us | GB/s | of copy | TFLOP/s | of bf16 peak |",
             "|---|---|--:|---|--:|--:|--:|--:|--:|"]
    for r in rows:
        rate, work = r["bytes"] / r["seconds"], r["operations"] / r["seconds"]
        lines.append(f"| {r['what']} | {r['n']} x {r['k']} | {r['tokens']} | {r['who']} "
                     f"| {r['seconds'] * 1e6:.1f} | {rate / 1e9:.0f} | {rate / copy:.2f} "
                     f"| {work / 1e12:.1f} | {work / peak:.2f} |")
    return lines


def goals(rows: list[dict], copy: float) -> list[str]:
    """The worst case of each goal of ours, measured."""
    took = {(r["what"], r["tokens"], r["who"]): r["seconds"] for r in rows}
    ours = [(r, r["bytes"] / r["seconds"] / copy) for r in rows if r["who"] == "ours"]
    few = [share for r, share in ours
           if r["tokens"] <= 16 and r["n"] * r["k"] >= 4e6 and "experts" not in r["what"]]
    one = [share for r, share in ours if r["tokens"] == 1 and "experts" in r["what"]]

    def speedup(who: str, other: str, tokens: int) -> list[float]:
        return [took[what, m, other] / t for (what, m, name), t in took.items()
                if name == who and m == tokens and (what, m, other) in took]

    claims = [("0.70 of copy bandwidth, up to 16 tokens, weights of 4 MB and more", 0.70, few),
              ("1.3 x bf16 at 4096 tokens", 1.3, speedup("ours", "bf16", 4096)),
              ("Triton alone 1.5 x the naive kernel at 4096 tokens", 1.5, speedup("triton", "naive", 4096)),
              ("experts of 1 token at 0.65 of copy bandwidth", 0.65, one),
              ("experts of 1 token 5 x the loop", 5.0, speedup("ours", "loop", 1))]
    return [f"- {what}: {min(values):.2f} at worst, {statistics.median(values):.2f} in the middle, "
            f"{'reached' if min(values) >= goal else 'missed'}" for what, goal, values in claims if values]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the table (on a GPU: benchmarks/results)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of single products, on a GPU")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    folder = args.output or (ROOT / "benchmarks/results" if gpu else None)
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {folder}: {error.strerror}")
    if min(args.tokens) < 1:
        parser.error(f"--tokens is {min(args.tokens)}; it must be 1 or more")
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    copy, peak = limits(device)
    rows = measure_products(R1 if gpu else SMALL, args.tokens if gpu else (1, 16), device)
    experts = ({"experts": (7168, 2048, 256, 8), "experts / 8": (7168, 256, 256, 8)} if gpu
               else {"experts": (256, 128, 8, 2)})
    rows += measure_experts(experts, EXPERT_TOKENS if gpu else (1, 16), device)
    where = torch.cuda.get_device_name() if gpu else "CPU"
    versions = {"torch": torch.__version__, "triton": getattr(kernel.triton, "__version__", None),
                "cuda": torch.version.cuda, "hip": torch.version.hip}
    head = [f"# FP8 products on {where}", "", ", ".join(f"{k} {v}" for k, v in versions.items() if v), "",
            f"Copying {copy / 1e9:.0f} GB/s, bf16 products {peak / 1e12:.1f} TFLOP/s, weights cold.", ""]
    text = "\n".join([*head, *(goals(rows, copy) + [""] if gpu else []), *table(rows, copy, peak)])
    print(text)
    if folder:
        stem = "fp8_gemm " + where.replace("/", " ")
        (folder / f"{stem}.md".replace(" ", "_")).write_text(text + "\n", encoding="utf-8")
        facts = dict(device=where, versions=versions, copy_bytes_per_second=copy, bf16_flops=peak, rows=rows)
        (folder / f"{stem}.json".replace(" ", "_")).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
