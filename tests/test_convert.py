"""Claim: conversion is bounded in memory, safe to interrupt, and never mistakes or overwrites what it finds.

Memory is the high-water mark of a process of its own, mapped files included, over what importing convert.py
takes. Interrupted conversions must end in the same bytes as undisturbed ones: they move numbers and compute
none. What is written is in test_convert_exact.py, what is refused in test_checkpoint_errors.py.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from safetensors import safe_open

import convert
from convert import Checkpoint, load_model, rank_file
from model import Runtime

ROOT = Path(__file__).parent.parent


def arguments(source: Path, out: Path, ranks: int, *more: str) -> list[str]:
    return ["--hf-ckpt-path", str(source), "--save-path", str(out), "--model-parallel", str(ranks), *more]


def run(source: Path, out: Path, ranks: int, *more: str) -> int:
    return convert.main(arguments(source, out, ranks, *more))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 6 files and 290 MB whose largest tensors have 34 MB."""
    path = tmp_path_factory.mktemp("large")
    tiny.write(path, tiny.deepseek(hidden_size=512, moe_intermediate_size=1024, vocab_size=16_384,
                                   num_attention_heads=8, num_key_value_heads=8))
    tiny.split_file(path, 6)
    return path


# VmHWM belongs to this program alone; ru_maxrss of a child starts with the peak of whoever forked it.
MEASURE = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import convert

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

