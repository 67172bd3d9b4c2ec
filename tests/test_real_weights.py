"""Claim: with the weights of a real model, greedy text is HuggingFace's, token for token, on 1 and on 3
ranks.

Skipped unless the environment variable REAL_WEIGHTS names a HuggingFace folder of a small chat model of the
Llama or Qwen2 family, such as SmolLM2-135M-Instruct (9 heads and 3 key/value heads, so that 3 ranks are
legal).
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = os.environ.get("REAL_WEIGHTS")
ROOT = Path(__file__).parent.parent
PROMPTS = ["What is the capital of France?", "Explain in two sentences why the sky is blue.",
           "Write a short poem about the sea, in four lines."]

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="set REAL_WEIGHTS to the folder of a small chat model, such as SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """HuggingFace's greedy tokens in fp32, without the end token."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    completions = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=64, attention_mask=torch.ones_like(ids))
        tokens = out[0, ids.shape[1]:].tolist()
        completions.append(tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens)
    return completions


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("converted", [False, True], ids=["huggingface folder", "converted folder"])
def test_greedy_text_equals_huggingface(ranks, converted, expected, tmp_path):
    folder = FOLDER
    if converted:
        folder = tmp_path / "converted"
        subprocess.run([sys.executable, ROOT / "convert.py", "--hf-ckpt-path", FOLDER, "--save-path", folder,
                        "--model-parallel", str(ranks), "--verify"], check=True)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    subprocess.run([sys.executable, *launcher, ROOT / "generate.py", "--ckpt-path", folder, "--input-file",
                    tmp_path / "prompts.jsonl", "--output-file", tmp_path / "out.jsonl", "--max-new-tokens",
                    "64",
                    "--temperature", "0", "--dtype", "float32"], check=True)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert [record["tokens"] for record in records] == expected
