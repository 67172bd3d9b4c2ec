"""Claim: the checkpoint in demo/ is real, every path of the project runs on it, and it masters its task.

transformers reads the same files and gives the same greedy tokens in fp32, plainly and with the multi-token
prediction layer as a speculator. Ranks, formats and precisions answer alike: fp32 token for token; what
rounds differently (bf16, FP8 activations) to the same box. Accuracy is measured on questions that training
never saw, sampled as R1's evaluation does; demo/README.md has the full measurement.
"""
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import tiny
import torch
from rank_worker import start_program
from safetensors.torch import load_file, save_file
from test_interactive import PROMPT
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

import convert
import generate
import kernel
from chat import Chat, Tokenizer

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
sys.path.insert(0, str(ROOT / "tools"))
import demo_task  # noqa: E402

STORY = "Mia has 23 boxes with 12 pencils in each, and 40 more pencils. How many pencils is that in all?"
QUESTIONS = ["What is 478 + 56?", "47 * 36", "903 - 1265", "Which is larger, 4821 or 4799?", "(12 - 30) * 4",
             "Hello", "What is the capital of France?", STORY]


@pytest.fixture(scope="module")
def chat():
    return Chat(Tokenizer(DEMO))


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """The same weights for transformers, dequantised here, the MTP layer where transformers looks for it."""
    folder = tmp_path_factory.mktemp("dequantised")
    stored = load_file(DEMO / "model.safetensors")
    tensors = {key: kernel.weight_dequant(t, stored[key + "_scale_inv"], torch.float32)
               if t.dtype == kernel.FP8 else t.float() for key, t in stored.items() if "scale_inv" not in key}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    tiny.edit_config(folder, quantization_config=..., torch_dtype="float32")
    patch = pytest.MonkeyPatch()                # transformers expects the layer at R1's number, 61
    patch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    yield model.eval()
    patch.undo()


def greedy(chat, questions=QUESTIONS, **runtime) -> list[list[int]]:
    model = tiny.load(DEMO, rows=len(questions), max_seq_len=700, **runtime)
    prompts = [chat.encode([{"role": "user", "content": question}]) for question in questions]
    tokens: list[list[int]] = [[] for _ in prompts]
    for event in generate.generate(model, prompts, chat.tokenizer.stop_ids, 500, generate.Sampling(0)):
        tokens[event.prompt] += event.tokens
    return tokens


def test_transformers_gives_the_same_greedy_tokens(chat, huggingface):
    calls = []
    hook = huggingface.model.register_forward_hook(lambda *_: calls.append(1))
    for question, ours in zip(QUESTIONS, greedy(chat)):
        prompt = torch.tensor([chat.encode([{"role": "user", "content": question}])])
        settings = dict(max_new_tokens=500, do_sample=False, eos_token_id=1, pad_token_id=2)
        calls.clear()
        theirs = huggingface.generate(prompt, **settings)
        plainly = len(calls)
        assert theirs[0, prompt.shape[1]:].tolist() == [*ours, 1]
        calls.clear()
        assert torch.equal(huggingface.generate(prompt, use_mtp=True, **settings), theirs)
        assert len(calls) < 0.7 * plainly       # the MTP layer is right about most next-but-one tokens
    hook.remove()


