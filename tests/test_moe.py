"""Claim: the gate chooses and weighs experts as V3 section 2.1.2 says (Eq. 12-16), and only chosen experts
are read.

References: HuggingFace's router, with a correction bias of both signs (it is zero when freshly initialised,
which would hide every mistake about it), and a dense float64 sum over all experts. Choices must be equal;
weights and sums within 1e-6 and 1e-5 of their scale, the precision of fp32 sums over 256 channels.
"""
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensorMode)
from torch.testing import assert_close

import kernel
import products
from convert import load_config
from model import Config, Gate, MoE, Runtime

ROOT = Path(__file__).parent.parent
TINY = load_config(ROOT / "configs/tiny_moe.json")
RUN = Runtime(dtype=torch.float32)
X = torch.randn(500, 256, generator=torch.Generator().manual_seed(3))


def gate(bias: torch.Tensor, cfg: Config = TINY) -> Gate:
    made = Gate(cfg, RUN)
    weight = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(4)) / cfg.dim ** 0.5
    made.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return made


def noise(n: int, mean: float = 0.0) -> torch.Tensor:
    return mean + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("mean", [0.0, -0.6, -1.0])
def test_gate_equals_huggingface_for_biases_of_both_signs(mean):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    ours, theirs = gate(noise(16, mean)), DeepseekV3TopkRouter(tiny.deepseek())
    theirs.load_state_dict({"weight": ours.weight, "e_score_correction_bias": ours.bias})
    weights, experts = ours(X)
    with torch.no_grad():
        _, their_weights, their_experts = theirs(X)
    order, their_order = experts.argsort(-1), their_experts.argsort(-1)
    assert torch.equal(experts.gather(1, order), their_experts.gather(1, their_order))
    assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-6, atol=1e-6)


