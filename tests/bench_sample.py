"""How fast sample.py writes, alone and as a server, beside transformers.

    python tests/bench_sample.py gpt2                      the 124M shape, one row and eight
    python tests/bench_sample.py int8 --ckpt out/stdlib --data data/stdlib
    python tests/bench_sample.py drafts --text story.txt   what drafts are worth, --dtype bf16
    python tests/bench_sample.py load                      --serve with 1 to 64 clients
    python tests/bench_sample.py load --url http://127.0.0.1:8000 --shapes gpt2

gpt2: 32 + 128 tokens, greedy, random weights. int8: what bf16 and int8 cost in perplexity. load:
each client streams completions of 64 tokens, one after the other; our server with 16 slots and with
one, or another server with OpenAI's API.

pytest does not collect it. Prints markdown tables for tests/BENCHMARKS.md.
"""

import argparse
import asyncio
import contextlib
import copy
import inspect
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from bench_common import ROOT, about_machine, read_rate, table, take_turns

import model as lm
import prepare_data
import sample
from data.machine import DTYPES
from data.matmul import make_fast
from data.tokenizer import Tokenizer

PROMPT, NEW, STREAMED = 32, 128, 64


def low(model):
    """The same model with its weights in bfloat16."""
    content = {"config": vars(model.config), "model": model.state_dict()}
    return lm.model_from_checkpoint(content, dtype=torch.bfloat16)


def make_ours(config, prompts, new, kind="fp32", plain=False, draft=False, forced=None):
    """A job: generate greedily as sample.py does, or write the ids `forced` at the same cost."""
    torch.manual_seed(0)
    model = lm.Transformer(config).eval()
    model = low(model) if kind == "bf16" else model
    if not plain:
        make_fast(model, max(8, len(prompts)), kind == "int8")
    draw, whole = sample.next_token, prompts[0] + (forced or [])

    def next_token(logits, previous, *rest):
        draw(logits, previous, *rest)
        return [whole[min(len(ids), len(whole) - 1)] for ids in previous]

    def work():
        sample.next_token = next_token if forced else draw
        for _ in sample.generate(model, prompts, new, draft=draft, temperature=0):
            pass

    return work


