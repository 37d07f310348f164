"""Plain inference of the calibration samples: what any calibration has to pay. In our environment, with our batches."""

from __future__ import annotations

from typing import Any

from ..jobs import Job, Meter
from ..samples import Samples
from ..sessions import open_session


def load() -> None:
    import numpy  # noqa: F401
    import onnxruntime  # noqa: F401


def run(job: Job, meter: Meter) -> dict[str, Any]:
    samples = Samples(job.samples, job.count)
    with meter.stage("open"):
        session = open_session(job.model, threads=job.threads)
    with meter.stage("infer"):
        for start in range(0, len(samples), job.batch):
            session.run(None, samples.feeds(start, min(job.batch, len(samples) - start)))
    return {"files": {}}
