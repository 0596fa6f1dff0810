"""The batched delta of LoRI: `add_delta`, and the operands and routes it works on.

Semantics, for each token t of a step:

    y[t] += sum over the terms (start <= t < stop) of weight * B_slot s[t]

accumulated in fp32 and rounded once to y's dtype (`stacked` also rounds weight * s). y: (T, D), changed in place, rows may be
strided. s: (T, A, R), A x of each basis, in y's dtype, rows may be strided. T tokens, D outputs, A bases, R rank.

`layout` defines the layout of B at run time, `operands` hold B for all slots of a module, a `route` maps tokens to slots. All
kernels have one signature: `reference` is a loop, `stacked` a matrix product in torch, `cpu` is C++, `gpu` is Triton.
"""

from lori.kernels.dispatch import KERNELS, add_delta, default_kernel
from lori.kernels.layout import Packed
from lori.kernels.operands import Operands
from lori.kernels.route import Route, Term, Weight

__all__ = ["KERNELS", "Operands", "Packed", "Route", "Term", "Weight", "add_delta", "default_kernel"]
