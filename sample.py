"""Let a trained model write.

    python sample.py --prompt "def "                        continue a text with the newest run
    python sample.py --prompt @story.txt --temperature 0    greedy, from a file
    python sample.py --prompt "Once" --beams 4              beam search
    python sample.py --analogy "king - man + woman"         arithmetic in the embedding table
    python sample.py --ckpt out/hotel-ft --chat --tools hotel       talk, and let it look things up
    python sample.py --ckpt out/sentiment-ft --prompt "a fine film"  a classifier's verdict
    python sample.py --ckpt out/hotel-ft --serve --tools hotel      a page, and OpenAI's API

Read it from here to the end of beam search: filters, the plain loop, the engine. Faster Linear
layers for a CPU are in data/matmul.py, ids to text in data/reply.py, the chat in data/terminal.py,
the server in data/server.py.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import lora
import model as lm
from data import cli
from data.analogy import analogy, bert_words
from data.chat import common_length, get_template
from data.cli import Parser, UserError, at_least, between, positive, printable, run_cli, share
from data.drafts import Drafts, Lookup
from data.graphs import GraphedSteps
from data.machine import DTYPES, choose_device, native_dtype
from data.matmul import make_fast
from data.progress import watched
from data.reply import TextStream
from data.runs import newest_run
from data.schema import Constraint, call_grammar, make_constraint
from data.terminal import Chat, talk
from data.tokenizer import REWARD_TOKEN, Tokenizer, label_token, labels_of, warn_unknown
from data.tools import function_schema, load_tools

# --------------------------------------------------------------------------------------------
# Penalties, temperature, filters: each takes logits (B, V) and returns new ones
# --------------------------------------------------------------------------------------------


def repetition_penalty(logits, previous, penalty):
    """Make the ids in `previous` (one list a row) less likely: positive logits are divided by
    `penalty`, negative ones multiplied (CTRL, Keskar et al. 2019). 1 changes nothing."""
    out = logits.clone()
    for row, ids in zip(out, previous):
        seen = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return out


def count_penalty(logits, drawn, frequency, presence):
    """Subtract `frequency` from a logit for each occurrence of its id in `drawn` (a list per row),
    and `presence` once, as OpenAI's API documents it. 0 and 0 change nothing."""
    out = logits.clone()
    for row, ids in zip(out, drawn):
        count = torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(row)).to(row)
        row -= frequency * count + presence * (count > 0)
    return out


def loop_penalty(logits, previous, penalty):
    """Subtract `penalty` from the logit of an id that would complete the same four ids a third time
    within 100. Such tokens are rare in text written by people, and a model that has begun to
    copy itself seldom stops. A second occurrence, which is common in code, is not penalised."""
    out = logits.clone()
    for row, ids in zip(out, previous):
        recent = ids[-100:]
        runs = Counter(zip(*(recent[i:] for i in range(4))))
        row[[i for *run, i in runs if run == recent[-3:] and runs[*run, i] > 1]] -= penalty
    return out


def top_k(logits, k):
    """Keep the k largest logits of each row, and those equal to the k-th."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def top_p(logits, p):
    """Keep the most likely tokens until their probabilities add up to p (Holtzman et al. 2020). The
    token that crosses p is kept, so one always remains.

    >>> top_p(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), 0.5).exp()
    tensor([[0.4000, 0.3000, 0.0000, 0.0000]])
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    for k in (1000, logits.shape[-1]):  # sorting all of a large vocabulary is seldom necessary
        ordered, order = logits.topk(min(k, logits.shape[-1]), dim=-1)
        probs = (ordered - total).exp()
        before = probs.cumsum(dim=-1) - probs  # the probability of all tokens that are more likely
        if (before[:, -1] >= p).all():
            break
    drop = torch.ones_like(logits, dtype=torch.bool).scatter(1, order, before >= p)
    drop.scatter_(1, order[:, :1], False)  # p = 0 keeps one token as well
    return logits.masked_fill(drop, -math.inf)


