"""Training in several processes: whatever their number, and whether each has a copy of the model or
a part of it, a run is the same. And what a GPU waits for, and what is compiled."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import lora
import model as lm
import prepare_data
import train
from data.machine import Runtime

SHAPE = "--n_layer 2 --n_head 2 --d_model 32 --context 16"
RUN = f"--data words {SHAPE} --max_steps 4 --eval_every 2 --log_every 1 --batch_size 1"
RUN += " --total_batch_tokens 192 --grad_clip 0.5"
TUNE = "--ckpt out/base --max_steps 2 --eval_every 2 --log_every 1 --eval_rows 3 --batch_tokens 96"
JOBS = {  # name: (script, its flags)
    "adamw": (train, f"{RUN} --dropout 0.2"),
    "muon": (train, f"{RUN} --optimizer muon --total_batch_tokens 32 --short_context 8"),
    "moe": (train, f"{RUN} --experts 3 --compile"),
    "nf4": (finetune, f"{TUNE} --data chats.jsonl --lora_rank 2 --lora_dropout 0.1 --quantize nf4"),
    "dpo": (finetune, f"{TUNE} --data pairs.jsonl"),
    "labels": (finetune, f"{TUNE} --data labels.jsonl"),
}
# runs its lines, [script, *flags], one after the other in one process group, and writes how many
# bytes of weights and moments rank 0 held at the first step of each
MANY = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import finetune, torch, torch.distributed as dist, train
from data import machine
dist.destroy_process_group = lambda: None
machine.measure_peak = lambda *_: 1e11
plain = torch.compile
torch.compile = lambda f: plain(f, backend="aot_eager")
step, held = train.optimizer_step, {{}}

def measured(model, optimizers, *rest):
    norm = step(model, optimizers, *rest)
    moments = [v for o in optimizers for s in o.state.values() for v in s.values() if v.dim()]
    tensors = [getattr(t, "to_local", lambda t=t: t)() for t in [*model.parameters(), *moments]]
    held.setdefault(flags[-1], sum(t.nbytes for t in tensors))
    return norm

train.optimizer_step = measured
for name, *flags in json.load(open("jobs")):
    dict(train=train, finetune=finetune)[name].main(flags)
if dist.get_rank() == 0:
    json.dump(held, open("held", "w"))
"""


def torchrun(processes, *command):
    """What runs in a session of its own, as in a terminal."""
    flags = ["--standalone", "--nproc_per_node", processes, *command]
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, **pipes, start_new_session=True)


