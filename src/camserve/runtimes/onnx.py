"""Runs a network by ONNX Runtime, on the CPU, in float32.

The graph has any number of images, and as further outputs what the layer makes at each of its calls, so that one run
gives all that a Grad-CAM starts from. It is made of the module where it is loaded; graphs that others have made are in
`camserve.runtimes.onnx_network`.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from camserve.errors import Unsupported
from camserve.runtimes.recorded import Recorded, in_a_line, why_not_replayed
from camserve.saliency.layers import FoundLayer
from camserve.saliency.run import dtype_of

OPSET = 17
"""Version of ONNX's operators: the newest that has all of what PyTorch 2's exporter by tracing writes."""
INPUT, OUTPUTS = "images", "outputs"
SPIN_US = 20
"""Microseconds that a thread of ONNX Runtime spins before it sleeps."""

_exporting = threading.Lock()


class OnnxRuntime:
    """Runs a network by ONNX Runtime.

    Args:
        module: in eval mode, in float32 on the CPU; nothing is left on it.
        found: what is known of the layer whose raw output is wanted beside the outputs.
        images: (n, C, H, W), with which the network is traced.
        threads: threads that share an operation.

    Raises:
        Unsupported: the network has no such graph; the text says why.
    """

    name = "onnx"
    memory_format = torch.contiguous_format
    fixed = ""
    own_threads = True

    def __init__(self, module: nn.Module, found: FoundLayer, images: Tensor, threads: int) -> None:
        self.layer = found.layer.name
        graph = exported(module, found, images)
        self._raw = [f"raw{call}" for call in range(max(1, len(found.calls)))]
        self._session = session(graph, threads)

    def outputs(self, x: Tensor) -> Tensor:
        """Returns the outputs (n, numbers)."""
        return self._run([OUTPUTS], x)[0]

    def trunk(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the outputs (n, numbers), and the layer's raw output at each of its calls that count."""
        outputs, *raw = self._run([OUTPUTS, *self._raw], x)
        return outputs, raw

    def _run(self, names: Sequence[str], x: Tensor) -> list[Tensor]:
        images = x.detach().contiguous().numpy()
        try:
            found = self._session.run(names, {INPUT: images})
        except Exception as error:  # ONNX Runtime's own have no common class, and say in words that memory ran out
            raise RuntimeError(str(error)) from error
        return [torch.from_numpy(each) for each in found]


def version() -> str:
    """Returns the version of ONNX Runtime; empty where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return ""
    return str(onnxruntime.__version__)


def exported(module: nn.Module, found: FoundLayer, images: Tensor) -> bytes:
    """Returns the ONNX graph of a network: its outputs, and the layer's raw output at each of its calls that count.

    Args:
        module: in eval mode, in float32 on the CPU; nothing is left on it.
        found: what is known of the layer.
        images: (n, C, H, W), with which the network is traced.

    Raises:
        Unsupported: there is no graph that does what the network does.
    """
    if dtype_of(module) != torch.float32 or images.device.type != "cpu":
        raise Unsupported(f"the network computes in {dtype_of(module)} on {images.device}, not in float32 on a CPU")
    if reason := why_not_replayed(module, images):
        raise Unsupported(reason)
    raw = [f"raw{call}" for call in range(max(1, len(found.calls)))]
    names = [INPUT, OUTPUTS, *raw]
    file = io.BytesIO()
    try:
        with _exporting, _tracing(), torch.no_grad():
            torch.onnx.export(
                Recorded(module, found).eval(),  # the exporter gives a wrapper's mode to all that is inside
                (images,),
                file,  # type: ignore[arg-type]  # the stub knows paths only
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes={name: {0: "n"} for name in names},
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # any error may come of a forward that is traced
        raise Unsupported(f"the network has no ONNX graph: {in_a_line(error)}") from error
    return file.getvalue()


@contextmanager
def _tracing() -> Iterator[None]:
    """Keeps what PyTorch's exporter warns of to itself, and the fast path away, for which ONNX has no operators."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            # Sizes that are looked at become constants, which they are; the check afterwards tells whether all is well.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def session(graph: bytes, threads: int) -> Any:
    """Returns ONNX Runtime's session of a graph, on the CPU; it opens no file and loads no library.

    Args:
        graph: the graph.
        threads: threads that share an operation.

    Raises:
        Unsupported: ONNX Runtime is not installed, or cannot run it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise Unsupported("ONNX Runtime is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised as well
    # A thread that sleeps at once has to be woken for the next operation; one that spins for long takes the core from
    # whoever else wants it, and whole passes wait for that one.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between passes nobody spins
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Unsupported(f"ONNX Runtime cannot run the network's graph: {in_a_line(error)}") from error
