"""One TOML file to one frozen, fully checked `Recipe`; every mistake is found at once, each with its line.

Why a decoder of our own around msgspec: msgspec (like every decoder tried) stops at the first mistake and knows no
lines. `_decode` walks the same Struct definitions, asks msgspec about one value at a time, and collects. Nothing here
imports a user's code or a heavy library.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import msgspec
import tomli
from msgspec import Meta, Struct

from compiler.errors import RecipeError, suggest
from compiler.spec import Dim, DimRange, Precision, TensorSpec, batch_axis

MAX_BYTES = 64 * 1024
"""A recipe is refused above this size before it is parsed: TOML parsers can be made to use gigabytes."""

DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z"
Fraction: TypeAlias = Annotated[float, Meta(gt=0, lt=1)]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]
Tolerance: TypeAlias = Annotated[float, Meta(ge=0)]
Name: TypeAlias = Annotated[str, Meta(pattern=NAME_PATTERN)]


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the recipe; the field names are its keys, the defaults are what a short recipe gets."""


class InputSection(_Section, frozen=True, kw_only=True):
    """``[model.inputs.<name>]``: one input, by the name of `forward`'s parameter."""

    dtype: Literal[DTYPES] = "float32"  # type: ignore[valid-type]
    shape: tuple[Annotated[int, Meta(ge=0)] | str, ...]


class ModelSection(_Section, frozen=True, kw_only=True):
    """``[model]``: where the original comes from.

    ``source`` is ``file.py`` (defines ``build()``), ``package.module:callable``, ``hf:<directory or id>``,
    ``file.pt2`` (a saved `torch.export` program) or ``file.onnx``. Paths are relative to the recipe.
    """

    source: str
    weights: str | None = None
    """A .safetensors file, or a .pt/.pth state dict (read with ``weights_only=True``)."""
    revision: str | None = None
    """For ``hf:<id>``: the commit to load."""
    task: str = "feature-extraction"
    """For ``hf:``: which head to load; see `compiler.original.HF_TASKS`."""
    inputs: dict[str, InputSection]
    outputs: tuple[str, ...] = ()
    """Names for the outputs, in the order `forward` returns them; default: its dict keys, or output_0, output_1, ..."""


class DataSection(_Section, frozen=True, kw_only=True):
    """``[data]``: where samples come from."""

    source: str | None = None
    """A Python file with ``calibration()`` and ``validation()``; default: the model's file."""
    files: tuple[str, ...] = ()
    """Globs, relative to the recipe, of files that the functions read: they become part of the cache key."""
    validation_samples: Positive | None = None
    """Take only this many validation samples; default: all."""


class ExportSection(_Section, frozen=True, kw_only=True):
    """``[export]``: how the ONNX file is written and compared with the original."""

    opset: Literal["auto", 18, 19, 20, 21, 22, 23, 24, 25] = "auto"
    rtol: Tolerance = 1e-3
    atol: Tolerance = 1e-4


class OptimizeSection(_Section, frozen=True, kw_only=True):
    """``[optimize]``: graph passes to leave out, by name; see `compiler.optimize.registry`."""

    skip: tuple[str, ...] = ()


class EngineSection(_Section, frozen=True, kw_only=True):
    """``[[engines]]``: one engine to build."""

    precision: Precision
    name: Name | None = None
    """Default: the precision, e.g. ``int8``."""
    backend: Literal["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"] = "auto"
    rest: Literal["fp32", "fp16", "bf16"] = "fp32"
    """For int8, fp8 and int4: the precision of what is not quantised."""
    weights_only: bool = False
    """For int8 and fp8: round weights and leave activations in ``rest``. An int4 engine always does."""
    block: Literal[16, 32, 64, 128] = 32
    """For int4: how many weights along the input axis share a scale."""
    keep: tuple[str, ...] = ()
    """Node or tensor names, or shell patterns, that stay in ``rest`` (int8) or FP32 (fp16, bf16)."""

    @property
    def label(self) -> str:
        return self.name or self.precision.value

    @property
    def ranged(self) -> bool:
        """Whether activations are rounded to a range that calibration chooses: others take the whole range, or none."""
        return self.precision is Precision.INT8 and not self.weights_only


Switch: TypeAlias = Literal["auto", "on", "off"]


