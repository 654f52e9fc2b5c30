"""train.py: schedules, optimizers, batches, the loop's exactness, and what a run leaves behind."""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import signal
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU

import model as lm
import prepare_data
import train
from data.cli import UserError, run_cli
from data.runs import eval_line, lock_folder, new_run

SHAPE = ["--n_layer", "2", "--n_head", "2", "--d_model", "32", "--context", "16", "--bigram", "64",
         "--trigram", "64"]
SMALL = ["--data", "words", *SHAPE, "--batch_size", "4"]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder to work in, with data/words prepared: enough text to learn something from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.machine.measure_peak", lambda *_: 1e11)
    rng = np.random.default_rng(0)
    words = ["to", "be", "or", "not", "the", "question", "是", "学习", "\n"]
    (tmp_path / "words.txt").write_text(" ".join(rng.choice(words, 4000)), encoding="utf-8")
    prepare_data.main(["words.txt", "--tokenizer", "byte"])
    return tmp_path


def run(*flags, check=True, main=train.main):
    """A script as its user runs it: its exit code, stdout and stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    out, err = contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1])
    with out, err, pytest.raises(SystemExit) as e:
        run_cli(lambda: main([*map(str, flags)]))
    out, err = (s.buffer.getvalue().decode() for s in streams)
    assert not check or e.value.code == 0, err
    return argparse.Namespace(returncode=e.value.code, stdout=out, stderr=err)


def refused(*flags, main=train.main):
    """The one line on stderr with which a script ends with exit code 2."""
    done = run(*flags, check=False, main=main)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def metrics(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [r["loss"] for r in metrics(out) if "loss" in r]


def last(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)


@contextlib.contextmanager
def killed_in_step(number):
    """`fit` as it is, but it dies in that step, as if the process were killed."""
    step = train.training_step
    with pytest.MonkeyPatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(train, "training_step", lambda *a: 1 / 0 if a[-1][1] == number - 1 else step(*a))
        yield


def settings(**changes):
    base = train.RECIPE | train.optimizer_rates() | dict.fromkeys(
        ("max_minutes", "compile", "ckpt", "total_batch_tokens"))
    base |= dict(max_steps=10, out="out/run", resume="out/run")
    return argparse.Namespace(**(base | changes))


def tiny(**changes):
    shape = dict(n_layer=1, n_head=2, d_model=16, context=8, vocab_size=64, bigram=8, trigram=8)
    return lm.Transformer(lm.preset("tiny", **(shape | changes)))


@pytest.mark.parametrize("schedule, middle, end", [
    ("cosine", 0.6, 0.2), ("linear", 0.6, 0.2), ("wsd", 1.0, 0.2), ("constant", 1.0, 1.0)])
def test_schedules_warm_up_from_above_zero_and_fall_to_their_floor(schedule, middle, end):
    args = settings(max_steps=100, warmup_steps=4, lr=1.0, min_lr=0.2, schedule=schedule)
    times = dict(seconds=0.0, warm_seconds=0.0)
    lrs = [train.scheduled_lr(args, times | {"step": step}) for step in range(101)]
    assert lrs[:4] == [0.25, 0.5, 0.75, 1.0]
    assert [lrs[s] for s in (4, 52, 100)] == pytest.approx([1.0, middle, end])
    assert all(a >= b for a, b in itertools.pairwise(lrs[4:]))


def test_an_epoch_shows_each_window_once_and_epochs_differ_and_one_window_is_enough():
    windows = train.TokenLoader(np.arange(1000, dtype=np.uint16), context=10, seed=3)
    assert windows.per_epoch == 98
    starts = [int(windows.rows(r, 1)[0][0, 0]) for r in range(2 * 98)]
    first, second = starts[:98], starts[98:]
    assert np.all(np.diff(sorted(first)) == 10)
    assert first != second and sorted(first) != sorted(second)  # other order, other phase
    assert train.TokenLoader(np.arange(17, dtype=np.uint16), 16, seed=0).per_epoch == 1
    with pytest.raises(UserError, match=r"16 tokens.*context of 16"):
        train.TokenLoader(np.arange(16, dtype=np.uint16), 16, seed=0)


def test_rows_depend_on_nothing_but_their_number():
    """Neither on the rows before them nor on how processes and micro-batches cut a step."""
    tokens = np.arange(500, dtype=np.uint16)
    loader = train.TokenLoader(tokens, 7, seed=1)
    ids, targets = loader.rows(40, 8)
    assert torch.equal(targets, ids + 1) and ids.dtype == torch.int64
    for n_rows, step in ((8, 5), (10, 4), (1, 40)):  # as many for each, or not
        cut = [train.micro_batches(loader, step, n_rows, 2, rank, world=2) for rank in (1, 0)]
        cut = [ids for rank in reversed(cut) for ids, _ in rank]
        assert torch.equal(torch.cat(cut)[:8], ids[:n_rows]) and len(cut) == 4


def test_every_second_step_has_short_rows_and_none_repeats_in_an_epoch(corpus, monkeypatch):
    shapes, firsts, step = [], defaultdict(list), train.training_step

    def seen(model, task, batches, *args):
        shapes.append(tuple(batches[0][0].shape))
        firsts[shapes[-1]] += batches[0][0].tolist()
        return step(model, task, batches, *args)

    monkeypatch.setattr(train, "training_step", seen)
    flags = [*SMALL, "--max_steps", 6, "--context", 256]
    run(*flags, "--short_context", 64)  # four rows of 64 tokens, or one of 256
    assert shapes == [(4, 64), (1, 256)] * 3
    assert all(len({tuple(row) for row in rows}) == len(rows) for rows in firsts.values())
    shapes.clear()
    run(*flags, "--out", "out/given")  # a --context that is given holds for all rows
    assert shapes == [(4, 256)] * 6


def test_a_large_table_learns_as_much_from_the_rows_that_were_read_alone():
    learned = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = tiny(bigram=train.LARGE_TABLE)
        optimizers = train.make_optimizers(model, settings(embed_lr=0.03))
        assert isinstance(optimizers[-1], torch.optim.Adagrad) and model.inputs.bigram.sparse
        model.inputs.bigram.sparse = sparse
        for ids in torch.randint(60, (3, 2, 8)):
            (model(ids, ids) / 16).backward()
            assert model.inputs.bigram.weight.grad.is_sparse == sparse
            for o in optimizers:
                o.step()
            model.zero_grad()
        learned.append(model.inputs.bigram.weight.detach())
    torch.testing.assert_close(*learned)
    assert 0 < learned[0].any(1).sum() <= 48


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_is_on_matrices_only_and_every_parameter_has_one_place(kind):
    model = lm.Transformer(lm.preset("gpt2", n_layer=2, d_model=32, n_head=2, vocab_size=64))
    optimizers = train.make_optimizers(model, settings(optimizer=kind, weight_decay=0.3))
    groups = [g for o in optimizers for g in o.param_groups]
    placed = [id(p) for g in groups for p in g["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
    inside = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    assert {id(p) for g in groups if g["weight_decay"] for p in g["params"]} == inside
    muon = {id(p) for o in optimizers if isinstance(o, train.Muon)
            for p in o.param_groups[0]["params"]}
    assert muon == (inside if kind == "muon" else set())


def test_embedding_and_head_have_their_own_rates_unless_they_are_one_table():
    args = settings(lr=1e-3, embed_lr=0.5, head_lr=0.25)
    for tied in (False, True):
        model = tiny(tied=tied)
        rate = {id(p): g["peak"] for o in train.make_optimizers(model, args)
                for g in o.param_groups for p in g["params"]}
        assert rate[id(model.embed.weight)] == (1e-3 if tied else 0.5)
        assert rate[id(model.head.weight)] == (1e-3 if tied else 0.25)
        assert rate[id(model.blocks[0].attention.q.weight)] == 1e-3
    before, args.embed_lr = list(rate), 1e-4  # LoRA's recipe has a lower rate for tables
    groups = train.make_optimizers(model, args)[0].param_groups
    assert [id(p) for g in groups for p in g["params"]] == before  # a resumed run's moments fit
    assert [g["peak"] for g in groups if g["params"][0] is model.embed.weight] == [1e-4]


def test_an_optimizer_is_added_by_a_line_and_has_a_flag_for_its_rate(corpus, monkeypatch):
    monkeypatch.setitem(train.MATRIX_OPTIMIZERS, "sgd", (torch.optim.SGD, 0.004))
    parse = train.build_parser().parse_args
    for flags, rate in (([], 0.004), (["--sgd_lr", "0.01"], 0.01)):
        args = train.resolve(parse(["--optimizer", "sgd", "--out", "out/x", *flags]))[0]
        first, second = train.make_optimizers(tiny(), args)
        assert isinstance(first, torch.optim.SGD) and isinstance(second, torch.optim.AdamW)
        assert {g["peak"] for g in first.param_groups} == {rate}
    train.main([*SMALL, "--optimizer", "sgd", "--max_steps", "3"])


def test_muon_equals_torchs_own():
    torch.manual_seed(0)
    a = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (24, 8), (8, 24), (8, 8))]
    b = copy.deepcopy(a)
    ours = train.Muon(a, lr=0.02, momentum=0.95)
    theirs = torch.optim.Muon(b, lr=0.02, momentum=0.95, weight_decay=0, adjust_lr_fn="original")
    for _ in range(5):
        for p, q in zip(a, b):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b):  # theirs runs its products in bfloat16
        assert (p - q).abs().max() < 0.02 * 5 * 0.02


def one_step(model, batches):
    """(loss, tokens read) of a training step over the batches."""
    task = train.Task(batches=None, evaluate=None, extra={})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, tokens = train.training_step(model, task, batches, CPU, scaler, (0, 0))
    return float(loss), tokens


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_gives_the_gradient_of_the_whole_batch(masked):
    torch.manual_seed(1)
    ids, targets = torch.randint(0, 50, (2, 8, 12))
    if masked:  # micro-batches of very different target counts, one of them without any
        targets[2:4] = targets[0, 1:] = -100
    steps = []
    for rows in (8, 2):
        torch.manual_seed(0)
        model = tiny(init="gpt2", context=12).double()
        loss, tokens = one_step(model, list(zip(ids.split(rows), targets.split(rows))))
        assert tokens == ids.numel()  # the loss counts targets
        steps.append((loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*steps, rtol=0, atol=1e-12)


def test_a_step_without_targets_and_a_loss_that_is_no_number_stop(corpus):
    masked = [(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -100))]
    with pytest.raises(UserError, match="no target"):
        one_step(tiny(), masked)
    run(*SMALL, "--max_steps", 4, "--eval_every", 2, "--out", "out/nan")
    content = last("out/nan")
    content["model"]["head.weight"][0, 0] = math.nan
    lm.save_checkpoint("out/nan/last.pt", content)
    poisoned = Path("out/nan/last.pt").read_bytes()
    assert "Try a lower --lr" in refused("--resume", "out/nan", "--max_steps", 8)
    assert Path("out/nan/last.pt").read_bytes() == poisoned  # nothing was written


@pytest.mark.parametrize("stride", [8, 3])
def test_evaluation_scores_every_target_once_and_counts_bytes(stride):
    torch.manual_seed(0)
    model = tiny(init="gpt2")
    tokens = np.random.default_rng(0).integers(0, 60, 8 * 5 + 4).astype(np.uint16)
    byte_lengths = np.arange(64) % 3
    result = train.evaluate(model, tokens, byte_lengths, CPU, stride=stride)
    assert train.evaluate(model, tokens, byte_lengths, CPU, 42, stride=stride)["val_share"] <= 1
    total, ids = 0.0, torch.from_numpy(tokens.astype(np.int64))[None]
    for target in range(1, len(tokens)):  # the first window that it is in
        start = max(0, -(-(target - 8) // stride) * stride)
        logits = model(ids[:, start:target])[0, -1]
        total -= logits.log_softmax(-1)[ids[0, target]].item()
    mean, n_bytes = total / (len(tokens) - 1), byte_lengths[tokens[1:]].sum()
    wanted = [mean, math.exp(mean), total / math.log(2) / n_bytes, 1]
    assert list(result.values()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("limit", [16, 88, 160, 400, 792])
def test_a_limited_evaluation_is_spread_over_the_whole_split(limit):
    seen, n, model = [], limit // 8, tiny(vocab_size=801)
    model.register_forward_pre_hook(lambda _, args: seen.extend(args[0][:, 0].tolist()))
    row = train.evaluate(model, np.arange(801), np.ones(801, int), CPU, limit=limit)
    gaps = np.diff([*seen, 800])
    assert len(seen) == n and row["val_share"] == pytest.approx(limit / 800)
    assert seen[0] == 0 and gaps.max() - gaps.min() <= 8 and gaps.max() <= 800 / n + 8


def test_the_whole_split_is_read_and_told_of_once_at_the_end(corpus, monkeypatch):
    flags = [*SMALL, "--max_steps", 2, "--eval_every", 2]
    whole, given = run(*flags).stdout, run(*flags, "--eval_tokens", 64, "--out", "out/given").stdout
    assert given.count("step 2  train loss") == 1 and "(100% of val)" not in given
    assert metrics("out/given")[-1]["final"] and metrics("out/given")[-1]["val_share"] < 0.1
    monkeypatch.setattr(train, "EVAL_TOKENS", 64)
    part = run(*flags).stdout
    assert whole.count("step 2  train loss") == 1 and "(100% of val)" in whole
    assert part.count("step 2  train loss") == 2 and part.count("(100% of val)") == 1
    rows = [r for r in metrics("out/words-2") if r.get("final")]
    assert len(rows) == 1 and rows[0]["val_share"] == 1
    assert rows[0]["val_loss"] == pytest.approx(metrics("out/words")[-1]["val_loss"])
    said = run("--eval_only", "--ckpt", "out/words-2/last.pt").stdout
    assert eval_line(rows[0] | {"step": None, "final": None}) in said and "(100% of val)" in said
    assert len(list(Path("out").iterdir())) == 3


def test_flops_are_those_of_the_rows_that_are_read(corpus):
    model = tiny(n_head=1, d_model=8, context=4096, vocab_size=320)
    ids = torch.randint(320, (2, 16))
    batch = ids, torch.where(torch.arange(16) < 4, ids, -100)  # the head is computed for a quarter
    task = train.Task(lambda step: [batch], lambda m, when: {"val_loss": 1.0}, {})
    args = settings(max_steps=3, eval_every=9, log_every=2)
    model.blocks.requires_grad_(False)
    train.fit(model, task, args, CPU, corpus / "run")
    row = next(r for r in metrics("run") if "mfu" in r)
    each = row["mfu"] * CPU.peak / row["tok_s"]
    assert each == pytest.approx(lm.flops_per_token(model.config, 16, 1 / 4, True), rel=0.01)


@pytest.mark.parametrize("optimizer", [
    "adamw", "muon", "adamw --experts 3", "adamw --short_context 4 --bigram 32768"])
def test_killed_and_resumed_equals_straight_through_bitwise(corpus, optimizer):
    """Gradient checkpointing changes nothing, either."""
    flags = [*SMALL, "--dropout", "0.2", "--max_steps", "9", "--log_every", "1", "--eval_every",
             "4", "--optimizer", *optimizer.split()]
    run(*flags, "--out", "out/straight")
    with killed_in_step(7):  # two steps after its checkpoint
        train.main([*flags, "--out", "out/killed"])
    assert last("out/killed")["step"] == 4
    run("--resume", "out/killed", "--grad_checkpoint")
    straight, resumed = last("out/straight")["model"], last("out/killed")["model"]
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert losses("out/straight") == losses("out/killed") and len(losses("out/killed")) == 9


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_the_step_and_sets_the_exit_code(corpus, number, code, monkeypatch):
    step = train.training_step
    stopped = lambda *a: a[-1] == (0, 2) and os.kill(os.getpid(), number)  # noqa: E731
    monkeypatch.setattr(train, "training_step", lambda *a: stopped(*a) or step(*a))
    done = run(*SMALL, "--max_steps", 99, "--out", "out/stop", check=False)
    assert done.returncode == code and "stopped at step 3: continue with" in done.stdout
    assert last("out/stop")["step"] == 3 and last("out/stop")["args"]["warmup_steps"] == 19
    assert ("Ctrl-C again stops now" in done.stderr) == (number == signal.SIGINT)

    failed = RuntimeError("unexpected pos")  # of torch's zip writer, after an interrupt
    failed.__context__ = KeyboardInterrupt()
    for module, name, error in ((train, "evaluate", KeyboardInterrupt), (torch, "save", failed)):
        with monkeypatch.context() as m:  # a shorter limit: only its evaluation is missing
            m.setattr(module, name, Mock(side_effect=error))
            done = run("--resume", "out/stop", "--max_steps", 3, check=False)
        assert done.returncode == 130 and "out/stop/last.pt is saved" in done.stderr
    said = run("--resume", "out/stop", "--max_steps", 3).stdout
    assert re.search(r"best val loss \d.* at step 3\n", said) and "last.pt, best.pt" in said
    assert last("out/stop")["best"] == metrics("out/stop")[-1]["val_loss"]
    evaluate, ended = train.evaluate, lambda *a, **k: os.kill(os.getpid(), number)
    with monkeypatch.context() as m:  # in the last evaluation
        m.setattr(train, "evaluate", lambda *a, **k: ended() or evaluate(*a, **k))
        done = run("--resume", "out/stop", "--max_steps", 4, check=False)
    assert done.returncode == code and "stopped at step 4: continue with" in done.stdout


def test_resuming_cuts_metrics_and_inherits_what_is_not_given(corpus):
    run(*SMALL, "--max_steps", 4, "--eval_every", 2, "--log_every", 1, "--lr", "0.001")
    with open("out/words/metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # of a crash after step 4
    done = run("--resume", "--data", "words", "--max_steps", 8, "--log_every", 2)
    assert "resuming out/words/last.pt at step 4" in done.stdout and "max_steps 8" in done.stdout
    assert [r["step"] for r in metrics("out/words") if "loss" in r] == [1, 2, 3, 4, 6, 8]
    assert last("out/words")["args"]["lr"] == 0.001
    Path("data/words/meta.json").unlink()
    assert "data/words, the text of this run, is gone" in refused("--resume", "--max_steps", 9)


@pytest.mark.parametrize("limit", ["max_steps", "max_minutes"])
def test_a_raised_limit_takes_the_decay_along(corpus, limit):
    """Warmup for 60 of 100 steps, then resumed to 1,000: the rate falls from step 100 on."""
    first = dict(max_steps=None, warmup_steps=60, lr=1.0) | {limit: 100}
    task = train.Task(None, lambda m, final: {"val_loss": 1.0}, {})
    run = train.Run(tiny(), task, settings(**first), CPU, corpus / "out")
    run.state |= dict(step=60, seconds=3600.0, warm_seconds=3600.0)  # a step a minute

    def rates(args, state, *steps):
        return [train.scheduled_lr(args, state | dict(step=s, seconds=60.0 * s)) for s in steps]

    assert rates(run.args, run.state, 60, 70) == pytest.approx([1, 0.75])
    run.state |= dict(step=80, seconds=4800.0)
    run.save()
    for limits, wanted in ((100, [0.5, 0.25]), (1000, [920 / 940, 910 / 940])):
        args = settings(**(first | {limit: limits}))
        again = train.Run(tiny(), task, args, CPU, corpus / "out")
        again.restore(lm.load_checkpoint("out/last.pt", resuming=True))
        assert rates(args, again.state, 80, 90) == pytest.approx(wanted)


def test_a_new_run_never_writes_over_an_old_one(corpus):
    flags = [*SMALL, "--max_steps", 1]
    run(*flags)
    first = Path("out/words/last.pt").read_bytes()
    assert "out/words-2/" in run(*flags).stdout
    assert Path("out/words/last.pt").read_bytes() == first
    assert "--resume out/words" in refused(*flags, "--out", "out/words")
    assert len({new_run("same") for _ in range(3)}) == 3  # even if they start together


def test_a_resumed_run_takes_new_rates_and_refuses_a_new_text(corpus):
    run(*SMALL, "--max_steps", 4, "--schedule", "constant", "--out", "out/r")
    more = ["--resume", "out/r", "--log_every", 1, "--schedule", "constant"]
    run(*more, "--max_steps", 6, "--lr", 1e-4, "--embed_lr", 2e-4, "--weight_decay", 0.5)
    groups = [g for o in last("out/r")["optimizers"] for g in o["param_groups"]]
    ours = train.RECIPE
    assert {g["peak"] for g in groups} == {1e-4, 2e-4, 1e-4 / ours["lr"] * ours["head_lr"]}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.5}
    assert metrics("out/r")[-3]["lr"] == pytest.approx(1e-4)  # the warmup of the 4 steps is over

    before = Path("out/r/last.pt").read_bytes()
    assert "finished" in run("--resume", "out/r").stdout
    with open("words.txt", "a", encoding="utf-8") as f:
        f.write(" and something new" * 50)
    prepare_data.main(["words.txt", "--tokenizer", "byte"])
    for flags, named in ((["--max_steps", "9"], "not the text"), (["--out", "out/q"], "--out")):
        assert named in refused("--resume", "out/r", *flags)
    prepare_data.main(["words.txt", "--tokenizer", "char"])
    assert "python prepare_data.py words.txt --tokenizer byte" in refused("--resume", "out/r")
    assert Path("out/r/last.pt").read_bytes() == before


def test_an_edited_file_is_prepared_again(corpus):
    flags = ["--data", "words.txt", *SHAPE, "--max_steps", 1]
    run(*flags)
    with open("words.txt", "a", encoding="utf-8") as f:
        f.write("more")
    os.utime("words.txt", (2e9, 2e9))
    assert "preparing words.txt first" in run(*flags).stdout


def test_accumulation_follows_from_the_tokens_of_a_step():
    model = lm.meta_model(lm.preset("tiny", context=64))

    def settled(world, batch_size=1, context=64, **changes):
        args = settings(batch_size=batch_size, **(dict(grad_accum=2) | changes))
        args = train.settle(args, model, replace(CPU, world=world), context, Path("words"))
        return args.grad_accum, args.total_batch_tokens

    assert settled(4) == (2, 512)
    assert settled(1, context=32) == (2, 64)
    with pytest.raises(UserError, match="--context 65 must be at most the model's 64"):
        train.check_context(65, model)
    for world, accum in ((1, 8), (2, 4), (8, 1)):
        assert settled(world, total_batch_tokens=512) == (accum, 512)
    assert "--grad_accum follows from" in refused("--total_batch_tokens", 512, "--grad_accum", 2)
    for rows, world in ((1, 3), (1, 16), (3, 1)):
        with pytest.raises(UserError, match=f"512 is not a multiple of {64 * rows * world}"):
            settled(world, rows, total_batch_tokens=512)


def test_checkpoints_between_evaluations(corpus, monkeypatch):
    saved, save = [], train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda run, *a: saved.append(run.state["step"]) or
                        save(run, *a))
    flags = [*SMALL, "--max_steps", "7", "--eval_every", "5"]
    train.main([*flags, "--save_every", "2", "--out", "out/steps"])
    assert saved == [2, 4, 5, 6, 7]


def test_a_run_learns_and_leaves_its_files(corpus):
    done = run(*SMALL, "--max_steps", 60, "--eval_every", 20, "--log_every", 5)
    assert losses("out/words")[-1] < 0.6 * losses("out/words")[0]
    rows = metrics("out/words")
    step = next(r for r in reversed(rows) if "loss" in r)
    assert {"step", "tokens", "seconds", "lr", "grad_norm", "tok_s", "mfu"} < set(step)
    assert step["tokens"] == 60 * 4 * 16
    assert [r["step"] for r in rows if "val_bpb" in r] == [0, 20, 40, 60, 60] and rows[-1]["final"]
    start, *later = [line for line in done.stdout.splitlines() if "  val loss" in line]
    assert start.startswith("step 0  val loss ") and 4 < rows[0]["val_loss"] < 8  # ln 257 is 5.5
    assert f"step 20  train loss {losses('out/words')[3]:.4f}  val loss" in later[0]
    best = torch.load("out/words/best.pt", weights_only=True, mmap=True)
    assert "optimizers" not in best and best["tokenizer"] == {"kind": "byte"}
    for word in ("parameters", "Chinchilla", "memory about", "matmul peak", "xz -9e", "a sample"):
        assert word in done.stdout, word


def test_a_run_that_is_over_says_so_and_writes_nothing(corpus, capsys):
    def resumed(*flags):
        """What a run says, and the step that it ends with."""
        train.main(["--resume", "out/r", "--eval_every", "2", *map(str, flags)])
        return capsys.readouterr().out, last("out/r")["step"]

    def contents():
        return {path: path.read_bytes() for path in Path("out/r").iterdir()}

    train.main([*SMALL, "--max_steps", "400", "--eval_every", "2", "--lr", "1e-9", "--embed_lr",
                "1e-9", "--head_lr", "1e-9", "--patience", "2", "--out", "out/r"])
    assert "stopping early" in capsys.readouterr().out
    files = contents()
    said, step = resumed("--patience", 1)
    assert step == 6 and said.count("stopping early") == 1 and "a sample" not in said
    assert contents() == files
    for flags, wanted in ((["--patience", 4], 10), (["--patience", 0, "--max_steps", 20], 20)):
        assert resumed(*flags)[1] == wanted
    files = contents()
    said, _ = resumed()
    assert "this run is finished" in said and "a sample" not in said and contents() == files
    Path("out/r/metrics.jsonl").write_text("")  # killed before its last evaluation and sample
    assert "a sample" in resumed()[0]


def test_minutes_end_a_run_and_the_schedule_with_it(corpus):
    run(*SMALL, "--max_minutes", "0.01", "--warmup_steps", 5, "--log_every", 1)
    steps = [r for r in metrics("out/words") if "lr" in r]
    assert 0.6 <= steps[-1]["seconds"] < 3
    assert steps[-1]["lr"] < 0.3 * max(r["lr"] for r in steps)


def test_low_precision_trains_nearly_like_fp32(corpus):
    limits = "--max_steps 20 --log_every 20 --eval_every 20 --eval_tokens 64 --dtype"
    flags = [*SMALL, *limits.split()]
    run(*flags, "fp32", "--out", "out/fp32")
    for dtype in ("bf16", "fp16"):
        run(*flags, dtype, "--out", out := f"out/{dtype}")
        assert losses(out)[-1] == pytest.approx(losses("out/fp32")[-1], rel=0.02)
        assert all(w.dtype == torch.float32 for w in last(out)["model"].values())


def test_a_bf16_copy_learns_as_fp32_does():
    """Steps that are too small for bf16 add up in the master's weights."""
    ids = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
    changes = []
    for make in (lambda model: model, train.BF16Copy):
        torch.manual_seed(0)
        model = lm.Transformer(lm.preset("llama", n_layer=1, d_model=32, vocab_size=50))
        runs, optimizer = make(model), torch.optim.SGD(model.parameters(), lr=2e-4)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(200):
            for rows in ids.split(2):  # gradients of two micro-batches add up
                runs(rows, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            getattr(runs, "sync_weights", lambda: None)()
        pairs = zip(model.parameters(), before)
        changes.append(torch.cat([(p - q).flatten() for p, q in pairs]))
        assert changes[0].norm() > 0.1
    assert (changes[1] - changes[0]).norm() < 0.05 * changes[0].norm()
    assert {p.dtype for p in runs.low.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("longest, calls", [(9, 3), (4, 2), (3, 1)])
def test_without_a_compiler_for_a_shape_blocks_run_as_they_are(longest, calls, monkeypatch, capsys):
    """It says so in one line, of the trial and of later shapes; only training is compiled."""
    model, seen = tiny(), []

    def compiled(block, x, *args):
        seen.append(x.shape[1])
        if x.shape[1] > longest:
            raise RuntimeError("no compiler here\nand a long story")
        return forward(block, x, *args)

    forward, ids = lm.Block.forward, torch.zeros(1, 4).long()
    monkeypatch.setattr(torch, "compile", lambda plain: compiled)
    train.compile_blocks(model, train.Task(lambda step: [(ids, ids)], None, {}), CPU, 0)
    assert seen == [4]
    for length in (6, 3):
        more = torch.zeros(1, length).long()
        trained = model(more, more)
        with lm.evaluating(model):
            assert torch.equal(model(more, more), trained)
    said = capsys.readouterr().out
    assert said.count("\n") == ("no compiler here" in said) == (longest < 6)
    assert seen == [4, 6, 3][:calls]


def test_no_optimizer_steps_where_the_gradients_of_another_are_not_finite():
    """As fp16's loss scaling meets them; the scale is halved."""
    model = tiny()
    optimizers = train.make_optimizers(model, settings(optimizer="muon"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    runtime = replace(CPU, dtype="fp16")
    before = copy.deepcopy(model.state_dict())
    for bad, scale in ((math.inf, 4), (1.0, 4)):
        scaler.scale(sum(p.sum() for p in model.parameters())).backward()
        model.embed.weight.grad[0, 0] *= bad  # AdamW's; Muon has the matrices
        train.optimizer_step(model, optimizers, scaler, 1.0, runtime)
        same = [torch.equal(v, before[k]) for k, v in model.state_dict().items() if "q.w" in k]
        assert scaler.get_scale() == scale and same == [bad == math.inf]


def test_training_goes_on_from_a_checkpoints_weights(corpus):
    run(*SMALL, "--max_steps", 60, "--out", "out/base")
    more = ["--data", "words", "--ckpt", "out/base", "--max_steps", 1, "--log_every", 1]
    run(*more, "--out", "out/on")
    assert losses("out/on")[0] < 0.8 * math.log(256)  # not from scratch
    args = last("out/on")["args"]
    assert [args[k] for k in ("lr", "embed_lr", "head_lr")] == pytest.approx([1e-3, 1e-2, 3e-3])
    large = settings(ckpt="gpt2", lr=None, embed_lr=None, head_lr=None, muon_lr=None)
    large = train.settle(large, lm.meta_model(lm.preset("gpt2")), CPU, 1024, Path("words"))
    assert large.lr == pytest.approx(6e-5) and large.embed_lr is None
    run(*more, "--out", "out/muon", "--optimizer", "muon", "--embed_lr", 1e-5)
    muon = last("out/muon")["args"]
    assert muon["muon_lr"] == pytest.approx(10 * args["lr"]) and muon["embed_lr"] == 1e-5
    prepare_data.main(["words.txt", "--tokenizer", "char", "--name", "other"])
    err = refused("--data", "other", "--ckpt", "out/base")
    assert "prepare_data.py words.txt --tokenizer byte --name other" in err and "char" in err


def test_a_second_process_or_script_is_refused(corpus):
    run(*SMALL, "--max_steps", 2, "--out", "out/r")
    with lock_folder("out/r"):
        err = refused("--resume", "out/r", "--max_steps", 3)
    assert "out/r is being written by another process" in err
    run("--resume", "out/r", "--max_steps", 3)  # now it has ended
    content = last("out/r")
    content["args"]["objective"] = "sft"
    lm.save_checkpoint("out/r/last.pt", content)
    assert "was written by finetune.py" in refused("--resume", "out/r", "--max_steps", 4)


@pytest.mark.parametrize("flags, named", [
    ("--data nosuch", "nosuch"),
    ("--data words --preset huge", "huge"),
    ("--data words --n_head 5", "n_head 5"),
    ("--data words --batch_size 100000000", "memory"),
    ("--data words --preset llama-8b --n_layer 9999", "memory"),
    ("--data words --out words.txt", "words.txt is not a folder"),
    ("--data words --device tpu", "tpu"),
    ("--resume out/none", "out/none"),
    ("--ckpt words.txt --data words", "words.txt"),
])
def test_a_users_mistake_is_one_line_that_names_it(corpus, flags, named):
    assert named in refused(*flags.split())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cuda_trains_like_the_cpu(corpus, dtype):
    flags = [*SMALL, "--max_steps", 30, "--log_every", 30]
    run(*flags, "--device", "cpu", "--out", "out/cpu")
    run(*flags, "--device", "cuda", "--dtype", dtype, "--out", "out/cuda")
    assert losses("out/cuda")[-1] == pytest.approx(losses("out/cpu")[-1], rel=0.03)
