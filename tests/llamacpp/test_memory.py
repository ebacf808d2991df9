"""What a process needs to load a file: the weights once, however the file is read."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPO
from large_model import write_large_model

sys.path.insert(0, str(REPO / "tools" / "stress"))
hosts = importlib.import_module("rpc_hosts")

pytestmark = [pytest.mark.runtime, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
OVERHEAD = 24 << 20  # context, buffers of the computation, tokenizer, huge pages that are begun
# prints bytes before and at the peak, locked bytes, and the logits after three tokens
CHILD = """
import json, sys
import llama_cpp
from ptqtp_gguf.llamacpp import model

def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) << 10

path, server, more = json.loads(sys.argv[1])
if server:
    model.use_servers([server])
llama_cpp.llama_backend_init()
before = status("VmRSS")
loaded = llama_cpp.Llama(path, n_ctx=64, n_threads=2, n_gpu_layers=-1 if server else 0, verbose=False, **more)
loaded.eval([7, 8, 9])
logits = loaded._ctx.get_logits()
print(json.dumps([before, status("VmHWM"), status("VmLck"), [float(logits[i]) for i in range(loaded.n_vocab())]]))
"""


def load(path: Path, server: str = "", **more: Any) -> tuple[int, int, np.ndarray]:
    """Bytes that opening the file and evaluating three tokens adds at the peak; locked bytes; logits."""
    what = json.dumps([str(path), server, more])
    done = subprocess.run([sys.executable, "-c", CHILD, what], stdout=subprocess.PIPE, check=True, text=True)
    before, peak, locked, logits = json.loads(done.stdout)
    return peak - before, locked, np.array(logits)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large_model(tmp_path_factory.mktemp("large"))[0]


def test_weights_are_in_memory_once(large: Path) -> None:
    added, _, logits = load(large)
    assert added < 1.2 * large.stat().st_size + OVERHEAD
    assert np.isfinite(logits).all() and logits.std() > 0


def test_split_files(large: Path, tmp_path: Path) -> None:
    parts = write_large_model(tmp_path, 3)
    added, _, logits = load(parts[0])
    assert added < 1.2 * sum(path.stat().st_size for path in parts) + OVERHEAD
    assert np.array_equal(logits, load(large)[2])


@pytest.mark.parametrize("how", [{"use_mmap": False}, {"use_mlock": True}, {"use_mmap": False, "use_mlock": True}])
def test_other_ways_of_reading(large: Path, how: dict[str, Any]) -> None:
    added, locked, logits = load(large, **how)
    assert np.array_equal(logits, load(large)[2])
    if how.get("use_mlock"):
        assert locked > 0
    else:
        assert added < 1.2 * large.stat().st_size + OVERHEAD


def test_rpc(large: Path) -> None:
    """The server has the weights, and what is sent does not stay here."""
    with hosts.hosts(loopback=True) as on, hosts.rpc_server(on) as (process, server):
        added, _, logits = load(large, server)
        status = Path(f"/proc/{process.pid}/status").read_text()
        there = int(status.split("VmHWM:")[1].split()[0]) << 10
    assert added < 0.2 * large.stat().st_size + OVERHEAD
    assert there < 1.2 * large.stat().st_size + OVERHEAD
    assert np.corrcoef(logits, load(large)[2])[0, 1] > 0.999