class QuantizeSection(_Section, frozen=True, kw_only=True):
    """``[quantize]``: calibration, for every INT8, FP16 and BF16 engine."""

    method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    """How ranges of activations are chosen; ``auto``: for each by the least measured error."""
    activations: Literal["auto", "symmetric", "asymmetric"] = "auto"
    """Whether the ranges of activations are centred on zero, as TensorRT asks; ``auto``: where the back end asks it."""
    smooth: Switch = "auto"
    """SmoothQuant: ``auto`` takes it for each activation where that is expected to help."""
    split: Switch = "auto"
    """Multiply the few outlying channels of an activation in high precision, as LLM.int8() does."""
    equalize: Switch = "auto"
    """Cross-layer equalisation: even out the channels between two convolutions, where that is expected to help."""
    joins: Literal["auto", "own", "shared"] = "auto"
    """Whether the two tensors that an addition joins in INT8 share a scale; ``auto``: where the back end gains by it."""
    attention: Literal["off", "on"] = "off"
    """Round what products of two activations multiply, too, as TensorRT's fused kernels for attention want it."""
    rounding: Literal["auto", "nearest", "adaround", "gptq", "awq"] = "auto"
    """How weights are rounded. AdaRound and GPTQ choose for each weight whether up or down; AWQ scales INT4's first.
    ``auto`` takes what errs least on samples held out; beside rounded activations, nearest."""
    correct_bias: Switch = "auto"
    """Take back what rounding adds to the mean of a channel: ``auto`` for convolutions, ``on`` for products as well."""
    samples: Positive = 512
    """Use at most this many calibration samples."""
    min_samples: Positive = 16
    """Fewer calibration samples than this are an error."""
    percentile: Annotated[float, Meta(gt=50, le=100)] = 99.99
    keep: tuple[str, ...] = ()
    """As ``engines.keep``, for every INT8, FP8 and INT4 engine."""
    min_sqnr_db: float = 10.0
    """An INT8, FP8 or INT4 model whose outputs on calibration samples fall below this is refused as broken, before it is built."""


class LatencySection(_Section, frozen=True, kw_only=True):
    """``[latency]``: how candidates are timed."""

    batches: tuple[Positive, ...] = ()
    """Batch sizes; default: minimum and optimum of the batch axis."""
    threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads of every candidate; 0: all cores that this process may use."""
    blocks: Annotated[int, Meta(ge=5, le=80)] = 20
    """Interleaved blocks; doubled, to at most 80, while a latency gate is undecided."""
    block_ms: Annotated[float, Meta(gt=0)] = 50.0
    """Each candidate runs at least this long in a block."""
    limit_s: Annotated[float, Meta(gt=0)] = 60.0
    """No batch size is measured longer than this, but for 5 blocks, which it always gets; warming up takes up to a quarter more."""
    compile: bool = True
    """Time `torch.compile` of the original too, where it works."""


COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Targets that TensorRT for RTX builds for: tried with 1.7.1, which refuses every other, Hopper and 10.x among them."""

OLDEST_CAPABILITY: Mapping[Precision, str] = {Precision.FP8: "8.9", Precision.BF16: "8.0", Precision.INT4: "8.0"}
"""The first compute capability with instructions for a type. What else a target lacks, the builder says."""

Profile: TypeAlias = dict[str, DimRange]


class TensorRTSection(_Section, frozen=True, kw_only=True):
    """``[tensorrt]``: for every engine of the back ends ``tensorrt`` and ``tensorrt_rtx``.

    A key that a flavour does not take, or takes without effect, is refused for it; see
    `compiler.backends.tensorrt.options`.
    """

    optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    """How long the builder looks for fast tactics; its own default is 3."""
    workspace_mib: Positive | None = None
    """Scratch memory that one tactic may use; default: all of the GPU's."""
    tf32: bool = False
    """Let FP32 layers multiply in TF32 (10 bits of mantissa). Off: an FP32 engine computes in FP32."""
    sparse_weights: bool = False
    """Use kernels for 2:4 sparsity where weights have that pattern."""
    weight_streaming_mib: Annotated[int, Meta(ge=0)] | None = None
    """Keep at most this much of the weights on the GPU, and stream the rest from the host."""
    refit: bool = False
    """Weights can be replaced after the build."""
    strip: bool = False
    """Leave the weights out of the plan, to be refitted from the ONNX file where the engine is opened."""
    version_compatible: bool = False
    """The plan also runs in later minor versions of TensorRT 11."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """On which other GPUs the plan runs."""
    tiling: Literal["none", "fast", "moderate", "full"] = "none"
    """How hard the builder looks for tiles that stay in the L2 cache."""
    aux_streams: Annotated[int, Meta(ge=0)] | None = None
    """Streams beside the main one that an engine may use; default: the builder's choice."""
    verbosity: Literal["none", "layer_names_only", "detailed"] | None = None
    """What the plan tells of its layers. Default: detailed, which the precision proof on a GPU reads."""
    timing_cache: bool | None = None
    """Keep timings of tactics from build to build. Default: yes."""
    compute_capabilities: tuple[Literal[COMPUTE_CAPABILITIES], ...] = ()  # type: ignore[valid-type]
    """GPUs to build for; default: every one that the builder supports."""
    profiles: tuple[Profile, ...] = ()
    """Ranges of the dynamic axes for which kernels are chosen; default: one profile, `axes`."""
    limit_s: Positive = 3600
    """A build that takes longer is ended."""
    limit_mib: Annotated[int, Meta(ge=0)] = 0
    """A build whose process takes more host memory is ended; 0: no limit."""
    departures: Literal["refuse", "report"] = "refuse"
    """What to do with an engine some layers of which do not have the precision that was asked."""
    ahead_of_time: bool = False
    """The engines are for another machine. What only that machine can show is left to ``verify`` there, and said so;
    without, such an engine is inconclusive."""


