"""The demo's task: arithmetic questions in plain sentences, each with the reasoning that solves it.

    python tools/demo_task.py [--split heldout] [--seed S] [-n N]       print N problems, to see what they are

Whole numbers of up to four digits are added, subtracted, multiplied (up to three digits times two) and
compared, alone, as expressions with two operations, and in small stories. `Scratch` does on paper what a
pupil does: line the numbers up, go through the columns from the right, carry; after each column stands what
is known of the result. Everything else, from "Hello" to a division, gets a polite answer that says what the
demo can do.

The split. A calculation is held out if a hash of it says so, whatever sentence it hides in:
`held_out("397+4821")`. Training only sees problems with none of these, down to the partial sums and
products in their reasoning; a held-out problem has at least one. Facts of two single digits are never held
out: columns are made of them. A question that is no calculation is held out by its own hash.
"""
import argparse
import hashlib
import random
import re
from dataclasses import dataclass

HELD_OUT_OF = 16                        # one calculation of so many is never trained on
KINDS = {"add": 22, "subtract": 16, "multiply": 20, "compare": 10, "two steps": 9, "story": 13, "other": 10}
NO_ANSWER = r"\text{no answer}"         # what stands in the box of a question that is not arithmetic


@dataclass(frozen=True)
class Problem:
    """A question, the reasoning and the reply that a model should give, and what must stand in the box."""
    kind: str                           # one of KINDS
    question: str
    reasoning: str
    reply: str                          # has one \\boxed{answer}
    answer: str
    held_out: bool


