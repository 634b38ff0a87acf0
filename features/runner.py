"""EncoderRunner: batch after batch through an encoder, several on their way at once, and on where one does not go through."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.encoder import Encoder
from wsi.errors import DeviceError

__all__ = ["EncodedBatch", "EncoderRunner", "Encoding", "batch_memory"]

_PX_A_THREAD = 2 * 256**2  # of a CPU; see benchmarks/cpu.py


class EncodedBatch(NamedTuple):
    """Vectors (B, D) float32 and whether each is finite (B,); a row that is not is NaN throughout."""

    vectors: NDArray[np.float32]
    finite: NDArray[np.bool_]


class EncoderRunner:
    """Runs an encoder batch after batch, and gets on where a batch does not go through.

    - Out of memory: the batch is cut in half, down to one tile; the size that worked is kept for later batches.
    - Vectors that are not finite: those tiles run once more in fp32 arithmetic, with the weights as they were rounded.
      What is still not finite becomes NaN throughout and is reported, never hidden.

    Row i depends on tile i alone, whatever the batch, but for the rounding of the device's kernels.

    On a GPU pixels are copied in by a stream of their own while the batch before is encoded, and vectors are copied out
    without waiting: ``start`` the next batch before asking for the ``result`` of the last one.

    Attributes:
        batch_limit: largest batch that fits, once one did not; None until then.
        busy_s: seconds that the device has spent on encoding so far.
        in_flight: how many batches to start before asking for the first one's result.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.batch_limit: int | None = None
        self.busy_s = 0.0
        self.in_flight = 2 if encoder.device.type == "cuda" else 1

    def encode(self, pixels: NDArray[np.uint8]) -> EncodedBatch:
        """Vectors of the tiles ``pixels`` (B, H, W, 3) uint8; B may be 0.

        Raises:
            DeviceError: a single tile does not fit into the device's memory, or the device failed.
        """
        return self.start(pixels).result()

    def start(self, pixels: NDArray[np.uint8]) -> "Encoding":
        """Send a batch on its way; ``pixels`` must stay as they are until its result has come.

        Raises:
            DeviceError: as ``encode``.
        """
        pixels = np.require(pixels, requirements=["C", "W"])  # torch shares the memory and warns where it is read-only
        parts: list[_Part] = []
        done = 0
        most = min(limit for limit in (self.batch_limit, self._at_once, len(pixels)) if limit is not None)
        while done < len(pixels):
            end = min(done + most, len(pixels))
            part = self._try(pixels[done:end])
            if part is None:
                most = self.batch_limit = (end - done) // 2
                _release_memory(self.encoder.device)
            else:
                parts.append(part)
                done = end
        return Encoding(self, pixels, parts)

    def finish(self, pixels: NDArray[np.uint8], parts: "list[_Part]") -> EncodedBatch:
        """Wait for the parts of a batch, and run those tiles again whose vectors are not finite."""
        vectors = np.empty((len(pixels), self.encoder.dim), np.float32)
        done = 0
        for part in parts:
            rows = self._wait(part)
            vectors[done : done + len(rows)] = rows
            done += len(rows)
        finite = np.asarray(np.isfinite(vectors).all(axis=1))
        if not finite.all() and self.encoder.precision != "fp32":
            again = np.flatnonzero(~finite)
            vectors[again], finite[again] = self._in_fp32.encode(pixels[again])
        vectors[~finite] = np.nan
        return EncodedBatch(vectors, finite)

    @property
    def _at_once(self) -> int | None:
        """How many tiles a network takes together on a CPU; None for no limit.

        Few are faster: what lies between layers stays in the caches, and in memory that the process has already.
        """
        side = self.encoder.spec.input_px
        if side is None or self.encoder.device.type != "cpu":
            return None
        return max(1, _PX_A_THREAD * torch.get_num_threads() // side**2)

    @property
    def peak_bytes(self) -> int:
        """The most memory that this process has held on the encoder's GPU; 0 without one."""
        device = self.encoder.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

    @cached_property
    def _in_fp32(self) -> "EncoderRunner":
        encoder = self.encoder
        try:
            backbone = copy.deepcopy(encoder.backbone)
            return EncoderRunner(Encoder(encoder.spec, backbone, encoder.weights, device=encoder.device))
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{encoder.device}: no memory for {encoder.spec.name} in fp32 as well, to run tiles again whose "
                f"vectors in {encoder.precision} are not finite; free the device, or choose --precision fp32"
            ) from error

    @cached_property
    def _copying(self) -> "torch.cuda.Stream":
        return torch.cuda.Stream(self.encoder.device)  # type: ignore[no-untyped-call]

    def _try(self, pixels: NDArray[np.uint8]) -> "_Part | None":
        """The batch on its way, or None when several tiles at once do not fit into memory.

        Returns rather than retries, so that the tensors of the failed run are free before the next one.
        """
        try:
            with torch.inference_mode(), _device_faults(self.encoder.device):
                return self._on_gpu(pixels) if self.encoder.device.type == "cuda" else self._here(pixels)
        except torch.OutOfMemoryError as error:
            if len(pixels) > 1:
                return None
            raise DeviceError(
                f"{self.encoder.device}: out of memory with a single tile, where a smaller --batch-size cannot help "
                f"({self.encoder.spec.name}, {self.encoder.precision}); free the device, or choose another --device"
            ) from error

    def _here(self, pixels: NDArray[np.uint8]) -> "_Part":
        began = time.perf_counter()
        vectors = self.encoder(torch.from_numpy(pixels)).cpu()
        self.busy_s += time.perf_counter() - began
        return _Part(vectors)

    def _on_gpu(self, pixels: NDArray[np.uint8]) -> "_Part":
        device = self.encoder.device
        with torch.cuda.device(device):
            with torch.cuda.stream(self._copying):
                tiles = torch.from_numpy(pixels).to(device, non_blocking=True)
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(self._copying)
            tiles.record_stream(
                computing
            )  # its memory is not to be given to the next copy before this forward is through
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            vectors = self.encoder(tiles)
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            ended.record()
        return _Part(host, (began, ended))

    def _wait(self, part: "_Part") -> NDArray[np.float32]:
        if part.events is not None:
            began, ended = part.events
            with _device_faults(self.encoder.device):
                ended.synchronize()
            self.busy_s += began.elapsed_time(ended) / 1000
        vectors: NDArray[np.float32] = part.vectors.numpy()
        return vectors


@dataclass(frozen=True)
class _Part:
    """Vectors in host memory, or on their way there: when the second event has come, they are."""

    vectors: Tensor
    events: "tuple[torch.cuda.Event, torch.cuda.Event] | None" = None


@dataclass(frozen=True)
class Encoding:
    """A batch on its way through an encoder."""

    runner: EncoderRunner
    pixels: NDArray[np.uint8]
    parts: list[_Part]

    def result(self) -> EncodedBatch:
        """Wait for its vectors.

        Raises:
            DeviceError: as ``EncoderRunner.encode``.
        """
        return self.runner.finish(self.pixels, self.parts)


def batch_memory(device: torch.device) -> Callable[[tuple[int, ...]], NDArray[np.uint8]]:
    """Makes memory for batches of pixels: for a GPU such as it can copy from by itself."""

    def allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        if device.type != "cuda":
            return np.empty(shape, np.uint8)
        with torch.cuda.device(device):  # or each thread that asks would take up room on the first GPU
            memory: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    return allocate


@contextmanager
def _device_faults(device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "CUDA error" not in str(error):
            raise
        raise DeviceError(f"{device}: {str(error).splitlines()[0]}; run again to go on where it stopped") from error


def _release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
