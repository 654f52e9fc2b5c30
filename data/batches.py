"""Examples as rows of token ids with a mask of what is learned, and rows as padded batches."""

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data.chat import get_template, split_system
from data.tokenizer import label_token


@dataclass
class Row:
    """Token ids, whether each is to be learned, and whether some were cut off for the context."""

    ids: list
    mask: list
    cut: bool = False

    def targets(self):
        """The ids to predict after each of ids[:-1]; -100 is none."""
        return [i if m else -100 for i, m in zip(self.ids[1:], self.mask[1:])]


class Turn(NamedTuple):
    """An assistant's turn in the data, the messages before it, and the schemas of tools."""

    messages: list
    wanted: dict
    tools: list | None = None


@dataclass
class Prompt:
    """The ids before an assistant's turn, that turn, and the room for all its sampled answers."""

    ids: list
    turn: Turn
    room: int


def chat_rows(example, tokenizer, context, loss_on="assistant", first=0):
    """The Rows of a conversation {"messages", perhaps "tools"}, of which messages before number
    `first` are not learned. There are several Rows only where the template writes earlier turns
    differently once later ones follow.

    A row ends with its last target, since nothing can be learned from what follows. If it has more
    than context + 1 ids, its oldest turns are dropped, except the system's; then a long question
    loses its beginning, a long answer its end. ValueError if the template refuses the conversation.
    """
    template, messages, tools = get_template(tokenizer), example["messages"], example.get("tools")

    def learned(i):
        wanted = loss_on != "call" or messages[i].get("tool_calls")
        return i >= first and messages[i].get("weight", 1) and wanted

    rows = template.rows(messages, tools, learned)
    return [fit_row(template, *row, messages, tools, context + 1) for row in rows]


def fit_row(template, ids, mask, turns, messages, tools, room):
    """The Row made of one result of `Template.rows`, with at most `room` ids; see `chat_rows`."""

    def until_last_target(ids, mask):
        stop = len(mask) - mask[::-1].index(1) if any(mask) else 0
        end = [template.end] if stop and ids[stop - 1] not in template.ends else []
        return ids[:stop] + end, mask[:stop] + [1] * len(end)

    system, rest = split_system(messages[: turns[-1] + 1])
    ids, mask = until_last_target(ids, mask)
    cut = len(ids) > room
    for dropped in range(1, len(rest) - 1):
        if len(ids) <= room:
            break
        kept = [*system, *rest[dropped:]]
        with contextlib.suppress(ValueError):  # some templates require a user turn first
            if rows := template.rows(kept, tools, {i - dropped for i in turns}.__contains__):
                ids, mask = until_last_target(*rows[-1][:2])
    # a question that leaves no room for its answer loses its beginning: its end takes half the row,
    # or more where the answer is short
    first = mask.index(1) if 1 in mask else 0
    start = max(0, min(first - room // 2, len(ids) - room)) if first >= room else 0
    return Row(ids[start : start + room], mask[start : start + room], cut)


def label_row(text, label, tokenizer, context):
    """The Row of a labelled text, of which only the label is learned.

    a fine film <|endoftext|> <|label:pos|>
    0 0    0    0             1
    """
    ids = tokenizer.encode(text)
    kept = [*ids[-(context - 1) :], tokenizer.eos_id]
    target = tokenizer.special[label_token(label)]
    return Row([*kept, target], [0] * len(kept) + [1], len(ids) > context - 1)


def preference_rows(example, tokenizer, context):
    """(chosen Row, rejected Row) of a preference pair, of which only the answers are learned."""
    prompt = example["messages"]
    talks = [example | {"messages": prompt + example[key]} for key in ("chosen", "rejected")]
    rows = [chat_rows(t, tokenizer, context, first=len(prompt))[-1:] for t in talks]
    if not all(rows):
        raise ValueError("an answer of the pair has weight 0: nothing of it is learned")
    return rows[0][0], rows[1][0]


def sequences(row):
    """The Rows in a Row or a tuple of Rows."""
    return row if isinstance(row, tuple) else (row,)


def has_target(row):
    """Whether something can be learned from each of the `sequences`."""
    return all(any(r.mask[1:]) for r in sequences(row))


def show_mask(rows, tokenizer, count):
    """Print the first `count` rows, a token a line: position, a * if it is learned, id, text. The
    text of a character of several tokens stands at its last one. Each side of a pair is a row.
    """
    names = ("chosen", "rejected") if isinstance(rows[0], tuple) else ("row",)
    flat = [(f"{name} {n}", row) for n, group in enumerate(rows[:count], start=1)
            for name, row in zip(names, sequences(group))]  # fmt: skip
    for name, row in flat:
        cut = ", cut to --context + 1: the last token is only predicted" if row.cut else ""
        print(f"--- {name}: {len(row.ids)} tokens, {sum(row.mask)} of them learned{cut} ---")
        tokens = zip(row.ids, row.mask, tokenizer.texts(row.ids))
        for n, (i, learned, text) in enumerate(tokens):
            print(f"{n:5} {' *'[learned]} {i:7} {repr(text)[1:-1]}")


def pad(rows):
    """(ids, targets) of rows, both (B, T), padded at the end with id 0 and target -100."""
    ids = [torch.tensor(r.ids[:-1]) for r in rows]
    targets = [torch.tensor(r.targets()) for r in rows]
    return pad_sequence(ids, True), pad_sequence(targets, True, -100)


def row_size(row):
    """(tokens of the longest sequence, sequences). A Prompt with its answers is one sequence."""
    if isinstance(row, Prompt):
        return len(row.ids) - 1 + row.room, 1
    return max(len(r.ids) for r in sequences(row)) - 1, len(sequences(row))


def bucket(order, rows, batch_tokens):
    """Lists of indices of rows of similar length, each of `batch_tokens` at most, or one row."""
    batches = []
    for i in sorted(order, key=lambda i: row_size(rows[i])[0]):  # keeps the order of equal lengths
        if not batches or (len(batches[-1]) + 1) * math.prod(row_size(rows[i])) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


class BucketLoader:
    """The rows of each epoch, epoch_rows(epoch), in batches of similar lengths and random order:
    a pure function of the seed and the number of the batch, so resuming needs only the step."""

    def __init__(self, epoch_rows, batch_tokens, seed):
        self.epoch_rows, self.batch_tokens, self.seed = epoch_rows, batch_tokens, seed
        self.begin(0)
        self.per_epoch = len(self.batches)

    def begin(self, epoch):
        """Make the rows and batches of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        self.epoch, self.rows = epoch, self.epoch_rows(epoch)
        order = rng.permutation(len(self.rows)).tolist()
        self.batches = bucket(order, self.rows, self.batch_tokens)
        rng.shuffle(self.batches)

    def get(self, number):
        """(row numbers, rows) of batch `number` of the run."""
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self.begin(epoch)
        # all epochs are as long as the first: if rows make more or fewer batches, some are left
        # out or repeated
        numbers = self.batches[index % len(self.batches)]
        return numbers, [self.rows[i] for i in numbers]
