"""What a completion answers, whether that is right, and what many grades say: rules, and standard errors.

An answer is read after the last </think>: the last box, or for multiple choice the line "Answer: C". AIME's
are compared as integers; mathematics by math-verify, which can hang on what a model writes (a tower of
powers) and whose own time-outs fail in threads. So it runs in a process of its own, this file as a script:
pairs of answers in, verdicts out, a JSON line each; a pair that takes too long ends it, also inside of C.
"""
import contextlib
import hashlib
import json
import logging
import math
import platform
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

END_THINK, THINK = "</think>", "<think>"

# ------------------------------------------------------------------------------------------------------------
# 1. Extraction


def after_thinking(text: str, thinks: bool = True) -> str | None:
    """What follows the last </think>; None: reasoning never ended. `thinks`: the prompt opened it."""
    _, closed, answer = text.rpartition(END_THINK)
    return None if not closed and (thinks or text.lstrip().startswith(THINK)) else answer


def last_box(text: str) -> str | None:
    r"""Inside of the last \boxed{...}, whose braces must match; None if there is none or it never ends.

    An earlier box does not stand in for a last one that was cut off: it may be an intermediate result. Empty
    boxes are mentions of the command, not answers.
    """
    *_, start = [-1, *(match.end() for match in re.finditer(r"\\boxed\s*\{(?!\s*\})", text))]
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:] if start >= 0 else "", re.DOTALL):    # \{ is a letter
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            inside = text[start:start + match.start()]
            blanks = re.match(r"(?:\s\\?(?!\\))*", inside[::-1])       # "\ " is one, too; forwards it would
            return inside[:len(inside) - blanks.end()].strip() or None      # take quadratic time
    return None


# A letter ends where no word goes on; a small one, lest it be the word "a", only where the line ends.
ANSWER = re.compile(r"(?im)Answer([ \t*]*:(?:[ \t*$({\\]|\\(?:text|math|boxed)\w*)*)"
                    r"((?-i:[A-D])(?!\w)|[a-d](?=[\W_]*$))")
LETTER = re.compile(r"(?i)\(?([A-D])(?:[).:]|$)")


def choice(text: str) -> tuple[str | None, str]:
    """(letter, rule that found it): the last simple-evals "line", Answer: C; or a "fallback".

    That is such a line in Markdown or LaTeX, like **Answer:** C, or \\boxed{C}.
    """
    if lines := ANSWER.findall(text):
        return lines[-1][1].upper(), "line" if re.fullmatch(r"[ \t]*:[ \t]*\$?", lines[-1][0]) else "fallback"
    match = LETTER.match(plain(last_box(text) or ""))
    return (match[1].upper(), "fallback") if match else (None, "unanswered")


def extract(kind: str, text: str, thinks: bool = True) -> tuple[str | None, str]:
    """(answer, how): how is "truncated", "unanswered", or the rule that found the answer."""
    text = after_thinking(text, thinks)
    if text is None:
        return None, "truncated"
    if kind == "choice":
        return choice(text)
    answer = last_box(text)
    return answer, "unanswered" if answer is None else "box"


SCRIPTS = ("[\u0400-\u04ff]", "[\u0590-\u05ff]", "[\u0600-\u06ff]", "[\u0900-\u097f]", "[\u0e00-\u0e7f]",
           "[\u3040-\u30ff\u3400-\u9fff]", "[\uac00-\ud7af]")


def mixed(prompt: str, text: str) -> bool:
    """Whether a completion has a letter of a script that the prompt lacks.

    Of Cyrillic, Hebrew, Arabic, Devanagari, Thai, Chinese with Japanese, Korean; not Latin or Greek, whose
    letters formulas have in any language.
    """
    return any(re.search(script, text) and not re.search(script, prompt) for script in SCRIPTS)


# ------------------------------------------------------------------------------------------------------------
# 2. Verdicts


