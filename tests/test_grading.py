"""Claim: grades follow the written rules, and scores and their errors are what they are called.

A file of hand-made completions must grade to fixed results; closed forms are compared with brute force, and
standard errors with simulated reruns.
"""
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import grading  # noqa: E402


@pytest.fixture(scope="module")
def verifier():
    verifier = grading.MathVerifier(seconds=5)
    yield verifier
    verifier.close()


def test_the_golden_file_grades_to_fixed_results(verifier):
    rows = [json.loads(line) for line in (ROOT / "tests/golden_grading.jsonl").read_text().splitlines()]
    wrong = []
    for row in rows:
        answer, how = grading.extract(row["kind"], row["text"])
        labels = grading.classes([answer], row["gold"],
                                 lambda gold, answer: grading.same(row["kind"], gold, answer, verifier))
        if (how, labels == [0]) != (row["how"], row["correct"]):
            wrong.append((row, answer, how, labels))
    assert not wrong and len(rows) >= 100
    assert {row["kind"] for row in rows} == {"integer", "math", "choice", "exact"}
    assert verifier.hung == {"9^{9^{9^{9}}}"}               # the tower of powers; what follows it is graded


TOWER = "10^{10^{10^{10}}}"


def test_a_hanging_answer_costs_its_worker_once_and_nothing_else():
    verifier = grading.MathVerifier(seconds=2)
    assert verifier.equal("4", "2^2") and not verifier.hung
    worker = verifier.process
    assert not verifier.equal("4", TOWER) and verifier.hung == {TOWER}
    assert worker.returncode == -signal.SIGPROF             # ended by its own limit, and collected
    assert verifier.equal("4", "\\sqrt{16}") and not verifier.equal("4", "\\sqrt{17}")
    worker = verifier.process
    assert not verifier.equal("5", TOWER) and not verifier.equal(TOWER, "x") and verifier.equal(TOWER, TOWER)
    assert verifier.process is worker and verifier.hung == {TOWER}              # it was not tried again
    verifier.process.kill()                                 # as the kernel does when memory runs out
    assert not verifier.equal("4", "8/2") and verifier.hung == {TOWER, "8/2"}
    assert verifier.equal("5", "10/2")
    verifier.close()


