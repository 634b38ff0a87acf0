"""Lease: which process works on a slide. Never has to be cleared by hand.

A lease is a file made with exclusive create, holding who took it, whose modification time its owner refreshes. One whose
owner is dead (same machine, no such process) or silent for five minutes is taken over. Taking over never promotes data:
results still only appear by an atomic rename of verified files, so even two owners at once cannot do harm.
"""

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from wsi.errors import SlideBusyError

__all__ = ["HEARTBEAT_S", "STALE_S", "Lease"]

HEARTBEAT_S = 30.0
STALE_S = 300.0


class Lease:
    """Hold ``folder/name.json`` for the length of a with-block.

    Raises:
        SlideBusyError: on entering, when another living process holds it.
    """

    def __init__(self, folder: Path, name: str, *, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
        self.path = folder / f"{name}.json"
        self._heartbeat_s = heartbeat_s
        self._stale_s = stale_s
        self._id = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if self._create():
                self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
                self._thread.start()
                return
            owner = self._read(self.path)
            if not self._is_stale(owner):
                raise SlideBusyError(
                    f"{self.path.stem}: process {owner.get('pid', '?')} on {owner.get('host', '?')} is working on this slide"
                )
            self._remove_stale(owner)
        raise SlideBusyError(f"{self.path.stem}: other processes keep taking this slide")

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._read(self.path).get("id") == self._id:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        facts = {
            "id": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot": _boot_id(),
            "started": _started(),
        }
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(facts, file)
        return True

    def _read(self, path: Path) -> dict[str, object]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}  # gone, or killed between creating and writing: then only its age speaks
        return content if isinstance(content, dict) else {}

    def _is_stale(self, owner: dict[str, object]) -> bool:
        try:
            # the file system's own clock: both times come from it, so the machines' clocks need not agree
            silent_s = self._now_there() - self.path.stat().st_mtime
        except FileNotFoundError:
            return True
        if silent_s > self._stale_s:
            return True
        if owner.get("host") != socket.gethostname():
            return False
        if owner.get("boot") != _boot_id():
            return True
        pid = owner.get("pid")
        return isinstance(pid, int) and _started(pid) != owner.get("started")

    def _now_there(self) -> float:
        probe = self.path.with_name(f".{self._id}.now")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _remove_stale(self, owner: dict[str, object]) -> None:
        """Move the stale file away; a rename has one winner. Had it changed hands meanwhile, it is put back."""
        aside = self.path.with_name(f".{self._id}.stale")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if self._read(aside).get("id") != owner.get("id"):
            with suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with suppress(FileNotFoundError):
                if self._read(self.path).get("id") == self._id:
                    os.utime(self.path)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int | None = None) -> str | None:
    """When a process of this machine started, in the kernel's own unit; None when there is none of this number.

    Where the kernel does not say (no /proc), ``"unknown"`` for a living one.
    """
    pid = os.getpid() if pid is None else pid
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        return "unknown" if _alive(pid) else None
    state, start = stat.rpartition(")")[2].split()[0], stat.rpartition(")")[2].split()[19]
    return None if state == "Z" else start


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill(pid, 0) would end it there; a dead owner's lease goes stale by its silence
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
