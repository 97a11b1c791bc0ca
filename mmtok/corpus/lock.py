"""`FolderLock`: one run at a time writes into a corpus folder, on this machine and on others that share it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from mmtok.corpus.records import LOCK

STALE = 300.0  # seconds without a sign of life after which a run on another machine counts as dead
BEAT = 20.0  # seconds between two signs of life
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # file systems without flock


class FolderLock:
    """Held while a run writes into ``out``: ``with FolderLock(out): ...``.

    On one machine the kernel decides (flock), so a run that was killed never stands in the way. For other machines on
    a shared file system ``.lock`` says who writes and when it last lived, every 20 s; after five minutes without a
    sign it counts as dead. A run that was only suspended for so long and then goes on does no harm: shards are written
    aside and renamed, and two runs of one plan write the same bytes.

    Raises:
        ValueError: another run writes into the folder; says which, and what to do.
    """

    def __init__(self, out: Path, stale: float = STALE, beat: float = BEAT) -> None:
        self.path, self.stale, self.beat = out / LOCK, stale, beat
        self._file: int | None = None
        self._ended = threading.Event()
        self._pulse: threading.Thread | None = None

    def __enter__(self) -> FolderLock:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._refuse_others(_flock(self._file))
            self._sign()
        except BaseException:
            os.close(self._file)
            self._file = None
            raise
        self._ended.clear()
        self._pulse = threading.Thread(target=self._live, name="corpus lock", daemon=True)
        self._pulse.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._pulse is not None:
            self._pulse.join()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)  # empty: nobody writes; the file itself stays, since to delete it is a race
            os.close(self._file)
            self._file = None

    def _refuse_others(self, locked: bool | None) -> None:
        """``locked``: what flock said, None where there is no flock."""
        holder = _read(self._file)
        name = f"pid {holder['pid']} on {holder['host']}" if holder else "its pid is not written yet"
        age = time.time() - holder["time"] if holder else 0.0
        elsewhere = bool(holder) and holder["machine"] != _machine()
        if locked is None and not elsewhere and holder and not _alive(holder["pid"]):
            return
        waits = elsewhere and age < self.stale
        if locked is False or waits or (locked is None and holder and age < self.stale):
            wait = f" (its last sign of life is {max(age, 0):.0f} s old; after {self.stale:.0f} s it counts as dead)"
            raise ValueError(
                f"{self.path.parent}: another run ({name}) writes here{wait if waits else ''}; wait for it or stop it, "
                "or choose another --out"
            )

    def _sign(self) -> None:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "time": time.time()}
        text = json.dumps(about).encode()
        assert self._file is not None
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))

    def _live(self) -> None:
        while not self._ended.wait(self.beat):
            with contextlib.suppress(OSError):  # a full disk: the next beat may find room
                self._sign()


def _flock(file: int) -> bool | None:
    """Whether this process has the lock now; None where the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in NO_LOCKS:
            return None
        raise
    return True


def _read(file: int | None) -> dict[str, Any]:
    """What the holder says of itself; empty where nobody writes, or where a sign is half written."""
    if file is None:
        return {}
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return {**found, "pid": int(found["pid"]), "time": float(found["time"]), "machine": str(found["machine"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _machine() -> str:
    """The running kernel: containers on one machine share it, and with it its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True
