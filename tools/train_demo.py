"""Makes the demo checkpoint from nothing: tokenizer, data, training, FP8, evaluation.

    torchrun --nproc-per-node 2 tools/train_demo.py         all of it; goes on where it was interrupted
    python tools/train_demo.py --eval-only                  measures what lies in demo/

The twin that is trained is transformers' DeepseekV3, plus V3's multi-token prediction module (V3 section 2.2)
built from the same layers: model.py is written for inference, and a model that somebody else wrote, trained
there and run here, proves ours once more. What V3 does in training is done here, at 1/350,000 of its size:

    balance     no auxiliary loss; after every step the bias of a busy expert falls by gamma, that of an idle
                one rises (section 2.1.2). V3's small sequence-wise loss (Eq. 17-20) is left out.
    MTP         one module predicts the token after the next; its loss counts 0.3, later 0.1 (section 4.2)
    YaRN        active from the first step; conversations of up to 1,500 tokens are in the mix
    FP8         the last fifth of training sees its weights through e4m3 blocks of 128 x 128 (straight-through
                gradients), so that what is stored is what was trained

The data are tools/demo_task.py's problems in R1's format, some with earlier turns before them; the loss
counts what the model has to write. The data of step i depend on the seed and i alone, so an interrupted run
continues exactly. The same machine, versions and number of processes give the same file; other processors sum
in another order.
"""
import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer as BPE, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo_task  # noqa: E402
import kernel  # noqa: E402
from chat import ASSISTANT, BOXED, END_THINK, THINK, TOOLS, USER, Chat, Tokenizer  # noqa: E402
from convert import Checkpoint, Parser, load_model  # noqa: E402
from generate import DEMO, Sampling, generate  # noqa: E402
from model import Runtime  # noqa: E402

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
VOCAB = 512
CONFIG = dict(
    vocab_size=VOCAB, hidden_size=96, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=8, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    n_group=4, topk_group=2, first_k_dense_replace=1, moe_layer_freq=1, norm_topk_prob=True,
    routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=1,
    rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, tie_word_embeddings=False,
    max_position_embeddings=2048, initializer_range=0.02, bos_token_id=0, eos_token_id=1)
ROPE = dict(factor=4, original_max_position_embeddings=512, beta_fast=32, beta_slow=1, mscale=1.0,
            mscale_all_dim=1.0)
PAD_ID = 2
GAMMA = 1e-3                        # step of the correction bias (V3 section 4.2)
STEPS = 2800
POOL = 32                           # conversations per step
MICRO_TOKENS = 4096                 # tokens of one forward pass, padding included
LONGEST = 1500                      # tokens of a conversation

# ------------------------------------------------------------------------------------------------------------
# 1. Tokenizer


def train_tokenizer(folder: Path, seed: int) -> None:
    """Byte-level BPE of 512 tokens with single digits and R1's special tokens, as R1's files have them."""
    rng = random.Random(f"tokenizer {seed}")
    corpus = []
    for _ in range(20_000):
        p = demo_task.make(rng, heldout=False)
        corpus.append(f"{p.question} {BOXED}\n{p.reasoning}\n\n{p.reply}")
    bpe = BPE(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{L}\p{N}]|\n+| ?\p{L}+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, "<|EOT|>", *TOOLS]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    data = json.loads(bpe.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS, PAD)      # as in R1's files: <think> stays text
    write_json(folder / "tokenizer.json", data)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"], "chat_template": CHAT_TEMPLATE})
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True,
                                                   "temperature": 0.6, "top_p": 0.95})


# R1's format as a template: what chat.py writes by hand; a test holds them against each other.
CHAT_TEMPLATE = "".join(line.strip() for line in """
{%- set ns = namespace(system=[], outputs=false) %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + [m.content] %}{% endfor %}
{{- bos_token + ns.system | join('\\n\\n') }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
{%- elif m.role == 'tool' %}{{- raise_exception('this model was not trained with tools') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}
""".strip().splitlines())


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# 2. Data


