"""Generate text with R1 or a distill: talk to it, or answer a file of prompts.

    python generate.py --ckpt-path DIR --interactive
    python generate.py --ckpt-path DIR --prompt "What is 478 + 56?"
    python generate.py --ckpt-path DIR --input-file prompts.jsonl --output-file out.jsonl
    torchrun --nproc-per-node N generate.py ...         the same over N tensor-parallel ranks

DIR is a HuggingFace folder or one that convert.py wrote; without it, the small model in demo/ answers.
Defaults are R1's own advice: temperature 0.6, top-p 0.95, no system prompt, and an answer that starts
inside <think>.

`generate` is the seam of the project: it turns prompts into a stream of events, and everything else consumes
those.
"""
import argparse
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import kernel
import memory
from batch import Results, as_messages, read_prompts, run_batch, thinks
from chat import END_THINK, THINK, Chat, Tokenizer, advised
from convert import Checkpoint, Parser, complain, fingerprint, load_model, rank_file
from decode import Decoder, check, precompile
from interactive import Conversation, Keyboard, Screen, show
from model import DTYPES, Cache, Config, Runtime, Shard, Transformer

# ------------------------------------------------------------------------------------------------------------
# 1. Sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. R1's evaluation: temperature 0.6, top-p 0.95 (R1 README)."""
    temperature: float = 0.6            # 0 takes the most likely token
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or from 0.001 to 1000")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}; it must be over 0 and at most 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Draw one token per row: logits fp32 [b, vocab], uniforms float64 [b] from [0, 1) -> ids int64 [b].

    Nucleus sampling (arXiv 1904.09751): the most likely tokens whose mass reaches top_p, the one that crosses
    the line included, are renormalised. One uniform number picks from their cumulative distribution, so a
    row's token depends on that row alone.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits / sampling.temperature).softmax(dim=-1)
    ids = candidates(probs, sampling.top_p)                                     # [b, n], ascending
    probs, order = probs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    mass = probs.double().cumsum(dim=-1)                                       # [b, n], most likely first
    kept = (mass - probs < sampling.top_p).sum(dim=-1, keepdim=True)            # [b, 1] tokens in the nucleus
    kept = kept.clamp(min=1)                            # none if the logits are NaN, which `draw` reports
    target = uniforms[:, None] * mass.gather(1, kept - 1)
    picked = (mass <= target).sum(dim=-1, keepdim=True).minimum(kept - 1)       # [b, 1]
    return ids.gather(1, order.gather(1, picked))[:, 0]


def candidates(probs: Tensor, top_p: float) -> Tensor:
    """Ids [b, n] that hold each row's nucleus, ascending, given probabilities [b, vocab].

    Ids less likely than (1 - top_p) / (2 vocab) weigh less than 1 - top_p together, so none is in it. A CPU
    takes longer to sort 150,000 of them than to find the few others; a GPU takes all, because a CUDA graph
    cannot wait for a number. (The 2 is for rounded sums.)
    """
    vocab = probs.shape[-1]
    if probs.device.type != "cpu":
        return torch.arange(vocab, device=probs.device).expand_as(probs)
    likely = (probs >= (1 - top_p) / (2 * vocab)).sum(dim=-1).max().item()
    return probs.topk(max(likely, 1)).indices.sort(dim=-1).values


# ------------------------------------------------------------------------------------------------------------
# 2. generate(): prompts in, events out


@dataclass(frozen=True)
class Event:
    """What one forward pass added to one completion."""
    prompt: int                         # index of the prompt
    sample: int                         # which of its completions
    tokens: tuple[int, ...]             # new tokens; the end token is not among them
    logprobs: tuple[float, ...]         # of these tokens, under the model's own distribution (temperature 1)
    finish_reason: str | None           # None: goes on. "stop": end token. "length": no more wanted, or
                                        # no room. "repetition": it went round in a loop


@dataclass(frozen=True)
class ThinkBudget:
    """Closes reasoning that has taken `tokens` tokens, as in s1's budget forcing (arXiv 2501.19393)."""
    tokens: int
    opening: int                        # id of <think>
    closing: int                        # id of </think>
    ending: tuple[int, ...]             # what is written in the model's place: "\n</think>\n\n"


class Loop:
    """Notices a completion that repeats itself: 4 times the same up to 1024 tokens, and 256 tokens at least.

    R1 falls into such loops, most of all at low temperature, and would stay there up to the limit of tokens.
    """
    PERIODS = np.arange(1, 1025)
    ENOUGH = np.maximum(3 * PERIODS, 256 - PERIODS)     # repeated tokens, after the first round

    def __init__(self):
        self.past = np.full(len(self.PERIODS), -1)      # tokens, the last one first
        self.repeated = np.zeros_like(self.past)        # for each period: how many last tokens were the same

    def feed(self, token: int) -> bool:
        """Whether this token completes a loop."""
        self.repeated = (self.repeated + 1) * (self.past == token)
        self.past = np.concatenate(([token], self.past[:-1]))
        return bool((self.repeated >= self.ENOUGH).any())


