"""A network as a graph for other programs: torch.export's .pt2, ONNX, and ONNX in eight bits."""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.errors import ConfigError, ModelError

EXTRA = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "logits"
_PLACES = ("stack_trace", "from_node", "source_fn_stack")
"""What torch notes of each operation that would put this machine's paths into the file."""

Graph = Callable[[Tensor], Tensor]


def check_extra() -> None:
    """Refuse to make or read ONNX where its packages are missing.

    Raises:
        ConfigError: says which, and how to get them.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX needs packages that are not installed: {', '.join(missing)}",
            "they are an extra, which few need",
            "pip install 'ensemble-kd[onnx]'",
        )


def traced(module: nn.Module, example: Tensor) -> Any:
    """The `ExportedProgram` of a module in eval mode; its batch may be of any size.

    Raises:
        ModelError: torch.export cannot follow the module's code.
    """
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # it raises many kinds, some of them for what the module's own code does
        raise ModelError(
            f"{type(module).__name__} cannot be exported as a graph",
            f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
            "say --format safetensors; a module of your own must do the same for every batch",
        ) from error
    for part in program.graph_module.modules():
        for node in getattr(part, "graph", torch.fx.Graph()).nodes:
            for place in _PLACES:
                node.meta.pop(place, None)
    program._example_inputs = None  # they would be pickled into the file
    return program


def to_pt2(program: Any) -> bytes:
    """What `torch.export.load` reads: the same program gives the same bytes."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def to_onnx(program: Any) -> bytes:
    """One ONNX file from `images` (batch, …) to `logits` (batch, classes); the same program gives the same bytes.

    Raises:
        ModelError: an operation has no form in ONNX.
    """
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
    except Exception as error:
        raise ModelError(
            "the network has no form in ONNX",
            f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
            "say --format torch or safetensors",
        ) from error
    assert made is not None
    return _plain(made.model_proto)


def _plain(model: Any) -> bytes:
    """The bytes of a model without notes of where its operations came from, its batch called `batch`."""
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.value_info, *graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if symbol in dim.dim_param:
                dim.dim_param = dim.dim_param.replace(symbol, "batch")
    functions = [*model.functions]
    nodes = [*graph.node, *(node for function in functions for node in function.node)]
    for part in (model, graph, *functions, *nodes, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    return model.SerializeToString(deterministic=True)


def to_int8(model: bytes, calibration: Sequence[Tensor]) -> bytes:
    """The ONNX model with matrices and filters, and what enters them, in eight bits.

    Args:
        model: as `to_onnx` made it.
        calibration: batches of its input, from which the ranges of activations are taken.
    """
    import onnx

    places = sys.path[:]
    try:  # importing it puts a folder of onnxruntime's among them
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    finally:
        sys.path[:] = places

    class Reader(CalibrationDataReader):
        """Hands the batches out; onnxruntime asks for an object of this class."""

        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model)
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )
        return _plain(onnx.load(target))


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's and onnxruntime's advice to developers is not for who exports."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def onnx_graph(model: bytes | Path) -> Graph:
    """An ONNX model as onnxruntime runs it on the CPU.

    Raises:
        ConfigError: onnxruntime is missing.
        ModelError: it cannot read the model.
    """
    check_extra()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own family
        where = "the ONNX model" if isinstance(model, bytes) else str(model)
        why = (str(error).splitlines() or ["no message"])[0]
        raise ModelError(f"onnxruntime cannot read {where}", why, "export it again") from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


def pt2_graph(model: bytes) -> Graph:
    """A .pt2 as a function; of bytes that were made here alone, as torch reads them by pickle."""
    module = torch.export.load(io.BytesIO(model)).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return run