class GateSection(_Section, frozen=True, kw_only=True):
    """``[[gates]]``: what an engine must show. Exactly one of ``max_drop``, ``min``, ``max``.

    Metrics: one of the model file, or a generic one (``cosine``, ``sqnr_db``, ``max_abs_diff``, ``top1_agreement``);
    ``speedup_p50``, ``p50_ms``, ``p90_ms``, ``p99_ms``, ``per_s`` at ``batch``; ``size_mib``, ``size_ratio``.
    """

    metric: str
    engine: str = "*"
    """An engine's name or a shell pattern."""
    max_drop: Tolerance | None = None
    """The loss against the original, in the metric's own units, paired on the same samples."""
    min: float | None = None
    max: float | None = None
    confidence: Fraction = 0.95
    batch: Positive | None = None
    """For latency metrics; default: every batch size that was timed."""
    against: str = "original"
    """For ``speedup_*`` and ``size_ratio``: ``original`` (the faster of eager and compiled), ``eager``, ``compile`` or an engine."""

    def describe(self) -> str:
        """The gate in one line: ``top1 drop <= 0.01 (95 %)``."""
        limit = (
            f"drop <= {self.max_drop:g}"
            if self.max_drop is not None
            else f">= {self.min:g}"
            if self.min is not None
            else f"<= {self.max:g}"
        )
        batch = f" at batch {self.batch}" if self.batch else ""
        over = f" over {self.against}" if self.against != "original" else ""
        confidence = "" if self.metric in SIZE_METRICS else f" ({self.confidence:.0%})"
        return f"{self.metric}{over} {limit}{batch}{confidence}"


class SearchSection(_Section, frozen=True, kw_only=True):
    """``[search]``: choose for every quantised engine which layers stay in higher precision, by measurement.

    Of the mixtures that keep within the budget the best by ``objective`` becomes the engine; where FP32 is no slower
    (or no larger), FP32 does. What is measured here are samples of their own: those of ``selection()`` in the data file,
    or else what ``calibration()`` yields beyond ``quantize.samples``; never those that the gates judge by.
    """

    engine: str = "*"
    """Engines to search for: a name or a shell pattern."""
    budget: tuple[GateSection, ...] = ()
    """``[[search.budget]]``: what a mixture must show, written like gates; default: the recipe's own gates on accuracy."""
    objective: Literal["latency", "size"] = "latency"
    minutes: Annotated[float, Meta(gt=0)] = 5.0
    """What the search for one engine may take; interrupted, it goes on where it was."""
    samples: Positive = 256
    """Use at most this many samples to select."""

    def budget_of(self, label: str, gates: Sequence[GateSection]) -> tuple[GateSection, ...]:
        """The limits on the accuracy of engine ``label``, of a recipe with ``gates``."""
        own = tuple(gate for gate in gates if fnmatch.fnmatchcase(label, gate.engine))
        chosen = self.budget or tuple(gate for gate in own if gate.metric not in SPEED_METRICS | SIZE_METRICS)
        return tuple(msgspec.structs.replace(gate, engine="*") for gate in chosen)


QUANTIZED = frozenset({Precision.INT8, Precision.FP8, Precision.INT4})
SPEED_METRICS = frozenset({"speedup_p50", "p50_ms", "p90_ms", "p99_ms", "per_s"})
SIZE_METRICS = frozenset({"size_mib", "size_ratio"})
GENERIC_METRICS = frozenset({"cosine", "sqnr_db", "max_abs_diff", "top1_agreement"})


