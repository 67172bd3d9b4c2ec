"""One decode step: a token per row in, the next ones out. A long answer is thousands of these.

    eager       the readable reference: the model's forward pass, then the draw
    compiled    on a CPU, with Runtime.compile: the forward pass of a few rows as C++ (compiled.py), which
                uses weights as fast as memory delivers them
    captured    on a GPU, with Runtime.compile: all of the step as a CUDA graph, one launch, not thousands

A graph needs shapes and places that do not change: what goes in is written into buffers that stay where they
are, positions count on the device (Cache.lengths), and a step reads a power of two of slots, whose empty end
the mask hides. The host reads back nothing but what was drawn.
"""
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

import kernel
from compiled import compile_forward, compiler, make_parts
from model import Cache, Runtime, Transformer


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


class Decoder:
    """Steps of the first rows of `cache`. A step's `draw` turns logits [n, vocab] and `chances`, tensors [n],
    into tensors, without a look at their values; draws that are equal share a graph."""

    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache, self.rt = model, cache, model.rt
        self.tokens = torch.zeros(self.rt.rows, 1, dtype=torch.int64, device=self.rt.device)
        self.chances: list[Tensor] = []
        self.graphs: dict[tuple, Callable] = {}
        self.forwards: dict[int, Callable] = {}         # compiled, for so many rows

    @torch.inference_mode()
    def step(self, tokens: list[int], longest: int, draw: Callable, *chances: Tensor) -> tuple[Tensor, ...]:
        """Run a token for each of the first rows, the longest of which holds `longest`, and draw the next."""
        n, slots = len(tokens), longest + 1
        self.chances = self.chances or [chance.new_zeros(self.rt.rows) for chance in chances]
        for buffer, values in zip((self.tokens[:, 0], *self.chances), (torch.tensor(tokens), *chances)):
            buffer[:n] = values
        if not self.rt.compile:
            return self.eager(n, slots, draw)()
        return (self.replayed if self.rt.device.type == "cuda" else self.compiled)(n, slots, draw)

    def eager(self, n: int, slots: int, draw: Callable) -> Callable:
        """The step of n rows as a function without arguments: it works on the buffers."""
        tokens, view = self.tokens[:n], self.cache.view(slice(0, n), slots)
        chances = [chance[:n] for chance in self.chances]
        return lambda: draw(self.model(tokens, view, last=1)[:, -1], *chances)

    def compiled(self, n: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """The step with a forward pass in C++, of one row or of all, so that only these two are compiled; rows
        without a completion run a token in their first slot."""
        rows = 1 if n == 1 else self.rt.rows
        if rows not in self.forwards:
            everything = self.cache.view(slice(0, rows), self.rt.max_seq_len)
            self.forwards[rows] = compile_forward(self.model, everything)
        self.cache.lengths[n:rows] = 0
        slots = min(-(-slots // 64) * 64, self.rt.max_seq_len)
        logits = self.forwards[rows](self.tokens[:rows], slots)[:n, -1]
        return draw(logits, *(chance[:n] for chance in self.chances))

    def replayed(self, n: int, slots: int, draw: Callable) -> tuple[Tensor, ...]:
        """The step as a graph, captured when its power of two of slots is first needed."""
        slots = min(max(256, 1 << (slots - 1).bit_length()), self.rt.max_seq_len)
        if (n, slots, draw) not in self.graphs:
            self.graphs[n, slots, draw] = self.captured(n, slots, draw)
        return self.graphs[n, slots, draw]()

    def captured(self, n: int, slots: int, draw: Callable) -> Callable:
        """The eager step as a graph. It runs once before its capture, so that libraries get what they keep;
        its slot is reused."""
        step, lengths = self.eager(n, slots, draw), self.cache.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        self.cache.lengths.copy_(lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = step()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return drawn
        return replay
