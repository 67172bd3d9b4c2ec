"""Claim: on a GPU the kernels equal their definitions, the models HuggingFace's logits, and a decode step
that is replayed as a CUDA graph gives the tokens of the eager one. Skipped where there is no GPU.

Quantising divides and rounds as the definition does, so it must be equal bit for bit. Products of e4m3
numbers are exact; what tensor cores lose in sums of 128 is bounded by 2^-13 of the sum's largest term (they
keep 14 bits), and bf16 results round by 2^-9: hence 4e-3 of the norm. fp32 products are in full precision
(TF32 is off by default).
"""
import re

import pytest
import tiny
import torch
from torch._inductor.utils import run_and_get_code

import attention
import decode
import kernel
from decode import Decoder
from generate import Draw, Sampling, generate
from model import Shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)
fp8_only = pytest.mark.skipif(kernel.path(GPU) != "triton" if torch.cuda.is_available() else True,
                              reason="needs a GPU that multiplies e4m3, and Triton")
triton_only = pytest.mark.skipif(
    kernel.path(GPU, multiply=False) != "triton" or kernel.device_kind(GPU) == "old"
    if torch.cuda.is_available() else True, reason="needs a GPU that multiplies bf16, and Triton")
PROMPTS = [[7], list(range(3, 90)), [5, 6] * 250, list(range(200, 100, -1)), [9, 8, 7]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@fp8_only
@pytest.mark.parametrize("m, k", [(1, 128), (3, 200), (40, 384), (300, 7168)])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantised_activations_equal_the_definitions_bit_for_bit(m, k, ue8m0):
    x = noise(m, k) * torch.logspace(-6, 6, m)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        q, scale = kernel.act_quant(x.to(GPU, dtype), ue8m0)
        expected = kernel.act_quant(x.to(dtype), ue8m0)
        assert torch.equal(q.cpu().float(), expected[0].float()) and torch.equal(scale.cpu(), expected[1])


@fp8_only
@pytest.mark.parametrize("n, k", [(128, 128), (300, 200), (576, 7168)])
def test_weights_there_and_back_equal_the_definitions_bit_for_bit(n, k):
    q, scale = kernel.weight_quant(noise(n, k).to(GPU))
    expected = kernel.weight_quant(noise(n, k))
    assert torch.equal(q.cpu().float(), expected[0].float()) and torch.equal(scale.cpu(), expected[1])
    for dtype in (torch.float32, torch.bfloat16):
        w = kernel.weight_dequant(q, scale, dtype)
        assert torch.equal(w.cpu(), kernel.weight_dequant(*expected, dtype))


def exact(a, a_scale, w, w_scale) -> torch.Tensor:
    a = a.double() * a_scale.double().repeat_interleave(128, -1)[..., :a.shape[-1]]
    scale = w_scale.double().repeat_interleave(128, -2).repeat_interleave(128, -1)
    return a @ (w.double() * scale[..., :w.shape[-2], :w.shape[-1]]).mT


@fp8_only
@pytest.mark.parametrize("path", ["triton", "scaled_mm"])
@pytest.mark.parametrize("m, n, k", [(1, 576, 7168), (2, 192, 1024), (17, 64, 2048), (40, 200, 200),
                                     (100, 512, 512), (300, 192, 384), (4096, 2304, 768), (5, 1, 129)])
def test_every_tile_equals_float64_and_repeats_itself(m, n, k, path, monkeypatch):
    """A result that changes between calls would be a race."""
    monkeypatch.setattr(kernel, "FORCED", path)
    operands = *kernel.act_quant(noise(m, k).to(GPU)), *kernel.weight_quant(noise(n, k, seed=1).to(GPU))
    y, expected = kernel.fp8_gemm(*operands, torch.bfloat16), exact(*operands)
    assert (y.double() - expected).norm() <= 4e-3 * expected.norm()
    for _ in range(20):
        assert torch.equal(kernel.fp8_gemm(*operands, torch.bfloat16), y)


@fp8_only
@pytest.mark.parametrize("tokens, experts, k", [(1, 8, 8), (5, 4, 2), (70, 3, 2), (600, 16, 4), (0, 4, 2)])
def test_experts_in_one_launch_equal_float64_and_repeat_themselves(tokens, experts, k):
    a, a_scale = kernel.act_quant(noise(tokens, 384).to(GPU))
    stacks = [[kernel.weight_quant(noise(130, 384, seed=10 * s + e).to(GPU)) for e in range(experts)]
              for s in (1, 2)]
    weights, scales = zip(*((torch.stack(w), torch.stack(s)) for w, s in (zip(*stack) for stack in stacks)))
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(4)).argsort(-1)[:, :k].to(GPU)
    groups = kernel.group(ids, experts)
    for _ in range(10):
        ours = kernel.grouped_fp8_gemm(a, a_scale, weights, scales, groups, torch.bfloat16)
        for y, w, w_scale in zip(ours, weights, scales):
            if tokens:
                every = exact(a, a_scale, w, w_scale)                           # [e, m, n]
                expected = every[ids, torch.arange(tokens, device=GPU)[:, None]].flatten(0, 1)
                assert (y.double() - expected).norm() <= 4e-3 * expected.norm()


