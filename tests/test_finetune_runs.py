"""finetune.py at work: what is minimised, whole runs of every kind, resuming, mistakes."""

import argparse
import gc
import itertools
import json
import math
import random
import re
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import test_train
import torch
import torch.nn.functional as F
from conftest import BYTE, CHAT, CPU, ROOT
from test_runner import torchrun
from test_train import killed_in_step, losses, metrics

import finetune as ft
import model as lm
import sample
import train
from data.batches import BucketLoader, Row, pad
from data.chat import CHAT_TOKENS
from data.rows import load_data
from data.sources import SOURCES, Source
from data.tokenizer import Tokenizer, labels_of

FITS = argparse.Namespace(context=48, loss_on="assistant")
KNOWN, NEW = 257, slice(257, 263)  # ids of a byte model, those of CHAT_TOKENS
WORDS = ["to", "be", "or", "not", "the", "question", "学习", "good"]
QUICK = ["--eval_rows", "0", "--log_every", "1", "--batch_tokens", "128", "--warmup_steps", "2"]
SFT = ["--data", "chats.jsonl", *QUICK]
LABELS = ["--data", "labels.jsonl", *QUICK]
DPO = ["--data", "pairs.jsonl", *QUICK]
refused = partial(test_train.refused, main=ft.main)  # what a mistake prints
LORA = ["--lora_rank", "4"]
TABLES = dict(value_embed=True, bigram=64, induction=True)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=320, n_layer=1, n_head=2, d_model=16, context=48, init="gpt2")
    return lm.Transformer(lm.Config(**(shape | changes)))


def save_model(path, model):
    content = {"config": asdict(model.config), "model": model.state_dict()}
    lm.save_checkpoint(path, content | {"tokenizer": BYTE.spec, "step": 0})


def save_base(path, **changes):
    save_model(path, small_model(**changes))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A base that has seen the words and what stands between them, for a second."""
    path = tmp_path_factory.mktemp("taught") / "best.pt"
    model = small_model(d_model=32, n_layer=2, **TABLES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = random.Random(0)
    for _ in range(150):
        text = " ".join(rng.choices([*WORDS, "?", "A", "B"], k=100)).encode()
        ids = torch.tensor(list(text[: 6 * 49])).view(6, 49)
        (model(ids[:, :-1], ids[:, 1:].contiguous()) / ids[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(path, model)
    return path


def write(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")


def tool_chat(word, n):
    call = json.dumps({"name": "look", "arguments": {"of": word}})
    said = dict(user=f"{n} {word}?", call=call, tool="ok", assistant=f"{word}!")
    return {"messages": [{"role": role, "content": text} for role, text in said.items()]}


@pytest.fixture
def desk(tmp_path, monkeypatch, taught):
    """A folder to work in: a base model and toy rows of every kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.machine.measure_peak", lambda *_: 1e11)
    Path("out/base").mkdir(parents=True)
    shutil.copy(taught, "out/base/best.pt")
    pairs = [*itertools.product(WORDS, WORDS)][:60]
    write("chats.jsonl", [{"instruction": f"{a} {b}", "output": b * (1 + len(a) % 3)}
                          for a, b in pairs])
    write("tools.jsonl", [tool_chat(w, n) for n, (_, w) in enumerate(pairs)])
    write("labels.jsonl", [{"text": f"{a} {b} {mark}", "label": label} for (a, b), (mark, label)
                           in zip(pairs, itertools.cycle((("A", "pos"), ("B", "neg"))))])
    write("pairs.jsonl", [{"prompt": f"{a} {b}", "chosen": f"{b} A", "rejected": f"{a * 2} B"}
                          for a, b in pairs])
    return tmp_path


def tune(*flags, out="out/run", ckpt="out/base"):
    ft.main([str(f) for f in ("--ckpt", ckpt, "--out", out, *flags)])
    return Path(out)


def values(out, key):
    return [r[key] for r in metrics(out) if key in r]


def content(path):
    return torch.load(path, weights_only=True)