@dataclass
class Row:
    """A completion in progress: one row of the batch."""
    prompt: int
    sample: int
    length: int                         # tokens in its cache row
    budget: int                         # tokens that it may still produce
    rng: np.random.Generator            # its own stream, so its draws do not depend on its neighbours
    think: ThinkBudget | None = None
    loop: Loop | None = None            # None: it may repeat itself
    thought: int | None = None          # tokens of reasoning so far; None outside of it
    forced: deque[int] = field(default_factory=deque)       # tokens to be taken next, whatever is drawn
    token: int = 0                      # drawn, but not yet run through the model
    ended: bool = False                 # its place is free for the next completion

    def begin(self, prompt: list[int]) -> None:
        """Notice whether the prompt has opened the reasoning: then it ends with <think> and a newline."""
        if self.think and self.think.opening in prompt[-2:] and prompt[-1] != self.think.closing:
            self.follow(self.think.opening)

    def take(self, token: int, stop_ids: Collection[int]) -> str | None:
        """Go on by this token; the reason if that is the end."""
        self.token, self.budget = token, self.budget - 1
        if self.think:
            self.follow(token)
        looped = self.loop is not None and self.loop.feed(token)
        reason = ("stop" if token in stop_ids else "repetition" if looped
                  else "length" if self.budget == 0 else None)
        self.ended = reason is not None
        return reason

    def follow(self, token: int) -> None:
        """Count the tokens of reasoning; the last one of the budget is followed by the end of reasoning."""
        if token == self.think.closing:
            self.thought = None
        elif self.thought is not None:
            self.thought += 1
        elif token == self.think.opening:
            self.thought = 0
        if self.thought == self.think.tokens:
            self.forced.extend(self.think.ending)


@dataclass
class Kept:
    """A cache of one row that outlives a call of generate(), and the tokens that it holds.

    A conversation's next prompt begins like the one before, up to the last answer, which it has without its
    reasoning: what they share is not computed again.
    """
    decoder: Decoder                    # has the cache, and its CUDA graphs
    tokens: list[int] = field(default_factory=list)

    def shared(self, prompt: list[int]) -> int:
        """How many leading tokens of the prompt are here; at most all but one, whose logits are needed."""
        pairs = enumerate(zip(self.tokens, prompt[:-1]))
        return next((i for i, (kept, new) in pairs if kept != new), min(len(self.tokens), len(prompt) - 1))


def generate(model: Transformer, prompts: Sequence[list[int]], stop_ids: Collection[int], max_new_tokens: int,
             sampling: Sampling = Sampling(), n_tokens: int | None = None,
             wanted: Iterable[tuple[int, int]] | None = None, think: ThinkBudget | None = None,
             stop_loops: bool = False, kept: Kept | None = None,
             cancelled: Callable[[], bool] | None = None) -> Iterator[Event]:
    """Complete prompts (token ids), model.rt.rows at a time; a row that ends is refilled at once.

    `wanted` lists (prompt index, sample number), default one sample of each prompt. Samples of a prompt that
    follow each other share its prefill. A sample's random numbers depend on (seed, prompt index, sample
    number) alone, and so do its tokens, but for ties that rounding decides: seldom in fp32, often in bf16.
    Yields an Event per row and forward pass. A completion ends at one of `stop_ids`, after `max_new_tokens`,
    when prompt and completion fill rt.max_seq_len, or with `stop_loops` in a Loop. Ids from `n_tokens` on
    (padding of the embedding) are never drawn. `kept` (of one row) is used in place of a new cache.
    With several ranks, all call this with the same arguments; rank 0 draws, the others follow. Rank
    0's `cancelled()`, asked with every forward pass, ends the call; all ranks pass a function, or none does.
    ValueError: a prompt leaves no room for an answer. FloatingPointError: a logit is NaN.
    """
    rt = model.rt
    check_lengths(prompts, max_new_tokens, rt)
    if kept and (kept.decoder.model is not model or kept.decoder.rt != rt or rt.rows > 1):
        raise ValueError("`kept` must be of this model, as it runs now, and of one row")
    waiting = deque(((i, 0) for i in range(len(prompts))) if wanted is None else wanted)
    draw = Draw(replace(sampling, seed=0), n_tokens, rt.tp)     # equal for all seeds, which share its graphs
    batch = Batch(kept.decoder if kept else Decoder(model), draw, kept, cancelled)
    while waiting or batch.rows:
        slot = batch.free_slot()
        if waiting and slot < rt.rows:
            index, number = waiting.popleft()
            n, rng = len(prompts[index]), np.random.default_rng((sampling.seed, index, number))
            budget = min(max_new_tokens, rt.max_seq_len - n)
            row = Row(index, number, n, budget, rng, think, Loop() if stop_loops else None)
            advanced, drawn = [row], batch.start(slot, row, prompts[index])
        elif slot < len(batch.rows):                            # nothing waits: close the gap
            batch.drop(slot)
            continue
        else:
            advanced, drawn = batch.rows, batch.step()
        if drawn is None or agreed(cancelled, rt):
            return
        for row, (token, logprob) in zip(advanced, read(*drawn)):
            reason = row.take(token, stop_ids)
            new = () if reason == "stop" else (token,)
            yield Event(row.prompt, row.sample, new, (logprob,)[:len(new)], reason)


