"""Checkpoints: HuggingFace safetensors in, this project's names and N-way shards out.

    python convert.py --hf-ckpt-path HF --save-path OUT --model-parallel N [--dtype bf16] [--verify]

TABLE maps every tensor name to HuggingFace's and says along which axis ranks share it. `Checkpoint.part`
reads one rank's part of one tensor, for `convert`, which writes model{rank}-mp{N}.safetensors, and for
`load_model`, so that generate.py runs a HuggingFace folder or a converted one, with any legal
number of ranks.

Everything is checked from the files' headers before the first tensor is used: names, shapes, dtypes, FP8
scales, that no file is missing or cut short, that N divides what it cuts, and that every key is used once.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import kernel
import memory
from model import DTYPES, Config, Linear, Runtime, Shard, Transformer

# Ours: HuggingFace's, and the axis of [out, in] that ranks cut (0 outputs, 1 inputs, None neither). Comments:
# the paper's symbol, its equation, and the order of rows where several matrices are stacked.
TABLE = {
    "embed": ("model.embed_tokens", 0),
    "norm": ("model.norm", None),
    "head": ("lm_head", 0),
    "attn_norm": ("input_layernorm", None),
    "attn.wq": ("self_attn.q_proj", 0),
    "attn.wk": ("self_attn.k_proj", 0),
    "attn.wv": ("self_attn.v_proj", 0),
    "attn.wq_a": ("self_attn.q_a_proj", None),                  # W^DQ            V3 Eq. 6
    "attn.q_norm": ("self_attn.q_a_layernorm", None),
    "attn.wq_b": ("self_attn.q_b_proj", 0),                     # W^UQ, W^QR      V3 Eq. 7, 8  per head [d|r]
    "attn.wkv_a": ("self_attn.kv_a_proj_with_mqa", None),       # W^DKV, W^KR     V3 Eq. 1, 3  [c|r]
    "attn.kv_norm": ("self_attn.kv_a_layernorm", None),
    "attn.wkv_b": ("self_attn.kv_b_proj", 0),                   # W^UK, W^UV      V3 Eq. 2, 5  per head [d|v]
    "attn.wo": ("self_attn.o_proj", 1),                         # W^O             V3 Eq. 11
    "ffn_norm": ("post_attention_layernorm", None),
    "ffn.w1": ("mlp.gate_proj", 0),
    "ffn.w2": ("mlp.down_proj", 1),
    "ffn.w3": ("mlp.up_proj", 0),
    "ffn.gate": ("mlp.gate", None),                             # e_i, b_i        V3 Eq. 15, 16
    "ffn.experts.w1": ("mlp.experts.{e}.gate_proj", 0),         # FFN_i^(r)       V3 Eq. 12    ours: [e, ...]
    "ffn.experts.w2": ("mlp.experts.{e}.down_proj", 1),
    "ffn.experts.w3": ("mlp.experts.{e}.up_proj", 0),
    "ffn.shared.w1": ("mlp.shared_experts.gate_proj", 0),       # FFN_i^(s)       V3 Eq. 12
    "ffn.shared.w2": ("mlp.shared_experts.down_proj", 1),
    "ffn.shared.w3": ("mlp.shared_experts.up_proj", 0),
}
LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight_scale_inv"}  # the "inverse" is the multiplier

MANIFEST = "manifest.json"          # written last: a converted folder without it is unfinished
COMPANIONS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "generation_config.json", "chat_template.jinja")
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
                      "F8_E4M3": kernel.FP8}
HIGH_PRECISION = set(DTYPES.values())

# ------------------------------------------------------------------------------------------------------------
# 1. Config: HuggingFace's config.json -> ours

# Ours: HuggingFace's. Keys in IGNORED do not change what the model computes, or only repeat others; those in
# FIXED have one value that this project implements, and absent means that value.
NAMES = {"vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
         "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "norm_eps": "rms_norm_eps",
         "context_len": "max_position_embeddings"}
MLA_NAMES = {name: name for name in
             ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
MOE_NAMES = {"n_dense_layers": "first_k_dense_replace", "n_routed_experts": "n_routed_experts",
             "n_shared_experts": "n_shared_experts", "n_activated_experts": "num_experts_per_tok",
             "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
             "moe_inter_dim": "moe_intermediate_size", "route_scale": "routed_scaling_factor",
             "norm_topk_prob": "norm_topk_prob"}
ROPE_NAMES = {"default": {},
              "llama3": {"factor": "factor", "original_context_len": "original_max_position_embeddings",
                         "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
              "yarn": {"factor": "factor", "original_context_len": "original_max_position_embeddings",
                       "beta_fast": "beta_fast", "beta_slow": "beta_slow",
                       "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}}
IGNORED = set("""architectures auto_map transformers_version _name_or_path _model_name_or_path use_cache
    initializer_range attention_dropout bos_token_id eos_token_id pad_token_id unk_token_id pretraining_tp
    ep_size num_nextn_predict_layers num_mtp_layers aux_loss_alpha seq_aux output_router_logits qk_head_dim
    sliding_window max_window_layers is_llama_config rope_interleaved transformers.js_config""".split())
GROUPS = {"rope_scaling": dict, "rope_parameters": dict, "quantization_config": dict, "layer_types": list}
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
         "use_mrope": False, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
         "rope_interleave": True}


def read_json(path: Path, **kinds: type) -> dict:
    """A JSON object whose keys are of these types; ValueError names the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(key), kinds[key]) for key in kinds):
        wanted = ", ".join(f"{key} ({kind.__name__})" for key, kind in kinds.items())
        raise ValueError(f"{path}: must be a JSON object" + (f" with {wanted}" if kinds else ""))
    return data


