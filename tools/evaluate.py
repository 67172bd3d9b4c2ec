"""R1's evaluation protocol: sample k answers to each question, grade them, report pass@1 with its errors.

    python tools/evaluate.py run --task demo --k 16 --out DIR               the demo on its own task, offline
    python tools/evaluate.py run --task aime24 --data FILE --ckpt-path DIR --model NAME --out DIR
    python tools/evaluate.py run --task aime24 --data FILE --api URL --model NAME --out DIR
    python tools/evaluate.py grade --task aime24 --data FILE --completions FILE.jsonl --model NAME --out DIR
    python tools/evaluate.py report DIR... --out REPORT                     beside the published figures
    python tools/evaluate.py export --task livecodebench --data FILE --out prompts.jsonl
    python tools/evaluate.py import --task livecodebench --data FILE --completions FILE.jsonl --out codes.json

Data files have the layout in which each set is published, as JSONL, CSV or parquet; nothing is fetched. No
generated code is executed: `import` writes what LiveCodeBench's own grader reads. Defaults are R1's:
temperature 0.6, top-p 0.95, 32,768 tokens and no system prompt are its report's, which has 4 to 64 samples;
64 are its README's (LiveCodeBench: 16, open-r1's). Questions and prompts are in tasks.py, how answers
are graded in grading.py. Times and dates stay out of all files: without --api, the same run with the same
seed gives the same bytes.
"""
import argparse
import hashlib
import http.client
import json
import os
import platform
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

FIRST = int(os.environ.get("RANK", 0)) == 0     # of torchrun's ranks: the one that reads, writes and speaks
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import decode  # noqa: E402
import grading  # noqa: E402
import memory  # noqa: E402
from batch import Results, run_batch, write_file  # noqa: E402
from chat import Chat, Tokenizer  # noqa: E402
from convert import COMPANIONS, Checkpoint, Parser, complain, load_model, read_json  # noqa: E402
from generate import Ranks, Sampling, end, generate, precision  # noqa: E402
from model import Runtime, Transformer  # noqa: E402
from tasks import (PROMPTS, TASKS, Protocol, Question, read_gradable, read_jsonl, read_protocol,  # noqa: E402
                   sha256)

# ------------------------------------------------------------------------------------------------------------
# 1. run: samples from a checkpoint, or from a server


def run(args: argparse.Namespace) -> None:
    if (out := args.out / "completions.jsonl").exists():
        if not args.resume or (args.out / "results.json").exists():
            raise ValueError(f"{out}: complete; `grade` grades it again, a new run needs another --out")
        compare(out, settings(args, plan := read_gradable(args)))       # the grading was interrupted
    elif args.api:
        plan = read_gradable(args)
        sample_from_api(args, plan, *begin(args, plan, {"engine": "api"}, {"thinking": not args.no_thinking}))
    else:
        plan = sample_from_checkpoint(args)
    if FIRST:
        grade_file(plan, out, args.out, args)


def sample_from_checkpoint(args: argparse.Namespace) -> Protocol | None:
    """Samples on all ranks; rank 0 returns what was asked."""
    ranks = Ranks.start(args.device)
    room = min(ranks.gather(memory.free(ranks.device)))
    plan, chat, results, call = ranks.together(lambda: prepare(args, ranks, room) if FIRST else (None,) * 4)
    rt, call = ranks.share(call)
    model = ranks.together(lambda: load_model(
        Checkpoint(args.ckpt_path), replace(rt, device=ranks.device, tp=ranks.tp)))
    decode.precompile(model)
    records = [{"prompt": text} for text in plan.prompts()] if FIRST else []
    run_batch(generate(model, **call), len(call["wanted"]), chat, records, results)
    return plan