def conversation(rng: random.Random, chat: Chat) -> tuple[list[int], int]:
    """Token ids of a conversation that ends with the model's turn, and where that turn begins."""
    messages = []
    turns = rng.choices([0, rng.randint(1, 3), rng.randint(4, 40)], weights=[75, 23, 2])[0]
    for _ in range(turns):
        p = demo_task.make(rng, heldout=False)
        messages += [{"role": "user", "content": p.question}, {"role": "assistant", "content": p.reply}]
    p = demo_task.make(rng, heldout=False)
    directive = rng.choices(["", "\n" + BOXED, " " + BOXED], weights=[84, 8, 8])[0]
    prompt = chat.encode([*messages, {"role": "user", "content": p.question + directive}])
    completion = chat.tokenizer.encode(f"{p.reasoning}\n{END_THINK}\n\n{p.reply}{EOS}")
    return prompt + completion, len(prompt)


def micro_batches(step: int, seed: int, chat: Chat, rank: int, ranks: int) -> tuple[list, int]:
    """One rank's part of a step, sorted by length: pairs of token ids [b, s] and which of them count [b, s].

    Also how many tokens count in the whole step, whoever has them.
    """
    rng = random.Random(f"step {seed} {step}")
    pool = sorted((c for c in (conversation(rng, chat) for _ in range(POOL)) if len(c[0]) <= LONGEST),
                  key=lambda c: len(c[0]))
    groups: list[list] = [[]]
    for c in pool[rank::ranks]:
        if groups[-1] and (len(groups[-1]) + 1) * len(c[0]) > MICRO_TOKENS:
            groups.append([])
        groups[-1].append(c)
    batches = []
    for group in groups:
        tokens = torch.full((len(group), len(group[-1][0])), PAD_ID)
        counts = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (ids, start) in enumerate(group):
            tokens[row, :len(ids)] = torch.tensor(ids)
            counts[row, start:len(ids)] = True
        batches.append((tokens, counts))
    return batches, sum(len(ids) - start for ids, start in pool)


# ------------------------------------------------------------------------------------------------------------
# 3. The twin


def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_) -> tuple:
    """Causal attention for many short sequences: three times faster here than PyTorch's own for the CPU."""
    s = q.shape[-2]
    future = torch.full((s, s), -1e9, dtype=q.dtype).triu(1).expand(q.shape[0] * q.shape[1], s, s)
    q, k, v = q.to(v.dtype).flatten(0, 1), k.to(v.dtype).flatten(0, 1), v.flatten(0, 1)
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scaling).softmax(dim=-1)
    return torch.bmm(weights, v).unflatten(0, (-1, module.num_heads)).transpose(1, 2), None     # [b, s, h, v]


AttentionInterface.register("short", attention)
AttentionMaskInterface.register("short", lambda *args, **kwargs: None)


