"""How long an epoch of the course's network takes with the images in memory, beside a DataLoader.

    python tests/bench_mnist.py

trains the same network (784-256-128-64-10, dropout, SGD, batches of 64) on MNIST, by turns: with
mnist.py's own loop, on the tensor of all images; with a torch DataLoader that converts and
normalises each image when it is asked for, in the steps of torchvision's MNIST, ToTensor and
Normalize (by way of PIL), and in the fewest steps; and, as the floor, with nothing but the matrix
products of such an epoch.

It is a benchmark, not a test: pytest does not collect it. Prints a markdown table for
tests/BENCHMARKS.md; two minutes on two cores.
"""

import argparse
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from bench_common import about_machine, table, take_turns
from PIL import Image

import mnist

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


def make_loader(folder, convert):
    """A work: an epoch through the DataLoader."""
    (images, labels), _ = mnist.load_mnist(folder=folder)
    raw = ((images * mnist.STD + mnist.MEAN) * 255).round().byte().numpy()
    data = Converting(raw, labels.numpy(), convert)

    def work():
        torch.manual_seed(42)
        model = mnist.MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model.train()
        for x, y in torch.utils.data.DataLoader(data, batch_size=BATCH):
            optimizer.zero_grad()
            F.nll_loss(model(x), y).backward()
            optimizer.step()

    return work


def make_ours(folder):
    """A work: an epoch of mnist.fit."""
    (images, labels), _ = mnist.load_mnist(folder=folder)
    args = mnist.build_parser().parse_args(["--epochs", "1", "--out", "unused"])
    mnist.settle(args)

    def work():
        torch.manual_seed(42)
        run = mnist.Run(mnist.MLP(), args, len(images))
        mnist.fit(run, images, labels, lambda model, x, y: F.nll_loss(model(x), y), dict)

    return work


def make_products(steps):
    """A work: the matrix products alone of so many steps: forward, by the input and by the weight.
    The first layer's input needs no gradient."""
    sizes = [784, 256, 128, 64, 10]
    weights = [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]
    states = [torch.randn(BATCH, a) for a in sizes]

    def work():
        for _ in range(steps):
            for i, w in enumerate(weights):
                torch.mm(states[i], w.T)
                torch.mm(states[i + 1].T, states[i])
                if i:
                    torch.mm(states[i + 1], w)

    return work


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=7, help="turns that each work has (7)")
    p.add_argument("--data", help="a folder with the four IDX files (default: download MNIST)")
    args = p.parse_args()
    print(about_machine())
    count = len(mnist.load_mnist(folder=args.data)[0][0])
    usual, lean = (dict(folder=args.data, convert=c) for c in (as_torchvision, in_few_steps))
    works = {
        "DataLoader, as torchvision converts": (make_loader, usual),
        "DataLoader, in the fewest steps": (make_loader, lean),
        "mnist.py": (make_ours, dict(folder=args.data)),
        "its matrix products alone": (make_products, dict(steps=-(-count // BATCH))),
    }
    flops = 6 * sum(p.numel() for p in mnist.MLP().parameters() if p.dim() > 1) * count
    print(f"\nepochs of {count:,} images, {flops / 1e9:.0f} GFLOP, ", end="")
    print(f"{args.rounds} rounds, {torch.get_num_threads()} thread(s):\n")
    print(table(take_turns(works, args.rounds), count / 1000, "1,000 images/s", "mnist.py"))


if __name__ == "__main__":
    main()
