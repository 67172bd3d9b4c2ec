"""Claim: ranks find each other or say who is missing, wait for a user without end, and end when one dies.

Real torchrun, one agent or two, and a pseudo-terminal, on the demo. Time-outs are shortened in a launcher
that otherwise is generate.py.
"""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from rank_worker import free_port
from test_interactive import PROMPT

import convert
import generate

ROOT = Path(__file__).parent.parent
QUESTION = "What is 478 + 56?"
LAUNCHER = """
import os, sys, time
from datetime import timedelta
from functools import partial
sys.path.insert(0, {root!r})
import generate
rank = int(os.environ["RANK"])
{change}
generate.end(generate.main)
"""


def launch(tmp_path: Path, change: str, *args, ranks: int = 2) -> list[str]:
    """torchrun for generate.py after `change`, a line of Python that knows `rank`."""
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER.format(root=str(ROOT), change=change))
    return [*torchrun("--nproc-per-node", ranks), str(script), *map(str, args)]


def torchrun(*args) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, args)]


def run(command: list[str], **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_one_rank_needs_no_torch_distributed(monkeypatch, capsys):
    # as in AMD's builds for Windows
    monkeypatch.setattr(generate.dist, "is_available", lambda: False)
    for name in ("is_initialized", "Store", "init_process_group", "destroy_process_group"):
        monkeypatch.delattr(generate.dist, name)
    assert generate.main(["--prompt", QUESTION, "--temperature", "0", "--device", "cpu"]) == 0
    assert r"\boxed{534}" in capsys.readouterr().out
    assert generate.main(["--prompt", QUESTION, "--max-seq-len", "3"]) == 2
    assert capsys.readouterr().err.startswith("generate.py: error: ")
    with pytest.raises(SystemExit, match="^3$"):
        generate.end(lambda: 3)


# Start


def test_a_rank_that_does_not_come_is_named(tmp_path):
    assert generate.PATIENCE.total_seconds() < 60
    change = "generate.PATIENCE = timedelta(seconds=3); rank == 1 and time.sleep(100)"
    done = run(launch(tmp_path, change, "--prompt", QUESTION, ranks=3))
    host = socket.gethostname()
    assert f"rank 1 of 3 did not arrive within 3 s; there are: 0 on {host}, 2 on {host}\n" in done.stderr
    assert done.returncode != 0 and done.stdout == ""


def test_a_meeting_place_without_anybody_is_named(tmp_path):
    command = launch(tmp_path, "generate.PATIENCE = timedelta(seconds=2)", "--prompt", QUESTION)[-3:]
    done = run([sys.executable, *command], RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
               MASTER_PORT=str(port := free_port()))
    assert done.returncode == 2
    assert f"rank 1 on {socket.gethostname()} found no meeting place at 127.0.0.1:{port}" in done.stderr


def test_half_an_environment_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert generate.main(["--prompt", QUESTION]) == 2
    assert "WORLD_SIZE is 2 in the environment, but MASTER_ADDR is not set" in capsys.readouterr().err


def test_ranks_introduce_themselves_and_a_shard_that_one_of_them_lacks_is_named(tmp_path):
    convert.convert(convert.Checkpoint(ROOT / "demo"), tmp_path / "0", 2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")                 # as if on two machines
    args = "--prompt", QUESTION, "--max-new-tokens", 1
    done = run(launch(tmp_path, f'sys.argv += ["--ckpt-path", {str(tmp_path)!r} + f"/{{rank}}"]', *args))
    assert done.returncode == 0
    for rank in (0, 1):
        assert re.search(rf"rank {rank} of 2: {socket.gethostname()}, process \d+, cpu, "
                         rf"model{rank}-mp2.safetensors\n", done.stderr)
    (tmp_path / "1/model1-mp2.safetensors").unlink()
    change = f'sys.argv += ["--ckpt-path", {str(tmp_path)!r} + f"/{{rank}}"]; generate.load_model = None'
    done = run(launch(tmp_path, change, *args))
    assert done.returncode != 0 and "[rank" not in done.stderr
    assert done.stderr.count("generate.py: error:") == 1
    assert f"generate.py: error: rank 1: {tmp_path}/1/model1-mp2.safetensors: no such file" in done.stderr


def test_a_rank_on_whose_machine_something_is_missing_is_named(tmp_path):
    change = "if rank == 1: generate.check = lambda rt: open('/no/compiler')"
    done = run(launch(tmp_path, change, "--prompt", QUESTION))
    assert done.returncode != 0 and done.stderr.count("generate.py: error:") == 1
    assert "generate.py: error: rank 1: " in done.stderr and "/no/compiler" in done.stderr


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(generate.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(generate.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="has 1 GPUs; give torchrun --nproc-per-node 1"):
        generate.Ranks.start("auto")


# Two machines


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_agents_give_the_tokens_of_one_process(backend, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{QUESTION}\nWhich is larger, 4821 or 4799?\n")
    args = [str(ROOT / "generate.py"), "--input-file", str(tmp_path / "prompts.txt"), "--temperature", "0",
            "--dtype", "float32", "--max-new-tokens", "60"]
    alone = run([sys.executable, *args])
    port, agents = free_port(), []
    for node in (0, 1):
        place = ["--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port]
        if backend == "c10d":
            place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "r1"]
        command = torchrun("--nnodes", 2, *place, "--nproc-per-node", 1) + args
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    texts = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    assert sorted(out for out, _ in texts) == ["", alone.stdout] and alone.stdout.count("\n") == 2
    assert any("rank 1 of 2: " in error for _, error in texts)


@pytest.mark.parametrize("place, words", [
    (["--node-rank", 0, "--master-addr", "127.0.0.1", "--master-port", ...], "1/2 clients joined"),
    (["--rdzv-backend", "c10d", "--rdzv-endpoint", ...], "RendezvousTimeoutError")], ids=["static", "c10d"])
def test_torchrun_waits_for_a_second_machine_as_long_as_the_readme_tells_it_to(place, words):
    port = free_port()
    place = [(f"127.0.0.1:{port}" if "c10d" in place else port) if word is ... else word for word in place]
    done = run(torchrun("--nnodes", 2, *place, "--rdzv-conf", "timeout=2,join_timeout=2",
                        ROOT / "generate.py", "--prompt", QUESTION))
    assert done.returncode == 1 and words in done.stderr


# While it runs


def talk(command: list[str]) -> pexpect.spawn:
    child = pexpect.spawn(command[0], command[1:], encoding="utf-8", timeout=60, codec_errors="replace",
                          env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1"})
    child.expect(PROMPT)
    return child


@pytest.mark.parametrize("when, victim", [("idle", 1), ("idle", 0), ("answering", 1)])
def test_a_killed_rank_ends_the_job_and_is_named(when, victim):
    command = [*torchrun("--nproc-per-node", 2), str(ROOT / "generate.py"), "--interactive", "--seed", "1"]
    child = talk(command)
    pid = int(re.search(rf"rank {victim} of 2: .*process (\d+)", child.before)[1])
    if when == "answering":
        child.send("Anna has 23 boxes with 12 pencils in each, and 40 more pencils. How many is that?\r")
        child.expect("thinking, ")
    os.kill(pid, signal.SIGKILL)
    child.expect(pexpect.EOF, timeout=30)                           # gloo's own time-out is 30 minutes
    child.wait()
    assert child.exitstatus == 1
    assert re.search(rf"Root Cause.*rank +: {victim} .*Signal 9", child.before, re.DOTALL)
    assert "[rank" not in child.before                              # the other one leaves no traceback


def test_an_exception_on_one_rank_ends_the_job_with_its_text(tmp_path):
    # As NCCL does, the rank's farewell would wait for the other one, which waits for it.
    change = ("if rank == 1: generate.Transformer.forward = lambda *_, **__: 1 / 0; "
              "generate.dist.destroy_process_group = lambda: time.sleep(1000)")
    done = run(launch(tmp_path, change, "--prompt", QUESTION))
    assert done.returncode == 1 and "[rank1]: ZeroDivisionError: division by zero" in done.stderr
    assert "[rank0]" not in done.stderr


def test_a_prompt_may_idle_for_longer_than_the_device_groups_time_out(tmp_path):
    # The one wait of ranks for something other than each other's arithmetic has a group of its own.
    change = ("generate.dist.init_process_group = partial(generate.dist.init_process_group, "
              "timeout=timedelta(seconds=3))")
    child = talk(launch(tmp_path, change, "--interactive", "--temperature", 0))
    with pytest.raises(pexpect.TIMEOUT):
        child.expect(pexpect.EOF, timeout=6)
    child.send(QUESTION + "\r")
    child.expect("boxed.534")
    child.expect(PROMPT)
    child.send("/exit\r")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