def figures(out, *kept):
    """Losses, norms and scores of a run, without its times."""
    kept = kept or ("loss", "grad_norm", "val_loss", "bleu4", "reward_margin")
    rows = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    return [row[k] for row in rows for k in kept if k in row]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a text, chats and pairs."""
    folder, before = tmp_path_factory.mktemp("desk"), Path.cwd()
    os.chdir(folder)
    words = ["to", "be", "or", "not", "学习", "the", "question", "是"]
    Path("words.txt").write_text(" ".join(itertools.chain(*itertools.product(words, repeat=4))))
    labels = [{"text": " ".join(words[i:]), "label": ("yes", "no")[i % 2]} for i in range(8)] * 8
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    with open("chats.jsonl", "w") as chats, open("pairs.jsonl", "w") as pairs:
        for a, b, c in itertools.product(words[:4], repeat=3):
            chat = {"instruction": f"{a} {b} {c}", "output": b * (1 + len(a) % 3)}
            pair = {"prompt": f"{a} {b}", "chosen": f"{c} A", "rejected": f"{a * 2} B"}
            print(json.dumps(chat), file=chats)
            print(json.dumps(pair), file=pairs)
    prepare_data.main(["words.txt", "--tokenizer", "byte"])
    yield folder
    os.chdir(before)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_give_the_figures_of_one(desk, n, monkeypatch):
    """With clipping, accumulation, resuming, and dropout, which is that of the micro-batch."""
    monkeypatch.setattr("data.machine.measure_peak", lambda *_: 1e11)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    shutil.rmtree("out", ignore_errors=True)
    train.main(f"--data words {SHAPE} --context 48 --max_steps 9 --out out/base".split())
    jobs, more = [], ["--max_steps", "6", "--resume"]
    for name, (script, flags) in JOBS.items():
        flags, tuned = flags.split(), script is finetune
        script.main([*flags, *["--grad_accum", "4"] * tuned, "--out", f"out/{name}"])
        for shard in ([], ["--shard"]):
            accum = ["--grad_accum", str(4 // n)] * tuned
            out = f"out/n{name}{''.join(shard)}"
            jobs.append([script.__name__, *flags, *accum, *shard, "--out", out])
    for out, flag in (("adamw", "--shard"), ("adamw--shard", "--shard"),
                      ("muon", "--no-shard"), ("muon--shard", "--no-shard")):
        jobs.append(["train", flag, *more, f"out/n{out}"])
    jobs += [["train", *RUN.split(), "--shard"]] * 2  # into new folders
    Path("jobs").write_text(json.dumps(jobs))
    Path("many.py").write_text(MANY)
    done = torchrun(n, "many.py")
    said = done.communicate(timeout=300)[0]
    assert done.returncode == 0 and "does not work" not in said, said
    for out in ("out/words", "out/words-2"):  # neither run wrote into the other's folder
        assert len(figures(out, "loss")) == 4, out
    assert not Path("out/words-3").exists()
    for name in ("adamw", "muon"):
        train.main([*more, f"out/{name}"])
    for name in JOBS:
        wanted = pytest.approx(figures(f"out/{name}"), rel=1e-4, abs=1e-5)
        for shard in ("", "--shard"):
            assert figures(f"out/n{name}{shard}") == wanted, (name, shard)
    finetune.main([*more, "out/nf4"])
    finetune.main([*more, "out/nnf4--shard", "--no-shard", "--grad_accum", "4"])  # in one process
    assert figures("out/nnf4--shard") == pytest.approx(figures("out/nf4"), rel=1e-4, abs=1e-5)
    held = json.loads(Path("held").read_text())  # weights and moments
    for name in ("nadamw", "nmuon"):
        assert held[f"out/{name}--shard"] == pytest.approx(held[f"out/{name}"] / n, rel=0.1)


def until(process, start):
    """Read what a process says up to a line that starts so, one of its first."""
    if not any(line.startswith(start) for line in itertools.islice(process.stdout, 40)):
        process.kill()
        raise AssertionError(f"it has said no {start}")


def test_a_killed_process_ends_the_others_and_the_run_goes_on_in_one(desk):
    flags = f"{RUN} --optimizer muon --schedule constant --warmup_steps 9 --max_steps".split()
    run = torchrun(2, ROOT / "train.py", *flags, 10**6, "--shard", "--out", "out/killed")
    until(run, "step 3")
    pids = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout
    os.kill(int(pids.split()[-1]), signal.SIGKILL)
    start, said = time.monotonic(), run.communicate()[0]
    seconds = time.monotonic() - start
    assert run.returncode and seconds < 60
    # gloo seldom misses the end of its peer and waits: torchrun then kills this one after 30 s
    line = "train.py: another process of this run has ended.*--resume out/killed"
    assert re.search(line, said) or seconds > 29
    steps = str(lm.load_checkpoint("out/killed/last.pt")["step"] + 2)
    train.main([*flags, steps, "--out", "out/straight"])
    train.main(["--resume", "out/killed", "--max_steps", steps])
    assert figures("out/killed", "loss") == pytest.approx(figures("out/straight", "loss"), rel=1e-4)


def test_a_stop_signal_ends_all_processes_after_the_same_step(desk):
    flags = [*RUN.split(), "--max_steps", 10**6, "--out", "out/stopped"]
    run = torchrun(2, ROOT / "train.py", *flags)
    until(run, "step 2  train loss")
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said = run.communicate(timeout=60)[0]
    assert "continue with --resume out/stopped" in said and "another process" not in said
    before = lm.load_checkpoint("out/stopped/last.pt")["step"]
    train.main(["--resume", "out/stopped", "--max_steps", str(before + 1)])


class Waits(TorchDispatchMode):
    """Lists the operations by which Python asks for a value of a tensor."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.__name__.split(".")[0] in ("_local_scalar_dense", "is_nonzero", "nonzero"):
            self.waits.append(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_python_seldom_waits_for_a_gpu(desk, optimizer, monkeypatch):
    """In 30 steps with a line every tenth: a few times a line at most, not at each step."""
    flags = f"--log_every 10 --eval_every 50 --max_steps 30 --optimizer {optimizer}"
    args, _ = train.resolve(train.build_parser().parse_args(flags.split()))
    shape = dict(n_layer=1, n_head=2, d_model=32, vocab_size=64, bigram=64, trigram=64)
    model = lm.Transformer(lm.preset("tiny", **shape))
    batch = tuple(torch.randint(64, (2, 4, 16)))
    task = train.Task(
        lambda step: [batch, batch], lambda m, final: {"val_loss": 1.0}, {},
        loss=lambda m, x, y: m(x, y, places=slice(None)), count=lambda x, y: y.numel(),
    )
    monkeypatch.setattr(Runtime, "asynchronous", True)
    waits, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: waits.append("tolist") or tolist(t))
    with Waits(waits):
        train.fit(model, task, args, Runtime(torch.device("cpu"), peak=1e9), Path("out", optimizer))
    assert 0 < len(waits) <= 15 and "tolist" in waits


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batches_of_any_size_are_compiled_four_times_at_most(adapted, monkeypatch):
    """One size, other lengths, other numbers of rows, and a single row, for blocks of all layers;
    the first one gets no gradient from below under adapters; no graph breaks."""
    model = lm.Transformer(lm.preset("tiny", n_layer=3, d_model=16, vocab_size=64, dropout=0.1))
    if adapted:
        lora.add_lora(model, "all", rank=2, alpha=4, dropout=0.1)
    torch._dynamo.reset()
    counters, counts = torch._dynamo.utils.counters, []
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    task = train.Task(lambda step: [(torch.randint(64, (3, 9)),) * 2], evaluate=None, extra={})
    train.compile_blocks(model.train(), task, Runtime(torch.device("cpu")), 0)
    rng = random.Random(0)
    for size in [(3, 9)] * 3 + [(rng.randint(1, 8), rng.randint(2, 40)) for _ in range(12)]:
        ids = torch.randint(64, size)
        targets = ids.masked_fill(torch.rand(size) < 0.5, -100)  # as many as by chance
        model(ids, targets).backward()
        counts.append(counters["stats"]["unique_graphs"])
    first = 1 + adapted
    assert counts[2] == first and counts[-1] == counts[9] <= 4 * first
    assert not counters["graph_break"]