def min_p(logits, p):
    """Keep tokens of at least p times the largest probability (Nguyen et al. 2024)."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.max(dim=-1, keepdim=True).values, -math.inf)


class Filter(NamedTuple):
    """A sampling filter: a function of logits and a number. `off` is the value that keeps all
    tokens; `default`, `type` and `help` are those of its flag."""

    function: Callable
    off: float
    default: float
    type: Callable
    help: str


# To add a sampling filter, add a line here. Filters are applied in this order.
FILTERS = {
    "top_k": Filter(top_k, 0, 0, at_least(0), "keep the k likeliest tokens; 0 is all"),
    "top_p": Filter(top_p, 1.0, 0.95, share, "keep the likeliest up to a sum of p; 1 is all"),
    "min_p": Filter(min_p, 0.0, 0.0, share, "keep at least p times the largest probability"),
}
# The settings of `next_token`, at values that change nothing.
DECODING = {
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "loop_penalty": 0.0,
    **{name: f.off for name, f in FILTERS.items()},
}
# The defaults of the command line: those of all filters, and what else differs from DECODING.
DEFAULTS = {"temperature": 0.8, "loop_penalty": 4.0, **{n: f.default for n, f in FILTERS.items()}}


def next_token(logits, previous, uniforms, settings, prompt_lengths=None):
    """Draw one id for each row of logits (B, V), after the penalties, the temperature and FILTERS.

    `previous` has, for each row, the list of its ids so far; the first prompt_lengths[r] of them
    are the prompt. `uniforms` has a random number in [0, 1) for each row, at which the cumulative
    distribution is inverted. (torch.multinomial would draw one for each id of the vocabulary, which
    took a millisecond with GPT-2's.) Temperature 0 takes the largest logit, without loop_penalty.
    """
    s = DECODING | settings
    logits = logits.float()
    if s["frequency_penalty"] or s["presence_penalty"]:
        drawn = [ids[n:] for ids, n in zip(previous, prompt_lengths or repeat(0))]
        logits = count_penalty(logits, drawn, s["frequency_penalty"], s["presence_penalty"])
    if s["repetition_penalty"] != 1:
        logits = repetition_penalty(logits, previous, s["repetition_penalty"])
    if s["temperature"] < 1e-6:  # 0, or so little that logits / t would overflow
        return logits.argmax(dim=-1).tolist()
    if s["loop_penalty"]:
        logits = loop_penalty(logits, previous, s["loop_penalty"])
    logits = logits / s["temperature"]  # below 1 sharper, above 1 flatter
    for name, f in FILTERS.items():
        if s[name] != f.off:
            logits = f.function(logits, s[name])
    probs = logits.softmax(dim=-1)
    probs = probs.cpu() if probs.device.type == "mps" else probs  # MPS has no float64
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    points = 1 - torch.tensor(uniforms, dtype=torch.float64, device=probs.device)  # (0, 1]
    points = points * cumulative[:, -1]  # above 0, so that no id of probability 0 is drawn
    return torch.searchsorted(cumulative, points[:, None])[:, 0].tolist()


def draw_uniforms(generator, n):
    """Draw n random numbers in [0, 1) on the CPU, so that a seed gives the same text everywhere."""
    return torch.rand(n, generator=generator, dtype=torch.float64).tolist()


# --------------------------------------------------------------------------------------------
# Generation: the plain loop, and an engine that writes several texts at once
# --------------------------------------------------------------------------------------------


@torch.inference_mode()
def naive_generate(model, ids, max_new_tokens, seed=0, **settings):
    """Generation written out, for reading. Returns the new ids after the prompt `ids`. For each one
    the model reads the whole text again; `Engine` does not. A test checks that they agree.

    The model sees the last `context` ids of a longer prompt. A text that outgrows the context goes
    on from its last context // 2 ids. `settings` are those of DECODING.
    """
    generator = torch.Generator().manual_seed(seed)
    context, window, new = model.config.context, ids[-model.config.context :], []
    for _ in range(max_new_tokens):
        if len(window) > context:
            window = window[-max(1, context // 2) :]
        logits = model(torch.tensor([window]))[:, -1]  # (1, V)
        uniforms = draw_uniforms(generator, 1)
        [i] = next_token(logits, [ids + new], uniforms, settings, [len(ids)])
        window = [*window, i]
        new.append(i)
    return new


MAX_READ = 4096  # the most ids of a prompt that one pass reads


@dataclass(eq=False)
class Text:
    """A text that an `Engine` writes or has written: `ids` are its prompt and what has been drawn
    since. The model looks at ids[start:]. Row `row` of the cache holds a prefix of those; the rest
    are unread."""

    row: int
    ids: list = field(default_factory=list)
    start: int = 0
    prompt_length: int = 0
    max_new_tokens: float = math.inf  # limits drafts; the text itself is ended by `remove`
    ended_at: int = 0  # its place in the order of endings, from 1; 0 if it has not ended
    generator: torch.Generator | None = None
    uniforms: list = field(default_factory=list)  # random numbers drawn but not used yet
    draft: list = field(default_factory=list)  # ids that may follow, from `lookup`
    lookup: Lookup | None = None  # finds a draft in earlier text (data/drafts.py)
    settings: dict = field(default_factory=dict)  # as in DECODING
    allowed: torch.Tensor | None = None  # bools (V,): ids that may come; None is all
    constraint: Constraint | None = None  # a grammar that new ids must follow, such as JSON's
    logit_bias: dict = field(default_factory=dict)  # {id: added to its logit before any filter}
    ends: frozenset = frozenset()  # ids at which the caller ends the text
    min_tokens: int = 0  # new ids before any of `ends`, unless no other id is allowed
    top: int | None = None  # how many alternatives `logprobs` shows; None: it stays empty
    echo: bool = False  # whether `logprobs` begins with the prompt's ids, except the first
    # (log probability, [(id, log probability) of the `top` likeliest]) for each id
    logprobs: list = field(default_factory=list)

    @property
    def left(self):
        """How many ids may still come."""
        return self.prompt_length + self.max_new_tokens - len(self.ids)


class Engine:
    """Writes several texts at once, which begin and end at any step. Each gets the ids that it
    would get alone, except for rounding: the last bit of a product depends on the number of rows.

    The first `busy` rows of one KVCache are being written. The others are free and keep what they
    hold: the beginning that a prompt shares with any row is copied, not read again. When a text
    outgrows the context, its last context // 2 ids are read again, from position 0.

    slots   the most texts at once
    length  tokens that the cache has room for at first; it grows up to the context
    chunk   the most ids of prompts that a step reads, so that other texts need not wait long
    draft   whether a step may write several ids of a text (see data/drafts.py)

    >>> engine = Engine(model, slots=4)
    >>> text = engine.add([5, 7], temperature=0)
    >>> engine.step()[text]
    [29]
    """

    @torch.inference_mode()
    def __init__(self, model, slots, length=None, chunk=math.inf, draft=True):
        self.model, self.chunk, self.context = model, chunk, model.config.context
        self.device = model.embed.weight.device
        self.cache = lm.KVCache(model, slots, length)
        self.texts, self.busy, self.ended = [Text(row) for row in range(slots)], 0, 0
        self.draft, self.drafts = draft, Drafts()

    @torch.inference_mode()
    def add(
        self, prompt, *, max_new_tokens=math.inf, seed=0, allowed=None, constraint=None,
        logit_bias=None, ends=(), min_tokens=0, top=None, echo=False, **settings
    ):  # fmt: skip
        """Begin a text and return its Text, which describes the arguments; `prompt` is a list of
        ids. One row must be free. UserError for ids outside the vocabulary."""
        logit_bias, ends = logit_bias or {}, frozenset(ends)
        check_ids([prompt, *filter(None, (logit_bias, ends))], self.model.config.vocab_size)
        assert set(settings) <= set(DECODING), f"no such setting: {set(settings) - set(DECODING)}"
        start = max(0, len(prompt) - self.context)
        window = prompt[start:-1]  # the last id is always read, for its logits

        def gain(text):  # ids kept minus ids lost, or 0; then an empty row; then the longest unused
            kept, held = self.shared(text, window), self.held(text)
            return max(0, kept - (held - kept)), not held, -text.ended_at

        old = max(self.texts[self.busy :], key=gain)
        self.cache.lengths[old.row] = 0 if echo else self.shared(old, window)
        text = Text(
            old.row, list(prompt), start, len(prompt), max_new_tokens, settings=settings,
            allowed=allowed, constraint=constraint, logit_bias=logit_bias, ends=ends,
            min_tokens=min_tokens, top=top, echo=echo, lookup=Lookup(self.drafts.ended, prompt),
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        self.texts[text.row] = text
        self.swap(text.row, self.busy)
        self.busy += 1
        return text

    @torch.inference_mode()
    def remove(self, text):
        """End a text. Its row of the cache keeps it until another text takes the row."""
        if text in self.texts[: self.busy]:
            self.busy -= 1
            self.drafts.keep(text.ids)
            text.ended_at = self.ended = self.ended + 1
            self.swap(text.row, self.busy)

    @torch.inference_mode()
    def forget(self):
        """Drop what the free rows hold, after the model has changed."""
        self.cache.lengths[self.busy :] = 0
        self.cache.graphs = {}

    def swap(self, a, b):
        """Exchange two rows: their texts, and what the cache holds of them."""
        if a != b:
            self.cache.copy_rows([b, a], [a, b])
            self.texts[a], self.texts[b] = self.texts[b], self.texts[a]
            self.texts[a].row, self.texts[b].row = a, b

    def held(self, text):
        """How many ids of the text, from text.start on, the cache holds."""
        return int(self.cache.lengths[text.row])

    def shared(self, text, ids):
        """How many of `ids` the cache holds in the row of `text`."""
        return common_length(text.ids[text.start :][: self.held(text)], ids)

    @torch.inference_mode()
    def step(self):
        """Draw the next id of each text whose prompt has been read, and more ids where a draft is
        right; {text: [ids]}."""
        for text in self.texts[: self.busy]:
            if len(text.ids) - text.start > self.context:  # go on from the last half
                text.start = len(text.ids) - max(1, self.context // 2)
                self.cache.lengths[text.row] = 0
        # A text with one unread id costs no budget. A prompt is read in passes of at most MAX_READ
        # ids, to its end or until the budget is spent (then T is 0).
        texts, logits, budget, row = [], [], self.chunk, 0
        while row < self.busy:
            group, unread = self.next_group(row)
            if unread == 1 and self.draft:
                self.drafts.make(group, self.context - 1 - max(map(self.held, group)))
            T = min(unread, budget, MAX_READ) if unread > 1 else 1
            last = self.read(group, T) if T > 0 else None
            if unread == T:  # the prompt is read to its end
                logits.append(last)
                texts += group
            if T in (0, unread):  # otherwise another pass over the same prompt
                row += len(group)
            budget -= T if unread > 1 else 0
        if not texts:
            return {}
        return self.draw(texts, logits[0] if len(logits) == 1 else torch.cat(logits))

    def next_group(self, row):
        """(the texts that one pass reads, from `row` on; how many ids of each are unread): a prompt
        alone, or consecutive texts of which only the last id is unread. The prefix of a prompt
        that some row holds is copied first."""
        group = []
        for text in self.texts[row : self.busy]:
            unread = len(text.ids) - text.start - self.held(text)
            if unread > 1 and not text.echo:
                window = text.ids[text.start : -1]
                source = max(self.texts, key=lambda t: self.shared(t, window))
                if (gained := self.shared(source, window) - self.held(text)) > 0:
                    self.cache.copy_rows([source.row], [text.row], self.held(text) + gained)
                    unread -= gained
            if unread > 1:
                return (group, 1) if group else ([text], unread)
            group.append(text)
        return group, 1

    def read(self, group, T):
        """Run the next T ids of each text and its draft through the model; the logits (rows, V) of
        what follows them: a row for each text, and one for each id of a draft."""
        first, last = group[0].row, group[-1].row + 1
        held = self.cache.lengths[first:last].tolist()
        rows = [t.ids[t.start + n :][:T] + t.draft for t, n in zip(group, held)]  # of one length
        if (length := max(held) + len(rows[0])) > self.cache.room:
            self.cache.grow(min(self.context, 2 * length))
        cache, text = self.cache.rows(first, last), group[0]
        ids = torch.tensor(rows, device=self.device)
        after = text.ids[text.start + held[0] + 1 :][:T]
        if not (text.echo and after):  # a prompt to echo is alone in its group, see `next_group`
            return self.model.last_logits(ids, cache, n=1 + len(text.draft))
        states = self.model.hidden(ids, cache)  # (B, T, C)
        text.logprobs += echo_logprobs(self.model, states[0], after, text.top)
        return self.model.head(states[:, -1])

    def draw(self, texts, logits):
        """Draw from the logits (rows, V): a row for each id of a text's draft, and one more. Append
        the ids that `accept` keeps; {text: [ids]}."""
        rows = [(text, n) for text in texts for n in range(1 + len(text.draft))]
        biased, groups, drawn, new = logits, {}, {}, {}
        for r, (text, n) in enumerate(rows):  # texts with equal settings are drawn together
            groups.setdefault((id(text.allowed), *text.settings.items()), []).append(r)
            early = len(text.ids) + n - text.prompt_length < text.min_tokens
            if bias := text.logit_bias | dict.fromkeys(text.ends if early else (), -1e9):
                biased = logits.float().clone() if biased is logits else biased
                biased[r, list(bias)] += torch.tensor(list(bias.values())).to(biased)
            if n == len(text.uniforms):
                text.uniforms += draw_uniforms(text.generator, 1)
        for indices in groups.values():
            group, text = [rows[r] for r in indices], rows[indices[0]][0]
            x = biased if len(group) == len(rows) else biased[indices]
            if text.allowed is not None:
                x = torch.where(text.allowed, x, -math.inf)
            previous, uniforms = zip(*((t.ids + t.draft[:n], t.uniforms[n]) for t, n in group))
            lengths = [t.prompt_length for t, _ in group]
            ids = next_token(x, previous, uniforms, text.settings, lengths)
            drawn |= zip(group, zip(ids, x))
        for text, part in zip(texts, logits.split([1 + len(text.draft) for text in texts])):
            new[text] = ids = accept(text, [drawn[text, n] for n in range(len(part))])
            if text.top is not None:
                text.logprobs += top_logprobs(part[: len(ids)], ids, text.top)
            self.drafts.learn(text.lookup, ids)
            self.cache.lengths[text.row] -= len(part) - len(ids)  # forget rejected ids of the draft
            text.draft, text.echo = [], False
        return new


def accept(text, drawn):
    """Append ids to a text and return them. `drawn` has a pair (id, logits) for each id of the
    draft and for the id after it. The first id that differs from the draft, or ends the text, is
    the last one that is kept."""
    ids = []
    for (i, logits), drafted in zip_longest(drawn, text.draft):
        del text.uniforms[0]
        fit = fitting(text, logits, i) if text.constraint else i
        text.ids.append(fit)
        ids.append(fit)
        # where `fitting` has drawn again, it has used the random numbers of the ids that follow
        if fit != drafted or fit != i or fit in text.ends or text.left <= 0:
            break
    return ids


def generate(
    model, prompts, max_new_tokens, *, seed=0, seeds=None, stop=None, engine=None, draft=True,
    **options
):  # fmt: skip
    """Yield, for each step, the list of the next new id of each prompt; None once it has stopped.

    prompts      lists of ids, of any lengths: each row gets what it would get alone
    options      of Engine.add, but not its seed: row r draws with seeds[r], else with `seed`
    stop(r, id)  is called with each new id; True ends row r, the id included
    engine       an Engine, whose cache may hold earlier texts; default: a new one with `draft`
    """
    check_ids(prompts, model.config.vocab_size)
    if engine is None:
        length = min(max(map(len, prompts)) + max_new_tokens, model.config.context)
        engine = Engine(model, len(prompts), length, draft=draft)
    options["max_new_tokens"] = max_new_tokens
    texts = [engine.add(p, seed=s, **options) for p, s in zip(prompts, seeds or repeat(seed))]
    rows, running = [[] for _ in prompts], dict(enumerate(texts))
    try:
        for n in range(max_new_tokens):
            while any(len(rows[r]) == n for r in running):
                new = engine.step()
                for r, text in list(running.items()):
                    ids = new.get(text, [])
                    end = next((k for k, i in enumerate(ids, 1) if stop and stop(r, i)), None)
                    rows[r] += ids[:end]
                    if end or len(rows[r]) == max_new_tokens:
                        engine.remove(running.pop(r))
            if not any(len(row) > n for row in rows):
                return
            yield [row[n] if len(row) > n else None for row in rows]
    finally:
        for text in texts:
            engine.remove(text)


# --------------------------------------------------------------------------------------------
# Beam search: the likeliest continuation as a whole, not token by token
# --------------------------------------------------------------------------------------------


@torch.inference_mode()
def beam_search(model, prompt, max_new_tokens, beams=4, length_penalty=1.0, end=None, allowed=None):
    """The best continuations of `prompt`, as [(score, ids)], best first, at most `beams` of them.

    A score is the sum of log probabilities divided by len(ids) ** length_penalty, both including
    the `end` id (Wu et al. 2016 without its constants). The search ends early only when `beams` are
    finished and no live beam can still beat the worst of them, or none is live. UserError if prompt
    and continuation do not fit the context. `allowed`, bools (V,): ids that may come; None is all.
    """
    check_ids([prompt], model.config.vocab_size)
    device = model.embed.weight.device
    cache = lm.KVCache(model, beams, len(prompt) + max_new_tokens)
    ids = torch.tensor([prompt] * beams, device=device)
    live = [(0.0, [])] + [(-math.inf, [])] * (beams - 1)  # all beams are equal at first: one grows
    done = []
    for n in range(1, max_new_tokens + 1):
        logits = model.last_logits(ids, cache).float()  # (beams, V)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        so_far = torch.tensor([[s] for s, _ in live], dtype=torch.float64)
        total = logits.log_softmax(-1).cpu().double() + so_far
        # one candidate of each beam may be its end, so `beams` of the best 2 * beams can go on
        score, flat = total.flatten().topk(min(2 * beams, total.numel()))
        parent, token = flat // total.shape[1], flat % total.shape[1]
        grown = []
        for s, p, t in zip(score.tolist(), parent.tolist(), token.tolist()):
            if s == -math.inf:
                continue
            beam = live[p][1] + [t]
            if t == end or n == max_new_tokens:
                done.append((s / n**length_penalty, beam))
            elif len(grown) < beams:
                grown.append((s, beam, p))
        done = sorted(done, key=lambda b: -b[0])[:beams]
        if not grown:
            break
        # sums of log probabilities only fall, but a longer row may divide them by more
        reach = grown[0][0] / (max_new_tokens if length_penalty > 0 else n + 1) ** length_penalty
        if len(done) == beams and reach <= done[-1][0]:
            break
        grown += [(-math.inf, grown[0][1], grown[0][2])] * (beams - len(grown))
        live = [(s, b) for s, b, _ in grown]
        cache.copy_rows([p for *_, p in grown])
        ids = torch.tensor([[b[-1]] for _, b in live], device=device)
    return done


# --------------------------------------------------------------------------------------------
# What only some texts need: checks, constraints, labels, log probabilities
# --------------------------------------------------------------------------------------------


def check_ids(rows, vocab_size):
    """UserError for a prompt that is empty or has an id outside the vocabulary."""
    if not rows or not all(rows):
        raise UserError("an empty prompt: give at least one token")
    for i in (i for row in rows for i in row):
        if not 0 <= i < vocab_size:
            raise UserError(f"token id {i} is outside the vocabulary of 0 to {vocab_size - 1}")


def fitting(text, logits, i):
    """Return the id `i`, drawn from logits (V,), if it fits the text's constraint. Otherwise draw
    again without ids that do not fit; the others keep their ratios. The likeliest ids are checked
    first, and only as many as necessary. If no id fits, the constraint is dropped."""
    tried = 1
    while not (after := text.constraint.after(i)):
        tried = min(4 * tried, len(logits))
        candidates = {i, *logits.topk(tried).indices.tolist()}
        unfit = [j for j in candidates if not text.constraint.after(j)]
        logits = logits.index_fill(0, torch.tensor(unfit, device=logits.device), -math.inf)
        if logits.max() == -math.inf:
            text.constraint = None
            return i
        uniform = [text.uniforms.pop(0)] if text.uniforms else draw_uniforms(text.generator, 1)
        [i] = next_token(logits[None], [text.ids], uniform, text.settings, [text.prompt_length])
    text.constraint = after
    return i


@torch.no_grad()  # not inference_mode: a sharded model trains with the tensors that it gathers
def classify(model, prompts, goals, batch=64):
    """Log probabilities (N, L) of the label ids `goals`, among these alone, after each prompt."""
    out = []
    for start in watched(range(0, len(prompts), batch), "classifying: batch"):
        rows = [torch.tensor(ids) for ids in prompts[start : start + batch]]
        # causal: padding behind a row changes nothing
        ids = pad_sequence(rows, batch_first=True).to(model.embed.weight.device)
        wanted = torch.full_like(ids, -100)
        wanted[range(len(rows)), [len(row) - 1 for row in rows]] = 0  # logits of the last position
        logits = model(ids, wanted, output="logits")[:, goals]  # (B, L)
        out.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(out)


def label_shares(model, tokenizer, prompts):
    """[(label, probability)], the likeliest first, of each prompt (lists of ids)."""
    labels = labels_of(tokenizer)
    rows = [[*p[1 - model.config.context :], tokenizer.eos_id] for p in prompts]
    goals = [tokenizer.special[label_token(name)] for name in labels]
    shares = classify(model, rows, goals).exp().tolist()
    return [sorted(zip(labels, row), key=lambda pair: -pair[1]) for row in shares]


def top_logprobs(logits, chosen, n):
    """[(log probability of the chosen id, [(id, log probability) of the n likeliest])] of each row
    of logits (B, V), before any filter."""
    logps = logits.float().log_softmax(-1)
    best = logps.topk(n)
    rows = zip(chosen, logps, best.indices.tolist(), best.values.tolist())
    return [(row[i].item(), list(zip(ids, values))) for i, row, ids, values in rows]


def echo_logprobs(model, states, ids, n):
    """`top_logprobs` of the ids of a prompt that follow each of the states (T, C)."""
    logprobs = []
    for i in range(0, len(ids), lm.LOSS_ROWS):
        chosen = ids[i : i + lm.LOSS_ROWS]
        logprobs += top_logprobs(model.head(states[i : i + len(chosen)]), chosen, n)
    return logprobs


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


def load(ckpt=None, device=None, dtype="auto", adapters=()):
    """(model, tokenizer, path) of a checkpoint or run's folder, by default the newest run. With an
    adapter comes its base. `adapters`, named by folder or file, are added; the first is active."""
    if ckpt is None and adapters and "adapter" in lm.load_checkpoint(adapters[0]):
        ckpt, *adapters = adapters  # it names its base
    path = Path(ckpt) if ckpt is not None else newest_run()
    device = choose_device(device)
    dtype = native_dtype(device) if dtype == "auto" else dtype
    dtype = DTYPES["fp32" if dtype == "int8" else dtype]  # `make_fast` rounds to int8
    # an adapter recognises its base by the weights as they are on disk
    content, base, paths = lm.load_checkpoint(path, None if adapters else dtype), path, adapters
    if "adapter" in content:
        paths, base = [path, *adapters], lm.find_checkpoint(content["adapter"]["base"])
        if not base.exists():
            advice = "name its base with --ckpt and this one with --adapter"
            raise UserError(f"{path} is an adapter over {base}, which is not there: {advice}")
        content = lm.load_checkpoint(base)
    if not paths:
        model = lm.model_from_checkpoint(content, device, dtype, path)
        return model, lm.checkpoint_tokenizer(content, path), path
    files = [p.parent if p.name in ("best.pt", "last.pt") else p for p in map(Path, paths)]
    names = [file.name.removesuffix(".pt") for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"two adapters have the same name: {', '.join(names)}")
    named = dict(zip(names, map(lm.load_checkpoint, paths)))
    model = lora.load_adapted(content, named, base).to(device)
    for p in model.parameters():  # not the tables of positions, which stay in fp32
        p.data = p.data.to(dtype)
    spec, *others = [adapter["tokenizer"] for adapter in named.values()]
    if any(other != spec for other in others):
        raise UserError("the adapters have different special tokens and cannot be used together")
    return model, Tokenizer(spec), path


def fast_model(model, rows, args):
    """Make the model ready to write `rows` texts at once, in place, and return it: on a CPU its
    Linears are replaced by faster ones, unless it has adapters, which may be switched. On a GPU its
    steps are recorded as CUDA graphs, unless a router chooses different experts in each step.
    UserError if a flag asks for the impossible."""
    device = model.embed.weight.device.type
    adapted = any(isinstance(m, (lora.LoRALinear, lora.QuantLinear)) for m in model.modules())
    fast = device == "cpu" and not (args.no_fast or adapted)
    if args.dtype == "int8" and not fast:
        advice = "without --no_fast and adapters, which lora.py merges"
        raise UserError(f"--dtype int8 is for the Linear layers of a CPU, {advice}")
    if device == "cuda" and not (args.no_fast or model.config.experts):
        model.last_logits = GraphedSteps(model.last_logits)
    if fast:
        # a draft adds rows to a pass, and a layout that is fast for 8 rows is as fast for one
        make_fast(model, rows if args.no_draft else max(rows, 8), args.dtype == "int8")
    return model


def allowed_ids(model, tokenizer, chat=False, may_call=True):
    """Bools (V,): the ids that may be drawn. Spare rows of the table never are. Special tokens are
    the end of the text or, in a `chat`, those of the template (a call's only if `may_call`)."""
    template = get_template(tokenizer) if chat else None
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    lengths = torch.from_numpy(tokenizer.byte_lengths[: len(allowed)])
    allowed[: len(lengths)] = lengths > 0
    for i in template.spoken if template else (tokenizer.eos_id,):
        if i < len(allowed):
            allowed[i] = True
    if template and template.call is not None:
        allowed[template.call] = may_call
    return allowed.to(model.embed.weight.device)


def prompt_text(prompt):
    """The text of a --prompt: itself, the content of @FILE, or for None standard input."""
    source = "the prompt"
    try:
        if prompt is None:
            source, piped = "standard input", sys.stdin is not None and not sys.stdin.isatty()
            prompt = sys.stdin.read() if piped else ""
        elif prompt.startswith("@@"):
            prompt = prompt[1:]
        elif prompt.startswith("@"):
            source = prompt[1:]
            prompt = Path(source).read_text(encoding="utf-8")
        prompt.encode("utf-8")  # bytes that a shell could not decode are lone surrogates
        return prompt.removeprefix("\ufeff")  # the byte order mark that some editors write
    except UnicodeError as e:
        raise UserError(f"{source} is not text in UTF-8 ({e.reason} at {e.start})") from e


def read_prompts(args, tokenizer, vocab_size):
    """The prompts as lists of ids: from --prompt_ids, --prompt, or a pipe into this script."""
    if args.prompt_ids is None:  # an empty prompt begins a document
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        texts = [prompt_text(p) for p in args.prompt or [None]]
        rows = [begin + tokenizer.encode(t) or [tokenizer.eos_id] for t in texts]
        warn_unknown(tokenizer, chain.from_iterable(rows), "the prompt")
    else:
        try:
            rows = [[int(i) for i in args.prompt_ids.split(",")]]
        except ValueError as e:
            raise UserError(f"--prompt_ids {args.prompt_ids!r} must be like 5,17,200") from e
    check_ids(rows, vocab_size)
    return rows


def decoding_settings(args):
    """The values of the flags that DECODING names; there are none for OpenAI's penalties."""
    return {name: getattr(args, name, off) for name, off in DECODING.items()}


def write_rows(model, tokenizer, prompts, args):
    """Continue every prompt --num_samples times and print the texts, a single one as it comes.
    Sample j of each prompt draws with seed + j. Returns the new ids."""
    seed = args.seed if args.seed is not None else torch.seed() % 2**31
    seeds = [seed + j for _ in prompts for j in range(args.num_samples)]
    prompts = [p for p in prompts for _ in range(args.num_samples)]
    streams = [TextStream(tokenizer, args.stop or ()) for _ in prompts]
    texts = [shown(tokenizer, p) for p in prompts]
    ids, alone = [[] for _ in prompts], len(prompts) == 1

    def show(r, text):
        texts[r] += printable(text)
        if alone:
            print(printable(text), end="", flush=True)

    def stop(r, i):
        ids[r].append(i)
        show(r, streams[r].feed(i))
        return i == tokenizer.eos_id or streams[r].stopped

    print(texts[0] if alone else "", end="", flush=True)
    options = dict(seeds=seeds, allowed=allowed_ids(model, tokenizer), stop=stop)
    options |= decoding_settings(args) | {"draft": not args.no_draft}
    for _ in generate(model, prompts, args.max_new_tokens, **options):
        pass
    for r, stream in enumerate(streams):
        show(r, stream.finish())
        print("" if alone else f"--- {r + 1} ---\n{texts[r]}", flush=True)
    if max(len(p) + len(new) for p, new in zip(prompts, ids)) - 1 > model.config.context:
        full = f"the context of {model.config.context} tokens was full"
        print(f"[{full}: the text went on from its newest half]", file=sys.stderr)
    return ids


def shown(tokenizer, ids):
    """Printable text of ids, without tokens that begin or end a text and ids that have no token."""
    ends = tokenizer.bos_id, tokenizer.eos_id
    ids = [i for i in ids if i not in ends and tokenizer.token_bytes(i)]
    return printable(tokenizer.decode(ids))


def write_beams(model, tokenizer, prompt, args):
    """Beam search from one prompt: prints the beams, the best first, and returns their ids."""
    room = model.config.context - len(prompt)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens; beams need room in the context")
    if room < args.max_new_tokens:
        print(f"[beams end with the context, after {room} tokens]", file=sys.stderr)
    options = args.beams, args.length_penalty, tokenizer.eos_id, allowed_ids(model, tokenizer)
    beams = beam_search(model, prompt, min(room, args.max_new_tokens), *options)
    beams = beams[: args.num_samples]
    for score, ids in beams:
        if len(beams) > 1:
            print(f"--- {score:.4f} ---")
        print(shown(tokenizer, prompt + ids))
    return [ids for _, ids in beams]


def show_analogies(args, tokenizer, table):
    """Answer each --analogy, with the --choices at the same position."""
    choices = args.choices or [""] * len(args.analogy)
    for expression, listed in zip(args.analogy, choices):
        if len(args.analogy) > 1:
            print(expression)
        listed = [c.strip() for c in listed.replace("，", ",").split(",") if c.strip()]
        for text, cosine in analogy(expression, tokenizer, table, listed):
            print(f"{cosine:7.3f}  {text!r}")


def make_service(model, tokenizer, path, args, tools):
    """What --serve serves: an Engine with its Scheduler behind OpenAI's API, and the page."""
    from data.scheduler import Scheduler  # imported here: only --serve needs an HTTP server
    from data.service import Service
    from mnist import load_run, pictures

    named = lora.adapter_names(model)
    base = (path.parent if path.suffix == ".pt" else path).name or "model"
    adapters = {n: n for n in named} | {"base" if base in named else base: None}
    masks = {(True, call): allowed_ids(model, tokenizer, True, call) for call in (True, False)}
    masks[False, False] = allowed_ids(model, tokenizer)

    def classify_text(text):
        return label_shares(model, tokenizer, [tokenizer.encode(text)])[0]

    try:
        draw = partial(pictures, load_run("diffusion", model.embed.weight.device)[0])
    except UserError:  # no digits were trained
        draw = None
    engine = Engine(model, args.slots, 256, chunk=256, draft=not args.no_draft)
    activate = partial(lora.set_adapter, model)
    scheduler = Scheduler(engine, activate, next(iter(adapters.values())))
    return Service(
        scheduler, tokenizer, adapters, masks, decoding_settings(args), tools or {},
        classify_text, draw, args.ckpt or path, args,
    )  # fmt: skip


def make_chat(model, tokenizer, tools=None, max_tokens=200, seed=None, settings=None, draft=True):
    """A data.terminal.Chat with the model; its cache keeps the history between the turns."""
    engine = Engine(model, 1, 256, draft=draft)
    chat = Chat(tokenizer, model.config.context, tools, max_tokens, seed)
    masks = {call: allowed_ids(model, tokenizer, True, call) for call in (True, False)}
    grammar = call_grammar(chat.template, [function_schema(*tool) for tool in chat.tools.items()])

    def write(prompt, seed, may_call, stop):
        constraint = make_constraint(tokenizer, grammar) if may_call else None
        for _ in generate(
            model, [prompt], chat.max_tokens, seed=seed, allowed=masks[may_call], stop=stop,
            engine=engine, constraint=constraint, **settings or {},
        ):  # fmt: skip
            pass

    def set_adapter(name):
        if name:
            lora.set_adapter(model, None if name == "none" else name)
            engine.forget()
        active = getattr(model, "active_adapter", None) or "none"
        names = [*lora.adapter_names(model), "none"]
        return ", ".join(n + " (active)" * (n == active) for n in names)

    chat.write, chat.set_adapter = write, set_adapter
    return chat


# fmt: off (one line a flag)
def build_parser():
    p = Parser(description="Generate text with a trained model.")
    add = p.add_argument
    add("--ckpt", help=f"{lm.WHAT_CKPT} (default: the newest run in out/)")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--prompt", action="append",
        help="text, or @FILE (@@ begins a text with @); given several times it is a batch "
        "(default: standard input if it is a pipe, else the model begins a document)")
    mode.add_argument("--prompt_ids", help="token ids instead, e.g. 5,17,200")
    mode.add_argument("--chat", action="store_true", help="talk in the terminal")
    mode.add_argument("--serve", type=between(0, 65535, int), nargs="?", const=6006, metavar="PORT",
        help="a page and OpenAI's API on this port (default 6006; 0 is any that is free)")
    mode.add_argument("--analogy", action="append", help='nearest tokens of e.g. "king - man + '
        'woman" in the embedding table; may be given several times')
    add("--print_ids", action="store_true", help="print the new ids last, a line for each sample")
    add("--max_new_tokens", type=at_least(1), default=200, help="tokens per sample (default 200)")
    add("--num_samples", type=at_least(1), default=1, help="per prompt, in one batch (default 1)")
    add("--temperature", type=at_least(0, float), help="0 is greedy (default 0.8; with --tools 0)")
    for name, f in FILTERS.items():
        add(f"--{name}", type=f.type, default=f.default, help=f"{f.help} (default {f.default})")
    add("--repetition_penalty", type=positive, default=1.0, help="above 1: repeat less (default 1)")
    add("--loop_penalty", type=at_least(0, float), default=DEFAULTS["loop_penalty"],
        help="makes an id unlikely that repeats four ids for the third time (default 4; 0 is off)")
    add("--beams", type=at_least(0), default=0, help="width of a beam search; 0 samples (default)")
    add("--length_penalty", type=between(-10, 10), default=1.0, help="above 1 favours long beams")
    add("--stop", action="append", help="end at this text; may be given several times")
    add("--seed", type=between(0, 2**50, int), help="random seed (default: a new one each time)")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16", "int8"),
        help="of the weights (auto: on CUDA bf16, or fp16 before Ampere; else fp32); int8: on CPUs")
    add("--no_fast", action="store_true", help="no faster Linear layers (CPU) or CUDA graphs (GPU)")
    add("--no_draft", action="store_true", help="one token per step, no drafts from earlier text")
    add("--adapter", action="append", default=[], help="LoRA run to add to --ckpt; repeat for more")
    add("--system", metavar="TEXT", help="with --chat and --serve: the system turn")
    add("--tools", help="with --chat and --serve: hotel, or a .py file of functions to call")
    add("--host", help="with --serve: the address (default 127.0.0.1; another needs a key)")
    add("--api_key", help="with --serve: the key that clients send (default: SCRATCHLM_API_KEY)")
    add("--cors", metavar="ORIGIN", help="with --serve: a site whose pages may use the API")
    add("--slots", type=between(1, 256, int), default=16, help="with --serve: texts at once (16)")
    add("--choices", action="append", help="for each --analogy: candidates, with commas")
    return p


