"""How fast is a whole model? Ours, eager and compiled, beside transformers and llama.cpp, in one process.

    python benchmarks/throughput.py --config configs/qwen_0.5b.json         random weights of these shapes
    python benchmarks/throughput.py --ckpt-path DIR                         a HuggingFace folder

Every figure is a median over rounds, in each of which all take their turn at each task; of a round of
decoding it is the median step. Tokens are greedy (llama.cpp's a fixed one): ours through generate(),
transformers and llama.cpp as bare forward passes; rows have prompts of their own, so that they choose experts
of their own. Reading bandwidth (of a GPU: copying, bytes read and written) and GEMM peak are measured in the
same rounds: what a step must read, over the first, and what a prompt must multiply, over the second, are the
limits. Load time (without imports) and peak memory are those of fresh processes that load from the file cache
and take a step on a CPU; on a GPU, and without Linux, neither is measured, and random weights are made where
they stay.
"""
import argparse
import functools
import importlib
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernel  # noqa: E402
import memory  # noqa: E402
import products  # noqa: E402
from compiled import compiler  # noqa: E402
from convert import Checkpoint, Parser, complain, convert, load_config, load_model  # noqa: E402
from decode import precompile  # noqa: E402
from generate import Sampling, generate  # noqa: E402
from model import Config, Linear, Runtime, Transformer  # noqa: E402

PROMPTS = (512, 2000)                       # tokens of prefill
DECODE = ((128, 1), (2000, 1), (128, 8), (2000, 8), (8000, 1))      # tokens of context, rows
IDS = range(5, 250)                         # of which prompts are made
STATUS = Path("/proc/self/status")          # where Linux says what memory a process takes
LONG = 8000                                 # context for "ours compiled" alone: others would take minutes

# ------------------------------------------------------------------------------------------------------------
# The competitors: each loads a folder, reads a prompt, and makes tokens


class Ours:
    def __init__(self, source: Path | Config, device: str, compile: bool = False, fp8: bool = False):
        device = torch.device(device)
        self.rt = Runtime(device, torch.bfloat16, compile=compile, fp8=kernel.default_mode(device))
        if isinstance(source, Config):
            self.model = random_model(replace(source, fp8=source.fp8 or fp8), replace(self.rt, compile=False))
        else:
            self.model = load_model(Checkpoint(source), self.rt)
            if fp8:
                quantise(self.model)
        if compile and device.type == "cuda":       # many rows before one, as generate.py has it
            self.model.rt = replace(self.rt, rows=max(rows for _, rows in DECODE))
            precompile(self.model)

    def run(self, n: int, rows: int, new: int) -> float:
        """Seconds of `new` steps of all rows; with new = 0, of reading n tokens."""
        self.model.rt = replace(self.rt, rows=rows, max_seq_len=n + new + 2)
        events = generate(self.model, prompts(n, rows), (), new + 1, Sampling(temperature=0))
        start = time.perf_counter()
        for _ in range(rows):
            next(events)
        return pace(lambda: [next(events) for _ in range(rows)], new) if new else time.perf_counter() - start


def pace(step, times: int) -> float:
    """Seconds of so many steps, from their median: a CUDA graph's capture is no part of a token."""
    return times * median_seconds(step, times)


@functools.cache
def random_model(cfg: Config, rt: Runtime) -> Transformer:
    """Our model with random weights, made on rt.device, one for all who ask: FP8 ones of any finite code."""
    model, state = Transformer(cfg, rt), {}
    for name, t in model.state_dict().items():
        if t.dtype == kernel.FP8:
            codes = torch.randint(0, 256, t.shape, dtype=torch.uint8, device=rt.device)
            for part in codes.view(-1, t.shape[-1]).split(2 ** 16):
                part.masked_fill_(part & 127 == 127, 0x38)
            state[name] = codes.view(kernel.FP8)
        elif name.endswith("scale"):
            state[name] = torch.rand(t.shape, device=rt.device) * 1e-4
        else:
            state[name] = torch.full(t.shape, float("norm" in name), dtype=t.dtype, device=rt.device)
            if t.dim() > 1:
                state[name].normal_(std=0.02)
    model.load_state_dict(state, assign=True)
    for name, linear in model.named_modules():
        if name.endswith("wkv_b"):
            linear.dequantise(rt.dtype)
    return model


