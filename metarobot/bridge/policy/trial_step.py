"""Load a model and run one step of it in a process of its own, which has limits.

    python -P trial_step.py < policy.onnx

It prints ``ok``, or a line that says what went wrong, and exits. It is run by its path and imports
nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import resource
import sys

import numpy as np
import onnxruntime

MAX_ADDRESS_BYTES = 8 << 30
"""Address space, of which the libraries reserve most without using it."""
MAX_CPU_S = 60

ONNXRUNTIME_FATAL = 4
"""Log severity at which onnxruntime prints nothing: errors are raised."""
STRICT_SHAPES = ("session.strict_shape_type_inference", "1")
"""Setting of a session on which the bound on memory rests, see ``onnx_file_check``."""


def make_session(model: bytes) -> onnxruntime.InferenceSession:
    """Return a session on one CPU thread, which prints nothing and takes shapes as declared."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = ONNXRUNTIME_FATAL
    options.add_session_config_entry(*STRICT_SHAPES)
    return onnxruntime.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
        # else it prints an error and tries again
        enable_fallback=0,
    )


def error_line(error: BaseException) -> str:
    """Return an error of onnxruntime, which may hold anything of the model, as a short line."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(char if char.isprintable() and char.isascii() else "?" for char in text)


def main() -> None:
    """Run the model on standard input once, on zeros."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    try:
        session = make_session(sys.stdin.buffer.read())
        inputs = {node.name: np.zeros(node.shape, np.float32) for node in session.get_inputs()}
        session.run(None, inputs)
    except BaseException as e:  # onnxruntime's errors share no base class, and any is a refusal
        sys.stdout.write(error_line(e))
    else:
        sys.stdout.write("ok")


if __name__ == "__main__":
    main()
