"""What a reply says about hotels, compared with what a search has returned; questions about it."""

import contextlib
import json
import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise

from data import hotel
from data.chat import either
from data.scores import bleu4

# The numbers that a reply may state about a hotel: the field of its record, and how it is written
NUMBERS = {
    "price": r"(?<![-\d.])\d+(?:\.\d+)?(?=元)",
    "rating": r"(?<![\d.])\d+(?:\.\d+)?(?=分(?!钟))",
    "phone": r"(?<!\d)\d{3,4}-\d{5,}",
}
FACTS = ("name", *NUMBERS)
# A hotel's name that is not in the database: with its branch in brackets, or like most names
INVENTED = re.compile(r"[\w·]{2,}\([^()]+\)|北京\w{2,10}?(?:酒店|饭店|宾馆|大厦|公寓)")


def records_of(messages):
    """{name: record} of all hotels that searches have returned in a conversation."""
    records = {}
    for m in (m for m in messages if m["role"] == "tool"):
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # it may be any text
            for r in json.loads(m["content"]):
                if {"name", "price", "rating"} <= set(r) and isinstance(r["name"], str):
                    records[r["name"]] = r
    records.pop("", None)
    return records


def augment(examples, share, rng):
    """The conversations of an epoch, those with rare arguments more often (see `hotel.repeats`):
    each value is exchanged with probability `share` (see `hotel.substitute`), and up to three
    questions are added, each with that probability (see `ask`)."""
    pool, epoch = hotel.values_by_key(examples), []
    for example, count in zip(examples, hotel.repeats(examples)):
        for _ in range(int(count + rng.random())):
            changed = hotel.tidy_calls(hotel.substitute(example, pool, share, rng))
            messages = in_order(changed["messages"])
            for _ in range(3):
                messages = messages + (ask(messages, rng) if rng.random() < share else [])
            epoch.append(changed | {"messages": messages})
    return epoch


def ask(messages, rng):
    """A question about the hotels found and its answer, as two messages; [] if there are none."""
    records = records_of(messages)
    if not records:
        return []
    last = next(filter(None, (records_of([m]) for m in reversed(messages))))
    said = "\n".join(m["content"] for m in messages if m["role"] == "assistant")
    named, other, draw = either(records).findall(said), rng.choice(list(records)), rng.random()
    _, label, phrases, _ = question = rng.choice(hotel.QUESTIONS)
    if draw < 0.2:
        text, subjects = f"它们的{label}？", last
    elif named and draw < 0.6:
        text, subjects = rng.choice(phrases), named[-1:]
    else:
        text, subjects = f"{other}的{label}？", [other]
    answer = "，".join(hotel.answer_about(records[name], question) for name in subjects)
    if rng.random() < 0.2:
        text, names = rng.choice((("查到了哪些酒店？", last), ("一共查到了哪些酒店？", records)))
        answer = "、".join(names)
    return [{"role": "user", "content": text}, {"role": "assistant", "content": f"{answer}。"}]


def in_order(messages):
    """The messages, with hotels named in the order of the result, so that a name tells the model
    which one is next. Replies with prices, ratings or phones, which belong to a name, are kept."""
    ordered = messages[:1]
    for previous, m in pairwise(messages):
        names = list(records_of([previous]))
        numbers = any(re.search(written, m["content"]) for written in NUMBERS.values())
        if names and m["role"] == "assistant" and not numbers:
            pattern = either(names)
            new = iter(sorted(pattern.findall(m["content"]), key=names.index))
            m = m | {"content": pattern.sub(lambda _, new=new: next(new), m["content"])}
        ordered.append(m)
    return ordered


@lru_cache
def names_pattern(others=frozenset()):
    """The pattern of the names of the hotels in the database, and of `others`."""
    return either({h["name"] for h in hotel.read_hotels()} | others)


def count_facts(messages, reply):
    """A Counter of what a reply to `messages` says of hotels: the number of names ("name"), prices,
    ratings and phones, of those that are right ("right name"...), of names that are repeated
    ("again"), 1 for "doubled" if any is, and 1 for "replies". Empty before any result.

    A name is right if a search has returned it. A number is right if it is that of the hotel named
    before it, else after it, else of those named last. Numbers said by the guest do not count.
    """
    records = records_of(messages)
    if not records:
        return Counter()
    pattern = names_pattern(frozenset(n for n in records if not names_pattern().fullmatch(n)))
    matches = list(pattern.finditer(reply))
    names = [m[0] for m in matches]
    rest = pattern.sub(lambda m: "\n" * len(m[0]), reply)
    invented = [s for s in INVENTED.findall(rest) if not any(s in name for name in records)]
    counts = Counter(replies=1, name=len(names) + len(invented), again=len(names) - len({*names}))
    counts["right name"] = sum(name in records for name in names)
    counts["doubled"] = int(counts["again"] > 0)
    texts = [m["content"] for m in messages if m["role"] in ("user", "assistant")]
    guest = "\n".join(m["content"] for m in messages if m["role"] == "user")
    earlier = next(filter(None, map(pattern.findall, reversed(texts))), [])
    for fact, written in NUMBERS.items():
        for number in re.finditer(written, rest):
            if re.search(rf"(?<![\d.]){re.escape(number[0])}(?![\d.])", guest):
                continue
            before = [m[0] for m in matches if m.start() < number.start()]
            subjects = set(before[-1:] or names[:1] or earlier) & set(records)
            stated = [records[name].get(fact) for name in subjects]
            if fact == "phone":  # a hotel may have several
                right = any(number[0] in re.findall(written, str(phones)) for phones in stated)
            else:
                right = float(number[0]) in stated
            counts[fact] += 1
            counts[f"right {fact}"] += right
    return counts


def fact_scores(jobs, turns):
    """The figures of answers to jobs: the share of the names, prices, ratings and phones in replies
    that is right, and the share of replies that name a hotel twice."""
    counts = Counter()
    for job, turn in zip(jobs, turns):
        if not job.wanted.get("tool_calls") and not turn.get("tool_calls"):
            counts += count_facts(job.messages, turn["content"])
    scores = {f"{fact}s": counts[f"right {fact}"] / counts[fact] for fact in FACTS if counts[fact]}
    replies = counts["replies"]
    return scores | ({"doubled": counts["doubled"] / replies} if replies else {})


def faithful(messages, answer, wanted):
    """A reward: the mean of BLEU-4, which keeps the wording, and the share of facts that are right,
    of those stated or those wanted, whichever are more. A repeated name counts as wrong."""
    theirs = count_facts(messages, wanted["content"])
    if wanted.get("tool_calls") or not any(theirs[fact] for fact in FACTS):
        return None
    if answer.get("tool_calls"):
        return 0.0
    ours = count_facts(messages, answer["content"])
    right = sum(ours[f"right {fact}"] for fact in FACTS) - ours["again"]
    stated = sum(max(ours[fact], theirs[fact]) for fact in FACTS)
    return (max(0, right) / stated + bleu4(answer["content"], wanted["content"])) / 2
