"""How fast LoRA trains here, beside peft, and what a quantized base saves.

    python tests/bench_finetune.py

The 124M shape with random weights, rank 8 on the four matrices of attention, eight rows of 32
tokens: whole steps (forward, backward, clipping, AdamW over the adapters), samples a second, in
turn. peft adapts the same weights, exported; in bf16 its base is held in bf16.

It is a benchmark, not a test: pytest does not collect it. Prints markdown tables for
tests/BENCHMARKS.md; three minutes on two cores.
"""

import argparse
import tempfile

import torch
from bench_common import about_machine, our_step, random_batches, table, take_turns

import lora
import model as lm
from data.machine import DTYPES

ROWS, LENGTH = 8, 32


def make_peft(folder, dtype):
    """A work: a step of peft's LoRA over the exported model."""
    batches = random_batches(50257, ROWS, LENGTH)
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(base, config)
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)

    def work():
        ids, _ = next(batches)  # transformers shifts the labels itself
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def adapted(quantized):
    """The 124M shape with adapters over a base that is perhaps quantized."""
    torch.manual_seed(0)
    model = lm.Transformer(lm.preset("gpt2"))
    if quantized:
        lora.quantize(model, quantized)
    lora.add_lora(model, "attention", rank=8, alpha=16)
    return model


def make_ours(quantized, dtype):
    """A work: a step of finetune.py's LoRA."""
    return our_step(adapted(quantized), random_batches(50257, ROWS, LENGTH), dtype)


def base_bytes(model):
    """Bytes of all that is not trained, in the blocks: parameters and buffers."""
    frozen = [p for p in model.blocks.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in (*frozen, *model.blocks.buffers()))


KINDS = {
    "ours fp32": (None, "fp32"),
    "ours bf16": (None, "bf16"),
    "ours int8 base, fp32": ("int8", "fp32"),
    "ours nf4 base, fp32": ("nf4", "fp32"),
    "ours nf4 base, bf16": ("nf4", "bf16"),
}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=7, help="turns that each work has (7)")
    args = p.parse_args()
    print(about_machine())
    with tempfile.TemporaryDirectory() as folder:
        model = lm.Transformer(lm.preset("gpt2"))
        lm.export_hf({"config": vars(model.config), "model": model.state_dict()}, folder)
        works = {f"peft {d}": (make_peft, dict(folder=folder, dtype=d)) for d in ("fp32", "bf16")}
        for name, (quantized, dtype) in KINDS.items():
            works[name] = make_ours, dict(quantized=quantized, dtype=dtype)
        seconds = take_turns(works, args.rounds)
    print("\nLoRA rank 8 on attention, 124M, 8 x 32:\n")
    for peer in ("peft fp32", "peft bf16", "ours fp32"):
        print(table(seconds, ROWS, "samples/s", peer) + "\n")
    held = {name: base_bytes(adapted(quantized)) for name, (quantized, _) in KINDS.items()}
    for name, size in held.items():
        print(f"{name}: frozen in blocks {size / 1e6:.0f} MB, {size / held['ours fp32']:.2f}")


if __name__ == "__main__":
    main()