def load_config(path: Path) -> Config:
    """Read a config file, HuggingFace's (it has a model_type) or ours. ValueError names file and key."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    data = read_json(path)
    try:
        return config_from_hf(data) if "model_type" in data else Config.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_from_hf(data: dict) -> Config:
    """Translate HuggingFace's config.json, old keys or new. ValueError names a key that does not fit."""
    keys = {key: value for key, value in data.items() if key not in IGNORED}
    for key, accepted in FIXED.items():
        if (value := keys.pop(key, accepted)) != accepted:
            raise ValueError(f"key {key!r} is {value!r}; only {accepted!r} is supported")

    def take(names: dict[str, str]) -> dict:
        if missing := [key for key in names.values() if key not in keys]:
            raise ValueError(f"missing key {missing[0]!r}")
        return {ours: keys.pop(theirs) for ours, theirs in names.items()}

    family = keys.pop("model_type")
    if family not in ("deepseek_v3", "qwen2", "llama"):
        raise ValueError(f"unknown model_type {family!r}; known: deepseek_v3, qwen2, llama")
    ours = take(NAMES)
    for name, value in ours.items():
        if type(value) not in (int, float) or not 0 < value < 2 ** 31:
            raise ValueError(f"key {NAMES[name]!r} is {value!r}; it must be a positive number")
    for key, kind in GROUPS.items():
        if not isinstance(keys.get(key), kind | None):
            raise ValueError(f"key {key!r} is {keys[key]!r}; it must be a {kind.__name__}")
    head_dim, kv_heads = keys.pop("head_dim", None), keys.pop("num_key_value_heads", None)
    if family == "deepseek_v3":             # its head_dim is the rotary part only, and MLA has no kv heads
        ours |= {"mla": take(MLA_NAMES), "moe": take(MOE_NAMES)}
    else:
        ours["gqa"] = {"n_kv_heads": kv_heads or ours["n_heads"], "qkv_bias": family == "qwen2",
                       "head_dim": head_dim or ours["dim"] // ours["n_heads"]}
    if any(kind != "full_attention" for kind in keys.pop("layer_types", None) or ()):
        raise ValueError("key 'layer_types' has more than 'full_attention'")
    ours |= {"tie_embeddings": keys.pop("tie_word_embeddings", False), "rope": _rope(keys),
             "dtype": keys.pop("torch_dtype", None) or take({"dtype": "dtype"})["dtype"],
             **_fp8(keys.pop("quantization_config", None))}
    keys.pop("dtype", None)
    if keys:
        raise ValueError(f"unknown key {min(keys)!r} (value {keys[min(keys)]!r}): it might change the model; "
                         f"if it does not, remove it or pass a config of this project with --config")
    try:
        cfg = Config.from_dict(ours)
    except ValueError as error:
        raise ValueError(_name_theirs(error)) from None
    # YaRN as Qwen advises to add it leaves max_position_embeddings alone
    stretched = int(cfg.rope.factor * cfg.rope.original_context_len) if cfg.rope.kind == "yarn" else 0
    return replace(cfg, context_len=max(cfg.context_len, stretched))


def _name_theirs(error: ValueError) -> str:
    """The text of Config's error about one of our keys, with HuggingFace's name of it."""
    names = {**NAMES, **MOE_NAMES, **ROPE_NAMES["yarn"], "tie_embeddings": "tie_word_embeddings",
             "n_kv_heads": "num_key_value_heads", "theta": "rope_theta"}
    return re.sub(r"'(?:\w+\.)?(\w+)'", lambda key: repr(names.get(key[1], key[1])), str(error), count=1)


def _rope(keys: dict) -> dict:
    """Our `rope` group, from rope_theta and rope_scaling (published files) or rope_parameters (newer)."""
    old, new = keys.pop("rope_scaling", None), keys.pop("rope_parameters", None)
    if old and new and old != new:
        raise ValueError(f"keys 'rope_scaling' and 'rope_parameters' differ ({old} and {new}); remove one")
    scaling = {key: value for key, value in (old or new or {}).items() if value is not None}
    top_level = keys.pop("rope_theta", None)
    theta = scaling.pop("rope_theta", top_level)
    if theta is None:
        raise ValueError("missing key 'rope_theta'")
    old_kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old_kind)
    if not isinstance(kind, str) or kind not in ROPE_NAMES:
        raise ValueError(f"rope type {kind!r} is not known; known: {', '.join(ROPE_NAMES)}")
    names = ROPE_NAMES[kind]
    if unknown := scaling.keys() - names.values():
        raise ValueError(f"unknown rope key {min(unknown)!r} for rope type {kind!r}")
    for key in ("factor", "original_max_position_embeddings"):
        if key in names.values() and key not in scaling:
            raise ValueError(f"missing key {key!r} for rope type {kind!r}")
    given = {ours: scaling[theirs] for ours, theirs in names.items() if theirs in scaling}
    return {"kind": "plain" if kind == "default" else kind, "theta": theta, **given}


