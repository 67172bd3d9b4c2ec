"""Small random checkpoints for the tests, written by transformers and read back through convert.py.

HuggingFace's initialisation (std 0.02, zero biases) hides bugs: a wrong RoPE moves its logits by 4 %. Every
tensor gets a useful scale here, and original context lengths are short, so that scaled RoPE is exercised.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel, Qwen2Config

import kernel
from convert import Checkpoint, load_model
from model import Cache, Runtime, Shard, Transformer

YARN = dict(type="yarn", factor=40, original_max_position_embeddings=64, beta_fast=32, beta_slow=1,
            mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
FP8_MODULES = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
               "gate_proj", "up_proj", "down_proj")
PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(),
                          reason="needs Linux' /proc, which says what memory a process takes")


def deepseek(**changes) -> DeepseekV3Config:
    """A DeepSeek-V3 of 3 layers, the first one dense, which FP8 cuts into whole blocks."""
    settings = dict(
        vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=128, kv_lora_rank=64, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64,
        n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1,
        first_k_dense_replace=1, routed_scaling_factor=2.5, num_nextn_predict_layers=0,
        max_position_embeddings=2560, rope_theta=10000.0, rope_scaling=YARN)
    return DeepseekV3Config(**{**settings, **changes})


def qwen2(**changes) -> Qwen2Config:
    settings = dict(vocab_size=256, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
                    num_attention_heads=6, num_key_value_heads=2, rope_theta=10000.0,
                    tie_word_embeddings=False)
    return Qwen2Config(**{**settings, **changes})


def llama(**changes) -> LlamaConfig:
    settings = dict(vocab_size=256, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
                    num_attention_heads=6, num_key_value_heads=2, rope_theta=500000.0, rope_scaling=LLAMA3,
                    max_position_embeddings=2560, rms_norm_eps=1e-5, tie_word_embeddings=False)
    return LlamaConfig(**{**settings, **changes})


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(p.shape, generator=generator)
            if "inv_freq" in name:
                continue
            if "e_score_correction_bias" in name:
                p.copy_(0.1 * noise)
            elif "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            elif "embed" in name:
                p.copy_(noise)
            else:
                p.copy_(noise / max(p.shape[-1], 1) ** 0.5)
    return model.eval()


def write(path: Path, config, seed: int = 0) -> PreTrainedModel:
    """Save a random fp32 checkpoint of `config` in `path`; return HuggingFace's model, all eager."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    if hasattr(config, "n_routed_experts"):
        model.set_experts_implementation("eager")
    randomise(model, seed).save_pretrained(path)
    return model


def quantise(path: Path) -> None:
    """Turn the checkpoint in `path` into block-wise FP8 as DeepSeek publishes it."""
    out = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        if key.split(".")[-2] in FP8_MODULES:
            out[key], out[key + "_scale_inv"] = kernel.weight_quant(tensor)
        else:
            out[key] = tensor if "e_score_correction_bias" in key else tensor.bfloat16()
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, dtype="bfloat16", quantization_config=dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]))


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def split_file(path: Path, parts: int) -> None:
    """Spread model.safetensors over `parts` files with an index, neighbours in different files."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:06d}.safetensors"
        keys = sorted(tensors)[part::parts]
        save_file({key: tensors[key] for key in keys}, path / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(keys, name))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(path: Path, tp: Shard = Shard(), **settings) -> Transformer:
    """Our model of the checkpoint in `path`, in fp32 unless told otherwise."""
    settings = {"dtype": torch.float32, "rows": 2, "max_seq_len": 256, **settings}
    return load_model(Checkpoint(path), Runtime(tp=tp, **settings))


def evaluate(model: Transformer, order: str) -> None:
    """From now on MLA evaluates in one order, "absorbed" or "expanded", however many queries there are."""
    for layer in model.layers:
        layer.attn.absorbs = lambda s, t: order == "absorbed"


def logits(model: Transformer, tokens: torch.Tensor, chunks: list[int] | None = None) -> torch.Tensor:
    """Logits of all positions of tokens [b, s], run in one piece or in `chunks` of these sizes."""
    cache = Cache.allocate(model.cfg, model.rt).view(slice(0, tokens.shape[0]), model.rt.max_seq_len)
    return torch.cat([model(piece, cache) for piece in tokens.split(chunks or tokens.shape[1], dim=1)], dim=1)
