"""data/runner.py and several processes: whatever the number of processes, and whether each has a
copy of the model or a part of it, a run is the same."""

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
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import finetune
import lora
import model as lm
import prepare_data
import train
from data.machine import Runtime

SHAPE = "--n_layer 2 --n_head 2 --d_model 32 --context 16"
RUN = f"--data words {SHAPE} --max_steps 6 --eval_every 3 --log_every 1 --batch_size 1"
RUN += " --total_batch_tokens 192 --grad_clip 0.5"
TUNE = "--ckpt out/base --max_steps 4 --eval_every 2 --log_every 1 --eval_rows 3 --batch_tokens 96"
# {name: (script, its flags, how many steps' micro-batches one process has to take for n)}
JOBS = {
    "adamw": (train, f"{RUN} --dropout 0.2"),
    "muon": (train, f"{RUN} --optimizer muon"),
    "sft": (finetune, f"{TUNE} --data chats.jsonl --dropout 0.1"),
    "lora": (finetune, f"{TUNE} --data chats.jsonl --lora_rank 2 --lora_dropout 0.1"),
    "nf4": (finetune, f"{TUNE} --data chats.jsonl --lora_rank 2 --quantize nf4"),
    "dpo": (finetune, f"{TUNE} --data pairs.jsonl"),
}
# runs its lines, [script, *flags], in one process group after the other
MANY = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import finetune, torch.distributed as dist, train
dist.destroy_process_group = lambda: None
for name, *flags in json.load(open(sys.argv[1])):
    dict(train=train, finetune=finetune)[name].main(flags)
