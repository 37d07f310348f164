"""The results and their file."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from compiler import durable
from compiler.errors import ArtifactError
from scripts.gpu.missing import Json, finite, missing_of
from scripts.gpu.roofline import add_rooflines

SCHEMA = 1


class Report:
    """The results so far; the file is written anew whenever there are more."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self.content: Json = {
            "schema": SCHEMA,
            "started": _now(),
            "finished": None,
            "command": command,
            "machine": {"missing": "not reached"},
            "rtx": {"missing": "not reached"},
            "ceilings": {"missing": "not reached"},
            "recipes": [],
            "missing": [],
        }

    def set(self, part: str, value: Any) -> None:
        self.content[part] = value
        self.save()

    def set_recipe(self, value: Json) -> None:
        """Add a recipe's results, or replace those of the same name."""
        recipes: list[Json] = self.content["recipes"]
        place = next((index for index, one in enumerate(recipes) if one["name"] == value["name"]), len(recipes))
        recipes[place : place + 1] = [value]
        self.save()

    def finish(self) -> None:
        self.set("finished", _now())

    def save(self) -> None:
        """Write what there is, whole: a run that is killed leaves the parts done so far.

        Raises:
            ArtifactError: the file cannot be written.
        """
        add_rooflines(self.content)
        parts = {name: self.content[name] for name in ("machine", "rtx", "ceilings", "recipes")}
        self.content["missing"] = list(missing_of(parts))
        data = json.dumps(finite(self.content), indent=1).encode() + b"\n"
        with durable.translating(self._path):
            durable.write_whole(self._path, data, aside=self._path.with_name(self._path.name + ".part"))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_result(path: Path) -> Json:
    """A results file.

    Raises:
        ArtifactError: it is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read: {exc.strerror}. Give a file that this command wrote.") from exc
    except ValueError as exc:
        raise ArtifactError(f"{path}: not JSON; a result of gpu_report was expected. Measure again.") from exc
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "ceilings" not in content:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(f"{path}: found schema {found}; {SCHEMA} was expected. Measure again with this version.")
    return content


def gpu_name(machine: Json) -> str:
    """The GPU's name, by the driver or by torch."""
    names = (machine.get(source, {}).get("name") for source in ("gpu", "cuda"))
    return next((name for name in names if isinstance(name, str)), "no GPU")
