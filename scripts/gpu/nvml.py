"""What the driver tells of a GPU while it works; nothing is changed on the card."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from scripts.gpu.missing import Json, MissingError, module, reason

T = TypeVar("T")

THROTTLE = (
    *("idle", "application clocks", "software power cap", "hardware slowdown", "sync boost", "software thermal"),
    *("hardware thermal", "power brake", "display clocks", "board limit", "reliability"),
)
"""By bit, why clocks are below their maximum. Source: nvml.h, nvmlClocksEventReason*."""


def throttle_reasons(bits: int) -> list[str]:
    """
    >>> throttle_reasons(0x44), throttle_reasons(0), throttle_reasons(0x10001)
    (['software power cap', 'hardware thermal'], [], ['idle', '0x10000'])
    """
    unknown = bits >> len(THROTTLE) << len(THROTTLE)
    return [name for bit, name in enumerate(THROTTLE) if bits >> bit & 1] + ([hex(unknown)] if unknown else [])


def open_nvml(uuid: str | None) -> tuple[Any, Any]:
    """NVML, and its handle of the GPU with this UUID, or of the first one.

    Raises:
        MissingError: there is no NVML, or it does not know the GPU.
    """
    nvml = module("pynvml")
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception as exc:
        raise MissingError(f"NVML cannot be used: {reason(exc)}") from exc


class Gauge:
    """Reads what NVML tells of one GPU. What it does not tell is in ``missing``, and not asked again."""

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.missing: dict[str, str] = {}
        self._ask: dict[str, Callable[[], Any]] = {
            "energy_j": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            "power_w": lambda: _power_w(nvml, handle),
            "temperature_c": lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "sm_mhz": lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "throttle": lambda: _throttle(nvml, handle),
        }

    def read(self) -> Json:
        reading: Json = {"at_s": self._clock()}
        for name, ask in list(self._ask.items()):
            try:
                reading[name] = ask()
            except Exception as exc:
                self.missing[name] = reason(exc)
                del self._ask[name]
        return reading


def _power_w(nvml: Any, handle: Any) -> float:
    """Power now, where the driver has it; else NVML's own figure, which is an average over a second on newer cards."""
    with contextlib.suppress(Exception):
        (answer,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if answer.nvmlReturn == 0 and answer.value.uiVal:
            return float(answer.value.uiVal) / 1e3
    return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3


def _throttle(nvml: Any, handle: Any) -> list[str]:
    ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    return throttle_reasons(int((ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle)))


@contextlib.contextmanager
def sampling(gauge: Gauge, every_s: float) -> Iterator[list[Json]]:
    """Readings, one at once, one after the body, and those that a thread takes meanwhile."""
    over, readings = threading.Event(), [gauge.read()]

    def poll() -> None:
        while not over.wait(every_s):
            readings.append(gauge.read())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        over.set()
        thread.join()
        readings.append(gauge.read())


def watched(gauge: Gauge | Json, every_s: float, run: Callable[[], T]) -> tuple[T, Json]:
    """What ``run`` returns, and the conditions meanwhile; where there is no gauge, why."""
    if not isinstance(gauge, Gauge):
        return run(), gauge
    with sampling(gauge, every_s) as readings:
        result = run()
    return result, conditions(readings)


def conditions(readings: Sequence[Json]) -> Json:
    """Least, median and greatest of every reading, and every throttle reason that was seen."""
    found: Json = {}
    for name in ("power_w", "temperature_c", "sm_mhz", "memory_mhz"):
        values = [reading[name] for reading in readings if name in reading]
        if values:
            found[name] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    seen = dict.fromkeys(cause for reading in readings for cause in reading.get("throttle", ()))
    return found | {"throttle": list(seen), "readings": len(readings)}
