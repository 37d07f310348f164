"""Measure engines and PyTorch on this machine's GPU, and name what could not be measured.

    scripts/gpu_report [RECIPE ...] --output results.json [--artifact dist/NAME ...] [--only rtx,recipes] [--limit-s 540]
    scripts/gpu_report --render results.json

In this order: does a TensorRT engine load and run here at all (``rtx``); what memory and arithmetic this card really
gives (``ceilings``); each recipe's original in eager PyTorch and `torch.compile`, in FP32, TF32, FP16 and BF16, with and
without CUDA graphs, and the engines of an artifact, interleaved (``recipes``); their joules per inference (``energy``).
What the machine lacks becomes ``{"missing": "<reason>"}`` in its place, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from compiler.errors import ArtifactError, BuildEngineError, RecipeError
from scripts.gpu import ceilings, machine, recipes, rtx
from scripts.gpu.children import ROOT, Deadline, child_main, run_child
from scripts.gpu.missing import Emit, Json
from scripts.gpu.results import Report, gpu_name, read_result

PARTS = ("rtx", "ceilings", "recipes", "energy")
RECIPES = ("recipes/digits.toml", "recipes/minilm.toml", "recipes/resnet50.toml")
LIMIT_S = 3600.0
PART_LIMIT_S = {"machine": 60.0, "rtx": 120.0, "ceilings": 180.0}
CHILDREN: Mapping[str, Callable[[Json, Emit], None]] = {
    "machine": machine.part,
    "rtx": rtx.part,
    "ceilings": ceilings.part,
    "recipe": recipes.part,
}
NOT_REACHED = {"missing": "not reached"}


def measure(arguments: argparse.Namespace, report: Report, child: Callable[..., str | None] = run_child) -> None:
    """Every part that was asked for, one after the other; ``report`` is saved whenever a child has more.

    Raises:
        ArtifactError: the file cannot be written, or the earlier result is another machine's.
    """
    deadline = Deadline(arguments.limit_s)
    content = report.content
    earlier = read_result(arguments.earlier) if arguments.earlier else None

    def run(job: Json, limit_s: float, begun: Json, keep: Emit) -> tuple[Json, str | None]:
        """What a child reported last, else ``begun``; and why it did not come to its end. ``keep`` gets every report."""
        last = begun

        def take(value: Json) -> None:
            nonlocal last
            last = value
            keep(value)

        why = child(job, limit_s, take)
        return last, why

    def part(name: str) -> None:
        limit_s = min(PART_LIMIT_S[name], deadline.left())
        found, why = run({"part": name}, limit_s, content[name], lambda value: report.set(name, value))
        if why is not None:
            report.set(name, {"missing": why} if "missing" in found else found | {"interrupted": {"missing": why}})
        say(f"{name}: " + content[name].get("missing", why or "done"))

    part("machine")
    if earlier is not None:
        before, now = gpu_name(earlier["machine"]), gpu_name(content["machine"])
        if before != now:
            raise ArtifactError(
                f"{arguments.earlier}: measured on {before}; {now} was expected, which is here. "
                "Results of two machines do not mix."
            )
    for name in ("rtx", "ceilings", "recipes"):
        if earlier is not None:
            content[name] = earlier[name]
        elif name not in arguments.only:
            content[name] = {"missing": "not asked for (--only)"}
    if "rtx" in arguments.only:
        tried: dict[str, Json] = dict.fromkeys(rtx.FLAVOURS, NOT_REACHED)
        for flavour in rtx.FLAVOURS:
            limit_s = min(PART_LIMIT_S["rtx"], deadline.left())
            found, why = run({"part": "rtx", "flavour": flavour}, limit_s, NOT_REACHED, lambda _: None)
            if why is not None:
                at = found["steps"][-1]["step"] + ": " if found.get("steps") else ""
                found = found | {"missing": at + why}
            tried[flavour] = found
            report.set("rtx", {"answer": rtx.answer(tried), **tried})
        say(content["rtx"]["answer"])
    if "ceilings" in arguments.only:
        part("ceilings")
    if "recipes" in arguments.only:
        for position, path in enumerate(arguments.recipes):
            job = {
                "part": "recipe",
                "recipe": str(path.resolve()),
                "artifacts": [str(folder.resolve()) for folder in arguments.artifact],
                "energy": "energy" in arguments.only,
            }
            limit_s = deadline.left() / (len(arguments.recipes) - position)
            begun = {"recipe": path.name, "name": path.stem, "batches": []}
            found, why = run(job, limit_s, begun, report.set_recipe)
            if why is not None:
                report.set_recipe(found | {"interrupted": {"missing": why}})
            timed = [
                one
                for batch in found["batches"]
                for one in batch["candidates"]
                if "median_ms" in one.get("device", one.get("host", {}))
            ]
            say(f"{found['name']}: " + (why or f"{len(timed)} candidates measured"))
    report.finish()


def say(line: str) -> None:
    print(line, flush=True)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        RecipeError: a file that it names is not there, or a part is unknown.
    """
    parser = argparse.ArgumentParser(
        prog="gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", type=Path, help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--output", type=Path, default=Path("gpu_report.json"), help="default: gpu_report.json")
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="folder whose engines are measured")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for everything; default: 3600")
    parser.add_argument("--earlier", type=Path, help="keep the parts of this result that are not measured now")
    parser.add_argument("--render", type=Path, metavar="RESULT", help="print a result as Markdown, and measure nothing")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.only = tuple(name.strip() for name in found.only.split(",") if name.strip())
    found.recipes = found.recipes or [ROOT / name for name in RECIPES]
    if unknown := [name for name in found.only if name not in PARTS]:
        raise RecipeError(f"--only: found '{unknown[0]}'; some of {', '.join(PARTS)} were expected. Correct it.")
    if "energy" in found.only and "recipes" not in found.only:
        raise RecipeError("--only: found 'energy' without 'recipes', whose candidates it is about. Add it.")
    for path in found.recipes:
        if not path.is_file():
            raise RecipeError(f"{path}: no such file; a recipe (TOML) was expected. Correct the path.")
    return found


def render(path: Path) -> None:
    """
    Raises:
        ArtifactError: it is no result.
        RecipeError: a package that this needs is not installed.
    """
    content = read_result(path)
    try:
        from compiler.report.gpu import markdown
    except ImportError as exc:
        raise RecipeError(f"--render needs a package that is not installed: {exc}. Install it.") from exc
    print(markdown(content), end="")


def main(arguments: Sequence[str]) -> int:
    try:
        asked_for = options(arguments)
        if asked_for.child is not None:
            child_main(CHILDREN[asked_for.child["part"]], asked_for.child, asked_for.pipe)
        elif asked_for.render is not None:
            render(asked_for.render)
        else:
            report = Report(asked_for.output, shlex.join(["gpu_report", *arguments]))
            measure(asked_for, report)
            say(f"{asked_for.output}: {len(report.content['missing'])} things missing")
    except BuildEngineError as exc:
        print(exc.message, file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("interrupted; the parts that were done are in the file", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the child, too
    sys.exit(main(sys.argv[1:]))
