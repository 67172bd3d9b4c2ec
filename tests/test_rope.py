"""Claim: rotary frequencies, YaRN's and llama3's scaling and the softmax scale are the ones of the
checkpoints.

V2 Eq. 14-15, YaRN Definition 2 and section 3.4. The numbers were worked out by hand from R1's and Llama's
settings; HuggingFace's functions are a second witness. Tolerance 1e-6 relative: fp32 powers and divisions,
nothing summed.
"""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from convert import config_from_hf, load_config
from model import MLA, Runtime, apply_rope, both_angles, rope_frequencies, yarn_mscale

ROOT = Path(__file__).parent.parent
R1 = load_config(ROOT / "config_671B.json")
LLAMA = load_config(ROOT / "configs/distill_llama_8b.json")


def as_saved(hf) -> dict:
    return {"dtype": "float32", **json.loads(hf.to_json_string())}


def test_plain_frequencies_fall_from_1_to_1_over_theta():
    freqs, factor = rope_frequencies(load_config(ROOT / "configs/distill_qwen_7b.json").rope, 128)
    expected = torch.tensor([10000.0 ** (-2 * j / 128) for j in range(64)])
    assert_close(freqs, expected, rtol=1e-6, atol=0)
    assert factor == 1.0


def test_yarn_of_r1_keeps_pairs_to_10_slows_pairs_from_23_and_blends_between():
    freqs, factor = rope_frequencies(R1.rope, 64)
    plain = torch.tensor([10000.0 ** (-2 * j / 64) for j in range(32)])
    assert_close(freqs[:11], plain[:11], rtol=1e-6, atol=0)
    assert_close(freqs[23:], plain[23:] / 40, rtol=1e-6, atol=0)
    by_hand = {10: 0.0562341288, 11: 0.0390069261, 16: 0.0055000004, 22: 1.77827940e-4, 23: 3.33380340e-5,
               31: 3.33380353e-6}
    for pair, value in by_hand.items():
        assert math.isclose(freqs[pair], value, rel_tol=1e-6)
    assert factor == 1.0


def test_llama3_scaling_keeps_short_waves_slows_long_ones_and_blends_between():
    freqs, factor = rope_frequencies(LLAMA.rope, 128)
    plain = torch.tensor([500000.0 ** (-2 * j / 128) for j in range(64)])
    blended = [0.828168, 0.643743, 0.493507, 0.371122, 0.271425, 0.190211]
    ratios = torch.tensor([1.0] * 29 + blended + [1 / 8] * 29)
    assert_close(freqs, plain * ratios, rtol=3e-6, atol=0)
    assert math.isclose(freqs[29], 2.16657063e-3, rel_tol=1e-6)
    assert math.isclose(freqs[35], 9.55621217e-5, rel_tol=1e-6)
    assert factor == 1.0


@pytest.mark.parametrize("more", [{"mscale": 0.707, "mscale_all_dim": 0.707}, {"mscale_all_dim": 0.707}, {},
                                  {"mscale_all_dim": None}, {"mscale": None, "mscale_all_dim": None},
                                  {"mscale": 0.707, "mscale_all_dim": None},
                                  {"beta_fast": 1, "beta_slow": 32}, {"original_max_position_embeddings": 1}])
def test_frequencies_and_factor_equal_huggingface(more):
    scaling = {**tiny.YARN, **more}
    hf = tiny.deepseek(rope_scaling={key: value for key, value in scaling.items() if value is not None})
    ours, factor = rope_frequencies(config_from_hf(as_saved(hf)).rope, 64)
    theirs, their_factor = ROPE_INIT_FUNCTIONS["yarn"](hf, device="cpu")
    assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert math.isclose(factor, their_factor, rel_tol=1e-12)


def test_llama3_frequencies_equal_huggingface():
    hf = tiny.llama()
    ours, _ = rope_frequencies(config_from_hf(as_saved(hf)).rope, 16)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, device="cpu")
    assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_softmax_scale_carries_the_square_of_mscale():
    one_layer = replace(R1, n_layers=1)
    assert math.isclose(yarn_mscale(40, 1.0), 1.3688879454, rel_tol=1e-10)
    assert math.isclose(MLA(one_layer, Runtime()).scale, 0.1352337789, rel_tol=1e-9)
    v2_lite = replace(one_layer, rope=replace(R1.rope, mscale=0.707, mscale_all_dim=0.707))
    assert math.isclose(MLA(v2_lite, Runtime()).scale, 0.1147213868, rel_tol=1e-9)
    unscaled = replace(one_layer, rope=replace(R1.rope, mscale_all_dim=0.0))
    assert math.isclose(MLA(unscaled, Runtime()).scale, 192 ** -0.5, rel_tol=1e-12)


@pytest.mark.parametrize("compiling", [False, True])
def test_rotation_equals_complex_multiplication_in_float64(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator)
    angles = torch.randn(2, 5, 1, 4, generator=generator)
    rotated = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(
        torch.ones_like(angles).double(), angles.double())
    expected = torch.view_as_real(rotated).flatten(-2).float()
    angles = both_angles(angles)
    assert_close(apply_rope(x, angles.cos(), angles.sin()), expected, rtol=1e-5, atol=1e-6)


def test_scores_depend_on_the_distance_only():
    freqs, _ = rope_frequencies(R1.rope, 64)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))

    def score(at: int, of: int) -> float:
        turned = [apply_rope(x, both_angles(freqs * p).cos(), both_angles(freqs * p).sin())
                  for x, p in ((q, at), (k, of))]
        return (turned[0] * turned[1]).sum().item()

    assert math.isclose(score(1000, 990), score(10, 0), abs_tol=1e-3)     # fp32 angles near 1000: 6e-5 each
    assert abs(score(1000, 990) - score(1000, 900)) > 0.1
