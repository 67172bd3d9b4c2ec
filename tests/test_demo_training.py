"""Claim: the demo's data are right and split cleanly, and its training is V3's, exact, and resumable.

Data are held against Python's own arithmetic. The exported file, read by model.py, must give the logits of
the twin that was trained (transformers), within 1e-5 of their scale, as everywhere in fp32. An interrupted
run must end in the same bits as an undisturbed one.
"""
import argparse
import random
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch

from chat import Chat, Tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import demo_task  # noqa: E402
import train_demo  # noqa: E402


def test_the_reasoning_arrives_at_what_python_computes():
    rng = random.Random(0)
    for _ in range(3000):
        op = rng.choice("+-*")
        a, b = demo_task.operands(rng, op)
        assert demo_task.Scratch().solve(a, op, b) == eval(f"({a}) {op} ({b})")
        p = demo_task.two_steps(rng)
        asked = re.search(r"[-(\d][-+*()\d ]*\d\)?", re.sub("[×x]", "*", p.question))[0]
        assert eval(asked) == int(p.answer), p.question


def calculations(p: demo_task.Problem) -> set[str]:
    """What the lines of a problem's reasoning work out, read from its text, signs taken out."""
    found = set()
    for a, op, b in re.findall(r"^So (-?\d+)([-+*])\(?(-?\d+)\)?=", p.reasoning, re.MULTILINE):
        a, b = int(a), int(b) * (-1 if op == "-" else 1)
        small, large = sorted((abs(a), abs(b)))
        apart = op != "*" and (a < 0) != (b < 0)
        found.add(f"{large}-{small}" if apart else f"{small}{op if op == '*' else '+'}{large}")
    if p.kind == "multiply":
        found |= {f"{b}*{a}" for a, b in re.findall(r"^(\d\d+)\*(\d):$", p.reasoning, re.MULTILINE)}
        found |= {"+".join(map(str, sorted(map(int, pair))))
                  for pair in re.findall(r"^Line up (\d+) and (\d+)", p.reasoning, re.MULTILINE)}
    return {key for key in found if max(map(int, re.split("[-+*]", key))) > 9}


def test_no_training_problem_contains_a_held_out_calculation_and_held_out_ones_do():
    rng = random.Random(0)
    kinds = [kind for kind in demo_task.KINDS if kind not in ("other", "compare")]
    for _ in range(3000):
        assert not any(map(demo_task.held_out, calculations(demo_task.make(rng, False, rng.choice(kinds)))))
    for kind in kinds:
        for _ in range(100):
            p = demo_task.make(rng, True, kind)
            assert any(map(demo_task.held_out, calculations(p))) or kind not in ("add", "multiply"), p


@pytest.mark.parametrize("text, right, formed", [
    ("4+4=8\n</think>\n\n4 + 4 = \\boxed{8}", True, True), ("x\n</think>\n\n\\boxed{9}", False, True),
    ("\\boxed{8}", False, False), ("\\boxed{8}\n</think>\n\nso 8", False, False),
    ("x</think>\\boxed{8}\\boxed{8}", False, False), ("x</think>y</think>\\boxed{8}", False, False),
    ("x</think>\\boxed{8", False, False)])
def test_a_completion_needs_one_closed_thought_and_then_one_box(text, right, formed):
    assert demo_task.grade(text, "8") == (right, formed)
    assert demo_task.grade("x</think>\\boxed{\\text{no answer}}", demo_task.NO_ANSWER) == (True, True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Runs of 5 steps on 2 conversations each, the last one through FP8, with the demo's tokenizer; one of a
    name that is known goes on where that one stopped."""
    folder, chat = tmp_path_factory.mktemp("training"), Chat(Tokenizer(ROOT / "demo"))

    def run(name: str) -> train_demo.Run:
        (folder / name).mkdir(exist_ok=True)
        return train_demo.Run(argparse.Namespace(seed=3, steps=5, rate=1e-2, work=folder / name), chat)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_demo, "POOL", 2)
        yield run


def test_an_interrupted_run_goes_on_exactly(start):
    straight = start("straight")
    straight.finish()
    stopped = start("stopped")
    stopped.log = [stopped.step(step) for step in range(3)]
    stopped.save()
    resumed = start("stopped")
    assert len(resumed.log) == 3
    resumed.finish()
    assert resumed.log == straight.log
    for (name, a), b in zip(straight.twin.state_dict().items(), resumed.twin.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_exported_file_gives_the_logits_that_were_trained(start, tmp_path):
    twin = start("straight").finish()               # which the test above has trained
    train_demo.export(twin, tmp_path)
    for name, p in twin.named_parameters():
        stays = p.ndim >= 2 and train_demo.is_fp8(name)
        p.data = train_demo.through_fp8(p.data) if stays else p.data.bfloat16().float()
    tokens = torch.randint(512, (2, 90), generator=torch.Generator().manual_seed(0))
    twin.real = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        expected = twin.main(tokens).logits
    difference = (tiny.logits(tiny.load(tmp_path), tokens) - expected).abs().max()
    assert difference < 1e-5 * expected.std()


def test_the_bias_of_a_busy_expert_falls_and_that_of_an_idle_one_rises(start):
    twin = start("new").twin
    gate = twin.main.model.layers[1].mlp.gate
    twin.loads = {"main.model.layers.1.mlp.gate": torch.tensor([9, 0, 4, 4, 4, 4, 4, 3])}
    twin.balance()
    signs = [-1, 1, 0, 0, 0, 0, 0, 1]                           # the mean load is 4
    assert gate.e_score_correction_bias.tolist() == pytest.approx([train_demo.GAMMA * sign for sign in signs])
    assert twin.loads == {}