@triton_only
@pytest.mark.parametrize("groups, heads, size, rest", [(4, 7, 128, 0), (1, 128, 512, 64), (8, 4, 128, 0),
                                                       (2, 1, 64, 0)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2 ** -8), (torch.float32, 1e-6)])
def test_one_query_a_row_attends_to_what_its_row_holds(groups, heads, size, rest, dtype, tolerance):
    """Shapes of Qwen-7B, R1 and Llama-8B; bf16 rounds the weights and the result (2^-9 each)."""
    ends, slots = torch.tensor([[0], [255], [256], [1500]], device=GPU), 1700
    k = noise(4, slots + 5, groups, size + rest).to(GPU, dtype)[:, :slots]
    v = k[..., :size] if rest else noise(4, slots, groups, size, seed=1).to(GPU, dtype)
    q = noise(4, 1, groups * heads, size + rest, seed=2).to(GPU, dtype)
    assert attention.can_attend_one(q, v)
    scale = (size + rest) ** -0.5
    scores = torch.einsum("bghd,btgd->bght", q.double().view(4, groups, heads, -1), k.double()) * scale
    hidden = torch.arange(slots, device=GPU) > ends[:, :, None, None]
    exact = torch.einsum("bght,btgd->bghd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.double())
    ours = attention.attend_one(q, k, v, ends, scale)
    assert (ours.double() - exact.view(4, 1, groups * heads, -1)).norm() <= tolerance * exact.norm()
    for _ in range(20):
        assert torch.equal(attention.attend_one(q, k, v, ends, scale), ours)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test compiles what it needs, without trying out tiles, which takes long."""
    torch._dynamo.reset()
    fuse = decode.fuse
    monkeypatch.setattr(decode, "fuse", lambda function, tune, *rest: fuse(function, False, *rest))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    configs = {"moe": tiny.deepseek(), "dense": tiny.qwen2(), "llama": tiny.llama()}
    references = {name: tiny.write(folder / name, config) for name, config in configs.items()}
    tiny.write(folder / "fp8", tiny.deepseek())
    tiny.quantise(folder / "fp8")
    return folder, references


@pytest.mark.parametrize("family", ["dense", "llama", "moe"])
def test_logits_equal_huggingfaces(paths, family):
    folder, references = paths
    # Not seed 0, with which a token's fourth and fifth expert are 2e-7 apart; here all are 1e-4
    tokens = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        expected = references[family](tokens).logits
    for chunks in ([200], [150, 49, 1]):
        ours = tiny.logits(tiny.load(folder / family, device=GPU), tokens.to(GPU), chunks)
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def complete(model, sampling, new: int = 30) -> list[list[int]]:
    tokens = [[] for _ in PROMPTS]
    for event in generate(model, PROMPTS, (), new, sampling):
        tokens[event.prompt] += event.tokens
    return tokens


@triton_only
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family, fp8, fused", [("dense", "dequant", True), ("moe", "dequant", True),
                                                ("fp8", "dequant", True),
                                                pytest.param("fp8", "gemm", False, marks=fp8_only)])
def test_graphs_give_the_tokens_of_eager_steps(paths, family, fp8, fused, rows, monkeypatch):
    """A prompt of 500 tokens crosses from the bucket of 512 slots into the next one, captured then.
    Sums in another order may take an activation over an edge of e4m3: hence FP8's graph of eager kernels."""
    captured, capture = [], Decoder.captured
    monkeypatch.setattr(Decoder, "captured", lambda *args: (captured.append(args), capture(*args))[1])
    if not fused:
        monkeypatch.setattr(decode, "fuse", lambda function, *_: function)
    for sampling in (Sampling(temperature=0), Sampling(1.0, 0.9, 3)):
        settings = dict(device=GPU, rows=rows, max_seq_len=600, fp8=fp8)
        eager, graphs = (tiny.load(paths[0] / family, **settings, compile=compile)
                         for compile in (False, True))
        decode.precompile(graphs)                               # as generate.py does
        assert complete(graphs, sampling) == complete(eager, sampling)
    assert len(captured) >= 4


def look(logits: torch.Tensor) -> tuple[torch.Tensor]:
    return logits,


@triton_only
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family, tolerance, settings", [
    ("dense", 0.03, {"dtype": torch.bfloat16}), ("llama", 0.03, {"dtype": torch.bfloat16}),
    pytest.param("fp8", 0.02, {"fp8": "gemm"}, marks=fp8_only)])