def test_dropped_groups_never_win_however_negative_the_bias():
    # 16 experts in 4 groups, 2 of them kept: with every score below 0, a mask of 0 would prefer the dropped
    # ones.
    _, experts = gate(noise(16, -2.0))(X)
    assert all(len(set(row)) <= 2 for row in (experts // 4).tolist())


def test_a_group_is_judged_by_its_two_best_experts():
    bias = torch.zeros(16)
    bias[0] = 3.0                               # one outstanding expert in group 0: 3.5 + 0.5
    bias[4:6] = 2.5                             # two good ones in group 1: 3.0 + 3.0
    bias[8:10] = 2.4                            # and in group 2: 2.9 + 2.9
    _, experts = gate(bias)(torch.zeros(1, 256))
    assert set((experts // 4).flatten().tolist()) == {1, 2}


def test_the_bias_chooses_but_does_not_weigh():
    bias = torch.zeros(16)
    bias[13] = 5.0
    plain, biased = gate(torch.zeros(16)), gate(bias)
    weights, experts = biased(X)
    assert (experts == 13).any(-1).all() and not (plain(X)[1] == 13).any(-1).all()
    scores = (X.double() @ biased.weight.double().T).sigmoid().gather(1, experts)  # V3 Eq. 15
    expected = 2.5 * scores / scores.sum(-1, keepdim=True)                      # V3 Eq. 13
    assert_close(weights.double(), expected, rtol=1e-6, atol=1e-6)


def moe() -> MoE:
    made = MoE(TINY, RUN)
    generator = torch.Generator().manual_seed(6)
    made.load_state_dict({name: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5
                          for name, t in made.state_dict().items()}, assign=True)
    return made


def with_amx(monkeypatch) -> list:
    """As on a CPU with AMX, in fp32. Returns a list that will hold the shape of each product of a stack."""
    shapes, grouped = [], products.grouped
    monkeypatch.setattr(products, "multiplies_tiles", lambda x: True)
    monkeypatch.setattr(products, "grouped", lambda x, w, ends: shapes.append(w.shape) or grouped(x, w, ends))
    return shapes


@pytest.mark.parametrize("n, amx, offset", [(500, False, 0), (500, True, 0), (100, True, 0), (500, True, 1)],
                         ids=["one by one", "many with AMX", "few with AMX", "AMX, weights anywhere"])
def test_the_sum_over_chosen_experts_equals_a_dense_float64_sum_over_all(n, amx, offset, monkeypatch):
    """With AMX in three products of all experts, W x^T for few tokens, if the last stack, too, begins where
    PyTorch wants it."""
    shapes, layer, tokens = with_amx(monkeypatch) if amx else [], moe(), X[:n]
    w2 = layer.experts.w2
    elsewhere = torch.empty(w2.weight.numel() + offset)[offset:].view_as(w2.weight).copy_(w2.weight)
    w2.weight = torch.nn.Parameter(elsewhere, requires_grad=False)
    weights, experts = layer.gate(tokens)
    dense = torch.zeros(n, 16, dtype=torch.float64).scatter(1, experts, weights.double())    # [n, e]
    x = tokens.double()

    def mlp(w1, w2, w3):
        gated = x @ w1.double().T
        return (gated * gated.sigmoid() * (x @ w3.double().T)) @ w2.double().T

    shared, routed = layer.shared, layer.experts
    expected = mlp(shared.w1.weight, shared.w2.weight, shared.w3.weight)
    for e in range(16):
        out = mlp(routed.w1.weight[e], routed.w2.weight[e], routed.w3.weight[e])
        expected += dense[:, e, None] * out                                     # V3 Eq. 12
    ours = layer(tokens.view(5, -1, 256)).view(n, 256)
    assert (ours - expected).abs().max() <= 1e-5 * expected.std()
    assert len(shapes) == (3 if amx and not offset else 0)


@pytest.mark.parametrize("amx", [False, True])
def test_experts_that_nobody_chose_are_not_read(amx, monkeypatch):
    if amx:
        with_amx(monkeypatch)
    layer, x = moe(), X[:3].view(1, 3, 256)
    expected = layer(x)
    _, hit = layer.gate(X[:3])
    for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
        idle = [e for e in range(16) if e not in hit.unique().tolist()]
        w.weight[idle] = torch.nan
    assert idle and torch.equal(layer(x), expected)


def test_an_experts_choices_are_neighbours_with_amx_in_sixteens(monkeypatch):
    ids = torch.tensor([[2, 0], [0, 3], [2, 0]])
    x, rows, ends = products.by_expert(X[:3], ids, 4)
    assert rows.tolist() == [[3, 0], [1, 5], [4, 2]] and ends.tolist() == [3, 3, 5, 6]
    assert torch.equal(x, X[[0, 1, 2, 0, 2, 1]])
    with_amx(monkeypatch)
    x, rows, ends = products.by_expert(X[:3], ids, 4)
    assert rows.tolist() == [[30, 13], [14, 47], [31, 15]] and ends.tolist() == [16, 16, 32, 48]
    assert len(x) == 64 and torch.equal(x[rows], X[:3, None].expand(3, 2, 256))
    assert products.can_group(X, torch.empty(4, 12, 256))
    assert not products.can_group(X, torch.empty(4, 256, 12))


def fp8_moe() -> MoE:
    """The layer above in FP8: each matrix quantised by itself."""
    made, plain = MoE(replace(TINY, fp8=True), Runtime(dtype=torch.float32, fp8="gemm")), moe().state_dict()
    state = dict(plain)
    for name, t in made.state_dict().items():
        if t.dtype == kernel.FP8:
            pairs = [kernel.weight_quant(w) for w in plain[name].view(-1, *t.shape[-2:])]
            q, scale = map(torch.stack, zip(*pairs))
            state[name], state[name.replace("weight", "scale")] = (x.view(*t.shape[:-2], *x.shape[1:])
                                                                   for x in (q, scale))
    made.load_state_dict(state, assign=True)
    return made


@pytest.mark.parametrize("n", [1, 3, 200])
def test_experts_in_two_launches_add_up_to_the_loops_sum(n):
    layer, x = fp8_moe(), X[None, :n]
    expected = layer(x)
    layer.grouped = True
    ours = layer(x)
    assert (ours - expected).abs().max() <= 1e-5 * expected.std()
    assert ours.dtype == x.dtype and not torch.equal(ours, layer.shared(x))


def test_the_host_does_not_wait_to_hear_which_experts_were_chosen(monkeypatch):
    # Fake tensors have shapes but no numbers: whatever asks for a number, as the loop does, is an error.
    def shapes_only(a, a_scale, weights, scales, groups, dtype):
        return [a.new_empty(len(groups.ids), w.shape[1], dtype=dtype) for w in weights]

    monkeypatch.setattr(kernel, "grouped_fp8_gemm", shapes_only)
    layer = fp8_moe()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 5, 256)
        layer.grouped = True
        assert layer(x).shape == x.shape
        layer.grouped = False
        with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            layer(x)


def test_r1_gate_chooses_8_of_256_from_at_most_4_of_8_groups():
    cfg = load_config(ROOT / "config_671B.json")
    x = torch.randn(64, cfg.dim, generator=torch.Generator().manual_seed(7))
    weights, experts = gate(noise(256), cfg)(x)
    assert experts.shape == (64, 8)
    assert all(len(set(row)) == 8 for row in experts.tolist())
    assert all(len(set(row)) <= 4 for row in (experts // 32).tolist())
    assert_close(weights.sum(-1), torch.full((64,), 2.5))