def check_lengths(prompts: Sequence[list[int]], max_new_tokens: int, rt: Runtime) -> None:
    """ValueError, before any work, if a prompt is empty or leaves no room, or no tokens are wanted."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < rt.max_seq_len:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; 1 to {rt.max_seq_len - 1} fit, because "
                             f"max_seq_len is {rt.max_seq_len} and the answer needs room")


@dataclass
class Batch:
    """Completions in progress, in the first rows of the decoder's cache, and what advances them."""
    decoder: Decoder
    draw: "Draw"
    kept: Kept | None
    cancelled: Callable[[], bool] | None
    rows: list[Row] = field(default_factory=list)
    prefilled: tuple[int, Tensor | None] = (-1, None)   # the prompt that was run last, and its logits

    def free_slot(self) -> int:
        """The place of a row that has ended, or the one behind all."""
        return next((i for i, row in enumerate(self.rows) if row.ended), len(self.rows))

    def start(self, slot: int, row: Row, prompt: list[int]) -> tuple[Tensor, Tensor] | None:
        """Put a completion of `prompt` into a free slot; what is drawn for it. None if cancelled."""
        model, cache = self.decoder.model, self.decoder.cache
        sources = [i for i, other in enumerate(self.rows) if other.prompt == row.prompt == self.prefilled[0]]
        if sources:                                     # a row still begins with this prompt: clone it
            cache.copy_row(sources[0], slot, len(prompt))
            if self.kept:
                self.kept.tokens[:] = prompt
        else:
            logits = prefill(model, prompt, cache, slot, self.kept, self.cancelled)
            if logits is None:
                return None
            self.prefilled = row.prompt, logits
        row.begin(prompt)
        self.rows[slot:slot + 1] = [row]
        first = (torch.from_numpy(chance).to(model.rt.device) for chance in chances([row]))
        return self.draw(self.prefilled[1], *first)

    def step(self) -> tuple[Tensor, Tensor]:
        """Run the token of every row; what is drawn for them."""
        longest = max(row.length for row in self.rows)
        drawn = self.decoder.step([row.token for row in self.rows], longest, self.draw, *chances(self.rows))
        for row in self.rows:
            row.length += 1
        if self.kept:
            self.kept.tokens.append(self.rows[0].token)
        return drawn

    def drop(self, slot: int) -> None:
        """Take a finished row out; the last row fills its gap, so rows 0 .. n-1 are in use."""
        last = self.rows.pop()
        if slot < len(self.rows):
            self.decoder.cache.copy_row(len(self.rows), slot, last.length)
            self.rows[slot] = last


def agreed(cancelled: Callable[[], bool] | None, rt: Runtime) -> bool:
    """Rank 0's answer to `cancelled`, on every rank, so that all stop at the same forward pass."""
    if cancelled is None:
        return False
    if rt.tp.size == 1:
        return cancelled()
    answer = torch.tensor(rt.tp.rank == 0 and cancelled(), device=rt.device)
    dist.broadcast(answer, src=0)
    return bool(answer)


def prefill(model: Transformer, prompt: list[int], cache: Cache, slot: int, kept: Kept | None = None,
            cancelled: Callable[[], bool] | None = None) -> Tensor | None:
    """Fill row `slot` of the cache with a prompt, in chunks; logits [1, vocab] after its last token.

    Chunks bound the memory of activations and scores; each pass sees no more slots than are filled. Tokens
    that were `kept` in the row are skipped. None if cancelled.
    """
    cache.lengths[slot] = done = kept.shared(prompt) if kept else 0
    for piece in torch.tensor([prompt[done:]], device=model.rt.device).split(model.rt.prefill_chunk, dim=1):
        if kept:
            kept.tokens[:] = prompt[:done]
        if agreed(cancelled, model.rt):
            return None
        done += piece.shape[1]                                                      # piece [1, <= chunk]
        logits = model(piece, cache.view(slice(slot, slot + 1), done), last=1)
    if kept:
        kept.tokens[:] = prompt
    return logits[:, -1]


