"""One of several processes that run the same checkpoints over gloo, for test_parallel.py.

A module of its own: a spawned process imports it anew, and transformers takes longer to import than these
models to run.
"""
from pathlib import Path

import torch
import torch.distributed as dist

from convert import Checkpoint, load_model
from model import Cache, Runtime, Shard


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
