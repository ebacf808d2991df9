"""One NVIDIA device: kernels compiled at run time, memory, streams. The only door to cuda-bindings.

cuda-bindings is NVIDIA's own Python package of the driver and of NVRTC, the run-time compiler. Nothing else is needed:
no CUDA toolkit, no compiler, no torch; but a CUDA build of torch from 2.10 on brings exactly these parts. They are
imported when first used, never with the package. Otherwise: pip install 'cuda-bindings[all]', of the driver's CUDA
version (12.8 or newer).

Not Triton: its sums have no documented order. Not torch's own run-time compiler: it is private and changes. Where a
device is newer than NVRTC, NVRTC makes PTX for the newest one that it knows and the driver finishes it. There is no
other fallback: without CUDA one quantizes on the CPU.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from ...codec import U8
from ...errors import QuantizeError

THREADS = 128  # a block
OUT_OF_MEMORY = 2


class Unavailable(Exception):
    """CUDA cannot be used here; the text says why."""


class CudaError(RuntimeError):
    """A call to the driver or to NVRTC failed."""

    def __init__(self, code: Any) -> None:
        super().__init__(getattr(code, "name", str(code)))
        self.code = int(code)


def call(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-bindings call, which returns (error, values ...). Raises CudaError."""
    if int(result[0]) != 0:
        raise CudaError(result[0])
    return result[1] if len(result) == 2 else result[1:]


