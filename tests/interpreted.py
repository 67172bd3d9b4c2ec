"""Claim: in Triton's interpreter every kernel of kernel.py equals its plain PyTorch definition (V3 section
3.3). Run by test_triton.py, or by hand: TRITON_INTERPRET=1 python -m pytest tests/interpreted.py

The oracle is float64 arithmetic on the quantised operands; fp32 sums over 1,024 channels are within 1e-6 of
it (7e-8 is typical). Two things the interpreter does not do as a GPU does, and these tests go around: it
rounds fp32 to e4m3 wrongly, so what is quantised here lies on the e4m3 grid already; and it cuts bf16 off
instead of rounding, so bf16 results are compared within 2^-7, one unit in the last place.
"""
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attention
import kernel
from convert import load_config
from model import MoE, Runtime

assert kernel.INTERPRETED and kernel.path(torch.device("cpu")) == "triton"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(function, *args):
    """What the definition in plain PyTorch gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "FORCED", "torch")
        return function(*args)


def spread(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    return scale.double().repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :n, :k]


def product(a, a_scale, w, w_scale) -> torch.Tensor:
    a = a.double() * a_scale.double().repeat_interleave(128, -1)[..., :a.shape[-1]]
    return a @ (w.double() * spread(w_scale, *w.shape)).T


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1e-6 * exact.norm()


def operands(m: int, n: int, k: int):
    return *plain(kernel.act_quant, noise(m, k, seed=1)), *plain(kernel.weight_quant, noise(n, k, seed=2))


@pytest.mark.parametrize("groups, heads, shared, rest", [(2, 3, 32, 0), (1, 20, 64, 16), (4, 1, 16, 0)])
def test_one_query_a_row_attends_to_what_its_row_holds(groups, heads, shared, rest):
    """Rows of 1, 256, 257 and 700 keys: full, part-filled and empty runs. fp32 sums: 1e-6 is enough."""
    slots, ends = 770, torch.tensor([[0], [255], [256], [699]])
    buffer = noise(4, slots + 5, groups, shared + rest)[:, :slots]          # not contiguous, as in a cache
    k, v = buffer, buffer[..., :shared] if rest else noise(4, slots, groups, shared, seed=1)
    q = noise(4, 1, groups * heads, shared + rest, seed=2)
    assert attention.can_attend_one(q, v)
    scores = torch.einsum("bghd,btgd->bght", q.double().view(4, groups, heads, -1), k.double()) * 0.3
    hidden = torch.arange(slots) > ends[:, :, None, None]
    exact = torch.einsum("bght,btgd->bghd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.double())
    buffer[:, 700:] = torch.nan                                                 # nobody looks there
    ours = attention.attend_one(q, k, v, ends, 0.3)
    assert_close(ours, exact.view(4, 1, groups * heads, -1))
    assert torch.equal(attention.attend_one(q[:1], k[:1, :300], v[:1, :300], ends[:1], 0.3), ours[:1])


@pytest.mark.parametrize("m, n, k", [*((m, 130, 256) for m in range(18)), (1, 192, 1024), (17, 64, 2048),
                                     (40, 200, 200), (300, 192, 328), (5, 1, 129)])
def test_gemm_equals_float64_and_the_definition(m, n, k):
    a, a_scale, w, w_scale = operands(m, n, k)
    ours = kernel.fp8_gemm(a, a_scale, w, w_scale, torch.float32)
    assert_close(ours, product(a, a_scale, w, w_scale))
    assert_close(ours, plain(kernel.fp8_gemm, a, a_scale, w, w_scale, torch.float32).double())
    rounded = kernel.fp8_gemm(a, a_scale, w, w_scale, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and ((rounded.float() - ours).abs() <= ours.abs() / 128).all()


def test_the_cases_above_use_every_tile_and_split_sums():
    cpu = torch.device("cpu")
    assert [kernel.tile_for(m) for m in (1, 16, 17, 40, 300)] == [kernel.TILES[i] for i in (0, 0, 1, 2, 3)]
    assert [kernel.n_splits(tiles, kb, cpu) for tiles, kb in ((3, 8), (1, 16), (3, 2))] == [2, 4, 1]


@pytest.mark.parametrize("size", [1e-23, 1e-6, 1e6, 1e23])
def test_tiny_and_huge_scales(size):
    a, a_scale, w, _ = operands(3, 128, 256)
    w_scale = torch.tensor([[1.0, 3.0]]) * size
    assert_close(kernel.fp8_gemm(a, a_scale, w, w_scale, torch.float32), product(a, a_scale, w, w_scale))


def test_zero_blocks_and_all_finite_codes():
    codes = torch.arange(256, dtype=torch.uint8).view(kernel.FP8)
    codes = torch.where(codes.float().isnan(), 0, codes.float()).to(kernel.FP8).expand(128, 256).contiguous()
    a, a_scale = plain(kernel.act_quant, torch.zeros(4, 256))
    ones = torch.ones(1, 2)
    assert torch.equal(kernel.fp8_gemm(a, a_scale, codes, ones, torch.float32), torch.zeros(4, 128))
    a = torch.eye(256).to(kernel.FP8)                       # picks one code for each row of y
    y = kernel.fp8_gemm(a, ones.expand(256, 2), codes, ones, torch.float32)
    assert torch.equal(y, codes.float().T)


def test_a_row_does_not_depend_on_how_many_others_there_are():
    a, a_scale, w, w_scale = operands(16, 192, 1024)
    together = kernel.fp8_gemm(a, a_scale, w, w_scale, torch.float32)
    for m in (1, 2, 7):
        assert torch.equal(kernel.fp8_gemm(a[:m], a_scale[:m], w, w_scale, torch.float32), together[:m])


def test_leading_dimensions_and_any_strides_of_the_scales():
    a, a_scale, w, w_scale = operands(12, 130, 256)
    expected = kernel.fp8_gemm(a, a_scale, w, w_scale, torch.float32).view(3, 4, 130)
    by_channel = a_scale.T.contiguous().T
    for scale in (a_scale, by_channel):
        y = kernel.fp8_gemm(a.view(3, 4, 256), scale.unflatten(0, (3, 4)), w, w_scale, torch.float32)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(1, 128), (3, 7, 200), (40, 384), (0, 256), (2, 2, 129)])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantised_activations_equal_the_definitions_bit_for_bit(shape, ue8m0):
    q, scale = plain(kernel.act_quant, noise(*shape))
    powers = torch.exp2(torch.arange(scale.numel()).remainder(9).float() - 4).view(scale.shape)
    x = q.float() * powers.repeat_interleave(128, -1)[..., :shape[-1]]     # amax / 448: a power of two
    x[..., :128] *= torch.arange(len(x)).view(-1, *[1] * (len(shape) - 1)) != 1     # a zero block
    ours, expected = kernel.act_quant(x, ue8m0), plain(kernel.act_quant, x, ue8m0)
    assert torch.equal(ours[1], expected[1])
    assert torch.equal(ours[0].float(), expected[0].float())


def test_scales_lie_by_channel_in_fours_of_tokens_as_cublaslt_reads_them():
    assert kernel.act_quant(noise(2, 5, 300))[1].stride() == (5, 1, 12)


def test_scales_that_are_no_powers_of_two_equal_the_definitions():
    x = noise(50, 300) * torch.logspace(-6, 6, 50)[:, None]
    for ue8m0 in (False, True):
        assert torch.equal(kernel.act_quant(x, ue8m0)[1], plain(kernel.act_quant, x, ue8m0)[1])


@pytest.mark.parametrize("n, k", [(128, 128), (300, 200), (1, 129)])
def test_quantised_weights_equal_the_definitions_bit_for_bit(n, k):
    q, scale = plain(kernel.weight_quant, noise(n, k))
    powers = torch.exp2(torch.arange(scale.numel()).remainder(9).float() - 4).view(scale.shape)
    factors = powers.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    w = q.float() * factors                                             # amax / 448: a power of two
    w[:128, :128] *= n != 300                                                           # a zero block
    ours, expected = kernel.weight_quant(w), plain(kernel.weight_quant, w)
    assert torch.equal(ours[1], expected[1])
    assert torch.equal(ours[0].float(), expected[0].float())
    assert torch.equal(kernel.weight_quant(noise(n, k))[1], scale)      # and scales that are no powers of two


@pytest.mark.parametrize("n, k", [(128, 128), (300, 200), (1, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_weights_equal_the_definitions(n, k, dtype):
    q, scale = plain(kernel.weight_quant, noise(n, k))
    ours = kernel.weight_dequant(q, scale, dtype)
    exact = plain(kernel.weight_dequant, q, scale, torch.float32)
    assert ours.dtype == dtype
    error = (ours.float() - exact).abs()
    assert (error <= exact.abs() / 128).all() if dtype == torch.bfloat16 else torch.equal(ours, exact)


def test_every_code_is_dequantised_nan_included():
    codes = torch.arange(256, dtype=torch.uint8).view(kernel.FP8)[None]
    ours = kernel.weight_dequant(codes, torch.ones(1, 2), torch.float32)
    assert torch.equal(ours.nan_to_num(1e9), codes.float().nan_to_num(1e9))


@pytest.mark.parametrize("tokens, experts, k", [(1, 8, 8), (5, 4, 2), (70, 3, 2), (0, 4, 2)])
def test_experts_in_one_launch_equal_float64_and_the_definition(tokens, experts, k):
    a, a_scale = plain(kernel.act_quant, noise(tokens, 200))
    stacks = [[plain(kernel.weight_quant, noise(130, 200, seed=10 * s + e)) for e in range(experts)]
              for s in (1, 2)]
    weights, scales = zip(*((torch.stack(w), torch.stack(s)) for w, s in (zip(*stack) for stack in stacks)))
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(4)).argsort(-1)[:, :k]
    groups = kernel.group(ids, experts)
    ours = kernel.grouped_fp8_gemm(a, a_scale, weights, scales, groups, torch.float32)
    expected = plain(kernel.grouped_fp8_gemm, a, a_scale, weights, scales, groups, torch.float32)
    for y, same, w, w_scale in zip(ours, expected, weights, scales):
        exact = [product(a[i // k], a_scale[i // k], w[e], w_scale[e]) for i, e in enumerate(ids.flatten())]
        assert_close(y, torch.stack(exact) if exact else y.double())
        assert_close(y, same.double())
    slots = plain(kernel.act_quant, noise(tokens * k, 200, seed=5))     # as w2 has them: a row for each slot
    y, = kernel.grouped_fp8_gemm(*slots, weights[:1], scales[:1], groups, torch.float32)
    same, = plain(kernel.grouped_fp8_gemm, *slots, weights[:1], scales[:1], groups, torch.float32)
    assert_close(y, same.double())


@pytest.mark.parametrize("shared", [1, 0])
def test_an_moe_layer_is_the_same_in_two_launches_as_in_a_loop(shared, monkeypatch):
    cfg = load_config(Path(__file__).parent.parent / "configs/tiny_moe.json")
    cfg = replace(cfg, moe=replace(cfg.moe, n_shared_experts=shared))
    layer, state = MoE(replace(cfg, fp8=True), Runtime(dtype=torch.float32, fp8="gemm")), {}
    assert layer.grouped
    for seed, (name, t) in enumerate(layer.state_dict().items()):
        if t.numel() == 0:
            state[name] = torch.empty(t.shape, dtype=t.dtype)
        elif t.dtype == kernel.FP8:
            matrices = noise(*t.shape, seed=seed).view(-1, *t.shape[-2:]) / 16
            q, scale = map(torch.stack, zip(*map(kernel.weight_quant, matrices)))
            state[name] = q.view(t.shape)
            state[name.replace("weight", "scale")] = scale.view(*t.shape[:-2], *scale.shape[1:])
        elif not name.endswith("scale"):
            state[name] = noise(*t.shape, seed=seed) / 16
    layer.load_state_dict(state, assign=True)
    monkeypatch.setattr(kernel, "_launch_act_quant", lambda *args: plain(kernel.act_quant, *args))
    x = noise(1, 6, 256)
    ours = layer(x)
    layer.grouped = False
    expected = plain(layer, x)
    assert (ours - expected).abs().max() <= 1e-5 * expected.std()
