"""Claim: the eight configs are the published models, to the parameter and to the byte.

Models are built without memory (parameters on the meta device). Counts and bytes are those of the published
checkpoints; R1's tensors sum to the size of the published files.
"""
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from convert import config_from_hf, load_config
from model import Config, Runtime, Shard, Transformer

ROOT = Path(__file__).parent.parent
R1 = ROOT / "config_671B.json"
PARAMETERS = {
    R1: 671_026_404_352,
    ROOT / "configs/distill_qwen_1.5b.json": 1_777_088_000,
    ROOT / "configs/distill_qwen_7b.json": 7_615_616_512,
    ROOT / "configs/distill_qwen_14b.json": 14_770_033_664,
    ROOT / "configs/distill_qwen_32b.json": 32_763_876_352,
    ROOT / "configs/distill_llama_8b.json": 8_030_261_248,
    ROOT / "configs/distill_llama_70b.json": 70_553_706_496,
}
LEGAL = {"1.5b": [1, 2], "7b": [1, 2, 4], "671B": [1, 2, 4, 8, 16]}

# config.json of DeepSeek-R1 as published, with its old-style keys
R1_HF = dict(
    architectures=["DeepseekV3ForCausalLM"],
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, num_hidden_layers=61,
    num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=18432,
    moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
    topk_group=4, first_k_dense_replace=3, moe_layer_freq=1, norm_topk_prob=True, routed_scaling_factor=2.5,
    scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=1, rms_norm_eps=1e-6,
    hidden_act="silu", attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False,
    max_position_embeddings=163840, rope_theta=10000, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    ep_size=1, initializer_range=0.02, transformers_version="4.46.3", use_cache=True, pretraining_tp=1,
    rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32,
                      beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
    quantization_config=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                             weight_block_size=[128, 128]))
FP8 = R1_HF["quantization_config"]


def dense_hf(family, dim, inter, layers, heads, kv_heads, vocab, theta, eps, **more) -> dict:
    return dict(model_type=family, hidden_size=dim, intermediate_size=inter, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab, rope_theta=theta,
                rms_norm_eps=eps, hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16",
                max_position_embeddings=131072, **more)


QWEN = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=21, use_mrope=False)
LLAMA = dict(attention_bias=False, mlp_bias=False, head_dim=128, rope_scaling=dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192))
DISTILLS_HF = {
    "qwen_1.5b": dense_hf("qwen2", 1536, 8960, 28, 12, 2, 151936, 10000, 1e-6, **QWEN),
    "qwen_7b": dense_hf("qwen2", 3584, 18944, 28, 28, 4, 152064, 10000, 1e-6, **QWEN),
    "qwen_14b": dense_hf("qwen2", 5120, 13824, 48, 40, 8, 152064, 1000000.0, 1e-5, **QWEN),
    "qwen_32b": dense_hf("qwen2", 5120, 27648, 64, 40, 8, 152064, 1000000.0, 1e-5, **QWEN),
    "llama_8b": dense_hf("llama", 4096, 14336, 32, 32, 8, 128256, 500000.0, 1e-5, **LLAMA),
    "llama_70b": dense_hf("llama", 8192, 28672, 80, 64, 8, 128256, 500000.0, 1e-5, **LLAMA),
}


@pytest.mark.parametrize("path, count", PARAMETERS.items(), ids=[path.stem for path in PARAMETERS])
def test_parameter_count_is_the_published_one(path, count):
    model = Transformer(load_config(path), Runtime())
    assert sum(p.numel() for p in model.parameters()) == count


def test_r1_and_r1_zero_share_one_config_and_all_eight_models_are_covered():
    assert len(PARAMETERS) == 7 and len(list((ROOT / "configs").glob("distill_*.json"))) == 6


@pytest.mark.parametrize("fp8, ranks, n_bytes", [
    (True, 1, 673_150_611_808), (True, 8, 85_140_130_848), (True, 16, 43_139_382_208),
    (False, 8, 169_560_743_936), (False, 16, 85_811_306_496)])
def test_r1_takes_the_published_bytes_per_rank(fp8, ranks, n_bytes):
    cfg = replace(load_config(R1), fp8=fp8)
    model = Transformer(cfg, Runtime(tp=Shard(0, ranks)))
    assert sum(t.nbytes for t in model.state_dict().values()) == n_bytes


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda path: path.stem)
def test_legal_ranks(path):
    cfg = load_config(path)
    expected = next((ranks for name, ranks in LEGAL.items() if path.stem.endswith("_" + name)), [1, 2, 4, 8])
    assert cfg.legal_ranks() == expected
    legal = ", ".join(map(str, expected))
    with pytest.raises(ValueError, match=f"cannot be cut over 3 ranks; it can over {legal}"):
        Transformer(cfg, Runtime(tp=Shard(0, 3)))


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_dense"])
def test_the_tiny_shapes_can_be_cut_like_the_real_ones(name):
    cfg = load_config(ROOT / f"configs/{name}.json")
    for ranks in (1, 2, 4):
        assert Transformer(cfg, Runtime(tp=Shard(0, ranks))).cfg == cfg


