"""What a GPU makes of it: the tests that need one, training beside nanoGPT, writing, LoRA of 8B.

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_gpu.py all --nanogpt nanoGPT     within 14 minutes
    python tests/bench_gpu.py train --nanogpt nanoGPT
    python tests/bench_gpu.py all --toy --rows 2        shows on a CPU that all parts run

tests: `pytest -m gpu`. train: tokens a second of whole steps in bf16, compiled and not, AdamW and
Muon, in turn with nanoGPT's as its bench.py has them, compiled, of the same shape (ours has shifts
in its norms); peak memory. same: whether graphs write the greedy ids that eager steps write. write:
tokens a second, greedy, in turn with transformers. lora: a step of rank 8 adapters over nf4
weights. Prints markdown for tests/BENCHMARKS.md.
"""

import argparse
import hashlib
import itertools
import subprocess
import sys
import tempfile

import bench_common as bench
import torch
from bench_sample import make_transformers

import lora
import model as lm
import sample
from data.graphs import GraphedSteps
from data.machine import DTYPES, make_runtime, synchronize

SECONDS = {"tests": 200, "train": 360, "same": 60, "write": 90, "lora": 130}  # at most
NO_FAST = ["--no_fast"]


def make_config(what, toy):
    """The shape for a part."""
    changes = {"tied": False} if what == "same" else {}  # tied, it would repeat one id
    if what == "train":  # nanoGPT's: a padded vocabulary, no biases
        changes = dict(vocab_size=50304, qkv_bias=False, out_bias=False, ff_bias=False)
    if toy:
        changes |= dict(n_layer=2, n_head=2, d_model=64, context=64, vocab_size=512)
    return lm.preset("llama-8b" if what == "lora" else "gpt2", **changes)


def alone(job, name):
    """A job that runs once untimed, then returns its seconds, and leaves the GPU's memory to the
    other processes."""

    def run():
        job()
        seconds = bench.clocked(job)
        gib = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: {gib:.1f} GiB at most", file=sys.stderr)
        torch.cuda.empty_cache()
        return seconds

    return run


def make_steps(name, config, rows, steps, flags=(), adapt=False):
    """A job: training steps as `train.fit` makes them."""
    runtime = make_runtime()
    model = adapted_model(config, runtime) if adapt else lm.Transformer(config)
    batches = itertools.repeat(next(bench.random_batches(config.vocab_size, rows, config.context)))
    return alone(bench.our_step(model, batches, steps=steps, flags=flags, runtime=runtime), name)


def adapted_model(config, runtime):
    """One with adapters over nf4, made block by block: all of it in fp32 would not fit."""
    model = lm.meta_model(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to_empty(device=runtime.device, recurse=False)
            torch.nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, torch.nn.Linear) and module is not model.head:
                module.to(torch.bfloat16)
        elif isinstance(module, torch.nn.RMSNorm):
            module.weight = torch.nn.Parameter(torch.ones(module.weight.shape))
    lora.quantize(model, "nf4", device=runtime.device)
    lora.add_lora(model, "all", rank=8, alpha=16)
    model.grad_checkpoint = True
    return model


def make_nanogpt(name, folder, config, rows, steps):
    """A job: steps of nanoGPT's model, as its bench.py has them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    shape = dict(block_size=config.context, vocab_size=config.vocab_size, bias=False)
    shape |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.d_model)
    model, optimizer = bench.load_nanogpt(folder, (1e-2, 1e-4, (0.9, 0.95)), device, **shape)
    batch = torch.randint(config.vocab_size, (2, rows, config.context), device=device).unbind()
    work = torch.compile(model), optimizer, itertools.repeat(batch), True, 0, steps, device
    return alone(bench.peer_step(*work), name)


class Masked(GraphedSteps):
    """Runs the operations that a graph would record."""

    def __call__(self, ids, cache, **options):
        cache.graphs = {}
        return super().__call__(ids, cache, **options)


def writer(config, dtype, flags, device, masked=False):
    """A function that writes greedy ids after 32, as sample.py does with these flags."""
    torch.manual_seed(0)
    model = lm.Transformer(config).eval().to(device, DTYPES[dtype])
    sample.fast_model(model, 1, sample.build_parser().parse_args(flags))
    if masked:
        model.last_logits = Masked(model.last_logits)
    engine, prompt = sample.Engine(model, 1, config.context), list(range(32))
    engine.draft = False  # random weights repeat themselves, which is easy to draft
    how = dict(max_new_tokens=config.context // 4, temperature=0.0, engine=engine)
    return lambda: [i for (i,) in sample.generate(model, [prompt], **how)]


def make_writer(name, config, flags=(), folder=None):
    """A job: greedy writing, ours or transformers'."""
    runtime = make_runtime()
    if folder:
        new = config.context // 4
        job = make_transformers(folder, [list(range(32))], "bf16", new, runtime.device)
    else:
        job = writer(config, "bf16", flags, runtime.device)
    return alone(lambda: (job(), synchronize(runtime.device)), name)