def held_out(key: str) -> bool:
    """The split, by the first 8 bytes of a SHA-256 of a calculation (or of a question without one)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_OF == 0


# ------------------------------------------------------------------------------------------------------------
# 1. Reasoning


class Scratch:
    """A sheet of paper: `lines` of reasoning so far, and whether a held-out calculation stands on it."""

    def __init__(self):
        self.lines: list[str] = []
        self.held_out = False

    def solve(self, a: int, op: str, b: int) -> int:
        """Work out a op b for whole numbers of either sign and op in + - *; every step becomes a line."""
        asked = f"{a}{op}{b}" if b >= 0 else f"{a}{op}({b})"
        if op == "-":
            b = -b                                      # a - b = a + (-b)
        if op == "*":
            form, negative = f"{abs(a)}*{abs(b)}", (a < 0) != (b < 0)
        elif (a < 0) == (b < 0):
            form, negative = f"{abs(a)}+{abs(b)}", a < 0
        else:
            form, negative = f"{max(a, b)}-{-min(a, b)}", False
        signed = f"-({form})" if negative else form
        self.lines.append(f"{asked}:" if signed == asked else f"{asked} is {signed}.")
        left, right = map(int, re.split(r"[-+*]", form))
        result = {"+": self.add, "-": self.subtract, "*": self.multiply}[form[len(str(left))]](left, right)
        result = -result if negative else result
        self.lines.append(f"So {asked}={result}.")
        return result

    def add(self, a: int, b: int) -> int:
        self._calculation("+", *sorted((a, b)))
        carry, known = 0, ""
        columns = self._line_up(a, b)
        for place, (x, y) in enumerate(columns):
            total = x + y + carry
            last = place == len(columns) - 1
            text = f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={total}"
            carry = total // 10
            known = (str(total) if last else str(total % 10)) + known
            self.lines.append(text + (f", carry {carry}" if carry and not last else "") + f": {known}")
        return int(known)

    def subtract(self, a: int, b: int) -> int:
        larger = self.compare(a, b)
        if larger == 0:
            return 0
        if larger < 0:
            self.lines.append(f"So {a}-{b}=-({b}-{a}).")
            return -self.subtract(b, a)
        borrow, known = 0, ""
        for x, y in self._line_up(a, b, write=False):
            text = f"{x}-{y}" + ("-1" if borrow else "")
            digit = x - y - borrow
            if digit < 0:
                text += f": borrow, 1{text}"
            borrow, digit = int(digit < 0), digit % 10
            known = str(digit) + known
            self.lines.append(f"{text}={digit}: {known}")
        if known[0] == "0":
            self.lines.append(f"{known} is {int(known)}.")
        return int(known)

    def compare(self, a: int, b: int) -> int:
        """1, 0 or -1, as a is larger than, equal to, or smaller than b; both zero or more."""
        self._calculation("-", max(a, b), min(a, b))
        seen, larger = [], 0
        for x, y in reversed(self._line_up(a, b)):
            larger = (x > y) - (x < y)
            seen.append(f"{x}{'=><'[larger]}{y}")
            if larger:
                break
        verdict = f"{max(a, b)} is larger" if larger else "they are equal"
        self.lines.append(f"{', '.join(seen)}, so {verdict}.")
        return larger

    def multiply(self, a: int, b: int) -> int:
        if b > a:
            self.lines.append(f"{a}*{b} is {b}*{a}.")
            a, b = b, a
        self._calculation("*", b, a)
        if b < 10:
            return self._times_digit(a, b)
        tens, ones = divmod(b, 10)
        parts = []
        if ones:
            self.lines.append(f"{a}*{ones}:")
            parts.append(self._times_digit(a, ones))
        self.lines.append(f"{a}*{tens}:")
        parts.append(self._times_digit(a, tens) * 10)
        self._calculation("*", *sorted((a, 10 * tens)))
        self.lines.append(f"So {a}*{tens}0={parts[-1]}.")
        return self.add(parts[0], parts[1]) if ones else parts[0]

    def _times_digit(self, a: int, digit: int) -> int:
        self._calculation("*", *sorted((a, digit)))
        carry, known, digits = 0, "", str(a)[::-1]
        for place, d in enumerate(digits):
            product = int(d) * digit
            text = f"{d}*{digit}={product}" + (f", {product}+{carry}={product + carry}" if carry else "")
            product, last = product + carry, place == len(digits) - 1
            carry = product // 10
            known = (str(product) if last else str(product % 10)) + known
            self.lines.append(text + (f", carry {carry}" if carry and not last else "") + f": {known}")
        if str(int(known)) != known:
            self.lines.append(f"{known} is {int(known)}.")
        return int(known)

    def check_last_digit(self, a: int, op: str, b: int, result: int) -> None:
        """What a careful pupil adds: the last digit must follow from the last digits."""
        if op == "-":                                   # a - b = result: add b back
            a, op, b, result = result, "+", b, a
        if min(a, b, result) < 0:
            return
        x, y = a % 10, b % 10
        small = x + y if op == "+" else x * y
        self.lines.append(f"Wait, let me check: {x}{op}{y}={small} ends in {small % 10}, "
                          f"and {result} ends in {result % 10}. Good.")

    def _line_up(self, a: int, b: int, write: bool = True) -> list[tuple[int, int]]:
        """Columns of digits from the right, the shorter number filled up with zeros."""
        width = max(len(str(a)), len(str(b)))
        if write:
            self.lines.append(f"Line up {a:0{width}} and {b:0{width}}.")
        return [(int(x), int(y)) for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1])]

    def _calculation(self, op: str, a: int, b: int) -> None:
        self.held_out |= max(a, b) > 9 and held_out(f"{a}{op}{b}")


# ------------------------------------------------------------------------------------------------------------
# 2. Questions with an answer

ASK = ["What is {}?", "what is {}", "What's {}?", "{}", "{} =", "{}=?", "{} = ?", "Calculate {}.",
       "Compute {}.", "How much is {}?", "how much is {}", "Work out {}.", "Please calculate {}.",
       "{} please", "Solve {}", "Can you tell me what {} is?", "Hi, what is {}?", "Hello! How much is {}?",
       "Find {}.", "Evaluate {}.", "What does {} equal?", "I need to know {}.", "What do I get for {}?",
       "Could you work out {} for me?"]
SAY = {"+": ["{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} together"],
       "-": ["{a} minus {b}", "the difference between {a} and {b}", "{a} take away {b}"],
       "*": ["{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}"]}
ORDER = {"+": ["Add {a} and {b}.", "add {a} to {b}", "Please add {a} and {b}."],
         "-": ["Subtract {b} from {a}.", "subtract {b} from {a}", "Take {b} away from {a}."],
         "*": ["Multiply {a} by {b}.", "multiply {a} and {b}", "Please multiply {a} by {b}."]}
LARGER = ["Which is larger, {a} or {b}?", "which number is bigger: {a} or {b}?", "Which is more, {a} or {b}?",
          "Which one is greater, {a} or {b}?", "What is the larger of {a} and {b}?"]
SMALLER = ["Which is smaller, {a} or {b}?", "which number is less: {a} or {b}?",
           "What is the smaller of {a} and {b}?"]
YES_NO = ["Is {a} {word} than {b}?", "is {a} {word} than {b}", "Tell me if {a} is {word} than {b}."]
NAMES = ("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tina "
         "Yuki").split()
ITEMS = ("apples books marbles stamps pencils coins cards cookies oranges stickers shells flowers eggs "
         "stones tickets balloons").split()
# The story, its steps ("_" is the result of the one before), what follows the box, and the largest a, b, c.
STORIES = [
    ("{n} has {a} {i}. {n} buys {b} more and gives {c} away. How many {i} does {n} have now?",
     "a+b _-c", "{n} has {x} {i} now.", (999, 999, 999)),
    ("{n} has {a} boxes with {b} {i} in each, and {c} more {i}. How many {i} is that in all?",
     "a*b _+c", "That is {x} {i}.", (50, 40, 500)),
    ("{n} buys {a} {i} for {b} dollars each and pays with {c} dollars. How many dollars are left?",
     "a*b c-_", "{n} has {x} dollars left.", (40, 20, 999)),
    ("A hall has {a} rows of {b} seats. {c} seats are taken. How many are free?",
     "a*b _-c", "{x} seats are free.", (60, 40, 900)),
    ("There are {a} boys and {b} girls. Each of them gets {c} {i}. How many {i} are needed?",
     "a+b _*c", "They need {x} {i}.", (99, 99, 12)),
    ("{n} reads {a} pages on Monday and {b} pages on Tuesday. The book has {c} pages. "
     "How many pages are left?",
     "a+b c-_", "{x} pages are left.", (200, 200, 900)),
    ("{n} had {a} {i}, lost {b} of them and then found {c}. How many {i} does {n} have?",
     "a-b _+c", "{n} has {x} {i}.", (999, 500, 300)),
    ("{n} is {a} years old. {m} is {b} years older than {n}. How old are they together?",
     "a+b a+_", "Together they are {x} years old.", (60, 40, 0)),
    ("A shop sells {a} {i} on Monday and {b} on Tuesday, for {c} dollars each. "
     "How many dollars does it earn?",
     "a+b _*c", "It earns {x} dollars.", (99, 99, 15)),
    ("{n} saves {a} dollars a week for {b} weeks and then spends {c} dollars. "
     "How many dollars does {n} have?",
     "a*b _-c", "{n} has {x} dollars.", (90, 30, 400)),
    ("{n} has {a} {i}. {m} has {b} times as many. How many {i} do they have together?",
     "a*b a+_", "Together they have {x} {i}.", (120, 9, 0)),
    ("{n} had {a} {i}, gave {b} to {m} and {c} to a friend. How many {i} are left?",
     "a-b _-c", "{n} has {x} {i} left.", (999, 400, 400)),
    ("{a} birds sit in a tree. {b} fly away. How many are left?",
     "a-b", "{x} birds are left.", (500, 300, 0)),
    ("{n} collected {a} {i} and {m} collected {b}. How many {i} do they have together?",
     "a+b", "Together they have {x} {i}.", (2000, 2000, 0)),
    ("A box holds {a} {i}. How many {i} are in {b} boxes?",
     "a*b", "There are {x} {i}.", (200, 60, 0)),
]


def number(rng: random.Random, most_digits: int = 4) -> int:
    digits = rng.randint(1, most_digits)
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits - 1)


def operands(rng: random.Random, op: str) -> tuple[int, int]:
    """Two numbers that the demo can handle; one time in nine, a sign."""
    if op == "*":
        pair = number(rng, 3), number(rng, rng.choice([1, 2]))
        pair = pair if rng.random() < 0.7 else pair[::-1]
    else:
        pair = number(rng), number(rng)
        if op == "-" and pair[0] < pair[1] and rng.random() < 0.7:
            pair = pair[::-1]
    a, b = (-x if rng.random() < 0.06 else x for x in pair)
    return a, b


def expression(rng: random.Random, text: str) -> str:
    """An expression as people type it: with or without blanks, and another sign for times."""
    times = rng.choice(["*", "*", "×", "x"])
    sign = rng.choice(["{}", " {} "])
    spaced = re.sub(r"(?<=[\d)])([-+*])", lambda m: sign.format(m[1]), text)
    return spaced.replace("*", times)


def calculation(rng: random.Random, op: str, kind: str) -> Problem:
    a, b = operands(rng, op)
    x, y = (f"{a:,}", f"{b:,}") if rng.random() < 0.05 else (str(a), str(b))
    style = rng.random()
    if style < 0.2:
        question = rng.choice(ORDER[op]).format(a=x, b=y)
    elif style < 0.45:
        question = rng.choice(ASK).format(rng.choice(SAY[op]).format(a=x, b=y))
    else:
        question = rng.choice(ASK).format(expression(rng, f"{x}{op}{y}" if b >= 0 else f"{x}{op}({y})"))
    sheet = Scratch()
    result = sheet.solve(a, op, b)
    if rng.random() < 0.2:
        sheet.check_last_digit(a, op, b, result)
    shown = f"{a} {op} {b}" if b >= 0 else f"{a} {op} ({b})"
    return finish(kind, question, sheet, rf"{shown} = \boxed{{{result}}}", str(result))


def comparison(rng: random.Random) -> Problem:
    a = number(rng)
    near = max(a + rng.choice([-1, 1]) * rng.randint(0, 10 ** rng.randint(0, len(str(a)))), 0)
    b = near if rng.random() < 0.5 and near < 10_000 else number(rng)
    sheet = Scratch()
    sheet.lines.append(f"I compare {a} and {b}.")
    larger = sheet.compare(a, b)
    high, low, style = max(a, b), min(a, b), rng.random()
    if style < 0.35:
        word = rng.choice(["larger", "greater", "bigger", "smaller", "less"])
        question = rng.choice(YES_NO).format(a=a, b=b, word=word)
        answer = "yes" if larger == (1 if word in ("larger", "greater", "bigger") else -1) else "no"
        reply = f"\\boxed{{{answer}}}, " + (f"{high} is larger than {low}." if larger else "they are equal.")
    else:
        wanted, questions = (low, SMALLER) if style < 0.6 else (high, LARGER)
        question, answer = rng.choice(questions).format(a=a, b=b), str(wanted) if larger else "equal"
        word = "smaller" if questions is SMALLER else "larger"
        reply = f"\\boxed{{{answer}}} is {word}." if larger else f"They are \\boxed{{{answer}}}."
    return finish("compare", question, sheet, reply, answer)


def two_steps(rng: random.Random) -> Problem:
    """a op b op c, with or without brackets; intermediate results stay within what the demo can handle."""
    while True:
        first, second = rng.choice("+-*"), rng.choice("+-*")
        a, b, c = (number(rng, 2 if "*" in (first, second) else 3) for _ in range(3))
        bracket = rng.choice(["left", "right", "none"])
        text = {"left": f"({a}{first}{b}){second}{c}", "right": f"{a}{first}({b}{second}{c})",
                "none": f"{a}{first}{b}{second}{c}"}[bracket]
        later = bracket == "right" or bracket == "none" and second == "*" and first != "*"
        sheet = Scratch()
        sheet.lines.append(f"First {b}{second}{c}." if later else f"First {a}{first}{b}.")
        inner = sheet.solve(b, second, c) if later else sheet.solve(a, first, b)
        left, op, right = (a, first, inner) if later else (inner, second, c)
        if in_range(left, op, right):
            sheet.lines.append(f"Then {left}{op}{right}." if right >= 0 else f"Then {left}{op}({right}).")
            result = sheet.solve(left, op, right)
            question = rng.choice(ASK).format(expression(rng, text))
            return finish("two steps", question, sheet, rf"The answer is \boxed{{{result}}}.", str(result))


def in_range(a: int, op: str, b: int) -> bool:
    a, b = sorted((abs(a), abs(b)))
    return b < 10_000 if op != "*" else a < 100 and b < 1000


def story(rng: random.Random) -> Problem:
    while True:
        text, steps, reply, limits = rng.choice(STORIES)
        n, m = rng.sample(NAMES, 2)
        values = {key: rng.randint(2, max(most, 2)) for key, most in zip("abc", limits)}
        sheet, result, ok = Scratch(), None, True
        for i, step in enumerate(steps.split()):
            left, op, right = (result if key == "_" else values.get(key, key) for key in step)
            ok = ok and in_range(left, op, right) and (op != "-" or left >= right)
            if not ok:
                break
            sheet.lines.append(("First", "Then")[i] + f" {left}{op}{right}.")
            result = sheet.solve(left, op, right)
        if ok:
            words = {**values, "n": n, "m": m, "i": rng.choice(ITEMS)}
            reply = reply.format(**words, x=rf"\boxed{{{result}}}")
            return finish("story", text.format(**words), sheet, reply, str(result))


def finish(kind: str, question: str, sheet: Scratch, reply: str, answer: str) -> Problem:
    return Problem(kind, question, "\n".join(sheet.lines), reply, answer, sheet.held_out)


# ------------------------------------------------------------------------------------------------------------
# 3. Questions without one

CAN = "I can add, subtract, multiply and compare whole numbers of up to four digits"
WHY = {"divide": "I have not learned to divide.", "long": "These numbers are too long for me.",
       "fraction": "I only know whole numbers.", "steps": "This has more steps than I can take.",
       "hello": "This is not a question about numbers.",
       "topic": "This is not arithmetic that I have learned."}
OFTEN = {"divide": 3, "long": 4, "fraction": 2, "steps": 2, "hello": 3, "topic": 8}
GREETINGS = ["Hi", "Hello", "Hello!", "hey", "Good morning", "How are you?", "Who are you?",
             "What can you do?", "What is your name?", "Thanks!", "thank you", "ok", "bye", "help", "test",
             "Are you a human?", "Hi there!", "Who made you?", "What are you?", "Good night", "Nice!",
             "Why?", "yes", "no"]
TOPICS = ["Who wrote {w}?", "What is the capital of {w}?", "Tell me a joke about {w}.",
          "Write a poem about {w}.", "Translate {w} into {v}.", "How do I cook {w}?", "What is {w}?",
          "Why is the {w} {v}?", "Explain {w} to me.", "Where can I buy {w}?", "When was {w} born?",
          "What happened to {w} in {y}?", "Write a program for {w}.", "Do you like {w}?",
          "What is the meaning of {w}?", "What day is it?", "Tell me about {w} and {v}.",
          "How many {w} are there?", "What is the square root of {y}?", "Is {y} a prime number?",
          "Is {y} even?", "Solve x + {y} = {z}", "What is {y} to the power of {z}?",
          "How many days are in {y} weeks?", "Is {w} larger than {v}?", "What is {w} plus {v}?", "{w} {v}",
          "{w}", "{y}", "I am {y}.", "My number is {y}.", "Count to {y}.", "What comes after {y}?",
          "Can you {w} a {v}?", "Please {w} the {v}.", "Give me {y} words about {w}.",
          "{w} and {v} are {z}", "Should I {w} or {v}?"]
WORDS = ("France China music history water the sky love rain cats dogs physics Paris blue red light bread "
         "soup war peace time money football chess Einstein Python English German stars moon ocean sun "
         "Berlin school coffee tea winter summer happy river city king queen paper house green gravity "
         "energy atoms dreams birds wine pizza hope one two three five seven ten twelve hundred read write "
         "draw make find sell walk").split()
SYLLABLES = ("ba de fi go lu mar ner pol sto ti ver an el in or us qua ther ing ed ly tion con pre sh ch br "
             "st ra me no ri ta wo").split()


def word(rng: random.Random) -> str:
    """A word of the list, or one that nobody knows."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))


