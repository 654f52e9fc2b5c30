"""How long an epoch of the course's network takes with the images in memory, beside a DataLoader.

    python tests/bench_mnist.py

trains the same network (784-256-128-64-10, dropout, SGD, batches of 64) on MNIST, by turns: with
mnist.py's own loop, on the tensor of all images; with a torch DataLoader that converts and
normalises each image when it is asked for, in the steps of torchvision's MNIST, ToTensor and
Normalize (by way of PIL), and in the fewest steps; and, as the floor, with nothing but the matrix
products of such an epoch. Prints a markdown table.

It is a benchmark, not a test: pytest does not collect it. A minute on two cores.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist  # noqa: E402

BATCH = 64


class Converting(torch.utils.data.Dataset):
    """Raw bytes, converted one image at a time by a function."""

    def __init__(self, images, labels, convert):
        self.images, self.labels, self.convert = images, labels, convert

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.convert(self.images[i]), int(self.labels[i])


def as_torchvision(array):
    """Array -> PIL image -> tensor (1, 28, 28) in [0, 1] -> normalised copy."""
    image = np.array(Image.fromarray(array), np.uint8, copy=True)
    image = torch.from_numpy(image).view(28, 28, 1).permute(2, 0, 1).contiguous()
    image = image.to(dtype=torch.get_default_dtype()).div(255).clone()
    mean, std = torch.as_tensor([mnist.MEAN]), torch.as_tensor([mnist.STD])
    assert not (std == 0).any()
    return image.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def in_few_steps(array):
    """Array -> normalised tensor (28, 28)."""
    return torch.from_numpy(array).float().div_(255).sub_(mnist.MEAN).div_(mnist.STD)


def with_loader(raw, labels, convert):
    """Seconds of an epoch through the DataLoader."""
    torch.manual_seed(42)
    model = mnist.MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(Converting(raw, labels, convert), batch_size=BATCH)
    start = time.perf_counter()
    model.train()
    for images, goals in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), goals)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start, loss.item()


def with_tensor(images, labels):
    """Seconds of an epoch of mnist.fit."""
    args = mnist.build_parser().parse_args(["--epochs", "1", "--out", "unused"])
    mnist.settle(args)
    torch.manual_seed(42)
    run = mnist.Run(mnist.MLP(), args, len(images))
    losses = []

    def batch_loss(model, x, y):
        losses.append(F.nll_loss(model(x), y))
        return losses[-1]

    start = time.perf_counter()
    mnist.fit(run, images, labels, batch_loss, dict)
    return time.perf_counter() - start, losses[-1].item()


def products(images):
    """Seconds of the matrix products alone: forward, by the input and by the weight. The first
    layer's input needs no gradient."""
    sizes = [784, 256, 128, 64, 10]
    weights = [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]
    states = [torch.randn(BATCH, a) for a in sizes]
    start = time.perf_counter()
    for _ in range(-(-len(images) // BATCH)):
        for i, w in enumerate(weights):
            torch.mm(states[i], w.T)
            torch.mm(states[i + 1].T, states[i])
            if i:
                torch.mm(states[i + 1], w)
    return time.perf_counter() - start, None


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=7, help="epochs of each kind (default 7)")
    p.add_argument("--data", help="a folder with the four IDX files (default: download MNIST)")
    args = p.parse_args()
    (images, labels), _ = mnist.load_mnist(folder=args.data)
    raw = ((images * mnist.STD + mnist.MEAN) * 255).round().byte().numpy()
    ids = labels.numpy()
    kinds = {
        "DataLoader, as torchvision converts": lambda: with_loader(raw, ids, as_torchvision),
        "DataLoader, in the fewest steps": lambda: with_loader(raw, ids, in_few_steps),
        "mnist.py": lambda: with_tensor(images, labels),
        "its matrix products alone": lambda: products(images),
    }
    seconds, last = {name: [] for name in kinds}, {}
    for _ in range(args.rounds):
        for name, run in kinds.items():
            took, last[name] = run()
            seconds[name].append(took)
    flops = 6 * sum(p.numel() for p in mnist.MLP().parameters() if p.dim() > 1) * len(images)
    print("| an epoch of 60,000 images | median s | fastest | loss of the last batch |")
    print("| --- | ---: | ---: | ---: |")
    for name, times in seconds.items():
        loss = "" if last[name] is None else f"{last[name]:.4f}"
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} | {loss} |")
    usual, lean, ours, _ = seconds.values()
    ratios = (statistics.median(a / b for a, b in zip(s, ours)) for s in (usual, lean))
    print("\nmedian ratios to mnist.py {:.1f} and {:.1f};".format(*ratios), end=" ")
    threads = torch.get_num_threads()
    print(f"{args.rounds} rounds, {threads} threads, {flops / 1e9:.0f} GFLOP an epoch")


if __name__ == "__main__":
    main()
