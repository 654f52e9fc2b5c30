"""What several test files need: one thread each, a folder of their own, the real data, a server."""

import contextlib
import functools
import http.server
import os
import threading
from pathlib import Path

import pytest

# tests run in several processes at once, one a core: so torch is to use one thread in each
os.environ.setdefault("OMP_NUM_THREADS", "1")

# stand-ins for other machines: without oneDNN, without the int8 operations for x86
if without := os.environ.get("SCRATCHLM_WITHOUT"):
    import torch

    if without == "mkldnn":
        torch.backends.mkldnn.set_flags(False)
    elif without == "x86_int8":
        torch.backends.quantized.engine = "qnnpack"  # for ARM
    else:
        raise ValueError(f"SCRATCHLM_WITHOUT={without} is neither mkldnn nor x86_int8")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SCRATCHLM_DATA") or ROOT.parent / "shared" / "data").resolve()
TIKTOKEN = SHARED / "tiktoken"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test works in a folder of its own, with no mirror, proxy or token of the machine's, and
    Hugging Face's libraries stay offline; tiktoken finds its vocabularies if they are here."""
    monkeypatch.chdir(tmp_path)
    for name in ("SCRATCHLM_MIRROR", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if TIKTOKEN.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    return tmp_path


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing about it."""

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve_folder(folder):
    """A server on this machine has the files of `folder`, as they are when asked for; its URL."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
