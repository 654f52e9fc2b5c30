"""Compare our logits of a model with those of transformers, or of a file.

    python tests/check_logits.py Qwen/Qwen3-0.6B
    python tests/check_logits.py gpt2 --against theirs.pt

Exit code 0 if they are equal but for rounding, 1 if not.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import Parser, UserError, run_cli
from model import find_checkpoint, load_checkpoint, load_hf, model_from_checkpoint


def recorded_logits(path):
    """(ids (B, T), logits (B, T, V)) from a file that torch.save wrote of {"ids", "logits"}; a
    single row may lack its B."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        ids, logits = (torch.as_tensor(content[name]) for name in ("ids", "logits"))
        ids.max()  # an error if there are none
        return (ids.long(), logits) if ids.dim() == 2 else (ids.long()[None], logits[None])
    except Exception as e:
        want = 'torch.save of {"ids": (B, T), "logits": (B, T, V)}'
        raise UserError(f"{path} holds no ids and logits: {want}") from e


def transformers_logits(folder, ids):
    """The logits that transformers computes from a folder in its layout, if it is installed."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no Hugging Face model: name a reference with --against")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise UserError("transformers is not installed: name a file with --against") from e
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


@torch.no_grad()
def main(argv=None):
    p = Parser(description="Compare our logits with a reference's.")
    p.add_argument("model", help="a model of the Hub, a folder like one, or a checkpoint")
    p.add_argument("--against", help="a model, for transformers (default: the same), or a file, "
                   "torch.save of {'ids', 'logits'}")
    args = p.parse_args(argv)
    folder = find_checkpoint(args.model)
    content = load_hf(folder) if (folder / "config.json").exists() else load_checkpoint(folder)
    model = model_from_checkpoint(content, where=args.model)
    vocab, length = model.config.vocab_size, min(64, model.config.context)
    ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0))
    against, theirs = find_checkpoint(args.against or folder), None
    if args.against and against.is_file():
        ids, theirs = recorded_logits(against)
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise UserError(f"the ids must be from 0 to {vocab - 1}")
    ours, theirs = model(ids), transformers_logits(against, ids) if theirs is None else theirs
    if ours.shape != theirs.shape:
        raise UserError(f"our logits are {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
    error, top1 = (ours.double() - theirs.double()).abs(), ours.argmax(-1) == theirs.argmax(-1)
    same = error.max() <= 1e-3 * max(1.0, float(theirs.abs().max()))
    print(f"{ids.numel()} positions, {vocab} logits each, in float32:")
    print(f"largest difference {error.max():.2e}, mean {error.mean():.2e}")
    print(f"the same best token at {float(top1.double().mean()):.2%} of the positions")
    print("equal but for rounding" if same else "NOT EQUAL: this is more than rounding")
    return 0 if same else 1


if __name__ == "__main__":
    run_cli(main)
