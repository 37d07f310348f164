"""Stage 3: graph passes that keep what a model computes, and the driver that checks that they do.

Why passes of our own beside onnxscript's and onnx_ir's: on onnx's backend suite and on random graphs several of theirs
change values, names or validity in corners (each module says which). What is sound there is used: onnx_ir's graph and
its inliner, onnx's inference of single operators and its reference implementation of them.
"""

from compiler.optimize.driver import optimize
from compiler.optimize.registry import PASSES

__all__ = ["PASSES", "optimize"]