def test_a_worker_ends_though_its_parent_was_killed_while_it_hung():
    program = f"""if True:
        import grading, json, time
        verifier = grading.MathVerifier(seconds=2)
        assert verifier.equal("4", "2^2")
        verifier.process.stdin.write(json.dumps(["4", "{TOWER}"]) + chr(10))
        verifier.process.stdin.flush()
        print(verifier.process.pid, flush=True)
        time.sleep(600)"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT / "tools", text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.communicate(timeout=60)                      # the worker has its standard error, to the end
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise


@pytest.mark.parametrize("text, box", [
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed{1} \boxed{2", None),
    (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{\left\{x\right.}", r"\left\{x\right."), (r"\boxed {7}", "7"),
    (r"\boxed{a \\} b", r"a \\"), (r"\boxed{a\ \  }", "a"), (r"\boxed{a\\\ }", "a" + 3 * "\\"),
    (r"\boxed{1" + 10 ** 6 * " " + "2}", "1" + 10 ** 6 * " " + "2"),      # in no quadratic time
    (r"\boxed{{}}", "{}"), (r"\boxed{ }", None), ("boxed{1}", None),
    (r"\boxed{42}, in \boxed{}.", "42")], ids=lambda text: str(text)[:30])
def test_the_last_box_counts_if_its_braces_match(text, box):
    assert grading.last_box(text) == box


@pytest.mark.parametrize("text, letter", [
    ("A bad answer: A is wrong.\n\n**Answer:** $\\boxed{B}$", "B"),
    ("So the answer: A, C and D fail.\n\nFinal answer: \\boxed{\\text{B}}", "B")])
def test_a_boxed_letter_on_the_answers_line_is_the_answer(text, letter):
    assert grading.choice(text) == (letter, "fallback")


@pytest.mark.parametrize("answer, value", [
    ("m+n=45+28=73", 73), ("45+28=73", 73), ("33.0", None), ("72=73", None), ("73°", 73), ("(73)", 73),
    (r"\boldsymbol{73}", 73),
    (r"\left(073\right)", 73), ("a=5, b=7", None), ("7.5", None), ("(1,2)", None), ("x=3=4y", None),
    ("1000", None)])
def test_an_aime_answer_is_an_integer_however_it_is_written(answer, value):
    assert grading.integer(answer) == value


def test_without_an_open_think_the_whole_text_answers():
    assert grading.after_thinking("no tag") is None
    assert grading.after_thinking("no tag", thinks=False) == "no tag"
    assert grading.after_thinking("<think>never closed", thinks=False) is None
    assert grading.after_thinking("a</think>b", thinks=False) == "b"
    assert grading.after_thinking("a</think>b</think>c") == "c"


def test_a_language_that_the_question_lacks_is_mixed_in():
    assert grading.mixed("What is 2+2?", "两个 is two")
    assert grading.mixed("Was ist 2+2?", "это 4") and grading.mixed("q", "그래서")
    assert not grading.mixed("二加二", "二加二是四, so four")
    assert not grading.mixed("What?", "Let α ∈ ℝ; 𝒪(n²), π ≈ 3.14, café → 🙂")


def test_classes_join_equal_answers_and_the_gold_is_class_0(verifier):
    answers = ["0.5", "2", None, r"\frac{4}{2}", r"\frac12", "3"]
    labels = grading.classes(answers, "1/2", lambda a, b: grading.same("math", a, b, verifier))
    assert labels == [0, 1, None, 1, 0, 2]
    assert grading.classes(["074", "74", "7a"], "73", lambda a, b: a == b) == [1, 2, 3]
    answers = ["074", "74", "7a", "7a."]
    labels = grading.classes(answers, "73", lambda a, b: grading.same("integer", a, b, None))
    assert labels == [1, 1, 2, 2]


def test_classes_do_not_depend_on_the_samples_order(verifier):
    answers = ["x>-3", r"(-3,\infty)", "5", "7"]            # math-verify joins the first two one way only
    for order in itertools.permutations(answers):
        labels = grading.classes(order, "5", lambda a, b: grading.same("math", a, b, verifier))
        groups = dict(zip(order, labels))
        assert groups["5"] == 0 and groups["x>-3"] == groups[r"(-3,\infty)"] != groups["7"]
        assert 0 not in (groups["x>-3"], groups["7"])
    labels = grading.classes(["x>-3"], r"(-3,\infty)", lambda a, b: grading.same("math", a, b, verifier))
    assert labels == [1]                                    # against the gold, one way only


def test_pass_at_j_is_the_share_of_draws_with_a_right_one():
    for k, c in itertools.product(range(1, 7), range(7)):
        samples = [i < c for i in range(k)]
        for j in range(1, k + 1) if c <= k else ():
            draws = [any(draw) for draw in itertools.combinations(samples, j)]
            assert grading.pass_at(c, k, j) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_scores_are_means_over_questions_and_pass_at_j_is_never_pooled():
    labels = [[0, 0, 1, None], [0, 1, 1, 2], [1, 2, None, None]]
    scores = grading.scores(labels)
    assert scores["pass@1"] == pytest.approx(3 / 12) == scores["pass@j"]["1"]
    assert scores["pass@j"]["2"] == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert scores["pass@j"]["4"] == pytest.approx(2 / 3)
    assert scores["cons@4"] == pytest.approx((1 + 0 + 0) / 3)


def test_a_tie_is_the_chance_of_the_right_class_in_any_order():
    for labels, expected in (([0, 1], 1 / 2), ([0, 0, 1, 1, 2], 1 / 2), ([0, 1, 2], 1 / 3), ([1, 2], 0),
                             ([0, None, None], 1), ([None, None], 0), ([0, 1, 1], 0), ([1, 0, 0], 1)):
        for order in itertools.permutations(labels):
            assert grading.vote(order) == pytest.approx(expected)


def test_errors_are_those_of_simulated_reruns_and_of_other_questions():
    rng = np.random.default_rng(0)
    n, k = 40, 8
    true = rng.beta(0.7, 0.5, n)                            # chances of n questions
    reruns = rng.binomial(k, true, (4000, n)) / k
    others = rng.binomial(k, rng.beta(0.7, 0.5, (4000, n))) / k
    estimates = [grading.formula_errors(p, k) for p in reruns[:400]]
    assert np.mean([e.rerun ** 2 for e in estimates]) == pytest.approx(reruns.mean(1).var(), rel=0.05)
    questions = [grading.formula_errors(p, k).question ** 2 for p in others]
    assert np.mean(questions) == pytest.approx(others.mean(1).var(), rel=0.05)
    formula, bootstrap = grading.formula_errors(reruns[0], k), grading.bootstrap_errors(reruns[0], k)
    assert bootstrap.rerun == pytest.approx(formula.rerun, rel=0.03)
    assert bootstrap.question == pytest.approx(formula.question, rel=0.03)


def test_one_sample_tells_no_rerun_error_and_one_question_no_question_error():
    assert grading.scores([[0], [1], [0]])["rerun error"] is None
    assert grading.scores([[0], [1], [0]])["question error"] == pytest.approx(1 / 3)
    assert grading.scores([[0, 1]])["question error"] is None
    assert grading.scores([[0, 1]])["rerun error"] == pytest.approx(0.5)
    assert grading.scores([[0, 1]])["rerun error, bootstrap"] == pytest.approx(0.5, rel=0.03)