def make_transformers(folder, prompts, dtype, new=NEW, device="cpu"):
    """A job: transformers' generate, greedy, with its cache."""
    import transformers

    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=DTYPES[dtype]).eval().to(device)
    ids = torch.tensor(prompts, device=device)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def gpt2(args):
    """The 124M shape: one row, then eight."""
    torch.manual_seed(0)
    config = lm.preset("gpt2")
    model = lm.Transformer(config)
    weights = model.head.weight.numel() + sum(p.numel() for p in model.blocks.parameters())
    rows = torch.randint(50257, (8, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        lm.export_hf({"config": vars(config), "model": model.state_dict()}, folder)
        for prompts in (rows[:1], rows):
            n, jobs = len(prompts), {}
            ours = dict(config=config, prompts=prompts, new=NEW)
            for kind in ("fp32", "bf16"):
                theirs = dict(folder=folder, prompts=prompts, dtype=kind)
                jobs[f"transformers {kind}"] = make_transformers, theirs
                jobs[f"ours {kind} --no_fast"] = make_ours, ours | dict(kind=kind, plain=True)
                jobs[f"ours {kind}"] = make_ours, ours | dict(kind=kind)
            jobs["ours int8"] = make_ours, ours | dict(kind="int8")
            print(f"\nGPT-2 124M, {PROMPT} + {NEW} tokens, {n} row(s):\n")
            print(table(take_turns(jobs, args.rounds), NEW * n, "tokens/s", "transformers fp32"))
            rate = n * read_rate() / (4 * weights)
            print(f"\nfloor by bytes: {rate:.0f} fp32, {2 * rate:.0f} bf16, {4 * rate:.0f} int8")


def drafts(args):
    """Without and with drafts: a function of sample.py in which a variable has another name, after
    the function as it was, and the text of --text after its first fifth."""
    function = inspect.getsource(sample.beam_search)
    texts = {"edit": (function, function.replace("beam", "ray").replace("score", "logp"))}
    if args.text:
        text = Path(args.text).read_text(encoding="utf-8")[-3000:]
        texts[args.text] = text[:600], text[600:]
    tokenizer = Tokenizer({"kind": "tiktoken", "name": "gpt2"})
    for name, pair in texts.items():
        prompt, text = (tokenizer.encode(part)[:450] for part in pair)
        how = dict(config=lm.preset("gpt2"), prompts=[prompt], new=len(text), forced=text)
        jobs = {f"{args.dtype} {n}": (make_ours, how | dict(kind=args.dtype, draft=n == "drafts"))
                for n in ("one token a step", "drafts")}  # fmt: skip
        print(f"\n{name}, {len(text)} tokens:\n")
        seconds = take_turns(jobs, args.rounds)
        print(table(seconds, len(text), "tokens/s", f"{args.dtype} one token a step"), flush=True)


@torch.no_grad()
def perplexity(model, tokens, length):
    """exp of the mean negative log-likelihood over windows of `length`, one token after another,
    as in writing."""
    total = count = 0
    for at in range(0, len(tokens) - length, length):
        ids = torch.from_numpy(tokens[at : at + length + 1].astype(np.int64))[None]
        cache = lm.KVCache(model, 1, length)
        logits = [model.head(model.hidden(i, cache)[0]) for i in ids[:, :-1].split(1, dim=1)]
        losses = torch.cat(logits).float().log_softmax(-1).gather(1, ids[0, 1:, None])
        total, count = total - losses.sum().item(), count + length
    return math.exp(total / count)


def int8(args):
    """Perplexity of the first validation tokens by each kind of weights."""
    tokens = prepare_data.read_tokens(args.data, "val")[: args.tokens]
    plain = lm.model_from_checkpoint(lm.load_checkpoint(args.ckpt))
    kinds = {"fp32": plain, "bf16": low(plain), "int8": copy.deepcopy(plain)}
    make_fast(kinds["int8"], int8=True)
    print("| weights | perplexity |\n| --- | ---: |")
    for name, model in kinds.items():
        print(f"| {name} | {perplexity(model, tokens, plain.config.context):.4f} |")


@contextlib.contextmanager
def server(preset, slots, dtype):
    """The URL of our server of that shape with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model, path = lm.Transformer(lm.preset(preset, init="gpt2")), Path(folder, "m.pt")
        content = {"config": asdict(model.config), "model": model.state_dict(), "step": 0}
        lm.save_checkpoint(path, content | {"tokenizer": Tokenizer({"kind": "byte"}).spec})
        command = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(path), "--serve", "0"]
        command += ["--slots", str(slots), "--dtype", dtype]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process.stdout.readline().strip()
            finally:
                process.terminate()


async def ask(url, rng, model):
    """(when it was sent, when each event came, tokens) of one streamed completion, whose prompt
    nobody has sent before."""
    words = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was"]
    prompt = " ".join(rng.choices(words, k=8))
    body = dict(prompt=prompt, max_tokens=STREAMED, stream=True, temperature=0.8)
    body |= dict(seed=rng.randrange(2**31), stream_options={"include_usage": True})
    content = json.dumps(body | ({"model": model} if model else {})).encode()
    address, sent = urllib.parse.urlsplit(url), time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: "
    head += f"{len(content)}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + content)
    times, tokens = [], None
    status = (await reader.readline()).decode()
    if " 200 " not in status:
        raise RuntimeError(f"{status} {(await reader.read(2000)).decode()}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            event = json.loads(line[6:])
            if not event["choices"]:
                tokens = event["usage"]["completion_tokens"]
    writer.close()
    return sent, times, tokens or len(times)


async def measure(url, clients, seconds, model):
    """Tokens a second; median and 99th percentile, in ms, of the time to the first token and of
    that between two."""
    end, first, between, tokens = time.perf_counter() + seconds, [], [], 0

    async def client(number):
        nonlocal tokens
        rng = random.Random(number)
        while time.perf_counter() < end:
            sent, times, written = await ask(url, rng, model)
            in_time = sum(t <= end for t in times)  # an answer counts by this share
            tokens += written * in_time / max(1, len(times))
            first.append(1000 * (times[0] - sent))
            between.extend(1000 * (b - a) for a, b in pairwise(times))

    await asyncio.gather(*(client(n) for n in range(clients)))
    latencies = [np.percentile(values, (50, 99)) for values in (first, between)]
    return [tokens / seconds, *np.concatenate(latencies)]


def load(args):
    """Tokens a second and latencies of each server at each number of clients."""
    print("| | clients | tokens/s | x | first token, ms: p50 | p99 | between tokens: p50 | p99 |")
    print("| --- " + "| ---: " * 7 + "|")
    for shape in args.shapes.split(","):
        with contextlib.ExitStack() as stack:
            urls = {"the other one": args.url}
            if not args.url:
                urls = {f"{n} slot(s)": stack.enter_context(server(shape, n, args.dtype))
                        for n in (1, 16)}  # fmt: skip
            for clients in args.clients:
                base = None
                for name, url in urls.items():
                    rate, *times = asyncio.run(measure(url, clients, args.seconds, args.model))
                    base = base or rate
                    cells = [f"{shape}, {name}", f"{clients}", f"{rate:,.0f}", f"{rate / base:.2f}"]
                    print(f"| {' | '.join(cells + [f'{t:,.1f}' for t in times])} |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("gpt2", "int8", "drafts", "load"))
    p.add_argument("--rounds", type=int, default=5, help="turns of each job (5)")
    p.add_argument("--ckpt", default="out/stdlib", help="for int8")
    p.add_argument("--data", default="data/stdlib", help="for int8")
    p.add_argument("--tokens", type=int, default=20_000, help="of validation, for int8 (20,000)")
    p.add_argument("--seconds", type=float, default=30, help="of each measurement of load (30)")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="(1 4 16 64)")
    p.add_argument("--shapes", default="gpt2,tiny", help="presets of ours (gpt2,tiny)")
    p.add_argument("--dtype", default="fp32", help="of weights, for drafts and load (fp32)")
    p.add_argument("--text", help="a file, for drafts")
    p.add_argument("--url", help="of another server")
    p.add_argument("--model", help="what requests call its model")
    args = p.parse_args()
    print(about_machine())
    {"gpt2": gpt2, "int8": int8, "drafts": drafts, "load": load}[args.what](args)


if __name__ == "__main__":
    main()
