"""What a reply says of hotels, against what the search has returned; questions about it."""
import json
import re
from collections import Counter
from functools import cache, lru_cache
from itertools import pairwise

from data.chat import either
from data.hotel import (
    QUESTIONS,
    answer_about,
    read_hotels,
    repeats,
    substitute,
    tidy_calls,
    values_by_key,
)
from data.scores import bleu4

# What a reply says of a hotel by a number: the field of its record, and how it is written
NUMBERS = {
    "price": r"(?<![-\d.])\d+(?:\.\d+)?(?=元)",
    "rating": r"(?<![\d.])\d+(?:\.\d+)?(?=分(?!钟))",
    "phone": r"(?<!\d)\d{3,4}-\d{5,}",
}
FACTS = ("name", *NUMBERS)
# The name of a hotel that nobody knows: with its branch in brackets, or as most here begin and end
INVENTED = re.compile(r"[\w·]{2,}\([^()]+\)|北京\w{2,10}?(?:酒店|饭店|宾馆|大厦|公寓)")


def records_of(messages):
    """{name: record} of all hotels that tools have returned in a conversation."""
    found = {}
    for m in messages:
        if m["role"] == "tool":
            try:
                rows = json.loads(m["content"])
            except (ValueError, RecursionError):  # a result may be any text
                continue
            for r in rows if isinstance(rows, list) else [rows]:
                named = isinstance(r, dict) and isinstance(r.get("name"), str) and r["name"]
                if named and {"price", "rating"} <= set(r):
                    found[named] = r
    return found


def ask(messages, rng):
    """A question about hotels that tools have returned, and its answer, as two messages: about one
    of them, all of the last result, or all. None if there are no hotels."""
    found = records_of(messages)
    if not found:
        return []
    last = next(filter(None, (records_of([m]) for m in reversed(messages))))
    said = "\n".join(m["content"] for m in messages if m["role"] == "assistant")
    named, other, draw = either(found).findall(said), rng.choice(list(found)), rng.random()
    _, what, ways, _ = asked = rng.choice(QUESTIONS)
    if draw < 0.2:
        question, about = f"它们的{what}？", last
    elif named and draw < 0.6:
        question, about = rng.choice(ways), named[-1:]
    else:
        question, about = f"{other}的{what}？", [other]
    answers = [answer_about(found[name], asked) for name in about]
    if rng.random() < 0.2:
        question, names = rng.choice((("查到了哪些酒店？", last), ("一共查到了哪些酒店？", found)))
        answers = ["、".join(names)]
    answer = "，".join(answers) + "。"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def in_order(messages):
    """The messages, with the hotels that a reply to a result names in the order of the result: a
    model that has named one then knows which one is next. Replies with prices, ratings or phones,
    which belong to a name, stay as they are."""
    fixed = messages[:1]
    for before, m in pairwise(messages):
        names = list(records_of([before]))
        numbers = any(re.search(written, m["content"]) for written in NUMBERS.values())
        if names and m["role"] == "assistant" and not numbers:
            m = m | {"content": reorder(m["content"], names)}
        fixed.append(m)
    return fixed


def reorder(text, names):
    """The text with those of the names that it holds in their order."""
    pattern = either(names)
    found = iter(sorted(pattern.findall(text), key=names.index))
    return pattern.sub(lambda _: next(found), text)




@cache
def known_names():
    """The names of all hotels in the database."""
    return frozenset(h["name"] for h in read_hotels())


@lru_cache
def names_pattern(others):
    """The pattern of the names in the database, and `others`."""
    return either(known_names() | others)


def count_facts(messages, reply):
    """A Counter of what a reply says of hotels after the conversation `messages`: how many names
    ("name"), prices, ratings and phones there are, how many of each are right ("right name"...),
    how many names come again ("again"), 1 for "doubled" if any does, and 1 for "replies". Empty
    before any result.

    A name is right if a search has returned it; a number if it is that of the hotel named before
    it, or else after it, or else of one of those that were named last in the conversation. Numbers
    that the guest has said are no statements.
    """
    known, counts = records_of(messages), Counter()
    if not known:
        return counts
    pattern = names_pattern(frozenset(known) - known_names())
    found = [(m.start(), m[0]) for m in pattern.finditer(reply)]
    rest = pattern.sub(lambda m: "\n" * len(m[0]), reply)
    invented = [m[0] for m in INVENTED.finditer(rest)]
    invented = [s for s in invented if not any(s in name for name in known)]
    counts["replies"], counts["name"] = 1, len(found) + len(invented)
    counts["right name"] = sum(name in known for _, name in found)
    counts["again"] = len(found) - len({name for _, name in found})
    counts["doubled"] = int(counts["again"] > 0)
    texts = [m["content"] for m in messages if m["role"] in ("user", "assistant")]
    guest = "\n".join(m["content"] for m in messages if m["role"] == "user")
    earlier = next(filter(None, map(pattern.findall, reversed(texts))), [])
    for fact, written in NUMBERS.items():
        for m in re.finditer(written, rest):
            if re.search(rf"(?<![\d.]){re.escape(m[0])}(?![\d.])", guest):
                continue
            before = [name for at, name in found if at < m.start()]
            about = before[-1:] or [name for _, name in found[:1]] or earlier
            counts[fact] += 1
            counts[f"right {fact}"] += any(
                is_value(m[0], known[name].get(fact)) for name in about if name in known
            )
    return counts


def is_value(text, value):
    """Whether a reply's `text` means a record's `value`: an equal number, or one of its phones."""
    if isinstance(value, (int, float)) and "-" not in text:
        return float(text) == value
    return bool(re.search(rf"(?<![\d.]){re.escape(text)}(?![\d.])", str(value)))


def fact_scores(jobs, turns):
    """The figures of answers to jobs: what share of the names, prices, ratings and phones in the
    replies is right, and what share of the replies names a hotel twice."""
    counts = Counter()
    for job, turn in zip(jobs, turns):
        if not job.wanted.get("tool_calls") and not turn.get("tool_calls"):
            counts += count_facts(job.messages, turn["content"])
    scores = {f"{fact}s": counts[f"right {fact}"] / counts[fact] for fact in FACTS if counts[fact]}
    replies = counts["replies"]
    return scores | ({"doubled": counts["doubled"] / replies} if replies else {})


def faithful(messages, answer, wanted):
    """The mean of BLEU-4, which keeps the wording, and the right facts over the larger number of
    those that are stated and those that should be (for each kind; a name said again is a wrong
    one)."""
    theirs = count_facts(messages, wanted["content"])
    if wanted.get("tool_calls") or not any(theirs[fact] for fact in FACTS):
        return None
    if answer.get("tool_calls"):
        return 0.0
    ours = count_facts(messages, answer["content"])
    right = sum(ours[f"right {fact}"] for fact in FACTS) - ours["again"]
    most = sum(max(ours[fact], theirs[fact]) for fact in FACTS)
    return (max(0, right) / most + bleu4(answer["content"], wanted["content"])) / 2


def augment(examples, share, rng):
    """The conversations of an epoch, those with rare calls more often (see `repeats`): each value
    is exchanged with probability `share` (see `substitute`), and up to three questions are added,
    each with that probability, too (see `ask`)."""
    pool, new = values_by_key(examples), []
    for example, count in zip(examples, repeats(examples)):
        for _ in range(int(count + rng.random())):
            changed = tidy_calls(substitute(example, pool, share, rng))
            messages = in_order(changed["messages"])
            for _ in range(3):
                messages = messages + (ask(messages, rng) if rng.random() < share else [])
            new.append(changed | {"messages": messages})
    return new
