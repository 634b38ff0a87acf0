"""Leases: one owner at a time, and none that has to be cleared by hand."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from features.lease import Lease
from wsi.errors import SlideBusyError

ROOT = Path(__file__).parents[2]
HOLD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from features.lease import Lease
    lease = Lease(Path(sys.argv[1]), "slide")
    lease.acquire()
    print("held", flush=True)
    time.sleep(60)
""")


def test_a_second_owner_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with Lease(tmp_path, "slide"):
        with pytest.raises(SlideBusyError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            Lease(tmp_path, "slide").acquire()
        with Lease(tmp_path, "other"):
            pass
    with Lease(tmp_path, "slide"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_wins(tmp_path: Path) -> None:
    def attempt(_: Any) -> Any:
        lease = Lease(tmp_path, "slide")
        try:
            lease.acquire()
        except SlideBusyError:
            return None
        return lease

    with ThreadPoolExecutor(16) as pool:
        won = [lease for lease in pool.map(attempt, range(64)) if lease is not None]
    assert len(won) == 1
    won[0].release()


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(SlideBusyError):
            Lease(tmp_path, "slide").acquire()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with Lease(tmp_path, "slide"):
            pass
    assert list(tmp_path.iterdir()) == []


def write_lease(folder: Any, **facts: Any) -> Any:
    path = folder / "slide.json"
    path.write_text(json.dumps({"id": "theirs", "host": "elsewhere", "pid": 1, "boot": "x", "started": "1"} | facts))
    return path


def test_an_owner_on_another_machine_counts_while_it_is_heard_of(tmp_path: Path) -> None:
    path = write_lease(tmp_path)
    with pytest.raises(SlideBusyError, match="on elsewhere"):
        Lease(tmp_path, "slide").acquire()
    old = time.time() - 301
    os.utime(path, (old, old))
    with Lease(tmp_path, "slide"):
        assert json.loads(path.read_text())["id"] != "theirs"


def test_an_owner_from_before_the_last_start_of_this_machine_is_dead(tmp_path: Path) -> None:
    with Lease(tmp_path, "slide"):
        living = json.loads((tmp_path / "slide.json").read_text())
    write_lease(tmp_path, **living | {"id": "theirs"})
    with pytest.raises(SlideBusyError):
        Lease(tmp_path, "slide").acquire()  # this very process, started when it says
    write_lease(tmp_path, **living | {"id": "theirs", "boot": "another boot"})
    with Lease(tmp_path, "slide"):
        pass


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path: Path) -> None:
    with Lease(tmp_path, "slide"):
        facts = json.loads((tmp_path / "slide.json").read_text())
    write_lease(tmp_path, **facts | {"id": "theirs", "started": "1"})
    with Lease(tmp_path, "slide"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_half_written_lease_is_stale_by_age_only(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "slide.json"
    path.write_text(content)
    with pytest.raises(SlideBusyError):
        Lease(tmp_path, "slide").acquire()
    os.utime(path, (1, 1))
    with Lease(tmp_path, "slide"):
        pass


def test_a_lease_that_changed_hands_while_it_was_judged_is_put_back(tmp_path: Path) -> None:
    path = write_lease(tmp_path, id="newer")
    Lease(tmp_path, "slide")._remove_stale({"id": "older"})
    assert json.loads(path.read_text())["id"] == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_the_owner_keeps_it_fresh(tmp_path: Path) -> None:
    with Lease(tmp_path, "slide", heartbeat_s=0.05):
        path = tmp_path / "slide.json"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 100 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 100


def test_a_lease_that_was_taken_over_is_not_removed_by_its_old_owner(tmp_path: Path) -> None:
    lease = Lease(tmp_path, "slide")
    lease.acquire()
    write_lease(tmp_path)
    lease.release()
    assert json.loads((tmp_path / "slide.json").read_text())["id"] == "theirs"