@dataclass(frozen=True)
class Draw:
    """What follows a forward pass, on the device alone: a CUDA graph may hold it."""
    sampling: Sampling
    n_tokens: int | None
    tp: Shard

    def __call__(self, logits: Tensor, uniforms: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, vocab] -> tokens, log-probabilities [b]. Rank 0 draws, or takes a forced token that is
        not -1, and tells the others."""
        logits, tp = logits[:, :self.n_tokens], self.tp                         # without the padding's ids
        tokens = torch.zeros_like(forced)
        if tp.rank == 0:
            tokens = torch.where(forced < 0, sample(logits, self.sampling, uniforms), forced)
        if tp.size > 1:     # ranks that drew for themselves would drift apart on the first rounding error
            dist.broadcast(tokens, src=0)
        return tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]


def chances(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """What decides the rows' next tokens besides the logits: uniform numbers, and tokens that are forced."""
    uniforms = np.array([row.rng.random() for row in rows])
    return uniforms, np.array([row.forced.popleft() if row.forced else -1 for row in rows])


def read(tokens: Tensor, logprobs: Tensor) -> Iterator[tuple[int, float]]:
    """Bring what was drawn to the host.

    FloatingPointError if a logit is NaN: damaged weights, or an overflow, would otherwise look like text.
    """
    logprobs = logprobs.tolist()
    if any(map(math.isnan, logprobs)):
        raise FloatingPointError("the model's logits are not numbers: are its weights or its config damaged?")
    return zip(tokens.tolist(), logprobs)


# ------------------------------------------------------------------------------------------------------------
# 3. Ranks

PATIENCE = timedelta(seconds=50)    # for ranks that have not started


@dataclass
class Ranks:
    """This process among those that torchrun started; without torchrun, the only one."""
    tp: Shard
    device: torch.device
    control: dist.ProcessGroup | None = None    # gloo; waits for a user, or for a slow disk, without end

    @classmethod
    def start(cls, device: str) -> "Ranks":
        """Join the process group, NCCL on GPUs, else gloo. ValueError if a rank or the device is missing."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no GPU here; accepted here: cpu, auto")
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if device == "cpu" or not torch.cuda.is_available():
            place = torch.device("cpu")
        else:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if place.index >= (there := torch.cuda.device_count()):
                raise ValueError(f"rank {rank} is number {place.index + 1} of its machine, which has {there} "
                                 f"GPUs; give torchrun --nproc-per-node {there}")
            torch.cuda.set_device(place)
        if size == 1:
            return cls(Shard(), place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", store=meet(rank, size), rank=rank,
                                world_size=size)
        return cls(Shard(rank, size), place, dist.new_group(backend="gloo", timeout=timedelta(days=30)))

    def share(self, value):
        """Rank 0's value, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def together(self, work: Callable):
        """work() on every rank; its result, or on all ranks a ValueError that says what one of them met.

        Also where ranks wait for each other: loading may outlast the minutes after which NCCL gives up.
        """
        result = error = None
        try:
            result = work()
        except (ValueError, OSError, MemoryError, RuntimeError) as problem:
            if isinstance(problem, RuntimeError) and not memory.ran_out(problem):
                raise
            error = f"rank {self.tp.rank}: " * (self.tp.rank > 0) + (str(problem) or repr(problem))
        if met := [error for error in self.gather(error) if error]:
            raise ValueError(met[0])
        return result

    def gather(self, value) -> list:
        """Every rank's value, on every rank."""
        values = [value] * self.tp.size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values


