"""A record of what was forced to the disk, for tests of files that must survive a power cut."""

import os
from pathlib import Path


class Journal:
    """Follows os.fsync, os.replace and Path.rename; `lost` names what a power cut might have taken.

    Args:
        monkeypatch: of the test.
    """

    def __init__(self, monkeypatch):
        self.synced: dict[int, int] = {}  # inode -> the time of its last change that is on the disk
        self.lost: list[str] = []
        self.moved: set[str] = set()  # folders whose list of names is not on the disk yet
        fsync, replace = os.fsync, os.replace

        def recorded_fsync(descriptor):
            fsync(descriptor)
            at = os.fstat(descriptor)
            self.synced[at.st_ino] = at.st_mtime_ns
            self.moved -= {folder for folder in self.moved if os.stat(folder).st_ino == at.st_ino}

        def recorded_replace(source, target):
            below = [source] if os.path.isfile(source) else [p for p in Path(source).rglob("*") if p.is_file()]
            for file in below:
                at = os.stat(file)
                if self.synced.get(at.st_ino) != at.st_mtime_ns:
                    self.lost.append(str(file))
            replace(source, target)
            self.moved.add(str(Path(target).parent))

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "replace", recorded_replace)
        monkeypatch.setattr(Path, "rename", lambda path, target: recorded_replace(path, target))
