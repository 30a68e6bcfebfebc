"""Encoders on a CPU through OpenVINO, several times as fast as through PyTorch (docs/lab/results.md)."""

from __future__ import annotations

import queue
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from captioning.io import first_line, log

AGREEMENT = 1e-4  # largest relative difference of the features from PyTorch's


def openvino_form(encoder: nn.Module, size: int, streams: int) -> Callable[[np.ndarray], torch.Tensor] | None:
    """Compile an encoder for batches of any number of images; it takes about two seconds.

    In float32 throughout (OpenVINO's default is bf16 or float16 where the processor has them), and compared with
    PyTorch on one image. An image's features are the same, to the bit, whatever else is in its batch.

    The PyTorch front end is called by itself: `ov.convert_model` wraps it in code that sends usage data.

    Args:
        encoder: takes pixels (B, 3, size, size), gives (B, regions, C).
        streams: batches that are encoded at the same time, by as many threads of the caller.

    Returns:
        a function from uint8 (B, size, size, 3) to float (B, regions, C) that several threads may call, or None where
        OpenVINO is not installed or cannot run this network.
    """
    try:
        import openvino as ov
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
        from openvino.preprocess import PrePostProcessor
    except ImportError:
        return None
    blank = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    example = torch.from_numpy(blank).permute(0, 3, 1, 2)
    try:
        front_end = FrontEndManager().load_by_framework("pytorch")
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # PyTorch means to replace the tracing that OpenVINO builds on
            expected = encoder(example)  # (1, regions, C)
            traced = TorchScriptPythonDecoder(encoder, example_input=example, trace_kwargs={"check_trace": False})
            model = front_end.convert(front_end.load(traced))
        steps = PrePostProcessor(model)
        steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        steps.input().model().set_layout(ov.Layout("NCHW"))
        model = steps.build()
        model.reshape([-1, size, size, 3])
        options = {
            "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # threads that decode images, and other processes, use the same cores
        }  # fmt: skip
        compiled = ov.Core().compile_model(model, "CPU", options)
        idle: queue.SimpleQueue[Any] = queue.SimpleQueue()  # each request has memory of its own
        for _ in range(streams):
            idle.put(compiled.create_infer_request())

        def encode(pixels: np.ndarray) -> torch.Tensor:
            request = idle.get()
            try:
                request.infer([np.ascontiguousarray(pixels)])
                return torch.from_numpy(request.get_output_tensor(0).data.copy())
            finally:
                idle.put(request)

        difference = float((encode(blank) - expected).norm() / expected.norm().clamp(min=1e-12))
        if not difference <= AGREEMENT:  # nor for NaN
            raise RuntimeError(f"its features differ from PyTorch's by {difference:.1g}")
    except Exception as error:  # an operator without a counterpart, a processor without support: each raises its own
        log.warning(f"OpenVINO cannot run this encoder ({first_line(error)[:200]}); PyTorch does, more slowly")
        return None
    return encode
