"""``build-engine recipe.toml`` and its small siblings. Errors become exit codes here and nowhere else.

Click is the only import that every command pays for; each command imports what it needs when it runs, so that
``--help`` answers at once and no command but a build starts a child that loads PyTorch.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from compiler.errors import EXIT_INTERRUPTED, BuildEngineError, from_os_error

_BUILD = "build"

EPILOG = """\b
Exit codes:
  0 every gate passed        6 back end unavailable
  1 a bug in build-engine    7 an engine could not be built
  2 recipe or command line   8 a gate was missed
  3 model or export          9 artifact or disk
  4 graph pass              10 too little evidence to decide a gate
  5 data or calibration    130 interrupted

A recipe names Python code, and building runs it: build only recipes that you trust.
"""


class _RecipeGroup(click.Group):
    """A group whose first argument may be a recipe: ``build-engine x.toml`` is ``build-engine build x.toml``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = [_BUILD, *args]
        return super().parse_args(ctx, args or ["--help"])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "RECIPE [OPTIONS]  |  COMMAND [ARGS]...")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        build = self.commands[_BUILD]
        build.format_options(click.Context(build, info_name=ctx.command_path, parent=ctx.parent), formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=_RecipeGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="build-engine")
def cli() -> None:
    """Turn a PyTorch model into a deployable inference engine, with the evidence that it still works.

    RECIPE is a TOML file. The model is exported to ONNX, optimised, calibrated, quantised, built and compared with the
    original; engines and evidence land in dist/<name>. Start with: build-engine init model.py
    """


@cli.command(_BUILD, hidden=True)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--plan", "plan_only", is_flag=True, help="Print every step with hit or miss, and run nothing.")
@click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a key of the recipe; repeatable."
)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("dist"), show_default=True,
    help="Folder in which <name>/ is written.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")
@click.option("--keep-going", is_flag=True, help="Finish the other engines when one fails.")
@click.option("--no-cache", is_flag=True, help="Neither read nor write the store of earlier steps.")
@click.option("--remeasure", is_flag=True, help="Measure latency again; everything else may come from the store.")
def build(recipe: Path, **options: Any) -> int:
    """Build every engine of RECIPE, prove it against the original, and write dist/<name>."""
    from compiler.pipeline import session

    return session.build(recipe, session.Options(**options))


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--recipe", type=click.Path(path_type=Path),
    help="Also run this recipe's validation again, on the engine files of the artifact.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a key of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def verify(artifact: Path, recipe: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check that ARTIFACT (a folder, dist/<name>) is exactly what was written; nothing in it is loaded before that."""
    if overrides and recipe is None:
        raise click.UsageError("--set changes a recipe; name one with --recipe.")
    from compiler.pipeline import session

    return session.verify(artifact, recipe, overrides, as_json=as_json)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--engine", metavar="NAME", help="Only this engine; default: every int8, fp8 and int4 engine.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on standard output.")
def explain(artifact: Path, engine: str | None, as_json: bool) -> int:
    """Say where the error of quantised engines in ARTIFACT comes from, which tensors clip, and what would help most."""
    from compiler.pipeline import session

    return session.explain(artifact, engine, as_json=as_json)


@cli.command()
def doctor() -> int:
    """Say which back ends and extras are available here and, where not, why and what to do."""
    from compiler.pipeline import session

    return session.doctor()


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Recipe to write; default: MODEL with .toml.")
def init(model: Path, output: Path | None) -> int:
    """Write a starter recipe for MODEL, a Python file with build() and calibration(); runs it to learn its inputs."""
    from compiler.pipeline import session

    return session.init(model, output)


def main() -> NoReturn:
    """The console script: run, and turn whatever happens into an exit code and at most a few lines."""
    try:
        with _terminate_like_ctrl_c():
            sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as exc:
        exc.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("build-engine: interrupted; finished steps are kept, run again to go on.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BuildEngineError as exc:
        click.echo(f"error: {exc.message}", err=True)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            error = from_os_error(exc, Path(os.fsdecode(exc.filename or tempfile.gettempdir())))
            click.echo(f"error: {error.message}", err=True)
            sys.exit(error.exit_code)
        click.echo(f"error: a bug in build-engine: {exc}", err=True)
        with tempfile.NamedTemporaryFile("w", prefix="build-engine-", suffix=".log", delete=False) as log:
            log.write(traceback.format_exc())
        click.echo(f"Please report it; the traceback is in {log.name}", err=True)
        sys.exit(1)


@contextmanager
def _terminate_like_ctrl_c() -> Iterator[None]:
    """SIGTERM ends a build as Ctrl-C does: children gone, nothing half-written."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