def other(rng: random.Random) -> Problem:
    """Something that is no arithmetic, or more than the demo has learned."""
    why = rng.choices(list(OFTEN), weights=OFTEN.values())[0]
    long, short = rng.randint(10_000, 10 ** rng.randint(5, 9)), number(rng)
    ask = rng.choice(ASK)
    if why == "hello":
        question = rng.choice(GREETINGS)
    elif why == "divide":
        said = rng.choice(["{a} / {b}", "{a}/{b}", "{a} divided by {b}", "{a} ÷ {b}"])
        question = ask.format(said.format(a=number(rng), b=number(rng, 3)))
    elif why == "fraction":
        a = rng.choice([f"{number(rng, 2)}.{number(rng, 2)}", f"{rng.randint(1, 9)}/{rng.randint(2, 9)}",
                        f"{number(rng, 2)}%"])
        question = ask.format(f"{a} {rng.choice('+-*')} {number(rng, 3)}")
    elif why == "steps":
        text = str(number(rng, 3))
        for _ in range(rng.randint(3, 5)):
            text += rng.choice("+-*") + str(number(rng, 3))
        question = ask.format(expression(rng, text))
    elif why == "long":
        op = rng.choice("+-*")
        far = op == "*" and rng.random() < 0.5
        pair = [rng.randint(100, 9999), rng.randint(100, 9999)] if far else [long, short]
        rng.shuffle(pair)
        larger = rng.random() < 0.15
        question = rng.choice(LARGER).format(a=long, b=short) if larger else \
            ask.format(expression(rng, f"{pair[0]}{op}{pair[1]}"))
    else:
        question = topic(rng)
    start = "Hello! " if why == "hello" else "Sorry, this is beyond me. "
    return Problem("other", question, WHY[why], f"{start}{CAN}. \\boxed{{{NO_ANSWER}}}", NO_ANSWER,
                   held_out(question))


