"""The decode step of a few rows as C++, for CPUs: what `--compile` is there. torch.export traces model.py,
and TorchInductor writes loops from it that use weights as fast as memory delivers them.

Not the model is compiled but its parts: each kind of layer (R1 has two, with an MLP and with experts), and
the head. Weights are inputs of a part, so that one function serves all layers of its kind. Parts are kept in
~/.cache/deepseek-r1, or where XDG_CACHE_HOME says, in files named by a hash of all that they depend on.
"""
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import products
from model import Block, Cache, RMSNorm, Step, Transformer


class Part(nn.Module):
    """call(weights, *inputs) as a module, which is what torch.export takes.

    inputs: tensors like those of a step. open_axes: {i: {axis: name}} of the inputs that have axes whose size
    stays open, though it is the same for all of one name.
    """

    def __init__(self, call: Callable, weights: dict[str, Tensor], inputs: list[Tensor],
                 open_axes: dict[int, dict[int, str]]):
        super().__init__()
        self.call, self.weights, self.inputs, self.open_axes = call, weights, inputs, open_axes

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs, weights = tensors[:len(self.inputs)], tensors[len(self.inputs):]
        return self.call(dict(zip(self.weights, weights)), *inputs)


def layer(block: Block, weights: dict[str, Tensor], x: Tensor, positions: Tensor, bias: Tensor, rows: Tensor,
          cos: Tensor, sin: Tensor, *cache: Tensor) -> Tensor:
    return functional_call(block, weights, (x, Step(positions, bias, rows, cos, sin), cache))


def head(norm: RMSNorm, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return products.linear(functional_call(norm, {"weight": weights["norm"]}, x), weights["head"]).float()


def parts_of(model: Transformer, rows: int) -> list[Part]:
    """The layers of the model, then its head. A step reads the first `slots` of the cache's `room`."""
    cache = Cache.allocate(model.cfg, replace(model.rt, rows=rows, max_seq_len=512))
    x, step = torch.empty(rows, 1, model.cfg.dim, dtype=model.rt.dtype), model.step(1, cache.lengths, 256)
    parts = []
    for block, buffers in zip(model.layers, cache.layers):
        inputs = [x, *vars(step).values(), *buffers]        # the third is the mask [b, 1, 1, t]
        open_axes = {2: {3: "slots"}} | {i: {1: "room"} for i in range(6, len(inputs))}
        parts.append(Part(functools.partial(layer, block), block.state_dict(), inputs, open_axes))
    weights = {"norm": model.norm.weight, "head": model.head.weight}
    return [*parts, Part(functools.partial(head, model.norm), weights, [x], {})]


def make_parts(model: Transformer, rows: int) -> list[tuple[Callable, Part]]:
    """All parts of a step of so many rows, compiled; files that are missing are made.

    OSError: the compiler failed, a file is damaged, or their folder cannot be written.
    """
    parts = [(path_of(part, model), part) for part in parts_of(model, rows)]
    missing = {path: part for path, part in parts if not path.exists()}
    name = f"compile for {rows} row{'s' * (rows > 1)}"
    for path, part in tqdm(missing.items(), desc=name, unit="part", disable=not missing):
        build(part, path)
    return [(load(path), part) for path, part in parts]


def compile_forward(model: Transformer, cache: Cache) -> Callable:
    """forward(tokens [b, 1], slots) -> fp32 logits [b, 1, vocab], as Transformer.forward for all b rows and
    the first slots of `cache`, a multiple of 64 like all of them."""
    calls = [(run, list(part.weights.values())) for run, part in make_parts(model, rows=len(cache.lengths))]

    def forward(tokens: Tensor, slots: int) -> Tensor:
        x, step = model.embed(tokens), model.step(1, cache.lengths, slots)
        for (run, weights), buffers in zip(calls, cache.layers):
            x, = run([x, *vars(step).values(), *buffers, *weights])
        cache.lengths += 1
        run, weights = calls[-1]
        return run([x, *weights])[0]
    return forward


def path_of(part: Part, model: Transformer) -> Path:
    """Where the compiled part is kept."""
    here = Path(__file__)
    names = here.name, "model.py", "attention.py", "kernel.py", "products.py"
    sources = [here.with_name(name).read_bytes() for name in names]
    weights = [(name, w.shape, w.dtype) for name, w in part.weights.items()]
    what = (torch.__version__, torch.get_num_threads(), target(compiler()), sources, model.cfg,
            len(part.inputs[0]), weights, settings(part.call.args[0]))
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-r1"
    except RuntimeError:
        raise OSError("--compile finds no home folder to keep its results in; name a place in the variable "
                      "XDG_CACHE_HOME") from None
    return folder / (hashlib.sha256(repr(what).encode()).hexdigest()[:32] + ".pt2")


def settings(block: nn.Module) -> list[tuple]:
    """What is written into a part's code: the kinds and numbers of its modules, which somebody may change."""
    return [(name, type(m), *((key, value) for key, value in vars(m).items() if not key.startswith("_")))
            for name, m in block.named_modules()]


def compiler() -> str:
    return os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


@functools.cache
def target(cxx: str) -> bytes:
    """The compiler's predefined macros: its version, and the instructions that this CPU has."""
    command = [cxx, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).stdout


def build(part: Part, path: Path) -> None:
    """Make the part's file, which appears when it is complete."""
    from torch._inductor import aoti_compile_and_package, exc       # takes seconds, which later starts save
    tensors = [*part.inputs, *part.weights.values()]
    sizes = {name: 64 * torch.export.Dim(name) for name in ("slots", "room")}       # decode.cache_slots
    open_axes = tuple({axis: sizes[name] for axis, name in part.open_axes.get(i, {}).items()}
                      for i in range(len(tensors)))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)       # what lies here is run
        scratch = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise OSError(f"--compile keeps its results in {path.parent}, which cannot be written; the variable "
                      f"XDG_CACHE_HOME can name another place: {error}") from None
    with (scratch as folder, torch.inference_mode(False),
          torch.no_grad(), warnings.catch_warnings(action="ignore")):       # PyTorch's, about PyTorch
        examples = tuple(map(torch.empty_like, tensors))            # only their shapes matter
        program = torch.export.export(part, examples, dynamic_shapes={"tensors": open_axes})
        try:
            aoti_compile_and_package(program, package_path=f"{folder}/part.pt2", inductor_configs={
                "cpp.enable_floating_point_contract_flag": "fast",      # product and sum in one instruction
                "cpp.cxx": (compiler(),)})
        except (exc.InductorError, exc.CppCompileError, exc.InvalidCxxCompiler) as error:
            lines = str(error).splitlines()
            cause = next((line for line in lines if "error:" in line), lines[0])
            raise OSError(f"--compile: the C++ compiler {compiler()!r} failed: {cause}") from None
        except RuntimeError as error:
            raise OSError(f"--compile cannot write its results: {str(error).splitlines()[0]}; is the disk of "
                          f"{path.parent} full?") from None
        os.replace(f"{folder}/part.pt2", path)


@functools.cache
def load(path: Path) -> Callable:
    """The compiled part: takes a list of inputs and weights, returns a list of one tensor. OSError if the
    file is damaged.

    torch._inductor.aoti_load_package is this with 150 MB of Python modules around it.
    """
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1).run
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be loaded; remove it, and --compile makes it anew: "
                      f"{str(error).splitlines()[0]} (or is the folder for temporary files missing or full, "
                      f"{tempfile.gettempdir()}?)") from None
