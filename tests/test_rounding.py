"""Claim: in a bf16 run the norm and the gate (V3 Eq. 15, 16) round where HuggingFace's do, and rotation only
at its end.

Logits of a bf16 model hide this: rounding alone moves them by 0.03 on average, more than most of these
mistakes do. So each part is compared by itself, and without tolerance: the same operations give the same
bits. Only the gate's weights, fp32 sums over 4 experts in either order, may differ by 1e-6.
"""
import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm, DeepseekV3TopkRouter

import convert
import kernel
import products
from model import MLA, MLP, Gate, RMSNorm, Runtime, Step, apply_rope, both_angles

ROOT = Path(__file__).parent.parent
TINY = convert.load_config(ROOT / "configs/tiny_moe.json")
HALF = Runtime(dtype=torch.bfloat16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_norm_equals_huggingfaces_bit_for_bit(size):
    weight, x = (1 + 0.3 * noise(256)).bfloat16(), (size * noise(500, 256, seed=1)).bfloat16()
    ours, theirs = RMSNorm(256, 1e-6, HALF), DeepseekV3RMSNorm(256, 1e-6).bfloat16()
    ours.load_state_dict({"weight": weight}, assign=True)
    theirs.load_state_dict({"weight": weight})
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_the_gate_decides_in_fp32_like_huggingfaces():
    weight, bias = (noise(16, 256) / 16).bfloat16(), 0.1 * noise(16, seed=1)
    x = noise(2000, 256, seed=2).bfloat16()
    ours, theirs = Gate(TINY, HALF), DeepseekV3TopkRouter(tiny.deepseek())
    ours.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    theirs.load_state_dict({"weight": weight, "e_score_correction_bias": bias})
    weights, experts = ours(x)
    with torch.no_grad():
        _, their_weights, their_experts = theirs(x)
    order, their_order = experts.argsort(-1), their_experts.argsort(-1)
    assert weights.dtype == torch.float32
    assert torch.equal(experts.gather(1, order), their_experts.gather(1, their_order))
    ours, theirs = weights.gather(1, order), their_weights.gather(1, their_order)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    scores = [(x @ weight.T).sigmoid().float(), (x.float() @ weight.float().T).sigmoid()]
    in_bf16, in_fp32 = ((s + bias).topk(4).indices.sort(-1).values for s in scores)
    assert (in_bf16 != in_fp32).any(-1).sum() > 20      # so these tokens tell a bf16 gate from an fp32 one


def test_a_gate_in_fp32_stays_so_as_in_huggingface(tmp_path):
    """HuggingFace keeps it in models that it loads or saves in bf16; rounded, some choices differ."""
    theirs = AutoModelForCausalLM.from_config(tiny.deepseek(), dtype=torch.bfloat16)
    tiny.randomise(theirs).save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").model.layers[1].mlp.gate
    x = noise(2000, 256)
    assert theirs.weight.dtype == torch.float32 and (theirs.weight != theirs.weight.bfloat16()).any()
    convert.convert(convert.Checkpoint(tmp_path / "hf"), tmp_path / "bf16", 1, torch.bfloat16)
    for folder in ("hf", "bf16"):
        ours = tiny.load(tmp_path / folder, dtype=torch.bfloat16).layers[1].ffn.gate
        with torch.no_grad():
            assert torch.equal(ours(x.bfloat16())[1].sort(-1).values, theirs(x.bfloat16())[2].sort(-1).values)
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("compiling", [False, True])
def test_rotation_is_done_in_fp32_and_rounded_once(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, angles = noise(2, 50, 4, 64).bfloat16(), both_angles(100 * noise(2, 50, 1, 32, seed=1))
    cos, sin = angles.cos(), angles.sin()
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())


def test_absorbed_attention_takes_its_softmax_in_fp32(monkeypatch):
    """On a CPU and, where it is written out, on a GPU. PyTorch's kernel for CPUs keeps scores in fp32, too, so
    that only weights and result are rounded (2^-9 each); scores in bf16 alone cost more."""
    attention = MLA(TINY, HALF)
    q_nope, q_pe = 8 * noise(2, 3, 4, 64).bfloat16(), 8 * noise(2, 3, 4, 64, seed=1).bfloat16()
    latents, w = noise(2, 9, 128, seed=2).bfloat16(), (noise(512, 64, seed=3) / 8).bfloat16()
    attention.wkv_b.load_state_dict({"weight": w}, assign=True)
    step = Step(None, torch.zeros(2, 1, 3, 9).bfloat16(), None, None, None)
    w_k, w_v = w.view(4, 128, 64).split(64, dim=1)
    q = torch.cat([torch.einsum("bshd,hdc->bshc", q_nope, w_k), q_pe], dim=-1)

    def after(weights: torch.Tensor) -> torch.Tensor:
        o = torch.einsum("bhst,btc->bshc", weights, latents[..., :64].to(weights.dtype))
        return torch.einsum("bshc,hvc->bshv", o, w_v.to(weights.dtype))

    scores = torch.einsum("bshc,btc->bhst", q, latents)
    weights = (scores.float() * attention.scale).softmax(-1).bfloat16()
    with monkeypatch.context() as gpu:
        gpu.setattr(kernel, "device_kind", lambda device: "sm_80")
        assert torch.equal(attention._absorbed(q_nope, q_pe, latents, step), after(weights))
    assert not torch.equal(weights, (scores * attention.scale).softmax(-1))     # what bf16 would have given
    exact = torch.einsum("bshc,btc->bhst", q.double(), latents.double())
    exact = after((exact * attention.scale).softmax(-1))
    for result, close in ((attention._absorbed(q_nope, q_pe, latents, step), True), (after(weights), False)):
        assert ((result - exact).norm() <= 2 ** -8 * exact.norm()) == close


@pytest.mark.parametrize("avx512, its_bf16, fast", [(True, True, True), (True, False, False),
                                                    (False, False, True)])
def test_bf16_is_multiplied_as_such_where_the_cpu_can(avx512, its_bf16, fast, monkeypatch):
    """oneDNN says yes to three CPUs: Zen 4; Ice Lake, where it converts; an ARM with bf16."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: its_bf16)
    spec = importlib.util.spec_from_file_location("products_of_another_cpu", products.__file__)
    spec.loader.exec_module(other := importlib.util.module_from_spec(spec))
    assert other.MULTIPLIES_BF16 == fast == (not other.fp32_is_faster(torch.empty(1, dtype=torch.bfloat16)))


@pytest.mark.parametrize("rows, n, k", [(5, 3001, 701), (300, 3001, 701), (300, 601, 4101)])
def test_bf16_multiplied_in_fp32_is_rounded_once(rows, n, k, monkeypatch):
    """As on a CPU without bf16 instructions. W has three parts, the last of them shorter. Rounding to bf16
    costs at most 2^-8 of the result, a sum of k products in fp32 k * 2^-24 of the sum of their sizes."""
    monkeypatch.setattr(products, "MULTIPLIES_BF16", False)
    x, w = noise(rows, k).bfloat16(), noise(n, k, seed=1).bfloat16()
    batch, right = noise(3, rows, 64, seed=2).bfloat16(), noise(3, 64, 50, seed=3).bfloat16()
    for result, a, b in ((products.linear(x, w), x, w.T), (products.matmul(batch, right), batch, right)):
        a, b = a.double(), b.double()
        exact, slack = a @ b, a.shape[-1] * 2 ** -24 * (a.abs() @ b.abs())
        assert result.dtype == torch.bfloat16 and result.shape == exact.shape
        assert ((result - exact).abs() <= 2 ** -8 * (exact.abs() + slack) + slack).all()
    assert torch.equal(products.linear(x[:4], w), torch.nn.functional.linear(x[:4], w))       # few rows


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 50), (1, 100), (2, 100)])
def test_products_for_amx_are_the_product_rounded_once(shape, monkeypatch):
    """As W x^T; a row as W x. The tolerance is that of the test above; the bias is added to a rounded sum."""
    monkeypatch.setattr(products, "MULTIPLIES_BF16", True)
    monkeypatch.setattr(products, "AMX", True)
    sizes = (*shape, 700), (601, 700), (601,)
    x, w, bias = (noise(*size, seed=i).bfloat16() for i, size in enumerate(sizes))
    exact = x.double() @ w.double().T
    slack = 700 * 2 ** -24 * (x.double().abs() @ w.double().abs().T)
    result = products.linear(x, w)
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    assert ((result - exact).abs() <= 2 ** -8 * (exact.abs() + slack) + slack).all()
    assert torch.equal(products.linear(x, w, bias), result + bias)
    if x.shape[:-1].numel() > 4:                    # a compiled step does the same, though not for very many
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(products, "matvec", None)
        compiled = products.linear(x, w)
        assert ((compiled - exact).abs() <= 2 ** -8 * (exact.abs() + slack) + slack).all()
        assert torch.equal(compiled, result) or x.shape[:-1].numel() > 64


def test_with_amx_an_mlp_takes_many_rows_in_pieces_and_sixteens(monkeypatch):
    """Against float64: bf16 rounds by 2^-9 at most, here four times on the way. Where weights do not begin
    with a cache line, rows are taken together, 65 or more by F.linear. Pieces are filled up to sixteens."""
    monkeypatch.setattr(products, "MULTIPLIES_BF16", True)
    monkeypatch.setattr(products, "AMX", True)
    mlp, seen, linear = MLP(3 * 256, TINY, HALF), [], products.linear
    monkeypatch.setattr(products, "linear",
                        lambda x, *args: seen.append(x.shape[:-1].numel()) or linear(x, *args))
    for offset, rows in ((0, [256, 256, 96]), (16, [600])):
        for i, (name, t) in enumerate(mlp.state_dict().items()):
            buffer = torch.empty(t.numel() + offset, dtype=torch.bfloat16)
            w = buffer[offset:].view(t.shape).copy_(noise(*t.shape, seed=i) / t.shape[-1] ** 0.5)
            mlp.load_state_dict({name: w}, strict=False, assign=True)
        x, seen[:] = noise(600, TINY.dim, seed=3).bfloat16(), []
        w1, w2, w3 = (part.weight.double() for part in (mlp.w1, mlp.w2, mlp.w3))
        gate = x.double() @ w1.T
        exact = (gate * gate.sigmoid() * (x.double() @ w3.T)) @ w2.T
        error = mlp(x.view(2, 300, -1)).view_as(x) - exact
        assert (error.norm(dim=-1) <= 2 ** -7 * exact.norm(dim=-1)).all() and seen[::3] == rows
        full = torch.nn.functional.linear(x[:65], mlp.w1.weight)
        assert products.in_lines(mlp.w1.weight) == (offset == 0)
        assert offset == 0 or torch.equal(linear(x[:65], mlp.w1.weight), full)
    assert [products.spare_rows(rows, x) for rows in (1, 8, 9, 16, 33)] == [0, 0, 7, 0, 15]
    assert products.spare_rows(33, x.float()) == 0
