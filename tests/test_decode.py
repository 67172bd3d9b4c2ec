"""Claim: a decode step that is compiled, or that works on the static buffers of a CUDA graph, gives the
tokens of the eager one; it compiles once, whatever the prompts; its host looks at nothing.

CUDA graphs themselves are not run: this is what can be shown of them without a GPU.
"""
import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import attention
import compiled as compiled_parts
import decode
import kernel
import products
from convert import Checkpoint, load_model
from decode import Decoder
from generate import Draw, Kept, Row, Sampling, chances, generate, main
from model import Block, Cache, Runtime, Shard

DEMO = Path(__file__).parent.parent / "demo"
PROMPTS = [[7], list(range(3, 90)), [5, 6] * 250, list(range(200, 100, -1)), [9, 8, 7]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder / "moe", tiny.deepseek())
    tiny.write(folder / "fp8", tiny.deepseek())
    tiny.quantise(folder / "fp8")
    tiny.write(folder / "dense", tiny.qwen2())
    return folder


def complete(model, prompts=PROMPTS, new=30, sampling=Sampling(temperature=0)) -> list[list[int]]:
    tokens = [[] for _ in prompts]
    for event in generate(model, prompts, (), new, sampling):
        tokens[event.prompt] += event.tokens
    return tokens


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["dense", "moe", "fp8"])
def test_steps_on_static_buffers_equal_dynamic_ones(paths, family, rows, monkeypatch):
    """A prompt of 500 tokens crosses from the bucket of 512 slots into the next one. Layers are compiled in
    test_gpu.py, not here, but must get whole buffers: a compiler's copy of a part has other strides."""
    def fuse(function, *_):
        def layer(block, x, step, cache):
            assert all(buffer.shape[1] == 640 for buffer in cache)      # whole, in a GPU's order or a CPU's:
            assert all(buffer.is_contiguous() or buffer.transpose(1, 2).is_contiguous() for buffer in cache)
            assert step.positions.max() < step.bias.shape[-1]           # the new token has a slot of its own
            return function(block, x, step, cache)
        return layer if function is Block.forward else function
    monkeypatch.setattr(Decoder, "compiled", Decoder.replayed)
    monkeypatch.setattr(Decoder, "captured", lambda self, step: step)
    monkeypatch.setattr(decode, "fuse", fuse)
    for sampling in (Sampling(temperature=0), Sampling(1.0, 0.9, 3)):
        dynamic, static = (complete(tiny.load(paths / family, rows=rows, max_seq_len=600, compile=compile),
                                    sampling=sampling) for compile in (False, True))
        assert static == dynamic