def prepare(args: argparse.Namespace, ranks: Ranks,
            room: float) -> tuple[Protocol, Chat, Results, tuple[Runtime, dict]]:
    """Rank 0's part before weights are read, its Runtime, and the arguments of generate() on all ranks, which
    have `room` bytes each."""
    plan, checkpoint, chat = read_gradable(args), Checkpoint(args.ckpt_path), Chat(Tokenizer(args.ckpt_path))
    cfg, most = checkpoint.cfg, args.max_new_tokens
    checkpoint.plan(Transformer(cfg, Runtime(tp=ranks.tp)))
    prompts = [chat.encode([{"role": "user", "content": text}]) for text in plan.prompts()]
    longest = max(map(len, prompts))
    if longest + most > cfg.context_len:
        raise ValueError(f"--max-new-tokens is {most}; after the longest prompt ({longest} tokens) at most "
                         f"{cfg.context_len - longest} fit into this model's context of {cfg.context_len}")
    template = chat.render([{"role": "user", "content": "{question}"}])
    dtype, fp8 = precision(args, cfg, ranks.device)
    rows = min(args.batch_size, len(plan.wanted()))
    rt = decode.check(Runtime(ranks.device, dtype, fp8, ranks.tp, rows, longest + most, compile=args.compile))
    mapped = checkpoint.mapped_bytes(rt)
    if (need := memory.plan(cfg, rt)).total - mapped > room:
        rows, _ = memory.largest(rt, cfg, room + mapped)
        raise ValueError(f"{rt.rows} x {rt.max_seq_len} tokens need {need}, and {room / memory.GIB:.2f} GiB "
                         f"are free; what fits: "
                         f"{f'--batch-size {rows}' if rows else 'nothing, on so few ranks'}")
    # What `begin` would refuse, once all of R1 has been hashed
    Results(args.out / "completions.jsonl", settings(args, plan), args.resume)
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    results, wanted = begin(args, plan, {
        "engine": "generate.py", "checkpoint sha256": hash_files(checkpoint),
        "dtype": str(dtype)[6:], "fp8": fp8, "chat template": template,
        "chat template sha256": sha256(template), "device": device, "ranks": ranks.tp.size},
        {"thinking": chat.thinks(template), "batch size": args.batch_size, "compile": args.compile})
    for note in checkpoint.notes:
        print(note, file=sys.stderr)
    rt = replace(rt, rows=max(1, min(args.batch_size, len(wanted))))
    return plan, chat, results, (rt, dict(
        prompts=prompts, stop_ids=chat.tokenizer.stop_ids, max_new_tokens=most, wanted=wanted,
        sampling=Sampling(args.temperature, args.top_p, args.seed), n_tokens=chat.tokenizer.n_tokens))


def hash_files(checkpoint: Checkpoint) -> str:
    """SHA-256 over all bytes of weights, config and tokenizer: about a second a gigabyte."""
    extra = (checkpoint.folder / name for name in ("config.json", *COMPANIONS))
    digest = hashlib.sha256()
    files = [*checkpoint.files, *filter(Path.is_file, extra)]
    for path in tqdm(files, desc="hash", unit="file", leave=False):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def settings(args: argparse.Namespace, plan: Protocol) -> dict:
    return {**plan.describe(), "model": args.model, "temperature": args.temperature, "top_p": args.top_p,
            "max_new_tokens": args.max_new_tokens, "seed": args.seed}


def begin(args: argparse.Namespace, plan: Protocol, engine: dict,
          more: dict) -> tuple[Results, list[tuple[int, int]]]:
    """The run's folder and run.json, which says what is made there; results so far, pairs still to sample.

    --resume compares settings and engine, but not `more`, nor software: that of every start is recorded.
    """
    tools = (Path(__file__).with_name(f"{name}.py") for name in ("evaluate", "tasks", "grading", "demo_task"))
    files = *sorted(ROOT.glob("*.py")), *tools
    software = {"code sha256": sha256(b"".join(path.read_bytes() for path in files)),
                "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    args.out.mkdir(parents=True, exist_ok=True)
    made, out = settings(args, plan) | engine, args.out / "completions.jsonl"
    results = Results(out, made, args.resume)
    starts = read_run(out).get("software", []) if args.resume else []
    starts += [software] * (software not in starts)
    write_json(out.with_name("run.json"), {**made, **more, "software": starts})
    return results, [pair for pair in plan.wanted() if pair not in results.records]


def write_json(path: Path, value) -> None:
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


TRIES, WAIT = 6, 1.0                    # of a request; seconds before the second, doubled for each later one


def sample_from_api(args: argparse.Namespace, plan: Protocol, results: Results, wanted: list) -> None:
    """Completes `wanted` over args.concurrency connections. An error that tries do not mend ends the run."""
    prompts = plan.prompts()

    def work(pair: tuple[int, int]) -> dict:
        index, sample = pair
        seed = int(sha256(f"{args.seed} {index} {sample}")[:7], 16)     # one for all would make all equal
        answer = complete(args, prompts[index], seed)
        return {"index": index, "sample": sample, "prompt": prompts[index], **answer}

    results.open()
    with ThreadPool(min(args.concurrency, len(wanted) or 1)) as pool:       # none outlives an interruption
        answers = pool.imap_unordered(work, wanted)
        for record in tqdm(answers, desc="sample", total=len(wanted), unit="sample"):
            results.add(record)
    results.finish()


def complete(args: argparse.Namespace, prompt: str, seed: int) -> dict:
    """Text and finish_reason from an OpenAI-compatible server. ValueError after the last try."""
    url = args.api.rstrip("/") + "/chat/completions"
    body = {"model": args.model, "messages": [{"role": "user", "content": prompt}], "seed": seed,
            "temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_new_tokens}
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key:                                 # which no other server gets, to which this one may redirect
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for tries in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=args.timeout) as reply:
                return read_reply(reply.read())
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace').strip()!r}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = str(error) or type(error).__name__
        time.sleep(WAIT * 2 ** (tries - 1) if tries < TRIES else 0)
    raise ValueError(f"{url}: {problem} (try {tries}); --resume goes on from what is done")


def read_reply(reply: bytes) -> dict:
    """A server that splits reasoning off gets it back in front, so that one rule grades all engines."""
    try:
        choice = json.loads(reply)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content") or ""
        if reasoning := message.get("reasoning_content") or message.get("reasoning"):   # vLLM: old, new
            text = f"{reasoning}\n{grading.END_THINK}\n\n{text}" if text or reason == "stop" else reasoning
        text = text.encode(errors="replace").decode()       # half of a surrogate pair could not be written
        return {"text": text, "finish_reason": reason}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"not a chat completion: {reply[:200]!r}") from None


