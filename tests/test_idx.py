"""data/idx.py: MNIST's files, from mirrors and folders."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import idx, serve_folder, toy_files

import mnist
from data.cli import UserError
from data.idx import FILES, MIRRORS, read_idx

pytestmark = pytest.mark.usefixtures("elsewhere")
IMAGES, LABELS, *_ = FILES
GOOD = idx(np.zeros((2, 28, 28)))


@pytest.mark.parametrize("content, words", [
    (b"", "begins with ''"),
    (GOOD[:7], "cut short"),
    (GOOD[:-1], "cannot reshape array of size 1567"),
    (b"\0\0\x0d\x03" + GOOD[4:], "begins with '00 00 0d 03'"),
    (gzip.compress(GOOD, mtime=0)[:-9], "cut short"),
])
def test_a_file_that_is_not_idx_says_how_it_begins(content, words):
    Path("x").write_bytes(content)
    with pytest.raises(UserError, match=words) as e:
        read_idx("x", IMAGES)
    assert "\n" not in str(e.value)


def test_an_idx_file_is_read_as_its_format_says():
    Path("x").write_bytes(bytes.fromhex("00000803 00000002 00000001 00000003 010203 0405ff"))
    assert read_idx("x", IMAGES)[0].tolist() == [[[1, 2, 3]], [[4, 5, 255]]]
    Path("x").write_bytes(gzip.compress(bytes.fromhex("00000801 00000002 0709")))
    assert read_idx("x", LABELS)[0].tolist() == [7, 9]


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """The folders of two mirrors on this machine, which have the toy's files."""
    files = toy_files()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr("data.idx.FILES", sums)
    folders = [tmp_path / "web" / url.split("://")[1] for url in MIRRORS]
    for folder in folders:
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    with serve_folder(tmp_path / "web") as url:
        monkeypatch.setenv("SCRATCHLM_MIRROR", url)
        yield folders


def test_the_images_are_one_tensor_of_mean_0_and_std_1(mirrors):
    (x, y), (test_x, _) = mnist.load_mnist()
    assert x.shape == (300, 28, 28) and x.dtype == torch.float32
    assert y.tolist() == [i % 10 for i in range(300)]
    raw = np.frombuffer(toy_files()["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(100, 28, 28)
    torch.testing.assert_close(test_x, (torch.tensor(raw) / 255 - 0.1307) / 0.3081)
    assert (mnist.grey(test_x) == raw).all()


@pytest.mark.parametrize("fault", ["gone", "other contents", "damaged .gz"])
def test_the_second_mirror_helps_and_two_damaged_ones_are_one_line(mirrors, fault):
    packed, content = bytearray(gzip.compress(toy_files()[IMAGES])), bytearray(toy_files()[IMAGES])
    packed[len(packed) // 2] ^= 16
    content[5000] ^= 1
    damaged = {"other contents": gzip.compress(content), "damaged .gz": packed}.get(fault)

    def damage(path):
        path.write_bytes(damaged) if damaged else path.unlink()

    damage(mirrors[0] / f"{IMAGES}.gz")
    assert len(mnist.load_mnist()[0][0]) == 300
    for path in Path("data").rglob(f"{IMAGES}.gz"):
        path.write_bytes(b"\0" * 50)  # damaged later: kept, and not used
    with pytest.raises(UserError, match=f"{IMAGES}.*Delete a damaged file") as e:
        mnist.load_mnist()
    assert "\n" not in str(e.value)


def test_a_folder_may_hold_another_data_set(toy, capsys):
    assert len(mnist.load_mnist(folder=toy)[0][0]) == 300
    assert "is not MNIST's own" in capsys.readouterr().err
    for labels, words in (np.arange(299) % 10, "299 labels"), (np.arange(300) % 11, "up to 10"):
        Path(toy, LABELS).write_bytes(idx(labels))
        with pytest.raises(UserError, match=words):
            mnist.load_mnist(folder=toy)
