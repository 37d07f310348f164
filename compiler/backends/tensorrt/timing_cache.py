"""Timings of tactics, kept from build to build: one file per TensorRT version, GPU and driver.

A builder that finds a tactic's time in the cache does not measure it again, and so also chooses the same tactic again.
Two builds may end at once: what each has learned is merged under a lock, and the file is replaced as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from compiler import durable
from compiler.backends.tensorrt.api import trt


class TimingCache:
    """The cache file of one TensorRT, GPU and driver.

    Args:
        folder: where cache files lie; it is made when the first is written.
        fingerprint: versions, GPU and driver; timings of another combination are worth nothing here.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        digest = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:32]}.timings"

    def attach(self, config: trt.IBuilderConfig) -> trt.ITimingCache:
        """Give ``config`` what is known. The cache that is returned must live until the build is over."""
        try:
            known = self.path.read_bytes()
        except OSError:
            known = b""
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, False):
            # Damaged, or of another TensorRT in spite of its name: begin anew.
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache

    def merge(self, config: trt.IBuilderConfig, learned: trt.ITimingCache) -> str:
        """Add what a build has learned to the file.

        Returns:
            SHA-256 of the timings that this build went by: those it found and those it took.
        """
        with memoryview(learned.serialize()) as serialised:
            mine = bytes(serialised)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            merged = config.create_timing_cache(mine)
            if self.path.exists():
                merged.combine(config.create_timing_cache(self.path.read_bytes()), False)
            with memoryview(merged.serialize()) as serialised:
                durable.write_whole(self.path, bytes(serialised), aside=self.path.with_suffix(".tmp"))
        return hashlib.sha256(mine).hexdigest()