def meet(rank: int, size: int) -> "dist.Store":
    """The store, once all ranks have signed in. ValueError names those that have not, PATIENCE later."""
    if unset := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {size} in the environment, but {unset[0]} is not set; start ranks "
                         f"with torchrun, which sets all of them")
    server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"     # else torchrun is
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    host, deadline = socket.gethostname(), time.monotonic() + PATIENCE.total_seconds()
    try:
        store = dist.TCPStore(address, port, size, server, timeout=PATIENCE, wait_for_workers=False)
        store.set(f"rank {rank}", host)
        while missing := [other for other in range(size) if not store.check([f"rank {other}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return store
        there = {other: store.get(f"rank {other}").decode() for other in range(size) if other not in missing}
    except dist.DistNetworkError as error:
        raise ValueError(f"rank {rank} on {host} found no meeting place at {address}:{port} (MASTER_ADDR and "
                         f"MASTER_PORT): {str(error).partition(chr(10))[0]}") from None
    raise ValueError(f"rank {', '.join(map(str, missing))} of {size} did not arrive within "
                     f"{PATIENCE.total_seconds():g} s; there are: "
                     f"{', '.join(f'{other} on {there[other]}' for other in there)}")


def joined() -> bool:
    """Whether this process is one of several ranks, of which some builds of PyTorch know nothing."""
    return dist.is_available() and dist.is_initialized()


# ------------------------------------------------------------------------------------------------------------
# 4. Command line

DEMO = Path(__file__).resolve().parent / "demo"
WELCOME = """This is the demo, a small R1 of 2 million parameters that does arithmetic. Ask it, for example:
    What is 478 + 56?     47 * 36     Which is larger, 4821 or 4799?     (12 - 30) * 4
    Anna has 23 boxes with 12 pencils in each, and 40 more pencils. How many pencils is that in all?"""
BATCH = 8                           # completions that run together, if memory holds so many
MAX_NEW_TOKENS = 32_768             # R1's own limit in its evaluation
CONVERSATION = 40_960               # tokens of a whole conversation: one longest answer, and 8,192 before it
SHORTEST = 2_048                    # a conversation that memory cuts shorter than this is refused


@dataclass(frozen=True)
class Job:
    """What rank 0 worked out from the command line and tells the others before the weights are read."""
    sampling: Sampling
    stop_ids: frozenset[int]
    n_tokens: int                       # ids that the tokenizer knows
    max_new_tokens: int
    rt: Runtime                         # rank 0's
    prompts: list[list[int]] = field(default_factory=list)      # empty when interactive
    wanted: list[tuple[int, int]] = field(default_factory=list) # (prompt, sample) that are still to be made
    think: ThinkBudget | None = None
    stop_loops: bool = False

    def run(self, model: Transformer, prompts: list[list[int]], wanted: list[tuple[int, int]],
            **more) -> Iterator[Event]:
        return generate(model, prompts, self.stop_ids, self.max_new_tokens, self.sampling, self.n_tokens,
                        wanted, self.think, self.stop_loops, **more)


def encode_prompts(args: argparse.Namespace, chat: Chat, records: list[dict]) -> list[list[int]]:
    prompts, moved = [], False
    for number, record in enumerate(records, 1):
        try:
            if "raw" in record:
                if args.think_budget is not None and thinks(record, chat) and not chat.thinks(record["raw"]):
                    raise ValueError("--think-budget counts no reasoning that a 'raw' prompt has begun")
                prompts.append(chat.encode_raw(record["raw"]))
                continue
            chat.check(messages := as_messages(record))
            messages, folded = advised(messages, args.boxed, args.allow_system or chat.style == "jinja")
            prompts.append(chat.encode(messages))
        except ValueError as error:
            raise ValueError(f"{where(args, number)}: {error}") from None
        moved |= folded
        if messages and messages[-1]["role"] == "assistant":
            print(f"{where(args, number)}: the last message is an answer already; another one will follow it",
                  file=sys.stderr)
    if moved:
        print("system messages were moved into the user's turn, as R1's README advises; --allow-system keeps "
              "them", file=sys.stderr)
    return prompts


def where(args: argparse.Namespace, number: int) -> str:
    return f"{args.input_file}, line {number}" if args.input_file else "--prompt"


def plan_job(args: argparse.Namespace, checkpoint: Checkpoint, chat: Chat, records: list[dict], ranks: Ranks,
             room: float) -> tuple:
    """The job, and its results so far. ValueError, with the numbers, if something does not fit."""
    cfg, tokenizer = checkpoint.cfg, chat.tokenizer
    if tokenizer.n_tokens > cfg.vocab_size:
        raise ValueError(f"the tokenizer in {args.ckpt_path} has {tokenizer.n_tokens} tokens, the model only "
                         f"{cfg.vocab_size}: they do not belong together")
    prompts = encode_prompts(args, chat, records)
    longest = max(map(len, prompts), default=0)
    needed = longest + args.max_new_tokens if prompts else CONVERSATION
    max_seq_len = args.max_seq_len or min(needed, cfg.context_len)
    if max_seq_len > cfg.context_len:
        raise ValueError(f"--max-seq-len is {max_seq_len}; this model was made for at most {cfg.context_len}")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= max_seq_len:
            limit = "--max-seq-len" if args.max_seq_len else "the model's context of"
            raise ValueError(f"{where(args, number)}: the prompt has {len(prompt)} tokens; with {limit} "
                             f"{max_seq_len} at most {max_seq_len - 1} fit")
    flags = ("num_samples", "temperature", "top_p", "seed", "max_new_tokens", "think_budget", "stop_loops",
             "dtype", "fp8")
    settings = {"checkpoint": fingerprint(checkpoint),
                "prompts": hashlib.sha256(json.dumps([records, prompts]).encode()).hexdigest()[:16],
                **{flag: getattr(args, flag) for flag in flags}, "max_seq_len": max_seq_len}
    results = Results(args.output_file, settings, args.resume)
    if settings["seed"] is None:
        settings["seed"] = int.from_bytes(os.urandom(4), "big")
    sampling = Sampling(args.temperature, args.top_p, settings["seed"])
    if chat.style != "jinja" and not 0.5 <= args.temperature <= 0.7:
        print(f"temperature {args.temperature:g}: R1's README advises 0.5 to 0.7, against endless repetition",
              file=sys.stderr)
    wanted = [(i, sample) for i in range(len(prompts)) for sample in range(args.num_samples)
              if (i, sample) not in results.records]
    rt = runtime(args, cfg, ranks, max(1, min(args.batch_size or BATCH, len(wanted))), max_seq_len)
    rt = convert_once(args, cfg, fit(args, cfg, rt, room, checkpoint.mapped_bytes(rt), longest), room)
    job = Job(sampling, tokenizer.stop_ids, tokenizer.n_tokens, args.max_new_tokens, rt, prompts, wanted,
              think_budget(args, tokenizer), args.stop_loops)
    return job, results


def runtime(args: argparse.Namespace, cfg: Config, ranks: Ranks, rows: int, max_seq_len: int) -> Runtime:
    dtype, fp8 = precision(args, cfg, ranks.device)
    return check(Runtime(ranks.device, dtype, fp8, ranks.tp, rows, max_seq_len, args.prefill_chunk,
                         args.compile))


def precision(args: argparse.Namespace, cfg: Config, device: torch.device) -> tuple[torch.dtype, str]:
    """--dtype and --fp8, "auto" decided."""
    auto, best = "float32" if cfg.dtype == "float32" else "bfloat16", kernel.default_mode(device)
    return DTYPES[auto if args.dtype == "auto" else args.dtype], best if args.fp8 == "auto" else args.fp8


def fit(args: argparse.Namespace, cfg: Config, rt: Runtime, room: float, mapped: int = 0,
        longest: int = 0) -> Runtime:
    """rt with what was left open made to fit `room` bytes a rank. ValueError, with the numbers, if it can't.

    Open are the rows without --batch-size, and the length of a conversation without --max-seq-len. The cache
    counts at full length, although on a CPU it takes memory token by token. `mapped` bytes of the weights do
    not count: they stay a file, whose pages the system drops and reads again as it likes. No length is
    advised that leaves the longest prompt no room.
    """
    need = memory.plan(cfg, rt)
    if mapped > room:
        print(f"the weights, {need.weights / memory.GIB:.2f} GiB, exceed the free memory, "
              f"{room / memory.GIB:.2f} GiB: parts of them will be read from disk again for each token",
              file=sys.stderr)
    if need.total - mapped <= room:
        return rt
    rows, length = memory.largest(rt, cfg, room + mapped)
    if args.interactive and not args.max_seq_len and length >= SHORTEST:
        print(f"memory holds a conversation of {length} tokens, not {rt.max_seq_len}", file=sys.stderr)
        return replace(rt, max_seq_len=length)
    if rows and not args.batch_size:
        print(f"memory holds {rows} completions at a time, not {rt.rows}", file=sys.stderr)
        return replace(rt, rows=rows)
    fits = [f"--max-seq-len {length}"] * (length > longest) + [f"--batch-size {rows}"] * (0 < rows < rt.rows)
    if memory.plan(cfg, replace(rt, prefill_chunk=256)).total - mapped <= room:
        fits.append("--prefill-chunk 256")
    raise ValueError(f"{rt.rows} x {rt.max_seq_len} tokens need {need}"
                     f"{' on each rank' * (rt.tp.size > 1)}, and {room / memory.GIB:.2f} GiB are free; "
                     f"what fits: {' or '.join(fits) or 'nothing, on so few ranks'}")


def convert_once(args: argparse.Namespace, cfg: Config, rt: Runtime, room: float) -> Runtime:
    """rt, in which FP8 weights that were to be converted for each product are converted at load, if the user
    left that open and it takes at most half of the `room`. Compiled steps read FP8 as it is."""
    once = replace(rt, fp8="bf16")
    if not cfg.fp8 or args.fp8 != "auto" or rt.fp8 != "dequant" or rt.compile:
        return rt
    return once if memory.plan(cfg, once).total <= room / 2 else rt


def think_budget(args: argparse.Namespace, tokenizer: Tokenizer) -> ThinkBudget | None:
    if args.think_budget is None:
        return None
    opening, closing = tokenizer.token_id(THINK), tokenizer.token_id(END_THINK)
    if opening is None or closing is None:
        raise ValueError(f"--think-budget: the tokenizer in {args.ckpt_path} has no {THINK} and {END_THINK}; "
                         f"only models with these tokens reason")
    return ThinkBudget(args.think_budget, opening, closing, tuple(tokenizer.encode(f"\n{END_THINK}\n\n")))


def make_parser() -> Parser:
    parser = Parser(description="Generate text with DeepSeek-R1 or one of its distills.")
    parser.add_argument("--ckpt-path", type=Path, default=DEMO, metavar="DIR",
                        help="HuggingFace folder, or one that convert.py wrote (default: the demo)")
    parser.add_argument("--config", type=Path, help="config file, if DIR has none, such as config_671B.json")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--interactive", action="store_true", help="chat; /help lists its commands")
    mode.add_argument("--prompt", metavar="TEXT", help="answer one question")
    mode.add_argument("--input-file", type=Path, metavar="FILE",
                      help="JSON lines with 'prompt', 'messages' or 'raw', or plain text, a prompt a line")
    parser.add_argument("--output-file", type=Path, metavar="FILE",
                        help="JSON lines (default: standard output)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="K",
                        help="completions of each prompt (%(default)s)")
    parser.add_argument("--batch-size", type=int,
                        help=f"completions that run together (default: {BATCH}, or as many as memory holds)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the --output-file of a run that was interrupted")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="per answer (%(default)s)")
    parser.add_argument("--max-seq-len", type=int,
                        help="tokens of prompt and answer together (default: what is needed, up to the "
                             f"model's context; interactive: up to {CONVERSATION})")
    parser.add_argument("--prefill-chunk", type=int, default=Runtime.prefill_chunk, metavar="N",
                        help="prompt tokens per forward pass; fewer take less memory (%(default)s)")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="auto: float32 if the checkpoint is, else bfloat16")
    parser.add_argument("--fp8", choices=["auto", "gemm", "dequant", "bf16"], default="auto",
                        help="FP8 weights: quantise activations, too (gemm), or multiply in --dtype, weights "
                             "converted for each product (dequant) or once (bf16: --dtype's memory); auto: "
                             "gemm on GPUs with FP8 tensor cores, else bf16 if that leaves half of the "
                             "memory free and --compile is not there, else dequant")
    parser.add_argument("--compile", action="store_true",
                        help="faster tokens, once compiled (minutes): C++ on a CPU, CUDA graphs on a GPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="auto: the GPU, if there is one")
    return parser


def add_sampling(parser: Parser) -> None:
    parser.add_argument("--temperature", type=float, default=Sampling.temperature,
                        help="0 is greedy (%(default)s)")
    parser.add_argument("--think-budget", type=int, metavar="N",
                        help="close the reasoning after N tokens (default: the model does)")
    parser.add_argument("--stop-loops", action=argparse.BooleanOptionalAction, default=None,
                        help="stop an answer that repeats itself without end (default: in --interactive and "
                             "--prompt; not in files, whose answers are to be measured)")
    parser.add_argument("--show-reasoning", action="store_true",
                        help="in full, on a terminal, too, where it is folded to a line (in a chat: /think)")
    parser.add_argument("--boxed", action="store_true",
                        help=r"add R1's directive for mathematics: the answer in \boxed{}")
    parser.add_argument("--allow-system", action="store_true",
                        help="keep system messages, which R1 was not made for, out of the user's turn")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p,
                        help="draw from the likeliest tokens that have this much probability (%(default)s)")
    parser.add_argument("--seed", type=int, help="makes a run repeatable; default: a new one each time")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    add_sampling(parser)
    args = parser.parse_args(argv)
    parser.at_least(args, 1, "batch_size", "max_new_tokens", "max_seq_len", "num_samples", "prefill_chunk")
    parser.at_least(args, 0, "think_budget")
    if args.stop_loops is None:
        args.stop_loops = args.input_file is None
    if args.output_file and not args.input_file:
        parser.error("--output-file goes with --input-file")
    if args.num_samples > 1 and not args.input_file:
        parser.error("--num-samples goes with --input-file")
    if args.resume and not args.output_file:
        parser.error("--resume goes with --output-file")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    return args


def open_checkpoint(args: argparse.Namespace, ranks: Ranks) -> Checkpoint:
    """The checkpoint, once its headers have shown that this rank finds all of its tensors there."""
    checkpoint = Checkpoint(args.ckpt_path, args.config)
    checkpoint.plan(Transformer(checkpoint.cfg, Runtime(tp=ranks.tp)))
    return checkpoint


def prepare(args: argparse.Namespace, checkpoint: Checkpoint, ranks: Ranks, room: float) -> tuple:
    """What else can go wrong before weights are read. Rank 0 only. Job, Chat, the file's records, Results."""
    if args.output_file and not args.output_file.absolute().parent.is_dir():
        raise ValueError(f"--output-file {args.output_file}: there is no folder {args.output_file.parent}")
    if args.output_file and args.output_file.exists() and not args.output_file.is_file():
        raise ValueError(f"--output-file {args.output_file}: a folder or a device; it must be a file")
    if args.output_file and args.output_file.exists() and args.output_file.samefile(args.input_file):
        raise ValueError(f"--output-file {args.output_file}: the same as --input-file; it would be lost")
    if args.output_file and not os.access(args.output_file.absolute().parent, os.W_OK):
        raise ValueError(f"--output-file {args.output_file}: its folder cannot be written")
    records = read_prompts(args.input_file) if args.input_file else []
    if args.prompt:
        records = [{"prompt": args.prompt}]
    chat = Chat(Tokenizer(args.ckpt_path))
    job, results = plan_job(args, checkpoint, chat, records, ranks, room)
    for note in checkpoint.notes:
        print(note, file=sys.stderr)
    return job, chat, records, results


def introduce(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Rank 0 says, if there are several, where each rank runs and what it reads."""
    file = rank_file(ranks.tp.rank, ranks.tp.size) if checkpoint.manifest else "its part of each file"
    me = f"{socket.gethostname()}, process {os.getpid()}, {ranks.device}, {file}"
    for rank, place in enumerate(ranks.gather(me)):
        if ranks.tp.rank == 0 and ranks.tp.size > 1:
            print(f"rank {rank} of {ranks.tp.size}: {place}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """The program after its arguments; returns the exit code. What a user can mend is one line on stderr."""
    try:
        ranks = Ranks.start(args.device)
        first = ranks.tp.rank == 0
        room = min(ranks.gather(memory.free(ranks.device)))
        checkpoint = ranks.together(lambda: open_checkpoint(args, ranks))
        job, chat, records, results = ranks.together(
            lambda: prepare(args, checkpoint, ranks, room) if first else (None, None, [], None))
        job = ranks.share(job)
        introduce(checkpoint, ranks)
        rt = ranks.together(lambda: check(replace(job.rt, device=ranks.device, tp=ranks.tp)))
        model = ranks.together(lambda: load_model(checkpoint, rt))
        precompile(model)
    except (ValueError, OSError) as error:
        return fail(error)
    if chat:
        fp8 = f" (FP8 weights: {rt.fp8})" * checkpoint.cfg.fp8
        ends = ", ".join(map(str, sorted(job.stop_ids))) or "none"
        print(f"{str(rt.dtype)[6:]}{fp8} on {rt.tp.size} x {rt.device.type}, up to {rt.max_seq_len} tokens a "
              f"sequence, chat format {chat.style!r}, end token {ends}, seed {job.sampling.seed}",
              file=sys.stderr)
    try:
        if args.input_file:
            run_batch(job.run(model, job.prompts, job.wanted), len(job.wanted), chat, records, results)
        elif args.prompt:
            show(job.run(model, job.prompts, job.wanted), chat and Screen(chat, args.show_reasoning),
                 chat is not None and thinks(records[0], chat), len(job.prompts[0]))
        else:
            if chat and args.ckpt_path == DEMO:
                print(WELCOME)
            conversation = chat and Conversation(chat, rt.max_seq_len, args.boxed, args.allow_system)
            talk(model, job, ranks, conversation, chat and Screen(chat, args.show_reasoning))
    except BrokenPipeError:                                 # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, FloatingPointError) as error:
        return fail(error)
    return 0


def talk(model: Transformer, job: Job, ranks: Ranks, conversation: Conversation | None,
         screen: Screen | None) -> None:
    """Chat until the user leaves. Rank 0 reads and shows; the other ranks compute what it was asked."""
    kept, keyboard = Kept(Decoder(model)), Keyboard(screen is not None)
    with keyboard:
        for attempt in count():             # each answer is a sample of its own: /retry gives another one
            prompt = ranks.share(conversation.read(keyboard, screen) if conversation else None)
            if prompt is None:
                return
            events = job.run(model, [prompt], [(0, attempt)], kept=kept, cancelled=keyboard.ctrl_c)
            answer = show(events, screen, conversation is not None and conversation.thinks(), len(prompt),
                          kept.shared(prompt))
            if conversation:
                conversation.add(*answer)


def fail(error: Exception) -> int:
    alone = not joined()                    # else all ranks know of it, and one says it
    if alone or int(os.environ.get("RANK", 0)) == 0:
        complain("generate.py", error)
    return 2


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        hint = "; --resume goes on from what is done" * bool(args.output_file)
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        hint = "; --resume goes on" * bool(args.output_file)
        return complain("generate.py", f"rank {os.environ.get('RANK', 0)} ran out of memory: "
                        f"{(str(error) or repr(error))[:200]}; a smaller --batch-size or --prefill-chunk "
                        f"takes less{hint}")


def end(program: Callable[[], int]) -> NoReturn:
    """Run a program, and exit with its code. Ranks that end together close what joins them, lest gloo's
    threads abort the process. One that fails alone must not: NCCL would wait for others that wait for it,
    and torchrun would not see it die."""
    try:
        code = program()
    except Exception as error:
        gone = isinstance(error, dist.DistError) or "by peer" in str(error)     # gloo has no type for it
        if gone and joined():
            complain(Path(sys.argv[0]).name,
                     f"rank {os.environ.get('RANK')} lost another rank: {str(error)[:200]}")
            time.sleep(5)       # torchrun, whose report names whom it saw die first, ends this one meanwhile
        else:
            sys.excepthook(*sys.exc_info())
        code = 1
    if joined() and code:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    if joined():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    end(main)
