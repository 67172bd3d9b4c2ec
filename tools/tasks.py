"""The benchmarks of R1's report: their questions, read from files as published, and how they are asked.

Its prompts for mathematics are not published, so ours have names. Nothing is fetched.
"""
import argparse
import csv
import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo_task  # noqa: E402
import grading  # noqa: E402
from chat import BOXED  # noqa: E402


@dataclass(frozen=True)
class Task:
    """A benchmark and the columns of its published layout."""
    kind: str                           # how it is graded: exact, integer, math, choice (grading.py); code
    prompt: str                         # default of PROMPTS
    source: str
    question: str = ""
    gold: str = ""
    id: str = ""                        # "": the row's number
    more: tuple[str, ...] = ()          # columns that tell this layout from the others
    k: int = 64


WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
TASKS = {
    "demo": Task("exact", "bare", "tools/demo_task.py"),
    "aime24": Task("integer", "boxed", "HuggingFaceH4/aime_2024", "problem", "answer", "id", ("url", "year")),
    "math500": Task("math", "boxed", "HuggingFaceH4/MATH-500", "problem", "answer", "unique_id",
                    ("solution",)),
    "gpqa": Task("choice", "simple-evals", "gpqa_diamond of Idavidrein/gpqa", "Question", "Correct Answer",
                 more=WRONG),
    "livecodebench": Task("code", "livecodebench", "livecodebench/code_generation_lite", "question_content",
                          id="question_id", more=("starter_code", "contest_date"), k=16)}
WINDOW = "2024-08-01", "2025-01-31"     # contest_date of LiveCodeBench's problems in R1's report
PROMPTS = {
    "bare": "{question}",
    "boxed": "{question}\n" + BOXED,    # R1's README
    "lighteval":
        "Solve the following math problem efficiently and clearly. The last line of your response should be "
        "of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' "
        "(without quotes) where ANSWER is just the final number or expression that solves the problem. Think "
        "step by step before answering.\n\n{question}",
    "simple-evals":
        "Answer the following multiple choice question. The last line of your response should be of the "
        "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by "
        "step before answering.\n\n{question}",
    "livecodebench":
        "You will be given a question (problem specification) and will generate a correct Python program "
        "that matches the specification and passes all tests.\n\n### Question:\n{question}\n\n### Answer: "
        "(use the provided format with backticks)\n\n"}
CODE = "{text}\n\n### Format: {how}\n```python\n{starter}\n```"
WITH_STARTER = ("You will use the following starter code to write the solution to the problem and enclose "
                "your code within delimiters.")
WITHOUT = ("Read the inputs from stdin solve the problem and write the answer to stdout (do not directly "
           "test on the sample inputs). Enclose your code within delimiters as follows. Ensure that when the "
           "python program runs, it reads the inputs, runs the algorithm and writes output to STDOUT.")


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    gold: str = ""
    options: tuple[str, ...] = ()       # of a multiple choice, as published: the right one first

    def order(self, sample: int) -> list[int]:
        """Which option stands at A, B, C, D in a sample's prompt: by a hash, so the same everywhere."""
        return sorted(range(len(self.options)), key=lambda option: sha256(f"{sample} {option} {self.text}"))

    def prompt(self, template: str, sample: int) -> str:
        options = "\n".join(f"{letter}) {self.options[i]}" for letter, i in zip("ABCD", self.order(sample)))
        return template.replace("{question}", self.text + ("\n\n" + options if options else ""))


