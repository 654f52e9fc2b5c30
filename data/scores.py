"""What can be counted of answers and labels: slot F1, BLEU, a confusion matrix."""
import json
import math
from collections import Counter

import numpy as np

from data.chat import normalize_numbers, parse_call


def arguments_of(message):
    """A list of the arguments of a message's calls; None if it has none, or one is no JSON."""
    try:
        return [parse_call(call)[1] for call in message.get("tool_calls") or ()] or None
    except ValueError:
        return None


def slot_counts(predicted, reference):
    """(right, predicted, wanted) values of two lists of argument dicts, the items of a list one by
    one, as the course counts them; None for `predicted` means no arguments at all."""

    def values(calls):
        calls = map(normalize_numbers, calls or ())
        items = (pair for arguments in calls for pair in arguments.items())
        items = ((k, v if isinstance(v, list) else [v]) for k, v in items)
        return Counter((k, json.dumps(v, sort_keys=True)) for k, vs in items for v in vs)

    ours, wanted = values(predicted), values(reference)
    return (ours & wanted).total(), ours.total(), wanted.total()


def bleu4(prediction, reference):
    """Sentence BLEU over characters, n-grams of 1 to 4 (Papineni et al. 2002), from 0 to 1; the
    k-th precision that is zero counts as 1 / (2^k * n-grams), NLTK's smoothing method 3."""
    prediction, reference = prediction.strip(), reference.strip()
    if not set(prediction) & set(reference):
        return 0.0
    total, zeros = 0.0, 0
    for n in range(1, 5):
        ours, wanted = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1))
            for text in (prediction, reference)
        )
        right, count = (ours & wanted).total(), max(1, ours.total())
        if not right:
            zeros += 1
            right = 0.5**zeros
        total += math.log(right / count) / 4
    short = min(0.0, 1 - len(reference) / len(prediction))  # log of the brevity penalty
    return math.exp(total + short)


def confusion(predicted, wanted, n):
    """(n, n) counts, a row for what was wanted, a column for what was predicted."""
    table = np.zeros((n, n), dtype=int)
    np.add.at(table, (wanted, predicted), 1)
    return table


def macro_f1(table):
    """The mean over classes of 2 * right / (predicted + wanted), from a confusion matrix."""
    return float(np.mean(2 * table.diagonal() / np.maximum(1, table.sum(0) + table.sum(1))))


def chat_scores(jobs, turns):
    """A dict of what can be counted: where a tool should be called slot precision, recall and F1
    and the share of calls that parse; elsewhere BLEU-4 (a call in that place scores 0)."""
    slots, parsed, bleu = [0, 0, 0], [], []
    for job, got in zip(jobs, turns):
        goal = job.wanted
        if not goal.get("tool_calls"):
            same = not got.get("tool_calls")
            bleu.append(bleu4(got["content"], goal["content"]) if same else 0.0)
            continue
        arguments = arguments_of(got)
        parsed.append(arguments is not None)
        counts = slot_counts(arguments, arguments_of(goal))
        slots = [total + n for total, n in zip(slots, counts)]
    scores, (right, predicted, wanted) = {}, slots
    if parsed:
        scores |= dict(slot_p=right / max(1, predicted), slot_r=right / max(1, wanted))
        scores |= dict(slot_f1=2 * right / max(1, predicted + wanted))
        scores |= dict(valid_json=sum(parsed) / len(parsed))
    return scores | (dict(bleu4=sum(bleu) / len(bleu)) if bleu else {})