def in_two_processes(*flags):
    """Run finetune.py over out/base into out/two in two processes; returns what it prints."""
    flags = ["--ckpt", "out/base", "--out", "out/two", *flags]
    done = torchrun(2, ROOT / "finetune.py", *flags)
    said, _ = done.communicate(timeout=300)
    assert done.returncode == 0, said
    return said


def same_weights(a, b, name="last.pt"):
    a, b = (content(f"out/{out}/{name}")["model"] for out in (a, b))
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def same_gradients(model, exact, tolerance):
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        size = max(1e-30, float(q.grad.abs().max()))
        assert float((p.grad.double() - q.grad).abs().max()) <= tolerance * size, name


def some_rows(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        mask = (torch.rand(n, generator=g) < 0.4).int().tolist()
        rows.append(Row(torch.randint(300, (n,), generator=g).tolist(), [*mask[:-1], 1]))
    return rows


@pytest.mark.parametrize("bias, allowed", [(False, 50), (True, 20)])
def test_token_log_probabilities_are_those_of_the_full_softmax(bias, allowed):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 200, 8).double(), torch.randn(50, 8).double()
    b = torch.randn(50).double() if bias else None
    targets, mask = torch.randint(allowed, (3, 200)), torch.arange(50) < allowed
    targets[0, ::3] = targets[1] = -100
    leaves = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    by_place = torch.randn(3, 200).double()  # places count differently, as pairs do
    ours = lm.token_logps(x, weight, b, targets, mask if allowed < 50 else None)
    got = torch.autograd.grad((ours * by_place).sum(), leaves)
    full = F.linear(x, weight, b)[..., mask].log_softmax(-1)
    theirs = full.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    assert ours.dtype == torch.float64 and (ours - theirs).abs().max() < 1e-12
    for a, c in zip(got, torch.autograd.grad((theirs * by_place).sum(), leaves)):
        assert (a - c).abs().max() < 1e-11
    nothing = lm.token_logps(x.float(), weight.float(), None, torch.full((3, 200), -100))
    assert nothing.dtype == torch.float32 and not nothing.any()


def pair_batch(pairs, reference):
    split = ft.Split([], pairs, reference=reference)
    return ft.DPO(None, CHAT).batch(split, list(range(len(pairs))), pairs)


@pytest.mark.parametrize("shape, dtype, tolerance", [({}, torch.float32, 2e-4),
                         (dict(tied=True), torch.float64, 1e-10),
                         (dict(head_bias=True, position="learned"), torch.float64, 1e-10)])
