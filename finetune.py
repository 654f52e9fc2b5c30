"""Fine-tune: from a model that completes text to one that answers.

    python finetune.py --ckpt out/hotel --data hotel            a bot that calls a search tool
    python finetune.py --data sentiment                         label film reviews
    python finetune.py --data my_chats.jsonl --lora_rank 8      a few parameters only
    python finetune.py --data pairs.json                        preference pairs: DPO
    python finetune.py --data hotel --objective grpo --reward slots   sampled answers, rewarded
    python finetune.py --data my_chats.jsonl --show_mask 2      what is learned, token by token

It writes a run as train.py does, with the same loop (train.fit), then predictions.jsonl and
scores.json. data/rows.py recognises the rows by their shape: chats (Alpaca, ShareGPT, OpenAI
messages, hotel dialogues), labelled texts, preference pairs.
"""

import argparse
import contextlib
import copy
import itertools
import math
import random
import sys
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import lora
import model as lm
import train
from data import batches, chat, cli
from data.cli import Parser, UserError, at_least, between, first_process, positive, run_cli, share
from data.costs import check_memory
from data.files import dump_lines, write_json
from data.machine import DTYPES, fast_products, make_runtime, shard_like
from data.progress import shown, watched
from data.reply import parse
from data.rewards import REWARDS, load_env, load_reward, rate
from data.row_files import ROW_SUFFIXES
from data.rows import as_chat, first_words, load_data, report_bad, to_example
from data.runs import json_lines, newest_run, run_folder, run_settings
from data.scores import chat_scores, confusion, macro_f1
from data.sources import ROW_SETS, SOURCES
from data.tokenizer import REWARD_TOKEN, Tokenizer, label_token, labels_of, warn_unknown
from prepare_data import default_name
from sample import Engine, allowed_ids, classify, load

# --------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------

# Added to train.RECIPE. The rates are lower than for a new model, which has nothing to lose.
RECIPE = train.RECIPE | train.optimizer_rates() | dict(
    best_by="val_loss", split="val", val=0.1, epochs=3.0, batch_tokens=4096,
    loss_on="assistant", augment=0.0, token_dropout=0.0, eval_every=100, eval_rows=64,
    lr=1e-3, embed_lr=3e-3, head_lr=3e-3, muon_lr=0.01, weight_decay=0.0,
    warmup_steps=None,  # WARMUP, or less in a short run
    lora_rank=0, lora_alpha=None, lora_dropout=0.0, lora_targets="all",  # alpha: twice the rank
)  # fmt: skip

WARMUP, LORA_FLAGS = 20, {"lora_targets", "lora_alpha", "lora_dropout"}
# Where the base lacks special tokens, its tables are trained in full, at a lower rate.
LORA_RECIPE = dict(lr=3e-3, embed_lr=1e-3, head_lr=1e-3)

# What a resumed run cannot change
FIXED = {
    "ckpt", "objective", "optimizer", "seed", "loss_on", "teacher", "quantize", "val", "context",
    "batch_tokens", "augment", "best_by", "env", "reward", "samples", "updates", "kl", "lora_rank",
    "lora_alpha", "lora_dropout", "lora_targets",
}  # fmt: skip

# --------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------


def dpo_margin(model, ids, targets, places, reference):
    """(P, 2): the log-ratios of chosen and rejected answers, log probability under `model` minus
    that under the reference, for a batch of `DPO.batch`."""
    logps = model(ids, targets, output="log_probs", places=places).sum(1)  # (2 P,)
    return torch.stack(logps.chunk(2), dim=1) - reference


def preference_loss(rewards):
    """-log sigmoid(reward of chosen - reward of rejected), summed over pairs, for rewards (P, 2).
    Bradley and Terry 1952. If the rewards are beta times `dpo_margin`, this is DPO: Rafailov et al.
    2023, equation 7."""
    chosen, rejected = rewards.unbind(1)
    return -F.logsigmoid(chosen - rejected).sum()


def grpo_loss(logps, old, reference, advantage, places, clip, kl):
    """Group-relative policy optimisation: the loss of each sampled id is

        -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) + kl (q - log q - 1)

    summed over these ids. A is the advantage of the answer; ratio is the id's probability divided
    by `old`, the probability when it was sampled; q is the reference's probability divided by the
    model's: q - log q - 1 is never negative, and its mean is an unbiased estimate of
    KL(model || reference) (Schulman 2020). Shao et al. 2024, equation 3, without its division by
    length and by standard deviation (Liu et al. 2025).

    logps, old, reference: log probabilities (N, T); advantage (N, 1); places: the `target_places`.
    Returns tensors: loss, share of ids whose ratio is clipped, mean of the KL term.
    """
    ratio, log_q = (logps - old).exp(), reference - logps
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    divergence = log_q.expm1() - log_q
    clipped, loss = (gain < ratio * advantage).float(), kl * divergence - gain
    loss, clipped, divergence = (t.flatten()[places] for t in (loss, clipped, divergence))
    return loss.sum(), clipped.mean(), divergence.detach().mean()


def distill_loss(model, ids, targets, places, teacher, weight, temperature):
    """weight * cross-entropy + (1 - weight) * T^2 * KL(teacher || model), summed over the targets;
    the temperature T softens both distributions. Hinton et al. 2015, section 2."""
    logits = model(ids, targets, output="logits", places=places).float()  # (N, V)
    with torch.no_grad():
        taught = teacher(ids, targets, output="logits", places=places).float()
    V, T = min(logits.shape[1], taught.shape[1]), temperature  # one may have more spare rows
    ours, theirs = (x[:, :V].div(T).log_softmax(-1) for x in (logits, taught))
    kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    hard = F.cross_entropy(logits, targets.flatten()[places], reduction="sum")
    return weight * hard + (1 - weight) * T**2 * kl


# --------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------


