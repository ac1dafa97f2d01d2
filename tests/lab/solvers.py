"""Answers to every task from its tokens alone, in plain Python: written from the docstrings, not from the generators."""

import itertools
import re


def palindrome(tokens, task):
    n = tokens.index(0)
    return {n + i: tokens[n - 1 - i] for i in range(n)}


def mqar(tokens, task):
    n = task.pairs
    value = dict(zip(tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2]))
    return {t: value[token] for t, token in enumerate(tokens) if t >= 2 * n and token in value}


def stack(tokens, task):
    stacks, answers = {}, {}
    for t in range(0, len(tokens) - 2, 3):
        op, which, element = tokens[t : t + 3]
        if op == 1:
            stacks.setdefault(which, []).append(element)
        elif op == 2:
            answers[t + 1] = stacks[which].pop()
    return answers


def state_tracking(tokens, task):
    if task.kind != "group":
        return {t: sum(tokens[: t + 1]) % task.vocab_size for t in range(len(tokens))}
    every = list(itertools.permutations(range(task.degree)))
    answers, things = {}, tuple(range(task.degree))
    for t, token in enumerate(tokens):
        things = tuple(every[token][thing] for thing in things)  # where each thing is now
        answers[t] = every.index(things)
    return answers


def selective_copy(tokens, task):
    symbols = [token for token in tokens if token > 1]
    return dict(zip((t for t, token in enumerate(tokens) if token == 1), symbols))


def induction(tokens, task):
    half, answers = task.length // 2, {}
    first = tokens[:half]
    grams = [tuple(first[i : i + task.n]) for i in range(half - task.n + 1)]
    for t in range(half, len(tokens)):
        within = (t - half) % task.piece
        gram = tuple(tokens[t - task.n + 1 : t + 1])
        if within >= task.n - 1 and grams.count(gram) == 1 and gram != grams[-1]:
            answers[t] = first[grams.index(gram) + task.n]
    return answers


def needle(tokens, task):
    text, facts, answers = bytes(tokens), {}, {}
    for name, value in re.findall(rb"\nThe key of ([a-z]{4}) is (\d{4})\.\n", text):
        facts.setdefault(name, []).append(value)
    asked = rb"What (?:is the key|are the keys) of ([a-z]{4})\? The keys? of \1 (?:is|are) "
    for question in re.finditer(asked, text):
        for digits in re.finditer(rb"\d+", b", ".join(facts[question[1]])):
            answers |= {question.end() - 1 + digits.start() + i: digit for i, digit in enumerate(digits[0])}
    return answers


def text(tokens, task):
    return {t: tokens[t + 1] for t in range(len(tokens) - 1)}