CUTS = {        # settings in which the key named is the only one that 2 ranks cannot cut
    "vocab_size": dict(vocab_size=257), "n_heads": dict(n_heads=3, fp8=False),
    "inter_dim": dict(inter_dim=384), "moe_inter_dim": dict(moe=dict(moe_inter_dim=384)),
    "wq_b": dict(mla=dict(qk_rope_head_dim=32)),
    "wkv_b": dict(mla=dict(qk_nope_head_dim=96, qk_rope_head_dim=32)),
    "wo": dict(mla=dict(qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=32)),
    "n_kv_heads": dict(mla=None, moe=None, fp8=False, gqa=dict(n_kv_heads=1, head_dim=64, qkv_bias=True))}


@pytest.mark.parametrize("change", CUTS.values(), ids=CUTS.keys())
def test_every_dimension_that_ranks_share_must_be_cut_evenly(change):
    base = json.loads((ROOT / "configs/tiny_moe.json").read_text())
    base |= dict(fp8=True, inter_dim=512, moe=dict(base["moe"], moe_inter_dim=256))
    assert 2 in Config.from_dict(base).legal_ranks()
    changed = {**base, **{key: {**base[key], **value} if isinstance(value, dict) and base.get(key) else value
                          for key, value in change.items()}}
    assert 2 not in Config.from_dict(changed).legal_ranks()


def test_dequantised_r1_can_use_32_ranks():
    assert 32 in replace(load_config(R1), fp8=False).legal_ranks()


def test_the_published_huggingface_configs_are_ours():
    assert config_from_hf(R1_HF) == load_config(R1)
    for name, hf in DISTILLS_HF.items():
        assert config_from_hf(hf) == load_config(ROOT / f"configs/distill_{name}.json")


def test_settings_without_a_value_and_scales_of_v31_are_read():
    nothing = {**R1_HF["rope_scaling"], "attention_factor": None, "rope_theta": None}
    assert config_from_hf({**R1_HF, "rope_scaling": nothing}) == load_config(R1)
    v31 = config_from_hf({**R1_HF, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}})
    assert v31 == replace(load_config(R1), ue8m0=True)


def test_a_context_that_yarn_stretches_is_as_long_as_it_says():
    """Qwen's own advice adds rope_scaling to a config.json, and nothing else."""
    yarn = dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)
    hf = {**DISTILLS_HF["qwen_7b"], "max_position_embeddings": 32768}
    assert config_from_hf(hf).context_len == 32768
    assert config_from_hf({**hf, "rope_scaling": yarn}).context_len == 131072


def test_new_style_keys_mean_the_same():
    old = ("rope_theta", "rope_scaling", "torch_dtype")
    new = {key: value for key, value in R1_HF.items() if key not in old}
    scaling = {key: value for key, value in R1_HF["rope_scaling"].items() if key != "type"}
    new |= dict(dtype="bfloat16", rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, **scaling},
                head_dim=64, qk_head_dim=192, rope_interleave=True)
    assert config_from_hf(new) == load_config(R1)


@pytest.mark.parametrize("change, named", [
    (dict(frobnicate=1), "frobnicate"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(model_type="mistral"), "mistral"),
    (dict(scoring_func="softmax"), "scoring_func"), (dict(topk_method="greedy"), "topk_method"),
    (dict(attention_bias=True), "attention_bias"), (dict(rope_interleave=False), "rope_interleave"),
    (dict(rope_scaling=dict(type="dynamic", factor=2)), "dynamic"),
    (dict(rope_scaling=dict(type="yarn", factor=2)), "original_max_position_embeddings"),
    (dict(rope_scaling=dict(type="yarn", factor=None, original_max_position_embeddings=4096)), "'factor'"),
    (dict(rope_scaling=dict(R1_HF["rope_scaling"], truncate=False)), "truncate"),
    (dict(quantization_config=dict(quant_method="gptq")), "quant_method"),
    (dict(quantization_config=dict(quant_method="fp8", weight_block_size=[64, 64])), "weight_block_size"),
    (dict(quantization_config={**FP8, "fmt": "e5m2"}), "quantization_config.fmt' is 'e5m2'"),
    (dict(quantization_config={**FP8, "activation_scheme": "static"}), "activation_scheme"),
    (dict(quantization_config={**FP8, "scale_fmt": "e4m3"}), "'float', 'ue8m0'"),
    (dict(rope_parameters={**R1_HF["rope_scaling"], "factor": 8}),
     "'rope_scaling' and 'rope_parameters' differ"),
    (dict(layer_types=[["full_attention"]]), "layer_types"),
    (dict(rope_scaling=dict(rope_type=["x"])), "rope type"), (dict(rms_norm_eps=math.nan), "rms_norm_eps"),
    (dict(hidden_size=...), "hidden_size"), (dict(rope_theta=...), "rope_theta"),
    (dict(torch_dtype=...), "dtype"),
    (dict(torch_dtype="int8"), "int8"), (dict(n_group=7), "n_expert_groups"),
    (dict(num_experts_per_tok=999), "999"),
    (dict(vocab_size="many"), "vocab_size")])
