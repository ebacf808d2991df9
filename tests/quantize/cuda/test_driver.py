"""The GPU's driver: sources compile for devices, a missing device is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize import gptq as calibrated
from ptqtp_gguf.quantize.cuda import driver as nvidia
from ptqtp_gguf.quantize.cuda import encoder as cuda

QUIET = """
import sys
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize.cuda import encoder as cuda
assert not {"cuda", "torch"} & set(sys.modules)
assert cuda.available() is False
try:
    cuda.CudaEncoder()
except QuantizeError as e:
    print(e)
"""


def test_no_cuda_is_one_line_with_the_way_out() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", QUIET], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("--device cuda: ") and lines[0].endswith("; use --device cpu")


@pytest.mark.parametrize("source", [cuda.SOURCE_FILE, calibrated.SOURCE_FILE], ids=lambda file: file.name)
@pytest.mark.parametrize("capability", [80, 90, 999])
def test_the_kernels_compile_for_devices(capability: int, source: Path) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    try:
        nvrtc.nvrtcVersion()
    except Exception:
        pytest.skip("needs NVRTC")
    code = nvidia.compile_for(nvrtc, capability, source)
    assert code[:4] == b"\x7fELF" if capability < 999 else b".version" in code


needs_gpu = pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU and cuda-bindings")


@needs_gpu
def test_no_such_device() -> None:
    with pytest.raises(QuantizeError, match="no device 99, there are"):
        cuda.CudaEncoder(99)
