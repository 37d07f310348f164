"""How near a candidate comes to what the card can do.

Source: Williams, Waterman, Patterson (2009), Roofline, CACM 52(4):65.
"""

from __future__ import annotations

import functools

from scripts.gpu.missing import Json, MissingError, guarded, present

PEAK_OF = {"int4": "fp16"}
"""Weight-only INT4 multiplies in FP16; every other precision has a ceiling of its own."""


def add_rooflines(content: Json) -> None:
    """Put every candidate below the ceilings that were measured."""
    for recipe in content["recipes"] if isinstance(content["recipes"], list) else ():
        for batch in recipe["batches"]:
            for candidate in batch["candidates"]:
                candidate["roofline"] = guarded(
                    functools.partial(roofline, candidate, batch["work"], content["ceilings"])
                )


def roofline(candidate: Json, work: Json, ceilings: Json) -> Json:
    """What was achieved, and the share of the lower of two roofs.

    Raises:
        MissingError: the time, the work or a ceiling is not known.
    """
    device = present(candidate.get("device"), "time on the device")
    flops = present(work, "work")["flops"]
    precision: str = candidate["precision"]
    precision = PEAK_OF.get(precision, precision)
    rates = [one["gb_s"] for one in map(present(ceilings, "ceilings").get, ("copy", "read")) if one and "gb_s" in one]
    if not rates:
        raise MissingError("memory bandwidth was not measured")
    arithmetic = present(
        present(ceilings.get("matmul"), "ceilings of arithmetic").get(precision), f"{precision} ceiling"
    )
    moved = candidate.get("bytes")
    if not isinstance(moved, int):
        raise MissingError("the bytes that it moves are not known")
    seconds = device["median_ms"] / 1e3
    by_memory, by_arithmetic = moved / (max(rates) * 1e9), flops / (arithmetic["tflops"] * 1e12)
    roof_s = max(by_memory, by_arithmetic)
    found = {
        "gb_s": moved / seconds / 1e9,
        "tflops": flops / seconds / 1e12,
        "flops_per_byte": flops / moved,
        "roof_ms": 1e3 * roof_s,
        "fraction": roof_s / seconds,
        "binds": "memory" if by_memory > by_arithmetic else "arithmetic",
    }
    cache = ceilings.get("l2_bytes")
    if isinstance(cache, int) and moved <= cache:
        found["note"] = "all that it moves fits into the L2 cache: the memory roof is too low for it"
    return found
