"""Figures of answers and labels: slot F1, BLEU, a confusion matrix."""

import json
import math
from collections import Counter

import numpy as np

from data.chat import normalize_numbers, parse_call


def arguments_of(message):
    """A list of the arguments of a message's calls; None if it has no calls or one is not JSON."""
    try:
        return [parse_call(call)[1] for call in message.get("tool_calls") or ()] or None
    except ValueError:
        return None


def slot_counts(predicted, reference):
    """How many values of two lists of argument dicts are (right, predicted, wanted); each item of a
    list counts, as in the course. None for `predicted` means no arguments at all."""

    def values(calls):
        items = [item for a in calls or () for item in normalize_numbers(a).items()]
        lists = [(k, v if isinstance(v, list) else [v]) for k, v in items]
        return Counter((k, json.dumps(v, sort_keys=True)) for k, vs in lists for v in vs)

    ours, wanted = values(predicted), values(reference)
    return (ours & wanted).total(), ours.total(), wanted.total()


def bleu4(prediction, reference):
    """Sentence BLEU from 0 to 1 over character n-grams of 1 to 4 (Papineni et al. 2002). The k-th
    precision that is zero counts as 1 / (2^k * n-grams), NLTK's smoothing method 3."""
    prediction, reference = prediction.strip(), reference.strip()
    if not set(prediction) & set(reference):
        return 0.0
    total, zeros = 0.0, 0
    for n in range(1, 5):
        ours = Counter(prediction[i : i + n] for i in range(len(prediction) - n + 1))
        wanted = Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
        right, count = (ours & wanted).total(), max(1, ours.total())
        if not right:
            zeros += 1
            right = 0.5**zeros
        total += math.log(right / count) / 4
    short = min(0.0, 1 - len(reference) / len(prediction))  # log of the brevity penalty
    return math.exp(total + short)


def confusion(predicted, wanted, n):
    """(n, n) counts: a row for each wanted class, a column for each predicted one."""
    return np.bincount(n * wanted + predicted, minlength=n * n).reshape(n, n)


def macro_f1(table):
    """The mean over classes of 2 * right / (predicted + wanted), from a confusion matrix."""
    return float(np.mean(2 * table.diagonal() / np.maximum(1, table.sum(0) + table.sum(1))))


def chat_scores(jobs, turns):
    """The figures of answers to jobs: where a tool should be called, precision, recall and F1 of
    the slots and the share of calls that parse; elsewhere BLEU-4, which is 0 for a call."""
    scores, calls, bleu = {}, [], []
    for turn, wanted in zip(turns, (job.wanted for job in jobs)):
        if wanted.get("tool_calls"):
            calls.append((arguments_of(turn), arguments_of(wanted)))
        else:
            bleu.append(0 if "tool_calls" in turn else bleu4(turn["content"], wanted["content"]))
    if calls:
        right, predicted, wanted = map(sum, zip(*(slot_counts(*pair) for pair in calls)))
        parsed = sum(arguments is not None for arguments, _ in calls)
        if not predicted + wanted:  # no call has arguments: those that parse are right
            right, predicted, wanted = parsed, len(calls), len(calls)
        scores |= dict(slot_p=right / max(1, predicted), slot_r=right / max(1, wanted))
        scores["slot_f1"] = 2 * right / max(1, predicted + wanted)
        scores["valid_json"] = parsed / len(calls)
    return scores | ({"bleu4": sum(bleu) / len(bleu)} if bleu else {})