class Recipe(_Section, frozen=True, kw_only=True):
    """Everything that a run depends on, beside the files it names."""

    name: Name
    model: ModelSection
    axes: dict[str, DimRange] = {}
    data: DataSection = DataSection()
    export: ExportSection = ExportSection()
    optimize: OptimizeSection = OptimizeSection()
    engines: tuple[EngineSection, ...] = (
        EngineSection(precision=Precision.FP32),
        EngineSection(precision=Precision.INT8),
    )
    quantize: QuantizeSection = QuantizeSection()
    tensorrt: TensorRTSection = TensorRTSection()
    latency: LatencySection = LatencySection()
    search: SearchSection | None = None
    gates: tuple[GateSection, ...] = (GateSection(metric="cosine", min=0.99), GateSection(metric="sqnr_db", min=10.0))
    """By default the outputs keep their direction (cosine) and their size, which cosine does not see (SQNR)."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs in the order of the recipe."""
        return tuple(
            TensorSpec(name=name, dtype=section.dtype, shape=section.shape)
            for name, section in self.model.inputs.items()
        )

    def searched(self, engine: EngineSection) -> bool:
        """Whether ``engine`` is chosen by ``[search]``."""
        if self.search is None or engine.precision not in QUANTIZED:
            return False
        return fnmatch.fnmatchcase(engine.label, self.search.engine)

    @property
    def halved(self) -> bool:
        """Whether something is to be FP16 or BF16."""
        halves = {Precision.FP16.value, Precision.BF16.value}
        return any(engine.precision.value in halves or engine.rest in halves for engine in self.engines)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes to time: as asked, else the minimum and optimum of the batch axis, else 1."""
        axis = self.axes.get(batch_axis(self.inputs) or "")
        return self.latency.batches or ((1,) if axis is None else tuple(dict.fromkeys((axis.min, axis.opt))))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults filled in: the resolved recipe that goes into the artifact."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Problem:
    path: tuple[str | int, ...]
    text: str


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``overrides`` are ``table.key=value`` strings that win over the file.

    Raises:
        RecipeError: with every mistake on a line of its own.
    """
    text = _read(path)
    try:
        values = tomli.loads(text)
    except tomli.TOMLDecodeError as exc:
        line = re.search(r"line (\d+)", str(exc))
        raise RecipeError(f"{path}:{line[1] if line else 1}: not valid TOML: {exc}.") from exc
    except (RecursionError, ValueError) as exc:
        raise RecipeError(f"{path}: not valid TOML: nested too deeply, or a number too long.") from exc
    lines = _key_lines(text)
    overridden = set()
    for override in overrides:
        overridden.update(_override(values, override))
    problems: list[_Problem] = []
    recipe = _decode(values, Recipe, (), problems)
    if not problems:
        problems.extend(_check(recipe))
    if problems:
        raise RecipeError("\n".join(_locate(path, lines, overridden, problem) for problem in problems))
    return recipe  # type: ignore[no-any-return]


def _read(path: Path) -> str:
    try:
        if not path.exists():
            raise RecipeError(f"{path}: no such file. Write one with 'build-engine init model.py'.")
        if not path.is_file():
            raise RecipeError(f"{path}: not a file; a recipe (TOML) was expected.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_BYTES >> 10} KiB; a recipe is a short TOML file.")
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise RecipeError(f"{path}: not UTF-8 text; a recipe is a short TOML file.") from exc
    except OSError as exc:
        raise RecipeError(f"{path}: cannot be read: {exc.strerror}.") from exc


_LISTS = ("engines", "gates")
"""Tables of a recipe of which there may be several."""


def _override(values: dict[str, Any], override: str) -> list[tuple[str | int, ...]]:
    """Apply one ``--set``; the value is TOML, or else a bare string. ``engines.key=value`` sets it in every engine.

    Returns:
        The paths that were set.
    """
    key, separator, raw = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not separator or not all(names):
        raise RecipeError(f"--set {override}: not an assignment; table.key=value was expected.")
    try:
        value = tomli.loads(f"value = {raw.strip()}")["value"]
    except (ValueError, RecursionError):
        value = raw.strip()
    table = values.get(names[0])
    listed = names[0] in _LISTS and len(names) > 1
    if listed and not table:
        raise RecipeError(
            f"--set {override}: the recipe has no [[{names[0]}]]; at least one was expected. Add it to the file, or set all "
            f"of them: {names[0]}=[{{...}}]."
        )
    if len(names) > 1 and isinstance(table, list) and not names[1].isdecimal():
        return [_set(values, [names[0], str(index), *names[1:]], value, override) for index in range(len(table))]
    return [_set(values, names, value, override)]


def _set(values: dict[str, Any], names: Sequence[str], value: Any, override: str) -> tuple[str | int, ...]:
    place: Any = values
    path: list[str | int] = []
    for position, name in enumerate(names):
        step: str | int = int(name) if isinstance(place, list) and name.isdecimal() else name
        path.append(step)
        if isinstance(place, list) and (not isinstance(step, int) or step >= len(place)):
            raise RecipeError(
                f"--set {override}: '{'.'.join(names[:position])}' is a list of {len(place)}; "
                f"an index from 0 to {len(place) - 1} was expected after it, found '{name}'."
            )
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {override}: '{'.'.join(names[:position])}' is a value, not a table.")
        if position == len(names) - 1:
            place[step] = value  # type: ignore[index]  # an index where place is a list, checked above
        else:
            place = place.setdefault(name, {}) if isinstance(place, dict) else place[int(name)]
    return tuple(path)


# --- decoding: one value at a time, collecting ----------------------------------------------------------------------