# ------------------------------------------------------------------------------------------------------------
# 2. grade, export, import


def read_run(completions: Path) -> dict:
    """run.json beside completions that `run` made; beside those of another engine there is none: {}."""
    path = completions.with_name("run.json")
    made = read_json(path) if path.exists() else {}
    kinds = {"task": str, "prompt": str, "k": int, "questions": int, "model": str,
             "temperature": float | int, "top_p": float | int, "max_new_tokens": int}
    if made and not (all(isinstance(made.get(key), kind) for key, kind in kinds.items())
                     and made["prompt"] in PROMPTS and max(made["k"], made["questions"]) <= 2 ** 20):
        raise ValueError(f"{path}: not made by this program; move it, or the completions, away")
    return made


def grade(args: argparse.Namespace) -> None:
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: a file; it must be a folder")
    made = read_run(args.completions)
    args.k, args.prompt = args.k or made.get("k"), args.prompt or made.get("prompt")
    args.limit = args.limit or made.get("questions")
    plan = read_gradable(args)
    compare(args.completions, plan.describe())
    grade_file(plan, args.completions, args.out or args.completions.parent, args)


def compare(completions: Path, asked: dict) -> None:
    for key, made in read_run(completions).items():
        if made != (value := asked.get(key, made)):
            raise ValueError(f"{completions}: made with {key} {made!r}, not {value!r}")


def read_completions(path: Path, plan: Protocol) -> list[dict]:
    """Completions in the order of plan.wanted(). ValueError: one missing, there twice, of another prompt."""
    prompts, wanted, rows, seen = plan.prompts(), plan.wanted(), {}, Counter()
    legal = set(wanted)
    for number, row in enumerate(read_jsonl(path), 1):
        where, index = f"{path}, line {number}", row.get("index")
        pair = index, row.get("sample", seen[str(index)])
        seen[str(index)] += 1
        if [*map(type, (*pair, row.get("text")))] != [int, int, str]:
            raise ValueError(f"{where}: needs 'index', the prompt's line in `export`, from 0, and 'text', "
                             "all that was generated; 'sample', from 0, is counted if it is left out")
        if pair in rows or pair not in legal:
            problem = "there twice" if pair in rows else f"not among {len(plan.questions)} x {plan.k}"
            raise ValueError(f"{where}: index {index}, sample {pair[1]!r} is {problem} (--limit, --k)")
        if row.get("prompt", prompts[index]) != prompts[index]:
            raise ValueError(f"{where}: 'prompt' is not what --task, --data and --prompt {plan.prompt} make")
        rows[pair] = {**row, "text": row["text"].encode(errors="replace").decode()}     # as in read_reply
    if missing := [pair for pair in wanted if pair not in rows]:
        raise ValueError(f"{path}: {len(rows)} of {len(wanted)} samples; the first that lacks is index "
                         f"{missing[0][0]}, sample {missing[0][1]}; --k {plan.k} with fewer is refused")
    return [rows[pair] for pair in wanted]


