"""Ranks as processes that talk over gloo; torchrun itself starts those of test_ranks.py.

They are forked from a process that has imported torch, which takes longer than these models to run. A module
of its own: each process imports it anew, and transformers takes longer still.
"""
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import generate
from convert import Checkpoint, load_model
from model import Cache, Runtime, Shard


def start(ranks: int, work: Callable, *args) -> None:
    """work(rank, *args) on so many ranks; raises what one of them raises, or that its exit code was not 0."""
    multiprocessing.set_forkserver_preload(["torch", "triton"])
    mp.start_processes(work, args, ranks, start_method="forkserver")


def start_program(ranks: int, main: Callable[[list[str]], int], argv: list[str]) -> None:
    """A program's main() with these arguments on so many ranks."""
    start(ranks, program, ranks, free_port(), main, argv)


def program(rank: int, ranks: int, port: int, main: Callable[[list[str]], int], argv: list[str]) -> None:
    """One rank, in the environment that torchrun would give it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    generate.end(partial(main, argv))


def draw(folder: Path, out: Path, argv: list[str]) -> int:
    """A main() that writes down what generate() draws on a rank whose seed is its own."""
    tp = generate.Ranks.start("cpu").tp
    model = load_model(Checkpoint(folder), Runtime(dtype=torch.float32, tp=tp, rows=2, max_seq_len=256))
    sampling = generate.Sampling(1.0, 1.0, seed=5 + 100 * tp.rank)
    events = generate.generate(model, [[1, 2, 3], [4]], (), 30, sampling)
    (out / f"{tp.rank}.json").write_text(json.dumps([[event.prompt, event.tokens] for event in events]))
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def logits(folder: Path, tokens: torch.Tensor, chunks: list[int], **settings) -> torch.Tensor:
    """The logits of tokens [b, s], fed in chunks."""
    rt = Runtime(rows=tokens.shape[0], max_seq_len=tokens.shape[1], **settings)
    model = load_model(Checkpoint(folder), rt)
    cache = Cache.allocate(model.cfg, rt)
    return torch.cat([model(piece, cache) for piece in tokens.split(chunks, dim=1)], dim=1)


def work(rank: int, ranks: int, root: Path, runs: dict, tokens: torch.Tensor, chunks: list[int]) -> None:
    """Run everything in `runs`, from both of its folders; save the logits and the collectives it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting{ranks}", rank=rank, world_size=ranks)
    calls, out = count_collectives(), {}
    for name, (checkpoint, settings) in runs.items():
        for kind, folder in (("HuggingFace", checkpoint), ("converted", f"{checkpoint} mp{ranks}")):
            calls.clear()
            values = logits(root / folder, tokens, chunks, tp=Shard(rank, ranks), **settings)
            out[name, kind] = values, list(calls)
    torch.save(out, root / f"rank{rank} of {ranks}.pt")
    dist.destroy_process_group()


def count_collectives() -> list[str]:
    """A list that grows by the name of every collective operation that is called from now on."""
    calls = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        def counted(*args, original=getattr(dist, name), name=name, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)
        setattr(dist, name, counted)
    return calls