def _decode(value: Any, kind: Any, path: tuple[str | int, ...], problems: list[_Problem]) -> Any:
    """``value`` as ``kind``; what does not fit is added to ``problems`` and None is returned for it."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        return _decode_table(value, kind, path, problems)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType and issubclass(arguments[0], Struct):
        return _decode_table(value, arguments[0], path, problems)
    if (
        origin is dict
        and isinstance(arguments[1], type)
        and (issubclass(arguments[1], Struct) or arguments[1] is DimRange)
    ):
        if not isinstance(value, dict):
            problems.append(_Problem(path, f"found {_show(value)}; a table was expected."))
            return None
        return {name: _decode(item, arguments[1], (*path, name), problems) for name, item in value.items()}
    if origin is tuple and isinstance(arguments[0], type) and issubclass(arguments[0], Struct):
        if not isinstance(value, list):
            table = ".".join(str(part) for part in path)
            problems.append(_Problem(path, f"found {_show(value)}; a list of tables was expected, [[{table}]]."))
            return None
        return tuple(_decode(item, arguments[0], (*path, index), problems) for index, item in enumerate(value))
    if origin is tuple and get_origin(arguments[0]) is Literal and isinstance(value, list):
        return tuple(_decode(item, arguments[0], path, problems) for item in value)
    if origin is tuple and get_origin(arguments[0]) is dict and isinstance(value, list):
        return tuple(_decode(item, arguments[0], (*path, index), problems) for index, item in enumerate(value))
    if kind is DimRange:
        return _decode_range(value, path, problems)
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        problems.append(_Problem(path, _explain(value, kind, str(exc))))
        return None
    if isinstance(converted, float) and not math.isfinite(converted):
        problems.append(_Problem(path, f"found {_show(value)}; a finite number was expected."))
        return None
    return converted


def _decode_range(value: Any, path: tuple[str | int, ...], problems: list[_Problem]) -> DimRange | None:
    keys = ("min", "opt", "max")
    if not isinstance(value, dict):
        problems.append(
            _Problem(path, f"found {_show(value)}; a range was expected, {{ min = 1, opt = 8, max = 64 }}.")
        )
        return None
    before = len(problems)
    problems.extend(_Problem((*path, key), f"unknown key; {suggest(key, keys)}") for key in value if key not in keys)
    sizes = {key: _decode(value[key], int, (*path, key), problems) for key in keys if key in value}
    problems.extend(_Problem(path, f"{key} is missing. Add it.") for key in keys if key not in value)
    return DimRange(**sizes) if len(problems) == before else None


def _decode_table(value: Any, kind: type[Struct], path: tuple[str | int, ...], problems: list[_Problem]) -> Any:
    if not isinstance(value, dict):
        problems.append(_Problem(path, f"found {_show(value)}; a table was expected."))
        return None
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    before = len(problems)
    problems.extend(
        _Problem((*path, key), f"unknown key; {suggest(key, sorted(fields))}") for key in value if key not in fields
    )
    decoded = {}
    for name, field in fields.items():
        if name in value:
            decoded[name] = _decode(value[name], field.type, (*path, name), problems)
        elif field.required:
            problems.append(_Problem((*path, name), "missing; it has no default. Add it."))
    return kind(**decoded) if len(problems) == before else None


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _explain(value: Any, kind: Any, message: str) -> str:
    """msgspec's complaint about one value in this project's wording."""
    choices = _choices(kind)
    if choices and isinstance(value, str):
        number = value.replace(".", "").isdigit()  # another number is no misspelling
        close = [] if number else difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"found {_show(value)}; expected one of {', '.join(choices)}.{hint}"
    found = re.search(r"\$(\[[^`]*|\.[^`]*)", message)
    where = f" at {found[1].lstrip('.')}" if found else ""
    expected = re.sub(r" - at .*$", "", message)
    expected = re.sub(r"Expected `([^`]*)`(, got `[^`]*`)?", lambda m: f"expected {_kind_name(m[1])}", expected)
    expected = expected.replace(f" matching regex {NAME_PATTERN!r}", " of letters, digits, '.', '_' or '-'")
    return f"found {_show(value)}{where}; {expected[:1].lower()}{expected[1:]}."


def _kind_name(name: str) -> str:
    words = {
        "str": "a string",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "array": "a list",
    }
    return " or ".join(words.get(part.strip(), part.strip()) for part in name.split("|") if part.strip() != "null")


def _choices(kind: Any) -> list[str]:
    if kind is Precision:
        return [precision.value for precision in Precision]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return []


# --- checks that span keys ------------------------------------------------------------------------------------------


def _check(recipe: Recipe) -> Iterator[_Problem]:
    yield from _check_inputs(recipe)
    yield from _check_axes(recipe)
    yield from _check_engines(recipe)
    yield from _check_tensorrt(recipe)
    yield from _check_gates(recipe)
    yield from _check_search(recipe)


def _check_inputs(recipe: Recipe) -> Iterator[_Problem]:
    if not recipe.model.inputs:
        yield _Problem(("model", "inputs"), "empty; a model has at least one input. Add [model.inputs.<name>].")
    source = recipe.model.source
    kind = source_kind(source)
    if kind is None:
        yield _Problem(
            ("model", "source"),
            f"found {source!r}; expected file.py, package.module:callable, hf:<directory or id>, file.pt2 or file.onnx.",
        )
    if recipe.model.weights is not None:
        suffix = Path(recipe.model.weights).suffix
        if kind not in ("file", "callable"):
            yield _Problem(("model", "weights"), f"not used with source {source!r}, which carries its own. Remove it.")
        elif suffix not in (".safetensors", ".pt", ".pth"):
            yield _Problem(
                ("model", "weights"), f"found {recipe.model.weights!r}; a .safetensors, .pt or .pth file was expected."
            )
    if kind not in ("file", None) and recipe.data.source is None:
        yield _Problem(
            ("data", "source"),
            "missing; the model's source has no calibration() and validation(). Name a Python file that has.",
        )
    elif recipe.data.source is not None and not recipe.data.source.endswith(".py"):
        yield _Problem(("data", "source"), f"found {recipe.data.source!r}; a Python file was expected.")


def _check_axes(recipe: Recipe) -> Iterator[_Problem]:
    used = {dim for section in recipe.model.inputs.values() for dim in section.shape if isinstance(dim, str)}
    for name, section in recipe.model.inputs.items():
        for dim in section.shape:
            if isinstance(dim, str) and dim not in recipe.axes:
                hint = f" Add [axes] {dim} = {{ min = 1, opt = 8, max = 64 }}." if dim.isidentifier() else ""
                problem = suggest(dim, list(recipe.axes)) if recipe.axes else "[axes] is empty."
                yield _Problem(("model", "inputs", name, "shape"), f"axis '{dim}' is not in [axes]; {problem}{hint}")
    for name, axis in recipe.axes.items():
        where = ("axes", name)
        if not name.isidentifier():
            yield _Problem(where, "not a name; letters, digits and '_' were expected.")
        if name not in used:
            yield _Problem(where, "no input has this axis. Remove it, or name it in a shape.")
        if axis.min < 1:
            yield _Problem(where, f"min is {axis.min}; at least 1 was expected.")
        elif axis.opt not in axis:
            yield _out_of_order(where, axis)
    batch = batch_axis(recipe.inputs)
    for size in recipe.latency.batches:
        axis_range = recipe.axes.get(batch) if batch else None
        if axis_range is None and size != 1:
            yield _Problem(
                ("latency", "batches"),
                f"batch {size} asked, but no input's first axis is dynamic. Use [1], or name the axis.",
            )
        elif axis_range is not None and size not in axis_range:
            yield _Problem(
                ("latency", "batches"), f"batch {size} is outside axis '{batch}', {axis_range.min} to {axis_range.max}."
            )


def _out_of_order(where: tuple[str | int, ...], span: DimRange) -> _Problem:
    return _Problem(where, f"min {span.min}, opt {span.opt}, max {span.max}; min <= opt <= max was expected.")


def _check_engines(recipe: Recipe) -> Iterator[_Problem]:
    if not recipe.engines:
        yield _Problem(("engines",), "empty; at least one [[engines]] was expected.")
    seen: dict[str, int] = {}
    for index, engine in enumerate(recipe.engines):
        if engine.label in seen:
            yield _Problem(("engines", index), f"a second engine named '{engine.label}'; give each its own name.")
        seen[engine.label] = index
        if engine.label in ("eager", "compile", "original", "control"):
            yield _Problem(
                ("engines", index, "name"), f"'{engine.label}' names a run of the original model. Choose another name."
            )
        if engine.precision is Precision.FP32 and engine.keep:
            yield _Problem(("engines", index, "keep"), "an FP32 engine keeps every layer in FP32 already. Remove it.")
        where = ("engines", index)
        if engine.precision not in QUANTIZED and engine.rest != "fp32":
            yield _Problem(
                (*where, "rest"),
                f"only an INT8, FP8 or INT4 engine has a rest; this one is {engine.precision.value}. Remove it.",
            )
        if engine.precision not in QUANTIZED and engine.weights_only:
            yield _Problem(
                (*where, "weights_only"),
                f"only an INT8, FP8 or INT4 engine has rounded weights; this one is {engine.precision.value}. Remove it.",
            )
        if engine.precision is not Precision.INT4 and engine.block != 32:
            yield _Problem(
                (*where, "block"),
                f"only an INT4 engine shares scales in blocks; this one is {engine.precision.value}. Remove it.",
            )


def _check_tensorrt(recipe: Recipe) -> Iterator[_Problem]:
    section = recipe.tensorrt
    if section.strip and not section.refit:
        yield _Problem(
            ("tensorrt", "strip"), "a plan without weights cannot run unless it can be refitted. Set refit too."
        )
    for index, profile in enumerate(section.profiles):
        where = ("tensorrt", "profiles", index)
        for name in recipe.axes:
            if name not in profile:
                yield _Problem(
                    where, f"axis '{name}' is missing; a profile gives a range for each axis of [axes]. Add it."
                )
        for name, span in profile.items():
            axis = recipe.axes.get(name)
            if axis is None:
                yield _Problem((*where, name), f"axis '{name}' is not in [axes]; {suggest(name, list(recipe.axes))}")
            elif span.opt not in span:
                yield _out_of_order((*where, name), span)
            elif span.min < axis.min or span.max > axis.max:
                yield _Problem(
                    (*where, name),
                    f"{span.min} to {span.max} is not inside the range of the axis in [axes], {axis.min} to {axis.max}.",
                )
    yield from _check_profiles_cover(recipe)
    if all(name in profile for profile in section.profiles for name in recipe.axes):
        yield from _check_profiles_take(recipe)
    if section != TensorRTSection() and all(engine.backend == "onnxruntime" for engine in recipe.engines):
        yield _Problem(
            ("tensorrt",), "no engine is built by TensorRT: each has backend = 'onnxruntime'. Remove the table."
        )
    if section.profiles and not recipe.axes:
        yield _Problem(("tensorrt", "profiles"), "the model has no dynamic axis for them to be about. Remove them.")
    for engine in recipe.engines:
        if engine.backend in ("auto", "onnxruntime"):
            continue
        oldest, kind = _capability(engine)
        for target in section.compute_capabilities:
            if _version(target) < _version(oldest):
                yield _Problem(
                    ("tensorrt", "compute_capabilities"),
                    f"{target} asked, but engine '{engine.label}' needs {oldest} or later for {kind}. Remove the target, or "
                    f"build engine '{engine.label}' in another recipe.",
                )


def _check_profiles_cover(recipe: Recipe) -> Iterator[_Problem]:
    """Together the profiles must reach both ends of every axis, or [axes] would promise what no engine takes."""
    profiles = recipe.tensorrt.profiles
    for name, axis in recipe.axes.items():
        spans = [profile[name] for profile in profiles if name in profile]
        if not spans or len(spans) < len(profiles):
            continue
        low, high = min(span.min for span in spans), max(span.max for span in spans)
        if low > axis.min or high < axis.max:
            yield _Problem(
                ("tensorrt", "profiles"),
                f"together they take axis '{name}' from {low} to {high}; [axes] says {axis.min} to {axis.max}. "
                "Widen a profile, or narrow the axis.",
            )


def _check_profiles_take(recipe: Recipe) -> Iterator[_Problem]:
    """What is most used must be inside one and the same profile: the optimum of every axis, and each batch that is timed."""
    profiles, batch = recipe.tensorrt.profiles, batch_axis(recipe.inputs)
    opt = {name: axis.opt for name, axis in recipe.axes.items()}
    points = [opt, *({**opt, batch: size} for size in recipe.batches if batch is not None)]
    for point in points if profiles else ():
        if not any(all(size in profile[name] for name, size in point.items()) for profile in profiles):
            sizes = ", ".join(f"{name} {size}" for name, size in point.items())
            yield _Problem(
                ("tensorrt", "profiles"), f"none takes {sizes}, which [axes] and [latency] say is used most. Widen one."
            )
            return


def _capability(engine: EngineSection) -> tuple[str, str]:
    """The oldest compute capability that an engine of TensorRT for RTX can be built for, and the type that needs it.

    Source: what the builder of 1.7.1 accepts and refuses, tried for each type and each target.
    """
    kinds = (engine.precision, Precision(engine.rest))
    newest = max(kinds, key=lambda kind: _version(OLDEST_CAPABILITY.get(kind, COMPUTE_CAPABILITIES[0])))
    return OLDEST_CAPABILITY.get(newest, COMPUTE_CAPABILITIES[0]), newest.value.upper()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _check_gates(recipe: Recipe) -> Iterator[_Problem]:
    names = [engine.label for engine in recipe.engines]
    for index, gate in enumerate(recipe.gates):
        where = ("gates", index)
        yield from _check_limits(gate, where)
        if gate.engine != "*" and not fnmatch.filter(names, gate.engine):
            yield _Problem((*where, "engine"), f"no engine is named '{gate.engine}'; {suggest(gate.engine, names)}")
        if gate.batch is not None and gate.metric not in SPEED_METRICS:
            yield _Problem((*where, "batch"), f"'{gate.metric}' does not depend on the batch size. Remove it.")
        if gate.batch is not None and gate.batch not in recipe.batches:
            timed = ", ".join(map(str, recipe.batches))
            yield _Problem(
                (*where, "batch"), f"batch {gate.batch} is not timed; expected one of {timed} (latency.batches)."
            )
        if gate.against != "original" and gate.metric not in ("speedup_p50", "size_ratio"):
            yield _Problem((*where, "against"), f"'{gate.metric}' is not a ratio. Remove it.")
        elif gate.against not in ("original", "eager", "compile", *names):
            yield _Problem(
                (*where, "against"),
                f"found '{gate.against}'; {suggest(gate.against, ['original', 'eager', 'compile', *names])}",
            )


def _check_limits(gate: GateSection, where: tuple[str | int, ...]) -> Iterator[_Problem]:
    limits = [key for key in ("max_drop", "min", "max") if getattr(gate, key) is not None]
    if len(limits) != 1:
        found = " and ".join(limits) if limits else "none"
        yield _Problem(where, f"found {found}; exactly one of max_drop, min, max was expected.")
    elif gate.metric in SPEED_METRICS | SIZE_METRICS and limits == ["max_drop"]:
        yield _Problem((*where, "max_drop"), f"'{gate.metric}' has no original to drop from; min or max was expected.")
    elif gate.metric in GENERIC_METRICS and limits == ["max_drop"]:
        yield _Problem(
            (*where, "max_drop"), f"'{gate.metric}' compares with the original already; min or max was expected."
        )


def _check_search(recipe: Recipe) -> Iterator[_Problem]:
    search = recipe.search
    if search is None:
        return
    labels = [engine.label for engine in recipe.engines if recipe.searched(engine)]
    if not labels:
        names = [engine.label for engine in recipe.engines if engine.precision in QUANTIZED]
        expected = suggest(search.engine, names) if names else "an int8, fp8 or int4 engine was expected."
        yield _Problem(("search", "engine"), f"'{search.engine}' is no quantised engine; {expected}")
    for index, limit in enumerate(search.budget):
        where = ("search", "budget", index)
        yield from _check_limits(limit, where)
        if limit.metric in SPEED_METRICS | SIZE_METRICS:
            yield _Problem(
                (*where, "metric"), f"'{limit.metric}' is no accuracy; the objective takes care of it. Name another."
            )
        for key in ("engine", "batch", "against"):
            if getattr(limit, key) != getattr(GateSection(metric=""), key):
                yield _Problem((*where, key), "has no meaning in a budget. Remove it.")
    for label in labels:
        if not search.budget_of(label, recipe.gates):
            yield _Problem(
                ("search", "budget"),
                f"engine '{label}' has no gate on accuracy, and there is no [[search.budget]]. Add either.",
            )


def source_kind(source: str) -> Literal["file", "callable", "hf", "pt2", "onnx"] | None:
    """What ``model.source`` names, by its form alone.

    >>> [source_kind(s) for s in ("m.py", "pkg.mod:make", "hf:bert", "m.pt2", "m.onnx", "m.txt")]
    ['file', 'callable', 'hf', 'pt2', 'onnx', None]
    """
    if source.startswith("hf:") and len(source) > 3:
        return "hf"
    suffix = Path(source).suffix
    by_suffix: dict[str, Literal["file", "pt2", "onnx"]] = {".py": "file", ".pt2": "pt2", ".onnx": "onnx"}
    if suffix in by_suffix:
        return by_suffix[suffix]
    module, _, attribute = source.partition(":")
    if attribute.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return "callable"
    return None


# --- where a key stands ---------------------------------------------------------------------------------------------

_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?")
_KEY = re.compile(r"^\s*((?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*=")


def _key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Line number of every table and key, by path. Runs on text that is known to be valid TOML.

    >>> _key_lines("a = 1\\n[t]\\nb.c = 2\\n[[e]]\\n[[e]]\\nk = 3\\n")[("e", 1, "k")]
    6
    """
    lines: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    multiline: str | None = None
    depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if multiline is None and depth == 0:
            if header := _TABLE.match(line):
                names = _split_key(header[2])
                table = ()
                for position, name in enumerate(names):
                    table = (*table, name)
                    last = position == len(names) - 1
                    if last and header[1] == "[[":
                        counts[table] = counts.get(table, -1) + 1
                    if table in counts:
                        lines.setdefault(table, number)
                        table = (*table, counts[table])
                lines.setdefault(table, number)
                continue
            if key := _KEY.match(line):
                path = table
                for name in _split_key(key[1]):
                    path = (*path, name)
                    lines.setdefault(path, number)
                line = line[key.end() :]
        multiline, depth = _scan_value(line, multiline, depth)
    return lines


