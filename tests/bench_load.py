"""How much memory loading real weights takes, beside the size of their file.

    python tests/bench_load.py

saves models of random weights with transformers, in the shapes of GPT-2 medium, of a Llama and of
Qwen3-0.6B, into a temporary folder of 6 GB (or into --folder, which keeps them for the next time).
For each a process of its own does nothing but load it and make one forward pass of four tokens,
and tells its peak resident memory, which includes all of Python and torch.

It is a benchmark, not a test: pytest does not collect it. Prints a markdown table for
tests/BENCHMARKS.md; two minutes on two cores. Linux only: elsewhere ru_maxrss has other units.
"""

import argparse
import multiprocessing as mp
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

# torch is imported in the children alone: their peak begins with this process's memory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LLAMA = dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
    vocab_size=32000, tie_word_embeddings=False,
)
MODELS = {  # (transformers' config, its fields, dtype, largest file)
    "gpt2": ("GPT2Config", dict(n_embd=1024, n_layer=24, n_head=16), "fp32", "10GB"),
    "llama": ("LlamaConfig", LLAMA, "fp32", "10GB"),
    "shards": ("LlamaConfig", LLAMA, "fp32", "300MB"),
    "qwen3": ("Qwen3Config", LLAMA | dict(
        intermediate_size=3072, num_hidden_layers=28, num_key_value_heads=8, head_dim=128,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
    ), "bf16", "10GB"),
}  # fmt: skip
SMALL = dict(  # what --small has in their place
    n_embd=64, n_layer=2, n_head=2, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=1000,
)
CASES = (  # (what, model, loaded as)
    ("GPT-2 medium, fp32 (its matrices must be transposed)", "gpt2", "fp32"),
    ("the same", "gpt2", "bf16"),
    ("Llama, 24 x 1024, fp32", "llama", "fp32"),
    ("the same in {} files", "shards", "fp32"),
    ("Qwen3-0.6B's shape, bf16 (a tied head stored, too)", "qwen3", "bf16"),
    ("the same", "qwen3", "fp32"),
)


def alone(work, *args):
    """What `work(*args)` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def make(folder, kind, fields, dtype, largest):
    """Save a model with random weights; a tied head is stored, too, as in Qwen3's own files."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, kind)(**fields)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if kind == "Qwen3Config":  # of its own, or transformers leaves it out
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part, max_shard_size=largest)
    part.rename(folder)


def peak():
    """The most memory this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder, dtype):
    """(bytes of the weights in memory, peak before loading, peak after a forward pass)."""
    import torch

    import model as lm
    from data.machine import DTYPES

    before = peak()
    model = lm.model_from_checkpoint(lm.load_hf(folder, DTYPES[dtype]), dtype=DTYPES[dtype])
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3, 4]]))
    return sum(p.nbytes for p in model.parameters()), before, peak()


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--folder", help="where the models are or will be, to keep them")
    p.add_argument("--small", action="store_true", help="toy sizes, to try this script")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(args.folder or temporary, "small" if args.small else "full")
        place.mkdir(parents=True, exist_ok=True)
        for name, (kind, fields, dtype, largest) in MODELS.items():
            if args.small:
                fields = {k: SMALL.get(k, v) for k, v in fields.items()}
                largest = largest.replace("MB", "KB")
            if not (place / name).exists():
                alone(make, place / name, kind, fields, dtype, largest)
        lines = ["| folder | file | loaded as | weights | peak | peak / file | peak / weights |"]
        lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
        for what, name, dtype in CASES:
            sizes = [f.stat().st_size for f in (place / name).glob("*.safetensors")]
            weights, before, most = alone(measure, place / name, dtype)
            cells = f"{sum(sizes) / 1e9:.2f} GB | {dtype} | {weights / 1e9:.2f} GB"
            ratios = f"{most / sum(sizes):.2f} | {most / weights:.2f}"
            what = what.format(len(sizes))
            lines.append(f"| {what} | {cells} | {most / 1e9:.2f} GB | {ratios} |")
    print(f"{time.strftime('%Y-%m-%d')}, torch {version('torch')}, ", end="")
    print(f"transformers {version('transformers')}; ", end="")
    print(f"torch alone takes {before / 1e9:.2f} GB of each peak\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
