"""A guest who looks for hotels, for `finetune.py --objective grpo --env hotel`.

Your own environment is a file with such a class. `Env(examples)` gets the conversations of
--data. Each conversation runs on a shallow copy of it: `reset` sets what changes in one. The same
seed and the same answers must lead to the same conversation and reward.
"""

import random
from collections import Counter
from itertools import pairwise

from data import facts, hotel
from data.scores import arguments_of, slot_counts
from data.tools import call_tool

MAX_SEARCHES = 2  # requests by the guest that need a search, in one conversation
MAX_CALLS = 3  # calls that the bot may make before it must reply
LONG = 80  # characters of a long reply; 95 % of the replies in the data are shorter


class Env:
    """A guest with the wishes of a dialogue in the data, whose values are replaced by those of a
    hotel in the database. The guest states one wish after another, and asks about the hotels that
    the bot has found. The search is that of `--tools hotel`."""

    def __init__(self, examples):
        self.tools, self.hotels = hotel.get_tools(), hotel.read_hotels()
        self.dialogues = [e for e in examples if wishes(e)]
        named = sorted(set(hotel.values_by_key(examples).get("call.facilities", ())))
        self.named = [f for f in named if len(f) < LONG / 4]  # a list in one text is not exchanged

    def reset(self, seed):
        """The guest's first message, as a list."""
        self.rng, self.messages, self.turns = random.Random(seed), [], []
        example = self.rng.choice(self.dialogues)
        asked = {k: v for _, wanted in wishes(example) for k, v in wanted.items() if "range" in k}
        near = [h for h in self.hotels if hotel.search_hotels([h], **asked)]
        aim = self.rng.choice(near or self.hotels)
        named = [f for f in self.named if hotel.search_hotels([aim], facilities=[f])]
        values = {"facilities": named, "name": [aim["name"]], "type": [aim["type"]]}
        pool = {f"call.{key}": options for key, options in values.items() if options}
        self.plan = wishes(hotel.substitute(example, pool, 0.6, self.rng, made_up=0))
        return self.say(*self.plan.pop(0), questions=self.rng.randint(1, 2))

    def say(self, text, wanted, questions):
        """The guest's message, as a list. `wanted` are the arguments of the search, or the answer,
        that it asks for; `questions` is the number of questions that will follow."""
        self.messages.append({"role": "user", "content": text})
        self.turns.append((wanted, len(self.messages)))
        self.questions, self.calls = questions, 0
        return self.messages[-1:]

    def step(self, message):
        """(new messages, whether the conversation is over): the results of the calls in the bot's
        message, or what the guest says next."""
        self.messages.append(message)
        if calls := message.get("tool_calls"):
            results = [{"role": "tool", "content": call_tool(self.tools, call)} for call in calls]
            self.messages, self.calls = self.messages + results, self.calls + 1
            return results, self.calls > MAX_CALLS
        if self.questions and (asked := facts.ask(self.messages, self.rng)):
            return self.say(*(m["content"] for m in asked), self.questions - 1), False
        if self.plan:
            return self.say(*self.plan.pop(0), self.rng.randint(1, 2)), False
        return [], True

    def reward(self, messages):
        """The mean of `turn_score` over the guest's turns; 0 for wishes that were not reached."""
        stops = [start - 1 for _, start in self.turns[1:]] + [len(messages)]
        turns = [(w, messages[:a], messages[a:b]) for (w, a), b in zip(self.turns, stops)]
        return sum(turn_score(*turn) for turn in turns) / (len(turns) + len(self.plan))


def wishes(example):
    """[(what the guest says, the arguments of the call that follows)] of a dialogue."""
    found = [
        (question["content"], arguments_of(call)[0])
        for question, call in pairwise(example["messages"])
        if question["role"] == "user" and arguments_of(call)
    ]
    return found[:MAX_SEARCHES]


def turn_score(wanted, before, said):
    """A score from 0 to 1: the mean of the F1 of the slots in all calls and of the share of correct
    facts in the reply, among those stated or those wanted, whichever number is larger. A repeated
    name counts as wrong, and so does any name if nothing was found. The share of a reply of twice
    LONG characters is 0."""
    calls = [arguments_of(m) for m in said if m.get("tool_calls")]
    right, ours, theirs = slot_counts(
        [arguments for call in calls if call for arguments in call],
        [wanted] if isinstance(wanted, dict) else [],
    )
    slots = 2 * right / (ours + theirs) if ours + theirs else float(not calls)
    spoken = bool(said) and said[-1]["role"] == "assistant" and not said[-1].get("tool_calls")
    reply, known = said[-1]["content"] if spoken else "", before + said[:-1]
    needed = Counter(name=int(bool(facts.records_of(said))))
    if isinstance(wanted, str):
        needed = facts.count_facts(known, wanted)
        needed["name"] *= not any(needed[fact] for fact in facts.NUMBERS)
    counts = facts.count_facts(known, reply)
    if not facts.records_of(known):
        named = facts.names_pattern().findall(reply) + facts.INVENTED.findall(reply)
        counts["name"] = len(named)
    stated = sum(max(counts[fact], needed[fact]) for fact in facts.FACTS)
    true = sum(counts[f"right {fact}"] for fact in facts.FACTS) - counts["again"]
    share = max(0, true) / stated if stated else float(bool(reply.strip()))
    return (slots * all(calls) + share * min(1, max(0, 2 - len(reply) / LONG))) / 2
