"""Claim: tools/evaluate.py runs R1's protocol from prompts to report, and the same seed gives the same bytes.

The demo's own task runs whole: sampled, interrupted, resumed, over two ranks, graded again. The published
sets are stood in for by made-up rows in their layouts, a server by one in a thread.
"""
import http.server
import json
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import demo_task  # noqa: E402
import evaluate  # noqa: E402
import tasks  # noqa: E402

DEMO = ["run", "--task", "demo", "--k", "3", "--limit", "8", "--batch-size", "24", "--dtype", "float32",
        "--fp8", "bf16"]
AIME = [{"id": 60 + i, "problem": f"What is {n} + 0?", "solution": "...", "answer": f"{n:03}", "url": "u",
         "year": "2024"} for i, n in enumerate((4, 25, 204))]
MATH = [{"problem": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "answer": r"\frac12",
         "subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json"},
        {"problem": "Solve x^2=1.", "solution": r"So $\boxed{\pm 1}$.", "answer": r"\pm 1",
         "subject": "Algebra", "level": 2, "unique_id": "test/algebra/2.json"}]
GPQA = [{"Question": f"Which is number {i}?", "Correct Answer": f"right {i}\n",
         **{f"Incorrect Answer {j}": f"wrong {i}.{j}" for j in (1, 2, 3)}} for i in range(6)]
CODE = [{"question_id": name, "question_content": f"Do {name}.", "starter_code": starter,
         "contest_date": date + "T00:00:00"}
        for name, starter, date in (("b1", "", "2024-09-01"), ("a2", "class S:", "2025-01-31"),
                                    ("c3", "", "2024-07-31"), ("d4", "", "2025-02-01"))]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*args) -> int:
    return evaluate.main([str(arg) for arg in args])