def test_dpo_and_its_gradients_are_the_papers_formula(shape, dtype, tolerance):
    rows = some_rows((9, 30, 12, 12, 25, 5, 2, 40))
    pairs = list(zip(rows[::2], rows[1::2]))
    reference = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)) - 60
    model, exact = small_model(**shape).to(dtype), small_model(**shape).double()
    loss = ft.preference_loss(0.3 * ft.dpo_margin(model, *pair_batch(pairs, reference)))
    loss.backward()
    wanted = 0.0
    for pair, base in zip(pairs, reference.double()):
        gain = []
        for row, ref in zip(pair, base):
            log_p = exact(torch.tensor([row.ids[:-1]]))[0].log_softmax(-1)
            logps = log_p.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
            gain.append((logps * torch.tensor(row.mask[1:])).sum() - ref)
        wanted = wanted + torch.log1p(torch.exp(-0.3 * (gain[0] - gain[1])))
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    same_gradients(model, exact, tolerance)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distilling_is_cross_entropy_and_softened_kl(share):
    model, exact = small_model(1), small_model(1).double()
    teacher = small_model(2, vocab_size=384, d_model=32).eval()  # more spare rows, another size
    ids, targets = pad(some_rows((9, 30, 12)))
    places = lm.target_places(targets)
    loss = ft.distill_loss(model, ids, targets, places, teacher, share, 2.5)
    loss.backward()
    ours = exact(ids)[targets != -100]
    with torch.no_grad():
        goal = teacher.double()(ids)[targets != -100][:, :320]
    wanted = share * F.cross_entropy(ours, targets[targets != -100], reduction="sum")
    soft, hard = (ours / 2.5).log_softmax(-1), (goal / 2.5).softmax(-1)
    wanted = wanted + (1 - share) * 2.5**2 * F.kl_div(soft, hard, reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    same_gradients(model, exact, 1e-4)


def task_of(rows, name, batch_tokens, accum, reference=None):
    args = dict(objective=name, grad_accum=accum, context=48, updates=None)
    args = argparse.Namespace(**(ft.RECIPE | ft.OBJECTIVES[name].recipe | args))
    loader, split = BucketLoader(lambda _: rows, batch_tokens, 0), ft.Split([], rows)
    objective, split.reference = ft.OBJECTIVES[name](args, CHAT, (), CPU), reference
    return loader.per_epoch, ft.make_task(args, objective, {"train": split}, loader, {})


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_micro_batches_of_any_target_count_give_the_gradient_of_the_whole(objective):
    rows = some_rows((3, 40, 12, 5, 33, 48, 2, 9, 17, 26))
    for row in rows[::4]:  # one target against dozens
        row.mask = [0] * (len(row.ids) - 1) + [1]
    reference = None
    if objective == "dpo":
        rows, reference = list(zip(rows[::2], rows[1::2])), torch.randn(5, 2) - 50
    scaler, results = torch.amp.GradScaler("cpu", enabled=False), []
    n, _ = task_of(rows, objective, 60, 1, reference)
    assert n > 3
    for batch_tokens, accum in ((60, n), (10**6, 1)):
        model = small_model().double()
        _, task = task_of(rows, objective, batch_tokens, accum, reference)
        batches = task.batches(0)
        assert len(batches) == accum
        loss, _ = train.training_step(model, task, batches, CPU, scaler, (0, 0))
        results.append((float(loss), model))
    (cut, ours), (whole, theirs) = results
    if objective == "dpo":  # a mean over pairs, whatever their lengths
        margin = ft.dpo_margin(small_model().double(), *pair_batch(rows, reference))
        total = ft.preference_loss(0.1 * margin).item()
        assert whole == pytest.approx(total / 5, rel=1e-5)
    assert cut == pytest.approx(whole, rel=1e-12)
    same_gradients(ours, theirs, 1e-12)


@pytest.mark.parametrize("flags", [[], [*LORA, "--quantize", "nf4"], ["--dtype", "bf16"]])
def test_rewards_start_at_zero_and_what_is_preferred_is_learned(desk, flags):
    limit = ["--max_steps", "1"] if flags else ["--epochs", "4"]
    out = tune(*DPO, *limit, "--lr", "3e-3", "--eval_every", "10", *flags)
    assert losses(out)[0] == pytest.approx(math.log(2), abs=0.05 if "bf16" in flags else 1e-4)
    scores = json.loads((out / "scores.json").read_text())["val"]
    learned = scores["reward_accuracy"] == 1 and scores["reward_margin"] > 0.5
    assert learned or flags


def test_the_reference_is_the_base_itself_and_is_kept_in_last_pt(desk):
    full = content(tune(*DPO, "--max_steps", "3", out="out/full") / "last.pt")["reference"]
    thin = content(tune(*DPO, *LORA, "--max_steps", "3", out="out/thin") / "last.pt")["reference"]
    model = lm.model_from_checkpoint(lm.load_checkpoint("out/base")).double()
    lm.grow_vocabulary(model, 320, KNOWN)
    assert {len(t.weight) - t.num_embeddings for t in (model.embed, model.value_embed)} == {0}
    _, splits, _ = load_data("pairs.jsonl")
    for split in ("train", "val"):
        rows = ft.DPO(FITS, CHAT).make_split(splits[split]).rows
        with torch.no_grad():
            logps = [model(*pad([r]), output="log_probs").sum().item() for p in rows for r in p]
        assert torch.equal(full[split], thin[split])
        assert full[split].flatten().tolist() == pytest.approx(logps, abs=1e-3)


@pytest.mark.parametrize("flags", [
    [*SFT, "--dropout", "0.2", "--grad_accum", "2"],
    [*SFT, *LORA, "--dropout", "0.1", "--quantize", "int8", "--lora_targets", "mlp",
     "--lora_alpha", "16", "--context", "20"],
    [*SFT, *LORA, "--lora_dropout", "0.2", "--quantize", "nf4", "--token_dropout", "0.2"],
    [*SFT, "--data", "tools.jsonl", "--loss_on", "call", "--optimizer", "muon"],
    [*DPO, "--dropout", "0.1"],
])
def test_killed_and_resumed_equals_straight_through_bitwise(desk, flags):
    flags = [*flags, "--max_steps", "10", "--eval_every", "4", "--eval_rows", "3"]
    tune(*flags, out="out/straight")
    with killed_in_step(7):
        tune(*flags, out="out/killed")
    assert content("out/killed/last.pt")["step"] == 4 and len(losses("out/killed")) == 6
    ft.main(["--resume", "out/killed"])
    assert losses("out/killed") == losses("out/straight") and len(losses("out/killed")) == 10
    assert same_weights("killed", "straight") and same_weights("killed", "straight", "best.pt")
    texts = [Path(f"out/{o}/predictions.jsonl") for o in ("straight", "killed")]
    assert not texts[0].exists() or texts[0].read_text() == texts[1].read_text()


@pytest.mark.parametrize("flags", [SFT, [*SFT, *LORA, "--quantize", "nf4"]])
def test_a_resumed_run_does_not_map_the_file_that_it_replaces(desk, windows, flags):
    tune(*flags, "--max_steps", "2")
    gc.collect()  # its report had best.pt mapped
    ft.main(["--resume", "out/run", "--max_steps", "4"])
    assert content("out/run/last.pt")["step"] == 4


def test_resuming_is_refused_for_other_data_other_scripts_and_fixed_flags(desk):
    tune(*SFT, "--max_steps", "2")
    for flags, named in ((["--val", 0.3], "--val"), (["--context", 20], "--context"),
                         (["--lora_rank", 2], "--lora_rank"), (["--loss_on", "call"], "--loss_on"),
                         (["--out", "out/x"], "--out"),
                         (["--data", "pairs.jsonl"], "not the data")):
        assert named in refused("--resume", "out/run", *flags)
    assert "finetune.py" in refused("--resume", "out/run", main=train.main)
    assert "is for sampling: resume a last.pt" in refused("--resume", "out/run/best.pt")
    write("chats.jsonl", [{"instruction": str(i), "output": "x"} for i in range(9)])
    assert "not the data that the run began with" in refused("--resume", "out/run")
    lm.save_checkpoint("out/plain/last.pt", content("out/run/last.pt") | {"args": {}})
    assert "written by train.py" in refused("--resume", "out/plain")
    assert "base/last.pt does not exist" in refused("--resume", "out/base")


def test_a_resumed_run_goes_on_for_more_epochs_and_reports_on_its_own_split(desk, capsys):
    tune(*SFT, "--epochs", "0.5", "--split", "train", "--eval_every", "4", "--grad_accum", "3")
    ft.main(["--resume", "out/run", "--epochs", "1.4"])
    out = capsys.readouterr().out
    n = int(re.search(r"(\d+) batches an epoch", out)[1])
    assert "settings are the run's own, but epochs 1.4" in out
    assert out.count("on train:") == 2 and len(losses("out/run")) == math.ceil(1.4 * n / 3)


def test_supervised_fine_tuning_end_to_end(desk, capsys):
    ft.main(["--ckpt", "out/base", *SFT, "--epochs", "3", "--eval_every", "20", "--eval_rows", "4",
             "--lr", "5e-3"])
    out = Path("out/chats-ft")
    files = "best.pt last.pt loss.svg metrics.jsonl predictions.jsonl scores.json settings.json"
    assert sorted(p.name for p in out.glob("[!.]*")) == files.split()
    said = capsys.readouterr().out
    n = int(re.search(r"(\d+) batches an epoch", said)[1])
    assert len(losses(out)) == 3 * n and sum(losses(out)[2 * n:]) < 0.7 * sum(losses(out)[:n])
    assert "54 conversations to learn, 6 to measure" in said and "answered" in said
    rows = [json.loads(r) for r in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and set(rows[0]) == {"prompt", "reference", "prediction"}
    assert "bleu4" in metrics(out)[-2]
    asked = json.loads((out / "settings.json").read_text())["examples"]  # for the page
    assert len(asked) == 4 and {r["prompt"] for r in rows} >= set(asked)
    ft.main(["--ckpt", "out/base", *SFT, "--max_steps", "1"])
    assert Path("out/chats-ft-2/best.pt").exists()


def test_a_classifier_end_to_end(desk, capsys):
    out = tune(*LABELS, "--epochs", "10", "--lr", "1e-2", "--head_lr", "3e-2", "--eval_every", "20")
    said = capsys.readouterr().out
    table = re.search(r"neg +pos\n +neg +(\d+) +(\d+)\n +pos +(\d+) +(\d+)\n", said).groups()
    rows = [json.loads(r) for r in (out / "predictions.jsonl").read_text().splitlines()]
    assert sum(map(int, table)) == len(rows) == 6
    right = sum(r["reference"] == r["prediction"] for r in rows)
    assert right == int(table[0]) + int(table[3]) >= 5
    assert values(out, "accuracy")[-1] == pytest.approx(right / 6)
    start = next(r for r in metrics(out) if "val_loss" in r)  # both losses are among two labels
    assert start["step"] == 0 and start["val_loss"] == pytest.approx(math.log(2), abs=0.1)
    assert losses(out)[0] == pytest.approx(math.log(2), abs=0.3) and "Chinchilla" not in said
    assert labels_of(Tokenizer(content(out / "best.pt")["tokenizer"])) == ["neg", "pos"]
    sample.main(["--ckpt", str(out), "--prompt", rows[0]["text"]])
    first, p, _, _ = capsys.readouterr().out.split()
    assert first == rows[0]["prediction"] and float(p) == pytest.approx(max(rows[0]["p"]), abs=1e-3)


def test_a_run_learns_from_a_teacher_that_speaks_its_language(desk):
    teacher = tune(*SFT, "--epochs", "2", out="out/teacher")
    flags = [*SFT, "--objective", "distill", "--max_steps", "20"]
    tune(*flags, "--teacher", teacher)
    assert sum(losses("out/run")[15:]) < 0.8 * sum(losses("out/run")[:5])
    tune(*flags, "--max_steps", "1", "--teacher", teacher, "--distill_lambda", "1", out="out/c")
    tune(*SFT, "--max_steps", "1", out="out/d")
    assert losses("out/c") == pytest.approx(losses("out/d"), rel=1e-6)
    assert "other tokens" in refused("--ckpt", "out/base", *flags, "--teacher", "out/base")


def test_eval_only_measures_a_split_and_trains_nothing(desk, monkeypatch, capsys):
    rows = Path("labels.jsonl").read_text().splitlines(keepends=True)
    for split, part in (("train", rows[:40]), ("dev", rows[40:52]), ("test", rows[52:])):
        Path(f"{split}.jsonl").write_text("".join(part))
    paths = {s: f"{s}.jsonl" for s in ("train", "dev", "test")}
    monkeypatch.setitem(SOURCES, "films", Source(lambda: paths, rows=True))
    out = tune("--data", "films", *QUICK, "--epochs", "2")
    before = (out / "last.pt").read_bytes()
    scores = json.loads((out / "scores.json").read_text())["val"]
    capsys.readouterr()
    for split, n in (("dev", 12), ("test", 8), ("train", 40)):
        flags = ["--eval_only", "--data", "films", "--split", split]
        ft.main([*flags, "--ckpt", str(out), "--out", f"out/{split}"])
        assert len(Path(f"out/{split}/predictions.jsonl").read_text().splitlines()) == n
        said, name = capsys.readouterr().out, "val" if split == "dev" else split
        assert f"measuring {n} labelled texts: {name} of films\n" in said
        assert f"accuracy {scores['accuracy']:.4f}" in said or split != "dev"
    assert (out / "last.pt").read_bytes() == before
    assert "out/base does not know" in refused(*flags, "--resume", "out/base")
    assert "either --ckpt or" in refused(*flags, "--resume", "out/base", "--ckpt", out)
    Path("test.jsonl").write_text('{"text": "a", "label": "neutral"}\n')
    assert "'neutral'" in refused(*flags)


@pytest.mark.parametrize("data, noun", [(SFT, "conversations"), (LABELS, "labelled texts"),
                                        (DPO, "preference pairs")])
def test_eval_only_measures_all_of_a_file_and_says_how_many_rows(desk, capsys, data, noun):
    out, name = tune(*data, *LORA, "--max_steps", "1"), data[1]
    flags = ["--eval_only", "--ckpt", str(out), "--data"]
    for n, more, rows in ((6, ["--val", "0.1"], "val"), (9, ["--rows", ":9"], "all rows")):
        ft.main([*flags, name, *more, "--out", f"out/{n}"])
        assert f"measuring {n} {noun}: {rows} of {name}\n" in capsys.readouterr().out
    if data == LABELS:  # a file without some of the labels does not make the others likelier
        write("neg.jsonl", [{"text": "a b B", "label": "neg"}] * 3)
        ft.main([*flags, "neg.jsonl", "--out", "out/neg"])
        rows = Path("out/neg/predictions.jsonl").read_text().splitlines()
        assert [len(json.loads(row)["p"]) for row in rows] == [2] * 3


def test_pairs_of_any_split_are_measured_against_the_model_before(desk, monkeypatch, capsys):
    paths = dict.fromkeys(("train", "dev", "test"), "pairs.jsonl")
    monkeypatch.setitem(SOURCES, "pairs", Source(lambda: paths, rows=True))
    for out, flags in (("out/full", []), ("out/thin", LORA), ("out/test", ["--split", "test"])):
        tune(*DPO, "--data", "pairs", *flags, "--max_steps", "3", out=out)
    scores = json.loads(Path("out/test/scores.json").read_text())["test"]
    assert scores["reward_margin"] == pytest.approx(values("out/test", "reward_margin")[-1])
    assert "resume it with --split val" in refused("--resume", "out/full", "--split", "test")
    flags = ["--eval_only", "--data", "pairs.jsonl", "--ckpt"]
    assert "before DPO, which out/full lacks" in refused(*flags, "out/full")
    ft.main([*flags, "out/thin", "--out", "out/seen"])
    scores = json.loads(Path("out/thin/scores.json").read_text())["val"]
    assert f"reward margin {scores['reward_margin']:.4f}" in capsys.readouterr().out


def built(*flags, ckpt="out/base"):
    args, objective, *_ = ft.resolve(ft.build_parser().parse_args(["--ckpt", ckpt, *flags]))
    base = lm.load_checkpoint(args.ckpt)
    needed = partial(objective.special_tokens, splits={}, labels=["neg", "pos"])
    return ft.build_model(args, base, None, needed, CPU)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [KNOWN, 259, 320, 512])
def test_new_tokens_take_spare_rows_first_and_start_at_the_mean(desk, tied, vocab):
    save_base("out/base/best.pt", vocab_size=vocab, tied=tied, head_bias=not tied)
    base = content("out/base/best.pt")["model"]
    model, tokenizer, about = built(*SFT)
    assert about is None and tokenizer.n_vocab == 263
    assert model.config.vocab_size == len(model.embed.weight) == max(vocab, 320)
    for name in ("embed.weight", "head.weight", "head.bias"):
        if name in base:
            ours = model.state_dict()[name]
            assert torch.equal(ours[:KNOWN], base[name][:KNOWN])
            assert (ours[KNOWN:] - base[name][:KNOWN].mean(0)).abs().max() < 1e-7
    assert (model.head.weight is model.embed.weight) == tied
    assert built(*LABELS)[1].n_vocab == 259


@pytest.mark.parametrize("tied", [False, True])
def test_under_lora_tables_that_lack_tokens_learn_and_travel_with_the_adapter(desk, tied):
    save_base("out/base/best.pt", tied=tied)
    base = content("out/base/best.pt")["model"]
    out = tune(*SFT, *LORA, "--max_steps", "12", "--lr", "1e-2")
    state = content(out / "best.pt")["model"]
    tables = ["embed.weight"] if tied else ["embed.weight", "head.weight"]
    modules = {"embed.weight"} if tied else {"embed.weight", "head.weight", "head.bias"}
    assert {k for k in state if not k.endswith((".a", ".b"))} <= modules
    model, tokenizer, _ = sample.load(out)
    assert tokenizer.spec == CHAT.spec
    for table in tables:
        assert torch.equal(model.get_parameter(table), state[table])
        assert (state[table][NEW] - base[table][:KNOWN].mean(0)).abs().max() > 1e-3
    _, splits, _ = load_data("chats.jsonl")
    ids, targets = pad(ft.SFT(FITS, CHAT).make_split(splits["val"]).rows)
    loss = model(ids, targets).item() / int((targets != -100).sum())
    assert loss == pytest.approx(values(out, "val_loss")[-1], rel=1e-5)  # nothing else has learned
    assert "adapter" in content(out / "last.pt") and (out / "last.pt").stat().st_size < 10**6


def test_a_second_round_knows_the_tokens_already(desk):
    tune(*SFT, "--max_steps", "2", out="out/first")
    _, tokenizer, about = built(*SFT, *LORA, ckpt="out/first")
    assert about["modules_to_save"] == [] and tokenizer.n_vocab == 263
    tune(*SFT, *LORA, "--max_steps", "2", ckpt="out/first")
    assert all(k.endswith((".a", ".b")) for k in content("out/run/best.pt")["model"])
    both = tune(*LABELS, "--max_steps", "2", "--dtype", "bf16", ckpt="out/first", out="out/labels")
    spec = content(both / "best.pt")["tokenizer"]
    assert len(spec["special"]) == len(CHAT_TOKENS) + 2


def test_an_adapter_brings_its_base_or_says_in_a_line_what_is_wrong_with_it(desk, capsys):
    out = tune(*SFT, *LORA, "--max_steps", "3")
    before = sorted(out.iterdir())
    ft.main(["--eval_only", "--ckpt", str(out), "--data", "chats.jsonl", "--dtype", "bf16"])
    said = capsys.readouterr().out
    assert "bleu4" in said and "out/run-eval/predictions.jsonl" in said
    assert sorted(out.iterdir()) == before
    flags = ["--eval_only", "--ckpt", out, "--data", "chats.jsonl"]
    assert "holds a run already" in refused(*flags, "--out", "out/run")
    talk, resume = ["--ckpt", out, "--prompt", "to"], ["--resume", out, "--max_steps", "5"]
    Path("out/base").rename("out/moved")
    for flags, main in ((talk, sample.main), (resume, ft.main)):
        assert "out/base" in refused(*flags, main=main)
    save_base("out/base/best.pt", seed=1)
    for flags, main in ((talk, sample.main), (resume, ft.main)):
        assert "another model" in refused(*flags, main=main)
    shutil.rmtree("out/base")
    Path("out/moved").rename("out/base")
    ft.main([str(f) for f in resume])
    classifier = tune(*LABELS, *LORA, "--max_steps", "1", out="out/labels")
    mixed = ["--ckpt", out, "--adapter", classifier, "--prompt", "a"]
    assert "special tokens" in refused(*mixed, main=sample.main)


@pytest.mark.slow
def test_two_processes_decide_by_the_scores_of_the_first_and_report_once(desk):
    flags = "--data tools.jsonl --best_by slot_f1 --eval_every 1 --max_steps 4 --patience 2"
    said = in_two_processes(*flags.split(), "--eval_rows", "4")
    assert "stopping early" in said and said.count("on val:") == 1
    assert len(values("out/two", "slot_f1")) > 2


@pytest.mark.parametrize("flags, wanted", [
    ([], {k: ft.RECIPE[k] for k in ("embed_lr", "head_lr", "muon_lr", "lora_rank")}),
    (["--lr", "1e-5", "--muon_lr", "0.5"], dict(embed_lr=3e-5, head_lr=3e-5, muon_lr=0.5)),
    (["--lora_alpha", "4"], dict(lora_rank=8) | ft.LORA_RECIPE),
    ([*LORA, "--lr", "3e-4", "--head_lr", "1"], dict(lora_rank=4, embed_lr=1e-4, head_lr=1)),
])
def test_the_rate_that_is_given_governs_the_others_and_lora_s_flags_mean_lora(desk, flags, wanted):
    args, *_ = ft.resolve(ft.build_parser().parse_args(["--data", "chats.jsonl", *flags]))
    assert {k: vars(args)[k] for k in wanted} == pytest.approx(wanted)


def test_one_row_is_learned_with_val_0_and_what_a_reader_would_miss_is_told(desk, capsys):
    assert "--val 0 to learn from all" in refused(*SFT, "--rows", ":1")
    out = tune("--data", "chats.jsonl", "--rows", ":1", "--val", "0", "--eval_rows", "0",
               "--grad_accum", "8", "--epochs", "4", "--lr", "9", "--grad_clip", "0")  # fmt: skip
    said = capsys.readouterr()
    assert "on 1 rows that are learned" in said.err
    assert "no val loss is below that before" in said.out and "rates: lr 9, embed" in said.out
    assert content(out / "last.pt")["args"]["warmup_steps"] == 1
    ft.main(["--resume", "--out", "out/run"])
    assert "or (finetune.py) --epochs" in capsys.readouterr().out


@pytest.mark.parametrize("flags, named", [
    ([], "--data is missing"),
    ([*SFT, "--quantize", "nf4"], "--lora_rank"),
    ([*SFT, "--lora_rank", "0", "--lora_alpha", "8"], "--lora_rank 0 trains all weights"),
    ([*SFT, "--objective", "distill"], "--teacher"),
    ([*SFT, "--augment", "0.5"], "--augment is for --data hotel"),
    ([*SFT, "--best_by", "slot_f1", "--eval_rows", "4"], "slot_f1 is not measured here"),
    ([*SFT, *LORA, "--lora_targets", "head", "--ckpt", "tied.pt"], "tied head"),
    ([*SFT, "--ckpt", "adapter.pt"], "merge it first"),
    ([*SFT, "--ckpt", "bare.pt"], "no tokenizer"),
    ([*SFT, "--split", "test"], "no split 'test'"),
    ([*LABELS, "--val_data", "strange.jsonl"], "'meh'"),
    ([*LABELS, "--val_data", "chats.jsonl"], "different kinds"),
    ([*SFT, "--out", "out/base"], "--resume out/base"),
])
def test_a_users_mistake_is_one_line_that_names_it(desk, flags, named):
    save_base("tied.pt", tied=True)
    base = content("out/base/best.pt")
    lm.save_checkpoint("adapter.pt", base | {"adapter": {}})
    lm.save_checkpoint("bare.pt", {k: v for k, v in base.items() if k != "tokenizer"})
    write("strange.jsonl", [{"text": "x", "label": "meh"}])
    ckpt = [] if "--ckpt" in flags or "--resume" in flags else ["--ckpt", "out/base"]
    assert named in refused(*ckpt, *flags)
    assert {p.name for p in Path("out").iterdir()} == {"base"}  # no run was begun
