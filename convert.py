"""Checkpoints: HuggingFace safetensors in, this project's names and N-way shards out.

    python convert.py --hf-ckpt-path HF --save-path OUT --model-parallel N [--dtype bf16] [--verify]

TABLE maps every tensor name to HuggingFace's and says along which axis ranks share it. `Checkpoint.tensors`
reads one rank's part of a folder, tensor by tensor, and has two callers: `convert`, which writes
model{rank}-mp{N}.safetensors, and `load_model`, so that generate.py runs a HuggingFace folder or a converted
one, with any legal number of ranks.

Everything is checked from the files' headers before the first tensor is read: names, shapes, dtypes, FP8
scales, that no file is missing or cut short, that N divides what it cuts, and that every key is used exactly
once.
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import kernel
from model import DTYPES, Config, Runtime, Shard, Transformer

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
HIGH_PRECISION = {torch.float32, torch.bfloat16, torch.float16}

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
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
         "use_mrope": False, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
         "rope_interleave": True}


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that has `keys`; ValueError names the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or not data.keys() >= set(keys):
        raise ValueError(f"{path}: expected an object with the keys {', '.join(keys)}")
    return data


def load_config(path: Path) -> Config:
    """Read a config file, HuggingFace's (it has a model_type) or ours. ValueError names file and key."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; pass --config if the config lies elsewhere")
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
    head_dim, kv_heads = keys.pop("head_dim", None), keys.pop("num_key_value_heads", None)
    if family == "deepseek_v3":             # its head_dim is the rotary part only, and MLA has no kv heads
        ours |= {"mla": take(MLA_NAMES), "moe": take(MOE_NAMES)}
    else:
        ours["gqa"] = {"n_kv_heads": kv_heads or ours["n_heads"], "qkv_bias": family == "qwen2",
                       "head_dim": head_dim or ours["dim"] // ours["n_heads"]}
    if set(keys.pop("layer_types", ())) - {"full_attention"}:
        raise ValueError("key 'layer_types' has more than 'full_attention'")
    ours |= {"tie_embeddings": keys.pop("tie_word_embeddings", False), "rope": _rope(keys),
             "dtype": keys.pop("torch_dtype", None) or take({"dtype": "dtype"})["dtype"],
             "fp8": _is_block_fp8(keys.pop("quantization_config", None))}
    keys.pop("dtype", None)
    if keys:
        raise ValueError(f"unknown key {min(keys)!r} (value {keys[min(keys)]!r}): it might change the model; "
                         f"if it does not, remove it or pass a config of this project with --config")
    return Config.from_dict(ours)


def _rope(keys: dict) -> dict:
    """Our `rope` group, from rope_theta and rope_scaling (published files) or rope_parameters (newer)."""
    scaling = {**(keys.pop("rope_scaling", None) or {}), **(keys.pop("rope_parameters", None) or {})}
    top_level = keys.pop("rope_theta", None)
    theta = scaling.pop("rope_theta", top_level)
    if theta is None:
        raise ValueError("missing key 'rope_theta'")
    old_kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old_kind)
    if kind not in ROPE_NAMES:
        raise ValueError(f"rope type {kind!r} is not known; known: {', '.join(ROPE_NAMES)}")
    names = ROPE_NAMES[kind]
    if unknown := scaling.keys() - names.values():
        raise ValueError(f"unknown rope key {min(unknown)!r} for rope type {kind!r}")
    for key in ("factor", "original_max_position_embeddings"):
        if key in names.values() and key not in scaling:
            raise ValueError(f"missing key {key!r} for rope type {kind!r}")
    given = {ours: scaling[theirs] for ours, theirs in names.items() if scaling.get(theirs) is not None}
    return {"kind": "plain" if kind == "default" else kind, "theta": theta, **given}


def _is_block_fp8(quantization: dict | None) -> bool:
    if quantization is None:
        return False
    wanted = {"quant_method": "fp8", "weight_block_size": [kernel.BLOCK, kernel.BLOCK]}
    for key, value in wanted.items():
        if quantization.get(key) != value:
            raise ValueError(f"key 'quantization_config.{key}' is {quantization.get(key)!r}; "
                             f"only {value!r} is supported")
    return True


