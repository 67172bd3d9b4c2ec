"""Claim: block-wise FP8 computes what V3 section 3.3 defines, and FP8 checkpoints run as their dequantised
twins.

Oracles are float64 formulas written out here. Against the quantised operands a product is exact up to fp32
summation (relative Frobenius error 1e-6; 1e-7 is typical) and, when it leaves as bf16, up to one rounding
(2^-9, so 4e-3). Whole models are compared with HuggingFace running dequantised weights, within 1e-5 of the
logit scale in fp32; comparing with unquantised weights would mean nothing, since FP8 re-routes a fifth of the
tokens of a tiny model.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import attention
import generate
import kernel
import model as core
from convert import load_config
from model import Shard, Transformer

ROOT = Path(__file__).parent.parent
TOKENS = torch.randint(0, 256, (2, 120), generator=torch.Generator().manual_seed(8))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """One float64 scale per element [n, k] out of one per 128 x 128 block."""
    rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
    return scale.double()[rows][:, columns]


def per_channel(scale: torch.Tensor, k: int) -> torch.Tensor:
    """One float64 scale per channel [..., k] out of one per 128 of them."""
    return scale.double().repeat_interleave(128, -1)[..., :k]


def dequantised(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return q.double() * spread(scale, *q.shape)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-300)).item()


SHAPES = [(128, 128), (576, 256), (300, 200), (64, 512), (1, 129), (256, 96)]


@pytest.mark.parametrize("n, k", SHAPES)
def test_weights_round_trip_within_half_a_step_of_each_block(n, k):
    w = noise(n, k) * torch.logspace(-3, 3, k)              # blocks of very different size
    q, scale = kernel.weight_quant(w)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (-(-n // 128), -(-k // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = w[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128].double()
            assert abs(scale[i, j].item() - block.abs().max().item() / 448) <= 1e-6 * scale[i, j].item()
    error = (dequantised(q, scale) - w.double()).abs()
    # 3 mantissa bits: half a step is 1/16 of the value, or of the smallest normal number 2^-6, times the
    # scale
    assert (error <= torch.maximum(w.double().abs() / 16, spread(scale, n, k) * 2 ** -10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantisation_is_one_product_and_one_rounding(n, k, dtype):
    q, scale = kernel.weight_quant(noise(n, k))
    expected = (q.float() * spread(scale, n, k).float()).to(dtype)
    assert torch.equal(kernel.weight_dequant(q, scale, dtype), expected)


@pytest.mark.parametrize("k", [128, 384, 200])
def test_activations_have_a_scale_per_token_and_128_channels(k):
    x = noise(3, 7, k) * torch.logspace(-2, 2, 7)[:, None]
    q, scale = kernel.act_quant(x)
    assert q.shape == x.shape and scale.shape == (3, 7, -(-k // 128)) and scale.dtype == torch.float32
    for j in range(scale.shape[-1]):
        block = slice(j * 128, (j + 1) * 128)
        expected = x[..., block].abs().amax(-1).clamp(min=1e-4) / 448
        torch.testing.assert_close(scale[..., j], expected, rtol=1e-6, atol=0)
        error = (q[..., block].double() * scale[..., j, None].double() - x[..., block]).abs()
        assert (error <= x[..., block].abs().double() / 16 + scale[..., j, None] * 2 ** -10).all()


def test_ue8m0_scales_are_the_next_powers_of_two():
    x = noise(40, 256) * torch.logspace(-6, 6, 40)[:, None]
    x[0, :128], x[1, 0] = 0, 448.0                          # a zero block, and a scale that is 2^0 already
    x[1, 1:128] = 1.0
    _, plain = kernel.act_quant(x)
    q, scale = kernel.act_quant(x, ue8m0=True)
    assert torch.equal(scale, torch.exp2(plain.double().log2().ceil()).float()) and scale[1, 0] == 1
    error = (q.double() * per_channel(scale, 256) - x).abs()
    assert (error <= x.abs().double() / 16 + per_channel(scale, 256) * 2 ** -10).all()


def test_every_code_is_widened_exactly_nan_included():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide = kernel.widen(codes)
    assert wide.dtype == torch.float32 and wide.isnan().sum() == 2
    assert torch.equal(wide.nan_to_num(1e9), codes.float().nan_to_num(1e9))
    assert wide[128] == 0 and wide[128].signbit()           # -0


@pytest.mark.parametrize("m", [*range(18), 300])
@pytest.mark.parametrize("n, k", [(256, 384), (576, 200)])
def test_gemm_equals_the_float64_product_of_its_operands(m, n, k):
    a, a_scale = kernel.act_quant(noise(m, k, seed=1))
    w, w_scale = kernel.weight_quant(noise(n, k, seed=2))
    expected = (a.double() * per_channel(a_scale, k)) @ dequantised(w, w_scale).T
    exact = kernel.fp8_gemm(a, a_scale, w, w_scale, torch.float32)
    rounded = kernel.fp8_gemm(a, a_scale, w, w_scale, torch.bfloat16)
    assert exact.shape == (m, n) and exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert relative(exact, expected) <= 1e-6 and relative(rounded, expected) <= 4e-3
    assert torch.equal(rounded, exact.bfloat16())           # summed in fp32, rounded once at the end


@pytest.mark.parametrize("m, e, k", [(0, 4, 2), (1, 8, 8), (5, 4, 2), (300, 4, 2)])
def test_each_slot_has_the_float64_product_with_its_expert(m, e, k):
    a, a_scale = kernel.act_quant(noise(m, 200))
    stacks = [[kernel.weight_quant(noise(192, 200, seed=10 * s + i)) for i in range(e)] for s in (1, 2)]
    weights, scales = zip(*(map(torch.stack, zip(*stack)) for stack in stacks))     # [e, n, k], [e, nb, kb]
    ids = torch.rand(m, e, generator=torch.Generator().manual_seed(4)).argsort(-1)[:, :k]
    groups = kernel.group(ids, e)
    ours = kernel.grouped_fp8_gemm(a, a_scale, weights, scales, groups, torch.float32)
    slots = [t.repeat_interleave(k, 0) for t in (a.float(), a_scale)]
    again = kernel.grouped_fp8_gemm(slots[0].to(kernel.FP8), slots[1], weights, scales, groups, torch.float32)
    for y, same, w, w_scale in zip(ours, again, weights, scales):
        assert y.shape == (m * k, 192) and torch.equal(y, same)         # a row per token, or per slot
        exact = [dequantised(*pair) for pair in zip(w, w_scale)]
        for i, expert in enumerate(ids.flatten().tolist()):
            row = a[i // k].double() * per_channel(a_scale[i // k], 200)
            assert relative(y[i], exact[expert] @ row) <= 1e-6


@pytest.mark.parametrize("m, e, k", [(0, 4, 2), (1, 256, 8), (16, 256, 8), (7, 4, 4), (300, 4, 2),
                                     (4000, 8, 2)])
@pytest.mark.parametrize("skew", [0, 5])
def test_the_plan_puts_every_slot_into_one_tile_of_its_expert(m, e, k, skew):
    chance = torch.rand(m, e, generator=torch.Generator().manual_seed(5)) + skew * (torch.arange(e) < k)
    groups = kernel.group(chance.topk(k).indices, e)        # skew: everybody chooses the same experts
    rows, seen = kernel.tile_for(m * k // e).tokens, []
    assert len(groups.expert) <= min(m * k, e) + m * k // rows
    for expert, first, stop in zip(*(t.tolist() for t in groups[2:])):
        if expert < e:
            assert 0 < stop - first <= rows
            seen += groups.order[first:stop].tolist()
            assert set(groups.ids[groups.order[first:stop]].tolist()) == {expert}
    assert sorted(seen) == list(range(m * k))


def test_scales_are_clamped_where_the_official_code_clamps_them():
    for largest, clamped in ((1e-3, 1e-3), (1.1e-4, 1.1e-4), (1e-6, 1e-4), (0.0, 1e-4)):
        _, scale = kernel.act_quant(torch.full((1, 128), largest))
        assert abs(scale.item() * 448 / clamped - 1) < 1e-6
    for largest, expected in ((1e-9, 1e-9 / 448), (1e-20, 1e-12), (0.0, 1e-12)):
        _, scale = kernel.weight_quant(torch.full((128, 128), largest))
        assert abs(scale.item() / expected - 1) < 1e-6


@pytest.mark.parametrize("size", [1e-23, 1e-6, 1e6, 1e23])
def test_tiny_and_huge_weights_keep_their_precision(size):
    a, a_scale = kernel.act_quant(noise(5, 256))
    w, w_scale = kernel.weight_quant(noise(256, 256, seed=3).double().mul(size).float())
    if size > 1e-12:        # below, the scale is clamped and the weights fade to zero, as they should
        assert relative(dequantised(w, w_scale), noise(256, 256, seed=3).double() * size) < 0.03
    expected = (a.double() * per_channel(a_scale, 256)) @ dequantised(w, w_scale).T
    assert relative(kernel.fp8_gemm(a, a_scale, w, w_scale, torch.float32), expected) <= 1e-6


def test_zero_blocks_and_subnormals_stay_finite_and_exact():
    w = noise(256, 256)
    w[:128, 128:] = 0
    q, scale = kernel.weight_quant(w)
    assert scale.isfinite().all() and (scale > 0).all()
    assert torch.equal(kernel.weight_dequant(q, scale, torch.float32)[:128, 128:], torch.zeros(128, 128))
    x = torch.zeros(2, 256)
    x[0, 0] = 3.0
    a, a_scale = kernel.act_quant(x)
    assert a.float().isfinite().all() and (a_scale > 0).all()
    assert kernel.fp8_gemm(a, a_scale, q, scale, torch.float32)[1].abs().max() == 0
    every_code = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = every_code[~every_code.float().isnan()]
    ones = torch.ones(1, 1)
    assert torch.equal(kernel.weight_dequant(finite[:, None], ones.expand(2, 1), torch.float32),
                       finite.float()[:, None])


@pytest.mark.parametrize("bad", [torch.ones(4, 2), torch.ones(5, 1), torch.ones(5, 2, dtype=torch.float64)])
def test_a_scale_that_does_not_fit_is_an_error(bad):
    q, scale = kernel.weight_quant(noise(576, 256))
    assert scale.shape == (5, 2)
    with pytest.raises(ValueError, match=r"\[576, 256\] needs an fp32 scale \[5, 2\]"):
        kernel.weight_dequant(q, bad, torch.float32)
    with pytest.raises(ValueError, match="e4m3 weight"):
        kernel.weight_dequant(q.float(), scale, torch.float32)


# What runs where

GPUS = {"cpu": ("torch", "torch", False), "old": ("torch", "triton", False),       # products, dequantisation,
        "sm_80": ("torch", "triton", False),                                        # scaled_mm of many
        "sm_89": ("triton", "triton", False), "sm_90": ("triton", "triton", True),
        "rocm": ("triton", "triton", False)}


@pytest.mark.parametrize("kind", GPUS)
def test_the_device_decides_and_fp8_path_overrules_it(kind, monkeypatch):
    product, dequantisation, has_scaled_mm = GPUS[kind]
    device, w = torch.device("cpu"), torch.empty(256, 256, dtype=kernel.FP8)
    monkeypatch.setattr(kernel, "triton", object())
    monkeypatch.setattr(kernel, "device_kind", lambda device: kind)
    monkeypatch.setattr(kernel, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernel.F, "scaled_mm", None, raising=False)
    for name, value in {"INTERPRETED": False, "FORCED": None}.items():
        monkeypatch.setattr(kernel, name, value)
    paths = lambda: (kernel.path(device), kernel.path(device, multiply=False))          # noqa: E731
    assert paths() == (product, dequantisation)
    assert kernel.default_mode(device) == ("gemm" if product == "triton" else "dequant")
    query = torch.empty(2, 1, 6, 128)
    assert attention.can_attend_one(query, query) == (kind not in ("cpu", "old"))
    assert not attention.can_attend_one(query, query[..., :32])                        # 96 is no power of two
    wins = lambda m, w=w, dtype=torch.bfloat16: kernel.scaled_mm_wins(m, w, dtype)      # noqa: E731
    assert [wins(1), wins(256), wins(257)] == [False, False, has_scaled_mm]
    assert not wins(257, w[:, :200]) and not wins(257, w[:200 - 1]) and not wins(257, w, torch.float32)
    monkeypatch.setattr(kernel, "FORCED", "triton")
    assert paths() == (product, dequantisation) and not wins(257)
    monkeypatch.setattr(kernel, "FORCED", "scaled_mm")
    assert wins(1) == has_scaled_mm and not wins(0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert not wins(257)
    monkeypatch.setattr(kernel, "FORCED", "torch")
    assert paths() == ("torch", "torch")
    monkeypatch.setattr(kernel, "FORCED", None)
    monkeypatch.setattr(kernel, "triton", None)
    assert paths() == ("torch", "torch")
    monkeypatch.setattr(kernel, "FORCED", "fast")
    with pytest.raises(ValueError, match="FP8_PATH is 'fast'; known: torch, triton, scaled_mm"):
        kernel.path(device)


@pytest.mark.skipif(not hasattr(kernel.F, "scaled_mm"), reason="this PyTorch has no scaled_mm")
@pytest.mark.parametrize("m, n, k", [(300, 256, 1024), (301, 144, 384)])
def test_scaled_mm_gets_scales_in_the_layout_that_cublaslt_reads(m, n, k, monkeypatch):
    # The block-wise recipe runs on Hopper only; this stand-in checks what PyTorch's documentation asks of it.
    def scaled_mm(a, b, a_scale, a_recipe, b_scale, b_recipe, output_dtype):
        rows, kb, four = a.shape[0], -(-k // 128), -(-k // 512) * 4
        assert rows % 4 == 0 and a.is_contiguous() and b.T.is_contiguous()
        assert a_recipe == recipe.BlockWise1x128 and b_recipe == recipe.BlockWise128x128
        assert a_scale.shape == (rows, kb) and a_scale.stride() == (1, rows)
        assert b_scale.shape == (four, -(-n // 128)) and b_scale.stride() == (1, four)
        return ((a.double() * per_channel(a_scale, k)) @ dequantised(b.T, b_scale[:kb].T).T).to(output_dtype)

    recipe = kernel.F.ScalingType
    monkeypatch.setattr(kernel.F, "scaled_mm", scaled_mm)
    a, a_scale = kernel.act_quant(noise(m, k))
    w, w_scale = kernel.weight_quant(noise(n, k, seed=1))
    expected = kernel.fp8_gemm(a, a_scale, w, w_scale, torch.bfloat16)
    for scale in (a_scale, a_scale.T.contiguous().T):
        ours = kernel._launch_scaled_mm(a, scale, w, w_scale, torch.bfloat16)
        assert ours.shape == (m, n) and relative(ours, expected.double()) <= 4e-3


def test_everything_works_without_triton():
    code = """if True:
        import sys; sys.modules["triton"] = None            # importing it raises ImportError
        import torch, kernel, model, convert, generate
        a, w = kernel.act_quant(torch.ones(2, 128)), kernel.weight_quant(torch.ones(3, 128))
        y = kernel.fp8_gemm(*a, *w, torch.float32)
        print(kernel.triton, (y - 128).abs().max().item() < 1e-3, kernel.default_mode(y.device))"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "None True dequant", run.stderr