def plain(answer: str) -> str:
    """An answer without what never matters: math signs, \\text, LaTeX's spaces, bold, a full stop."""
    answer = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;!: ]|\\?\$|\*\*", "", answer)
    answer = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|boldsymbol|bm|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer).replace("{,}", ",")
    return " ".join(answer.split()).removesuffix(".")


UNIT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{[^{}\d]+\}(?:\^\{?\d\}?)?(?=[\s$.]*$)")
INTEGER = re.compile(r"(?:[^=a-zA-Z]*[a-zA-Z][^=]*=)?(?:[^=a-zA-Z,]*[-+*/][^=a-zA-Z,]*=)*\s*[{(]?\s*\+?0*"
                     r"(\d{1,3})(?:\^\{?\\circ\}?|°)?\s*[})]?")


def integer(answer: str) -> int | None:
    """An AIME answer, 0 to 999; leading zeros, "m + n = 45 + 28 =" and a unit are allowed. Else None."""
    if len(answer) > 10_000:                        # the patterns take quadratic time for junk
        return None
    match = INTEGER.fullmatch(plain(UNIT.sub("", answer)))
    return int(match[1]) if match else None


class MathVerifier:
    """math-verify in a worker process, which is replaced when a pair takes it more CPU time than `seconds`.

    An answer that got no verdict, for lack of time or by a crash, is in `hung`: wrong, equal only to itself,
    and not tried again.
    """

    def __init__(self, seconds: float = 10.0):
        self.seconds, self.hung, self.process, self.verdicts = seconds, set(), None, {}

    def equal(self, gold: str, answer: str) -> bool:
        """math-verify's verdict, gold first: it is not symmetric."""
        if self.hung & {gold, answer}:
            return gold == answer
        if (gold, answer) not in self.verdicts:
            self.verdicts[gold, answer] = self._ask(gold, answer)
        return self.verdicts[gold, answer]

    def _ask(self, gold: str, answer: str) -> bool:
        if self.process is None:
            # in a session of its own, Ctrl-C does not reach it; it ends with its input, or by its limit
            self.process = subprocess.Popen([sys.executable, __file__, str(self.seconds)], text=True,
                                            encoding="utf-8", start_new_session=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if not self.process.stdout.readline():              # imports take a second; they are not limited
                raise ValueError("math-verify does not start: pip install -r requirements-dev.txt")
        try:
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
            verdict = self.process.stdout.readline()
        except BrokenPipeError:
            verdict = ""
        if verdict:
            return json.loads(verdict)
        self.hung.add(answer)
        self.close()
        return False

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve(seconds: float) -> None:
    """The worker: reads [gold, answer] from standard input, writes true or false, until the input ends."""
    from math_verify import LatexExtractionConfig, parse, verify
    logging.disable(logging.CRITICAL)               # it warns that time-outs are off; the limit is ours
    with contextlib.suppress(ValueError):           # a tower of powers eats memory, too; macOS may refuse
        import resource                             # which Windows lacks
        resource.setrlimit(resource.RLIMIT_AS, (2 ** 32, 2 ** 32))

    def parsed(answer: str) -> list:
        config = [LatexExtractionConfig()]
        return parse(rf"\boxed{{{answer}}}", extraction_config=config, parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)       # CPU time; its signal ends the process
        gold, answer = json.loads(line)
        try:
            verdict = bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))
        except Exception:                           # its parser's errors are of every kind
            verdict = False
        print(json.dumps(verdict), flush=True)


def same(kind: str, gold: str, answer: str, verifier: MathVerifier) -> bool:
    """Whether two answers are one, by the rule of a kind of task."""
    if kind == "integer" and integer(gold) is not None:
        return integer(gold) == integer(answer)
    return plain(gold) == plain(answer) or kind == "math" and verifier.equal(gold, answer)


def classes(answers: Sequence[str | None], gold: str, equal: Callable[[str, str], bool]) -> list[int | None]:
    """The equivalence class of each answer: 0 is the gold's, None means no answer.

    `equal` wants the gold first; of two samples neither is one, so they are compared both ways.
    """
    members, known = [gold], {None: None}
    for answer in answers:
        if answer not in known:
            known[answer] = next((i for i, member in enumerate(members) if equal(member, answer)
                                  or i > 0 and equal(answer, member)), len(members))
            members += [answer] * (known[answer] == len(members))
    return [known[answer] for answer in answers]