small, large = map(json.loads, sys.argv[2:])
assert convert.main(small) == 0
used = memory("VmRSS")
assert convert.main(large) == 0
print(memory("VmHWM") - used)
"""


def peak_memory(small: Path, large: Path, out: Path, *more) -> int:
    """Bytes that a conversion takes at most, over what a small one has needed: imports, first uses."""
    calls = arguments(small, out / "1", *more), arguments(large, out / "2", *more)
    command = [sys.executable, "-c", MEASURE, str(ROOT), *map(json.dumps, calls)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


@tiny.PROC
@pytest.mark.parametrize("ranks, more", [(1, []), (4, []), (4, ["--dtype", "bf16"]), (4, ["--verify"])])
def test_memory_stays_under_the_largest_tensor_and_a_fixed_allowance(ranks, more, large, tmp_path):
    total, largest = 0, 0
    for file in large.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            sizes = [f.get_tensor(key).nbytes for key in f.keys()]
        total, largest = total + sum(sizes), max(largest, *sizes)
    allowance = 15e6                                                # headers, plans, one rank's slice
    assert largest > 30e6 and total / 4 > largest + allowance       # or holding a whole rank would pass
    tiny.write(tmp_path / "small", tiny.deepseek())
    used = peak_memory(tmp_path / "small", large, tmp_path, ranks, *more)
    assert 5e6 < used < largest + allowance


@pytest.fixture(scope="module")
def undisturbed(large, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(large, out, 4) == 0
    return contents(out)


def test_a_killed_conversion_passes_for_nothing_and_goes_on_where_it_stopped(
        large, undisturbed, tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, str(ROOT / "convert.py"), *arguments(large, tmp_path, 4)],
                               stderr=subprocess.DEVNULL)
    part = tmp_path / (rank_file(3, 4) + ".part")
    while not (part.exists() and part.stat().st_size > 20e6):
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / convert.MANIFEST).exists() and not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="unfinished conversion"):
        load_model(Checkpoint(tmp_path), Runtime())
    read, original = [], Checkpoint.part
    monkeypatch.setattr(Checkpoint, "part", lambda self, entry, e, tp: (
        read.append(entry.name), original(self, entry, e, tp))[1])
    assert run(large, tmp_path, 4) == 0
    assert "layers.2.ffn_norm.weight" in read and "embed.weight" not in read
    assert contents(tmp_path) == undisturbed


def test_a_conversion_stopped_between_its_last_steps_keeps_the_files_that_are_complete(
        large, undisturbed, tmp_path, monkeypatch):
    replace, names = os.replace, []

    def replace_two(source, target):
        names.append(target)
        if len(names) == 3:
            raise OSError("the power is gone")
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_two)
        assert run(large, tmp_path, 4) == 2
    complete = [tmp_path / rank_file(rank, 4) for rank in (0, 1)]
    assert sorted(tmp_path.glob("*.safetensors")) == complete
    with pytest.raises(ValueError, match="unfinished conversion"):
        Checkpoint(tmp_path)
    (tmp_path / (rank_file(3, 4) + ".part")).unlink()       # this rank has to start again, alone with rank 2
    before = [path.stat().st_mtime_ns for path in complete]
    assert run(large, tmp_path, 4) == 0
    assert [path.stat().st_mtime_ns for path in complete] == before
    assert contents(tmp_path) == undisturbed


@pytest.fixture
def llamas(tmp_path):
    """Two checkpoints that differ in their numbers only."""
    for seed in (0, 1):
        tiny.write(tmp_path / f"llama{seed}", tiny.llama(), seed=seed)
    return tmp_path / "llama0", tmp_path / "llama1"


def unfinish(out: Path, suffix: str) -> None:
    """As if the conversion had been killed just before its last steps."""
    for file in out.glob("*.safetensors"):
        file.rename(file.with_name(file.name + suffix))
    (out / convert.MANIFEST).unlink()


def full(handle: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_without_room_is_named_before_anything_is_written(llamas, tmp_path, monkeypatch, capsys):
    tight = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(convert.shutil, "disk_usage", lambda path: tight)
        assert run(llamas[0], tmp_path / "out", 2) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'out'}: " in error and "GB are still to be written" in error
        assert not list((tmp_path / "out").iterdir())
    with monkeypatch.context() as patch:                        # one that fills up meanwhile
        patch.setattr(convert.os, "fsync", full)
        assert run(llamas[0], tmp_path / "out", 2) == 2
        assert ".safetensors.part: cannot be written: No space left on device" in capsys.readouterr().err
    assert run(llamas[0], tmp_path / "out", 2) == 0


def test_parts_of_another_source_leave_their_room_to_what_replaces_them(llamas, tmp_path, monkeypatch):
    (first, second), out = llamas, tmp_path / "out"
    assert run(first, out, 2) == 0
    unfinish(out, ".part")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert run(second, out, 2) == 0
    unfinish(out, ".part")
    os.truncate(out / "model1-mp2.safetensors.part", 100_000)
    assert run(second, out, 2) == 2


def test_stop_ids_that_only_config_json_has_are_kept(tmp_path):
    tiny.write(tmp_path / "hf", tiny.llama())
    (tmp_path / "hf/generation_config.json").unlink()
    tiny.edit_config(tmp_path / "hf", eos_token_id=[7, 8])
    assert run(tmp_path / "hf", tmp_path / "out", 1) == 0
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": [7, 8]}


def test_parts_of_another_source_are_not_continued(llamas, tmp_path):
    first, second = llamas
    out, clean = tmp_path / "out", tmp_path / "clean"
    assert run(first, out, 2) == run(second, clean, 2) == 0
    unfinish(out, ".part")
    assert run(second, out, 2, "--verify") == 0
    assert contents(out) == contents(clean)


def test_parts_of_a_source_that_was_changed_in_place_are_not_continued(llamas, tmp_path):
    source, other = llamas
    out = tmp_path / "out"
    assert run(source, out, 2) == 0
    unfinish(out, ".part")
    (source / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert run(source, out, 2, "--verify") == 0


def test_parts_for_another_number_of_ranks_are_removed(llamas, tmp_path):
    source, out = llamas[0], tmp_path / "out"
    assert run(source, out, 2) == 0
    unfinish(out, ".part")
    assert run(source, out, 1) == 0
    assert not list(out.glob("*.part"))


def test_finished_rank_files_of_another_source_are_refused_not_mixed_in(llamas, tmp_path, capsys):
    first, second = llamas
    out = tmp_path / "out"
    assert run(first, out, 2) == 0
    unfinish(out, "")
    before = contents(out)
    assert run(second, out, 2) == 2
    assert "model0-mp2.safetensors: of another checkpoint, number of ranks" in capsys.readouterr().err
    assert contents(out) == before


def test_a_folder_with_another_checkpoint_is_not_written_to(llamas, capsys):
    source, other = llamas
    before = contents(other)
    assert run(source, other, 2) == 2
    assert "llama1/model.safetensors: of another checkpoint" in capsys.readouterr().err
    assert contents(other) == before


def test_a_finished_conversion_is_not_repeated_and_not_overwritten_by_another(llamas, tmp_path, capsys):
    source, out = llamas[0], tmp_path / "out"
    assert run(source, out, 2) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(source, out, 2) == 0
    assert run(source, out, 1) == run(source, out, 2, "--dtype", "bf16") == run(llamas[1], out, 2) == 2
    assert capsys.readouterr().err.count("holds another conversion") == 3
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / rank_file(1, 2)).unlink()
    assert run(source, out, 2) == 2
    assert "model1-mp2.safetensors: no such file" in capsys.readouterr().err