# Whole models


def dequantised_twin(path, out):
    """HuggingFace's model of the FP8 checkpoint in `path`, from weights dequantised by the formula above."""
    tensors = load_file(path / "model.safetensors")
    scales = {key.removesuffix("_scale_inv"): t for key, t in tensors.items() if key.endswith("_scale_inv")}
    plain = {key: (dequantised(t, scales[key]) if key in scales else t).float()
             for key, t in tensors.items() if not key.endswith("_scale_inv")}
    out.mkdir()
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((path / "config.json").read_text())
    tiny.edit_config(out, quantization_config=..., dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std().clamp(min=1)


@pytest.fixture(scope="module", params=[{}, {"kv_lora_rank": 512},
                                        {"q_lora_rank": None, "n_shared_experts": 2},
                                        {"n_shared_experts": 0}],
                ids=["whole blocks", "576-row edge block", "no q-lora", "no shared expert"])
def checkpoint(request, tmp_path_factory):
    """An FP8 checkpoint with a zero block, in 3 files with scales away from their weights, and its oracle's
    logits."""
    path = tmp_path_factory.mktemp("fp8") / "checkpoint"
    config = tiny.deepseek(**request.param)
    model = tiny.randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[128:256, :128] = 0
    model.save_pretrained(path)
    tiny.quantise(path)
    twin = dequantised_twin(path, path.parent / "twin")
    tiny.split_file(path, 3)
    with torch.no_grad():
        return path, twin(TOKENS).logits


def test_dequantised_weights_give_the_logits_of_the_dequantised_model(checkpoint):
    path, expected = checkpoint
    model = tiny.load(path, fp8="dequant")
    assert_same(tiny.logits(model, TOKENS), expected)
    assert_same(tiny.logits(model, TOKENS, [100, 1, 19]), expected)
    assert model.layers[0].ffn.w1.weight.dtype == torch.float8_e4m3fn       # and stays FP8 in memory


def test_weights_dequantised_at_load_give_the_same_logits(checkpoint):
    path, expected = checkpoint
    model = tiny.load(path, fp8="bf16")
    assert_same(tiny.logits(model, TOKENS), expected)
    assert {t.dtype for name, t in model.state_dict().items()} == {torch.float32}       # the run's dtype
    half = tiny.load(path, fp8="bf16", dtype=torch.bfloat16).layers[1].ffn.experts.w1
    assert half.weight.dtype == torch.bfloat16 and half.scale is None


@pytest.mark.parametrize("option, gpu, mode", [("auto", False, "dequant"), ("auto", True, "gemm"),
                                               ("bf16", True, "bf16"), ("dequant", True, "dequant")])
def test_the_command_line_chooses_by_device_unless_told(option, gpu, mode, checkpoint, monkeypatch):
    if gpu:
        monkeypatch.setattr(kernel, "path", lambda device, multiply=True: "triton")
    args = generate.parse_args(["--ckpt-path", str(checkpoint[0]), "--interactive", "--fp8", option])
    ranks = SimpleNamespace(device=torch.device("cpu"), tp=Shard())
    cfg = load_config(checkpoint[0] / "config.json")
    model = Transformer(cfg, generate.runtime(args, cfg, ranks, rows=1, max_seq_len=8))
    assert model.rt.fp8 == mode and model.layers[1].ffn.grouped == (mode == "gemm")


def test_huggingface_dequantises_to_the_same_model(tmp_path):
    tiny.write(tmp_path, tiny.deepseek())
    tiny.quantise(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    theirs = theirs.float().eval()
    theirs.set_experts_implementation("eager")
    with torch.no_grad():
        assert_same(tiny.logits(tiny.load(tmp_path), TOKENS), theirs(TOKENS).logits)


def test_fp8_activations_give_the_logits_of_a_float64_linear_on_quantised_operands(checkpoint, monkeypatch):
    # The same model, but every FP8 linear is the float64 formula: what the activations lose, both lose.
    path, dequantised_logits = checkpoint

    def oracle(a, a_scale, w, w_scale, dtype):
        exact = (a.double() * per_channel(a_scale, w.shape[1])) @ dequantised(w, w_scale).T
        return exact.to(dtype)

    model = tiny.load(path, fp8="gemm")
    ours = tiny.logits(model, TOKENS[:1, :1])                # one token: no rounding can flip a later routing
    monkeypatch.setattr(core.kernel, "fp8_gemm", oracle)
    assert_same(ours, tiny.logits(model, TOKENS[:1, :1]))
    error = (ours - dequantised_logits[:1, :1]).abs().mean()
    assert 1e-3 < error < 0.5 * dequantised_logits.std()       # activations really were quantised, and mildly


@pytest.mark.parametrize("grouped", [False, True])
def test_a_checkpoint_that_asks_for_it_has_activation_scales_that_are_powers_of_two(grouped, checkpoint,
                                                                                    tmp_path, monkeypatch):
    """DeepSeek-V3.1 does ("scale_fmt"); R1, whose files are like the fixture's, does not."""
    path, ue8m0 = checkpoint[0], tmp_path / "ue8m0"
    shutil.copytree(path, ue8m0)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    tiny.edit_config(ue8m0, quantization_config={**config, "scale_fmt": "ue8m0"})
    scales, original = [], kernel.act_quant
    monkeypatch.setattr(kernel, "act_quant", lambda *args: scales.append(original(*args)) or scales[-1])
    for folder, powers in ((path, False), (ue8m0, True)):
        model = tiny.load(folder, fp8="gemm")
        for layer in model.layers[1:]:
            layer.ffn.grouped = grouped
        tiny.logits(model, TOKENS[:1, :8])
        used = torch.cat([scale.flatten() for _, scale in scales])
        is_power = used.log2() == used.log2().round()
        assert is_power.all() if powers else is_power.float().mean() < 0.1
        scales.clear()


def test_a_linear_layer_on_fp8_activations_equals_the_float64_formula(checkpoint):
    path, _ = checkpoint
    layer = tiny.load(path, fp8="gemm").layers[0].ffn.w2
    x = noise(9, 512)
    q, scale = kernel.act_quant(x)
    expected = (q.double() * per_channel(scale, 512)) @ dequantised(layer.weight, layer.scale).T
    assert relative(layer(x), expected) <= 1e-6