def result(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


FILES = ("completions.jsonl", "run.json", "grades.jsonl", "results.json")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    assert run(*DEMO, "--out", out) == 0
    return out


def test_the_demo_is_asked_held_out_questions_in_r1s_format_and_graded(demo):
    results, completions = result(demo), read(demo / "completions.jsonl")
    problems = tasks.demo_questions(8)
    grades = [demo_task.grade(row["text"], problems[row["index"]].gold)[0] for row in completions]
    assert len(grades) == 24 and any(grades)
    assert results["scores"]["pass@1"] == pytest.approx(sum(grades) / 24)
    assert [row["correct"] for row in read(demo / "grades.jsonl")] == grades
    rng = random.Random("evaluate")
    assert [demo_task.make(rng, True).question for _ in range(3)] == [q.text for q in problems[:3]]
    made = results["run"]
    assert made["chat template"] == "<｜begin▁of▁sentence｜><｜User｜>{question}<｜Assistant｜><think>\n"
    for key, value in dict(temperature=0.6, top_p=0.95, seed=0, k=3, template="{question}", dtype="float32",
                           task="demo", ranks=1).items():
        assert made[key] == value
    for key in ("checkpoint sha256", "chat template sha256", "template sha256", "data sha256"):
        assert len(made[key]) == 64
    (software,) = made["software"]
    assert software["torch"] and len(software["code sha256"]) == 64
    assert len(results["grader"]["grading.py sha256"]) == 64


def test_prompts_have_one_bos_and_one_open_think(demo, tmp_path, monkeypatch):
    prompts = []
    monkeypatch.setattr(evaluate, "generate", lambda _, **call: prompts.extend(call["prompts"]) or iter(()))
    monkeypatch.setattr(evaluate, "run_batch", lambda events, *_: list(events))
    monkeypatch.setattr(evaluate, "grade_file", lambda *_: None)
    assert run(*DEMO, "--prompt", "boxed", "--out", tmp_path / "run") == 0
    tokenizer = evaluate.Tokenizer(ROOT / "demo")
    bos, think = tokenizer.token_id(tokenizer.bos), tokenizer.token_id("<think>")
    for ids, question in zip(prompts, tasks.demo_questions(8), strict=True):
        assert ids.count(bos) == ids.count(think) == 1 and ids[0] == bos
        text = tokenizer.decode(ids)
        assert text == f"<｜User｜>{question.text}\n{tasks.BOXED}<｜Assistant｜><think>\n"


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run that was interrupted after five of 24 samples, and while it wrote a sixth."""
    def add(results, record, whole=evaluate.Results.add):
        if len(results.records) == 5:
            raise KeyboardInterrupt
        whole(results, record)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Results, "add", add)
        assert run(*DEMO, "--out", tmp_path / "run") == 130
    with open(tmp_path / "run/completions.jsonl.part", "a") as part:
        part.write('{"index": 7, "sam')
    return tmp_path / "run"


def test_a_run_that_is_resumed_or_graded_again_gives_the_same_bytes(demo, begun, tmp_path):
    out = begun
    assert run(*DEMO, "--out", out) == 2 and not (out / "results.json").exists()        # not without --resume
    assert run(*DEMO, "--seed", "1", "--resume", "--out", out) == 2     # nor with another seed
    assert run(*DEMO, "--resume", "--out", out) == 0
    for name in FILES:
        assert (out / name).read_bytes() == (demo / name).read_bytes()
    again = ["grade", "--task", "demo", "--completions", out / "completions.jsonl"]
    assert run(*again, "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "results.json").read_bytes() == (demo / "results.json").read_bytes()
    assert run(*again, "--prompt", "boxed") == 2 and run(*again, "--k", "2") == 2
    for more in ([], ["--resume"]):                                     # results are not overwritten
        assert run(*DEMO, *more, "--out", out) == 2


def test_a_resumed_run_may_have_another_batch_size_and_lists_the_software_of_each_start(demo, begun):
    old, now = [{"code sha256": "0", "python": "3.0"}], result(demo)["run"]["software"]
    evaluate.write_json(begun / "run.json", json.loads((begun / "run.json").read_text()) | {"software": old})
    assert run(*DEMO, "--batch-size", "5", "--resume", "--out", begun) == 0
    made = result(begun)["run"]
    assert made["software"] == old + now and made["batch size"] == 5 and made["compile"] is False
    assert (begun / "completions.jsonl").read_bytes() == (demo / "completions.jsonl").read_bytes()


def test_a_run_that_was_interrupted_while_grading_resumes_there(demo, tmp_path, monkeypatch):
    shutil.copytree(demo, tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    monkeypatch.setattr(evaluate, "load_model", None)                   # nothing is loaded
    assert run(*DEMO, "--out", tmp_path / "run") == 2                   # not without --resume
    assert run(*DEMO, "--seed", 1, "--resume", "--out", tmp_path / "run") == 2
    assert run(*DEMO, "--resume", "--out", tmp_path / "run") == 0
    assert (tmp_path / "run/results.json").read_bytes() == (demo / "results.json").read_bytes()


def test_two_ranks_complete_as_one(demo, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           str(ROOT / "tools/evaluate.py"), *DEMO, "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "completions.jsonl").read_bytes() == (demo / "completions.jsonl").read_bytes()
    assert result(tmp_path)["run"]["ranks"] == 2


def test_the_codes_hash_covers_the_evaluation(monkeypatch, tmp_path):
    data, read = write(tmp_path / "aime.jsonl", AIME), []
    monkeypatch.setattr(evaluate, "sample_from_api", lambda *_: None)
    monkeypatch.setattr(evaluate, "grade_file", lambda *_: None)
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or whole(path))
    assert run("run", "--task", data, "--api", "http://localhost:1", "--model", "m", "--out", tmp_path) == 0
    assert {"model.py", "generate.py", "evaluate.py", "tasks.py", "grading.py", "demo_task.py"} < {*read}


def test_the_checkpoints_hash_is_of_its_bytes(tmp_path):
    shutil.copytree(ROOT / "demo", tmp_path / "copy")
    original = evaluate.hash_files(evaluate.Checkpoint(ROOT / "demo"))
    assert evaluate.hash_files(evaluate.Checkpoint(tmp_path / "copy")) == original
    weights = bytearray((tmp_path / "copy/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "copy/model.safetensors").write_bytes(weights)
    assert evaluate.hash_files(evaluate.Checkpoint(tmp_path / "copy")) != original


# ------------------------------------------------------------------------------------------------------------


def completions(path: Path, texts: list[list[str]], **more) -> Path:
    return write(path, [{"index": i, "sample": s, "text": text, **more} for i, row in enumerate(texts)
                        for s, text in enumerate(row)])


def test_aime_is_recognised_and_graded_as_integers_with_truncated_samples_apart(tmp_path, capsys):
    data = write(tmp_path / "aime.jsonl", AIME)
    texts = [["t</think>\\boxed{4}", "t</think>\\boxed{004}"], ["t", "t</think>no box"],
             ["t \\boxed{204}", "t 好</think>\\boxed{203}"]]
    file = completions(tmp_path / "c.jsonl", texts)
    assert run("grade", "--task", data, "--completions", file, "--k", 2, "--model", "deepseek-ai/DeepSeek-R1",
               "--out", tmp_path) == 0
    results = result(tmp_path)
    assert results["protocol"]["task"] == "aime24" and results["protocol"]["template"].endswith("\\boxed{}.")
    assert results["scores"]["pass@1"] == pytest.approx(2 / 6)
    assert results["scores"]["cons@2"] == pytest.approx(1 / 3)
    assert results["truncated"] == pytest.approx(2 / 6) and results["unanswered"] == pytest.approx(1 / 6)
    assert results["mixed"] == pytest.approx(1 / 6) and results["run"] is None
    assert "| 79.8 |" in capsys.readouterr().err                        # R1's published figure beside it


def test_an_engine_that_drops_the_reasoning_is_asked_about_and_graded_as_it_is(tmp_path, capsys):
    data = write(tmp_path / "aime.jsonl", AIME)
    texts = [["\\boxed{4}"], ["r</think>\\boxed{25}"], ["\\boxed{203}"]]
    grade = ["grade", "--task", data, "--k", 1, "--out", tmp_path, "--completions"]
    assert run(*grade, completions(tmp_path / "c.jsonl", texts, finish_reason="stop")) == 0
    assert result(tmp_path)["truncated"] == pytest.approx(2 / 3)
    assert "2 samples ended by themselves without </think>" in capsys.readouterr().err
    assert run(*grade, tmp_path / "c.jsonl", "--no-thinking") == 0
    assert result(tmp_path)["truncated"] == 0 and result(tmp_path)["scores"]["pass@1"] == pytest.approx(2 / 3)
    assert run(*grade, completions(tmp_path / "c.jsonl", texts, finish_reason="length"), "--no-thinking") == 0
    assert "by themselves" not in capsys.readouterr().err


def test_a_model_is_named_for_its_published_figures(demo, tmp_path, capsys):
    file = completions(tmp_path / "c.jsonl", [["t</think>\\boxed{4}"]] * 3)
    grade = ["grade", "--task", write(tmp_path / "aime.jsonl", AIME), "--completions", file, "--k", 1]
    assert run(*grade) == 0 and result(tmp_path)["model"] == tmp_path.name
    error = capsys.readouterr().err
    assert f"no published figures for {tmp_path.name!r}" in error and "DeepSeek-R1-Distill-Qwen-7B" in error
    assert run(*grade, "--model", "DeepSeek-R1") == 0 and "79.8" in (error := capsys.readouterr().err)
    assert "no published" not in error
    run_file = demo / "completions.jsonl"                               # --model counts before run.json's
    assert run("grade", "--task", "demo", "--completions", run_file, "--model", "m", "--out", tmp_path) == 0
    assert result(tmp_path)["model"] == "m" and "no published" not in capsys.readouterr().err


def test_grades_of_foreign_completions_have_versions(tmp_path):
    file = completions(tmp_path / "c.jsonl", [["t</think>\\boxed{4}"]] * 2)
    data = write(tmp_path / "math.jsonl", MATH)
    assert run("grade", "--task", data, "--completions", file, "--k", 1) == 0
    assert result(tmp_path)["grader"].keys() == {"grading.py sha256", "python", "numpy", "math-verify",
                                                 "latex2sympy2_extended", "sympy"}


def test_a_csv_field_may_hold_any_line_separator(tmp_path):
    row = {**GPQA[0], "Question": "one\u2028two\x0cthree\x85four", "Correct Answer": "five\r\nsix"}
    with open(tmp_path / "gpqa.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = tasks.csv.DictWriter(file, list(GPQA[0]))
        writer.writeheader()
        writer.writerow(row)
    assert tasks.read_rows(tmp_path / "gpqa.csv") == [row]


def test_fewer_samples_than_k_and_samples_of_other_prompts_are_refused(tmp_path, capsys):
    data = write(tmp_path / "aime.jsonl", AIME)
    texts = [["t</think>\\boxed{4}"] * 3, ["x"] * 3, ["x"] * 3]
    whole = completions(tmp_path / "c.jsonl", texts)
    for rows, words in ((read(whole)[:-1], "8 of 9 samples"), (read(whole) + read(whole)[:1], "there twice"),
                        ([{**row, "prompt": "another"} for row in read(whole)], "'prompt' is not"),
                        ([{"index": 3, "text": ""}], "not among 3 x 3"),
                        ([{"index": "0", "text": ""}], "'index'"), ([{"index": 0, "text": None}], "'text'"),
                        ([{"index": 0, "text": "", "sample": []}], "'sample'")):
        broken = write(tmp_path / "broken.jsonl", rows)
        assert run("grade", "--task", data, "--completions", broken, "--k", 3, "--out", tmp_path / "no") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "no").exists()
    rows = [{"index": row["index"], "text": row["text"]} for row in read(whole)]
    counted = write(tmp_path / "counted.jsonl", rows)
    for file in (whole, counted):                                       # sample numbers may be left out
        out = tmp_path / file.stem
        assert run("grade", "--task", data, "--completions", file, "--k", 3, "--out", out) == 0
    assert (tmp_path / "c/grades.jsonl").read_bytes() == (tmp_path / "counted/grades.jsonl").read_bytes()


def test_math_is_graded_by_equivalence_against_the_solutions_box(tmp_path):
    data = write(tmp_path / "math.jsonl", MATH)
    file = completions(tmp_path / "c.jsonl", [[f"t</think>\\boxed{{{answer}}}" for answer in row]
                                              for row in (["0.5", "2", "4/2"], ["1, -1"] * 3)])
    task = ["--task", "math500", "--data", data, "--k", 3]
    assert run("grade", *task, "--completions", file, "--out", tmp_path) == 0
    assert [row["class"] for row in read(tmp_path / "grades.jsonl")] == [0, 1, 1, 0, 0, 0]
    assert result(tmp_path)["scores"]["cons@3"] == pytest.approx(0.5)
    assert result(tmp_path)["questions"][0]["gold"] == "\\frac{1}{2}"
    assert f"math-verify=={result(tmp_path)['grader']['math-verify']}" in \
        (ROOT / "requirements-dev.txt").read_text()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_choices_are_shuffled_for_each_sample_and_letters_are_turned_back(suffix, tmp_path):
    data = tmp_path / f"gpqa_diamond.{suffix}"
    if suffix == "parquet":
        parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
        parquet.write_table(table.from_pylist(GPQA), data)
    elif suffix == "csv":
        with open(data, "w", newline="") as file:
            writer = tasks.csv.DictWriter(file, list(GPQA[0]))
            writer.writeheader()
            writer.writerows(GPQA)
    else:
        write(data, GPQA)
    assert run("export", "--task", data, "--k", 4, "--out", tmp_path / "prompts.jsonl") == 0
    prompts = [row["prompt"] for row in read(tmp_path / "prompts.jsonl")]
    assert len(set(prompts)) > 18 and len(prompts) == 24                        # 6 questions, 4 samples each
    assert prompts[4].startswith("Answer the following multiple choice")
    assert "\n\nWhich is number 1?\n\nA) " in prompts[4]
    letters = [next(line[0] for line in prompt.splitlines() if ") right" in line) for prompt in prompts]
    assert set(letters) == set("ABCD")
    for name, texts, expected in (("right", letters, 1), ("always A", ["A"] * 24, letters.count("A") / 24)):
        rows = [{"index": i, "prompt": prompt, "text": f"t</think>Answer: {letter}"}
                for i, (prompt, letter) in enumerate(zip(prompts, texts))]
        file, out = write(tmp_path / "c.jsonl", rows), tmp_path / name
        assert run("grade", "--task", data, "--completions", file, "--k", 4, "--out", out) == 0
        assert result(out)["scores"]["pass@1"] == pytest.approx(expected)
    for row, prompt in zip(read(out / "grades.jsonl"), prompts):                # the order is stored
        shown = [line[3:] for line in prompt.splitlines()[-4:]]
        options = [GPQA[int(row["id"]) - 1][key].strip() for key in ("Correct Answer", *tasks.WRONG)]
        assert shown == [options[i] for i in row["order"]] and row["answer"] == str(row["order"][0])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("export", "--task", "aime24", "--data", tmp_path / "a.parquet", "--out", tmp_path / "x") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_livecodebench_programs_go_out_unexecuted_in_its_graders_order(tmp_path, capsys):
    data, codes = write(tmp_path / "lcb.jsonl", CODE), tmp_path / "codes.json"
    assert run("export", "--task", data, "--out", tmp_path / "prompts.jsonl") == 0
    prompts = [row["prompt"] for row in read(tmp_path / "prompts.jsonl")]
    assert len(prompts) == 2                                                    # within R1's window
    assert "each to be completed 16 times" in capsys.readouterr().err           # and `import` wants as many
    assert "# YOUR CODE HERE" in prompts[0] and "```python\nclass S:\n```" in prompts[1]
    trace = tmp_path / "executed"
    program = f"open({str(trace)!r}, 'w')\n"
    file = completions(tmp_path / "c.jsonl", [
        [f"```\nno\n```</think>First\n```python\nold\n```\nthen\n```python\n{program}```\n", "```\nno\n```"],
        ["t</think>no code", f"t</think>```\n{program}"]])
    assert run("import", "--task", data, "--completions", file, "--out", codes) == 2
    assert "4 of 32 samples" in capsys.readouterr().err
    assert run("import", "--task", data, "--completions", file, "--k", 2, "--out", codes) == 0
    assert json.loads(codes.read_text()) == [["", ""], [program, ""]] and not trace.exists()    # a2 before b1
    assert "truncated 1, without code 2" in capsys.readouterr().err
    assert run("grade", "--task", data, "--completions", file, "--k", 2) == 2
    assert run("import", "--task", "demo", "--completions", file, "--k", 2, "--out", codes) == 2


# ------------------------------------------------------------------------------------------------------------


class StandIn(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that adds 0, and fails as the test wants."""
    requests, failures = [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, reply = StandIn.failures.pop(0) if StandIn.failures else (200, self.answer(body))
        StandIn.requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
        self.send_response(status)
        if status == 302:
            self.send_header("Location", reply)
        self.end_headers()
        self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    def do_GET(self):                       # where a redirection leads
        StandIn.requests.append({"path": self.path, "key": self.headers["Authorization"]})
        self.send_response(403)
        self.end_headers()

    def answer(self, body: dict) -> dict:
        number = body["messages"][0]["content"].split()[2]
        message = {"4": {"reasoning_content": "I add.", "content": "\\boxed{4}"},       # a parser there
                   "25": {"content": "I add.</think>\\boxed{25}"},                      # none
                   "204": {"reasoning_content": "I add \\boxed{204}", "content": None}}[number]     # cut off
        return {"choices": [{"message": message, "finish_reason": "length" if number == "204" else "stop"}]}

    def log_message(self, *_):
        pass


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(evaluate, "WAIT", 0.0)
    monkeypatch.setattr(StandIn, "requests", [])
    monkeypatch.setattr(StandIn, "failures", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_server_that_drops_or_ends_in_reasoning_is_told_from_one_that_was_cut_off(api, tmp_path, capsys):
    data = write(tmp_path / "aime.jsonl", AIME)
    args = ["run", "--task", data, "--api", api, "--model", "m", "--k", 1, "--concurrency", 1, "--out"]

    def replies(*messages):
        StandIn.failures[:] = [(200, {"choices": [{"message": message, "finish_reason": "stop"}]})
                               for message in messages]

    replies({"reasoning_content": "I add.", "content": ""}, {"content": "\\boxed{25}"}, {"content": ""})
    assert run(*args, tmp_path / "a") == 0
    how = [row["how"] for row in read(tmp_path / "a/grades.jsonl")]
    assert how == ["unanswered", "truncated", "truncated"]
    assert "2 samples ended by themselves" in capsys.readouterr().err
    replies({"reasoning_content": "I add.", "content": ""}, {"content": "\\boxed{25}"}, {"content": ""})
    assert run(*args, tmp_path / "b", "--no-thinking") == 0
    assert [row["how"] for row in read(tmp_path / "b/grades.jsonl")] == ["unanswered", "box", "unanswered"]


def test_a_server_is_sampled_with_retries_and_resumed_to_the_same_bytes(api, tmp_path, capsys):
    data = write(tmp_path / "aime.jsonl", AIME)
    args = ["run", "--task", data, "--api", api, "--model", "DeepSeek-R1-Distill-Qwen-7B", "--k", 4]
    StandIn.failures += [(503, b"busy"), (429, b""), (200, b"<html>"), (200, {"choices": []})]
    assert run(*args, "--concurrency", 3, "--out", tmp_path / "a") == 0
    results = result(tmp_path / "a")
    assert results["scores"]["pass@1"] == pytest.approx(2 / 3)
    assert results["truncated"] == pytest.approx(1 / 3)
    assert results["finish reasons"] == {"length": 4, "stop": 8} and "55.5" in capsys.readouterr().err
    sent = StandIn.requests[4:]
    assert len({body["seed"] for body in sent}) == 12                           # no two samples share a seed
    wanted = dict(temperature=0.6, top_p=0.95, max_tokens=32768, path="/v1/chat/completions")
    assert all(body[key] == wanted[key] for body in sent for key in wanted)
    assert sent[0]["messages"] == [{"role": "user", "content": f"{AIME[0]['problem']}\n{tasks.BOXED}"}]

    StandIn.failures += [(200, StandIn.answer(None, sent[0]))] * 3 + [(400, b"the context is too long")]
    assert run(*args, "--concurrency", 1, "--out", tmp_path / "b") == 2
    assert "HTTP 400: 'the context is too long' (try 1)" in capsys.readouterr().err
    assert len(read(tmp_path / "b/completions.jsonl.part")) == 4        # the settings, and three samples
    before = len(StandIn.requests)
    assert run(*args, "--resume", "--out", tmp_path / "b") == 0
    again = {body["seed"] for body in StandIn.requests[before:]}
    assert len(again) == 9 and again < {body["seed"] for body in sent}          # without the three samples
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_server_that_points_elsewhere_gives_no_key_away(api, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    StandIn.failures.append((302, "/elsewhere"))
    data = write(tmp_path / "aime.jsonl", AIME)
    args = ["--api", api, "--model", "m", "--k", 1, "--concurrency", 1, "--out", tmp_path / "out"]
    assert run("run", "--task", data, *args) == 2
    assert [request["key"] for request in StandIn.requests[:2]] == ["Bearer secret", None]


def test_the_report_has_both_errors_beside_the_published_figures(demo, tmp_path, capsys):
    data = write(tmp_path / "aime.jsonl", AIME)
    right = "t</think>\\boxed{4}"
    file = completions(tmp_path / "c.jsonl", [[right] * 4, [right.replace("4", "25"), "", "", ""], [""] * 4])
    assert run("grade", "--task", data, "--completions", file, "--k", 4, "--out", tmp_path / "aime",
               "--model", "DeepSeek-R1-Distill-Llama-8B") == 0
    assert run("report", demo, tmp_path / "aime", "--out", tmp_path / "report") == 0
    rows = json.loads((tmp_path / "report/report.json").read_text())
    assert [row["published"] for row in rows] == [None, 50.4] and rows[1]["open-r1"] == 43.9
    assert rows[1]["pass@1"] == pytest.approx(500 / 12) and rows[1]["published cons@64"] is None
    assert [row["sampling"] for row in rows] == ["0.6/0.95/1000", "unknown"]
    assert rows[1]["rerun error"] == pytest.approx(100 * (0.25 * 0.75 / 3) ** 0.5 / 3)
    text = (tmp_path / "report/report.md").read_text()
    assert text == capsys.readouterr().out and "| 41.7 | 8.33 | 30.05 | 50.4 | 43.9 |" in text
    assert (tmp_path / "report/report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "report").iterdir())) == 3
    from matplotlib import pyplot
    (axes,) = pyplot.gcf().axes                                 # the bars have caps, and say what they are
    assert [bar.get_label() for bar in axes.containers] == [f"± 1 standard error, {of}" for of in
                                                            ("question", "rerun")]
    assert all(caps for _, caps, _ in axes.containers)


def test_a_vote_is_compared_with_cons_64_only_at_64_samples(tmp_path):
    data = write(tmp_path / "aime.jsonl", AIME)
    for k, published in ((63, None), (64, 80.0)):
        file = completions(tmp_path / "c.jsonl", [["t</think>\\boxed{4}"] * k] * 3)
        assert run("grade", "--task", data, "--completions", file, "--k", k, "--out", tmp_path,
                   "--model", "DeepSeek-R1-Distill-Llama-8B") == 0
        assert evaluate.row_of(result(tmp_path))["published cons@64"] == published


# AIME 2024's pass@1, cons@64 and open-r1's pass@1; MATH-500's pass@1 and open-r1's; GPQA Diamond's, likewise
FIGURES = {"DeepSeek-R1": (79.8, None, None, 97.3, None, 71.5, None),
           "DeepSeek-R1-Distill-Qwen-1.5B": (28.9, 52.7, 30.7, 83.9, 83.1, 33.8, 35.8),
           "DeepSeek-R1-Distill-Qwen-7B": (55.5, 83.3, 50.8, 92.8, 94.5, 49.1, 50.5),
           "DeepSeek-R1-Distill-Qwen-14B": (69.7, 80.0, 65.9, 93.9, 94.1, 59.1, 61.5),
           "DeepSeek-R1-Distill-Qwen-32B": (72.6, 83.3, 69.7, 94.3, 95.6, 62.1, 63.1),
           "DeepSeek-R1-Distill-Llama-8B": (50.4, 80.0, 43.9, 89.1, 88.6, 49.0, 46.7),
           "DeepSeek-R1-Distill-Llama-70B": (70.0, 86.7, 63.0, 94.5, 95.1, 65.2, 67.4)}


def test_published_figures_are_those_of_the_two_readmes():
    columns = [("aime24", key) for key in ("pass@1", "cons@64", "open-r1")]
    columns += [(task, key) for task in ("math500", "gpqa") for key in ("pass@1", "open-r1")]
    assert evaluate.PUBLISHED["models"].keys() == FIGURES.keys()
    for model, expected in FIGURES.items():
        found = [evaluate.figures(f"org/{model.lower()}", task).get(key) for task, key in columns]
        assert found == [*expected]


BAD = [(["run", "--task", "demo", "--k", "0"], "--k is 0"),
       (["run", "--task", "demo", "--temperature", "-1"], "temperature is -1"),
       (["run", "--task", "demo", "--max-new-tokens", "9999"], "at most"),
       (["run", "--task", "demo", "--ckpt-path", "nowhere"], "nowhere: no such folder"),
       (["run", "--task", "aime24", "--data", "DATA"], "--ckpt-path or --api"),
       (["run", "--task", "aime24", "--api", "localhost:80", "--model", "m"], "http://"),
       (["run", "--task", "aime24", "--api", "http://localhost:1"], "--model"),
       (["run", "--task", "aime24", "--ckpt-path", "demo"], "HuggingFaceH4/aime_2024"),
       (["run", "--task", "demo", "--no-thinking"], "--no-thinking goes with --api"),
       (["run", "--task", "demo", "--compile", "--batch-size", "9"], "a --batch-size up to 8"),
       (["run", "--task", "CODE", "--ckpt-path", "demo"], "executes generated code"),
       (["export", "--task", "no such task"], "neither a file nor one of demo, aime24"),
       (["export", "--task", "DATA", "--prompt", "nice"], "nice"),
       (["export", "--task", "demo", "--data", "DATA"], "--data goes with"),
       (["export", "--task", "gpqa", "--data", "LATIN.csv"], "not a CSV file in UTF-8"),
       (["export", "--task", "BAD GOLD"], "row 2: 'answer' is '1000'"),
       (["export", "--task", "NO TEXT"], "row 1: 'problem' is None"),
       (["export", "--task", "OTHER"], "columns q, a are no known layout"),
       (["export", "--task", "BROKEN"], "line 2: not a JSON object"),
       (["export", "--task", "EMPTY"], "holds no row"),
       (["export", "--task", "gpqa", "--data", "DATA"], "'Question' is None"),
       (["grade", "--task", "demo", "--completions", "missing.jsonl"], "missing.jsonl"),
       (["grade", "--task", "DATA", "--completions", "FOLDER/completions.jsonl"],
        "run.json: not made by this"),
       (["grade", "--task", "DATA", "--completions", "HUGE/completions.jsonl"], "run.json: not made by this"),
       (["grade", "--task", "DATA", "--completions", "RIDDLE/completions.jsonl"],
        "run.json: not made by this"),
       (["run", "--task", "demo", "--k", str(2 ** 31)], "at most 2 ** 20"),
       (["report", "NOWHERE"], "results.json"),
       (["report", "FOLDER"], "not made by this program")]


@pytest.mark.parametrize("args, word", BAD, ids=[" ".join(args[-1:] + [word]) for args, word in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(args, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = {"DATA": AIME, "CODE": CODE, "BAD GOLD": [AIME[0], {**AIME[1], "answer": "1000"}],
             "NO TEXT": [{**AIME[0], "problem": None}], "OTHER": [{"q": "1", "a": "2"}], "EMPTY": []}
    for name, rows in files.items():
        write(tmp_path / name, rows)
    (tmp_path / "BROKEN").write_text(json.dumps(AIME[0]) + "\nnot json\n")
    (tmp_path / "LATIN.csv").write_bytes("Question\nWas heißt das?\n".encode("latin-1"))
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER/results.json").write_text("{}")
    (tmp_path / "FOLDER/run.json").write_text('{"k": "1", "temperature": 1}')
    made = {"task": "aime24", "prompt": "boxed", "k": 1, "questions": 3, "model": "m", "temperature": 0.6,
            "top_p": 0.95, "max_new_tokens": 9}
    for name, change in (("HUGE", {"k": 10 ** 12}), ("RIDDLE", {"prompt": "riddle"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(made | change))
    out = tmp_path / "out"
    try:
        code = run(*[tmp_path / arg if arg[:2].isupper() else arg for arg in args], "--out", out)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and word in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("place", ["load_model", "generate"])
def test_no_memory_is_one_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, place, lambda *_, **__: evaluate.torch.empty(2 ** 60))
    assert run("run", "--task", "demo", "--k", "2", "--limit", "1", "--out", tmp_path / "out") == 2
    assert "allocate memory" in capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_is_refused_before_hashing_and_what_is_advised_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.memory, "free", lambda device: 2 ** 26)
    monkeypatch.setattr(evaluate, "hash_files", lambda checkpoint: pytest.fail("it fits"))
    args = ["run", "--task", "demo", "--k", "64", "--device", "cpu", "--out", tmp_path / "out",
            "--batch-size"]
    assert run(*args, "2000") == 2
    error = capsys.readouterr().err
    rows = int(re.search(r"2000 x \d+ tokens need .* 0.06 GiB .* what fits: --batch-size (\d+)\n", error)[1])
    with pytest.raises(pytest.fail.Exception):
        run(*args, str(rows))
    assert run(*args, str(rows + 1)) == 2 and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()                                  # so is a run that another one would overwrite
    (tmp_path / "out/completions.jsonl.part").write_text("{}\n")
    assert run(*args, str(rows)) == 2 and "was interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["sk-secret\nX: y", "sk-sécret"])
def test_a_malformed_key_is_refused_unseen(key, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit):
        run("run", "--task", "demo", "--api", "http://localhost:1", "--model", "m", "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY" in error and "cret" not in error


def test_what_is_read_is_never_written_over(tmp_path, capsys):
    data, codes = write(tmp_path / "aime.jsonl", AIME), write(tmp_path / "lcb.jsonl", CODE)
    for args in (["export", "--task", data, "--out", data],
                 ["import", "--task", codes, "--completions", data, "--k", 1, "--out", data]):
        before = data.read_bytes()
        with pytest.raises(SystemExit):
            run(*args)
        assert "which is read, too" in capsys.readouterr().err and data.read_bytes() == before


def test_half_a_surrogate_pair_in_a_completion_is_graded_and_written(tmp_path):
    data = write(tmp_path / "aime.jsonl", AIME)
    lines = [json.dumps({"index": i, "text": "\ud83d</think>\\boxed{\ud83d}"}) for i in range(len(AIME))]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    completions = tmp_path / "c.jsonl"
    assert run("grade", "--task", data, "--completions", completions, "--k", 1, "--out", tmp_path) == 0
    assert result(tmp_path)["scores"]["pass@1"] == 0


def test_without_math_verify_nothing_is_sampled(tmp_path, monkeypatch, capsys, api):
    def missing(_):
        raise evaluate.grading.PackageNotFoundError
    monkeypatch.setattr(evaluate.grading, "version", missing)
    data = write(tmp_path / "math.jsonl", MATH)
    assert run("run", "--task", data, "--api", api, "--model", "m", "--out", tmp_path / "out") == 2
    assert "math-verify is not installed" in capsys.readouterr().err and not StandIn.requests
    monkeypatch.delattr(evaluate.grading.signal, "setitimer")                   # as on Windows
    assert run("run", "--task", data, "--api", api, "--model", "m", "--out", tmp_path / "out") == 2
    assert "graded on Linux and macOS" in capsys.readouterr().err and not StandIn.requests
