"""train.py: schedules, optimizers, batches, the loop's exactness, and what a run leaves behind."""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import lora
import model as lm
import prepare_data
import sample
import train
from data.cli import UserError, run_cli
from data.machine import Runtime
from data.runs import lock_folder, new_run

CPU = Runtime(torch.device("cpu"), peak=1e11)
SHAPE = ["--n_layer", "2", "--n_head", "2", "--d_model", "32", "--context", "16"]
SMALL = [*SHAPE, "--batch_size", "4"]


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


def run(*flags, check=True):
    """train.py as its user runs it: its exit code, stdout and stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    out, err = contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1])
    with out, err, pytest.raises(SystemExit) as e:
        run_cli(lambda: train.main([*map(str, flags)]))
    out, err = (s.buffer.getvalue().decode() for s in streams)
    assert not check or e.value.code == 0, err
    return argparse.Namespace(returncode=e.value.code, stdout=out, stderr=err)


def metrics(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [r["loss"] for r in metrics(out) if "loss" in r]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def settings(**changes):
    base = train.optimizer_rates() | dict(max_steps=10, max_minutes=None, compile=None)
    return argparse.Namespace(**(train.RECIPE | base | changes))


# ---- schedule ------------------------------------------------------------------------------


def test_warmup_starts_above_zero_and_reaches_the_peak_without_decay():
    lrs = [train.lr_at(s, 0.0, lr=1.0, warmup_steps=4) for s in range(5)]
    assert lrs == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_ends_at_its_floor_and_passes_the_middle_half_way():
    ends = [train.lr_at(9, f, lr=1.0, min_lr=0.2, schedule="cosine") for f in (0.0, 0.5, 1.0)]
    assert ends == pytest.approx([1.0, 0.6, 0.2])


def test_wsd_holds_then_falls_and_constant_holds():
    assert train.lr_at(9, 0.6, lr=1.0, schedule="wsd") == 1.0
    assert train.lr_at(9, 0.8, lr=1.0, schedule="wsd") == pytest.approx(0.5)
    assert train.lr_at(9, 1.0, lr=1.0, schedule="wsd") == 0.0
    assert train.lr_at(9, 1.0, lr=1.0, schedule="constant") == 1.0


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_no_schedule_rises_or_leaves_its_bounds(schedule):
    lrs = [train.lr_at(9, f / 50, lr=1.0, min_lr=0.1, schedule=schedule) for f in range(51)]
    assert all(a >= b for a, b in itertools.pairwise(lrs)) and min(lrs) >= 0.1 - 1e-12


# ---- batches -------------------------------------------------------------------------------


def test_an_epoch_shows_each_window_once_and_epochs_differ():
    windows = train.TokenLoader(np.arange(1000, dtype=np.uint16), context=10, seed=3)
    first = [int(windows.rows(r, 1)[0][0, 0]) for r in range(windows.n)]
    second = [int(windows.rows(r, 1)[0][0, 0]) for r in range(windows.n, 2 * windows.n)]
    assert len(set(first)) == windows.n == 98
    assert np.all(np.diff(sorted(first)) == 10)
    assert first != second and sorted(first) != sorted(second)  # other order, other phase


def test_targets_are_the_next_tokens_and_rows_depend_on_nothing_but_their_number():
    tokens = np.arange(500, dtype=np.uint16)
    ids, targets = train.TokenLoader(tokens, 7, seed=1).rows(30, 60)
    assert torch.equal(targets, ids + 1) and ids.dtype == torch.int64
    again = train.TokenLoader(tokens, 7, seed=1)
    rows = torch.cat([again.rows(r, 1)[0] for r in reversed(range(30, 90))]).flip(0)
    assert torch.equal(rows, ids)


def test_processes_and_micro_batches_cut_the_same_global_batch():
    windows = train.TokenLoader(np.arange(5000, dtype=np.uint16), 8, seed=0)
    whole = train.micro_batches(windows, step=5, batch_size=8, grad_accum=1)[0][0]
    cut = [
        ids
        for rank in range(2)
        for ids, _ in train.micro_batches(windows, 5, 2, 2, rank=rank, world=2)
    ]
    assert torch.equal(torch.cat(cut), whole)


def test_a_text_of_exactly_one_window_trains_and_a_shorter_one_says_so():
    ids, _ = train.TokenLoader(np.arange(17, dtype=np.uint16), 16, seed=0).rows(0, 3)
    assert torch.equal(ids[0], torch.arange(16))
    with pytest.raises(UserError, match=r"16 tokens.*context of 16"):
        train.TokenLoader(np.arange(16, dtype=np.uint16), 16, seed=0)


# ---- optimizers ----------------------------------------------------------------------------


def test_decay_is_on_matrices_only_and_every_parameter_has_one_place():
    model = lm.Transformer(lm.preset("gpt2", n_layer=2, d_model=32, n_head=2, vocab_size=64))
    for kind in ("adamw", "muon"):
        optimizers = train.make_optimizers(model, settings(optimizer=kind, weight_decay=0.3))
        groups = [g for o in optimizers for g in o.param_groups]
        placed = [id(p) for g in groups for p in g["params"]]
        assert sorted(placed) == sorted(id(p) for p in model.parameters())
        decayed = [p for g in groups if g["weight_decay"] for p in g["params"]]
        assert all(p.dim() == 2 for p in decayed) and decayed
        inside = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
        muon = {id(p) for o in optimizers if isinstance(o, train.Muon)
                for p in o.param_groups[0]["params"]}
        assert muon == (inside if kind == "muon" else set())


def test_embedding_and_head_have_their_own_rates_unless_they_are_one_table():
    args = settings(lr=1e-3, embed_lr=0.5, head_lr=0.25)
    for tied in (False, True):
        model = lm.Transformer(lm.preset("tiny", n_layer=1, d_model=16, n_head=2, tied=tied))
        rate = {id(p): g["peak"] for o in train.make_optimizers(model, args)
                for g in o.param_groups for p in g["params"]}
        assert rate[id(model.embed.weight)] == (1e-3 if tied else 0.5)
        assert rate[id(model.head.weight)] == (1e-3 if tied else 0.25)
        assert rate[id(model.blocks[0].attention.q.weight)] == 1e-3
    args.embed_lr = 1e-4  # LoRA's recipe has a lower rate for tables than for adapters
    groups = train.make_optimizers(model, args)[0].param_groups
    assert [g["peak"] for g in groups if g["params"][0] is model.embed.weight] == [1e-4]


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalize_keeps_directions_and_evens_out_their_sizes(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    ours = train.orthogonalize(g)
    inside = u.mT @ ours @ v.mT  # diagonal in the basis of g's own singular vectors
    size = inside.diagonal(dim1=-2, dim2=-1)
    assert size.min() > 0.3 and size.max() < 1.3
    assert (inside - torch.diag_embed(size)).abs().max() < 1e-3


def test_muon_decays_its_matrices_if_told_to():
    parse = train.build_parser().parse_args
    for flags, decay in (([], 0.0), (["--weight_decay", "0.2"], 0.2)):
        args = train.resolve(parse(["--optimizer", "muon", *flags]))[0]
        muon = train.make_optimizers(lm.Transformer(lm.preset("tiny")), args)[0]
        assert isinstance(muon, train.Muon)
        assert {g["weight_decay"] for g in muon.param_groups} == {decay}


class SignSGD(torch.optim.SGD):
    """An optimizer that a hacker adds."""

    def step(self):
        for p in (p for g in self.param_groups for p in g["params"]):
            p.grad.sign_()
        return super().step()


def test_an_optimizer_is_added_by_a_line_and_has_a_flag_for_its_rate(corpus, monkeypatch):
    monkeypatch.setitem(train.OPTIMIZERS, "sign", (SignSGD, 0.004))
    parse = train.build_parser().parse_args
    for flags, rate in (([], 0.004), (["--sign_lr", "0.01"], 0.01)):
        args = train.resolve(parse(["--optimizer", "sign", *flags]))[0]
        first, second = train.make_optimizers(lm.Transformer(lm.preset("tiny")), args)
        assert isinstance(first, SignSGD) and isinstance(second, torch.optim.AdamW)
        assert {g["peak"] for g in first.param_groups} == {rate}
    args.ckpt, args.lr, args.sign_lr = "out/base", 1e-3, None
    args = train.settle(args, lm.Transformer(lm.preset("tiny")), CPU)
    assert args.sign_lr == 0.002  # half of its own, as 1e-3 is of AdamW's 2e-3
    train.main(["--data", "words", *SMALL, "--optimizer", "sign", "--max_steps", "3"])


def test_muon_equals_torchs_own():
    torch.manual_seed(0)
    a = [torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(24, 8))]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    ours = train.Muon(a, lr=0.02, momentum=0.95)
    theirs = torch.optim.Muon(
        b, lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True, adjust_lr_fn="original"
    )
    for _ in range(5):
        for p, q in zip(a, b):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b):  # theirs runs its products in bfloat16
        assert (p - q).abs().max() < 0.02 * 5 * 0.02


# ---- the step ------------------------------------------------------------------------------


def gradients(cuts, targets, ids):
    """Gradients of one optimizer step over the rows, cut into micro-batches as `cuts` says."""
    torch.manual_seed(0)
    model = lm.Transformer(lm.preset("tiny", n_layer=1, n_head=2, d_model=16, init="gpt2",
                                     vocab_size=50)).double()
    batches = list(zip(ids.split(cuts), targets.split(cuts)))
    task = train.Task(batches=None, evaluate=None, extra={})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, count = train.training_step(model, task, batches, CPU, scaler, (0, 0))
    loss = float(loss)
    return loss, count, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_gives_the_gradient_of_the_whole_batch(masked):
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (8, 12))
    targets = torch.randint(0, 50, (8, 12))
    if masked:  # micro-batches of very different target counts, one of them without any
        targets[2:4] = -100
        targets[0, 1:] = -100
    one = gradients([8], targets, ids)
    four = gradients([2, 2, 2, 2], targets, ids)
    assert one[1] == four[1] == ids.numel()  # tokens read; the loss counts targets
    assert one[0] == pytest.approx(four[0], abs=1e-12)
    assert max((a - b).abs().max() for a, b in zip(one[2], four[2])) < 1e-12


def test_a_step_without_targets_and_a_loss_that_is_no_number_stop(corpus):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    task = train.Task(batches=None, evaluate=None, extra={})
    model = lm.Transformer(lm.preset("tiny", n_layer=1, d_model=16, vocab_size=64))
    masked = [(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -100))]
    with pytest.raises(UserError, match="no target"):
        train.training_step(model, task, masked, CPU, scaler, (0, 0))

    run("--data", "words", *SMALL, "--max_steps", 4, "--eval_every", 2, "--out", "out/nan")
    before = (corpus / "out/nan/last.pt").read_bytes()
    content = torch.load("out/nan/last.pt", weights_only=True)
    content["model"]["head.weight"][0, 0] = math.nan
    lm.save_checkpoint("out/nan/last.pt", content)
    poisoned = (corpus / "out/nan/last.pt").read_bytes()
    done = run("--resume", "out/nan", "--max_steps", 8, check=False)
    assert done.returncode == 2 and "Try a lower --lr" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (corpus / "out/nan/last.pt").read_bytes() == poisoned != before  # nothing was written


# ---- evaluation ----------------------------------------------------------------------------


def test_evaluation_scores_every_target_once_and_counts_bytes():
    torch.manual_seed(0)
    model = lm.Transformer(lm.preset("tiny", n_layer=1, d_model=16, n_head=2, context=8,
                                     vocab_size=64, init="gpt2"))
    tokens = np.random.default_rng(0).integers(0, 60, 8 * 5 + 4).astype(np.uint16)
    byte_lengths = np.arange(64) % 3
    result = train.evaluate(model, tokens, byte_lengths, CPU)
    total = 0.0
    for s in range(0, len(tokens) - 1, 8):
        piece = torch.from_numpy(tokens[s : s + 9].astype(np.int64))[None]
        logits = model(piece[:, :-1])
        total += torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum").item()
    assert result["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-6)
    n_bytes = byte_lengths[tokens[1:]].sum()
    assert result["val_bpb"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-6)
    assert result["val_share"] == 1 and result["val_ppl"] == pytest.approx(
        math.exp(result["val_loss"])
    )


def test_a_limited_evaluation_says_its_share_and_repeats_itself():
    model = lm.Transformer(lm.preset("tiny", n_layer=1, d_model=16, n_head=2, context=8,
                                     vocab_size=64))
    tokens = np.random.default_rng(0).integers(0, 60, 801).astype(np.uint16)
    a, b = (train.evaluate(model, tokens, np.ones(64, int), CPU, limit=200) for _ in range(2))
    assert a == b and a["val_share"] == pytest.approx(0.25)


@pytest.mark.parametrize("limit", [16, 88, 160, 400, 792])
def test_a_limited_evaluation_is_spread_over_the_whole_split(limit):
    class Reader(torch.nn.Module):
        config = lm.preset("tiny", context=8)

        def forward(self, ids, targets):
            seen.extend(ids[:, 0].tolist())
            return targets.sum() * 0.0

    seen, tokens = [], np.arange(801)
    row = train.evaluate(Reader(), tokens, np.ones(801, int), CPU, limit=limit)
    n = limit // 8
    gaps = np.diff([*seen, 800])
    assert len(seen) == n and row["val_share"] == pytest.approx(limit / 800)
    assert seen[0] == 0 and gaps.max() - gaps.min() <= 8 and gaps.max() <= 800 / n + 8


def test_the_whole_split_is_read_and_told_of_once_at_the_end(corpus):
    flags = ["--data", "words", *SMALL, "--max_steps", 2, "--eval_every", 2]
    whole, part = run(*flags).stdout, run(*flags, "--eval_tokens", 64).stdout
    assert whole.count("step 2  val loss") == 1 and "(100% of val)" in whole
    assert part.count("step 2  val loss") == 2 and part.count("(100% of val)") == 1
    rows = [r for r in metrics("out/words-2") if r.get("final")]
    assert len(rows) == 1 and rows[0]["val_share"] == 1
    assert rows[0]["val_loss"] == pytest.approx(metrics("out/words")[-1]["val_loss"])


# ---- what is measured ----------------------------------------------------------------------


def test_flops_are_those_of_the_rows_that_are_read(corpus):
    shape = dict(n_layer=1, n_head=1, d_model=8, context=4096, vocab_size=320)
    model = lm.Transformer(lm.preset("tiny", **shape))
    ids = torch.randint(320, (2, 16))
    task = train.Task(lambda step: [(ids, ids)], lambda m, final: {"val_loss": 1.0}, {})
    args = settings(max_steps=3, eval_every=9, log_every=2, autocast=None)
    train.fit(model, task, args, CPU, corpus / "run")
    row = next(r for r in metrics("run") if "mfu" in r)
    each = row["mfu"] * CPU.peak / row["tok_s"]
    assert each == pytest.approx(lm.flops_per_token(model.config, 16), rel=0.01)
    assert each < lm.flops_per_token(model.config) / 5
    about = [train.header(model, args, CPU, 1000, 32, length)[3] for length in (16, 4096)]
    assert about[0].split("take ")[1] <= about[1].split("take ")[1]


def test_a_last_short_interval_is_no_single_steps_loss(corpus):
    losses_seen = [5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 1.0]
    model = lm.Transformer(lm.preset("tiny", n_layer=1, n_head=1, d_model=8, context=8))
    loss = iter(losses_seen)
    task = train.Task(
        lambda step: [(torch.zeros(1, 4, dtype=torch.long),) * 2],
        lambda m, final: {"val_loss": 1.0}, {},
        loss=lambda m, ids, targets: m.head.weight.sum() * 0 + 4 * next(loss),
    )
    train.fit(model, task, settings(max_steps=9, log_every=4, eval_every=99, autocast=None), CPU,
              corpus / "run")
    assert [r["loss"] for r in metrics("run") if "loss" in r] == [3.0, 3.0, 2.0]


# ---- resuming ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_equals_straight_through_bitwise(corpus, optimizer, monkeypatch):
    flags = ["--data", "words", *SMALL, "--dropout", "0.2", "--max_steps", "12", "--log_every", "1",
             "--eval_every", "6", "--optimizer", optimizer]
    run(*flags, "--out", "out/straight")
    step = train.training_step
    with monkeypatch.context() as m:  # after step 8 it ends, two steps after its checkpoint
        m.setattr(train, "training_step", lambda *a: 1 / 0 if a[-1] == (0, 8) else step(*a))
        with pytest.raises(ZeroDivisionError):
            train.main([*flags, "--out", "out/killed"])
    assert torch.load("out/killed/last.pt", weights_only=True)["step"] == 6
    run("--resume", "out/killed")
    straight, resumed = weights("out/straight/last.pt"), weights("out/killed/last.pt")
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert losses("out/straight") == losses("out/killed")
    assert len(losses("out/killed")) == 12


@pytest.mark.slow
def test_a_checkpoint_is_loadable_at_every_moment(corpus):
    """kill -9 while checkpoints are written at every step: last.pt is always whole."""
    flags = ["--data", "words", *SMALL, "--eval_every", "1", "--eval_tokens", "16", "--max_steps",
             "4000", "--out", "out/kill"]
    for pause in (0.0, 0.013, 0.037):
        more = ["--resume", "out/kill"] if Path("out/kill/last.pt").exists() else flags
        p = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *more],
                             stdout=subprocess.PIPE, text=True)
        for line in p.stdout:
            if "val loss" in line:
                break
        time.sleep(0.1 + pause)
        p.kill()
        p.wait()
        assert lm.load_checkpoint("out/kill/last.pt")["state"]["step"] >= 1


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_the_step_and_sets_the_exit_code(corpus, number, code):
    flags = ["--data", "words", *SMALL, "--max_steps", "100000", "--eval_every", "100000",
             "--log_every", "1", "--out", "out/stop"]
    p = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.startswith("step 3/"):
            p.send_signal(number)
            break
    out, err = p.communicate(timeout=60)
    assert p.returncode == code, err
    assert "Traceback" not in err
    step = lm.load_checkpoint("out/stop/last.pt")["state"]["step"]
    assert step >= 3 and f"stopped at step {step}" in out


def test_resuming_cuts_metrics_and_inherits_what_is_not_given(corpus):
    run("--data", "words", *SMALL, "--max_steps", 10, "--eval_every", 5, "--log_every", 1, "--lr",
        "0.001", "--out", "out/r")
    with open("out/r/metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')  # of a crash after step 10
    done = run("--resume", "--max_steps", 14, "--log_every", 2)
    assert "resuming out/r/last.pt at step 10" in done.stdout and "max_steps 14" in done.stdout
    rows = metrics("out/r")
    assert [r["step"] for r in rows if "loss" in r] == [*range(1, 11), 12, 14]
    assert lm.load_checkpoint("out/r/last.pt")["args"]["lr"] == 0.001


def test_a_resumed_run_does_not_map_the_file_that_it_replaces(corpus, windows):
    train.main(["--data", "words", *SMALL, "--max_steps", "2", "--out", "out/r"])
    train.main(["--resume", "out/r", "--max_steps", "4"])
    assert lm.load_checkpoint("out/r/last.pt")["step"] == 4


@pytest.mark.parametrize("limit", ["max_steps", "max_minutes"])
def test_a_raised_limit_takes_the_decay_along(corpus, limit):
    """Warmup for 60 of 100 steps, then resumed to 1,000: the rate falls from step 100 on."""
    first = dict(max_steps=None, warmup_steps=60, lr=1.0) | {limit: 100}
    model = lm.Transformer(lm.preset("tiny", n_layer=1, n_head=1, d_model=8, context=8))
    task = train.Task(None, lambda m, final: {"val_loss": 1.0}, {})
    run = train.Run(model, task, settings(**first), CPU, corpus / "out")
    run.state |= dict(step=60, seconds=3600.0, warm_seconds=3600.0)  # a step a minute

    def rates(args, state, *steps):
        return [train.scheduled_lr(args, state | dict(step=s, seconds=60.0 * s)) for s in steps]

    assert rates(run.args, run.state, 60, 70) == pytest.approx([1, 0.75])
    run.state |= dict(step=80, seconds=4800.0)
    run.save()
    for limits, wanted in ((100, [0.5, 0.25]), (1000, [920 / 940, 910 / 940])):
        args = settings(**(first | {limit: limits}))
        again = train.Run(model, task, args, CPU, corpus / "out")
        again.restore(lm.load_checkpoint("out/last.pt", resuming=True))
        assert rates(args, again.state, 80, 90) == pytest.approx(wanted)


def test_a_new_run_never_writes_over_an_old_one(corpus):
    flags = ["--data", "words", *SMALL, "--max_steps", 1]
    run(*flags)
    first = Path("out/words/last.pt").read_bytes()
    assert "out/words-2/" in run(*flags).stdout
    assert Path("out/words/last.pt").read_bytes() == first
    taken = run(*flags, "--out", "out/words", check=False)
    assert taken.returncode == 2 and "--resume out/words" in taken.stderr


def test_a_resumed_run_takes_new_rates_and_refuses_a_new_text(corpus):
    run("--data", "words", *SMALL, "--max_steps", 4, "--schedule", "constant", "--out", "out/r")
    more = ["--resume", "out/r", "--log_every", 1, "--schedule", "constant"]
    run(*more, "--max_steps", 6, "--lr", 1e-4, "--embed_lr", 2e-4, "--weight_decay", 0.5)
    content = lm.load_checkpoint("out/r/last.pt")
    groups = [g for o in content["optimizers"] for g in o["param_groups"]]
    assert {g["peak"] for g in groups} == {1e-4, 2e-4, train.RECIPE["head_lr"]}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.5}
    assert metrics("out/r")[-3]["lr"] == pytest.approx(1e-4 * 6 / 60)  # in the warmup

    before = Path("out/r/last.pt").read_bytes()
    assert "finished" in run("--resume", "out/r").stdout
    with open("words.txt", "a", encoding="utf-8") as f:
        f.write(" and something new" * 50)
    prepare_data.main(["words.txt", "--tokenizer", "byte"])
    for flags, named in ((["--max_steps", "9"], "not the text"), (["--out", "out/q"], "--out")):
        done = run("--resume", "out/r", *flags, check=False)
        assert done.returncode == 2 and named in done.stderr
    assert Path("out/r/last.pt").read_bytes() == before


def test_an_edited_file_is_prepared_again(corpus):
    run("--data", "words.txt", *SMALL, "--max_steps", 1)
    with open("words.txt", "a", encoding="utf-8") as f:
        f.write("more")
    later = time.time() + 5
    os.utime("words.txt", (later, later))
    again = run("--data", "words.txt", *SMALL, "--max_steps", 1)
    assert "preparing words.txt first" in again.stdout


def test_runs_that_start_together_get_folders_of_their_own(corpus):
    assert len({new_run("same") for _ in range(3)}) == 3
    assert sorted(p.name for p in Path("out").iterdir()) == ["same", "same-2", "same-3"]


# ---- processes -----------------------------------------------------------------------------


def test_accumulation_follows_from_the_tokens_of_a_step():
    model = lm.meta_model(lm.preset("tiny", context=64))

    def settled(world, batch_size=1, **changes):
        defaults = dict(total_batch_tokens=None, max_tokens=None, grad_accum=2, context=None)
        args = settings(ckpt=None, batch_size=batch_size, **(defaults | changes))
        args = train.settle(args, model, Runtime(torch.device("cpu"), world=world))
        return args.grad_accum, args.total_batch_tokens, args.max_steps

    assert settled(1) == (2, 128, 10)
    assert settled(4) == (2, 512, 10)
    assert settled(1, context=32, max_steps=3) == (2, 64, 3)
    with pytest.raises(UserError, match="--context 65 must be from 2 to the model's 64"):
        settled(1, context=65)
    for world, accum in ((1, 8), (2, 4), (8, 1)):
        assert settled(world, total_batch_tokens=512, max_tokens=5000.0) == (accum, 512, 10)
    for steps, wanted in ((3, 3), (50, 10), (None, 10)):  # whichever comes first
        limits = dict(max_tokens=5000.0, max_steps=steps)
        assert settled(1, total_batch_tokens=512, **limits)[2] == wanted
    with pytest.raises(UserError, match="--grad_accum follows from --total_batch_tokens"):
        train.main(["--data", "words", "--total_batch_tokens", "512", "--grad_accum", "2"])
    for rows, world in ((1, 3), (1, 16), (3, 1)):
        with pytest.raises(UserError, match=f"512 is not a multiple of {64 * rows * world}"):
            settled(world, rows, total_batch_tokens=512)


def test_checkpoints_between_evaluations(corpus, monkeypatch):
    saved, save = [], train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda run, *a: saved.append(run.state["step"]) or
                        save(run, *a))
    flags = ["--data", "words", *SMALL, "--max_steps", "7", "--eval_every", "5"]
    train.main([*flags, "--save_every", "2", "--out", "out/steps"])
    assert saved == [2, 4, 5, 6, 7]
    saved.clear()
    train.main([*flags, "--save_minutes", "1e-9", "--out", "out/minutes"])
    assert saved == [1, 2, 3, 4, 5, 6, 7]


# ---- what a run leaves, and what stops it ----------------------------------------------------


def test_a_run_learns_and_leaves_its_files(corpus):
    done = run("--data", "words", *SMALL, "--max_steps", 60, "--eval_every", 20, "--log_every", 5)
    assert losses("out/words")[-1] < 0.6 * losses("out/words")[0]
    rows = metrics("out/words")
    last = next(r for r in reversed(rows) if "loss" in r)
    assert {"step", "tokens", "seconds", "lr", "grad_norm", "tok_s", "mfu"} < set(last)
    assert last["tokens"] == 60 * 4 * 16
    assert [r["step"] for r in rows if "val_bpb" in r] == [20, 40, 60, 60] and rows[-1]["final"]
    best = torch.load("out/words/best.pt", weights_only=True, mmap=True)
    assert "optimizers" not in best and best["tokenizer"] == {"kind": "byte"}
    for word in ("parameters", "Chinchilla", "memory about", "matmul peak", "xz -9e", "a sample"):
        assert word in done.stdout, word


def test_early_stopping_stops(corpus):
    done = run("--data", "words", *SMALL, "--max_steps", 400, "--eval_every", 2, "--patience", 2,
               "--lr", "1e-9", "--out", "out/early")
    assert "stopping early" in done.stdout
    assert lm.load_checkpoint("out/early/last.pt")["state"]["step"] < 400


def test_a_run_that_is_over_says_so_and_writes_nothing(corpus, capsys):
    def resumed(*flags):
        """What a run says, and the step that it ends with."""
        train.main(["--resume", "out/r", "--eval_every", "2", *map(str, flags)])
        said = capsys.readouterr().out
        return said, lm.load_checkpoint("out/r/last.pt")["step"]

    train.main(["--data", "words", *SMALL, "--max_steps", "400", "--eval_every", "2", "--lr",
                "1e-9", "--embed_lr", "1e-9", "--head_lr", "1e-9", "--patience", "2", "--out",
                "out/r"])
    capsys.readouterr()
    files = {path: path.read_bytes() for path in Path("out/r").iterdir()}
    for flags in ([], ["--patience", 1]):
        said, step = resumed(*flags)
        assert step == 6 and said.count("stopping early") == 1 and "a sample" not in said
    assert {path: path.read_bytes() for path in Path("out/r").iterdir()} == files
    for flags, wanted in ((["--patience", 4], 10), (["--max_steps", 300], 18), ([], 18),
                          (["--patience", 0, "--max_steps", 22], 22)):
        said, step = resumed(*flags)
        assert step == wanted
    files = {path: path.read_bytes() for path in Path("out/r").iterdir()}
    said, step = resumed()
    assert "this run is finished" in said and "a sample" not in said
    assert {path: path.read_bytes() for path in Path("out/r").iterdir()} == files
    Path("out/r/metrics.jsonl").write_text("")  # killed before its last evaluation and sample
    assert "a sample" in resumed()[0]


def test_minutes_end_a_run_and_the_schedule_with_it(corpus):
    run("--data", "words", *SMALL, "--max_minutes", "0.02", "--log_every", 1, "--out", "out/m")
    rows = metrics("out/m")
    steps = [r for r in rows if "lr" in r]
    assert 1.2 <= steps[-1]["seconds"] < 3
    assert steps[-1]["lr"] < 0.3 * max(r["lr"] for r in steps)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_trains_nearly_like_fp32(corpus, dtype):
    flags = ["--data", "words", *SMALL, "--max_steps", 30, "--log_every", 30, "--dtype"]
    run(*flags, "fp32", "--out", "out/full")
    run(*flags, dtype, "--out", "out/low")
    assert losses("out/low")[-1] == pytest.approx(losses("out/full")[-1], rel=0.02)
    assert all(w.dtype == torch.float32 for w in weights("out/low/last.pt").values())


def test_gradient_checkpointing_changes_nothing_but_memory(corpus):
    flags = ["--data", "words", *SMALL, "--max_steps", 5, "--log_every", 1, "--dropout", 0.1]
    run(*flags, "--out", "out/plain")
    run(*flags, "--grad_checkpoint", "--out", "out/re")
    assert losses("out/re") == losses("out/plain")


def test_compile_falls_back_to_eager_with_one_line(monkeypatch, capsys):
    def refuse(*args):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda plain: refuse)
    model = lm.Transformer(lm.preset("tiny", n_layer=1, d_model=16, vocab_size=64))
    task = train.Task(lambda step: [(torch.zeros(1, 4).long(),) * 2], evaluate=None, extra={})
    train.compile_blocks(model, task, CPU, 0)
    said = capsys.readouterr().out
    assert "no compiler here" in said and said.count("\n") == 1


def test_training_goes_on_from_a_checkpoints_weights(corpus):
    run("--data", "words", *SMALL, "--max_steps", 60, "--out", "out/base")
    more = ["--ckpt", "out/base", "--max_steps", 1, "--log_every", 1, "--out", "out/on"]
    run("--data", "words", *more)
    assert losses("out/on")[0] < 0.8 * math.log(256)  # not from scratch
    last = lm.load_checkpoint("out/on/last.pt")
    args = last["args"]
    assert [args[k] for k in ("lr", "embed_lr", "head_lr")] == pytest.approx([1e-3, 1e-2, 3e-3])
    large = settings(ckpt="gpt2", lr=None, embed_lr=None, head_lr=None, muon_lr=None, context=None,
                     total_batch_tokens=None, max_tokens=None)
    large = train.settle(large, lm.meta_model(lm.preset("gpt2")), CPU)
    assert large.lr == pytest.approx(6e-5) and large.embed_lr is None
    run("--data", "words", *more[:-1], "out/muon", "--optimizer", "muon", "--embed_lr", 1e-5)
    muon = lm.load_checkpoint("out/muon/last.pt")["args"]
    assert muon["muon_lr"] == pytest.approx(10 * args["lr"]) and muon["embed_lr"] == 1e-5


def test_a_second_process_is_refused_until_the_first_has_ended(corpus):
    run("--data", "words", *SMALL, "--max_steps", 2, "--out", "out/r")
    with lock_folder("out/r"):
        done = run("--resume", "out/r", "--max_steps", 3, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "out/r is being written by another process" in done.stderr
    run("--resume", "out/r", "--max_steps", 3)
    assert lm.load_checkpoint("out/r/last.pt")["step"] == 3
    content = lm.load_checkpoint("out/r/last.pt")
    content["args"]["objective"] = "sft"
    lm.save_checkpoint("out/r/last.pt", content)
    done = run("--resume", "out/r", "--max_steps", 4, check=False)
    assert done.returncode == 2 and "was written by finetune.py" in done.stderr


def test_the_first_command_goes_on_with_resume_added(corpus):
    run("--data", "words", *SMALL, "--max_steps", 2, "--out", "out/mine")
    run("--resume", "out/mine", "--data", "words", "--max_steps", 3)
    assert lm.load_checkpoint("out/mine/last.pt")["step"] == 3
    Path("data/words/meta.json").unlink()
    gone = run("--resume", "out/mine", "--max_steps", 4, check=False)
    assert gone.returncode == 2 and "data/words, the text of this run, is gone" in gone.stderr


@pytest.mark.parametrize(
    "flags,named",
    [
        (["--data", "nosuch"], "nosuch"),
        (["--data", "words", "--preset", "huge"], "huge"),
        (["--data", "words", "--n_head", "3"], "n_head 3"),
        (["--data", "words", "--vocab_size", "100"], "100"),
        (["--data", "words", "--context", "1000000"], "1000000"),
        (["--data", "words", "--batch_size", "0"], "--batch_size 0"),
        (["--data", "words", "--batch_size", "100000000"], "memory"),
        (["--data", "words", "--vocab_size", "99999999999999"], "size"),
        (["--data", "words", "--min_lr", "inf"], "--min_lr inf"),
        (["--data", "words", "--out", "words.txt"], "words.txt"),
        (["--data", "words", "--lr", "-1"], "--lr -1"),
        (["--data", "words", "--dtype", "int3"], "int3"),
        (["--data", "words", "--device", "tpu"], "tpu"),
        (["--resume", "out/none"], "out/none"),
        (["--resume"], "out/"),
        (["--ckpt", "words.txt", "--data", "words"], "words.txt"),
    ],
)
def test_a_users_mistake_is_one_line_that_names_it(corpus, flags, named):
    done = run(*flags, check=False)
    assert done.returncode == 2
    assert named in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "flags, name, value",
    [
        (["--max_iters", "7"], "max_steps", 7),
        (["--max-steps=7"], "max_steps", 7),
        (["--learning_rate", "1e-3"], "lr", 1e-3),
        (["--learning-rate=1e-3"], "lr", 1e-3),
        (["--block_size", "32"], "context", 32),
        (["--eval_interval", "5"], "eval_every", 5),
        (["--batch-size", "5"], "batch_size", 5),
        (["--no-qk-norm"], "qk_norm", False),
        (["--no-qk_norm"], "qk_norm", False),
        (["--dtype", "bfloat16"], "dtype", "bf16"),
        (["--dtype", "float32"], "dtype", "fp32"),
        (["--prompt=--max-iters"], "prompt", "--max-iters"),
    ],
)
def test_flags_may_be_called_as_elsewhere(flags, name, value):
    assert getattr(train.build_parser().parse_args(flags), name) == value


@pytest.mark.parametrize(
    "script, flags, said",
    [
        (train, "--lrr 3", "unknown argument --lrr: did you mean --lr?"),
        (train, "--warmup 3", "unknown argument --warmup: did you mean --warmup_steps?"),
        (train, "--max_step 3", "did you mean --max_steps?"),  # no abbreviations
        (train, "--laerning_rate 3", "did you mean --lr?"),
        (sample, "--block_siz 3", "unknown argument --block_siz (see --help)"),
        (train, "--lr abc", "argument --lr: invalid float value: 'abc'"),
        (train, "--optimizer sgd", "invalid choice: 'sgd'"),
        (train, "words", "unknown argument words"),
        (lora, "merge", "the following arguments are required: --ckpt, --adapter, --out"),
        (lora, "merge --ckpt a --adapter b --oute c", "--out"),
    ],
)
def test_a_wrong_flag_is_one_line(script, flags, said, capsys):
    with pytest.raises(SystemExit) as e:
        script.build_parser().parse_args(flags.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1


def test_another_tokenizer_than_the_checkpoints_is_refused(corpus):
    run("--data", "words", *SMALL, "--max_steps", 1, "--out", "out/base")
    prepare_data.main(["words.txt", "--tokenizer", "char", "--name", "other"])
    done = run("--data", "other", "--ckpt", "out/base", check=False)
    assert done.returncode == 2 and "byte" in done.stderr and "char" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cuda_trains_like_the_cpu(corpus, dtype):
    flags = ["--data", "words", *SMALL, "--max_steps", 30, "--log_every", 30]
    run(*flags, "--device", "cpu", "--out", "out/cpu")
    run(*flags, "--device", "cuda", "--dtype", dtype, "--out", "out/cuda")
    assert losses("out/cuda")[-1] == pytest.approx(losses("out/cpu")[-1], rel=0.03)