@dataclass(frozen=True)
class Protocol:
    """What is asked, how, and how often. Completions carry generate()'s index of a prompt, and sample."""
    task: str
    questions: list[Question]
    prompt: str                         # key of PROMPTS
    k: int

    @property
    def kind(self) -> str:
        return TASKS[self.task].kind

    def prompts(self) -> list[str]:
        """One a question; of a multiple choice k, because each sample sees another order of the options."""
        samples = range(self.k if self.kind == "choice" else 1)
        return [q.prompt(PROMPTS[self.prompt], sample) for q in self.questions for sample in samples]

    def wanted(self) -> list[tuple[int, int]]:
        """(index of the prompt, sample number), k for each question in turn."""
        samples = range(1 if self.kind == "choice" else self.k)
        return [(i, sample) for i in range(len(self.prompts())) for sample in samples]

    def describe(self) -> dict:
        questions = json.dumps([[q.id, q.text, q.gold, *q.options] for q in self.questions])
        template = PROMPTS[self.prompt]
        return {"task": self.task, "questions": len(self.questions), "k": self.k, "prompt": self.prompt,
                "template": template, "template sha256": sha256(template), "data sha256": sha256(questions)}


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def read_protocol(args: argparse.Namespace) -> Protocol:
    """The task's questions, from a data file or the demo's generator. ValueError names file and row."""
    name, path = (args.task, args.data) if args.task in TASKS else ("", Path(args.task))
    if name == "demo":
        questions = demo_questions(args.limit or 100)
    elif path is None:
        raise ValueError(f"--task {name} needs --data FILE: {TASKS[name].source}, as published, in JSONL, "
                         "CSV or parquet; nothing is downloaded")
    elif not name and not path.is_file():
        raise ValueError(f"--task {path}: neither a file nor one of {', '.join(TASKS)}")
    else:
        rows = read_rows(path)
        name = name or recognise(path, rows[0])
        numbered = [(n, row) for n, row in enumerate(rows, 1) if name != "livecodebench"
                    or WINDOW[0] <= str(row.get("contest_date"))[:10] <= WINDOW[1]]
        questions = [read_question(name, row, n, f"{path}, row {n}") for n, row in numbered]
        if not questions:
            raise ValueError(f"{path}: no row has a contest_date from {WINDOW[0]} to {WINDOW[1]}")
    return Protocol(name, questions[:args.limit], args.prompt or TASKS[name].prompt,
                    args.k or TASKS[name].k)


def read_gradable(args: argparse.Namespace) -> Protocol:
    if (plan := read_protocol(args)).kind == "code":
        raise ValueError(f"{plan.task}: grading executes generated code, which this tool does not do; use "
                         "`export`, any engine, `import` and LiveCodeBench's own grader")
    grading.grader_version(plan.kind)       # what grading needs must be there before hours of sampling
    return plan


def demo_questions(n: int) -> list[Question]:
    """The first n different held-out problems of the demo's task, mixed as in its training."""
    rng, found = random.Random("evaluate"), {}
    while len(found) < n:
        problem = demo_task.make(rng, heldout=True)
        found.setdefault(problem.question, problem.answer)
    return [Question(str(i), text, answer) for i, (text, answer) in enumerate(found.items(), 1)]


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from None
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except ImportError:
            raise ValueError(f"{path}: parquet needs `pip install pyarrow`; or convert it to JSONL") from None
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a parquet file: {error}") from None
    else:
        rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path}: holds no row")
    return rows


def read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_bytes().rstrip(b"\r\n").splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:80]!r}") from None
    return rows


def recognise(path: Path, row: dict) -> str:
    layouts = {name: {t.question, t.gold, t.id, *t.more} - {""} for name, t in TASKS.items() if t.question}
    for name, columns in layouts.items():
        if columns <= row.keys():
            return name
    known = "; ".join(f"{name} has {', '.join(sorted(columns))}" for name, columns in layouts.items())
    raise ValueError(f"{path}: columns {', '.join(map(str, row))} are no known layout: {known}")


def read_question(name: str, row: dict, number: int, where: str) -> Question:
    def column(key: str, empty: bool = False) -> str:
        value = row.get(key)
        if not isinstance(value, (str, int)) or not (empty or str(value).strip()):
            raise ValueError(f"{where}: {key!r} is {value!r}; {name} needs a text there")
        return str(value).strip()

    task = TASKS[name]
    text, identifier = column(task.question), column(task.id) if task.id else str(number)
    if task.kind == "code":
        starter = column("starter_code", empty=True)
        return Question(identifier, CODE.format(text=text, how=WITH_STARTER if starter else WITHOUT,
                                                starter=starter or "# YOUR CODE HERE"))
    gold = column(task.gold)
    if task.kind == "choice":
        return Question(identifier, text, "0", (gold, *map(column, WRONG)))
    if task.kind == "integer" and grading.integer(gold) is None:
        raise ValueError(f"{where}: {task.gold!r} is {gold!r}; it must be an integer from 0 to 999")
    if task.kind == "math":             # the gold of lighteval: the box of the solution
        gold = grading.last_box(column("solution", empty=True)) or gold
    return Question(identifier, text, gold)