def grade_file(plan: Protocol, completions: Path, out: Path, args: argparse.Namespace) -> None:
    """Writes grades.jsonl, a line a sample, and results.json; a summary goes to standard error."""
    made, rows, k = read_run(completions), read_completions(completions, plan), plan.k
    model = args.model or made.get("model", completions.resolve().parent.name)
    thinks = made.get("thinking", True) and not args.no_thinking
    version, verifier = grading.grader_version(plan.kind), grading.MathVerifier()
    grades, labels, questions = [], [], []
    for i, question in enumerate(tqdm(plan.questions, desc="grade", unit="question")):
        of = [grade_sample(plan.kind, question, sample, row["text"], thinks)
              for sample, row in enumerate(rows[i * k:(i + 1) * k])]
        labels.append(grading.classes([g["answer"] for g in of], question.gold,
                                      lambda gold, answer: grading.same(plan.kind, gold, answer, verifier)))
        grades += [{**g, "class": label, "correct": label == 0} for g, label in zip(of, labels[-1])]
        questions.append({"id": question.id, "gold": question.gold, "right": labels[-1].count(0),
                          "answered": k - labels[-1].count(None), "vote": grading.vote(labels[-1])})
    verifier.close()
    how = Counter(grade["how"] for grade in grades)
    reasons = Counter(str(row.get("finish_reason")) for row in rows)
    results = {"model": model, "protocol": plan.describe(), "run": made or None, "thinking": thinks,
               "completions sha256": sha256(completions.read_bytes()), "grader": version,
               "scores": grading.scores(labels),
               **{name: how[name] / len(grades) for name in ("truncated", "unanswered", "fallback")},
               "mixed": sum(grade["mixed"] for grade in grades) / len(grades),
               "grader time-outs": len(verifier.hung), "finish reasons": dict(sorted(reasons.items())),
               "questions": questions}
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "grades.jsonl", "".join(json.dumps(g, ensure_ascii=False) + "\n" for g in grades))
    write_json(out / "results.json", results)
    print(table([row_of(results)]), file=sys.stderr)
    ended = sum(grade["how"] == "truncated" and row.get("finish_reason") == "stop"
                for grade, row in zip(grades, rows))
    if ended and made.get("engine") != "generate.py":
        print(f"{ended} samples ended by themselves without </think>: does the engine drop the reasoning? "
              "--no-thinking grades them as they are", file=sys.stderr)
    if any(plan.task in tasks for tasks in PUBLISHED["models"].values()) and not figures(model, plan.task):
        print(f"no published figures for {model!r}; --model takes {', '.join(PUBLISHED['models'])}",
              file=sys.stderr)


def grade_sample(kind: str, question: Question, sample: int, text: str, thinks: bool) -> dict:
    """What one sample says by itself. A letter becomes the number of the option that stood there."""
    answer, how = grading.extract(kind, text, thinks)
    chosen = {}
    if kind == "choice":
        chosen = {"letter": answer, "order": question.order(sample)}
        answer = answer and str(chosen["order"]["ABCD".index(answer)])
    mixed = grading.mixed(question.text + "".join(question.options), text)
    return {"id": question.id, "sample": sample, **chosen, "answer": answer, "how": how, "mixed": mixed}


