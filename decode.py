"""One decode step: a token per row in, the next ones out. A long answer is thousands of these.

    eager       the readable reference: the model's forward pass, then the draw
    compiled    on a CPU, with Runtime.compile: the forward pass of a few rows as C++ (compiled.py), which
                uses weights as fast as memory delivers them
    captured    on a GPU, with Runtime.compile: all of the step as a CUDA graph, one launch, not thousands, of
                kernels that TorchInductor has merged (`fused`)

A graph needs shapes and places that do not change: what goes in is written into buffers that stay where they
are, positions count on the device (Cache.lengths), and a step is made for a power of two of slots, or for all
of them. The host waits for nothing but the end, and reads nothing but what was drawn.
"""
import functools
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import kernel
import products
from compiled import compile_forward, compiler, make_parts
from model import Block, Cache, Runtime, Transformer

LEAST = 512     # slots of a cache for graphs: up to 256, one run of attend_one's, would be compiled anew


def cache_slots(rt: Runtime) -> int:
    """Slots of a decoder's cache: compiled steps read multiples of 64, which attention cuts into runs."""
    return max(-(-rt.max_seq_len // 64) * 64, LEAST) if rt.compile else rt.max_seq_len


def check(rt: Runtime) -> Runtime:
    """rt; ValueError if its `compile` cannot work here."""
    if rt.compile and rt.device.type == "cpu":
        if not shutil.which(compiler()):
            raise ValueError(f"--compile needs a C++ compiler, and {compiler()!r} is not there: install it, "
                             f"name another one in the environment variable CXX, or leave --compile out")
        if rt.tp.size > 1 or rt.rows > products.FEW or rt.fp8 == "gemm":
            raise ValueError(f"--compile on a CPU goes with 1 rank, a --batch-size up to {products.FEW}, and "
                             f"--fp8 dequant or bf16; here are {rt.tp.size} ranks, {rt.rows} rows and --fp8 "
                             f"{rt.fp8}")
    if rt.compile and rt.device.type == "cuda":
        least = (7, 0) if rt.dtype == torch.float32 else (8, 0)         # TorchInductor's, and its bf16's
        has = torch.cuda.get_device_capability(rt.device)
        if not kernel.triton or has < least or rt.fp8 == "gemm" and kernel.path(rt.device) != "triton":
            raise ValueError(f"--compile on a GPU needs Triton, compute capability 8.0 or more (7.0 in "
                             f"float32), and with --fp8 gemm a GPU that multiplies e4m3; here are capability "
                             f"{has[0]}.{has[1]} and {'' if kernel.triton else 'no '}Triton; leave it out, "
                             f"or see README's requirements")
    return rt


def check_model(model: Transformer) -> Runtime:
    """model.rt; ValueError as `check`, and if the model has hooks, which compiled steps would not call."""
    if model.rt.compile and any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        raise ValueError("compiled steps call no hooks: remove them, or load the model without compile")
    return check(model.rt)


def precompile(model: Transformer) -> None:
    """With rt.compile, compile the layers of all steps now, so that no answer waits for it. ValueError as
    check_model, or of FP8 weights that products.matvec cannot read. OSError: C++ failed."""
    rt = check_model(model)
    if not rt.compile:
        return
    for name, weight in model.named_parameters():
        if weight.dtype == kernel.FP8 and rt.fp8 == "dequant" and weight.shape[-1] % 4:
            raise ValueError(f"--compile reads FP8 weights in fours, and {name} has {weight.shape[-1]} "
                             f"inputs; add --fp8 bf16, or leave --compile out")
    # Many rows before one: after one, a GPU's compiler would leave their number open
    for rows in sorted({1, rt.rows}, reverse=True):
        (make_parts if rt.device.type == "cpu" else compile_layers)(model, rows)


def compile_layers(model: Transformer, rows: int) -> None:
    """For steps of so many rows on a GPU: in a part of the cache and in all of it, which the compiler tells
    apart, lest an answer that gets to the last slots wait for it there."""
    cache = Cache.allocate(model.cfg, replace(model.rt, rows=rows, max_seq_len=LEAST + 128))
    tokens, name = torch.zeros_like(cache.lengths)[:, None], f"compile for {rows} row{'s' * (rows > 1)}"
    with tqdm(desc=name, bar_format="{desc}", disable=model.rt.tp.rank > 0), torch.inference_mode():
        for slots in (LEAST, LEAST + 128):
            fused_layers(model, cache, tokens, slots)


@functools.cache
def fuse(function: Callable, tune: bool, ranks: int, overlap: bool = False) -> Callable:
    """The function, for a GPU: TorchInductor makes few kernels of its many, which round where the eager ones
    do, so that tokens stay the same but for ties. `tune` has it try out tiles: 2 % faster, twice the time to
    compile. That, and all that depends on a clock, stays out where ranks must choose the same experts.
    With `overlap` a kernel starts while the one before it ends, from Hopper on: 5 % faster. It waits for
    that one at its first read, so a kernel that reads nothing must not come between two others."""
    options = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True,
               "coordinate_descent_tuning": tune and ranks == 1, "deterministic": ranks > 1,
               "triton.enable_pdl": overlap and ranks == 1 and not torch.version.hip}
    for fact in (kernel.device_kind, kernel.n_processors):      # the compiler cannot look into these
        torch.compiler.assume_constant_result(fact)
    known = torch._inductor.list_options()              # 2.10 lacks one
    torch._dynamo.config.recompile_limit = 64           # kinds of layers, times sizes of batches
    return torch.compile(function, options={name: value for name, value in options.items() if name in known})


def fused_layers(model: Transformer, cache: Cache, tokens: Tensor, slots: int) -> Tensor:
    """As Transformer.forward for tokens [b, 1], up to its last norm: x [b, 1, m]. What is compiled for a kind
    of layer serves any number of slots. Layers get the whole cache, and cut out the slots themselves: of a
    part the compiler makes a copy, which attend_kernel would read at the strides of the original."""
    tune = len(tokens) == 1 and not model.cfg.fp8       # else cuBLAS and kernel.py read the weights
    overlap = len(tokens) == 1 or not model.cfg.moe     # a plan for many tokens' experts begins with zeros
    run = fuse(Block.forward, tune, model.rt.tp.size, overlap)
    x, step = model.embed(tokens), model.step(1, cache.lengths, slots)
    torch._dynamo.maybe_mark_dynamic(step.bias, 3)
    for block, buffers in zip(model.layers, cache.layers):
        for buffer in buffers:
            torch._dynamo.maybe_mark_dynamic(buffer, 1)
        x = run(block, x, step, buffers)
    cache.lengths.add_(1)
    return x


def finish(model: Transformer, x: Tensor, draw: Callable, *chances: Tensor) -> tuple[Tensor, ...]:
    return draw(model.logits(x)[:, -1], *chances)


class Decoder:
    """Steps of the first rows of its cache. A step's `draw` turns logits [n, vocab] and `chances` [n] into
    tensors, without a look at their values; draws that are equal share a graph. What was drawn must be
    read before the next step, which uses its place again."""

    def __init__(self, model: Transformer):
        self.model, self.rt = model, check_model(model)
        self.slots = cache_slots(self.rt)
        self.cache = Cache.allocate(model.cfg, replace(self.rt, max_seq_len=self.slots))
        self.given: list[Tensor] = []                   # tokens, then chances [rows], on the host
        self.graphs: dict[tuple, Callable] = {}
        self.pool = None                                # memory of all graphs, of which one runs at a time
        self.forwards: dict[int, Callable] = {}         # compiled, for so many rows

    @torch.inference_mode()
    def step(self, tokens: list[int], longest: int, draw: Callable,
             *chances: np.ndarray) -> tuple[Tensor, ...]:
        """Run a token for each of the first rows, the longest of which holds `longest`, and draw the next."""
        n, slots, cuda = len(tokens), longest + 1, self.rt.device.type == "cuda"
        given = np.array(tokens), *chances
        if not self.given:
            self.given = [torch.from_numpy(np.zeros(self.rt.rows, values.dtype)) for values in given]
            if cuda:                                    # where the device can fetch it
                self.given = [buffer.pin_memory() for buffer in self.given]
        for buffer, values in zip(self.given, given, strict=True):
            buffer.numpy()[:n] = values
        if not self.rt.compile:
            return self.eager(n, slots, draw)
        rows = 1 if n == 1 else self.rt.rows            # two sizes are compiled, no more
        if n < rows:                                    # others run a token, too: always in the first slot
            self.cache.lengths[n:rows] = 0
        run = self.replayed if cuda else self.compiled
        return tuple(drawn[:n] for drawn in run(rows, slots, draw))

    def read(self, rows: int) -> list[Tensor]:
        """Tokens [rows, 1] and chances [rows] of the first rows, on the device."""
        tokens, *chances = (buffer[:rows].to(self.rt.device, non_blocking=True) for buffer in self.given)
        return [tokens[:, None], *chances]

    def eager(self, rows: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """The readable reference."""
        tokens, *chances = self.read(rows)
        return draw(self.model(tokens, self.cache.view(slice(0, rows), slots), last=1)[:, -1], *chances)

    def compiled(self, rows: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """The step with a forward pass in C++."""
        if rows not in self.forwards:
            everything = self.cache.view(slice(0, rows), self.slots)
            self.forwards[rows] = compile_forward(self.model, everything)
        tokens, *chances = self.read(rows)
        return draw(self.forwards[rows](tokens, -(-slots // 64) * 64)[:, -1], *chances)

    def replayed(self, rows: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """The step as a graph, captured when its power of two of slots is first needed."""
        slots = min(max(LEAST, 1 << (slots - 1).bit_length()), self.slots)
        if (rows, slots, draw) not in self.graphs:
            self.graphs[rows, slots, draw] = self.captured(lambda: self.fused(rows, slots, draw))
        return self.graphs[rows, slots, draw]()

    def fused(self, rows: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """`eager`, with compiled layers."""
        cache = self.cache.view(slice(0, rows), self.slots)
        tokens, *chances = self.read(rows)
        x = fused_layers(self.model, cache, tokens, slots)
        return fuse(finish, False, self.rt.tp.size)(self.model, x, draw, *chances)

    def captured(self, step: Callable) -> Callable:
        """A step as a graph, with results on the host. It runs once before its capture, so that libraries get
        what they keep; its slot is reused."""
        lengths = self.cache.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = [torch.empty_like(drawn, device="cpu", pin_memory=True) for drawn in step()]
        torch.cuda.current_stream().wait_stream(side)
        self.cache.lengths.copy_(lengths)
        graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):
            for result, drawn in zip(results, step()):
                result.copy_(drawn, non_blocking=True)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            torch.cuda.current_stream().synchronize()
            return results
        return replay