def quantise(model) -> None:
    """Block-wise FP8 for the layers' weights, made here: published folders of such models do not exist."""
    for name, linear in model.named_modules():
        if isinstance(linear, Linear) and "wkv_b" not in name:          # which is never kept in FP8
            w = linear.weight
            pairs = [kernel.weight_quant(matrix) for matrix in w.view(-1, *w.shape[-2:])]
            q, scale = (torch.stack(part).view(*w.shape[:-2], *part[0].shape) for part in zip(*pairs))
            linear.weight, linear.scale = torch.nn.Parameter(q, requires_grad=False), scale


class Converted(Ours):
    """Ours from what convert.py makes of the folder: weights mapped to where AMX reads them faster."""

    def __init__(self, folder: Path, device: str):
        made = folder / "converted"
        if not (made / "manifest.json").exists():
            convert(Checkpoint(folder), made, 1)
        super().__init__(made, device)


class Transformers:
    def __init__(self, source: Path | Config, device: str, dtype: torch.dtype = torch.bfloat16):
        from transformers import AutoModelForCausalLM
        settings = dict(dtype=dtype, attn_implementation="sdpa")
        with torch.device(device if isinstance(source, Config) else "cpu"):
            model = (AutoModelForCausalLM.from_config(hf_config(source), **settings)
                     if isinstance(source, Config) else
                     AutoModelForCausalLM.from_pretrained(source, **settings))
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def run(self, n: int, rows: int, new: int) -> float:
        tokens = torch.tensor(prompts(n, rows), device=self.model.device)
        start = time.perf_counter()
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.tolist()
        if new:
            def step():
                nonlocal token
                logits = self.model(token, past_key_values=out.past_key_values, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
                token.tolist()                              # as ours: every token is shown at once
            return pace(step, new)
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with random weights of the same shapes in bf16; a row at a time."""

    def __init__(self, folder: Path, device: str):
        from llama_cpp import Llama
        path = folder / "random-bf16.gguf"
        if not path.exists():
            write_gguf(Checkpoint(folder).cfg, path)
        threads = torch.get_num_threads()
        self.model = Llama(str(path), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(self, n: int, rows: int, new: int) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(prompts(n, 1)[0])
        return pace(lambda: self.model.eval([7]), new) if new else time.perf_counter() - start


def write_gguf(cfg: Config, path: Path) -> None:
    """Random weights for llama.cpp in the shapes of a dense model, its architecture qwen2 or llama."""
    import gguf
    import numpy as np
    a, d, f = cfg.gqa, cfg.dim, cfg.inter_dim
    file, rng = gguf.GGUFWriter(path, "qwen2" if a.qkv_bias else "llama"), np.random.default_rng(0)
    for add, value in ((file.add_context_length, cfg.context_len), (file.add_embedding_length, d),
                       (file.add_block_count, cfg.n_layers), (file.add_feed_forward_length, f),
                       (file.add_head_count, cfg.n_heads), (file.add_head_count_kv, a.n_kv_heads),
                       (file.add_rope_freq_base, cfg.rope.theta), (file.add_vocab_size, cfg.vocab_size),
                       (file.add_layer_norm_rms_eps, cfg.norm_eps), (file.add_tokenizer_model, "none"),
                       (file.add_rope_dimension_count, a.head_dim), (file.add_key_length, a.head_dim),
                       (file.add_value_length, a.head_dim)):
        add(value)

    def matrix(name, rows, columns):
        values = rng.standard_normal((rows, columns), dtype=np.float32) * columns ** -0.5
        high = values.view(np.uint32) >> 16
        file.add_tensor(name, high.astype(np.uint16).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def vector(name, size, value):
        file.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd.weight", cfg.vocab_size, d)
    if not cfg.tie_embeddings:
        matrix("output.weight", cfg.vocab_size, d)
    vector("output_norm.weight", d, 1)
    q, kv = cfg.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    for i in range(cfg.n_layers):
        for name in ("attn_norm", "ffn_norm"):
            vector(f"blk.{i}.{name}.weight", d, 1)
        for name, rows, columns in (("attn_q", q, d), ("attn_k", kv, d), ("attn_v", kv, d),
                                    ("attn_output", d, q), ("ffn_gate", f, d), ("ffn_up", f, d),
                                    ("ffn_down", d, f)):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
            if a.qkv_bias and name in ("attn_q", "attn_k", "attn_v"):
                vector(f"blk.{i}.{name}.bias", rows, 0)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


ENGINES = {"ours": Ours, "ours converted": Converted,
           "ours compiled": functools.partial(Ours, compile=True),
           "ours compiled fp8": functools.partial(Ours, compile=True, fp8=True), "transformers": Transformers,
           "transformers fp32": functools.partial(Transformers, dtype=torch.float32), "llama.cpp": LlamaCpp}


def prompts(n: int, rows: int) -> list[list[int]]:
    return torch.randint(IDS.start, IDS.stop, (rows, n), generator=torch.Generator().manual_seed(n)).tolist()


# ------------------------------------------------------------------------------------------------------------
# Random weights, by transformers, so that all read the same folder


def write_random(cfg: Config, folder: Path) -> None:
    """A HuggingFace folder in bf16 with the shapes of one of our configs."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf_config(cfg), dtype=torch.bfloat16).save_pretrained(folder)


def hf_config(cfg: Config):
    from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config
    common = dict(vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.inter_dim,
                  num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, rms_norm_eps=cfg.norm_eps,
                  max_position_embeddings=cfg.context_len, tie_word_embeddings=cfg.tie_embeddings,
                  rope_theta=cfg.rope.theta)                    # scaled or not, RoPE costs the same
    if cfg.gqa:
        family = Qwen2Config if cfg.gqa.qkv_bias else LlamaConfig
        return family(**common, num_key_value_heads=cfg.gqa.n_kv_heads, head_dim=cfg.gqa.head_dim)
    a, moe = cfg.mla, cfg.moe
    return DeepseekV3Config(
        **common, num_key_value_heads=cfg.n_heads, q_lora_rank=a.q_lora_rank, kv_lora_rank=a.kv_lora_rank,
        qk_nope_head_dim=a.qk_nope_head_dim, qk_rope_head_dim=a.qk_rope_head_dim, v_head_dim=a.v_head_dim,
        moe_intermediate_size=moe.moe_inter_dim, n_routed_experts=moe.n_routed_experts,
        num_experts_per_tok=moe.n_activated_experts, n_shared_experts=moe.n_shared_experts,
        n_group=moe.n_expert_groups, topk_group=moe.n_limited_groups, norm_topk_prob=moe.norm_topk_prob,
        first_k_dense_replace=moe.n_dense_layers, routed_scaling_factor=moe.route_scale)


# ------------------------------------------------------------------------------------------------------------
# Limits


def median_seconds(work, times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def limits(device: str) -> dict[str, float]:
    """Bytes/s of reading 1 GB, and flop/s of a product of two matrices, in fp32 and in bf16, for which a CPU
    may take longer; then fp32's is the limit of both. A GPU copies the 1 GB and multiplies larger matrices,
    so that its launches do not count."""
    gpu, big = device == "cuda", torch.ones(2 ** 28, device=device)
    size = 8192 if gpu else 2048
    a, b = torch.randn(2, size, size, device=device)

    def product(a: torch.Tensor, b: torch.Tensor) -> float:
        F.linear(a, b)
        return 2 * size ** 3 / median_seconds(lambda: F.linear(a, b), 7)
    with torch.inference_mode():
        moved, move = (2 * big.nbytes, big.clone) if gpu else (big.nbytes, big.sum)
        bandwidth, fp32 = moved / median_seconds(move, 7 if gpu else 3), product(a, b)
        bf16 = product(a.bfloat16(), b.bfloat16()) if products.MULTIPLIES_BF16 or gpu else fp32
    return {"bandwidth": bandwidth, "gemm": bf16, "gemm fp32": fp32}


def multiplications(cfg: Config, n: int) -> int:
    """Floating-point operations of a prompt of n tokens: every active weight, and causal attention."""
    if cfg.gqa:
        a = cfg.gqa
        attention = cfg.dim * a.head_dim * 2 * (cfg.n_heads + a.n_kv_heads)
        per_pair = 2 * a.head_dim
    else:
        a = cfg.mla
        qk, q_in = a.qk_nope_head_dim + a.qk_rope_head_dim, a.q_lora_rank or cfg.dim
        attention = (cfg.dim * (a.q_lora_rank or 0) + q_in * cfg.n_heads * qk
                     + cfg.dim * (a.kv_lora_rank + a.qk_rope_head_dim) + cfg.n_heads * a.v_head_dim * cfg.dim
                     + a.kv_lora_rank * cfg.n_heads * (a.qk_nope_head_dim + a.v_head_dim))
        per_pair = qk + a.v_head_dim
    dense = cfg.moe.n_dense_layers if cfg.moe else cfg.n_layers
    weights = cfg.n_layers * attention + dense * 3 * cfg.dim * cfg.inter_dim
    if cfg.moe:
        moe = cfg.moe
        weights += (cfg.n_layers - dense) * cfg.dim * (moe.n_routed_experts + 3 * moe.moe_inter_dim * (
            moe.n_activated_experts + moe.n_shared_experts))
    return 2 * (n * weights + cfg.vocab_size * cfg.dim + cfg.n_layers * cfg.n_heads * per_pair * n * n // 2)


# ------------------------------------------------------------------------------------------------------------
# Measuring


def load_once(engine: str, folder: Path, device: str) -> dict[str, float]:
    """Of a fresh process that has imported what it needs: seconds to load, and until the first token of a
    short prompt; bytes at the peak of loading and one step, without those before. Pages of a mapped file
    count once they are read."""
    done = subprocess.run([sys.executable, __file__, "--load-only", engine, "--ckpt-path", str(folder),
                           "--device", device], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_only(engine: str, folder: Path, device: str) -> None:
    if engine.startswith("transformers"):
        from transformers import AutoModelForCausalLM  # noqa: F401
        family = json.loads((folder / "config.json").read_text())["model_type"]
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    before, start = resident("VmRSS"), time.perf_counter()
    model = ENGINES[engine](folder, device)
    loaded = time.perf_counter() - start
    model.run(16, 1, 0)
    first = time.perf_counter() - start
    model.run(16, 1, 2)
    tensors = [] if engine == "llama.cpp" else model.model.state_dict().values()
    weights = {t.data_ptr(): t.nbytes for t in tensors}         # of tied ones, one
    facts = {"seconds": loaded, "first_token": first, "bytes": resident("VmHWM") - before,
             "held": sum(weights.values())}
    print(json.dumps(facts))


def resident(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(source: Path | Config, names: list[str], rounds: int, new: int, longest: int,
            device: str) -> dict:
    """All that the report is made from; times in seconds, medians over the rounds."""
    cfg, loads = source if isinstance(source, Config) else Checkpoint(source).cfg, defaultdict(list)
    engines = {name: ENGINES[name](source, device) for name in names}       # llama.cpp's file is made here
    for name in names * min(rounds, 3) if device == "cpu" and STATUS.exists() else ():
        loads[name].append(load_once(name, source, device))
    tasks = [(n, 1, 0) for n in PROMPTS] + [(n, rows, new) for n, rows in DECODE]
    tasks = [task for task in tasks if task[0] <= longest]
    taken, bounds = defaultdict(list), defaultdict(list)
    for number in range(rounds + 1):                            # the first one warms up
        for name, value in limits(device).items():
            bounds[name].append(value)
        for task in tasks:
            for name, engine in engines.items():
                n, rows, steps = task
                if not takes_part(name, n, rows, steps):
                    continue
                # A GPU's libraries plan anew for each number of keys, so there all steps are rehearsed
                seconds = engine.run(n, rows, steps if number or device == "cuda" else min(steps, 2))
                if number:
                    taken[task, name].append(seconds)
        print(f"round {number} of {rounds}", file=sys.stderr)
    rows = [dict(task="decode" if steps else "prefill", tokens=n, rows=batch, who=name,
                 rate=(batch * steps or n) / statistics.median(times), runs=times,
                 of_limit=share(cfg, n, batch, steps, name, statistics.median(times), bounds))
            for ((n, batch, steps), name), times in taken.items()]
    return {"limits": {name: statistics.median(values) for name, values in bounds.items()}, "rows": rows,
            "loads": {name: {key: statistics.median(load[key] for load in runs) for key in runs[0]}
                      for name, runs in loads.items()},
            "weights": memory.plan(cfg, Runtime()).weights}


def contenders(cfg: Config, device: str) -> list[str]:
    """All that can run this model here."""
    names = set(ENGINES)
    if not (find_spec("llama_cpp") and find_spec("gguf") and cfg.gqa and device == "cpu"):
        names -= {"llama.cpp"}
    if device == "cpu" and not shutil.which(compiler()):
        names -= {"ours compiled", "ours compiled fp8"}
    if device != "cpu" or not products.AMX:
        names -= {"ours converted"}
    if cfg.fp8:                                             # none of the others reads it; ours is FP8 already
        names &= {"ours", "ours compiled"}
    return [name for name in ENGINES if name in names]


def takes_part(name: str, n: int, rows: int, new: int) -> bool:
    """Compiled is decoding, and converted is reading; the other would be measured twice. Batches are for those
    that have them in bf16."""
    if "compiled" in name and new == 0 or "converted" in name and new > 0:
        return False
    if name in ("llama.cpp", "ours compiled fp8") and rows > 1:
        return False
    return n < LONG or name == "ours compiled"


def share(cfg: Config, n: int, rows: int, new: int, name: str, seconds: float, bounds: dict) -> float:
    """The limit's time over the measured time."""
    dtype = torch.float32 if "fp32" in name else torch.bfloat16
    if new == 0:
        peak = bounds["gemm fp32" if dtype == torch.float32 else "gemm"]
        return multiplications(cfg, n) / statistics.median(peak) / seconds
    rt = Runtime(dtype=dtype, rows=rows, max_seq_len=n + new // 2)
    step = memory.plan(replace(cfg, fp8=cfg.fp8 or "fp8" in name), rt).step
    return new * step / statistics.median(bounds["bandwidth"]) / seconds


# ------------------------------------------------------------------------------------------------------------
# The report


def table(facts: dict) -> list[str]:
    peer = {(r["task"], r["tokens"], r["rows"]): r["rate"] for r in facts["rows"]
            if r["who"] == "transformers"}
    lines = ["| task | tokens | rows | who | tokens/s | x transformers | of the limit |",
             "|---|--:|--:|---|--:|--:|--:|"]
    for r in facts["rows"]:
        other = peer.get((r["task"], r["tokens"], r["rows"]))
        lines.append(f"| {r['task']} | {r['tokens']} | {r['rows']} | {r['who']} | {r['rate']:.1f} "
                     f"| {f'''{r['rate'] / other:.2f}''' if other else ''} | {r['of_limit']:.2f} |")
    if not facts["loads"]:
        return lines
    lines += ["",
              "| who | load, s | to the first token, s | weights, GB | peak memory, GB | of bf16 weights |",
              "|---|--:|--:|--:|--:|--:|"]
    for name, load in facts["loads"].items():
        held = f"{load['held'] / 1e9:.2f}" if load["held"] else ""
        lines.append(f"| {name} | {load['seconds']:.2f} | {load['first_token']:.2f} | {held} "
                     f"| {load['bytes'] / 1e9:.2f} | {load['bytes'] / facts['weights']:.2f} |")
    return lines


def plot(facts: dict, title: str, path: Path) -> None:
    from matplotlib.figure import Figure
    tasks = list(dict.fromkeys((r["task"], r["tokens"], r["rows"]) for r in facts["rows"]))
    names = list(dict.fromkeys(r["who"] for r in facts["rows"]))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        rates = {(r["task"], r["tokens"], r["rows"]): r["of_limit"] for r in facts["rows"]
                 if r["who"] == name}
        places = [t + (i - len(names) / 2 + 0.5) * 0.8 / len(names) for t in range(len(tasks))]
        axes.bar(places, [rates.get(task, 0) for task in tasks], 0.8 / len(names), label=name)
    labels = [f"{task}\n{tokens:,} tokens\n{rows} row{'s' * (rows > 1)}" for task, tokens, rows in tasks]
    axes.set(title=title, ylabel="of the limit", ylim=(0, 1.05))
    axes.set_xticks(range(len(tasks)), labels, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)


def described(args: argparse.Namespace, model: str, device: str, facts: dict) -> tuple[dict, str]:
    """All facts with what made them, and the report."""
    peers = {name: version(name) for name in ("transformers", "llama-cpp-python")
             if any(row["who"].startswith(name[:9]) for row in facts["rows"])}
    facts = {"model": model, "device": device, "cpu": cpu(), "torch": torch.__version__, **peers,
             "rounds": args.rounds, "new_tokens": args.new_tokens, **facts}
    bounds, moving = facts["limits"], "Copying" if args.device == "cuda" else "Reading"
    text = "\n".join([
        f"# {model} on {device}", "",
        f"{facts['cpu']}; torch {torch.__version__}{''.join(f', {name} {peers[name]}' for name in peers)}. "
        f"bf16 unless it says otherwise, medians of {args.rounds} round{'s' * (args.rounds > 1)}, "
        f"{args.new_tokens} new tokens. {moving} {bounds['bandwidth'] / 1e9:.1f} GB/s, products "
        f"{bounds['gemm'] / 1e9:.0f} GFLOP/s, weights {facts['weights'] / 1e9:.2f} GB.", "", *table(facts)])
    return facts, text


def cpu() -> str:
    """The CPU's name, where Linux tells."""
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Throughput of a model: ours, transformers, llama.cpp.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="one of ours: random weights of its shapes")
    source.add_argument("--ckpt-path", type=Path, metavar="DIR", help="HuggingFace folder")
    parser.add_argument("--who", nargs="+", choices=list(ENGINES), help="(default: all that can run)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a decode task (%(default)s)")
    parser.add_argument("--longest", type=int, default=LONG, help="leave out longer prompts (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"],
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results",
                        help="(benchmarks/results)")
    parser.add_argument("--name", help="of the files there (default: throughput_, model and device)")
    parser.add_argument("--load-only", choices=list(ENGINES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    parser.at_least(args, 1, "rounds", "new_tokens")
    parser.at_least(args, min(n for n, _ in DECODE), "longest")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if not find_spec("transformers"):
        parser.error("needs transformers, which makes random weights: pip install -r requirements-dev.txt")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.load_only:
        load_only(args.load_only, args.ckpt_path, args.device)
        return 0
    kind = "AMX" if products.AMX else torch.backends.cpu.get_cpu_capability()
    cores = f"{torch.get_num_threads()} {kind} CPU cores"
    device = torch.cuda.get_device_name() if args.device == "cuda" else cores
    try:
        model = args.config.stem if args.config else args.ckpt_path.resolve().name
        stem = args.name or f"throughput_{model}_{device}".replace(" ", "_").replace("/", "_")
        path = args.output / f"{stem}.json"
        if path.exists():
            raise ValueError(f"{path} is there already; choose another --output or --name")
        args.output.mkdir(parents=True, exist_ok=True)
        facts, text = described(args, model, device, run(args))
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        plot(facts, f"{model} on {device}", path.with_suffix(".png"))
    except (ValueError, OSError) as error:
        return complain("throughput.py", error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(text)
    return 0


def run(args: argparse.Namespace) -> dict:
    """Measure what the command line asks for. ValueError, before that, names what cannot run here."""
    cfg = load_config(args.config) if args.config else Checkpoint(args.ckpt_path).cfg
    if cfg.vocab_size < IDS.stop:
        raise ValueError(f"vocab_size is {cfg.vocab_size}; prompts are made of ids up to {IDS.stop - 1}")
    able = contenders(cfg, args.device)
    names = args.who or able
    if unable := [name for name in names if name not in able]:
        raise ValueError(f"--who {unable[0]}: cannot run this model here; those that can: {', '.join(able)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = cfg if args.config and args.device == "cuda" else folder
        if args.config and source is folder:
            write_random(cfg, folder)
        elif not args.config:
            for file in args.ckpt_path.iterdir():       # llama.cpp's file is put beside the links
                (folder / file.name).symlink_to(file.resolve())
        return measure(source, names, args.rounds, args.new_tokens, args.longest, args.device)


if __name__ == "__main__":
    sys.exit(main())