def _split_key(key: str) -> list[str]:
    return [part.strip().strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[^.\s]+", key)]


def _scan_value(line: str, multiline: str | None, depth: int) -> tuple[str | None, int]:
    """Whether, after this line, a multi-line string or a bracket is still open."""
    position = 0
    while position < len(line):
        rest = line[position:]
        if multiline is not None:
            end = rest.find(multiline)
            if end < 0:
                return multiline, depth
            position += end + 3
            multiline = None
        elif rest.startswith(('"""', "'''")):
            multiline = rest[:3]
            position += 3
        elif string := re.match(r"\"(?:\\.|[^\"\\])*\"|'[^']*'", rest):
            position += string.end()
        elif rest[0] == "#":
            break
        else:
            depth += rest[0] in "[{"
            depth -= rest[0] in "]}"
            position += 1
    return multiline, depth


def _locate(
    path: Path, lines: Mapping[tuple[str | int, ...], int], overridden: set[tuple[str | int, ...]], problem: _Problem
) -> str:
    where = problem.path
    if any(where[: len(key)] == key for key in overridden):
        return f"--set {'.'.join(str(part) for part in where)}: {problem.text}"
    known = next((where[:size] for size in range(len(where), -1, -1) if where[:size] in lines), ())
    line = lines.get(known, 1)
    names: list[str] = []
    for part in where:
        if isinstance(part, int):
            names[-1] += f" #{part + 1}"
        else:
            names.append(part)
    key = "" if (where and isinstance(where[-1], int)) or not names else names.pop()
    table = f"[{'.'.join(names)}]" if names else ""
    return f"{path}:{line}: {' '.join(word for word in (table, key) if word)}: {problem.text}"


def dims(shape: Sequence[Dim]) -> str:
    """A shape as people write it: ``[batch, 1, 32, 32]``."""
    return "[" + ", ".join(str(dim) for dim in shape) + "]"
