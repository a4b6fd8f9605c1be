"""The mathematics of the factored rule, once: the gradient over the RMS of its row and of its column, no momentum.

The second moment of Adafactor (Shazeer and Stern, arXiv 1804.04235, algorithm 4) in AdamW's place: for a matrix G of
n rows and k columns, with r and c running means of G^2 over its rows and its columns,

    r <- b2 r + (1 - b2) mean_j G_ij^2        r^ = r / (1 - b2^t), bias-corrected as in AdamW
    c <- b2 c + (1 - b2) mean_i G_ij^2        c^ = c / (1 - b2^t)
    a_i = 1 / (sqrt(r^_i) + eps)              b_j = 1 / max(sqrt(c^_j), eps)
    X_ij = a_i G_ij b_j                       U = sqrt(mean r^) X, shortened to an RMS of 1 if it is longer

So U's RMS is 1 at most, and about 1 as AdamW's is. Pure functions on fp32 tensors; this knows no parameter, device or
state layout. cpu_factored.py calls them, kernels/factored.py mirrors them.

Departures from the paper, each with its reason:
- b2 is AdamW's, with its bias correction, and the learning rate is absolute: as measured in benchmarks/learning.py;
- eps is added to a row's RMS instead of to G^2, so that rows whose gradient is nearly nothing (tokens of a tied table)
  hardly move;
- X falls apart into a row's, an element's and a column's factor. So ||X||^2 = sum_j b_j^2 S_j with
  S_j = sum_i a_i^2 G_ij^2, which can be summed in the pass that sums G^2, wherever one program sees whole rows.
"""

import math

import torch
from torch import Tensor


def follow(kept: Tensor, mean: Tensor, beta2: float) -> Tensor:
    """b2 kept + (1 - b2) mean: a new running mean; `kept` stays."""
    return kept.mul(beta2).add_(mean, alpha=1 - beta2)


def correction(beta2: float, t: int) -> float:
    """1 - b2^t: what a running mean is divided by; t counts steps, 1 for the first."""
    return 1 - beta2**t


def row_factors(rows: Tensor, corrected: float, eps: float) -> Tensor:
    """a of running means r [n]; `corrected` from `correction`."""
    return rows.div(corrected).sqrt_().add_(eps).reciprocal_()


def column_factors(cols: Tensor, corrected: float, eps: float) -> Tensor:
    """b of running means c [k]."""
    return cols.div(corrected).sqrt_().clamp_(min=eps).reciprocal_()


def squared_norm(columns: Tensor, weighted: Tensor) -> float:
    """||X||^2 of b [k] and S [k]."""
    return float(torch.dot(columns.double().square(), weighted.double()))


def matrix_factor(mean_square: float, x_squares: float, elements: int) -> float:
    """What X is multiplied with, U = factor X. mean_square: mean r^; x_squares: ||X||^2."""
    root = math.sqrt(mean_square)
    return root / max(1.0, root * math.sqrt(x_squares / elements))