def same(config):
    """Print the greedy texts of eager steps, of those with the mask that graphs need, and of
    sample.py: the last two must be equal, the first two may differ by rounding."""
    device = make_runtime().device
    for dtype in "fp32", "bf16":
        for name, flags in ("eager", NO_FAST), ("masked", NO_FAST), ("sample.py", ()):
            ids = writer(config, dtype, flags, device, name == "masked")()
            md5 = hashlib.md5(repr(ids).encode()).hexdigest()
            print(f"{dtype} {name}: {md5}, {len({*ids})} different ids of {len(ids)}")


def jobs_of(what, config, args, folder):
    """The jobs of a part, as `take_turns` wants them."""
    if what == "write":
        ways = {"eager": {"flags": NO_FAST}, "sample.py": {}, "transformers": {"folder": folder}}
        return {n: (make_writer, dict(name=n, config=config, **way)) for n, way in ways.items()}
    common = dict(config=config, rows=args.rows if what == "train" else 1, steps=args.steps)
    ways = {"rank 8 over nf4": {"adapt": True}}
    if what == "train":
        ways = {"ours, compiled": {}, "ours, eager": {"flags": ["--no-compile"]}}
        ways["ours, compiled, Muon"] = {"flags": ["--optimizer", "muon"]}
    jobs = {n: (make_steps, dict(name=n, **common, **way)) for n, way in ways.items()}
    if what == "train" and args.nanogpt:
        common["folder"] = args.nanogpt
        jobs["nanoGPT, compiled"] = make_nanogpt, dict(name="nanoGPT", **common)
    return jobs


def run_part(what, args):
    """Measure one part in this process."""
    config = make_config(what, args.toy)
    if what == "same":
        return same(config)
    with tempfile.TemporaryDirectory() as folder:
        if what == "write":
            state = lm.Transformer(config).state_dict()
            lm.export_hf({"config": vars(config), "model": state}, folder)
        jobs = jobs_of(what, config, args, folder)
        seconds = bench.take_turns(jobs, args.rounds)
    rows = {"train": args.rows, "lora": 1}.get(what)
    tokens = rows * config.context * args.steps if rows else config.context // 4
    peak = make_runtime().peak  # the floor is that of training's matrix products
    floor = peak / lm.flops_per_token(config, frozen=what == "lora") if rows else None
    print(bench.table(seconds, tokens, "tokens/s", next(iter(jobs)), floor))
    print(f"measured peak {peak / 1e12:.4g} TFLOP/s; torch {torch.__version__}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=(*SECONDS, "all"))
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT")
    p.add_argument("--rows", type=int, default=32, help="of a batch of train (32)")
    p.add_argument("--steps", type=int, default=5, help="of training in a turn (5)")
    p.add_argument("--rounds", type=int, default=3, help="turns of each job (3)")
    p.add_argument("--toy", action="store_true", help="two narrow layers, for a CPU")
    args = p.parse_args()
    if args.what in SECONDS.keys() - {"tests"}:
        return run_part(args.what, args)
    codes = {}
    for part in SECONDS if args.what == "all" else ["tests"]:
        command = [__file__, *(part if a == "all" else a for a in sys.argv[1:])]
        if part == "tests":
            command = ["-m", "pytest", "-n0", "-q", "-rs", "-m", "gpu"]
        print(f"\n{part}:\n", flush=True)
        # `timeout` ends a part's own processes as well, with 124
        command = ["timeout", str(SECONDS[part]), sys.executable, *command]
        codes[part] = subprocess.run(command).returncode
    print("\nexit codes:", codes)
    sys.exit(max(codes.values()))


if __name__ == "__main__":
    main()