def _fp8(quantization: dict | None) -> dict:
    """Our keys about FP8. Its lists of modules left out are not read: all tensors must be stored as model.py
    declares them, unless they are converted on the way."""
    if quantization is None:
        return {}
    wanted = {"quant_method": ["fp8"], "weight_block_size": [[kernel.BLOCK, kernel.BLOCK]],
              "fmt": ["e4m3", None], "activation_scheme": ["dynamic", None],
              "scale_fmt": ["float", "ue8m0", None]}
    for key, accepted in wanted.items():
        if quantization.get(key) not in accepted:
            raise ValueError(f"key 'quantization_config.{key}' is {quantization.get(key)!r}; supported: "
                             f"{', '.join(repr(value) for value in accepted if value)}")
    return {"fp8": True, "ue8m0": quantization.get("scale_fmt") == "ue8m0"}


# ------------------------------------------------------------------------------------------------------------
# 2. The one pass over a checkpoint


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, this rank's part of it, and where it comes from."""
    name: str
    keys: list[str]             # tensors of the source: one, or one per expert of a stack
    shape: list[int]            # as the model declares it
    dtype: torch.dtype          # as it leaves `Checkpoint.part`
    cut: int | None = None      # axis of one source tensor that the ranks share
    heads: int = 0              # of this rank, if rows need RoPE's interleaved order
    scales: tuple = ()          # the scale of each key, if it is dequantised on the way


def source_keys(name: str, experts: int) -> tuple[list[str], int | None]:
    """HuggingFace's names of our tensor `name`, one or one per expert, and the axis that ranks cut."""
    layer, module, leaf = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    theirs, cut = TABLE[module]
    leaf = "e_score_correction_bias" if (module, leaf) == ("ffn.gate", "bias") else LEAVES[leaf]
    key = f"model.layers.{layer}.{theirs}.{leaf}" if layer else f"{theirs}.{leaf}"
    return [key.format(e=e) for e in range(experts)] if "{e}" in key else [key], cut


def _is_precise_gate(name: str, stored: torch.dtype) -> bool:
    """Whether this tensor stays in fp32, as in HuggingFace: a gate's choices flip on rounding."""
    return name.endswith("gate.weight") and stored == torch.float32


