"""Data out of Debian packages, without root: downloaded with apt-get, unpacked with dpkg-deb, kept in a cache."""

import os
import shutil
import subprocess
from pathlib import Path


def cache() -> Path:
    """The folder for data of the examples: ``$MULTUM_DATA``, or ``~/.cache/multum``."""
    return Path(os.environ.get("MULTUM_DATA") or Path.home() / ".cache" / "multum")


def unpacked(package: str, scratch: Path) -> Path:
    """Downloads a package into ``scratch`` and returns the folder with its files, laid out as under ``/``.

    Raises OSError or subprocess.SubprocessError when the package cannot be had.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise OSError("apt-get and dpkg-deb are not on this machine")
    download = ["apt-get", "download", "-q", package]
    done = subprocess.run(download, cwd=scratch, capture_output=True, text=True, timeout=600)
    if done.returncode:  # a machine whose package lists were never fetched knows no package
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, timeout=300)
        subprocess.run(download, cwd=scratch, capture_output=True, text=True, timeout=600, check=True)
    subprocess.run(["dpkg-deb", "-x", next(scratch.glob("*.deb")), scratch / "root"], check=True, timeout=300)
    return scratch / "root"