class Twin(nn.Module):
    """transformers' DeepseekV3 and the multi-token prediction module (V3 Eq. 21-23)."""

    def __init__(self):
        super().__init__()
        config = DeepseekV3Config(**CONFIG, rope_theta=10000.0, rope_scaling={"type": "yarn", **ROPE},
                                  use_cache=False)
        self.main = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="short")
        self.main.set_experts_implementation("eager")
        m = config.hidden_size
        self.enorm, self.hnorm, self.norm = (DeepseekV3RMSNorm(m, config.rms_norm_eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * m, m, bias=False)
        self.layer = DeepseekV3DecoderLayer(config, layer_idx=config.num_hidden_layers)
        self.layer.apply(self.main._init_weights)
        self.layer.mlp.experts.config = config
        self.loads: dict[str, Tensor] = {}              # tokens per expert of the current step, by layer
        self.real: Tensor                               # which tokens of the current pass are no padding
        for name, module in self.named_modules():
            if name.endswith("mlp.gate"):
                # the choice of experts flips on rounding: fp32, as everywhere in this project
                module.forward = torch.autocast("cpu", enabled=False)(module.forward)
                module.register_forward_hook(lambda gate, _, out, name=name: self._count(name, out[2]))

    def _count(self, name: str, chosen: Tensor) -> None:
        load = torch.bincount(chosen[self.real.flatten()].flatten(), minlength=CONFIG["n_routed_experts"])
        self.loads[name] = self.loads.get(name, 0) + load

    def forward(self, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the next token, and of the one after it, over the tokens that count."""
        base = self.main.model
        self.real = tokens[:, :-1] != PAD_ID
        h = base(input_ids=tokens[:, :-1]).last_hidden_state                    # [b, s-1, m], normed
        loss = self._cross_entropy(h, tokens[:, 1:], counts[:, 1:])
        h, known = h[:, :-1], tokens[:, 1:-1]                                   # [b, s-2, m], t_1 .. t_(s-2)
        self.real = known != PAD_ID
        x = torch.cat([self.enorm(base.embed_tokens(known)), self.hnorm(h)], dim=-1)
        x = self.eh_proj(x)             # V3 Eq. 21, embedding first and h normed once more, as in the files
        positions = torch.arange(x.shape[1])[None]
        x = self.layer(x, position_embeddings=base.rotary_emb(x, positions))    # V3 Eq. 22
        return loss, self._cross_entropy(self.norm(x), tokens[:, 2:], counts[:, 2:])        # V3 Eq. 23

    def _cross_entropy(self, h: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        return F.cross_entropy(self.main.lm_head(h[counts]).float(), targets[counts], reduction="sum")

    @torch.no_grad()
    def balance(self) -> None:
        """V3 section 2.1.2: the bias of busy experts falls by gamma, that of idle ones rises by it."""
        for name, load in self.loads.items():
            bias = self.get_submodule(name).e_score_correction_bias
            bias += GAMMA * (load.float().mean() - load).sign()
        self.loads = {}


@torch.no_grad()
def through_fp8(w: Tensor) -> Tensor:
    """What is left of w [..., n, k] after it was stored in FP8."""
    flat = w.reshape(-1, *w.shape[-2:])
    return torch.stack([kernel.weight_dequant(*kernel.weight_quant(x), x.dtype) for x in flat]).view_as(w)


# ------------------------------------------------------------------------------------------------------------
# 4. Training


def schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to nothing."""
    return min((step + 1) / 50, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Run:
    """A training run that can be interrupted: the twin, its optimizers, and a log entry per step so far.

    The matrices of the layers learn with Muon (orthogonalised momentum), which wants them one by one, so an
    expert of a stack is a view of its own; embedding, head, gates and vectors learn with AdamW.
    """

    def __init__(self, args: argparse.Namespace, chat: Chat):
        torch.manual_seed(args.seed)
        self.args, self.state = args, args.work / "state.pt"
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.settings = {"seed": args.seed, "steps": args.steps, "rate": args.rate, "ranks": self.ranks}
        self.twin, self.chat, self.log = Twin(), chat, []
        learn = dict(self.twin.named_parameters())
        matrices = {name: p for name, p in learn.items() if p.ndim >= 2 and is_matrix(name)}
        self.experts = [(nn.Parameter(p.data[e, rows]), p, (e, rows))
                        for name, p in matrices.items() if p.ndim == 3
                        for e in range(len(p)) for rows in halves(name, p.shape[1])]
        single = [p for p in matrices.values() if p.ndim == 2] + [view for view, _, _ in self.experts]
        self.optimizers = [
            torch.optim.Muon(single, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for name, p in learn.items() if name not in matrices], betas=(0.9, 0.95),
                              weight_decay=0.0)]
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            if saved["settings"] != self.settings:
                raise ValueError(f"{self.state}: a run with {saved['settings']}, not {self.settings}; finish "
                                 f"it with those settings, or remove {args.work}")
            self.twin.load_state_dict(saved["twin"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            self.log = saved["log"]

    def save(self) -> None:
        part = self.state.with_suffix(".part")
        torch.save({"twin": self.twin.state_dict(), "log": self.log, "settings": self.settings,
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, part)
        part.replace(self.state)

    def finish(self) -> Twin:
        """Train from wherever the run stands to its last step."""
        steps, done = self.args.steps, len(self.log)
        with tqdm(total=steps, initial=done, desc="train", unit="step", disable=self.rank > 0) as bar:
            for step in range(done, steps):
                self.log.append(self.step(step))
                bar.set_postfix({key: f"{self.log[-1][key]:.4f}" for key in ("loss", "mtp")}, refresh=False)
                bar.update()
                if self.rank == 0 and ((step + 1) % 100 == 0 or step + 1 == steps):
                    self.save()
        return self.twin

    def step(self, step: int) -> dict:
        """One update; returns what to log of it."""
        fp8 = [p for name, p in self.twin.named_parameters() if p.ndim >= 2 and is_fp8(name)]
        exact = [w.data for w in fp8]
        if step >= 0.8 * self.args.steps:       # gradients from the rounded weights, the update on exact ones
            for w in fp8:
                w.data = through_fp8(w.data)
        entry = self.backward(step)
        for w, data in zip(fp8, exact):
            w.data = data
        nn.utils.clip_grad_norm_(self.twin.parameters(), 1.0)
        for view, p, where in self.experts:
            view.grad = p.grad[where]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.rate * schedule(step, self.args.steps)
            optimizer.step()
        self.twin.zero_grad()
        self.twin.balance()
        return entry

    def backward(self, step: int) -> dict:
        """Gradients of the mean loss per token; the ranks share the step's conversations."""
        batches, n = micro_batches(step, self.args.seed, self.chat, self.rank, self.ranks)
        weight = 0.3 if step < 0.7 * self.args.steps else 0.1
        sums = torch.zeros(3)
        for tokens, counts in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss, mtp = self.twin(tokens, counts)
            ((loss + weight * mtp) / n).backward()
            sums += torch.stack([loss.detach() / n, mtp.detach() / n, (tokens != PAD_ID).sum()])
        if self.ranks > 1:
            shared = [sums, *self.twin.loads.values(), *(p.grad for p in self.twin.parameters())]
            flat = torch.cat([tensor.flatten().float() for tensor in shared])
            dist.all_reduce(flat)
            for tensor, total in zip(shared, flat.split([tensor.numel() for tensor in shared])):
                tensor.copy_(total.view_as(tensor))
        return dict(zip(("loss", "mtp", "tokens"), sums.tolist()))


def is_matrix(name: str) -> bool:
    """The linear layers proper: not the tables of the vocabulary, and not the gates."""
    return not any(word in name for word in ("embed", "lm_head", "gate.weight"))


def is_fp8(name: str) -> bool:
    """What is stored in FP8: the linear layers, but for MTP's eh_proj, as in R1's files."""
    return is_matrix(name) and "eh_proj" not in name


def halves(name: str, rows: int) -> list[slice]:
    """transformers keeps gate_proj and up_proj of an expert in one matrix, one below the other."""
    cuts = [0, rows // 2, rows] if "gate_up" in name else [0, rows]
    return [slice(*pair) for pair in zip(cuts, cuts[1:])]


# ------------------------------------------------------------------------------------------------------------
# 5. The checkpoint on disk


def export(twin: Twin, out: Path) -> None:
    """HuggingFace's layout as R1 is published: FP8 with weight_scale_inv, bf16, and MTP as one more layer."""
    mtp = f"model.layers.{CONFIG['num_hidden_layers']}."
    tensors = {**twin.main.state_dict(), **{mtp + name: t for name, t in twin.layer.state_dict().items()}}
    state = {key: t for name, tensor in tensors.items() for key, t in per_expert(name, tensor).items()}
    state |= {mtp + "enorm.weight": twin.enorm.weight, mtp + "hnorm.weight": twin.hnorm.weight,
              mtp + "eh_proj.weight": twin.eh_proj.weight, mtp + "shared_head.norm.weight": twin.norm.weight,
              mtp + "embed_tokens.weight": state["model.embed_tokens.weight"],
              mtp + "shared_head.head.weight": state["lm_head.weight"]}
    stored = {}
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().float()
        if is_fp8(name) and tensor.ndim == 2:
            stored[name], stored[name + "_scale_inv"] = kernel.weight_quant(tensor)
        else:
            stored[name] = tensor if "e_score_correction_bias" in name else tensor.bfloat16()
    stored = {name: tensor.clone().contiguous() for name, tensor in stored.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **CONFIG,
        "torch_dtype": "bfloat16", "rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **ROPE},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                "weight_block_size": [128, 128]}})


def per_expert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """transformers holds a layer's experts in two stacks; files have three matrices for each of them."""
    if name.endswith("experts.gate_up_proj"):
        stacks = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1)))
    elif name.endswith("experts.down_proj"):
        stacks = {"down_proj": tensor}
    else:
        return {name: tensor}
    prefix = name.rpartition(".")[0]
    return {f"{prefix}.{e}.{kind}.weight": matrix
            for kind, stack in stacks.items() for e, matrix in enumerate(stack)}


# ------------------------------------------------------------------------------------------------------------
# 6. Evaluation, with generate() as any user has it


def evaluate(folder: Path, per_kind: int, k: int, seed: int) -> dict:
    """pass@1 and cons@k on held-out questions, sampled as R1's report does (temperature 0.6, top-p 0.95)."""
    rng = random.Random(f"evaluation {seed}")
    problems = [demo_task.make(rng, True, kind) for kind in demo_task.KINDS for _ in range(per_kind)]
    texts, loads = complete(folder, [p.question for p in problems], k, seed)
    rows = []
    for p, answers in zip(problems, texts):
        grades = [demo_task.grade(text, p.answer) for text in answers]
        rows.append((p.kind, *(sum(marks) / k for marks in zip(*grades)), vote(answers, p.answer)))
        if rows[-1][3] < 1:
            tqdm.write(f"--- {p.question} [{p.answer}]\n{answers[0]}")
    results = {"seed": seed, "questions of each kind": per_kind, "samples of each question": k,
               "task mix": score(rows, demo_task.KINDS, k)}
    for kind in demo_task.KINDS:
        results[kind] = score([row for row in rows if row[0] == kind], demo_task.KINDS, k)
    return {**results, "load": loads}


def complete(folder: Path, questions: list[str], k: int, seed: int) -> tuple[list[list[str]], dict]:
    """k completions of each question, and the share of the tokens that each expert of each layer got."""
    model = load_model(Checkpoint(folder), Runtime(dtype=torch.float32, rows=128, max_seq_len=1024))
    chat = Chat(Tokenizer(folder))
    loads = {}

    def count(layer: str, chosen: Tensor) -> None:
        load = torch.bincount(chosen.flatten(), minlength=CONFIG["n_routed_experts"])
        loads[layer] = loads.get(layer, 0) + load

    for i in range(CONFIG["first_k_dense_replace"], CONFIG["num_hidden_layers"]):
        model.layers[i].ffn.gate.register_forward_hook(lambda _, __, out, i=i: count(f"layer {i}", out[1]))
    prompts = [chat.encode([{"role": "user", "content": question}]) for question in questions]
    wanted = [(i, sample) for i in range(len(prompts)) for sample in range(k)]
    tokens = {pair: [] for pair in wanted}
    events = generate(model, prompts, chat.tokenizer.stop_ids, 700, Sampling(seed=seed), VOCAB, wanted)
    with tqdm(total=len(wanted), desc="evaluate", unit="sample") as bar:
        for event in events:
            tokens[event.prompt, event.sample] += event.tokens
            bar.update(event.finish_reason is not None)
    shares = {layer: (load / load.sum()).tolist() for layer, load in loads.items()}
    texts = [[chat.tokenizer.decode(tokens[i, sample]) for sample in range(k)] for i in range(len(prompts))]
    return texts, shares


def score(rows: list[tuple], weights: dict[str, float], k: int) -> dict[str, float]:
    """Means over questions (kind, share right, share well formed, vote), and two standard errors of pass@1.

    One is of the questions drawn; the other of sampling the same questions again, which falls with k.
    """
    w = torch.tensor([float(weights[kind]) for kind, *_ in rows], dtype=torch.float64)
    w /= w.sum()
    right, formed, votes = torch.tensor([row[1:] for row in rows], dtype=torch.float64).T
    mean, spread = (w * right).sum(), right * (1 - right) / (k - 1)
    return {"pass@1": mean.item(), "error": (w * (right - mean)).square().sum().sqrt().item(),
            "rerun error": (w.square() * spread).sum().sqrt().item(), f"cons@{k}": (w * votes).sum().item(),
            "well formed": (w * formed).sum().item()}


def vote(texts: list[str], answer: str) -> float:
    """Majority vote of the samples' boxes; a tie counts as the chance of drawing the right one."""
    ballots = Counter(boxes[-1] for text in texts if (boxes := demo_task.boxes(text.partition(END_THINK)[2])))
    winners = [a for a, n in ballots.items() if n == max(ballots.values())]
    return (answer in winners) / len(winners) if winners else 0.0


# ------------------------------------------------------------------------------------------------------------
# 7. What people read about it

README = """# The demo: a small R1 that does arithmetic

A DeepSeek-V3-architecture model with everything that R1 has: multi-head latent attention with both latents,
experts in groups with a correction bias and a shared expert, YaRN, a multi-token prediction module, FP8
weights in 128 x 128 blocks, R1's special tokens and conversation format. It thinks between `<think>` and
`</think>` and puts its answer in a box. {parameters:,} parameters ({active:,} used per token), and {mtp:,}
more in the MTP layer.

It adds, subtracts, multiplies (up to three digits times two) and compares whole numbers of up to four
digits, alone, as expressions with two operations, and in small stories; anything else gets a polite
refusal. It knows English sentences like those in [tools/demo_task.py](../tools/demo_task.py) and no others:
a story with another plot can be misread. [The training script](../tools/train_demo.py) makes it from
nothing: `make train-demo`.

## How well

Held-out questions: each has a calculation that no training example contained, in whatever sentence (the split
is a hash, `held_out` in tools/demo_task.py). Temperature 0.6, top-p 0.95, fp32, {k} samples of each of {n}
questions a kind. The first error is of the questions drawn, the second of sampling the same ones again.

| questions | pass@1 | standard errors | cons@{k} | well formed |
|---|---|---|---|---|
{table}

"Task mix" weighs the kinds as training does ({mix}).
Well formed: `</think>` once, then one box. `python tools/train_demo.py --eval-only` repeats the measurement; all
of it is in [results.json](results.json).

Tokens that each expert got in these completions, in per cent (an even load is {even:.1f}):

{load}

## Training

![loss](loss.png)

{steps:,} steps, {tokens:.1f} million tokens, seed {seed}, {ranks} processes. SHA-256 of model.safetensors:
`{sha}`
"""


def write_readme(folder: Path, results: dict) -> None:
    k, training = results["samples of each question"], results["training"]

    def row(name: str, r: dict) -> str:
        passed, agreed, formed = (100 * r[key] for key in ("pass@1", f"cons@{k}", "well formed"))
        errors = f"{100 * r['error']:.2f}, {100 * r['rerun error']:.2f}"
        return f"| {name} | {passed:.1f} % | {errors} | {agreed:.1f} % | {formed:.1f} % |"

    table = [row(name, r) for name, r in results.items() if name == "task mix" or name in demo_task.KINDS]
    load = [f"    {layer}   " + " ".join(f"{100 * share:5.1f}" for share in shares)
            for layer, shares in results["load"].items()]
    (folder / "README.md").write_text(README.format(
        **results["parameters"], **training, k=k, n=results["questions of each kind"], table="\n".join(table),
        mix=", ".join(f"{kind} {weight} %" for kind, weight in demo_task.KINDS.items()),
        load="\n".join(load), even=100 / CONFIG["n_routed_experts"]), encoding="utf-8")


def count_parameters(twin: Twin) -> dict[str, int]:
    """Of the model proper, of what a token uses of it, and of the MTP layer without its copies of tables."""
    main = sum(p.numel() for p in twin.main.parameters())
    experts = [p for name, p in twin.main.named_parameters() if "mlp.experts" in name]
    idle = sum(p.numel() * (1 - CONFIG["num_experts_per_tok"] / len(p)) for p in experts)
    everything = sum(p.numel() for p in twin.parameters())
    return {"parameters": main, "active": int(main - idle), "mtp": everything - main}


def plot(log: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.figure(figsize=(7, 3.5))
    millions = torch.tensor([entry["tokens"] for entry in log]).cumsum(0) / 1e6
    for key, label in (("loss", "next token"), ("mtp", "the token after it (MTP)")):
        pyplot.plot(millions, [entry[key] for entry in log], label=label, linewidth=0.8)
    pyplot.xlabel("million tokens")
    pyplot.ylabel("cross-entropy per token (nats)")
    pyplot.yscale("log")
    pyplot.legend()
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=100, metadata={"Software": None})


# ------------------------------------------------------------------------------------------------------------
# 8. Command line


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Make the demo checkpoint from nothing, or measure it.")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder of the checkpoint (default: demo)")
    parser.add_argument("--work", type=Path, default=DEMO.parent / ".demo-training",
                        help="where an interrupted run continues (default: .demo-training)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="of about 5,500 tokens (%(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate (%(default)s)")
    parser.add_argument("--eval-only", action="store_true",
                        help="measure what lies in --out again, and write the figures there")
    parser.add_argument("--questions", type=int, default=100, help="of each kind to measure (%(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="of each question, 2 or more (%(default)s)")
    args = parser.parse_args()
    for name, least in (("seed", 0), ("steps", 1), ("questions", 1), ("samples", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be {least} or more")
    return args


def train(args: argparse.Namespace) -> None:
    """Train, or go on; the checkpoint is built in --work and appears in --out when it is complete."""
    build = args.work / "checkpoint"
    build.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", 0)) == 0:
        train_tokenizer(build, args.seed)
    if dist.is_initialized():
        dist.barrier()
    run = Run(args, Chat(Tokenizer(build)))
    run.finish()
    if dist.is_initialized():
        dist.barrier()
    if run.rank == 0:
        export(run.twin, build)
        plot(run.log, build / "loss.png")
        sha = hashlib.sha256((build / "model.safetensors").read_bytes()).hexdigest()
        tokens = sum(entry["tokens"] for entry in run.log) / 1e6
        write_json(build / "results.json", {"parameters": count_parameters(run.twin), "training": {
            "steps": args.steps, "tokens": tokens, "seed": args.seed, "ranks": run.ranks, "sha": sha}})
        args.out.mkdir(parents=True, exist_ok=True)
        for file in build.iterdir():
            shutil.move(file, args.out / file.name)


def main() -> int:
    args = parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    try:
        if not args.eval_only:
            train(args)
        if int(os.environ.get("RANK", 0)) == 0:
            torch.set_num_threads(os.cpu_count())
            made = json.loads((args.out / "results.json").read_text(encoding="utf-8"))
            made = {key: made[key] for key in ("parameters", "training")}
            results = {**made, **evaluate(args.out, args.questions, args.samples, args.seed)}
            write_json(args.out / "results.json", results)
            write_readme(args.out, results)
            print((args.out / "README.md").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        print(f"train_demo.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