def grader_version(kind: str) -> dict[str, str]:
    """What grades and adds up: this file, versions. ValueError without what mathematics needs."""
    if kind == "math" and not hasattr(signal, "setitimer"):
        raise ValueError("mathematics is graded on Linux and macOS: here nothing limits math-verify's time")
    found = {"grading.py sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
             "python": platform.python_version(), "numpy": np.__version__}
    for package in ("math-verify", "latex2sympy2_extended", "sympy") if kind == "math" else ():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            raise ValueError(f"{package} is not installed, and grading needs it: pip install -r "
                             "requirements-dev.txt -c constraints.txt") from None
    return found


# ------------------------------------------------------------------------------------------------------------
# 3. Statistics: labels [n questions][k samples] are classes as above, 0 right


def pass_at(c: int, k: int, j: int) -> float:
    """Chance that of j samples, drawn from k of which c are right, at least one is (arXiv 2107.03374)."""
    return 1 - math.comb(k - c, j) / math.comb(k, j)


def vote(labels: Sequence[int | None]) -> float:
    """Majority vote of a question's samples: 1, 0, or the chance of the right class among those that tie."""
    ballots = Counter(label for label in labels if label is not None)
    top = [label for label, n in ballots.items() if n == max(ballots.values())]
    return (0 in top) / len(top) if top else 0.0


@dataclass(frozen=True)
class Errors:
    """Standard errors of a mean over questions; None where one sample, or one question, cannot tell."""
    rerun: float | None             # of sampling the same questions again; falls with k
    question: float | None          # of other questions from the same source; does not


def formula_errors(p: np.ndarray, k: int) -> Errors:
    """sqrt(sum p (1 - p) / (k - 1)) / n, and SD(p) / sqrt(n), from questions' shares p [n] of right samples.

    k - 1, because p (1 - p) of a sample underestimates the variance by (k - 1) / k.
    """
    n = len(p)
    return Errors(float(np.sqrt((p * (1 - p)).sum() / (k - 1)) / n) if k > 1 else None,
                  float(p.std(ddof=1) / np.sqrt(n)) if n > 1 else None)


def bootstrap_errors(p: np.ndarray, k: int, draws: int = 10_000, seed: int = 0) -> Errors:
    """The same by drawing again, on two levels: the samples of each question, and the questions.

    A resample's variance is short by (k - 1) / k, or (n - 1) / n, which is made up for.
    """
    rng, n = np.random.default_rng(seed), len(p)
    samples = rng.binomial(k, p, (draws, n)).mean(1) / k
    questions = rng.choice(p, (draws, n)).mean(1)
    return Errors(float(samples.std() * np.sqrt(k / (k - 1))) if k > 1 else None,
                  float(questions.std() * np.sqrt(n / (n - 1))) if n > 1 else None)


def scores(labels: Sequence[Sequence[int | None]]) -> dict:
    """pass@1 with its errors, pass@j for powers of two, and cons@k, all from 0 to 1."""
    k = len(labels[0])
    right = [sum(label == 0 for label in row) for row in labels]
    p = np.array(right) / k
    formula, bootstrap = formula_errors(p, k), bootstrap_errors(p, k)
    votes = np.array([vote(row) for row in labels])
    return {"pass@1": float(p.mean()), "rerun error": formula.rerun, "question error": formula.question,
            "rerun error, bootstrap": bootstrap.rerun, "question error, bootstrap": bootstrap.question,
            "pass@j": {str(j): float(np.mean([pass_at(c, k, j) for c in right]))
                       for j in (2 ** i for i in range(k.bit_length()))},
            f"cons@{k}": float(votes.mean()), f"cons@{k} question error": formula_errors(votes, 2).question}


if __name__ == "__main__":
    serve(float(sys.argv[1]))