def test_transformers_tokenizer_and_template_agree_with_ours(chat):
    theirs = AutoTokenizer.from_pretrained(DEMO)
    user = {"role": "user", "content": "47*36? 你好"}
    assistant = {"role": "assistant", "content": "x</think>\n\n9"}
    for messages in ([user], [user, assistant, user], [{"role": "system", "content": "A."}, user,
                                                       {"role": "system", "content": "B."}]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == chat.render(messages) and chat.style == "r1"
        assert theirs.encode(text, add_special_tokens=False) == chat.encode(messages)


def answers(out: Path, *args, ranks: int = 1) -> list[dict]:
    args = [*map(str, args), "--temperature", "0", "--max-new-tokens", "500", "--output-file", str(out)]
    if ranks == 1:
        assert generate.main(args) == 0
    else:
        start_program(ranks, generate.main, args)
    text = out.read_text(encoding="utf-8")
    out.unlink()
    return [json.loads(line) for line in text.splitlines()]


def test_ranks_formats_and_precisions_answer_alike(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(QUESTIONS))
    for ranks, dtype in ((1, None), (2, None), (2, torch.bfloat16)):
        convert.convert(convert.Checkpoint(DEMO), tmp_path / f"{ranks}{dtype}", ranks, dtype)
    run = [tmp_path / "out.jsonl", "--input-file", file, "--dtype", "float32"]
    first = answers(*run)                                               # HuggingFace's folder, FP8, 1 process
    assert [record["finish_reason"] for record in first] == ["stop"] * len(QUESTIONS)
    assert answers(*run, "--fp8", "dequant") == answers(*run, ranks=2) == first
    assert answers(*run, "--ckpt-path", tmp_path / "1None") == first
    assert answers(*run, "--ckpt-path", tmp_path / "2None", ranks=2) == first
    boxes = [demo_task.boxes(record["answer"]) for record in first]
    for others in (answers(*run, "--ckpt-path", tmp_path / "2torch.bfloat16", ranks=2),
                   answers(*run[:3], "--dtype", "bfloat16"), answers(*run, "--fp8", "gemm")):
        assert [demo_task.boxes(record["answer"]) for record in others] == boxes


def test_it_masters_questions_that_training_never_saw(chat):
    rng = random.Random("test")
    problems = [demo_task.make(rng, True, kind) for kind in demo_task.KINDS for _ in range(10)]
    model = tiny.load(DEMO, rows=70, max_seq_len=800)
    used = {i: torch.zeros(8) for i in (1, 2)}

    def count(load: torch.Tensor, chosen: torch.Tensor) -> None:
        load += torch.bincount(chosen.flatten(), minlength=8)

    for i, load in used.items():
        model.layers[i].ffn.gate.register_forward_hook(lambda _, __, out, load=load: count(load, out[1]))
    prompts = [chat.encode([{"role": "user", "content": p.question}]) for p in problems]
    tokens: list[list[int]] = [[] for _ in prompts]
    for event in generate.generate(model, prompts, chat.tokenizer.stop_ids, 700, generate.Sampling(seed=1)):
        tokens[event.prompt] += event.tokens
    grades = [demo_task.grade(chat.tokenizer.decode(ids), p.answer) for ids, p in zip(tokens, problems)]
    assert sum(right for right, _ in grades) >= 0.9 * len(problems)
    assert sum(formed for _, formed in grades) >= 0.97 * len(problems)
    for load in used.values():
        assert (load / load.sum()).min() > 0.005                    # an even load is 0.125: none is dead


def test_the_readme_speaks_of_this_file_and_it_is_small():
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest() in readme
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 4e6
    results = json.loads((DEMO / "results.json").read_text())
    for kind in ("task mix", *demo_task.KINDS):
        assert f"| {kind} | {100 * results[kind]['pass@1']:.1f} % |" in readme
    model = generate.Transformer(convert.load_config(DEMO / "config.json"), generate.Runtime())
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in readme


def test_a_first_time_user_needs_no_arguments():
    program = [sys.executable, str(ROOT / "generate.py"), "--temperature", "0"]
    done = subprocess.run([*program, "--prompt", QUESTIONS[0]], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("<think>\n") and r"\boxed{534}" in done.stdout
    child = pexpect.spawn(program[0], [*program[1:], "--interactive"], encoding="utf-8", timeout=60,
                          env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1"})
    child.expect("Ask it, for example")
    child.expect(PROMPT)
    for question, box in ((QUESTIONS[1], "1692"), (QUESTIONS[2], "-362")):      # the second one has a history
        child.send(question + "\r")
        child.expect_exact(rf"\boxed{{{box}}}")
        child.expect(PROMPT)
    child.send("/exit\r")
    child.expect(pexpect.EOF)
