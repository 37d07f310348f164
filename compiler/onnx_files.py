"""ONNX files: read without trust, written so that equal models are equal bytes, hashed with their external data.

Why not `onnx.load` alone: the checker lets external data with a NUL in its name or an unknown key through, and says ok
to local functions that expand to millions of nodes, on which every consumer of the file then hangs.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from compiler.durable import hash_of
from compiler.errors import ExportError, from_os_error
from compiler.spec import DimRange, OnnxModel, Precision, TensorSpec

EXTERNAL_ABOVE_BYTES = 1 << 28
"""Weights above this go to a file of their own. A protobuf message would hold 2 GiB, but is in memory several times over
wherever it is read or written; what lies in a file is mapped, and read when it is touched."""

MAX_EXPANDED_NODES = 1_000_000
"""Nodes that a model may have once its local functions are inlined."""

_MAX_DEPTH = 100
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})


def read(path: Path) -> ir.Model:
    """The model at ``path``; external data stay in their files, memory-mapped when touched.

    Raises:
        ExportError: the file is no ONNX model, the checker refuses it, external data lie outside its folder or are
            not what the model says, or its local functions expand to more than `MAX_EXPANDED_NODES` nodes.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[ir.Model, tuple[Path, ...]]:
    """As of `read`, and the files of external data."""
    try:
        onnx.checker.check_model(str(path))
        proto = _parse(path)
    except (onnx.checker.ValidationError, DecodeError, RuntimeError, OSError) as exc:
        raise ExportError(f"{path}: {_first_line(exc)}; a valid ONNX model was expected. Export it again.") from exc
    if proto.graph.sparse_initializer:
        # onnx_ir would leave them out in silence.
        raise ExportError(
            f"{path}: {len(proto.graph.sparse_initializer)} sparse initialisers; dense ones were expected. "
            "Export it again with dense weights."
        )
    for tensor in _tensors(proto):
        if _is_external(tensor):
            _check_external(path, tensor)
        else:
            _check_size(path, tensor)
    expanded = _expanded_nodes(path, proto)
    if expanded > MAX_EXPANDED_NODES:
        raise ExportError(
            f"{path}: its local functions expand to {expanded:,} nodes; at most {MAX_EXPANDED_NODES:,} were expected. "
            "Export it without nested functions."
        )
    try:
        model: ir.Model = ir.from_proto(proto)
    except (ir.serde.SerdeError, NotImplementedError, ValueError, TypeError) as exc:
        raise ExportError(f"{path}: {_first_line(exc)}; a valid ONNX model was expected. Export it again.") from exc
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model, _external_files(path, proto)


def _parse(path: Path) -> onnx.ModelProto:
    """The file, without a copy of it in memory beside what it becomes."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        proto: onnx.ModelProto = onnx.ModelProto.FromString(view)
        return proto


def write(model: ir.Model, path: Path, *, external_above: int = EXTERNAL_ABOVE_BYTES) -> tuple[str, tuple[Path, ...]]:
    """Write ``model``, its weights inside unless they exceed ``external_above`` bytes; the same model, the same bytes.

    The model in memory is left as it was. Returns the SHA-256 (see `sha256_of`) and the external files: none, or
    ``<name>.data`` beside the model.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    external = _write(model, path, external_above)
    files = external_files(path) if external else ()
    return sha256_of(path, files), files


def _write(model: ir.Model, path: Path, external_above: int) -> bool:
    """As of `write`; returns whether there are external data."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in values]
    data = path.with_name(path.name + ".data")
    external = sum(tensor.nbytes for tensor in tensors if tensor is not None) > external_above
    try:
        if external:
            ir.external_data.unload_from_model(model, path.parent, data.name, size_threshold_bytes=1023)
        else:
            for value, tensor in zip(values, tensors, strict=True):
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    except OSError as exc:
        raise from_os_error(exc, path) from exc
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
    return external


def write_graph(model: ir.Model, path: Path) -> Path | None:
    """Write ``model`` without the weights that lie in the files of another model already: they stay there.

    Returns their folder, for `compiler.spec.OpenModel`; None where there are none. All other weights are written inside.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    outside = [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]
    folders = {str(tensor.base_dir) for tensor in outside}
    if len(folders) != 1:
        _write(model, path, external_above=1 << 62)
        return None
    try:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    except OSError as exc:
        raise from_os_error(exc, path) from exc
    return Path(folders.pop())


def release(value: ir.Value) -> None:
    """Unmap a constant's external data until it is read again, so that it does not stay in memory."""
    if isinstance(value.const_value, ir.ExternalTensor):
        with suppress(BufferError):  # somebody still looks at it
            value.const_value.release()


def sha256_of(path: Path, external_data: Sequence[Path] = ()) -> str:
    """SHA-256 of the file, or, with external data, of the lines that ``sha256sum`` prints for it and for them."""
    files = (path, *external_data)
    return hash_of([(file.relative_to(path.parent).as_posix(), _file_sha256(file)) for file in files])


def external_files(path: Path) -> tuple[Path, ...]:
    """The files beside ``path`` that hold its tensors, sorted; whether they are safe to open is for `read` to say."""
    return _external_files(path, _parse(path))


def _external_files(path: Path, proto: onnx.ModelProto) -> tuple[Path, ...]:
    locations = {_external_entries(tensor).get("location", "") for tensor in _tensors(proto) if _is_external(tensor)}
    return tuple(path.parent / location for location in sorted(locations))


