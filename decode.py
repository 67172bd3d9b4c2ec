"""One decode step: a token per row in, the next ones out. A long answer is thousands of these.

    eager       the readable reference: the model's forward pass, then the draw
    compiled    on a CPU, with Runtime.compile: the forward pass of a few rows as C++ (compiled.py), which
                uses weights as fast as memory delivers them
    captured    on a GPU, with Runtime.compile: all of the step as a CUDA graph, one launch, not thousands, of
                kernels that TorchInductor has merged (`fused`)

A graph needs shapes and places that do not change: what goes in is written into buffers that stay where they
are, positions count on the device (Cache.lengths), and a step is made for a power of two of slots. The host
waits for nothing but the end, and reads nothing but what was drawn.
"""
import functools
import shutil
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import kernel
from compiled import compile_forward, compiler, make_parts
from model import Block, Cache, Runtime, Transformer


def check(rt: Runtime) -> Runtime:
    """rt; ValueError if its `compile` cannot work here."""
    if rt.compile and rt.device.type == "cpu":
        if not shutil.which(compiler()):
            raise ValueError(f"--compile needs a C++ compiler, and {compiler()!r} is not there: install it, "
                             f"name another one in the environment variable CXX, or leave --compile out")
        if rt.tp.size > 1 or rt.rows > kernel.FEW or rt.fp8 == "gemm":
            raise ValueError(f"--compile on a CPU goes with 1 rank, a --batch-size up to {kernel.FEW}, and "
                             f"--fp8 dequant or bf16; here are {rt.tp.size} ranks, {rt.rows} rows and --fp8 "
                             f"{rt.fp8}")
    return rt


def precompile(model: Transformer) -> None:
    """Make the C++ of all steps, if there is to be any: no answer waits for it. OSError: it cannot be made."""
    if model.rt.compile and model.rt.device.type == "cpu":
        for rows in {1, model.rt.rows}:
            make_parts(model, rows)


@functools.cache
def fuse(function: Callable, tune: bool) -> Callable:
    """The function, for a GPU: TorchInductor makes few kernels of its many, which round where the eager ones
    do, so that tokens stay the same. `tune` has it try out tiles: 2 % faster, twice the time to compile."""
    options = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True,
               "coordinate_descent_tuning": tune}
    known = torch._inductor.list_options()              # 2.9 lacks one
    return torch.compile(function, options={name: value for name, value in options.items() if name in known})


def finish(model: Transformer, x: Tensor, draw: Callable, *chances: Tensor) -> tuple[Tensor, ...]:
    return draw(model.logits(x)[:, -1], *chances)


class Decoder:
    """Steps of the first rows of `cache`. A step's `draw` turns logits [n, vocab] and `chances`, tensors [n],
    into tensors, without a look at their values; draws that are equal share a graph."""

    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache, self.rt = model, cache, model.rt
        self.given: list[Tensor] = []                   # tokens, then chances [rows], on the host
        self.graphs: dict[tuple, Callable] = {}
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
        for buffer, values in zip(self.given, given):
            buffer.numpy()[:n] = values
        if not self.rt.compile:
            return self.eager(n, slots, draw)()
        rows = 1 if n == 1 else self.rt.rows            # two sizes are compiled, no more
        if n < rows:                                    # no completion: a token in the first slot
            self.cache.lengths[n:rows] = 0
        run = self.replayed if cuda else self.compiled
        return tuple(drawn[:n] for drawn in run(rows, slots, draw))

    def read(self, rows: int) -> list[Tensor]:
        """Tokens [rows, 1] and chances [rows] of the first rows, on the device."""
        tokens, *chances = (buffer[:rows].to(self.rt.device, non_blocking=True) for buffer in self.given)
        return [tokens[:, None], *chances]

    def eager(self, n: int, slots: int, draw: Callable) -> Callable:
        """The step of n rows as a function without arguments: it works on the buffers."""
        view = self.cache.view(slice(0, n), slots)

        def step() -> tuple[Tensor, ...]:
            tokens, *chances = self.read(n)
            return draw(self.model(tokens, view, last=1)[:, -1], *chances)
        return step

    def compiled(self, rows: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """The step with a forward pass in C++."""
        if rows not in self.forwards:
            everything = self.cache.view(slice(0, rows), self.rt.max_seq_len)
            self.forwards[rows] = compile_forward(self.model, everything)
        tokens, *chances = self.read(rows)
        slots = min(-(-slots // 64) * 64, self.rt.max_seq_len)
        return draw(self.forwards[rows](tokens, slots)[:, -1], *chances)

    def replayed(self, rows: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """The step as a graph, captured when its power of two of slots is first needed."""
        slots = min(max(256, 1 << (slots - 1).bit_length()), self.rt.max_seq_len)
        if (rows, slots, draw) not in self.graphs:
            quiet = self.rt.tp.rank > 0 or any(rows == others for others, *_ in self.graphs)
            name = f"compile for {rows} row{'s' * (rows > 1)}"
            with tqdm(desc=name, bar_format="{desc}", leave=False, disable=quiet):
                self.graphs[rows, slots, draw] = self.captured(self.fused(rows, slots, draw))
        return self.graphs[rows, slots, draw]()

    def fused(self, rows: int, slots: int, draw: Callable) -> Callable:
        """`eager`, with compiled layers, which serve all numbers of slots. They get buffers as a whole: the
        compiler would copy parts, and attend_kernel read the copies at the strides of the originals."""
        model, cache = self.model, self.cache.view(slice(0, rows), self.rt.max_seq_len)
        tune = rows == 1 and not model.cfg.fp8          # else cuBLAS and kernel.py read the weights
        run_layer, run_finish = fuse(Block.forward, tune), fuse(finish, tune)

        def step() -> tuple[Tensor, ...]:
            tokens, *chances = self.read(rows)
            x, now = model.embed(tokens), model.step(1, cache.lengths, slots)
            torch._dynamo.maybe_mark_dynamic(now.bias, 3)
            for block, buffers in zip(model.layers, cache.layers):
                x = run_layer(block, x, now, buffers)
            cache.lengths.add_(1)
            return run_finish(model, x, draw, *chances)
        return step

    def captured(self, step: Callable) -> Callable:
        """A step as a graph, whose results are on the host. It runs once before its capture, so that libraries
        get what they keep; its slot is reused."""
        lengths = self.cache.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = [torch.empty_like(drawn, device="cpu", pin_memory=True) for drawn in step()]
        torch.cuda.current_stream().wait_stream(side)
        self.cache.lengths.copy_(lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for result, drawn in zip(results, step()):
                result.copy_(drawn, non_blocking=True)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            torch.cuda.current_stream().synchronize()
            return results
        return replay