def test_draws_of_all_seeds_share_a_graph(paths, monkeypatch):
    monkeypatch.setattr(Decoder, "compiled", Decoder.replayed)
    monkeypatch.setattr(Decoder, "captured", lambda self, step: step)
    monkeypatch.setattr(decode, "fuse", lambda function, *_: function)
    model = tiny.load(paths / "dense", rows=1, compile=True)
    kept = Kept(Decoder(model))
    for sampling in (Sampling(seed=1), Sampling(seed=2)):
        list(generate(model, [[1, 2, 3]], (), 4, sampling, kept=kept))
    assert len(kept.decoder.graphs) == 1
    list(generate(model, [[1, 2, 3]], (), 4, Sampling(temperature=0), kept=kept))
    assert len(kept.decoder.graphs) == 2


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_a_step_asks_the_device_for_nothing_until_its_draw_is_read(paths, family, monkeypatch):
    model = tiny.load(paths / family, rows=3, compile=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = Decoder(model)
        rows = [Row(0, i, 5, 9, np.random.default_rng(i)) for i in range(3)]
        with torch.inference_mode():
            decoder.given = [torch.zeros(3, dtype=torch.int64), *map(torch.from_numpy, chances(rows))]
            tokens, _ = decoder.eager(3, 64, Draw(Sampling(temperature=0), None, Shard()))
        with pytest.raises(DataDependentOutputException):
            tokens.tolist()


def test_a_draw_from_the_nucleus_asks_the_device_for_nothing_unless_it_is_a_cpu():
    """Tensors on the meta device, which have no values, take the way of a GPU."""
    logits, uniforms = torch.empty(3, 50, device="meta"), torch.empty(3, dtype=torch.float64, device="meta")
    forced = torch.empty(3, dtype=torch.int64, device="meta")
    tokens, logprobs = Draw(Sampling(), None, Shard())(logits, uniforms, forced)
    assert tokens.shape == logprobs.shape == (3,)


ENDINGS = [[1, 5, 9, 30, 22, 11], [1, 7, 9] * 20, [1, 40, 41, 12] * 125]    # the last one meets the last slot


@pytest.mark.parametrize("family, rows", [("dense", 1), ("moe", 3)])
def test_a_step_in_parts_is_the_whole_step(paths, family, rows, monkeypatch):
    """The parts as they are before they are compiled."""
    monkeypatch.setattr(compiled_parts, "make_parts", lambda model, rows: [
        (lambda tensors, part=part: [part(*tensors)], part) for part in compiled_parts.parts_of(model, rows)])
    whole, parts = (complete(tiny.load(paths / family, rows=rows, max_seq_len=520, compile=compile), ENDINGS)
                    for compile in (False, True))
    assert parts == whole


@pytest.mark.parametrize("family, rows", [("dense", 1), ("demo", 3)])
def test_a_compiled_model_says_the_same_and_compiles_once(paths, family, rows, tmp_path, monkeypatch):
    """Answers cross a multiple of 64 slots; one of 3 rows ends early, at its last slot, and has to stay in
    its place; the second model finds all parts made, and so does the first if they were made before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = DEMO if family == "demo" else paths / family
    rt = Runtime(dtype=torch.float32, max_seq_len=520, rows=rows)
    eager, compiled, again = (load_model(Checkpoint(folder), replace(rt, compile=compile))
                              for compile in (False, True, True))
    built, build = [], compiled_parts.build
    monkeypatch.setattr(compiled_parts, "build", lambda part, path: (built.append(path), build(part, path)))
    expected, kinds = complete(eager, ENDINGS), {"dense": 1, "demo": 2}[family]
    if rows == 1:
        decode.precompile(compiled)
        assert len(built) == kinds + 1
    for model in (compiled, again, again):
        assert complete(model, ENDINGS) == expected
    assert len(built) == len(set(built)) == kinds + 1 < len(eager.layers) + 1
    assert sorted((tmp_path / "deepseek-r1").iterdir()) == sorted(built)


@pytest.mark.parametrize("family, rows", [("dense", 1), ("dense", 3), ("moe", 3)])
def test_what_is_compiled_for_a_gpu_before_the_first_answer_serves_all_lengths(paths, family, rows,
                                                                               monkeypatch):
    """Traced on a CPU, without code: another compilation would be an error."""
    torch._dynamo.reset()
    layers = torch.compile(Block.forward, backend="aot_eager")
    monkeypatch.setattr(decode, "fuse", lambda function, *_: layers)
    monkeypatch.setattr(decode, "make_parts", decode.compile_layers)        # as if it were no CPU
    monkeypatch.setattr(attention, "can_attend_runs", lambda q: False)
    model = tiny.load(paths / family, rows=rows, compile=True)
    decode.precompile(model)
    for n, slots, room in itertools.product({1, rows}, (100, 512, 2048), (600, 2048)):
        cache = Cache.allocate(model.cfg, replace(model.rt, max_seq_len=room))
        with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
            view = cache.view(slice(0, n), room)
            decode.fused_layers(model, view, torch.zeros(n, 1, dtype=torch.int64), min(slots, room))


@pytest.mark.parametrize("family, rows", [("dense", 1), ("dense", 3), ("moe", 1)])
def test_a_short_cache_needs_nothing_compiled_of_its_own(paths, family, rows, monkeypatch):
    """As above, with a GPU's attend_one, but for the launch of its kernel."""
    class Kernel:
        def __getitem__(self, programs):
            return lambda *args, **settings: None
    torch._dynamo.reset()
    compiled = {Block.forward: torch.compile(Block.forward, backend="aot_eager")}
    monkeypatch.setattr(decode, "fuse", lambda function, *_: compiled.get(function, function))
    monkeypatch.setattr(decode, "make_parts", decode.compile_layers)
    monkeypatch.setattr(Decoder, "compiled", Decoder.replayed)
    monkeypatch.setattr(Decoder, "captured", lambda self, step: step)
    monkeypatch.setattr(attention, "can_attend_one", lambda q, v: q.shape[1] == 1)
    monkeypatch.setattr(attention, "attend_kernel", Kernel(), raising=False)
    monkeypatch.setattr(attention, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
    model = tiny.load(paths / family, rows=rows, max_seq_len=100, compile=True)
    decode.precompile(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        Decoder(model).step([5] * rows, 50, lambda logits: (logits,))


@pytest.mark.parametrize("n, k", [(256, 512), (48, 256), (300, 200), (64, 8960), (7, 4100)])
def test_multiply_and_sum_is_the_product(n, k, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, k, generator=generator), torch.randn(3, n, k, generator=generator)
    ids = torch.tensor([[2, 0], [1, 1]])
    expected = torch.einsum("nk,nehk->neh", x.double(), w.double()[ids])
    got = products.matvec(x[:, None], w, None, ids).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    few, bias = torch.randn(5, 1, k, generator=generator), torch.randn(n, generator=generator)
    for rows in (few, few[:2], few[0]):                         # these share a matrix
        expected = F.linear(rows.double(), w[0].double(), bias.double())
        torch.testing.assert_close(products.linear(rows, w[0], bias).double(), expected, rtol=1e-5, atol=1e-4)
    for size in (1.0, 1e-12, 1e9):              # decoding e4m3 by its bits neither under- nor overflows
        q, scale = (torch.stack(part) for part in zip(*map(kernel.weight_quant, w)))
        exact = torch.stack([kernel.weight_dequant(*pair, torch.float32) for pair in zip(q, scale)])
        expected = torch.einsum("nk,nehk->neh", size * x.double(), exact.double()[ids])
        got = products.matvec(size * x[:, None], q, scale, ids).double()
        torch.testing.assert_close(got / size, expected / size, rtol=1e-5, atol=1e-4)
        for rows in (few, few[0]):
            got = products.matvec(size * rows, q[0], scale[0]).double()
            torch.testing.assert_close(got / size, rows.double() @ exact[0].double().T, rtol=1e-5, atol=1e-4)


def test_an_edited_model_has_compiled_parts_of_its_own_and_a_hooked_one_has_none(tmp_path):
    tiny.write(tmp_path, tiny.deepseek())
    model = tiny.load(tmp_path, compile=True)

    def names() -> list[Path]:
        return [compiled_parts.path_of(part, model) for part in compiled_parts.parts_of(model, 1)]
    before = names()
    assert before == names() and len(set(before)) == 3          # an MLP's layer, the two with experts, the head
    model.layers[2].attn.scale *= 2
    assert [a == b for a, b in zip(before, names(), strict=True)] == [True, True, False, True]
    hook = model.layers[1].ffn.register_forward_hook(lambda *_: None)
    for use in (decode.precompile, decode.Decoder):
        with pytest.raises(ValueError, match="compiled steps call no hooks"):
            use(model)
    hook.remove()
    model.rt = replace(model.rt, fp8="gemm")                    # no program has looked at this one
    with pytest.raises(ValueError, match="--compile on a CPU goes with"):
        decode.Decoder(model)


def failing(work):
    """work(), whose failure is a RuntimeError, like Python's of a missing home, PyTorch's of a full disk."""
    try:
        return work()
    except ZeroDivisionError:
        raise RuntimeError("basic_ios::clear: iostream error") from None


def test_what_cannot_be_compiled_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    for settings in (dict(fp8="gemm"), dict(tp=Shard(0, 2)), dict(rows=9)):
        told = "--compile on a CPU goes with 1 rank, a --batch-size up to 8, and "
        with pytest.raises(ValueError, match=told):
            decode.check(Runtime(compile=True, **settings))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = Runtime(torch.device("cuda"), compile=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    told = "8.0 or more \\(7.0 in float32\\), .*; here are capability 7.5 and "
    with pytest.raises(ValueError, match=told):
        decode.check(gpu)
    assert decode.check(replace(gpu, dtype=torch.float32)).compile
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for settings, triton, path in ((dict(), None, "torch"), (dict(fp8="gemm"), kernel, "torch")):
        told = "--compile on a GPU needs Triton, "
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=told):
            patch.setattr(kernel, "triton", triton)
            patch.setattr(kernel, "path", lambda device: path)
            decode.check(replace(gpu, **settings))
    (tmp_path / "file").touch()
    for variable, value, told in (("XDG_CACHE_HOME", tmp_path / "file",
                                   "--compile keeps its results in .*file.*"),
                                  ("CXX", "false", "--compile: the C\\+\\+ compiler 'false' failed: .*")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv(variable, str(value))
        assert main(["--prompt", "1+1", "--compile", "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert re.fullmatch(f"generate.py: error: {told}", err.splitlines()[-1])
    for place, told in ((lambda: 1 / 0, "finds no home folder"),
                        (lambda: tmp_path, "is the disk of .* full")):
        with monkeypatch.context() as patch:
            patch.delenv("XDG_CACHE_HOME")
            patch.setattr(compiled_parts.Path, "home", lambda: failing(place))
            patch.setattr(torch._inductor, "aoti_compile_and_package",
                          lambda *_, **__: failing(lambda: 1 / 0))
            assert main(["--prompt", "1+1", "--compile", "--device", "cpu"]) == 2
            assert re.search(f"generate.py: error: --compile .*{told}", capsys.readouterr().err)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["--prompt", "1+1", "--compile", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("generate.py: error: --compile needs a C++ compiler, and 'no-such-compiler'")
    assert decode.check(Runtime(fp8="gemm")) == Runtime(fp8="gemm")
    with pytest.raises(OSError, match="file: cannot be loaded; remove it, and --compile makes it anew: "):
        compiled_parts.load(tmp_path / "file")
    monkeypatch.delenv("CXX")
    tiny.write(tmp_path, tiny.deepseek(hidden_size=130))
    tiny.quantise(tmp_path)
    told = "in fours, and layers.0.attn.wq_a.weight has 130 inputs; add --fp8 bf16"
    with pytest.raises(ValueError, match=told):
        decode.precompile(tiny.load(tmp_path, compile=True))