def export(args: argparse.Namespace) -> None:
    """Prompts as JSON lines that generate.py, or any engine, completes."""
    plan = read_protocol(args)
    prompts = plan.prompts()
    write_file(args.out, "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in prompts))
    times = len(plan.wanted()) // len(prompts)
    print(f"{args.out}: {len(prompts)} prompts, each to be completed {times} times", file=sys.stderr)


def import_codes(args: argparse.Namespace) -> None:
    """Writes what lcb_runner.runner.custom_evaluator reads: k programs a problem, in question_id's order.

    A program is the last fenced block after the last </think>. Nothing is executed.
    """
    plan = read_protocol(args)
    if plan.kind != "code":
        raise ValueError(f"`import` is for livecodebench; completions of {plan.task} go to `grade`")
    answers = [grading.after_thinking(row["text"]) for row in read_completions(args.completions, plan)]
    fenced = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    codes = [["", *fenced.findall(answer or "")][-1] for answer in answers]
    by_id = sorted((q.id, codes[i * plan.k:(i + 1) * plan.k]) for i, q in enumerate(plan.questions))
    write_json(args.out, [programs for _, programs in by_id])
    print(f"{args.out}: {len(by_id)} problems x {plan.k} samples; of these truncated {answers.count(None)}, "
          f"without code {codes.count('') - answers.count(None)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# 3. report


PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
NOTES = """
In per cent. Sampling: temperature/top-p/most new tokens. Rerun error: standard error of sampling the same
questions again. Question error: of other questions from the same source; it does not fall with k. A vote
counts classes of equal answers; samples without an answer do not vote; a tie counts as the chance of the
right class.

Published: {source}. open-r1: {rerun}.
"""


def figures(model: str, task: str) -> dict:
    """What is published of a model, whose name counts without its organisation and in any case."""
    known = {name.lower(): tasks for name, tasks in PUBLISHED["models"].items()}
    return known.get(model.rpartition("/")[2].lower(), {}).get(task, {})


def row_of(results: dict) -> dict:
    """What the report says of one results.json, in per cent; None where there is no such figure."""
    asked, scores, made = results["protocol"], results["scores"], results["run"]
    published = figures(results["model"], asked["task"])
    sampling = "{temperature}/{top_p}/{max_new_tokens}".format(**made) if made else "unknown"

    def percent(source: dict, *keys: str) -> dict:
        return {key: None if source[key] is None else 100 * source[key] for key in keys}

    return {"model": results["model"], **{key: asked[key] for key in ("task", "prompt", "questions", "k")},
            "sampling": sampling,
            **percent(scores, "pass@1", "rerun error", "question error"),
            "published": published.get("pass@1"), "open-r1": published.get("open-r1"),
            "cons@k": 100 * scores[f"cons@{asked['k']}"],
            "published cons@64": published.get("cons@64") if asked["k"] == 64 else None,
            **percent(results, "truncated", "unanswered", "mixed")}


def table(rows: list[dict]) -> str:
    def cell(key: str, value) -> str:
        digits = 2 if "error" in key else 1
        return "-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(*item) for item in row.items()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(args: argparse.Namespace) -> None:
    rows = []
    for folder in args.dirs:
        try:
            rows.append(row_of(read_json(folder / "results.json")))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / 'results.json'}: not made by this program") from None
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(rows) + "\n" + NOTES.format(**PUBLISHED)
    plot(rows, args.out / "report.png")
    write_json(args.out / "report.json", rows)
    write_file(args.out / "report.md", text)
    print(text, end="")


def plot(rows: list[dict], path: Path) -> None:
    """pass@1 with its errors, rerun thick and question thin, beside what is published."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def column(key: str) -> list[float]:
        return [np.nan if row[key] is None else row[key] for row in rows]

    figure, axes = pyplot.subplots(figsize=(8, 1.8 + 0.5 * len(rows)), layout="constrained")
    y = range(len(rows))
    for key, width in (("question error", 1), ("rerun error", 4)):
        axes.errorbar(column("pass@1"), y, xerr=column(key), fmt="o", color="C0", linewidth=width, capsize=4,
                      label=f"± 1 standard error, {key.split()[0]}")
    axes.plot(column("published"), y, "D", color="C1", label="published")
    axes.plot(column("open-r1"), y, "x", color="C2", label="open-r1")
    axes.set_yticks(y, [f"{row['model']}\n{row['task']}, {row['questions']} x {row['k']}" for row in rows],
                    parse_math=False)                       # a $ in a name is no formula
    axes.set(xlabel="pass@1, per cent", ylim=(len(rows) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=2)
    draft = path.with_name(path.name + ".part")
    figure.savefig(draft, format="png", dpi=120)
    os.replace(draft, path)


# ------------------------------------------------------------------------------------------------------------
# 4. Command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="R1's evaluation protocol: sample, grade, report.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, work, out: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--task", required=True, metavar="NAME_OR_FILE",
                         help=f"{', '.join(TASKS)}, or a data file in the layout of one of them")
        sub.add_argument("--data", type=Path, metavar="FILE", help="JSONL, CSV or parquet, as published")
        sub.add_argument("--prompt", choices=PROMPTS, help="default: " + ", ".join(
            f"{task.prompt} ({name})" for name, task in TASKS.items()))
        sub.add_argument("--k", type=int, help="samples a question (as run, or 64; livecodebench: 16)")
        sub.add_argument("--limit", type=int, metavar="N", help="the first N questions (all; demo: 100)")
        sub.add_argument("--out", type=Path, required=not out,
                         help=out or "where the results go: a folder; of export and import: a file")
        sub.set_defaults(work=work)
        return sub

    run_flags(run_command := command("run", "Sample and grade.", run))
    sub = command("grade", "Grade completions of any engine.", grade, "default: beside the completions")
    for graded in (run_command, sub):
        graded.add_argument("--model", metavar="NAME", help="the model's name in published figures, and for "
                            "--api (the folder's name)")
        graded.add_argument("--no-thinking", action="store_true", help="grade all of a text without </think>")
    text = "LiveCodeBench's completions to programs; none is executed."
    for sub in (sub, command("import", text, import_codes)):
        sub.add_argument("--completions", type=Path, required=True, metavar="FILE",
                         help="JSON lines with index, text, and sample (default: counted)")
    command("export", "Write the prompts of a task.", export)
    sub = commands.add_parser("report", help="A table beside published figures, and a plot.")
    sub.add_argument("dirs", type=Path, nargs="+", metavar="DIR", help="with results.json")
    sub.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="(%(default)s)")
    sub.set_defaults(work=report)
    args = parser.parse_args(argv)
    check(args, parser)
    return args


def run_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    sub.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    sub.add_argument("--temperature", type=float, default=0.6, help="(%(default)s)")
    sub.add_argument("--top-p", type=float, default=0.95, help="(%(default)s)")
    sub.add_argument("--max-new-tokens", type=int, help="(32768; demo: 1000)")
    sub.add_argument("--ckpt-path", type=Path, metavar="DIR", help="the model (for the task demo: the demo)")
    sub.add_argument("--batch-size", type=int, default=8, help="samples that run together (%(default)s)")
    for flag, *values in (("--dtype", "bfloat16", "float32"), ("--device", "cpu", "cuda")):
        sub.add_argument(flag, choices=["auto", *values], default="auto", help="as in generate.py (auto)")
    sub.add_argument("--fp8", choices=["auto", "gemm", "dequant", "bf16"], default="auto",
                     help="as in generate.py, but auto is gemm or dequant, however much memory is free")
    sub.add_argument("--compile", action="store_true", help="as in generate.py")
    sub.add_argument("--api", metavar="URL", help="sample from a server, e.g. http://localhost:8000/v1; the "
                     "environment's OPENAI_API_KEY goes with requests")
    sub.add_argument("--concurrency", type=int, default=64, help="requests at a time (%(default)s)")
    sub.add_argument("--timeout", type=float, default=3600, help="seconds for a request (%(default)s)")


def check(args: argparse.Namespace, parser: Parser) -> None:
    parser.at_least(args, 1, "k", "limit", "max_new_tokens", "batch_size", "concurrency", "timeout")
    read = [Path(getattr(args, name, None) or "") for name in ("completions", "data", "task")]
    if args.out and args.out.is_file() and any(map(args.out.samefile, filter(Path.is_file, read))):
        parser.error(f"--out is {args.out}, which is read, too; it would be lost")
    if getattr(args, "data", None) and args.task not in set(TASKS) - {"demo"}:
        parser.error(f"--data goes with --task {', '.join([*TASKS][1:])}; --task is {args.task}")
    if args.command == "run":
        if args.api and not re.match(r"https?://", args.api):
            parser.error(f"--api is {args.api!r}; it must begin with http:// or https://")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if args.api and not (key.isascii() and key.isprintable()):      # else a later error would show it
            parser.error("the environment's OPENAI_API_KEY has characters that no HTTP header takes")
        if args.api and (not args.model or args.ckpt_path):
            parser.error("--api goes with --model, the server's name of it, and without --ckpt-path")
        if not args.api and not args.ckpt_path and args.task != "demo":
            parser.error("--ckpt-path or --api says which model; only the task demo has a default")
        if args.no_thinking and not args.api:
            parser.error("--no-thinking goes with --api; a checkpoint's template says whether it thinks")
        args.ckpt_path = args.ckpt_path or ROOT / "demo"
        args.max_new_tokens = args.max_new_tokens or (1000 if args.task == "demo" else 32_768)  # R1's limit
        args.model = args.model or args.ckpt_path.resolve().name
        try:
            Sampling(args.temperature, args.top_p, args.seed)
        except ValueError as error:
            parser.error(f"--{error}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        args.work(args)
        return 0
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not memory.ran_out(error):
            raise
        if FIRST or memory.ran_out(error):      # of all else all ranks know, and one says it
            complain("evaluate.py", error)
        return 2
    except KeyboardInterrupt:
        if FIRST:
            hint = "; --resume goes on from what is done" * (args.command == "run")
            print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    end(main)