class Checkpoint:
    """A folder of weights, HuggingFace's or converted. Until `part` is called, only headers are read (and a
    head beside the embedding to which the config ties it: do they agree?)."""

    def __init__(self, folder: str | Path, config: str | Path | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        manifest = self.folder / MANIFEST
        self.manifest = None
        if manifest.exists():
            self.manifest = read_json(manifest, model_parallel=int, dtype=str, files=dict)
        elif any(self.folder.glob("model*-mp*.safetensors*")):
            raise ValueError(f"{folder}: an unfinished conversion (no {MANIFEST}); run convert.py again")
        own = self.folder / "config.json"
        if not (config or own.exists()):
            raise FileNotFoundError(f"{own}: no such file; pass --config if the config lies elsewhere")
        self.cfg = load_config(Path(config or own))
        self.files = self._list_files()
        self.where: dict[str, Path] = {}            # tensor -> the file that holds it
        self.notes: list[str] = []                  # what a plan leaves out, and why
        self._headers: dict[tuple, dict] = {}       # by file and time: one may be replaced meanwhile

    def _list_files(self) -> list[Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        sizes = {}
        if self.manifest:
            names = sizes = self.manifest["files"]
        elif single.exists():
            names = [single.name]
        elif index.exists():
            names = set(map(str, read_json(index, weight_map=dict)["weight_map"].values()))
        else:
            raise FileNotFoundError(f"{self.folder}: neither {index.name} nor {single.name} in here")
        files = [self.folder / name for name in sorted(names)]
        if missing := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{missing[0]}: no such file, one of {len(files)} listed")
        for name, written in sizes.items():
            if (size := (self.folder / name).stat().st_size) != written:
                raise ValueError(f"{self.folder / name}: {size} bytes, but {written} were written")
        return files

    def header(self, file: Path) -> dict[str, tuple[torch.dtype, list[int], int]]:
        """Names, dtypes, shapes and places (bytes from the start) of the tensors in one file. ValueError if
        it is cut short or no safetensors file."""
        key = file, file.stat().st_mtime_ns
        if key not in self._headers:
            try:
                with open(file, "rb") as f, safe_open(file, "pt"):      # the second checks for the first
                    length = int.from_bytes(f.read(8), "little")
                    head = json.loads(f.read(length))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: damaged or cut short, or not to be read ({error})") from None
            head.pop("__metadata__", None)
            self._headers[key] = {name: (SAFETENSORS_DTYPES.get(t["dtype"], t["dtype"]), t["shape"],
                                         8 + length + t["data_offsets"][0]) for name, t in head.items()}
        return self._headers[key]

    def plan(self, model: Transformer, as_stored: bool = False) -> list[Entry]:
        """What `model`, one rank's part on the meta device, takes from this folder, checked from the headers.

        Tensors get the dtypes that `model` declares, or keep those of the files if `as_stored`. ValueError
        names the first tensor that is missing, left over, or of another shape or dtype.
        """
        wanted, tp = dict([*model.named_parameters(), *model.named_buffers()]), model.rt.tp
        files = self.files
        if self.manifest:
            if (made_for := self.manifest["model_parallel"]) != tp.size:
                raise ValueError(f"{self.folder}: converted for {made_for} ranks, but this run has "
                                 f"{tp.size}; start {made_for}, or run the HuggingFace folder")
            files = [self.folder / rank_file(tp.rank, tp.size)]
        self.where = {}
        for file in files:
            for key in self.header(file):
                if key in self.where:
                    raise ValueError(f"{file}: tensor {key} is also in {self.where[key].name}")
                self.where[key] = file
        entries = [self._entry(name, t, tp, as_stored) for name, t in wanted.items()]
        used = {key for entry in entries for key in (*entry.keys, *entry.scales)}
        self.notes = self._leftovers(self.where.keys() - used)
        return entries

    def _entry(self, name: str, t: Tensor, tp: Shard, as_stored: bool) -> Entry:
        exact = t.dtype == kernel.FP8 or name.endswith(".scale")
        accepted, shape = {t.dtype} if exact else HIGH_PRECISION, list(t.shape)
        if self.manifest:
            stored = self._check(name, shape, accepted)
            keep = as_stored or _is_precise_gate(name, stored)
            return Entry(name, [name], shape, stored if keep else t.dtype)
        keys, cut = source_keys(name, experts=shape[0])
        full = shape[-2:] if len(keys) > 1 else shape.copy()            # of one tensor of the source
        if cut is not None:
            full[cut] *= tp.size
        if self.cfg.fp8 and name.endswith(".weight") and len(full) == 2:
            accepted = accepted | {kernel.FP8}                          # it may be dequantised on the way
        kinds = {self._check(key, full, accepted) for key in keys}
        if len(kinds) > 1:
            raise ValueError(f"{self.folder}: tensors {keys[0]} to {keys[-1]} differ in dtype")
        stored, scales, heads = kinds.pop(), (), 0
        if stored == kernel.FP8 and t.dtype != kernel.FP8:
            scales = tuple(key + "_scale_inv" for key in keys)
            for scale in scales:
                self._check(scale, [kernel.n_blocks(size) for size in full], {torch.float32})
        if self.cfg.gqa and name.endswith((".wq.weight", ".wq.bias", ".wk.weight", ".wk.bias")):
            heads = shape[0] // self.cfg.gqa.head_dim
            if t.dtype == kernel.FP8:
                raise ValueError(f"{self.folder}: {keys[0]} is FP8, whose rows cannot change places among "
                                 f"their blocks; convert with --dtype bf16")
        keep = as_stored and not scales or _is_precise_gate(name, stored)
        return Entry(name, keys, shape, stored if keep else t.dtype, cut, heads, scales)

    def _check(self, key: str, shape: list[int], accepted: set[torch.dtype]) -> torch.dtype:
        """The dtype of tensor `key`, if it is there, has this shape, and is stored in an accepted dtype."""
        if key not in self.where:
            raise ValueError(f"{self.folder}: tensor {key} is missing")
        dtype, stored_shape, _ = self.header(self.where[key])[key]
        if stored_shape != shape:
            raise ValueError(f"{self.where[key]}: tensor {key} has shape {stored_shape}; "
                             f"the config says {shape}")
        if dtype not in accepted:
            raise ValueError(f"{self.where[key]}: tensor {key} is stored as {dtype}; "
                             f"the config says {' or '.join(sorted(map(str, accepted)))}")
        return dtype

    def _leftovers(self, keys: set[str]) -> list[str]:
        """Notes on keys that the model does not use, but for empty ones and what the config implies.
        ValueError: the first one that may change the model."""
        notes, mtp = [], {}
        for key in sorted(keys):
            layer = re.match(r"model\.layers\.(\d+)\.", key)
            if layer and int(layer[1]) >= self.cfg.n_layers and f"{layer[0]}eh_proj.weight" in keys:
                mtp[layer[1]] = mtp.get(layer[1], 0) + 1
            elif 0 in self.header(self.where[key])[key][1]:     # HuggingFace's, if no expert is shared
                continue
            elif key == "lm_head.weight" and self.cfg.tie_embeddings:
                self._check_tied(key, "model.embed_tokens.weight")
                notes.append("left out lm_head.weight: the config ties it to the embedding")
            elif not key.endswith("rotary_emb.inv_freq"):      # old Llama files carry what the config implies
                raise ValueError(f"{self.where[key]}: tensor {key} is not part of this model")
        return notes + [f"left out layer {layer} ({n} tensors): the multi-token prediction module, made for "
                        f"training and speculative decoding" for layer, n in mtp.items()]

    def _check_tied(self, head: str, embed: str) -> None:
        """ValueError if a head that the config ties to the embedding is there and differs from it.
        (HuggingFace would leave them untied.)"""
        (_, shape, _), (_, other, _) = (self.header(self.where[key])[key] for key in (head, embed))
        pieces = ((start, min(start + 4096, shape[0])) for start in range(0, shape[0], 4096))
        if shape != other or not all(torch.equal(self.read(head, 0, *piece).float(),
                                                 self.read(embed, 0, *piece).float()) for piece in pieces):
            raise ValueError(f"{self.where[head]}: tensor {head} differs from {embed}, and the config ties "
                             f"it; set tie_word_embeddings to false in config.json, or remove the tensor")

    def mapped_bytes(self, rt: Runtime) -> int:
        """Bytes of a rank's weights that a CPU reads where they are, in a mapped file: those that load_model
        need not cast, reorder, stack, or cut by columns. None of an FP8 checkpoint are counted, though most
        are mapped, too: R1 would read 37 GB for each token from the disk."""
        if rt.device.type != "cpu" or self.cfg.fp8:
            return 0
        return sum(math.prod(entry.shape) * entry.dtype.itemsize
                   for entry in self.plan(Transformer(self.cfg, rt))
                   if len(entry.keys) == 1 and not entry.heads and (entry.cut != 1 or rt.tp.size == 1)
                   and entry.dtype == self.header(self.where[entry.keys[0]])[entry.keys[0]][0])

    def part(self, entry: Entry, e: int, tp: Shard) -> Tensor:
        """Rank tp's slice of the e-th tensor of `entry`, in our row order and in entry.dtype.

        No other rows or columns are read, but for the rest of an FP8 block that a cut divides.
        """
        key, cut = entry.keys[e], entry.cut or 0
        size, start = self.header(self.where[key])[key][1][cut], 0
        if entry.cut is not None:
            size //= tp.size
            start = tp.rank * size
        if not entry.scales:
            tensor = self.read(key, cut, start, start + size)
        else:                                   # whole blocks, as a cut may fall inside one
            first, last = start // kernel.BLOCK, kernel.n_blocks(start + size)
            tensor = kernel.weight_dequant(self.read(key, cut, first * kernel.BLOCK, last * kernel.BLOCK),
                                           self.read(entry.scales[e], cut, first, last), entry.dtype)
            tensor = tensor.narrow(cut, start - first * kernel.BLOCK, size)
        if entry.heads:                         # pairs (i, i + d/2) of a head become neighbours (2i, 2i + 1)
            tensor = tensor.unflatten(0, (entry.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return tensor.to(entry.dtype)

    def read(self, key: str, cut: int, start: int, stop: int) -> Tensor:
        """Rows (cut 0) or columns (cut 1) start to stop of a stored tensor, and nothing else of it.

        Its bytes are mapped as long as they are in use, and by themselves: of a whole file, what has been
        read would stay in memory, and to open it with safe_open takes 2 ms if it has a thousand tensors.
        """
        dtype, shape, place = self.header(self.where[key])[key]
        data = np.memmap(self.where[key], mode="c", offset=place, shape=math.prod(shape) * dtype.itemsize)
        tensor = torch.from_numpy(data).view(dtype).view(shape)
        return tensor[start:stop] if cut == 0 else tensor[:, start:stop].contiguous()


def load_model(checkpoint: Checkpoint, rt: Runtime) -> Transformer:
    """This rank's part of the model, ready to run. What can (Checkpoint.mapped_bytes) stays a mapped file."""
    model = Transformer(checkpoint.cfg, rt)
    memory.keep_freed()
    state: dict[str, Tensor] = {}
    for entry in checkpoint.plan(model):
        if len(entry.keys) == 1:
            state[entry.name] = checkpoint.part(entry, 0, rt.tp).to(rt.device)
        else:                                           # a stack of experts
            state[entry.name] = torch.empty(entry.shape, dtype=entry.dtype, device=rt.device)
            for e in range(len(entry.keys)):
                state[entry.name][e] = checkpoint.part(entry, e, rt.tp)
    if checkpoint.cfg.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    del state                                           # what is dequantised now must not stay there twice
    for name, module in model.named_modules():
        if name.endswith(".wkv_b") or rt.fp8 == "bf16" and isinstance(module, Linear):
            module.dequantise(rt.dtype)                 # absorbed MLA uses wkv_b head by head
    return model.eval()


# ------------------------------------------------------------------------------------------------------------
# 3. Converting, and proving it


def rank_file(rank: int, ranks: int) -> str:
    return f"model{rank}-mp{ranks}.safetensors"


def convert(checkpoint: Checkpoint, out: Path, ranks: int, dtype: torch.dtype | None = None) -> None:
    """Write `out`: one file per rank, then tokenizer, config and manifest. Memory: one tensor at a time.

    Files get their names when all are complete; an interrupted conversion goes on where it stopped. `dtype`
    None keeps every tensor as it is stored; bfloat16 dequantises FP8, and casts all but a gate in fp32.
    ValueError, before any output, if anything does not match; OSError if the disk is too small.
    """
    if checkpoint.manifest or out.resolve() == checkpoint.folder.resolve():
        raise ValueError(f"{checkpoint.folder}: convert from a HuggingFace folder into another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file; --save-path must be a folder")
    cfg = checkpoint.cfg if dtype is None else replace(checkpoint.cfg, fp8=False, dtype="bfloat16")
    _check_ranks(cfg, ranks)
    source, shards = fingerprint(checkpoint), [Shard(rank, ranks) for rank in range(ranks)]
    files = [RankFile.lay_out(out, tp, plan_rank(checkpoint, cfg, tp, dtype), source) for tp in shards]
    manifest = {"model_parallel": ranks, "source": source,
                "dtype": "as stored" if dtype is None else cfg.dtype,
                "files": {file.path.name: file.ends[-1] for file in files}}
    if (out / MANIFEST).exists():
        if read_json(out / MANIFEST) != manifest:
            raise ValueError(f"{out}: holds another conversion; remove it or choose another folder")
        Checkpoint(out)                 # ValueError if a file of it was lost or cut short since
        return
    todo = [file for file in files if file.n_complete(file.path) < len(file.plan)]
    finished = {file.path for file in files if file not in todo}
    parts = set(out.glob("model*-mp*.safetensors.part"))
    others = sorted(set(out.glob("*.safetensors")) - finished)
    if not (parts or finished):
        others += out.glob("config.json")
    if others:
        raise ValueError(f"{others[0]}: of another checkpoint, number of ranks or dtype; remove it or choose "
                         f"another folder")
    out.mkdir(parents=True, exist_ok=True)
    for stale in parts - {file.part for file in todo}:
        stale.unlink()                  # left by an interrupted conversion for another number of ranks
    _check_disk(out, todo)
    write_ranks(checkpoint, todo)
    copy_companions(checkpoint.folder, out)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")
    (out / (MANIFEST + ".part")).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(out / (MANIFEST + ".part"), out / MANIFEST)


def copy_companions(source: Path, out: Path) -> None:
    """Tokenizer and template; and the stop ids, which without a generation_config.json are config.json's."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    own, generation = source / "config.json", out / "generation_config.json"
    if not generation.exists() and own.exists() and (stop := read_json(own).get("eos_token_id")) is not None:
        generation.write_text(json.dumps({"eos_token_id": stop}) + "\n")


def _check_disk(out: Path, files: list["RankFile"]) -> None:
    there = sum(file.part.stat().st_size for file in files if file.part.exists())   # kept, or given back
    missing, free = sum(file.ends[-1] for file in files) - there, shutil.disk_usage(out).free
    if missing > free:
        raise OSError(f"{out}: {missing / 1e9:.3g} GB are still to be written, and its disk has "
                      f"{free / 1e9:.3g} GB free")


def _check_ranks(cfg: Config, ranks: int) -> None:
    if ranks not in (legal := cfg.legal_ranks()):
        bf16 = f"; with --dtype bf16 over {ranks}, too" * (ranks in replace(cfg, fp8=False).legal_ranks())
        raise ValueError(f"--model-parallel is {ranks}; this model can be cut over "
                         f"{', '.join(map(str, legal))}{bf16}")


def plan_rank(checkpoint: Checkpoint, cfg: Config, tp: Shard, dtype: torch.dtype | None) -> list[Entry]:
    """One rank's entries in the order of its file: wide dtypes first, which keeps all tensors aligned."""
    model = Transformer(cfg, Runtime(dtype=dtype or DTYPES[cfg.dtype], tp=tp))
    return sorted(checkpoint.plan(model, as_stored=dtype is None), key=lambda entry: -entry.dtype.itemsize)


@dataclass(frozen=True)
class RankFile:
    """A safetensors file to write: its first bytes, its tensors in order, and where each of them ends.

    Written by hand because the safetensors package can only write a file that is in memory as a whole.
    """
    path: Path
    tp: Shard
    plan: list[Entry]
    header: bytes
    ends: list[int]             # of the header, then of every tensor

    @classmethod
    def lay_out(cls, out: Path, tp: Shard, plan: list[Entry], source: str) -> "RankFile":
        """A header is 8 bytes of length and JSON with each tensor's dtype, shape and place; here filled up,
        so that tensors begin with a cache line when they are mapped (products.in_lines)."""
        names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
        sizes = [math.prod(entry.shape) * entry.dtype.itemsize for entry in plan]
        ends = list(accumulate(sizes, initial=0))
        head: dict = {"__metadata__": {"format": "pt", "source": source}}
        for entry, *place in zip(plan, ends, ends[1:]):
            head[entry.name] = {"dtype": names[entry.dtype], "shape": entry.shape, "data_offsets": place}
        text = json.dumps(head).encode()
        text += b" " * (-(8 + len(text)) % 64)
        header = struct.pack("<Q", len(text)) + text
        return cls(out / rank_file(tp.rank, tp.size), tp, plan, header, [len(header) + end for end in ends])

    @property
    def part(self) -> Path:
        """Where it is written; it gets its name when it is complete."""
        return self.path.with_name(self.path.name + ".part")

    def n_complete(self, path: Path) -> int:
        """How many tensors an earlier run with the same source, ranks and dtype left complete in `path`."""
        if not path.exists():
            return 0
        header, size = self.header, path.stat().st_size
        with open(path, "rb") as file:
            return bisect_right(self.ends, size) - 1 if file.read(len(header)) == header else 0


def write_ranks(checkpoint: Checkpoint, files: list[RankFile]) -> None:
    """Stream all files side by side, so that the disk reads the source once; go on where all have data."""
    done = min((file.n_complete(file.part) for file in files), default=0)
    with ExitStack() as stack:
        handles = [stack.enter_context(open(file.part, "r+b" if done else "wb")) for file in files]
        for file, handle in zip(files, handles):
            handle.write(file.header)
            handle.seek(file.ends[done])
            handle.truncate()
        bar = stack.enter_context(tqdm(desc="convert", unit="B", unit_scale=True,
                                       total=sum(file.ends[-1] for file in files),
                                       initial=sum(file.ends[done] for file in files)))
        for entries in zip(*(file.plan[done:] for file in files)):
            for e in range(len(entries[0].keys)):
                for file, handle, entry in zip(files, handles, entries):
                    data = as_bytes(checkpoint.part(entry, e, file.tp)).numpy()
                    with writing(file.part):
                        bar.update(handle.write(data))
        for file, handle in zip(files, handles):
            with writing(file.part):
                handle.flush()
                os.fsync(handle.fileno())
    for file in files:
        os.replace(file.part, file.path)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Identifies a source by its config and its files' names, sizes and times."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    return hashlib.sha256(repr((checkpoint.cfg, stats)).encode()).hexdigest()[:16]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def verify(checkpoint: Checkpoint, out: Path) -> int:
    """Compare every tensor of the converted folder `out` with its source, bit for bit; returns their number.

    Cuts whole source tensors and puts rows back into HuggingFace's order, so it shares no slicing with what
    it checks. ValueError names the first tensor that differs. Dequantised FP8 is compared in that form.
    """
    converted = Checkpoint(out)
    manifest, cfg = converted.manifest, converted.cfg
    ranks, dtype = manifest["model_parallel"], None if manifest["dtype"] == "as stored" else DTYPES[cfg.dtype]
    shards = [Shard(rank, ranks) for rank in range(ranks)]
    folders = [Checkpoint(out) for _ in shards]             # each plans another rank's file
    plans = [plan_rank(folder, cfg, tp, dtype) for folder, tp in zip(folders, shards)]
    plan = plan_rank(checkpoint, cfg, shards[0], dtype)
    for entry, *copies in tqdm(zip(plan, *plans, strict=True), desc="verify", unit="tensor", total=len(plan)):
        for e, key in enumerate(entry.keys):
            whole = checkpoint.part(replace(entry, heads=0), e, Shard())
            wanted = [whole] * ranks if entry.cut is None else whole.chunk(ranks, dim=entry.cut)
            for tp, folder, mine, expected in zip(shards, folders, copies, wanted):
                stacked = len(entry.keys) > 1                       # one expert of a stack at a time
                part = folder.read(mine.name, 0, e, e + 1)[0] if stacked else folder.part(mine, 0, Shard())
                if entry.heads:                         # back from RoPE's interleaved order to the halves
                    part = part.unflatten(0, (entry.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
                if part.dtype != expected.dtype or not torch.equal(as_bytes(part), as_bytes(expected)):
                    raise ValueError(f"{out / rank_file(tp.rank, ranks)}: {entry.name} does not equal {key} "
                                     f"of the source")
    return sum(len(entry.keys) for entry in plan)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors name the file; Python's own, of a full disk, names none."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None


# Control characters could move the cursor or worse, and a model may write any
HARMLESS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def harmless(message: object) -> str:
    """In one line and without control characters, which names in somebody else's files may hold."""
    return str(message).translate({**HARMLESS, 10: " "})


def complain(program: str, error: object) -> int:
    """Say what is wrong on standard error; the exit code."""
    print(f"{program}: error: {harmless(error)}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """A wrong argument is one line, not the whole usage; --help has that. With it a program begins: streams
    that were closed are empty from here on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name in ("stdin", "stdout", "stderr"):      # None: closed by whoever started us
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))

    def error(self, message: str):
        first = int(os.environ.get("RANK", 0)) == 0         # of several ranks one says it
        self.exit(complain(self.prog, message) if first else 2)

    def at_least(self, args: argparse.Namespace, least: int, *names: str) -> None:
        """Refuse what is given for these arguments if it is less, or more than a million."""
        for name in names:
            if (value := getattr(args, name, None)) is not None and not least <= value <= 2 ** 20:
                self.error(f"--{name.replace('_', '-')} is {value}; it must be {least} or more, and at "
                           f"most 2 ** 20")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Reshard a HuggingFace checkpoint for N ranks.")
    parser.add_argument("--hf-ckpt-path", type=Path, required=True, help="HuggingFace folder")
    parser.add_argument("--save-path", type=Path, required=True, help="folder to write")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N",
                        help="ranks that will run it (%(default)s)")
    parser.add_argument("--dtype", choices=["bf16", "bfloat16"],
                        help="dequantise FP8, cast to bf16, but for a gate in fp32 (default: as stored)")
    parser.add_argument("--config", type=Path, help="config file; default: the folder's config.json")
    parser.add_argument("--verify", action="store_true", help="compare every tensor written with its source")
    args = parser.parse_args(argv)
    try:
        checkpoint = Checkpoint(args.hf_ckpt_path, args.config)
        convert(checkpoint, args.save_path, args.model_parallel, torch.bfloat16 if args.dtype else None)
        for note in checkpoint.notes:
            print(note, file=sys.stderr)
        if not any((args.save_path / name).is_file() for name in COMPANIONS[:2]):
            print(f"{args.hf_ckpt_path} has no tokenizer; put one into {args.save_path} before you generate",
                  file=sys.stderr)
        if args.verify:
            print(f"verified {verify(checkpoint, args.save_path)} tensors, all equal", file=sys.stderr)
    except (ValueError, OSError) as error:
        return complain("convert.py", error)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