def topic(rng: random.Random) -> str:
    """A question about anything, words that make no sense, any script, or keys struck at random."""
    style = rng.random()
    if style < 0.6:
        return rng.choice(TOPICS).format(w=word(rng), v=word(rng), y=number(rng), z=number(rng, 2))
    if style < 0.85:
        words = [word(rng) if rng.random() < 0.9 else str(number(rng)) for _ in range(rng.randint(2, 12))]
        start = rng.choice(["", "", "what is ", "how do ", "why does ", "who ", "tell me ", "please ", "is "])
        return (start + " ".join(words)).capitalize() + rng.choice(["?", ".", "", "!"])
    low, high = rng.choice([(0x21, 0x7e), (0x61, 0x7a), (0x4e00, 0x9fa5), (0x410, 0x44f), (0x1f600, 0x1f640)])
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))


# ------------------------------------------------------------------------------------------------------------
# 4. Problems by the dozen, and their grading

MAKERS = {"add": lambda rng: calculation(rng, "+", "add"),
          "subtract": lambda rng: calculation(rng, "-", "subtract"),
          "multiply": lambda rng: calculation(rng, "*", "multiply"),
          "compare": comparison, "two steps": two_steps, "story": story, "other": other}


def make(rng: random.Random, heldout: bool, kind: str | None = None) -> Problem:
    """One problem of the wanted side of the split; `kind` by default drawn with the weights of KINDS."""
    kind = kind or rng.choices(list(KINDS), weights=KINDS.values())[0]
    while (problem := MAKERS[kind](rng)).held_out != heldout:
        pass
    return problem


def boxes(text: str) -> list[str]:
    """What stands in the boxes of a text, in their order; braces may be nested once."""
    return re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)


def grade(text: str, answer: str) -> tuple[bool, bool]:
    """(correct, well formed) of a completion that follows an open <think>: closed once, then one box."""
    reasoning, closed, reply = text.partition("</think>")
    formed = bool(closed) and "</think>" not in reply and len(boxes(reply)) == 1
    return formed and boxes(reply)[0] == answer, formed


def main() -> None:
    parser = argparse.ArgumentParser(description="Print problems of the demo's task.")
    parser.add_argument("--split", choices=["train", "heldout"], default="heldout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=7, help="how many (%(default)s)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.n):
        p = make(rng, args.split == "heldout")
        print(f"[{p.kind}] {p.question}\n<think>\n{p.reasoning}\n</think>\n\n{p.reply}\n")


if __name__ == "__main__":
    main()