def specs(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs in the model's order. An input that an initialiser fills is none; an axis that has neither
    size nor name is ``"?"``.

    Raises:
        ExportError: an input or output is not a tensor, or its dtype or rank is unknown.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return (
        tuple(_spec(value, "input") for value in inputs),
        tuple(_spec(value, "output") for value in model.graph.outputs),
    )


def describe(
    path: Path,
    *,
    precision: Precision,
    axes: Mapping[str, DimRange],
    probe: Path | None = None,
    notes: Sequence[str] = (),
) -> OnnxModel:
    """The noun for the model at ``path``, read (and so checked) and hashed again.

    Raises:
        ExportError: see `read` and `specs`.
    """
    model, external = _read(path)
    inputs, outputs = specs(model)
    return OnnxModel(
        path=path,
        sha256=sha256_of(path, external),
        precision=precision,
        opset=model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)),
        inputs=inputs,
        outputs=outputs,
        axes=dict(axes),
        external_data=external,
        probe=probe,
        notes=tuple(notes),
    )


def _spec(value: ir.Value, kind: str) -> TensorSpec:
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        found = "has no known rank" if value.type is None or isinstance(value.type, ir.TensorType) else "is no tensor"
        raise ExportError(f"{kind} '{value.name}': {found}; a tensor of known dtype and rank was expected. Declare it.")
    shape = tuple(dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape)
    return TensorSpec(name=value.name or "", dtype=value.type.dtype.numpy().name, shape=shape)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(exc: Exception) -> str:
    text = str(exc).strip() or type(exc).__name__
    return text.splitlines()[0].rstrip(".")


# --- tensors --------------------------------------------------------------------------------------------------------


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the file, wherever it hides."""
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            yield from graph.initializer
            continue
        for attribute in nodes.pop().attribute:
            graphs += [attribute.g] if attribute.HasField("g") else []
            graphs += attribute.graphs
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (part for part in (sparse.values, sparse.indices) if part.data_type)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _check_size(path: Path, tensor: onnx.TensorProto) -> None:
    """Refuse a tensor that holds more numbers than its shape says; the checker refuses those that hold fewer."""
    dtype = ir.DataType(tensor.data_type)
    elements = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        unit, found, needed = "bytes", len(tensor.raw_data), (elements * dtype.bitwidth + 7) // 8
    else:
        parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        packed = 1 if dtype == ir.DataType.STRING or dtype.bitwidth >= 8 else 8 // dtype.bitwidth
        unit, found = "numbers", len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
        needed = -(-elements * parts // packed)
    if found != needed:
        raise ExportError(
            f"{path}: tensor '{tensor.name}': {found} {unit} for the shape {list(tensor.dims)}; "
            f"{needed} were expected. Export it again."
        )


def _external_entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    """Refuse what the checker lets pass: see `read`."""
    entries = _external_entries(tensor)
    where = f"{path}: tensor '{tensor.name}'"

    def refuse(found: str) -> ExportError:
        return ExportError(f"{where}: {found}; a plain file in the model's own folder was expected. Export it again.")

    location = entries.get("location", "")
    if unknown := sorted(entries.keys() - _EXTERNAL_KEYS):
        raise refuse(f"external data with an unknown key {unknown[0]!r}")
    if not location or not location.isprintable():
        raise refuse(f"external data at {location!r}")
    folder = path.parent.resolve()
    file = folder / location
    if Path(location).is_absolute() or ".." in Path(location).parts or file.resolve() != file:
        raise refuse(f"external data at {location!r}, which leaves the folder or is a link")
    if not file.is_file() or file.stat().st_nlink != 1:
        raise refuse(f"external data at {location!r}, which is missing or has more than one name")
    numbers = [entries.get("offset", "0"), entries.get("length", "0")]
    if not all(number.isdecimal() and len(number) < 16 for number in numbers):
        raise refuse(f"external data with offset {numbers[0][:20]!r} and length {numbers[1][:20]!r}")
    needed = (math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth + 7) // 8
    offset, length = int(numbers[0]), int(entries.get("length", needed))
    if length != needed or offset + length > file.stat().st_size:
        raise refuse(
            f"{needed} bytes at offset {offset} of {location!r}, which has {file.stat().st_size}, with length {length}"
        )


# --- local functions ------------------------------------------------------------------------------------------------


def _expanded_nodes(path: Path, proto: onnx.ModelProto) -> int:
    """How many nodes the model has after every local function is inlined; counted, not expanded."""
    functions = {(function.domain, function.name, function.overload): function for function in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def count(nodes: Sequence[onnx.NodeProto], depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ExportError(
                f"{path}: functions and subgraphs are nested more than {_MAX_DEPTH} deep; fewer were expected. "
                "Export it without nested functions."
            )
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in functions:
                if key not in sizes:
                    sizes[key] = count(functions[key].node, depth + 1)
                total += sizes[key]
            else:
                total += 1
            for attribute in node.attribute:
                graphs = [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
                total += sum(count(graph.node, depth + 1) for graph in graphs)
        return total

    return count(proto.graph.node, 0)


class FreeNames:
    """Names that nothing in a model has: no value, node or weight, in no graph of it."""

    def __init__(self, main: ir.Graph) -> None:
        self._taken: set[str | None] = set()
        for graph in (main, *main.subgraphs()):
            self._taken.update(value.name for value in graph.inputs)
            self._taken.update(graph.initializers)
            self._taken.update(name for node in graph for name in (node.name, *(o.name for o in node.outputs)))

    def free(self, name: str) -> str:
        """``name``, or ``name_2``, ``name_3``, ... where it is taken; taken from now on."""
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}_{count}"
        self._taken.add(found)
        return found