@functools.cache
def api() -> tuple[Any, Any]:
    """cuda-bindings' driver and nvrtc, initialised, with a device to work on. Raises Unavailable."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as e:
        raise Unavailable(f"{e}; pip install 'cuda-bindings[all]'") from None
    try:
        call(driver.cuInit(0))
        if call(driver.cuDeviceGetCount()) < 1:
            raise Unavailable("no device is visible")
        call(nvrtc.nvrtcVersion())
    except (RuntimeError, OSError) as e:  # no driver, no device, or no libnvrtc
        text = str(e).strip() or type(e).__name__
        raise Unavailable(f"no driver, device or NVRTC ({text.splitlines()[0]})") from None
    return driver, nvrtc


def compile_for(nvrtc: Any, capability: int, source: Path) -> bytes:
    """Machine code of a CUDA C file for a capability (90 = 9.0), or PTX where NVRTC is older than the device.

    Raises QuantizeError with the compiler's words.
    """
    known = call(nvrtc.nvrtcGetSupportedArchs())
    exact = capability in known
    if not exact and capability < min(known):
        raise QuantizeError(f"--device cuda: capability {capability} below NVRTC's {min(known)}; use --device cpu")
    arch = f"sm_{capability}" if exact else f"compute_{max(k for k in known if k <= capability)}"
    headers = sorted(source.parent.glob("*.cuh"))
    program = call(
        nvrtc.nvrtcCreateProgram(
            source.read_bytes(),
            source.name.encode(),
            len(headers),
            [h.read_bytes() for h in headers],
            [h.name.encode() for h in headers],
        )
    )
    options = [f"--gpu-architecture={arch}".encode(), b"--fmad=false", b"--std=c++17"]
    try:
        call(nvrtc.nvrtcCompileProgram(program, len(options), options))
    except CudaError:
        log = b" " * call(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        first = log.decode(errors="replace").splitlines()[0]
        raise QuantizeError(f"--device cuda: {source.name} does not compile for {arch}: {first}") from None
    size, get = (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if exact else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    code = b" " * int(call(size(program)))
    call(get(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


class Device:
    """One device with the kernels of a file; three streams: up, compute, down."""

    def __init__(self, index: int, source: Path) -> None:
        """Compiles the kernels, some seconds. Raises Unavailable, CudaError, QuantizeError."""
        self.driver, nvrtc = api()
        d = self.driver
        count = call(d.cuDeviceGetCount())
        if not 0 <= index < count:
            raise Unavailable(f"no device {index}, there are {count}, counted from 0")
        self._handle = call(d.cuDeviceGet(index))
        self.name = call(d.cuDeviceGetName(128, self._handle)).split(b"\0")[0].decode()
        kind = d.CUdevice_attribute
        major = call(d.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._handle))
        minor = call(d.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._handle))
        code = compile_for(nvrtc, 10 * major + minor, source)
        self._context = call(d.cuDevicePrimaryCtxRetain(self._handle))
        self.enter()
        self._module = call(d.cuModuleLoadData(code))
        self._kernels: dict[str, Any] = {}
        self.up, self.compute, self.down = (
            call(d.cuStreamCreate(d.CUstream_flags.CU_STREAM_NON_BLOCKING)) for _ in range(3)
        )

    def enter(self) -> None:
        """Make the device's context the calling thread's."""
        call(self.driver.cuCtxSetCurrent(self._context))

    def free_memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = call(self.driver.cuMemGetInfo())
        return int(free), int(total)

    def event(self) -> Any:
        return call(self.driver.cuEventCreate(self.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def then(self, stream: Any, event: Any, after: Any) -> None:
        """`after` waits for all that is in `stream` now; the event marks the place."""
        call(self.driver.cuEventRecord(event, stream))
        call(self.driver.cuStreamWaitEvent(after, event, 0))

    def launch(self, name: str, threads: int, *arguments: Any, stream: Any = None) -> None:
        """Put a kernel on a stream, else on the compute stream. Addresses come as int, numbers as numpy scalars of the
        kernel's width."""
        if name not in self._kernels:
            self._kernels[name] = call(self.driver.cuModuleGetFunction(self._module, name.encode()))
        values = [np.array(a, np.uint64 if isinstance(a, int) else a.dtype) for a in arguments]
        pointers = np.array([v.ctypes.data for v in values], np.uint64)
        grid, block = (-(-threads // THREADS), 1, 1), (THREADS, 1, 1)
        call(
            self.driver.cuLaunchKernel(
                self._kernels[name], *grid, *block, 0, stream or self.compute, pointers.ctypes.data, 0
            )
        )

    def close(self) -> None:
        for stream in (self.up, self.compute, self.down):
            self.driver.cuStreamDestroy(stream)
        self.driver.cuModuleUnload(self._module)
        self.driver.cuDevicePrimaryCtxRelease(self._handle)


class _Pinned:
    """Page-locked host memory, for np.asarray; whoever asked for it frees it."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.pointer = pointer
        self.__array_interface__ = {"data": (pointer, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class Buffer:
    """Device memory with pinned host memory beside it; grows on demand."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address = 0  # on the device
        self.size = self._host_size = -1
        self._host: _Pinned | None = None

    def reserve(self, nbytes: int, on_host: int | None = None) -> None:
        """Room for nbytes on the device and as many, or on_host, on the host; what was in it is lost if it grows.

        Raises CudaError.
        """
        on_host = nbytes if on_host is None else on_host
        if nbytes <= self.size and on_host <= self._host_size:
            return
        self.release()
        d = self._device.driver
        self.address = int(call(d.cuMemAlloc(max(nbytes, 1))))
        self._host = _Pinned(int(call(d.cuMemHostAlloc(max(on_host, 1), 0))), on_host)
        self.size, self._host_size = nbytes, on_host

    def host(self, nbytes: int) -> U8:
        """The first nbytes of the host's side, valid until the buffer grows or is released."""
        return np.asarray(self._host)[:nbytes]

    def upload(self, nbytes: int) -> None:
        assert self._host
        call(self._device.driver.cuMemcpyHtoDAsync(self.address, self._host.pointer, nbytes, self._device.up))

    def download(self, nbytes: int) -> None:
        assert self._host
        call(self._device.driver.cuMemcpyDtoHAsync(self._host.pointer, self.address, nbytes, self._device.down))

    def release(self) -> None:
        if self.address:
            self._device.driver.cuMemFree(self.address)
        if self._host:
            self._device.driver.cuMemFreeHost(self._host.pointer)
        self.address, self._host = 0, None
        self.size = self._host_size = -1
