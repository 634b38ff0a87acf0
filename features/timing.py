"""Timing: where the time of a run, or of one slide in it, has gone."""

import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

__all__ = ["Timing", "peak_memory_bytes"]


@dataclass
class Timing:
    """Sums over a run, or over the part of it that went to one slide.

    Attributes:
        tiles: tiles that went through, those that could not be read included.
        loop_s: wall time of the loop that encodes, from asking for the first pixels to the last vectors.
        waited_s: of that, waiting for pixels: slides being opened, tissue found, tiles decoded.
        encoder_busy_s: of that, encoding.
        prepare_s: opening slides, finding tissue, laying the grid; beside the loop, while slides before are encoded.
        cells_needed: pieces of the file (its own tiles, where the reader decodes these) that the tiles touch.
        cells_decoded: how many were decoded.
        peak_bytes: the most memory that one process has held so far; 0 where the system does not say.
        peak_gpu_bytes: likewise on a GPU; 0 without one.
    """

    tiles: int = 0
    loop_s: float = 0.0
    waited_s: float = 0.0
    encoder_busy_s: float = 0.0
    prepare_s: float = 0.0
    cells_needed: int = 0
    cells_decoded: int = 0
    peak_bytes: int = 0
    peak_gpu_bytes: int = 0

    def add(self, other: "Timing") -> None:
        """Add another's seconds and counts; of memory the larger counts."""
        for each in fields(self):
            join = max if each.name.startswith("peak") else sum
            setattr(self, each.name, join((getattr(self, each.name), getattr(other, each.name))))

    def over(self, devices: int) -> "Timing":
        """The sum over several devices with the seconds of one, on the average."""
        seconds = {each.name: getattr(self, each.name) / devices for each in fields(self) if each.name.endswith("_s")}
        return replace(self, **seconds)

    @property
    def tiles_per_s(self) -> float:
        return self.tiles / self.loop_s if self.loop_s else 0.0

    @property
    def busy_share(self) -> float:
        """The part of the loop's time that the encoder was at work."""
        return min(1.0, self.encoder_busy_s / self.loop_s) if self.loop_s else 0.0

    @property
    def decode_ratio(self) -> float:
        """Pieces decoded over pieces needed; 1 is each once."""
        return self.cells_decoded / self.cells_needed if self.cells_needed else 1.0

    def facts(self) -> dict[str, Any]:
        """For the report, as JSON values."""
        facts = {
            "tiles_per_s": round(self.tiles_per_s, 1),
            "loop_s": round(self.loop_s, 3),
            "waited_s": round(self.waited_s, 3),
            "encoder_busy_s": round(self.encoder_busy_s, 3),
            "prepare_s": round(self.prepare_s, 3),
            "decode_ratio": round(self.decode_ratio, 4),
            "peak_memory_mb": round(self.peak_bytes / 1e6) or None,
        }
        return facts | ({"peak_gpu_memory_mb": round(self.peak_gpu_bytes / 1e6)} if self.peak_gpu_bytes else {})

    def sentence(self, read_threads: int, cores: int) -> str:
        """Where the time went, in plain words, and what would help."""
        busy = f"the encoder was busy {self.busy_share:.0%} of the time"
        rest_s = self.loop_s - self.waited_s - self.encoder_busy_s  # writing, mostly
        if not self.tiles or self.encoder_busy_s >= max(self.waited_s, rest_s):
            return busy
        if rest_s > self.waited_s:
            return f"{busy}; writing is the limit: a faster disk for OUT would help"
        if self.prepare_s > 0.7 * self.loop_s:
            return f"{busy}; opening slides and finding tissue is the limit: local disk would help"
        more = "more --read-threads or local disk" if read_threads < cores else "more cores or local disk"
        return f"{busy}; reading is the limit: {more} would help"


def peak_memory_bytes() -> int:
    """The most memory this process has held so far; 0 where the system does not say."""
    with suppress(OSError, StopIteration):  # getrusage of Linux counts what the process that started this one held
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