def max_answer(context):
    """The largest number of ids in an answer."""
    return min(160, context // 2)


def answer_jobs(examples, limit=None, calls_only=False):
    """The assistant's turns that follow a message, as Turns; at most `limit`, evenly spaced."""
    jobs = [
        batches.Turn(e["messages"][:i], m, e.get("tools"))
        for e in examples
        for i, m in enumerate(e["messages"])
        if m["role"] == "assistant" and i and m.get("weight", 1)
        and (m.get("tool_calls") or not calls_only)
    ]
    if not limit or limit >= len(jobs):
        return jobs
    return [jobs[i * len(jobs) // limit] for i in range(limit)]


def job_prompt(job, tokenizer, context):
    """The ids of the chat before a Turn, cut so that an answer fits in the context after them."""
    room = context - max_answer(context)
    return chat.get_template(tokenizer).fit_prompt(job.messages, job.tools, room)


def generate_turns(model, tokenizer, prompts, seeds=None, follow=None):
    """The turns that the model writes after the prompts: (lists of ids, messages). They are greedy,
    or sampled with one seed per prompt. When a turn ends, a waiting prompt takes its place. If
    follow(index of the prompt, ids) has extended its prompt and returns True, that one is next."""
    template, max_tokens = chat.get_template(tokenizer), max_answer(model.config.context)
    options = dict(allowed=allowed_ids(model, tokenizer, chat=True), ends=template.ends)
    options["max_new_tokens"] = max_tokens
    turns, waiting, running = [[] for _ in prompts], deque(range(len(prompts))), {}
    seeds = seeds and list(seeds)
    engine = Engine(model, min(48, len(prompts)), 256)
    with shown("answer", lambda: len(prompts) - len(waiting) - len(running), len(prompts)):
        while waiting or running:
            while waiting and engine.busy < len(engine.texts):
                i = waiting.popleft()
                drawing = {"seed": seeds[i]} if seeds else {"temperature": 0.0}
                running[engine.add(prompts[i], **options, **drawing)] = i
            for slot, ids in engine.step().items():
                turn = turns[running[slot]]
                turn += ids
                if ids[-1] in template.ends or len(turn) == max_tokens:
                    engine.remove(slot)
                    i = running.pop(slot)
                    if follow and follow(i, turn):
                        turns[i] = []
                        waiting.appendleft(i)
                        if seeds:
                            seeds[i] += 1
    return turns, [parse(ids, template, prompt) for ids, prompt in zip(turns, prompts)]


def converse(model, tokenizer, env, starts, seeds=None):
    """Whole conversations of the model with copies of an environment, reset with the seeds
    `starts`: ([messages], [Row], [reward]). The Rows hold the ids that were read and drawn; only
    the latter are learned. The context may end a conversation before the environment does."""
    template, envs = chat.get_template(tokenizer), [copy.copy(env) for _ in starts]
    room = model.config.context - max_answer(model.config.context)
    with cli.user_code("reset(seed) of --env fails"):
        talks = [list(env.reset(start)) for env, start in zip(envs, starts)]
        prompts = [template.fit_prompt(messages, None, room) for messages in talks]
    rows = [batches.Row(ids, [0] * len(ids)) for ids in prompts]  # `follow` makes both longer

    def follow(i, turn):
        row, messages = rows[i], talks[i]
        messages.append(parse(turn, template, row.ids))
        row.ids += turn
        row.mask += [1] * len(turn)
        if turn[-1] != template.end:
            return False
        with cli.user_code("step(message) of --env fails, or returns no (new messages, done)"):
            new, done = envs[i].step(messages[-1])
            ids = [] if done else template.next_ids(messages, new)
            messages[:] = messages + new
        if done or len(row.ids + ids) > room:
            return False
        row.ids += ids
        row.mask += [0] * len(ids)
        return True

    generate_turns(model, tokenizer, prompts, seeds, follow)
    with cli.user_code("reward(messages) of --env fails"):
        rewards = [float(env.reward(messages)) for env, messages in zip(envs, talks)]
    if wrong := [r for r in rewards if not math.isfinite(r)]:
        raise UserError(f"reward(messages) of --env returns {wrong[0]}, not a finite number")
    return talks, rows, rewards


def answer(model, tokenizer, jobs):
    """The model's greedy answers to `answer_jobs`, as messages."""
    prompts = [job_prompt(job, tokenizer, model.config.context) for job in jobs]
    return generate_turns(model, tokenizer, prompts)[1]


# --------------------------------------------------------------------------------------------
# Objectives: what is learned from rows, and how that is measured
# --------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Examples, and the rows that an objective made of them."""

    examples: list
    rows: list
    prompts: list = field(default_factory=list)  # for GRPO, which learns from them, not `rows`
    env: object = None  # for GRPO: the environment, in place of prompts from the rows
    reference: torch.Tensor | None = None  # for DPO: log probabilities (N, 2) before training


class SFT:
    """Chats: the assistant's turns are learned. The other objectives override what differs.

    To add an objective, write a class like these and enter it in OBJECTIVES. It can use self.args,
    self.tokenizer, self.labels and self.runtime (a Runtime).
    """

    kinds, noun, figure = ("chat",), "conversations", "slot_f1"  # figure: what --best_by may name
    curves, unit = train.Task.curves, train.Task.unit  # of loss.svg
    flags = {}  # flags of this objective alone: {name: (argparse type, help)}
    recipe = {}  # the defaults of `flags`, and what differs from RECIPE

    @staticmethod
    def special_tokens(tokenizer, splits, labels):
        """The special tokens that the rows of `splits` need: those of our chat template, unless the
        tokenizer brings a template, and those around thoughts, if there are any."""
        template, examples = chat.get_template(tokenizer), itertools.chain(*splits.values())
        thoughts = any(m.get("reasoning_content") for e in examples for m in e.get("messages", ()))
        names = list(chat.CHAT_TOKENS) if template is None else []
        return [*names, *(chat.THINK if thoughts and (names or template.ours) else ())]

    def __init__(self, args, tokenizer, labels=(), runtime=None):
        self.args, self.tokenizer, self.labels, self.runtime = args, tokenizer, labels, runtime

    def rows(self, example):
        """The rows of an example: a list of Rows or of tuples of Rows."""
        return batches.chat_rows(example, self.tokenizer, self.args.context, self.args.loss_on)

    def make_split(self, examples):
        """The Split of examples, without rows that have no target, from which nothing can be
        learned, and without examples that the chat template refuses."""
        split, bad = Split([], []), []
        for example in watched(examples, "making rows of example"):
            try:
                rows = self.rows(example)
            except ValueError as e:
                bad.append((repr(shorten(first_words(example), 60)), str(e)))
                continue
            split.examples.append(example)
            split.rows += filter(batches.has_target, rows)
        if bad:
            report_bad(bad, len(examples), self.args.data)
        tools = any("tools" in e for e in split.examples)
        if tools and not chat.get_template(self.tokenizer).supports_tools:
            print("[the chat template has no place for tools: they are left out]", file=sys.stderr)
        if not split.rows:
            raise UserError(f"no row has anything to learn with --loss_on {self.args.loss_on}")
        return split

    def start(self, model, splits, saved):
        """Called before the first step with {name: Split} and the content of the last.pt to resume,
        or None. Returns what checkpoints keep for the objective."""
        return {}

    def batch(self, split, numbers, rows, number=0):
        """The tensors of batch `number` of the run, made of `rows` (their indices: `numbers`)."""
        ids, targets = batches.pad(rows)
        return ids, targets, lm.target_places(targets)

    def loss(self, model, ids, targets, places):
        """The summed loss of a batch."""
        return model(ids, targets, places=places)

    def count(self, *batch):
        """What the sum of the loss is divided by: the length of the batch's last tensor."""
        return len(batch[-1])

    def evaluate(self, model, split, when="end"):
        """The loss per target and, after a "step", the scores of answers to --eval_rows of the
        questions, which only rank 0 generates; `report` answers all questions in the end."""
        losses, count = [torch.zeros((), device=self.runtime.device)], 0
        buckets = batches.bucket(range(len(split.rows)), split.rows, self.args.batch_tokens)
        for numbers, counts in watched(list(self.runtime.share(buckets)), "validating: batch"):
            batch = SFT.batch(self, split, numbers, [split.rows[i] for i in numbers])
            ids, targets, places = self.runtime.upload(batch)
            losses.append(counts * model(ids, targets, places=places))  # read later: no GPU sync
            count += counts * len(places)
        loss, targets = self.runtime.total(sum(torch.stack(losses).tolist()), count)
        scores, answers = {"val_loss": loss / targets}, self.args.eval_rows and when == "step"
        if answers and (self.runtime.rank == 0 or self.runtime.sharded):
            jobs = self.jobs(split, self.args.eval_rows)
            scores |= self.scores(split, jobs, answer(model, self.tokenizer, jobs))
        return scores

    def jobs(self, split, limit=None):
        """The `answer_jobs` of the turns that are learned."""
        return answer_jobs(split.examples, limit, self.args.loss_on == "call")

    def scores(self, split, jobs, turns):
        """The figures of answers to jobs, and those that the data set adds."""
        scores, source = chat_scores(jobs, turns), SOURCES.get(self.args.data)
        return scores | (source.scores(jobs, turns) if source and source.scores else {})

    def report(self, model, split):
        """(figures of a whole Split, rows for predictions.jsonl, lines to print)."""
        jobs, rows, lines = self.jobs(split), [], []
        turns = answer(model, self.tokenizer, jobs)
        for job, turn in zip(jobs, turns):
            prompt = chat.message_text(job.messages[-1])
            rows.append({"prompt": prompt, "reference": job.wanted, "prediction": turn})
        for row in rows[:: max(1, len(rows) // 4)][:4]:
            lines.append(f"  asked      {shorten(row['prompt'])}")
            lines.append(f"  reference  {shorten(chat.message_text(row['reference']))}")
            lines.append(f"  answered   {shorten(chat.message_text(row['prediction']))}\n")
        return self.scores(split, jobs, turns), rows, lines

    def metrics(self):
        """Further metrics for metrics.jsonl, averaged over the steps since the last call."""
        return {}


class Classify(SFT):
    """Labelled texts: a special token for the label follows the end of the text."""

    kinds, noun, figure = ("label",), "labelled texts", "accuracy"
    recipe = dict(best_by="accuracy")  # the loss rises while the accuracy still improves

    @staticmethod
    def special_tokens(tokenizer, splits, labels):
        return [label_token(name) for name in labels]

    def rows(self, example):
        text, label = example["text"], example["label"]
        return [batches.label_row(text, label, self.tokenizer, self.args.context)]

    def start(self, model, splits, saved):
        self.label_ids = [self.tokenizer.special[label_token(name)] for name in self.labels]
        rows = torch.arange(model.config.vocab_size, device=self.runtime.device)
        self.allowed = torch.isin(rows, torch.tensor(self.label_ids, device=rows.device))
        return {}

    def loss(self, model, ids, targets, places):
        """The summed loss over the label tokens alone, as in `report`."""
        logps = model(ids, targets, output="log_probs", allowed=self.allowed, places=places)
        return -logps.sum()

    def evaluate(self, model, split, when="end"):
        return self.report(model, split)[0]

    def report(self, model, split):
        """The figures are over the label tokens alone; the lines show the confusion matrix."""
        logps = classify(model, [row.ids[:-1] for row in split.rows], self.label_ids)  # (N, labels)
        wanted = torch.tensor([self.labels.index(e["label"]) for e in split.examples])
        best, rows = logps.argmax(1), []
        table = confusion(best.numpy(), wanted.numpy(), len(self.labels))
        scores = {"val_loss": float(F.nll_loss(logps, wanted))}
        scores |= {"accuracy": float((best == wanted).float().mean()), "f1": macro_f1(table)}
        for e, i, p in zip(split.examples, best, logps.exp().tolist()):
            row = {"text": e["text"], "reference": e["label"], "prediction": self.labels[i]}
            rows.append(row | {"p": p})
        names = [shorten(name, 11) for name in self.labels]
        lines = ["rows: the right label, columns: the predicted one"]
        lines += [" " * 12 + "".join(f"{name:>12}" for name in names)]
        lines += [f"{n:>12}" + "".join(f"{c:12}" for c in row) for n, row in zip(names, table)]
        return scores, rows, lines


class DPO(SFT):
    """Preference pairs (Rafailov et al. 2023): the chosen answer becomes likelier than the rejected
    one, relative to the reference, which is the model before training."""

    kinds, noun, figure = ("prefer",), "preference pairs", "reward_accuracy"
    flags = {"dpo_beta": (positive, "strength of the pull towards the reference")}
    recipe = dict(dpo_beta=0.1, lr=1e-4, embed_lr=1e-4, head_lr=1e-4, muon_lr=1e-3, epochs=1.0)

    def rows(self, example):
        return [batches.preference_rows(example, self.tokenizer, self.args.context)]

    def start(self, model, splits, saved):
        """Compute the log probabilities of all answers under the reference, once."""
        if self.args.eval_only and not lora.adapted(model):
            why = f"pairs are measured against the model before DPO, which {self.args.ckpt} lacks"
            advice = "see its metrics.jsonl, train with --lora_rank, or name --objective reward"
            raise UserError(f"{why}: {advice}")
        reference = dict(saved["reference"]) if saved else {}
        new = {name: split for name, split in splits.items() if name not in reference}
        if new and saved and not lora.adapted(model):
            why = f"there are no pairs of {min(new)} in this run's reference, the model before DPO"
            raise UserError(f"{why}: resume it with --split val")
        with lm.evaluating(model), self.runtime.autocast(), lora.disable_adapter(model):
            logps = partial(dpo_margin, model)  # split.reference is None: zeros are subtracted
            reference |= {name: self.over_pairs(split, logps) for name, split in new.items()}
        for name, split in splits.items():
            split.reference = reference[name]
        return {"reference": reference}

    def batch(self, split, numbers, rows, number=0):
        """(ids, targets, places, reference): the chosen rows, then the rejected ones; log
        probabilities (P, 2) under the reference."""
        reference = split.reference
        reference = torch.zeros(len(rows), 2) if reference is None else reference[numbers]
        rows = [row for side in zip(*rows) for row in side]
        return *super().batch(split, numbers, rows), reference

    def rewards(self, model, *batch):
        """(P, 2): the rewards of chosen and rejected answers, beta times `dpo_margin`."""
        return self.args.dpo_beta * dpo_margin(model, *batch)

    def loss(self, model, *batch):
        return preference_loss(self.rewards(model, *batch))

    @fast_products()  # as in training, so that both agree at the start
    def over_pairs(self, split, measure):
        """measure(*batch) -> (P, 2), computed in batches for all N pairs of the Split: (N, 2)."""
        measured, out = [], torch.zeros(len(split.rows), 2)
        buckets = batches.bucket(range(len(split.rows)), split.rows, self.args.batch_tokens)
        for numbers in watched(buckets, "measuring: batch"):
            batch = self.batch(split, numbers, [split.rows[i] for i in numbers])
            measured.append(measure(*self.runtime.upload(batch)))
        out[list(itertools.chain(*buckets))] = torch.cat(measured).cpu()
        return out

    def evaluate(self, model, split, when="end"):
        """The loss, the share of pairs whose chosen answer has the larger reward, mean rewards."""
        rewards = self.over_pairs(split, partial(self.rewards, model))
        chosen, rejected = rewards.unbind(1)
        means = {"accuracy": chosen > rejected, "chosen": chosen, "rejected": rejected}
        means["margin"] = chosen - rejected
        scores = {"val_loss": float(preference_loss(rewards)) / len(rewards)}
        return scores | {f"reward_{name}": float(v.float().mean()) for name, v in means.items()}

    def report(self, model, split):
        return self.evaluate(model, split), [], []


class Distill(SFT):
    """Chats that are learned from a teacher's probabilities as well (Hinton et al. 2015)."""

    flags = {
        "teacher": (str, "checkpoint of the teacher"),
        "distill_lambda": (share, "share of the cross-entropy"),
        "distill_temperature": (positive, "temperature that softens both distributions"),
    }
    recipe = dict(teacher=None, distill_lambda=0.5, distill_temperature=2.0)

    def start(self, model, splits, saved):
        name, device = self.args.teacher, str(self.runtime.device)
        self.teacher, tokenizer, _ = load(name, device, "fp32")
        if tokenizer.spec != self.tokenizer.spec:
            advice = "name a model with the tokenizer of --ckpt, fine-tuned on such rows"
            raise UserError(f"--teacher {name} has other tokens: {advice}")
        return {}

    def loss(self, model, ids, targets, places):
        options = self.args.distill_lambda, self.args.distill_temperature
        return distill_loss(model, ids, targets, places, self.teacher, *options)


# --------------------------------------------------------------------------------------------
# Rewards: a model that rewards answers, and one that learns from rewards
# --------------------------------------------------------------------------------------------


class RewardModel(DPO):
    """Preference pairs: a scalar head learns to give the chosen answer more than the rejected one
    (Ouyang et al. 2022, equation 1). The head is the output row of an added token."""

    flags = {}

    @staticmethod
    def special_tokens(tokenizer, splits, labels):
        return [*SFT.special_tokens(tokenizer, splits, labels), REWARD_TOKEN]

    def rows(self, example):
        pair = batches.preference_rows(example, self.tokenizer, self.args.context - 1)
        token = self.tokenizer.special[REWARD_TOKEN]  # the only target: its logit is the reward
        return [tuple(batches.Row([*r.ids, token], [0] * len(r.ids) + [1], r.cut) for r in pair)]

    def start(self, model, splits, saved):
        return {}  # there is no reference

    def rewards(self, model, ids, targets, places, reference):
        token = self.tokenizer.special[REWARD_TOKEN]
        logits = model(ids, targets, output="logits", places=places)[:, token].float()
        return torch.stack(logits.chunk(2), dim=1)


def load_rewards(source, device):
    """The function of --reward. It takes pairs (Turn, answer) and returns a reward for each; None
    if no reward applies to that turn. If --reward names several, separated by commas, each turn
    gets the first one that applies."""

    def load_function(name):
        if name not in REWARDS and not name.endswith(".py"):
            return model_reward(name, device)
        reward = load_reward(name)
        return lambda messages, answer, wanted, tools: reward(messages, answer, wanted)

    def reward(job, answer):
        turn = job.messages, answer, job.wanted, job.tools
        return next((r for f in functions if (r := rate(f, *turn)) is not None), None)

    functions = [load_function(name.strip()) for name in source.split(",")]
    return lambda answers: [reward(*answer) for answer in answers]


def model_reward(source, device):
    """The reward function of a reward model. The keys and values of the last prompt are kept for
    further answers to it."""
    try:
        model, tokenizer, where = load(source, device, "fp32")
    except UserError as e:
        raise UserError(f"--reward {source} is not one of {', '.join(REWARDS)}, and {e}") from e
    if REWARD_TOKEN not in tokenizer.special:
        raise UserError(f"{where} is not a reward model: --objective reward makes one")
    token, context = tokenizer.special[REWARD_TOKEN], model.config.context - 1
    device = model.head.weight.device

    @lru_cache(1)
    def read(prompt):
        shared = SharedPrompt(model)
        model(torch.tensor([prompt], device=device), cache=shared)
        return shared

    @torch.no_grad()
    def reward(messages, answer, wanted, tools):
        if answer is wanted:  # asked whether this reward is for the turn
            return 0.0
        talk = {"messages": [*messages, answer], "tools": tools}
        row = batches.chat_rows(talk, tokenizer, context, first=len(messages))[-1]
        n = row.mask.index(1)
        with torch.autocast(device.type, enabled=False):
            ids, shared = torch.tensor([row.ids[n:]], device=device), read(tuple(row.ids[:n]))
            return model(ids, cache=copy.copy(shared))[0, -1, token].item()

    return reward


class SharedPrompt(lm.KVCache):
    """Keys and values of a prompt, with their gradients, for all rows that go on from it."""

    def __init__(self, model):
        super().__init__(model, batch=0)
        self.ids, self.lengths = self.ids.new_empty(1, 0), torch.zeros(1, dtype=torch.long)
        self.kept = {}

    def begin(self, ids):
        """See `KVCache.begin`."""
        start = self.ids.shape[1]
        self.ids = torch.cat([self.ids.expand(len(ids), -1), ids], dim=1)
        return lm.NewTokens(slice(start, start + ids.shape[1]))

    def update(self, i, new, *keys_and_values):
        """See `KVCache.update`."""
        if not new.positions.start:
            self.kept[i] = keys_and_values
            return keys_and_values
        old = (t.expand(len(keys_and_values[0]), -1, -1, -1) for t in self.kept[i])
        return [torch.cat(pair, dim=2) for pair in zip(old, keys_and_values)]

    def seen_ids(self, new):
        """See `KVCache.seen_ids`."""
        return self.ids


def group_logps(runner, model, ids, targets, groups, allowed=None):
    """Log probabilities (N, T) of the answers' ids among the `allowed` ones, for a batch as
    `GRPO.batch` makes it. Each prompt is computed once. `runner`: see train.make_runner."""
    logps = []
    for row, group, (n, T, places) in zip(ids, targets.chunk(len(ids)), groups):
        shared, prompt = SharedPrompt(model), row[None, :n]
        nothing = torch.full_like(prompt, -100)
        runner(prompt, nothing, shared, output="log_probs", places=places[:0])
        answers, wanted = row[n : n + len(group) * T].view(-1, T), group[:, :T].contiguous()
        options = dict(output="log_probs", allowed=allowed, places=places)
        logps.append(F.pad(runner(answers, wanted, shared, **options), (0, group.shape[1] - T)))
    return torch.cat(logps)


class GRPO(SFT):
    """Answers are sampled and get rewards. An answer becomes likelier or less likely by how much
    its reward is above the mean of its group, the answers to the same prompt (Shao et al. 2024)."""

    kinds, noun, figure = ("chat", "prefer", "label"), "examples", "val_reward"
    curves, unit = (("drawn", "reward"), ("greedy, validation", "val_reward")), "reward"
    flags = {
        "reward": (str, f"what is learned from: {', '.join(REWARDS)}, a .py file with a function "
                   "reward(messages, answer, wanted), or a run of --objective reward; "
                   "slots,faithful uses the first that applies"),
        "env": (str, "the environment to talk to instead: hotel, or a .py file whose class Env has "
                "reset(seed), step(message) and reward(messages)"),
        "samples": (between(2, 4096, int), "answers sampled for each prompt"),
        "updates": (at_least(1), "optimizer steps with the same answers"),
        "clip": (positive, "ratios of probabilities are clipped to 1 +- this"),
        "kl": (at_least(0, float), "weight of the KL divergence from the initial model"),
        "pairs": (str, "with --eval_only: a file for preference pairs, the best of the answers to "
                  "each prompt and a worse one"),
    }  # fmt: skip
    recipe = dict(
        reward=None, env=None, samples=8, updates=1, clip=0.2, kl=0.0, pairs=None,
        best_by="val_reward", lr=1e-4, embed_lr=1e-4, head_lr=1e-4, muon_lr=1e-3, epochs=1.0,
        batch_tokens=8192, grad_accum=4, eval_every=20, log_every=5,
        compile=False,  # blocks are not compiled for what follows a cached prompt
    )  # fmt: skip

    def __init__(self, *args):
        super().__init__(*args)
        self.env = load_env(self.args.env) if self.args.env else None
        self.rewards = None if self.env else load_rewards(self.args.reward, self.args.device)
        self.figures = defaultdict(list)  # of each micro-batch since the last line of the log

    def make_split(self, examples):
        """The Split of examples as chats, with a Prompt for each turn that the reward applies to,
        or, with an environment, one for each conversation to be held."""
        split, context = super().make_split([as_chat(e) for e in examples]), self.args.context
        if self.env:
            room = self.args.samples * context
            split.prompts = [batches.Prompt([0], n, room) for n in range(len(split.examples))]
            with cli.user_code("--env cannot be made"):
                split.env = self.env(split.examples)
            return split
        jobs = self.jobs(split)
        rewards = self.rewards([(job, job.wanted) for job in jobs])
        for job, reward in zip(jobs, rewards):
            if reward is not None:
                ids = job_prompt(job, self.tokenizer, context)
                room = self.args.samples * max_answer(context)
                split.prompts.append(batches.Prompt(ids, job, room))
        if not split.prompts:
            raise UserError(f"--reward {self.args.reward} is None for all of these turns")
        return split

    def start(self, model, splits, saved):
        """Load the reference: the weights at the start, or the base of an adapter. A resumed run
        keeps the answers that rank 0 sampled for further updates; other ranks sample anew."""
        self.model, self.reference = model, None
        # normalised over these ids: otherwise ids that are never sampled would gain probability
        self.allowed = allowed_ids(model, self.tokenizer, chat=True)
        if self.args.kl and not lora.adapted(model):
            base = lm.load_checkpoint(self.args.ckpt)
            n_vocab = Tokenizer(base["tokenizer"]).n_vocab
            self.reference = lm.model_from_checkpoint(base)
            lm.grow_vocabulary(self.reference, model.config.vocab_size, n_vocab)
            self.reference.to(self.runtime.device)
        self.sampled = saved.get("sampled", {}) if saved else {}  # {number: batch}
        return {"sampled": self.sampled}

    def batch(self, split, numbers, rows, number=0):
        """Sample answers to the prompts in `rows`. Keeps only groups whose rewards differ; the
        others have zero advantage. Returns

            ids        a row for each group: the prompt without its last id, then the answers, each
                       after that id and as long as the longest
            targets    (N, T), a row for each answer; then their places
            groups     the length of the prompt without its last id, that of the longest answer, and
                       the places of the targets in as many columns, of each group
            advantage  (N, 1)
            old, reference   log probabilities (N, T) when sampled, and under the reference
            rewards    of all sampled answers
        """
        a = self.args
        if number in self.sampled:
            return self.sampled[number]
        prompts = [p for p in rows for _ in range(a.samples)]
        seeds = np.random.default_rng((a.seed, 2, number)).integers(2**62, size=len(prompts))
        with lm.evaluating(self.model) as model, self.runtime.autocast():
            _, texts, rewards = self.sample(model, split, prompts, seeds.tolist())
        starts = [row.mask.index(1) for row in texts]  # the lengths of the prompts
        rewards = torch.tensor(rewards).view(-1, a.samples)  # (groups, samples)
        spread = rewards.std(1)
        self.figures["reward"] += rewards.flatten().tolist()
        self.figures["reward_std"] += spread.tolist()
        self.figures["equal_groups"] += (spread < 1e-6).tolist()
        self.figures["answer_tokens"] += [sum(row.mask) for row in texts]
        keep = (spread >= 1e-6) | bool(a.kl)
        keep[0] |= not keep.any()  # a batch has one group at least
        advantage = (rewards - rewards.mean(1, keepdim=True))[keep].view(-1, 1)
        tails = [batches.Row(t.ids[n - 1 :], t.mask[n - 1 :]) for t, n in zip(texts, starts)]
        groups = [t.view(len(rows), a.samples, -1)[keep] for t in batches.pad(tails)]
        pairs = zip(texts[:: a.samples], starts[:: a.samples], keep)
        heads = [torch.tensor(t.ids[: n - 1]) for t, n, kept in pairs if kept]
        texts, parts = [], []
        for head, ids, goals in zip(heads, *groups):
            T = int((goals != -100).any(0).nonzero().max()) + 1  # up to the last target of any
            texts.append(torch.cat([head, ids[:, :T].flatten()]))
            parts.append((len(head), T, lm.target_places(goals[:, :T])))
        ids, targets = batches.pad_sequence(texts, True), groups[1].flatten(0, 1)
        logps = self.fixed_logps(ids, targets, parts)
        places = lm.target_places(targets)
        batch = ids, targets, places, parts, advantage, *logps, rewards.flatten()
        if a.updates > 1:
            if number % a.grad_accum == 0:  # the first of a new step
                self.sampled.clear()
            self.sampled[number] = batch
        return batch

    def sample(self, model, split, prompts, seeds):
        """Returns the messages written after the prompts (with an environment, the conversations),
        the Rows of both, and the rewards."""
        if split.env:
            return converse(model, self.tokenizer, split.env, [p.turn for p in prompts], seeds)
        answers, turns = generate_turns(model, self.tokenizer, [p.ids for p in prompts], seeds)
        jobs = [p.turn for p in prompts]
        rewards = self.rewards(zip(jobs, turns))
        if None in rewards:
            question = chat.message_text(jobs[rewards.index(None)].messages[-1])
            raise UserError(f"the reward of an answer to {question!r:.80} is None")
        pairs = [(p.ids, new) for p, new in zip(prompts, answers)]
        rows = [batches.Row(p + new, [0] * len(p) + [1] * len(new)) for p, new in pairs]
        return turns, rows, rewards

    def pairs(self, model, split):
        """Sample answers to each prompt and return preference pairs in the page's format: the
        chosen answer has the largest reward, and the rejected one is a random one with a smaller
        reward. (Choosing one of similar length taught a policy to leave facts out.)"""
        samples, rng, found = self.args.samples, random.Random(self.args.seed), []
        prompts = [p for p in split.prompts for _ in range(samples)]
        turns, _, rewards = self.sample(model, split, prompts, range(len(prompts)))
        print(f"mean reward of {len(turns):,} sampled answers: {np.mean(rewards):.4f}")
        for start in range(0, len(prompts), samples):
            group = range(start, start + samples)
            best = max(group, key=rewards.__getitem__)
            if worse := [turns[i] for i in group if rewards[i] < rewards[best]]:
                sides = {"chosen": [turns[best]], "rejected": [rng.choice(worse)]}
                turn = prompts[start].turn
                row = {"prompt": turn.messages, **sides}
                row |= {"tools": turn.tools} if turn.tools else {}
                with contextlib.suppress(ValueError):  # rows cannot hold every call that was drawn
                    to_example(row)
                    found.append(row)
        if not found:
            raise UserError("no pairs: the answers to each prompt have equal rewards")
        return found

    @fast_products()
    def fixed_logps(self, *batch):
        """`group_logps` under the model now and under the reference; zeros if not needed."""

        def logps(model, needed):
            if not needed:
                return torch.zeros(batch[1].shape)
            with lm.evaluating(model), self.runtime.autocast():
                on_device = self.runtime.upload(batch)
                return group_logps(model, model, *on_device, self.allowed).cpu()

        old = logps(self.model, self.args.updates > 1)
        with lora.disable_adapter(self.model):
            return old, logps(self.reference or self.model, self.args.kl)

    def loss(self, model, ids, targets, places, groups, advantage, old, reference, rewards):
        a, logps = self.args, group_logps(model, self.model, ids, targets, groups, self.allowed)
        old = old if a.updates > 1 else logps.detach()
        reference = reference if a.kl else logps.detach()
        loss, clipped, kl = grpo_loss(logps, old, reference, advantage, places, a.clip, a.kl)
        self.figures["clipped"].append(clipped)
        self.figures["kl"].append(kl)
        self.figures["entropy"].append(-logps.detach().flatten()[places].mean())
        return loss

    def scores(self, split, jobs, turns):
        """The scores of a chat, and the mean reward of the turns that the reward is for, or of
        --eval_rows conversations."""
        if self.env:
            starts = range(self.args.eval_rows or 64)
            rewards = converse(self.model, self.tokenizer, split.env, starts)[2]
        else:
            rewards = self.rewards(zip(jobs, turns))
        rewards = [r for r in rewards if r is not None]
        mean = {"val_reward": sum(rewards) / len(rewards)} if rewards else {}
        return mean | super().scores(split, jobs, turns)

    def metrics(self):
        """Means since the last call: the reward of sampled answers, its standard deviation in a
        group, the share of groups whose rewards are equal, the length of answers; the share of
        clipped ratios, the divergence from the reference, and the mean of -log p of learned ids."""
        names = ["reward", "reward_std", "equal_groups", "answer_tokens", "clipped", "kl"]
        names += ["entropy"]
        values = [list(map(float, self.figures[k])) for k in names]  # only here: a GPU sync each
        sums = self.runtime.total(*map(sum, values), *map(len, values))
        self.figures.clear()
        means = {k: s / n for k, s, n in zip(names, sums, sums[len(names) :]) if n}
        if means.get("equal_groups") == 1 and self.runtime.rank == 0:
            words = "[the answers to each prompt have equal rewards: nothing is learned from them]"
            print("\n" * sys.stdout.isatty() + words, file=sys.stderr)
        return means


# --objective; by default the first one that takes rows of the data's kind
OBJECTIVES = {
    "sft": SFT, "classify": Classify, "dpo": DPO, "distill": Distill, "reward": RewardModel,
    "grpo": GRPO,
}  # fmt: skip
OWN_FLAGS = [name for c in OBJECTIVES.values() for name in c.flags]


# --------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------


def resolve(args):
    """Fill in every flag that the user left out. Returns (args, the objective's class, the content
    of the last.pt to resume or None, {split: examples}, {split: sha256})."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    content, settings = None, given
    if args.resume is not None and not args.eval_only:
        settings, content = train.resumed_settings(args, given, FIXED)
    elif "data" not in given:
        run = {} if args.resume is None else run_settings(args.resume or newest_run())
        data = given["env"] if given.get("env") in ROW_SETS else run.get("data")
        if not data:
            raise UserError(f"--data is missing: a file, or one of {', '.join(ROW_SETS)}")
        settings = given | {"data": data}
    if "ckpt" not in settings:
        settings = settings | {"ckpt": args.resume or str(newest_run())}
    data, fraction = settings["data"], settings.get("val", RECIPE["val"])
    options = {name: settings.get(name) for name in ("rows", "max_rows", "encoding")}
    options["every_row"] = bool(args.eval_only or args.show_mask) and not given.get("val")
    kind, splits, hashes = load_data(data, settings.get("val_data"), fraction, **options)
    if content is not None and content["data"] != hashes:
        raise UserError(f"{data} is not the data that the run began with")
    suitable = [name for name, c in OBJECTIVES.items() if kind in c.kinds]
    name = settings.get("objective", suitable[0])
    if name not in suitable:
        raise UserError(f"--objective {name} does not suit {data}, whose rows are of kind {kind}")
    objective = OBJECTIVES[name]
    if content is None:
        if LORA_FLAGS & set(given) and "lora_rank" not in settings:
            settings = settings | {"lora_rank": 8}
            if first_process():
                print("[flags of LoRA are given: --lora_rank 8]", file=sys.stderr)
        rates = LORA_RECIPE if settings.get("lora_rank") else {}
        recipe = train.scale_rates(RECIPE | rates | objective.recipe, given)
        settings = recipe | settings | {"objective": name}
    settings["split"] = "val" if settings["split"] == "dev" else settings["split"]
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    check_settings(args, objective, splits, given)
    return args, objective, content, splits, hashes


def check_settings(args, objective, splits, given):
    """UserError for settings that do not go together; `given` are those of the command line."""
    a, name, figure = args, f"--objective {args.objective}", objective.figure
    calls = any(m.get("tool_calls") for e in splits["val"] for m in e.get("messages", ()))
    answers = a.eval_rows and (calls or figure != "slot_f1")
    figures = ["val_loss", "last", *([figure] if answers or "chat" not in objective.kinds else [])]
    augmented = [name for name, source in SOURCES.items() if source.augment]
    foreign = [f"--{flag}" for flag in OWN_FLAGS if flag in given and flag not in objective.flags]
    problems = {
        f"{' '.join(foreign)} is not for {name}": foreign,
        f"{name} needs --teacher CKPT": a.objective == "distill" and not a.teacher,
        f"{name} needs either --env or --reward ({', '.join(REWARDS)}, a file or a run)":
            a.objective == "grpo" and bool(a.reward) == bool(a.env),
        "--eval_only takes either --ckpt or --resume": a.eval_only and a.resume and "ckpt" in given,
        "--pairs needs --eval_only and --reward": a.pairs and not (a.eval_only and a.reward),
        "--lora_rank 0 trains all weights, without adapters: leave out the flags of LoRA":
            LORA_FLAGS & set(given) and not a.lora_rank,
        "--quantize freezes the base: add --lora_rank 8, so that there is something to train":
            a.quantize and not a.lora_rank,
        f"--best_by {a.best_by} is not measured here: choose from {', '.join(figures)}":
            not a.eval_only and a.best_by not in figures,
        f"--augment is for --data {', '.join(augmented)}": a.augment and a.data not in augmented,
        f"--shard does not go together with {name}": a.shard and a.objective == "grpo",
        f"--token_dropout does not go together with {name}":
            a.token_dropout and a.objective in ("dpo", "grpo"),
        f"{a.data} has no split {a.split!r}; it has {', '.join(splits)}": a.split not in splits,
    }  # fmt: skip
    for message, wrong in problems.items():
        if wrong:
            raise UserError(message)


def find_labels(splits):
    """The labels of the training rows, sorted; UserError if another split has others."""
    labels = {s: {e["label"] for e in examples if "label" in e} for s, examples in splits.items()}
    if unknown := set().union(*labels.values()) - labels["train"]:
        raise UserError(f"label {min(unknown)!r} is not among the training rows' labels")
    return sorted(labels["train"])


def build_model(args, base, content, special_tokens, runtime):
    """(model, tokenizer, an adapter's settings or None): the model of the checkpoint `base` with
    the tokens of special_tokens(tokenizer), as the resumed run with this `content` left it."""
    bare = lm.checkpoint_tokenizer(base, args.ckpt)
    if args.dropout is not None:
        base = base | {"config": {**base["config"], "dropout": args.dropout}}
    tokenizer = bare.with_special(special_tokens(bare))
    adapter = None
    if content and args.lora_rank:
        model = lora.load_adapted(base, {"default": content}, args.ckpt)
        adapter = content["adapter"]
    else:  # what is quantized or sharded is read layer by layer
        dtype = None if args.quantize or args.shard else torch.float32
        model = lm.model_from_checkpoint(base, dtype=dtype, where=args.ckpt)
    if not content:  # a resumed run has trained its new and spare rows: they stay as they are
        lm.grow_vocabulary(model, lm.padded_vocab(tokenizer.n_vocab), bare.n_vocab)
    if args.lora_rank and not content:
        adapter = dict(targets=args.lora_targets, rank=args.lora_rank, dropout=args.lora_dropout)
        adapter["alpha"] = args.lora_alpha or 2 * args.lora_rank
        # rows of special tokens that the base has never seen must learn
        adapter["modules_to_save"] = [] if tokenizer is bare else ["embed", "value_embed", "head"]
        if args.quantize:
            lora.quantize(model, args.quantize, device=runtime.device)
        lora.add_lora(model, **adapter)
        sha256 = runtime.of_first(None if runtime.rank else lora.fingerprint(base["model"]))
        adapter |= dict(quantize=args.quantize, base=args.ckpt, base_sha256=sha256,
                        base_vocab=bare.n_vocab)  # fmt: skip
    model.grad_checkpoint = bool(args.grad_checkpoint)
    return model, tokenizer, adapter


def make_task(args, objective, splits, loader, extra):
    """The `train.Task` of an objective: batches of the training Split by a BucketLoader."""
    runtime = objective.runtime

    def batch(number):
        numbers, rows = loader.get(number)
        ids, *rest = objective.batch(splits["train"], numbers, rows, number)
        if args.token_dropout:  # so that the model does not rely on single words of a small set
            rng = np.random.default_rng((args.seed, 1, number))
            dropped = torch.from_numpy(rng.random(ids.shape) < args.token_dropout)
            ids = ids.masked_fill(dropped, objective.tokenizer.eos_id)
        return ids, *rest

    def step_batches(step):
        draw = step // (args.updates or 1)  # several steps share their samples
        first = (draw * runtime.world + runtime.rank) * args.grad_accum
        return [batch(first + i) for i in range(args.grad_accum)]

    def evaluate(model, when):  # rank 0 tells the others, so that all decide alike
        with lm.evaluating(model), runtime.autocast():
            return runtime.of_first(objective.evaluate(model, splits["val"], when))

    def score(row):  # the evaluation with the smallest score is the best
        if args.best_by == "last":
            return -row["step"]
        if args.best_by not in row:
            figures = ", ".join(row)
            raise UserError(f"--best_by {args.best_by}: the evaluation only gives {figures}")
        return row["val_loss"] if args.best_by == "val_loss" else -row[args.best_by]

    return train.Task(
        batches=step_batches, evaluate=evaluate, extra=extra, loss=objective.loss,
        count=objective.count, score=score, metrics=objective.metrics, curves=objective.curves,
        unit=objective.unit,
    )  # fmt: skip


def example_questions(examples, count=4):
    """What users ask in `count` of the examples, evenly spaced; the page shows them."""
    questions = [q for q in dict.fromkeys(map(first_words, examples)) if 0 < len(q) <= 160]
    return questions[:: max(1, len(questions) // count)][:count]


def shorten(text, width=160):
    """At most `width` characters of `text`, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def write_report(objective, model, split, out):
    """Print the figures of a model on a Split; write scores.json and predictions.jsonl to `out`."""
    with lm.evaluating(model), objective.runtime.autocast():
        scores, rows, lines = objective.report(model, split)
    if objective.runtime.rank > 0:
        return
    write_json(out / "scores.json", {objective.args.split: scores})
    print(*lines, "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items()), sep="\n")
    if rows:
        (out / "predictions.jsonl").write_text(dump_lines(rows), encoding="utf-8")
        print(f"{out}/predictions.jsonl")


def report_best(model, args, objective, split, result):
    """The closing report on --split, with the best weights of a run, after `train.fit`."""
    out, best = Path(args.out), lm.load_checkpoint(Path(args.out, "best.pt"))
    if "adapter" in best:
        lora.load_adapter(model, best)
    else:
        state = model.state_dict()
        lm.load_weights(model, {k: shard_like(v, state[k]) for k, v in best["model"].items()})
    if objective.runtime.rank == 0:
        start = next(json_lines((out / "metrics.jsonl").read_text(encoding="utf-8")), {})
        if args.best_by == "val_loss" and (start.get("val_loss") or math.inf) < best["best"]:
            print(f"no val loss is below that before training, {start['val_loss']:.4f}: lower --lr")
        print(f"{out}/best.pt, step {best['step']}, on {args.split}:")
    write_report(objective, model, split, out)


def augmented(examples, args, epoch):
    """The examples of an epoch with --augment."""
    rng = random.Random(f"{args.seed} {epoch}")
    return SOURCES[args.data].augment(examples, args.augment, rng)


def evaluate_only(args, objective_class, examples):
    """--eval_only: measure --split, or all rows of a file without --val; write predictions."""
    runtime = make_runtime(args.device, args.dtype)
    model, tokenizer, where = load(args.ckpt, args.device, runtime.dtype)
    args = settle(args, context=train.check_context(args.context, model))
    needed = objective_class.special_tokens(tokenizer, examples, find_labels(examples))
    if missing := [name for name in needed if name not in tokenizer.special]:
        raise UserError(f"{where} does not know {missing[0]}: fine-tune it on such rows first")
    objective = objective_class(args, tokenizer, labels_of(tokenizer), runtime)
    if args.augment:
        examples = examples | {args.split: augmented(examples[args.split], args, "measured")}
    split = objective.make_split(examples[args.split])
    objective.start(model, {args.split: split}, None)
    if args.pairs:
        if Path(args.pairs).exists():
            raise UserError(f"{args.pairs} exists: name another file for --pairs")
        Path(args.pairs).parent.mkdir(parents=True, exist_ok=True)
        with lm.evaluating(model), runtime.autocast():
            pairs = objective.pairs(model, split)
        Path(args.pairs).write_text(dump_lines(pairs), encoding="utf-8")
        return print(f"{args.pairs}: {len(pairs):,} pairs, of {len(split.prompts):,} prompts")
    run = where.parent if where.suffix == ".pt" else where
    out = run_folder(args.out, f"{run.name}-eval", runtime)
    rows = "all rows" if examples["val"] is examples["train"] else args.split
    print(f"measuring {len(split.examples):,} {objective.noun}: {rows} of {args.data}")
    write_report(objective, model, split, out)


def header(model, args, objective, splits, loader):
    """The lines before the first step: what is learned, then those of any run."""
    split, val = splits["train"], splits["val"]
    sizes = [batches.row_size(row) for row in loader.rows]
    longest, tokens = max(length for length, _ in sizes), sum(map(math.prod, sizes))
    cut = sum(any(r.cut for r in batches.sequences(row)) for row in split.rows)
    rows = f"rows of at most {longest:,} tokens, {cut:,} cut to --context"
    if split.prompts:
        longest, answers = max(len(p.ids) for p in loader.rows), f"{args.samples} answers to each"
        rows = f"prompts of at most {longest:,} tokens, {answers} of {max_answer(args.context)}"
        rows = f"conversations, each held {args.samples} times" if split.env else rows
    text = (
        f"{args.out}: {args.objective} from {args.ckpt} on {args.data}: {len(split.examples):,} "
        f"{objective.noun} to learn, {len(val.examples):,} to measure; {len(sizes):,} {rows}; "
        f"{loader.per_epoch:,} batches an epoch"
    )
    runtime, mean = objective.runtime, tokens / sum(n for _, n in sizes)
    per_step = tokens / loader.per_epoch * args.grad_accum * runtime.world
    per_step = None if split.prompts else per_step  # sampled answers may be of any length
    learned = sum(sum(r.mask[1:]) for row in split.rows for r in batches.sequences(row)) / tokens
    lines = train.header(model, args, runtime, args.batch_tokens, per_step, mean, learned)
    return [text, *lines]


def settle(args, **values):
    """`args` with these values; nothing else changes settings after `resolve`."""
    return argparse.Namespace(**vars(args) | values)


def main(argv=None):
    args, objective_class, content, examples, hashes = resolve(build_parser().parse_args(argv))
    if args.eval_only:
        return evaluate_only(args, objective_class, examples)
    labels = find_labels(examples)
    base = content if content and not args.lora_rank else lm.load_checkpoint(args.ckpt)
    previous, config = (content or {}).get("device"), lm.Config.from_dict(base["config"])
    runtime = make_runtime(args.device, args.dtype, previous, config, args.batch_tokens)
    if not (args.quantize or args.shard):  # these read the weights layer by layer
        check_memory(lm.meta_model(config).requires_grad_(not args.lora_rank), 0, runtime.device)
    torch.manual_seed(args.seed)
    special_tokens = partial(objective_class.special_tokens, splits=examples, labels=labels)
    model, tokenizer, adapter = build_model(args, base, content, special_tokens, runtime)
    args = settle(args, context=train.check_context(args.context, model), dtype=runtime.dtype)
    objective = objective_class(args, tokenizer, labels, runtime)
    split = objective.make_split(examples["train"])
    if args.show_mask:
        return batches.show_mask(split.rows, tokenizer, args.show_mask)
    train.place(model, args, runtime)
    if adapter and not runtime.sharded:
        lora.hold_frozen(model, DTYPES[runtime.dtype])
    check_memory(model, args.batch_tokens, runtime.device)

    def epoch_rows(epoch):
        new = split
        if args.augment:
            new = objective.make_split(augmented(examples["train"], args, epoch))
        return new.prompts or new.rows

    loader = batches.BucketLoader(epoch_rows, args.batch_tokens, args.seed)
    if args.max_steps is None and args.max_minutes is None:
        steps = math.ceil(args.epochs * loader.per_epoch / (args.grad_accum * runtime.world))
        args = settle(args, max_steps=steps * (args.updates or 1))
    if args.warmup_steps is None:
        args = settle(args, warmup_steps=train.short_warmup(WARMUP, args.max_steps))
    splits = {"train": split, "val": objective.make_split(examples["val"])}
    if args.split not in splits:
        splits[args.split] = objective.make_split(examples[args.split])
    extra = {"tokenizer": tokenizer.spec, "data": hashes} | objective.start(model, splits, content)
    task = make_task(args, objective, splits, loader, extra)
    if adapter:
        task.weights, task.extra = lora.adapter_state, extra | {"adapter": adapter}
    name = f"{default_name(args.data.partition(',')[0])}-ft"
    out = Path(args.out) if content else run_folder(args.out, name, runtime)
    args = settle(args, out=str(out), examples=example_questions(examples["val"]))
    if runtime.rank == 0:
        print("\n".join(header(model, args, objective, splits, loader)))
        ids = (i for row in split.rows for r in batches.sequences(row) for i in r.ids)
        warn_unknown(tokenizer, ids, args.data)

    fit = partial(train.fit, model, task, args, runtime, out, content)
    report = partial(report_best, model, args, objective, splits[args.split])
    return train.launch(fit, report, runtime, out)


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


# fmt: off (one line a flag)
def build_parser():
    p = Parser(
        description="Fine-tune a checkpoint. Defaults are the recipe's (finetune.RECIPE), or with "
        "--resume the run's own.")
    add = p.add_argument_group("the run").add_argument
    add("--ckpt", help=f"the model to start from: {lm.WHAT_CKPT} (default: the newest run)")
    add("--data", help=f"a {', '.join(ROW_SUFFIXES)} file, .gz too, one of {', '.join(ROW_SETS)}, "
        "or on the Hub OWNER/NAME, OWNER/NAME:CONFIG, OWNER/NAME:FILE; several with commas")
    add("--val_data", help="rows to measure on (default: the set's own, or --val)")
    add("--val", type=between(0, 0.99),
        help="share held out if there are no validation rows (default 0.1; 0: none)")
    add("--objective", choices=tuple(OBJECTIVES), help="default: the one that suits the rows")
    add("--out", help="folder of the run (default: a new out/DATA-ft, or out/CKPT-eval)")
    train.add_machine(add)
    add("--eval_only", action="store_true", default=None,
        help="measure --ckpt on --split, or on all of a file without --val; train nothing")
    add("--split", help="split to report on at the end: val (default, also dev), test or train")
    figures = ", ".join(dict.fromkeys(c.figure for c in OBJECTIVES.values()))
    add("--best_by",
        help=f"what selects best.pt: last, {figures}, or val_loss (default: accuracy for labels, "
        "val_reward for grpo, else val_loss)")
    add("--eval_rows", type=at_least(0), help="answers per evaluation (default 64; 0: none); the "
        "closing report answers all")
    add("--show_mask", type=at_least(1), metavar="N", help="print N rows token by token and stop")
    add = p.add_argument_group("rows").add_argument
    add("--rows", metavar="START:STOP", help="slice of the training rows, such as 1000:5001")
    add("--max_rows", type=at_least(1), help="the first rows of each split only (default: all)")
    add("--encoding", help="encoding of the files (default: recognise UTF-8, UTF-16, GB18030)")
    add("--loss_on", choices=("assistant", "call"), help="what is learned (default: assistant)")
    add("--augment", type=share, help="hotel dialogues: probability that a value is exchanged "
        "throughout a dialogue, and that a question is added (default 0)")
    add("--token_dropout", type=share, help="probability of hiding a token (default 0)")
    add("--dropout", type=float, help="dropout of the model (default: the checkpoint's)")
    add("--batch_tokens", type=at_least(1),
        help="of a micro-batch, with padding (default 4096, grpo 8192)")
    add("--context", type=int, help="longest row (default and maximum: the checkpoint's)")
    add = p.add_argument_group("few parameters, little memory").add_argument
    add("--lora_rank", type=at_least(0), help="rank of adapters to a frozen base (default 0: none)")
    add("--lora_alpha", type=positive, help="adapters are scaled by alpha / rank (default: 2 rank)")
    add("--lora_dropout", type=between(0, 0.99), help="dropout of adapters' inputs (default 0)")
    add("--lora_targets", help="attention, mlp, all (default), or names of layers with commas")
    add("--quantize", choices=("int8", "nf4"), help="quantize the frozen base; needs --lora_rank")
    for objective, c in OBJECTIVES.items():
        add = p.add_argument_group(f"--objective {objective}").add_argument
        for name, (kind, text) in c.flags.items():
            default = "" if c.recipe[name] is None else f" (default {c.recipe[name]})"
            add(f"--{name}", type=kind, help=text + default)
    add = train.add_optimization(p)
    add("--epochs", type=positive, help="passes over the rows (default 3, or 1 for dpo, reward and "
        "grpo, without another limit)")
    add("--max_steps", type=at_least(1), help="instead of --epochs")
    add("--max_minutes", type=positive, help="of training, evaluation not counted")
    return p


if __name__ == "__main__":
    run_cli(main)
