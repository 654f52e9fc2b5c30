"""How `sample.py --serve` does under load: tokens a second, and how long a client waits.

    python tests/bench_serve.py load                          the 124M shape and the default one
    python tests/bench_serve.py load --url http://127.0.0.1:8000 --shapes gpt2    another server
    python tests/bench_serve.py soak --seconds 600            memory while clients come and go

load: 1, 4, 16 and 64 clients for 30 seconds each, every one of which streams a completion of 64
tokens and then asks for the next (prompts of about 30 tokens, temperature 0.8). Weights are random.
Our server with 16 slots, and beside it with one: the same requests one after the other. Another
server with OpenAI's API is measured by --url; it must have the model already.

soak: clients of all sizes, half of which hang up in the middle; the server's memory every half
minute.

It is a benchmark, not a test: pytest does not collect it. Prints a markdown table for
tests/BENCHMARKS.md.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from bench_common import ROOT, about_machine

import model as lm
from data.tokenizer import Tokenizer

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "with", "be", "by", "on"]
NEW = 64


def save_model(preset, path):
    """A checkpoint of that shape with random weights, with bytes as its tokens."""
    torch.manual_seed(0)
    model = lm.Transformer(lm.preset(preset, init="gpt2"))
    content = {"config": asdict(model.config), "model": model.state_dict()}
    lm.save_checkpoint(path, content | {"tokenizer": Tokenizer({"kind": "byte"}).spec, "step": 0})


@contextlib.contextmanager
def server(ckpt, *flags):
    """(URL, process) of our server."""
    command = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(ckpt), "--serve", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.terminate()


def body_of(rng, new=NEW, model=None):
    """A request: words that nobody has sent before."""
    prompt = " ".join(rng.choice(WORDS) for _ in range(8))
    body = {"prompt": prompt, "max_tokens": new, "stream": True, "temperature": 0.8}
    body |= {"seed": rng.randrange(2**31), "stream_options": {"include_usage": True}}
    return body | ({"model": model} if model else {})


async def ask(url, body, hang_up=None):
    """(when it was sent, when each event came, tokens) of one streamed completion; `hang_up` closes
    the connection after so many events."""
    place, sent = urllib.parse.urlsplit(url), time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: "
    head += f"{len(content)}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + content)
    times, tokens = [], None
    try:
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            raise RuntimeError(f"{status} {(await reader.read(2000)).decode()}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                if b'"choices": []' in line or b'"choices":[]' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            if hang_up == len(times):
                break  # else the server closes, and the connection counts no more
    finally:
        writer.close()
    return sent, times, tokens


async def measure(url, clients, seconds, model):
    """A row of the table: tokens a second, median and 99th percentile of the time to the first
    token and between two."""
    end, first, between, tokens = time.perf_counter() + seconds, [], [], 0

    async def client(number):
        nonlocal tokens
        rng = random.Random(number)
        while time.perf_counter() < end:
            sent, times, written = await ask(url, body_of(rng, model=model))
            last = [t for t in times if t <= end]  # what came in time counts, by its share
            tokens += (written or len(times)) * len(last) / max(1, len(times))
            first.append(times[0] - sent)
            between.extend(b - a for a, b in pairwise(times))

    await asyncio.gather(*(client(n) for n in range(clients)))
    figures = [tokens / seconds]
    for values in (first, between):
        values = [1000 * v for v in values] or [0.0, 0.0]
        worst = statistics.quantiles(values + values[-1:], n=100)[98]
        figures += [statistics.median(values), worst]
    return figures


def load(args):
    """Tokens a second and latencies of each server at each number of clients."""
    print("| | clients | tokens/s | x | first token, ms: p50 | p99 | between tokens: p50 | p99 |")
    print("| --- " + "| ---: " * 7 + "|")
    for shape in args.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            urls = {args.name: args.url} if args.url else {}
            if not args.url:
                save_model(shape, Path(folder, "m.pt"))
                for name, slots in (("one after the other", "1"), ("16 slots", "16")):
                    flags = ["--slots", slots, "--dtype", args.dtype]
                    urls[name] = stack.enter_context(server(Path(folder, "m.pt"), *flags))[0]
            for clients in args.clients:
                base = None
                for name, url in urls.items():
                    row = asyncio.run(measure(url, clients, args.seconds, args.model))
                    base = base or row[0]
                    cells = [f"{shape}, {name}", str(clients), f"{row[0]:,.0f}"]
                    cells += [f"{row[0] / base:.2f}", *(f"{v:,.1f}" for v in row[1:])]
                    print("| " + " | ".join(cells) + " |", flush=True)


def memory(process):
    """The process's memory in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


async def come_and_go(url, seconds, process):
    """Clients with requests of all sizes, half of which hang up; prints the memory meanwhile."""
    start, count = time.perf_counter(), 0

    async def client(number):
        nonlocal count
        rng = random.Random(number)
        while time.perf_counter() - start < seconds:
            hang_up = rng.choice([None, rng.randint(1, 40)])
            await ask(url, body_of(rng, rng.randint(1, 100)), hang_up)
            count += 1
            await asyncio.sleep(rng.random() / 10)

    async def watch():
        while (passed := time.perf_counter() - start) < seconds:
            print(f"{passed:5.0f} s  {memory(process):7.1f} MiB  {count:6} requests", flush=True)
            await asyncio.sleep(30)

    await asyncio.gather(watch(), *(client(n) for n in range(24)))
    print(f"{seconds:5.0f} s  {memory(process):7.1f} MiB  {count:6} requests", flush=True)


def soak(args):
    """Memory of a server that is asked for a long time."""
    with tempfile.TemporaryDirectory() as folder:
        save_model("tiny", Path(folder, "m.pt"))
        with server(Path(folder, "m.pt")) as (url, process):
            asyncio.run(come_and_go(url, args.seconds, process))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("load", "soak"))
    p.add_argument("--seconds", type=float, default=30, help="each measurement (30)")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="(1 4 16 64)")
    p.add_argument("--shapes", default="gpt2,tiny", help="presets of ours (gpt2,tiny)")
    p.add_argument("--dtype", default="fp32", help="of our weights (fp32)")
    p.add_argument("--url", help="of another server")
    p.add_argument("--name", default="the other one", help="what the table calls it")
    p.add_argument("--model", help="what requests call its model")
    args = p.parse_args()
    print(about_machine() + "\n")
    {"load": load, "soak": soak}[args.what](args)


if __name__ == "__main__":
    main()