# ------------------------------------------------------------------------------------------------------------
# 2. The one pass over a checkpoint


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, and where it comes from."""
    name: str
    keys: list[str]             # tensors of the source, one, or one per expert of a stack
    shape: list[int]            # this rank's part, as the model declares it
    dtype: torch.dtype          # as the source stores it, or as it leaves dequantisation
    cut: int | None             # axis of one source tensor that the ranks share
    heads: int                  # of this rank, if rows need RoPE's interleaved order; else 0
    scales: list[str]           # scale of each key if it is dequantised on the way; else empty


class Checkpoint:
    """A folder of weights, HuggingFace's or converted. Nothing but `tensors` reads a tensor."""

    def __init__(self, folder: str | Path, config: str | Path | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        manifest = self.folder / MANIFEST
        self.manifest = read_json(manifest, "model_parallel", "dtype", "files") if manifest.exists() else None
        if self.manifest is None and any(self.folder.glob("model*-mp*.safetensors*")):
            raise ValueError(f"{folder}: an unfinished conversion (no {MANIFEST}); run convert.py again")
        self.cfg = load_config(Path(config) if config else self.folder / "config.json")
        self.files = self._list_files()
        self.where: dict[str, Path] = {}            # tensor -> the file that holds it
        self.notes: list[str] = []                  # what a plan leaves out, and why
        self._headers: dict[Path, dict] = {}

    def _list_files(self) -> list[Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if self.manifest:
            names = sorted(self.manifest["files"])
        elif index.exists():
            names = sorted(set(read_json(index, "weight_map")["weight_map"].values()))
        elif single.exists():
            names = [single.name]
        else:
            raise FileNotFoundError(f"{self.folder}: neither {index.name} nor {single.name} in here")
        if missing := [name for name in names if not (self.folder / name).exists()]:
            raise FileNotFoundError(f"{self.folder / missing[0]}: no such file, one of {len(names)} listed")
        for name in names if self.manifest else []:
            size, written = (self.folder / name).stat().st_size, self.manifest["files"][name]
            if size != written:
                raise ValueError(f"{self.folder / name}: {size} bytes, but {written} were written")
        return [self.folder / name for name in names]

    def header(self, file: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Names, dtypes and shapes in one file. ValueError if it is cut short or no safetensors file."""
        if file not in self._headers:
            try:
                with safe_open(file, "pt") as f:
                    slices = {key: f.get_slice(key) for key in f.keys()}
                    self._headers[file] = {
                        key: (SAFETENSORS_DTYPES.get(s.get_dtype(), s.get_dtype()), s.get_shape())
                        for key, s in slices.items()}
            except SafetensorError as error:
                raise ValueError(f"{file}: damaged or cut short ({error})") from None
        return self._headers[file]

    def plan(self, model: Transformer) -> list[Entry]:
        """What `model`, one rank's part on the meta device, takes from this folder, checked from the headers.

        ValueError names the first tensor that is missing, left over, or of another shape or dtype.
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
        entries = [self._entry(name, t, tp) for name, t in wanted.items()]
        self.notes = self._leftovers(self.where.keys() - {key for e in entries for key in e.keys + e.scales})
        return entries

    def _entry(self, name: str, t: Tensor, tp: Shard) -> Entry:
        accepted = {kernel.FP8} if t.dtype == kernel.FP8 else HIGH_PRECISION
        if name.endswith(".scale"):
            accepted = {torch.float32}
        if self.manifest:
            return Entry(name, [name], list(t.shape), self._check(name, list(t.shape), accepted), None, 0, [])
        layer, module, leaf = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        hf_module, cut = TABLE[module]
        leaf = "e_score_correction_bias" if (module, leaf) == ("ffn.gate", "bias") else LEAVES[leaf]
        key = f"model.layers.{layer}.{hf_module}.{leaf}" if layer else f"{hf_module}.{leaf}"
        stacked = "{e}" in key
        keys = [key.format(e=e) for e in range(t.shape[0] if stacked else 1)]
        full = list(t.shape[1:] if stacked else t.shape)            # of one tensor of the source
        if cut is not None:
            full[cut] *= tp.size
        may_dequantise = {kernel.FP8} if self.cfg.fp8 and leaf == "weight" else set()
        dtypes = {self._check(key, full, accepted | may_dequantise) for key in keys}
        if len(dtypes) > 1:
            raise ValueError(f"{self.folder}: tensors {key.replace('{e}', '*')} differ in dtype")
        dtype, scales = dtypes.pop(), []
        if dtype == kernel.FP8 and t.dtype != kernel.FP8:
            dtype, scales = t.dtype, [key + "_scale_inv" for key in keys]
            for scale in scales:
                self._check(scale, [kernel.n_blocks(size) for size in full], {torch.float32})
        rotary = self.cfg.gqa and module in ("attn.wq", "attn.wk")
        heads = t.shape[0] // self.cfg.gqa.head_dim if rotary else 0
        return Entry(name, keys, list(t.shape), dtype, cut, heads, scales)

    def _check(self, key: str, shape: list[int], accepted: set[torch.dtype]) -> torch.dtype:
        """The dtype of tensor `key`, if it is there, has this shape, and is stored in an accepted dtype."""
        if key not in self.where:
            raise ValueError(f"{self.folder}: tensor {key} is missing")
        dtype, stored_shape = self.header(self.where[key])[key]
        if stored_shape != shape:
            raise ValueError(f"{self.where[key]}: tensor {key} has shape {stored_shape}; "
                             f"the config says {shape}")
        if dtype not in accepted:
            raise ValueError(f"{self.where[key]}: tensor {key} is stored as {dtype}; "
                             f"the config says {' or '.join(sorted(map(str, accepted)))}")
        return dtype

    def _leftovers(self, keys: set[str]) -> list[str]:
        """Explain every key that the model does not use, or raise ValueError with the first one."""
        notes, mtp = [], {}
        for key in sorted(keys):
            layer = re.match(r"model\.layers\.(\d+)\.", key)
            if layer and int(layer[1]) >= self.cfg.n_layers and f"{layer[0]}eh_proj.weight" in keys:
                mtp[layer[1]] = mtp.get(layer[1], 0) + 1
            elif key == "lm_head.weight" and self.cfg.tie_embeddings:
                notes.append("left out lm_head.weight: the config ties it to the embedding")
            elif not key.endswith("rotary_emb.inv_freq"):      # old Llama files carry what the config implies
                raise ValueError(f"{self.where[key]}: tensor {key} is not part of this model")
        return notes + [f"left out layer {layer} ({n} tensors): the multi-token prediction module, made for "
                        f"training and speculative decoding" for layer, n in mtp.items()]

    def tensors(self, entries: list[Entry], tp: Shard) -> Iterator[tuple[Entry, int | None, Tensor]]:
        """Read one rank's tensors: (entry, expert or None, tensor), experts of a stack one by one in order.

        Only this rank's slices are touched, and a file is mapped no longer than a tensor of it is in use.
        """
        for entry in entries:
            for e in range(len(entry.keys)):
                tensor = self._part(entry, e, tp)
                if entry.heads:                  # pairs (i, i + d/2) of a head become neighbours (2i, 2i + 1)
                    tensor = tensor.unflatten(0, (entry.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
                yield entry, e if len(entry.keys) > 1 else None, tensor

    def _part(self, entry: Entry, e: int, tp: Shard) -> Tensor:
        key, cut = entry.keys[e], entry.cut or 0
        size = self.header(self.where[key])[key][1][cut]
        start = 0
        if entry.cut is not None:
            size //= tp.size
            start = tp.rank * size
        if not entry.scales:
            return self._read(key, cut, start, start + size)
        first, last = start // kernel.BLOCK, kernel.n_blocks(start + size)     # a cut may fall inside a block
        weight = self._read(key, cut, first * kernel.BLOCK, last * kernel.BLOCK)
        scale = self._read(entry.scales[e], cut, first, last)
        weight = kernel.weight_dequant(weight, scale, entry.dtype)
        return weight.narrow(cut, start - first * kernel.BLOCK, size)

    def _read(self, key: str, cut: int, start: int, stop: int) -> Tensor:
        with safe_open(self.where[key], "pt") as f:
            return f.get_slice(key)[start:stop] if cut == 0 else f.get_slice(key)[:, start:stop]


def load_model(checkpoint: Checkpoint, rt: Runtime) -> Transformer:
    """This rank's part of the model, ready to run. Tensors that need no cast, cut or copy stay mapped
    files."""
    model = Transformer(checkpoint.cfg, rt)
    declared = model.state_dict()
    state: dict[str, Tensor] = {}
    for entry, expert, tensor in checkpoint.tensors(checkpoint.plan(model), rt.tp):
        tensor = tensor.to(rt.device, declared[entry.name].dtype)
        if expert is None:
            state[entry.name] = tensor
        else:
            if expert == 0:
                state[entry.name] = torch.empty(entry.shape, dtype=tensor.dtype, device=rt.device)
            state[entry.name][expert] = tensor
    if checkpoint.cfg.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if checkpoint.cfg.mla:
        for layer in model.layers:
            layer.attn.wkv_b.dequantise(rt.dtype)       # used head by head, never as one GEMM
    return model.eval()


# ------------------------------------------------------------------------------------------------------------
# 3. Converting, and proving it


def rank_file(rank: int, ranks: int) -> str:
    return f"model{rank}-mp{ranks}.safetensors"


def convert(checkpoint: Checkpoint, out: Path, ranks: int, dtype: torch.dtype | None = None) -> None:
    """Write `out`: one file per rank, then tokenizer, config and manifest. Memory: one tensor at a time.

    Files get their names when all are complete; an interrupted conversion goes on where it stopped. `dtype`
    None keeps every tensor as it is stored; otherwise FP8 is dequantised, and everything but the gate's fp32
    bias is cast to it. ValueError, before any output, if anything does not fit.
    """
    if checkpoint.manifest or out.resolve() == checkpoint.folder.resolve():
        raise ValueError(f"{checkpoint.folder}: convert from a HuggingFace folder into another one")
    if ranks < 1:
        raise ValueError(f"--model-parallel is {ranks}; it must be 1 or more")
    cfg = checkpoint.cfg if dtype is None else replace(checkpoint.cfg, fp8=False, dtype="bfloat16")
    plans, source = plan_ranks(checkpoint, cfg, ranks, dtype), fingerprint(checkpoint)
    headers = [file_header(plan, f"{source} rank {rank}/{ranks}") for rank, plan in enumerate(plans)]
    sizes = [len(header) + sum(map(n_bytes, plan)) for header, plan in zip(headers, plans)]
    manifest = {"model_parallel": ranks, "source": source,
                "dtype": "as stored" if dtype is None else cfg.dtype,
                "files": {rank_file(rank, ranks): size for rank, size in enumerate(sizes)}}
    if (out / MANIFEST).exists():
        if read_json(out / MANIFEST) != manifest:
            raise ValueError(f"{out}: holds another conversion; remove it or choose another folder")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_ranks(checkpoint, out, plans, headers)
    for name in COMPANIONS:
        if (checkpoint.folder / name).exists():
            shutil.copyfile(checkpoint.folder / name, out / name)
    groups = {key: value for key, value in asdict(cfg).items() if value is not None}
    (out / "config.json").write_text(json.dumps(groups, indent=2) + "\n")
    (out / (MANIFEST + ".part")).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(out / (MANIFEST + ".part"), out / MANIFEST)


def write_ranks(checkpoint: Checkpoint, out: Path, plans: list[list[Entry]], headers: list[bytes]) -> None:
    """Stream all ranks' files side by side: a source tensor is read once and cut while it is in memory.

    Written by hand because the safetensors package can only write a file that is in memory as a whole.
    """
    ranks = len(plans)
    parts = [out / (rank_file(rank, ranks) + ".part") for rank in range(ranks)]
    ends = [list(accumulate(map(n_bytes, plan), initial=len(header))) for plan, header in zip(plans, headers)]
    done = min(map(n_complete, parts, headers, ends))
    streams = [checkpoint.tensors(plan[done:], Shard(rank, ranks)) for rank, plan in enumerate(plans)]
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="convert", unit="B", unit_scale=True,
                                       total=sum(end[-1] for end in ends),
                                       initial=sum(end[done] for end in ends)))
        files = [stack.enter_context(open(part, "r+b" if done else "wb")) for part in parts]
        for file, header, end in zip(files, headers, ends):
            file.write(header)
            file.seek(end[done])
            file.truncate()
        for pieces in zip(*streams):
            for file, (entry, _, tensor) in zip(files, pieces):
                bar.update(file.write(as_bytes(tensor.to(entry.dtype)).numpy()))
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    for rank, part in enumerate(parts):
        os.replace(part, out / rank_file(rank, ranks))


def n_complete(part: Path, header: bytes, ends: list[int]) -> int:
    """How many tensors an interrupted conversion of the same source left complete in `part`."""
    if not part.exists():
        return 0
    with open(part, "rb") as file:
        return bisect_right(ends, part.stat().st_size) - 1 if file.read(len(header)) == header else 0


def plan_ranks(checkpoint: Checkpoint, cfg: Config, ranks: int,
               dtype: torch.dtype | None) -> list[list[Entry]]:
    """Every rank's entries in the order of its file: wide dtypes first, which keeps all of them aligned."""
    plans = []
    for rank in range(ranks):
        model = Transformer(cfg, Runtime(dtype=dtype or DTYPES[cfg.dtype], tp=Shard(rank, ranks)))
        plan = checkpoint.plan(model)
        if dtype is not None:
            declared = model.state_dict()
            plan = [replace(entry, dtype=declared[entry.name].dtype) for entry in plan]
        plans.append(sorted(plan, key=lambda entry: -entry.dtype.itemsize))
    return plans


def fingerprint(checkpoint: Checkpoint) -> str:
    """Identifies a source by its config and its files' names, sizes and times: enough to tell a resumed
    conversion."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    return hashlib.sha256(repr((checkpoint.cfg, stats)).encode()).hexdigest()[:16]


def n_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def file_header(plan: list[Entry], source: str) -> bytes:
    """The head of a safetensors file: 8 bytes of length, then JSON with each tensor's dtype, shape and
    place."""
    names, offset = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}, 0
    head: dict = {"__metadata__": {"format": "pt", "source": source}}
    for entry in plan:
        head[entry.name] = {"dtype": names[entry.dtype], "shape": entry.shape,
                            "data_offsets": [offset, offset + n_bytes(entry)]}
        offset += n_bytes(entry)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def verify(checkpoint: Checkpoint, out: Path) -> int:
    """Put the ranks' parts together again and compare them with the source bit for bit; returns the number.

    ValueError names the first tensor that differs. FP8 that was dequantised is compared in that form.
    """
    converted, count = Checkpoint(out), 0
    ranks = converted.manifest["model_parallel"]
    dtype = None if converted.manifest["dtype"] == "as stored" else DTYPES[converted.cfg.dtype]
    plan = plan_ranks(checkpoint, converted.cfg, ranks, dtype)[0]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(out / rank_file(rank, ranks), "pt")) for rank in range(ranks)]
        for entry in tqdm(plan, desc="verify", unit="tensor"):
            for _, e, source in checkpoint.tensors([replace(entry, heads=0)], Shard()):
                stored = [file.get_slice(entry.name) for file in files]
                parts = [part[:] if e is None else part[e] for part in stored]
                if entry.heads:                         # back from RoPE's interleaved order to the halves
                    split = (entry.heads, -1, 2)
                    parts = [part.unflatten(0, split).transpose(1, 2).flatten(0, 2) for part in parts]
                wholes = parts if entry.cut is None else [torch.cat(parts, dim=entry.cut)]
                expected = as_bytes(source.to(entry.dtype))
                if not all(torch.equal(as_bytes(whole), expected) for whole in wholes):
                    raise ValueError(f"{out}: {entry.name} does not equal {entry.keys[e or 0]} of the source")
                count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Reshard a HuggingFace checkpoint for N ranks.")
    parser.add_argument("--hf-ckpt-path", type=Path, required=True, help="HuggingFace folder")
    parser.add_argument("--save-path", type=Path, required=True, help="folder to write")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N", help="ranks that will run it")
    parser.add_argument("--dtype", choices=["bf16"], help="dequantise FP8, cast to bf16; default: as stored")
    parser.add_argument("--verify", action="store_true", help="compare every tensor written with its source")
    args = parser.parse_args(argv)
    try:
        checkpoint = Checkpoint(args.hf_ckpt_path)
        convert(checkpoint, args.save_path, args.model_parallel, torch.bfloat16 if args.dtype else None)
        for note in checkpoint.notes:
            print(note, file=sys.stderr)
        if args.verify:
            print(f"verified {verify(checkpoint, args.save_path)} tensors, all equal", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