def test_fused_steps_give_the_logits_of_eager_ones(paths, family, tolerance, settings, rows):
    """But for bf16's roundings, which take a step of these models 0.013 away from fp32's, and for activations
    at an edge of e4m3, each of which moves one of 256 channels by up to 1/16."""
    model = tiny.load(paths[0] / family, device=GPU, rows=rows, max_seq_len=600, compile=True, **settings)
    decoder = Decoder(model)
    for token in (5, 77, 130):
        logits, = decoder.step([token] * rows, 511, look)
        decoder.cache.lengths -= 1
        expected, = decoder.eager(rows, 512, look)
        assert (logits - expected.cpu()).norm() <= tolerance * expected.norm()


@triton_only
@pytest.mark.parametrize("family, rows, fp8", [
    ("dense", 1, "dequant"), ("dense", 3, "dequant"), ("llama", 1, "dequant"), ("moe", 1, "dequant"),
    ("fp8", 1, "dequant"), pytest.param("fp8", 1, "gemm", marks=fp8_only)])
def test_kernels_that_overlap_wait_for_the_one_before(paths, family, rows, fp8):
    """One that waits for nothing would let the next one read what the last but one has yet to write."""
    model = tiny.load(paths[0] / family, device=GPU, rows=rows, max_seq_len=600, compile=True, fp8=fp8)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(decode.precompile, model)
    kernels = re.findall(r"async_compile\.triton\('(triton_\w+)', '''(.*?)'''", "\n".join(codes), re.S)
    waits = {name: "gdc_wait" in source for name, source in kernels}
    able = torch.cuda.get_device_capability() >= (9, 0) and not torch.version.hip
    assert set(waits.values()) == {able}, waits


@triton_only
@pytest.mark.parametrize("rows", [1, 3])
def test_a_compiled_draw_from_a_large_vocabulary_is_the_eager_one(rows):
    """TorchInductor sums up 150,000 probabilities in another way than the few of the models above."""
    draw, logits = Draw(Sampling(0.6, 0.95, 0), None, Shard()), 3 * noise(rows, 151_936).to(GPU)
    forced = torch.full((rows,), -1, device=GPU)
    for uniform in torch.linspace(0, 0.999, 20, dtype=torch.float64, device=GPU):
        chances = uniform.expand(rows).contiguous(), forced
        tokens, logprobs = decode.fuse(Draw.__call__, False, 1)(draw, logits, *chances)
        expected, likelihoods = draw(logits, *chances)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logprobs, likelihoods, rtol=1e-5, atol=1e-5)


@fp8_only
def test_a_step_waits_for_nothing_but_its_end(paths):
    """PyTorch raises at the first thing that waits for the device: that is the last line of a replay."""
    model = tiny.load(paths[0] / "fp8", device=GPU, rows=1, max_seq_len=600, fp8="gemm", compile=True)
    decoder = Decoder(model)
    before, = decoder.step([5], 7, look)
    assert before.device.type == "cpu" and before.isfinite().all()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing") as raised:
            decoder.step([6], 8, look)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [entry.name for entry in raised.traceback if entry.path.name == "decode.py"][-1] == "replay"