# fmt: on


def check_settings(args):
    """UserError for flags that have no effect; argparse has checked that there is one mode."""
    serving, default = args.serve is not None, build_parser().get_default
    writing, sampling = not (args.chat or serving or args.analogy), " ".join(DEFAULTS)
    for names, possible, modes in (
        ("choices", args.analogy, "--analogy"),
        ("host api_key cors slots", serving, "--serve"),
        ("tools system", args.chat or serving, "--chat and --serve"),
        ("beams num_samples stop print_ids", writing, "--prompt"),
        (f"stop repetition_penalty {sampling}", not (args.beams or args.analogy), "sampling"),
        ("length_penalty", args.beams, "--beams"),
        ("dtype", args.dtype != "int8" or not args.analogy, "models that write, if int8"),
    ):
        for name in names.split():
            if getattr(args, name) != default(name) and not possible:
                raise UserError(f"--{name} is for {modes}")
    if args.choices and len(args.choices) != len(args.analogy):
        raise UserError("--choices must be given for each --analogy or for none")
    if args.beams and args.num_samples > args.beams:
        raise UserError(f"--num_samples {args.num_samples} is more than --beams {args.beams}")


def check_kind(tokenizer, path, args):
    """The labels of a classifier; [] for any other model. UserError if the model cannot do what the
    flags ask for. Prints a note if another flag suits it better."""
    labels = labels_of(tokenizer)
    if REWARD_TOKEN in tokenizer.special and args.analogy is None:
        advice = f"finetune.py --objective grpo --reward {cli.quoted(path)} learns from it"
        raise UserError(f"{path} is a reward model and writes nothing: {advice}")
    flags = {"chat": args.chat, "beams": args.beams, "dtype int8": args.dtype == "int8"}
    if labels and (wrong := [name for name, given in flags.items() if given]):
        advice = f"give the text as --prompt, without --{wrong[0]}"
        raise UserError(f"{path} is a classifier of {', '.join(labels)}: {advice}")
    if args.prompt and not labels and get_template(tokenizer):
        note = "a chat model continues the text: --chat asks it, and --serve opens a page"
        print(f"[{note}]", file=sys.stderr)
    return labels


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_settings(args)
    if args.temperature is None:
        args.temperature = 0.0 if args.tools else DEFAULTS["temperature"]
    tools = load_tools(args.tools) if args.tools else None
    if args.analogy and args.ckpt and (words := bert_words(args.ckpt)):
        return show_analogies(args, *words)
    model, tokenizer, path = load(args.ckpt, args.device, args.dtype, args.adapter)
    if args.ckpt is None:
        print(f"[{path}]", file=sys.stderr)
    labels = check_kind(tokenizer, path, args)
    if args.analogy is not None:
        show_analogies(args, tokenizer, model.embed.weight.detach().cpu())
    elif args.serve is not None:
        from data.server import serve  # see make_service

        model = model if labels else fast_model(model, args.slots, args)
        service = make_service(model, tokenizer, path, args, tools)
        return serve(service, args.host or "127.0.0.1", args.serve)
    elif args.chat:
        model, settings = fast_model(model, 1, args), decoding_settings(args)
        options = args.max_new_tokens, args.seed, settings, not args.no_draft
        chat = make_chat(model, tokenizer, tools, *options)
        if problem := chat.tools_problem():
            print(f"[{problem}]", file=sys.stderr)
        if args.system:
            chat.command(f"/system {args.system}")
        talk(chat)
    elif labels:
        prompts = read_prompts(args, tokenizer, model.config.vocab_size)
        for shares in label_shares(model, tokenizer, prompts):
            print("  ".join(f"{name} {p:.3f}" for name, p in shares))
    else:
        prompts = read_prompts(args, tokenizer, model.config.vocab_size)
        model = fast_model(model, args.beams or len(prompts) * args.num_samples, args)
        if args.beams:
            ids = [i for p in prompts for i in write_beams(model, tokenizer, p, args)]
        else:
            ids = write_rows(model, tokenizer, prompts, args)
        if args.print_ids:
            print("\n".join(",".join(map(str, row)) for row in ids))


if __name__ == "__main__":
    run_cli(main)