def test_a_huggingface_config_that_does_not_fit_is_refused_by_name(change, named):
    changed = {key: value for key, value in {**R1_HF, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=named):
        config_from_hf(changed)


@pytest.mark.parametrize("change, named", [
    (dict(quantization_config={**FP8, "fmt": "e5m2"}), "key 'quantization_config.fmt' is 'e5m2'"),
    (dict(n_layers=28), "unknown key 'n_layers' (value 28)"), (dict(theta=1e4), "unknown key 'theta'"),
    (dict(rope_scaling=dict(R1_HF["rope_scaling"], beta_fast="x")), "key 'beta_fast' is 'x'"),
    (dict(tie_word_embeddings=1), "key 'tie_word_embeddings' is 1"),
    (dict(n_group="x"), "key 'n_group' is 'x'"), (dict(rope_theta="x"), "key 'rope_theta' is 'x'")])
def test_a_refusal_has_the_name_of_the_key_in_the_file(change, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**R1_HF, **change}))
    with pytest.raises(ValueError, match=re.escape(f"config.json: {named}")):
        load_config(tmp_path / "config.json")


def test_a_dense_checkpoint_with_a_sliding_window_is_refused():
    with pytest.raises(ValueError, match="use_sliding_window"):
        config_from_hf({**DISTILLS_HF["qwen_7b"], "use_sliding_window": True})
    with pytest.raises(ValueError, match="layer_types"):
        config_from_hf({**DISTILLS_HF["qwen_7b"], "layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize("change, named", [
    (lambda d: d.update(surprise=1), "unknown key 'surprise'"),
    (lambda d: d["moe"].update(surprise=1), "unknown key 'moe.surprise'"),
    (lambda d: d.pop("dim"), "missing key 'dim'"),
    (lambda d: d["mla"].pop("v_head_dim"), "missing key 'mla.v_head_dim'"),
    (lambda d: d.update(dim="7168"), "key 'dim' is '7168'; it must be int"),
    (lambda d: d.update(fp8=1), "key 'fp8' is 1; it must be bool"),
    (lambda d: d["moe"].update(n_expert_groups=0), "key 'moe.n_expert_groups' is 0; it must be a positive"),
    (lambda d: d["moe"].update(n_shared_experts=-1), "moe.n_shared_experts"),
    (lambda d: d["moe"].update(n_limited_groups=9), "n_limited_groups 9 be at most n_expert_groups"),
    (lambda d: d["moe"].update(n_activated_experts=129), "between 1 and the 128 experts of 4 groups"),
    (lambda d: d["mla"].update(kv_lora_rank=-64), "mla.kv_lora_rank"),
    (lambda d: d["rope"].update(beta_fast=0), "rope.beta_fast"),
    (lambda d: d["rope"].update(theta=1.0), "rope.theta is 1.0"),
    (lambda d: d["rope"].update(low_freq_factor=4.0), "rope.low_freq_factor is 4.0"),
    (lambda d: d["rope"].update(kind="plain"), "rope.mscale_all_dim is 1.0; only kind yarn"),
    (lambda d: d.update(norm_eps=math.nan), "key 'norm_eps' is nan"),
    (lambda d: d.update(mla=None), "'gqa' and 'mla'"),
    (lambda d: d.update(mla=None, gqa=dict(n_kv_heads=3, head_dim=64, qkv_bias=False)),
     "n_heads 128 is no multiple of gqa.n_kv_heads 3"),
    (lambda d: d.update(rope=7), "rope.* is 7"), (lambda d: d["rope"].update(factor=0.5), "needs factor >= 1"),
    (lambda d: d.update(dtype="int4"), "int4"), (lambda d: d["rope"].update(kind="spiral"), "spiral"),
    (lambda d: d["mla"].update(qk_rope_head_dim=63), "63 must be even")])
def test_our_own_config_is_strict_about_keys_and_types(change, named, tmp_path):
    data = json.loads(R1.read_text())
    change(data)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=named) as error:
        load_config(tmp_path / "config.json")
    assert "config.json" in str(error.value)


def test_a_config_is_recognised_as_huggingfaces_or_ours(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(R1_HF))
    assert load_config(path) == load_config(R1)
    for text in ("", "[1]", "{", "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            load_config(path)


def test_configs_that_transformers_writes_are_understood(tmp_path):
    for config in (tiny.deepseek(), tiny.qwen2(), tiny.llama()):
        config.dtype = "float32"
        config.save_pretrained(tmp_path)
        assert load_config(tmp_path / "config.json").n_layers == 3
