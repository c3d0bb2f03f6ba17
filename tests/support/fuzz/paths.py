"""Everything that can lie at the end of a path, and words that are hardly one."""

import os
import socket
import stat
from pathlib import Path

from support.fuzz import inside

WORDS = (
    "", " ", "a b", "a\nb", "x" * 300, "x/" * 2500, "é漢\U0001f600", "\udcff", "a\0b", "nowhere", "nowhere/at/all",
    ".", "./here", "~", "~/x", "*", "[a]", "a?b", "-x", "--help", "a=b", "%s", "{x}", "$HOME", "here/../there", "text/",
    "file/", "file/below", "null", "true", "1", "[x]", ".hidden",
    "/proc/self/mem",
)  # fmt: skip
"""Relative to a folder with what `made` makes."""
THINGS = ("file", "text", "empty", "binary", "pipe", "device", "socket", "dangling", "loop", "closed", "read-only")


def made(folder: Path) -> None:
    """One thing of each sort; root may enter the closed folder and write the read-only file all the same."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text("a file\n", "utf-8")
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    for name in ("text", "empty", "closed"):
        (folder / name).mkdir()
    for split in ("train", "valid", "test"):
        (folder / "text" / f"{split}.txt").write_text("a b c\n" * 40, "utf-8")
    os.mkfifo(folder / "pipe")
    try:
        # A null device of our own: an error here must not cost the machine its /dev/null.
        os.mknod(folder / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        (folder / "device").symlink_to("/proc/self/mem")
    with socket.socket(socket.AF_UNIX) as ours, inside(folder):
        # The path of a socket is short.
        ours.bind("socket")
    (folder / "dangling").symlink_to("nowhere-at-all")
    (folder / "loop").symlink_to("loop")
    (folder / "closed").chmod(0)
    (folder / "read-only").write_text("mine\n", "utf-8")
    (folder / "read-only").chmod(0o400)