"""


def torchrun(processes, *command, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", str(processes), *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=env, **more)


def rows(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def figures(out):
    """Losses, norms and scores of a run, without its times."""
    kept = ("loss", "grad_norm", "val_loss", "bleu4", "reward_margin")
    return [row[k] for row in rows(out) for k in kept if k in row]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a text, chats, pairs and a base."""
    folder, before = tmp_path_factory.mktemp("desk"), Path.cwd()
    os.chdir(folder)
    words = ["to", "be", "or", "not", "学习", "the", "question", "是"]
    triples = list(itertools.product(words[:4], repeat=3))
    Path("words.txt").write_text(" ".join(itertools.chain(*itertools.product(words, repeat=4))))
    chats = [{"instruction": f"{a} {b} {c}", "output": b * (1 + len(a) % 3)} for a, b, c in triples]
    pairs = [{"prompt": f"{a} {b}", "chosen": f"{c} A", "rejected": f"{a * 2} B"}
             for a, b, c in triples]
    for name, examples in (("chats", chats), ("pairs", pairs)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    prepare_data.main(["words.txt", "--tokenizer", "byte"])
    train.main(f"--data words {SHAPE} --context 48 --max_steps 9 --out out/base".split())
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module", params=[2, 4])
def many(desk, request):
    """All JOBS in several processes, as copies and cut into parts; the number of processes."""
    n, jobs = request.param, []
    for name, (script, flags) in JOBS.items():
        accum = [] if script is train else ["--grad_accum", str(4 // n)]
        for how in ([], ["--shard"]):
            out = f"out/{name}-{n}{''.join(how)}"
            jobs.append([script.__name__, *flags.split(), *accum, *how, "--out", out])
    Path("jobs").write_text(json.dumps(jobs))
    Path("many.py").write_text(MANY)
    done = torchrun(n, "many.py", "jobs")
    said = done.communicate(timeout=300)[0]
    assert done.returncode == 0, said
    return n


@pytest.fixture(scope="module")
def alone(desk):
    """All JOBS in this process: {name: figures}."""
    for name, (script, flags) in JOBS.items():
        accum = [] if script is train else ["--grad_accum", "4"]
        script.main([*flags.split(), *accum, "--out", f"out/{name}"])
    return {name: figures(f"out/{name}") for name in JOBS}


@pytest.mark.parametrize("how", ["", "--shard"])
@pytest.mark.parametrize("name", JOBS)
def test_processes_give_the_figures_of_one(alone, many, name, how):
    """Clipping, accumulation and dropout, too, which is that of the micro-batch."""
    assert figures(f"out/{name}-{many}{how}") == pytest.approx(alone[name], rel=1e-4, abs=1e-5)


# ---- what stops a run ------------------------------------------------------------------------


FIRST = f"--data words {SHAPE} --eval_every 3 --log_every 1 --batch_size 1 --schedule constant"
FIRST += " --total_batch_tokens 192 --optimizer muon --dropout 0.1 --warmup_steps 0"


def until(process, start):
    """Read what a process says up to a line that starts so."""
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError("it has ended before")


def test_a_killed_process_ends_the_others_and_the_run_goes_on_in_any_number(desk):
    run = torchrun(2, ROOT / "train.py", *FIRST.split(), "--max_steps", 10**6, "--shard",
                   "--out", "out/killed")
    until(run, "step 4")
    pids = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout
    os.kill(int(pids.split()[-1]), signal.SIGKILL)
    start, said = time.monotonic(), run.communicate()[0]
    assert run.returncode and time.monotonic() - start < 60
    assert "train.py: another process of this run has ended: --resume out/killed" in said
    steps = str(lm.load_checkpoint("out/killed/last.pt")["step"] + 3)
    train.main([*FIRST.split(), "--max_steps", steps, "--out", "out/straight"])
    losses = [r["loss"] for r in rows("out/straight") if "loss" in r]
    for processes in (1, 3):
        copy = f"out/resumed{processes}"
        shutil.copytree("out/killed", copy)
        done = torchrun(processes, ROOT / "train.py", "--resume", copy, "--max_steps", steps)
        said = done.communicate(timeout=100)[0]
        assert done.returncode == 0 and said.count("resuming") == 1, said
        assert [r["loss"] for r in rows(copy) if "loss" in r] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("how", [[], ["--shard"]])
def test_a_stop_signal_ends_all_processes_after_the_same_step(desk, how):
    out = f"out/stopped{len(how)}"
    run = torchrun(2, ROOT / "train.py", *FIRST.split(), "--max_steps", 10**6, *how, "--out", out,
                   start_new_session=True)
    until(run, "step 3  val loss")
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said = run.communicate(timeout=60)[0]
    assert f"saved: go on with --resume {out}" in said and "another process" not in said
    before = lm.load_checkpoint(f"{out}/last.pt")["step"]
    train.main(["--resume", out, "--max_steps", str(before + 1)])


# ---- what a GPU would wait for ---------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts how often Python asks for a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket in (torch.ops.aten._local_scalar_dense,
                                            torch.ops.aten.is_nonzero, torch.ops.aten.nonzero)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_python_seldom_waits_for_a_gpu(desk, optimizer, monkeypatch):
    """In 50 steps with a line every tenth: once a line."""
    flags = f"--data words {SHAPE} --log_every 10 --eval_every 50 --max_steps 50".split()
    args, _ = train.resolve(train.build_parser().parse_args([*flags, "--optimizer", optimizer]))
    model = lm.Transformer(lm.preset("tiny", n_layer=2, n_head=2, d_model=32, vocab_size=64))
    ids = torch.randint(64, (4, 17))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    task = train.Task(
        lambda step: [batch, batch], lambda m, final: {"val_loss": 1.0}, {},
        loss=lambda m, x, y: m(x, y, places=slice(None)), count=lambda x, y: y.numel(),
    )
    runtime = Runtime(torch.device("cpu"), peak=1e9)
    monkeypatch.setattr(Runtime, "asynchronous", True)
    waits, tolist = Waits(), torch.Tensor.tolist

    def counted(tensor):
        waits.count += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with waits:
        train.fit(model, task, args, runtime, Path(f"out/waits-{optimizer}"))
    assert waits.count <= 10
    assert len([r for r in rows(f"out/waits-{optimizer}") if "loss" in r]) == 5
    assert lm.load_checkpoint(f"out/waits-{optimizer}/last.pt")["step"] == 50  # by a thread


# ---- the compiler ---------------------------------------------------------------------------


def count_compilations(model, sizes, monkeypatch):
    """How often dynamo had compiled after each of the batches (B, T), and its graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_ = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    task = train.Task(lambda step: [(torch.randint(64, (3, 9)),) * 2], evaluate=None, extra={})
    train.compile_blocks(model.train(), task, Runtime(torch.device("cpu")), 0)
    counts = []
    for size in sizes:
        ids = torch.randint(64, size)
        targets = ids.masked_fill(torch.rand(size) < 0.5, -100)  # as many as by chance
        model(ids, targets).backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return counts, dict(torch._dynamo.utils.counters["graph_break"])


@pytest.mark.parametrize("adapted", [False, True])
def test_batches_of_any_size_are_compiled_four_times_at_most(adapted, monkeypatch):
    """One size, other lengths, other numbers of rows, and a single row; no graph breaks."""
    model = lm.Transformer(lm.preset("tiny", n_layer=1, d_model=16, vocab_size=64, dropout=0.1))
    if adapted:
        lora.add_lora(model, "all", rank=2, alpha=4, dropout=0.1)
    rng = random.Random(0)
    sizes = [(3, 9)] * 3 + [(rng.randint(1, 8), rng.randint(2, 40)) for _ in range(30)]
    counts, breaks = count_compilations(model, sizes, monkeypatch)
    assert counts[2] == 1 and counts[-1] == counts[9] <= 4 and not breaks


# ---- memory ----------------------------------------------------------------------------------


def test_each_process_holds_its_part_alone(desk):
    """Weights, gradients and moments of n processes: an nth of one's, but for padding. Nor is more
    read of a model in Hugging Face's layout: the second process takes its part and a block."""
    held, size = {}, ["--preset", "llama", "--d_model", "512", "--steps", "1"]
    for n in (1, 2, 4):
        done = torchrun(n, ROOT / "tests/bench_shard.py", *size)
        said = done.communicate(timeout=100)[0]
        held[n] = int(re.search(r"(\d+) bytes of weights, gradients and moments", said)[1])
        if n > 1:
            loaded = int(re.search(r"process 1: (\d+) bytes to load it", said)[1])
            weights = held[1] / 4  # beside gradients and AdamW's two moments
            assert loaded < weights / n + 20e6, said
    assert held[2] == pytest.approx(held[1] / 2, rel=0.1)
    assert held[4] == pytest.approx(held[1] / 4, rel=0.1)
