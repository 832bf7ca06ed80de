"""The tests of nanoad.

Run them with `python -m pytest`; `-m "not slow"` leaves out what takes more than a few seconds.
First the engine (operations, transforms, the tape), then modules and optimizers, then wrong calls,
then the file itself; after that loaders and saving, and last the training scripts.

Nothing here asks how the engine works inside, with one exception: the tables of NumPy functions
(`_UFUNCS`, `_FUNCTIONS`, `_WITHOUT_GRADIENT`) are read, so that none can be added without a test.
"""

import builtins
import copy
import doctest
import gc
import inspect
import itertools
import math
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest

import nanoad
from nanoad import (
    Tensor, as_tensor, check_grad, checkpoint, grad, gradients, hessian, hvp, jacobian, jvp, manual_seed,
    no_grad, value_and_grad, vjp,
)

F, nn = nanoad.functional, nanoad.nn
ROOT = pathlib.Path(nanoad.__file__).resolve().parent
SHARED = ROOT.parent / "shared"


def as_array(x):
    return x.numpy() if isinstance(x, Tensor) else np.asarray(x)


def close(a, b, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(as_array(a), as_array(b), rtol=rtol, atol=atol)


# ## Every operation, to third order
#
# One table. `A` draws an array; every case is a function and the arrays it is differentiated by.
# Integers, masks and the like are not differentiated by, so a lambda closes over them.

_draw = np.random.default_rng(7)


def A(*shape, low=-1.5, high=1.5):
    return _draw.uniform(low, high, shape)


def views(low=-1.5, high=1.5):
    """Arrays of all kinds of layout: 0-d, size 1, empty, contiguous, transposed, reversed, strided, broadcast."""
    return [A(low=low, high=high), A(1, low=low, high=high), A(0, 2, low=low, high=high), A(4, low=low, high=high),
            A(3, 2, low=low, high=high).T, A(5, low=low, high=high)[::-2], A(2, 3, 2, low=low, high=high)[:, ::2, 1],
            A(2, 1, low=low, high=high)[:, ::-1]]


def unary(f, **limits):
    return [(f, x) for x in views(**limits)]


def binary(f, first={}, second={}):
    """Broadcasting both ways, size 1, empty, strided."""
    shapes = [((), ()), ((3,), (3,)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), (2, 2)), ((1, 3), (2, 1, 1)),
              ((0, 2), (2,)), ((1,), (0,))]
    cases = [(f, A(*a, **first), A(*b, **second)) for a, b in shapes]
    return cases + [(f, A(4, **first)[::-2], A(2, 2, **second).T), (f, A(3, 2, **first).T, A(6, **second)[::-2])]


def over_axes(f):
    return [(f, A()), (f, A(2, 3)), (lambda x: f(x, axis=0), A(3, 2).T), (lambda x: f(x, axis=-1), A(2, 2, 2)[:, ::-1]),
            (lambda x: f(x, axis=(0, 2)), A(2, 1, 3)), (lambda x: f(x, axis=1, keepdims=True), A(2, 3)),
            (lambda x: f(x, axis=(), keepdims=False), A(3))]


POSITIVE, AWAY = dict(low=0.4, high=2.0), dict(low=1.6, high=3.0)  # AWAY: beyond all that `A(...)` draws
MASK = np.array([[True, False, True], [False, False, True]])
TARGETS = np.array([2, 0, 1])


def norm_arguments(shape, channels):
    return A(*shape), A(channels, **POSITIVE), A(channels)


def batch_norm(x, weight, bias, training):
    mean, variance = np.linspace(-1, 1, len(weight)), np.linspace(0.5, 2, len(weight))
    return F.batch_norm(x, mean, variance, weight, bias, training=training)


def dropped(x):
    manual_seed(5)
    return F.dropout(x, 0.4)


OPERATIONS = {
    "add": binary(F.add),
    "sub": binary(F.sub),
    "mul": binary(F.mul),
    "div": binary(F.div, second=POSITIVE) + [(lambda b: 2.0 / b, A(3, low=-2, high=-1))],
    "neg": unary(F.neg),
    "power": binary(F.power, first=POSITIVE)
             + [(lambda x, p=p: x ** p, A(4, **POSITIVE)) for p in (0, 1, 2, 3, 0.5, -1, 2.5, -2)]
             + [(lambda x, p=p: x ** p, A(4)) for p in (1, 2, 3, 4, np.array([1, 2, 3, 4], np.float32))]
             + [(lambda p: 2.0 ** p, A(3))],
    "exp": unary(F.exp), "expm1": unary(F.expm1),
    "log": unary(F.log, **POSITIVE), "log1p": unary(F.log1p, low=-0.5, high=1.5),
    "sqrt": unary(F.sqrt, **POSITIVE),
    "abs": unary(F.abs),
    "sin": unary(F.sin), "cos": unary(F.cos), "tanh": unary(F.tanh),
    "sigmoid": unary(F.sigmoid), "softplus": unary(F.softplus),
    "relu": unary(F.relu), "gelu": unary(F.gelu),
    "maximum": binary(F.maximum), "minimum": binary(F.minimum),
    "where": binary(lambda a, b: F.where(np.arange(math.prod(np.broadcast_shapes(a.shape, b.shape))).reshape(
        np.broadcast_shapes(a.shape, b.shape)) % 3 == 0, a, b)) + [
        (lambda a: F.where(MASK, a, 0.0), A(3)), (lambda b: F.where(MASK[0], 2.0, b), A(2, 1)),
        (lambda a, b: F.where(True, a, b), A(2), A(2))],
    "clip": unary(lambda x: F.clip(x, -0.7, 0.8)) + [(lambda x: F.clip(x, low=0.1), A(3)), (lambda x: F.clip(x, None, 0.1), A(3)),
                                                    (lambda x: F.clip(x, np.array([-1, 0], np.float32), 1.0), A(3, 2))],
    "astype": unary(lambda x: F.astype(x, np.float64)),
    "identity": unary(F.identity),
    "reshape": [(lambda x: F.reshape(x, 2, -1), A(3, 2).T), (lambda x: F.reshape(x, (6,)), A(2, 3)), (lambda x: F.reshape(x, ()), A(1)),
                (lambda x: F.reshape(x, 0, 5), A(0, 2)), (lambda x: F.reshape(x, -1), A())],
    "transpose": [(F.transpose, A(2, 3)), (F.transpose, A()), (lambda x: F.transpose(x, 2, 0, 1), A(2, 3, 1)),
                  (lambda x: F.transpose(x, (0, -1, 1)), A(2, 3, 0)), (F.transpose, A(3))],
    "swapaxes": [(lambda x: F.swapaxes(x, 0, -1), A(2, 3, 1)), (lambda x: F.swapaxes(x, 1, 0), A(2, 0))],
    "moveaxis": [(lambda x: F.moveaxis(x, 0, -1), A(2, 3, 1)), (lambda x: F.moveaxis(x, (0, 1), (2, 0)), A(2, 3, 2))],
    "expand_dims": [(lambda x: F.expand_dims(x, 1), A(3)), (lambda x: F.expand_dims(x, (0, -1)), A(2, 2)), (lambda x: F.expand_dims(x, 0), A())],
    "squeeze": [(F.squeeze, A(1, 3, 1)), (lambda x: F.squeeze(x, -1), A(1, 3, 1)), (lambda x: F.squeeze(x, (0, 2)), A(1, 2, 1)), (F.squeeze, A())],
    "broadcast_to": [(lambda x: F.broadcast_to(x, (2, 3)), A(3)), (lambda x: F.broadcast_to(x, (2, 2)), A()),
                     (lambda x: F.broadcast_to(x, (3, 2, 2)), A(2, 1)), (lambda x: F.broadcast_to(x, (0, 3)), A(1, 3))],
    "concatenate": [(lambda a, b: F.concatenate([a, b]), A(2, 3), A(1, 3)), (lambda a, b: F.concatenate([a, b, a], axis=-1), A(2, 1), A(2, 0)),
                    (lambda a, b: F.concatenate([a, b], axis=1), A(3, 2).T, A(2, 4)[:, ::-2]), (lambda a: F.concatenate([a, np.ones(2, np.float32)]), A(2)),
                    (lambda a, b: F.concatenate((a, b), axis=None), A(2, 2), A(3))],
    "stack": [(lambda a, b: F.stack([a, b]), A(2, 2), A(2, 2).T), (lambda a, b: F.stack([a, b, a], axis=-1), A(3), A(3)),
              (lambda a: F.stack([a, a]), A()), (lambda a, b: F.stack([a, b], axis=1), A(2, 0), A(2, 0))],
    "split": [(lambda x: F.split(x, 2)[1] * 2 + F.split(x, 2)[0], A(4)), (lambda x: F.split(x, [1, 3], axis=1)[1], A(2, 4)),
              (lambda x: F.split(x, 3, axis=-1)[2] * F.split(x, 3, axis=-1)[0], A(2, 6))],
    "pad": [(lambda x: F.pad(x, 1), A(2, 2)), (lambda x: F.pad(x, (0, 2)), A(3)[::-1]), (lambda x: F.pad(x, ((1, 0), (0, 2))), A(0, 2)),
            (lambda x: F.pad(x, ((0, 0), (1, 1))), A(3, 2).T)],
    "getitem": [(lambda x, i=i: F.getitem(x, i), x) for x, i in [
        (A(3), 1), (A(3), -1), (A(3), slice(None, None, -2)), (A(2, 3), (slice(None), 1)), (A(2, 3), (Ellipsis, None, 0)),
        (A(2, 3), [0, 0, 1]), (A(2, 3), np.array([[1, 1], [0, -1]])), (A(2, 3), (np.array([0, 1, 1]), np.array([2, 0, 0]))),
        (A(2, 3), MASK), (A(3, 2).T, MASK), (A(3), np.array([False, True, True])), (A(2, 3), (slice(None), [0, 0])),
        (A(2, 3, 2), (0, slice(None), [1, 1])), (A(2, 3, 2), ([0, 1], slice(None, None, 2), [1, 0])), (A(2, 3), np.array([], int)),
        (A(2, 3), (np.array([1, 0])[:, None], np.array([0, 0, 2]))), (A(), ()), (A(), None), (A(3), np.int64(2)), (A(3), True)]],
    "scatter_add": [(lambda x, i=i, s=s: F.scatter_add(x, i, s), x) for x, i, s in [
        (A(3), np.array([0, 2, 0]), (4,)), (A(2, 2), (slice(None), [1, 1]), (2, 3)), (A(2), slice(1, 3), (4,)), (A(3), MASK, (2, 3)),
        (A(), 1, (3,)), (A(0), np.array([], int), (2,))]],
    "embedding": [(lambda w, i=i: F.embedding(np.array(i, int), w), A(4, 2)) for i in ([0, 3, 0], [[1, 1], [2, 0]], 2, [])],
    "sum": over_axes(F.sum) + [(F.sum, A(0, 2)), (lambda x: F.sum(x, axis=0), A(0, 2))],
    "mean": over_axes(F.mean), "var": over_axes(F.var)[:-1] + [(lambda x: F.var(x, ddof=1), A(4)), (lambda x: F.var(x, 0, 1, True), A(3, 2))],
    "std": [(F.std, A(4)), (lambda x: F.std(x, axis=1, ddof=1), A(2, 3)), (lambda x: F.std(x, 0, keepdims=True), A(3, 2))],
    "max": over_axes(F.max), "min": over_axes(F.min),
    "logsumexp": over_axes(F.logsumexp)[:-1],
    "softmax": [(F.softmax, A(2, 3)), (lambda x: F.softmax(x, axis=0), A(3, 2).T), (F.softmax, A(1)), (F.softmax, A(0, 2)), (F.softmax, A(4)[::-2])],
    "log_softmax": [(F.log_softmax, A(2, 3)), (lambda x: F.log_softmax(x, axis=0), A(3, 2).T), (F.log_softmax, A(1)), (F.log_softmax, A(0, 2))],
    "matmul": [(F.matmul, A(*a), A(*b)) for a, b in [
        ((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 2)), ((2, 2, 3), (3, 2)), ((2, 3), (2, 3, 2)), ((2, 1, 2, 1), (3, 1, 2)),
        ((2,), (2, 2, 1)), ((2, 1, 2), (2,)), ((0, 2), (2, 3)), ((2, 0), (0, 2)), ((1, 1), (1, 1))]]
              + [(F.matmul, A(3, 2).T, A(3, 4)[:, ::-2]), (lambda a: a @ a.T, A(2, 3))],
    "bmm": [(F.bmm, A(2, 2, 3), A(2, 3, 1)), (F.bmm, A(2, 3, 2).swapaxes(1, 2), A(2, 3, 2)[::-1])],
    "einsum": [(lambda *xs, s=s: F.einsum(s, *xs), *map(lambda shape: A(*shape), shapes)) for s, *shapes in [
        ("ij,jk->ik", (2, 3), (3, 2)), ("ij,jk", (2, 3), (3, 2)), ("i,i", (3,), (3,)), ("ii", (2, 2)), ("ii->i", (3, 3)), ("iji->j", (2, 3, 2)),
        ("ij->", (2, 3)), ("ij->j", (2, 3)), ("ij->ji", (2, 3)), ("i,j->ij", (2,), (3,)), ("bij,bjk->bik", (2, 2, 1), (2, 1, 2)),
        ("...ij,...jk->...ik", (2, 1, 2), (2, 2)), ("...i->...", (2, 3)), ("i...,i...", (2, 3), (2, 1)), ("ij,j,i->", (2, 3), (3,), (2,)),
        ("ij,kl->i", (2, 2), (2, 1)), ("ii,i->", (2, 2), (2,)), ("...,...->...", (2, 1), (3,)), (" i j , j -> i ", (2, 3), (3,)), ("iii->i", (2, 2, 2))]],
    "linear": [(F.linear, A(2, 3), A(2, 3), A(2)), (F.linear, A(3), A(2, 3), A(2)), (F.linear, A(2, 1, 3), A(3, 2).T), (F.linear, A(0, 2), A(1, 2), A(1))],
    "conv2d": [(F.conv2d, A(2, 1, 3, 3), A(2, 1, 2, 2), A(2)), (lambda x, w: F.conv2d(x, w, stride=2, padding=1), A(1, 2, 3, 3), A(1, 2, 2, 2)),
               (lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=(0, 1)), A(1, 1, 4, 2), A(1, 1, 3, 2), A(1)),
               (F.conv2d, A(1, 2, 2, 3).swapaxes(2, 3), A(2, 2, 1, 1)), (F.conv2d, A(0, 1, 2, 2), A(1, 1, 2, 2), A(1))],
    "max_pool2d": [(lambda x: F.max_pool2d(x, 2), A(1, 2, 4, 3)), (lambda x: F.max_pool2d(x, 2, 1), A(2, 1, 3, 3)[:, :, ::-1]),
                   (lambda x: F.max_pool2d(x, (1, 2), (2, 1)), A(1, 1, 3, 3)), (lambda x: F.max_pool2d(x, 1), A(0, 1, 2, 2))],
    "avg_pool2d": [(lambda x: F.avg_pool2d(x, 2), A(1, 2, 4, 3)), (lambda x: F.avg_pool2d(x, 2, 1), A(2, 1, 3, 3)[:, :, ::-1]),
                   (lambda x: F.avg_pool2d(x, (1, 2), (2, 1)), A(1, 1, 3, 3))],
    "batch_norm": [(lambda *a, t=t: batch_norm(*a, training=t), *norm_arguments(s, s[1]))
                   for t in (True, False) for s in ((4, 2), (2, 2, 1, 2), (3, 1, 1, 1))],
    "layer_norm": [(F.layer_norm, *norm_arguments((2, 3), 3)), (F.layer_norm, *norm_arguments((2, 3), 3)[:2]), (F.layer_norm, *norm_arguments((4,), 4)),
                   (F.layer_norm, A(3, 2).T, A(3), A(3)), (F.layer_norm, *norm_arguments((0, 2), 2))],
    "scaled_dot_product_attention": [
        (lambda q, k, v, c=c: F.scaled_dot_product_attention(q, k, v, is_causal=c), A(*q), A(*k), A(*v))
        for c in (False, True) for q, k, v in [((2, 2), (2, 2), (2, 2)), ((1, 2, 2, 1), (1, 2, 3, 1), (1, 2, 3, 2)), ((2, 3, 1), (2, 3, 1), (2, 3, 2))]],
    "causal_self_attention": [(lambda x: F.causal_self_attention(x, 2), A(1, 2, 12)), (lambda x: F.causal_self_attention(x, 1), A(2, 3, 3))],
    "dropout": [(dropped, A(6)), (lambda x: F.dropout(x, 0.5, training=False), A(2, 2))],
    "cross_entropy": [(lambda x: F.cross_entropy(x, TARGETS), A(3, 4)), (lambda x: F.cross_entropy(x, TARGETS[:1]), A(1, 3)),
                      (lambda x: F.cross_entropy(x, TARGETS), A(3, 3).T)],
    "mse_loss": [(F.mse_loss, A(3), A(3)), (F.mse_loss, A(), A()), (lambda x: F.mse_loss(x, [[1, 0]]), A(1, 2))],
    "binary_cross_entropy": [(F.binary_cross_entropy, A(3, low=0.2, high=0.8), A(3, low=0.1, high=0.9)),
                             (lambda p: F.binary_cross_entropy(p, [[0, 1]]), A(1, 2, low=0.2, high=0.8))],
    "binary_cross_entropy_with_logits": [(F.binary_cross_entropy_with_logits, A(3), A(3, low=0.1, high=0.9)),
                                         (lambda x: F.binary_cross_entropy_with_logits(x, [1, 0]), A(2))],
    "hinge_loss": [(lambda x: F.hinge_loss(x, [1, -1, 1]), A(3)), (lambda x: F.hinge_loss(x, [[-1, 1]]), A(1, 2))],
}
for_every_operation = pytest.mark.parametrize("cases", OPERATIONS.values(), ids=OPERATIONS)
NOT_OPERATIONS = {"grad", "value_and_grad", "vjp", "jvp", "hvp", "jacobian", "hessian", "gradients", "checkpoint", "check_grad"}


def test_every_operation_of_the_functional_namespace_is_in_the_table():
    assert set(OPERATIONS) == set(F.__all__) - NOT_OPERATIONS


def weights_of(f, args):
    """Random weights that make a scalar of f's result, so that no two of its elements can cancel."""
    return np.random.default_rng(3).uniform(0.5, 1.5, f(*map(as_tensor, args)).shape)


@for_every_operation
def test_first_derivative_is_that_of_central_differences(cases):
    """By `backward`, and by differences of our own: nothing of nanoad's transforms is used here."""
    h = 1e-5
    for f, *args in cases:
        weights, inputs = weights_of(f, args), [Tensor(a) for a in args]
        out = f(*inputs)
        assert out.shape == weights.shape and out.dtype == np.float64
        out.backward(weights)
        for k, x in enumerate(inputs):
            assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
            for index in np.ndindex(x.shape):
                at = [[np.array(a) for a in args] for _ in range(2)]
                at[0][k][index] += h
                at[1][k][index] -= h
                plus, minus = (float(np.sum(f(*map(as_tensor, a)).numpy() * weights)) for a in at)
                numeric, analytic = (plus - minus) / (2 * h), x.grad.numpy()[index]
                assert abs(numeric - analytic) <= 1e-6 * max(1, abs(analytic)), (args, k, index)


@for_every_operation
def test_second_and_third_derivatives_are_those_of_central_differences(cases):
    for f, *args in cases:
        assert check_grad(f, *args, order=3) < 1e-5, args


@for_every_operation
def test_hessians_are_symmetric_and_jvp_is_the_transpose_of_vjp(cases):
    rng = np.random.default_rng(4)
    for f, *args in cases:
        weights = weights_of(f, args)
        blocks = hessian(lambda *a: (f(*a) * weights).sum(), argnums=tuple(range(len(args))))(*args)
        for i, j in itertools.product(range(len(args)), repeat=2):
            assert blocks[i][j].shape == (args[i].size, args[j].size)
            close(blocks[i][j], blocks[j][i].numpy().T, rtol=1e-10, atol=1e-10)
        tangents, cotangent = [rng.standard_normal(a.shape) for a in args], rng.standard_normal(weights.shape)
        pushed, pulled = jvp(f, args, tangents)[1], vjp(f, *args)[1](cotangent)
        left = np.sum(cotangent * pushed.numpy())
        right = sum(np.sum(t * p.numpy()) for t, p in zip(tangents, pulled))
        assert abs(left - right) <= 1e-10 * max(1, abs(left)), args


@for_every_operation
def test_float32_stays_float32_forward_and_backward(cases):
    for f, *args in cases:
        single = [Tensor(np.asarray(a, np.float32)) for a in args]
        double = [Tensor(x.numpy().astype(np.float64)) for x in single]
        out = f(*single)
        assert out.dtype == np.float32 or cases is OPERATIONS["astype"]
        slopes, exact = (gradients(f(*xs), xs, np.ones(out.shape)) for xs in (single, double))
        for x, slope, e in zip(single, slopes, exact):
            assert (slope.dtype, slope.shape) == (x.dtype, x.shape)
            close(slope, e, rtol=2e-4, atol=2e-4)


def test_check_grad_finds_wrong_rules_and_says_where():
    @nanoad.primitive(lambda g, y, x: g * 2 * x)
    def cube(x):
        return x * x * x

    @nanoad.primitive(lambda g, y, x: g * np.cos(x.numpy() if isinstance(x, Tensor) else x))
    def sine(x):
        return np.sin(x)

    with pytest.raises(AssertionError, match=r"argument 0 at index \(2,\).*numeric \d+\.\d+.*analytic \d+\.\d+"):
        check_grad(cube, np.array([2 / 3, 1.0, 2.0, 1.5]))  # right by chance, wrong, worst, bad
    check_grad(sine, np.array([1.0]), order=1)  # right so far, but the rule forgets the tape
    with pytest.raises(AssertionError, match="numeric"):
        check_grad(sine, np.array([1.0]), order=2)
    with pytest.raises(AssertionError, match="argument 1"):
        check_grad(lambda a, b: a * Tensor(b.numpy() ** 2, requires_grad=False), np.ones(2), np.array([1.0, 3.0]))
    with pytest.raises(AssertionError, match="nan"):
        check_grad(lambda x: x * np.nan, np.ones(1))


# ## Fused operations and their definitions

FUSED = {
    "gelu": [((A(2, 3),), {}), ((A(),), {})],
    "softmax": [((A(2, 3),), {}), ((A(2, 3),), dict(axis=0))],
    "log_softmax": [((A(2, 3),), {}), ((A(2, 3),), dict(axis=0))],
    "linear": [((A(2, 2, 3), A(4, 3), A(4)), {}), ((A(3), A(4, 3)), {})],
    "conv2d": [((A(2, 3, 5, 6), A(4, 3, 3, 2), A(4)), dict(stride=s, padding=p)) for s in (1, 2, (1, 3)) for p in (0, 1, (2, 0))],
    "max_pool2d": [((A(2, 2, 5, 6),), dict(kernel_size=k, stride=s)) for k, s in ((2, None), (3, 1), ((1, 2), 2), (2, 3))],
    "avg_pool2d": [((A(2, 2, 5, 6),), dict(kernel_size=k, stride=s)) for k, s in ((2, None), (3, 1), ((1, 2), 2), (2, 3))],
    "layer_norm": [(norm_arguments((2, 3, 5), 5), {}), ((A(4, 5), A(5)), dict(eps=0.1))],
    "_batch_norm": [(norm_arguments(s, 3), dict(eps=1e-3)) for s in ((4, 3), (2, 3, 2, 4))],
    "scaled_dot_product_attention": [((A(2, 4, 3), A(2, 5, 3), A(2, 5, 2)), dict(is_causal=c)) for c in (False, True)],
    "causal_self_attention": [((A(2, 5, 12),), dict(num_heads=h)) for h in (1, 2)],
    "embedding": [((np.array([[0, 2, 2], [1, 0, 0]]), A(4, 3)), {}), ((np.array([7, 7, 2000]), A(2001, 2)), {})],
    "cross_entropy": [((A(3, 5), TARGETS), {})],
}


def test_every_fused_operation_is_compared():
    assert set(FUSED) == {op.__name__ for op in vars(nanoad).values() if callable(getattr(op, "definition", None))}


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-9), (np.float32, 1e-3)])
@pytest.mark.parametrize("name, args, params", [pytest.param(n, a, p, id=f"{n}-{i}") for n, c in FUSED.items() for i, (a, p) in enumerate(c)])
def test_fused_operations_equal_their_definitions(name, args, params, dtype, rtol):
    op = next(v for v in vars(nanoad).values() if getattr(v, "__name__", "") == name and hasattr(v, "definition"))
    args = [a.astype(dtype) if a.dtype.kind == "f" else a for a in args]
    results = []
    for f in (op, op.definition):
        inputs = [Tensor(a) if a.dtype.kind == "f" else a for a in args]
        tracked = [x for x in inputs if isinstance(x, Tensor)]
        out = f(*inputs, **params)
        rng = np.random.default_rng(1)
        seed = rng.standard_normal(out.shape).astype(dtype)
        plain = gradients(out, tracked, seed, retain_graph=True)
        first = gradients(out, tracked, seed, create_graph=True)
        along = builtins.sum((g * rng.standard_normal(g.shape).astype(dtype)).sum() for g in first)
        second = gradients(along, tracked)
        assert {t.dtype for t in (out, *plain, *first, *second)} == {np.dtype(dtype)}
        results.append([out, *plain, *first, *second])
    for fused, defined in zip(*results):
        assert fused.shape == defined.shape
        close(fused, defined, rtol=rtol, atol=rtol)


# ## Binary operations on whatever comes
#
# Random ranks, broadcasting both ways, sizes 0 and 1, odd memory layouts, both dtypes: values are
# NumPy's, gradients have their operand's shape and dtype, and along a random direction they are
# what central differences say; so are the gradients of gradients.

BINARY = {
    "add": (F.add, np.add), "sub": (F.sub, np.subtract), "mul": (F.mul, np.multiply), "div": (F.div, np.true_divide),
    "power": (F.power, np.power), "maximum": (F.maximum, np.maximum), "minimum": (F.minimum, np.minimum),
    "where": (lambda a, b: F.where(a.numpy() > 1, a, b), lambda a, b: np.where(a > 1, a, b)),
    "matmul": (F.matmul, np.matmul), "np.logaddexp": (np.logaddexp, np.logaddexp),
}


def random_layout(rng, shape, dtype):
    """An array of this shape that is contiguous, transposed, reversed or strided."""
    kind = rng.integers(4)
    if kind == 1:
        array = rng.uniform(0.5, 2, shape[::-1]).T
    elif kind == 2:
        array = rng.uniform(0.5, 2, shape)[tuple(slice(None, None, -1) for _ in shape)]
    elif kind == 3:
        array = rng.uniform(0.5, 2, [2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]
    else:
        array = rng.uniform(0.5, 2, shape)
    copied = np.empty_like(array, dtype)  # keeps the layout where it can; `subok` views are made above
    copied[...] = array
    return copied if kind in (0, 1) else array.astype(dtype)[...] if dtype == np.float32 else array


def random_shapes(rng, name):
    if name == "matmul":
        i, k, j = rng.choice([0, 1, 2, 3], 3, p=[0.1, 0.3, 0.3, 0.3])
        a, b = [(k,), (i, k), (2, i, k), (2, 1, i, k)], [(k,), (k, j), (1, k, j), (3, k, j), (2, k, j)]
        while True:
            a_shape, b_shape = a[rng.integers(4)], b[rng.integers(5)]
            if not (a_shape[:-2] == (2,) and b_shape[:-2] == (3,)):
                return a_shape, b_shape
    full = rng.choice([0, 1, 2, 3], rng.integers(0, 5), p=[0.1, 0.2, 0.4, 0.3])
    shapes = []
    for _ in range(2):
        shape = [1 if rng.random() < 0.3 else int(n) for n in full]
        shapes.append(tuple(shape[rng.integers(0, len(shape) + 1) if rng.random() < 0.4 else 0:]))
    return shapes


@pytest.mark.parametrize("name", BINARY)
def test_binary_operations_on_random_operands(name):
    f, on_arrays = BINARY[name]
    rng = np.random.default_rng(2024)
    for case in range(200):
        dtype = np.float32 if case % 4 == 0 else np.float64
        a, b = (random_layout(rng, shape, dtype) for shape in random_shapes(rng, name))
        x, y = Tensor(a), Tensor(b)
        x._data, y._data = a, b  # Tensor() copies, and the copy of a view is contiguous
        out, expected = f(x, y), on_arrays(a, b)
        about = f"case {case}: {a.shape} {a.strides} and {b.shape} {b.strides}, {np.dtype(dtype)}"
        assert out.shape == expected.shape and out.dtype == dtype, about
        close(out, expected, rtol=1e-5 if dtype == np.float32 else 1e-12)
        weights = rng.uniform(0.5, 1.5, out.shape)
        first = gradients(out, [x, y], weights, create_graph=True)
        for g, p in zip(first, (x, y)):
            assert g.shape == p.shape and g.dtype == dtype, about
        va, vb = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
        a64, b64 = a.astype(np.float64), b.astype(np.float64)

        def slopes(h):
            """The two gradients at a step of h along (va, vb), on bare arrays."""
            p, q = Tensor(a64 + h * va), Tensor(b64 + h * vb)
            return gradients(f(p, q), [p, q], weights)

        def value(h):
            return np.sum(on_arrays(a64 + h * va, b64 + h * vb) * weights)

        h, tolerance = 1e-6, 1e-4 if dtype == np.float32 else 1e-6
        numeric = (value(h) - value(-h)) / (2 * h)
        analytic = np.sum(first[0].numpy() * va) + np.sum(first[1].numpy() * vb)
        assert abs(numeric - analytic) <= tolerance * max(1, abs(numeric)), about
        if dtype == np.float64 and case % 2 == 0:
            along = (first[0] * va).sum() + (first[1] * vb).sum()
            if not along.requires_grad:
                continue
            for second, plus, minus in zip(gradients(along, [x, y]), slopes(h), slopes(-h)):
                close(second, (plus.numpy() - minus.numpy()) / (2 * h), rtol=1e-5, atol=1e-5)


# ## Functional transforms
#
# Each program here has a derivative that can be had by hand. They are the ways in which nesting goes
# wrong when it goes wrong: a mixed-up variable, a cut tape, a missing term.

NESTED = {
    "x d/dy xy": (lambda x: x * grad(lambda y: x * y)(2.0), 3.0, 6.0),
    "x d/dy (x + y)": (lambda x: x * grad(lambda y: x + y)(1.0), 1.0, 1.0),
    "d/dy xy at y = x": (lambda x: x * grad(lambda y: x * y)(x), 3.0, 6.0),
    "d/dy y^2 at y = x": (lambda x: grad(lambda y: y * y)(x), 3.0, 2.0),
    "d/dy y^2 x^3 at y = x^2": (lambda x: grad(lambda y: y * y * x ** 3)(x * x), 2.0, 10 * 2.0 ** 4),
    "three levels": (lambda x: grad(lambda y: grad(lambda z: x * y * z * z)(y))(x), 2.0, 8 * 2.0),
    "the same variable thrice": (grad(grad(lambda x: x ** 5)), 2.0, 60 * 4.0),
    "tanh, sixth order": (grad(grad(grad(grad(grad(np.tanh))))), 0.0, 0.0),
    "jvp inside, tangent outside": (lambda x: jvp(lambda y: y ** 3, (2.0,), (x,))[1], 5.0, 12.0),
    "jvp at x along x": (lambda x: jvp(lambda y: y ** 3, (x,), (x,))[1], 2.0, 9 * 4.0),
    "jvp of a closure": (lambda x: jvp(lambda y: x * x * y, (1.0,), (1.0,))[1], 3.0, 6.0),
    "jvp of grad": (lambda x: jvp(grad(lambda y: y ** 4), (x,), (1.0,))[1], 2.0, 24 * 2.0),
    "grad of jvp of jvp": (lambda x: jvp(lambda y: jvp(np.sin, (y,), (1.0,))[1], (x,), (1.0,))[1], 0.3, -math.cos(0.3)),
    "vjp at x": (lambda x: vjp(lambda y: y ** 3, x)[1](x)[0], 2.0, 9 * 4.0),
    "vjp of a closure": (lambda x: vjp(lambda y: x * y * y, 3.0)[1](1.0)[0], 2.0, 6.0),
    "vjp's value": (lambda x: vjp(lambda y: y * x, x)[0], 3.0, 6.0),
    "hvp at x": (lambda x: hvp(lambda y: y ** 4, (x,), (1.0,))[1][0], 2.0, 24 * 2.0),
    "hvp along x": (lambda x: hvp(lambda y: x * y ** 3, (2.0,), (x,))[1][0], 5.0, 2 * 5.0 * 12),
    "hvp of a jvp": (lambda x: hvp(lambda y: jvp(lambda z: z ** 4, (y,), (1.0,))[1], (x,), (1.0,))[1][0], 2.0, 24.0),
    "hessian of a closure": (lambda x: hessian(lambda y: x * (y ** 3).sum())(np.ones(2)).sum() * x, 2.0, 2 * 12 * 2.0),
    "hessian at x": (lambda x: hessian(lambda y: y ** 4)(x).sum(), 2.0, 24 * 2.0),
    "jacobian at x": (lambda x: jacobian(lambda y: F.stack([y, y * y, x * y]))(x).sum(), 2.0, 3.0),
    "jacobian of grad": (lambda x: jacobian(grad(lambda y: (y ** 4).sum()))(x * np.ones(2)).sum(), 2.0, 2 * 24 * 2.0),

    "checkpoint inside": (lambda x: checkpoint(lambda y: y ** 3 * x, x), 2.0, 4 * 8.0),
    "checkpoint, an argument made of what it closes over": (lambda x: checkpoint(lambda y: y ** 3 * x, 2 * x), 2.0, 32 * 8.0),
    "checkpoint inside grad": (lambda x: grad(lambda y: checkpoint(lambda z: z ** 3 * y * x, y))(x), 2.0, 16 * 8.0),
    "grad of checkpoint of grad": (lambda x: checkpoint(grad(lambda y: y ** 4), x), 2.0, 48.0),
    "gradients inside": (lambda x: gradients(x ** 3, [x], create_graph=True)[0], 2.0, 12.0),
    "detach cuts": (lambda x: x.detach() * x, 3.0, 3.0),
    "no_grad inside cuts": (lambda x: x * no_grad()(lambda: x * x)(), 3.0, 9.0),
    "grad inside no_grad inside": (lambda x: x * no_grad()(lambda: grad(lambda y: x * y * y)(2.0))(), 3.0, 12.0),
    "aux used": (lambda x: (lambda slope, aux: slope * aux)(*grad(lambda y: (y ** 3, y * x), has_aux=True)(x)), 2.0, 12 * 8.0),
    "unused argument": (lambda x: grad(lambda y: x * x)(1.0) + x, 2.0, 1.0),
    "one level needs no tape, the next does": (lambda x: grad(lambda y: y * grad(lambda z: z * z)(4.0))(x), 2.0, 0.0),
}
# The product of value and gradient, y^3 * 3y^2 at y = x, is 3x^5; its derivative is 15 x^4.
NESTED["value_and_grad, both used"] = (lambda x: (lambda v, s: v * s)(*value_and_grad(lambda y: y ** 3)(x)), 2.0, 15 * 16.0)


@pytest.mark.parametrize("name", NESTED)
def test_nested_transforms(name):
    f, x, derivative = NESTED[name]
    close(grad(f)(x), derivative)
    close(jvp(f, (x,), (1.0,))[1], derivative)
    close(vjp(f, x)[1](1.0)[0], derivative)
    close(jacobian(f)(np.array(x)), derivative)
    tracked = Tensor(x)
    (f(tracked) + 0 * tracked).backward()
    close(tracked.grad, derivative)


PAIRS = {
    "grad": lambda f: lambda x: grad(f)(x),
    "value_and_grad": lambda f: lambda x: value_and_grad(f)(x)[1],
    "vjp": lambda f: lambda x: vjp(f, x)[1](1.0)[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (1.0,))[1],
    "jacobian": lambda f: lambda x: jacobian(f)(x),
    "checkpoint, then grad": lambda f: grad(lambda x: checkpoint(f, x)),
    "gradients": lambda f: lambda x: (lambda y: gradients(f(y), [y], create_graph=True)[0])(Tensor(x)),
}
TWICE = {  # these differentiate twice at once
    "hvp": lambda f: lambda x: hvp(f, (x,), (1.0,))[1][0],
    "hessian": lambda f: lambda x: hessian(f)(x).reshape(()),
}


def program(x):
    return np.exp(0.3 * x) * np.sin(x) + x ** 3 / (1 + x * x)


@pytest.mark.parametrize("outer, inner", itertools.product({**PAIRS, **TWICE}, repeat=2))
def test_any_transform_of_any_other(outer, inner):
    order = sum(2 if name in TWICE else 1 for name in (outer, inner))
    expected = program
    for _ in range(order):
        expected = grad(expected)
    transforms = {**PAIRS, **TWICE}
    close(transforms[outer](transforms[inner](program))(0.7), expected(0.7))


@pytest.mark.parametrize("outer", PAIRS)
def test_any_three_transforms(outer):
    expected = grad(grad(grad(program)))(0.7)
    for middle, inner in itertools.product(PAIRS, repeat=2):
        close(PAIRS[outer](PAIRS[middle](PAIRS[inner](program)))(0.7), expected)


def test_transforms_over_tensors_tracked_by_somebody_else():
    w, data = Tensor([1.0, 2.0]), np.array([3.0, -1.0])
    inner = grad(lambda x: (w * x * x).sum())(data)  # 2 w x
    inner.sum().backward()
    close(w.grad, 2 * data)

    v = Tensor([2.0, 1.0])
    value, pull = vjp(lambda x: x * v, data)
    (value.sum() + pull(np.ones(2))[0].sum()).backward()
    close(v.grad, data + 1)

    t = Tensor([2.0, 1.0])  # a tracked tensor as an argument is tied to what comes out
    hvp(lambda x: (x ** 4).sum(), (t,), (np.ones(2),))[1][0].sum().backward()
    close(t.grad, 24 * t.numpy())


def test_transforms_leave_grad_alone_and_give_constants_when_nobody_else_can_ask():
    w, x = Tensor([1.0, 2.0]), Tensor([0.5, -0.5], requires_grad=False)
    w.grad = before = as_tensor([7.0, 7.0])
    f = lambda p: (np.tanh(p * w) ** 2).sum()
    results = [grad(f)(w), value_and_grad(f)(w), vjp(f, w)[1](1.0), jvp(f, (w,), (x,)), hvp(f, (w,), (x,)), jacobian(f)(w), hessian(f)(w)]
    assert w.grad is before and x.grad is None
    assert isinstance(results[0], Tensor)
    g = lambda p: (p * p).sum()
    assert not any(t.requires_grad for t in (grad(g)(x), *value_and_grad(g)(x), *vjp(g, x)[1](1.0), jvp(g, (x,), (x,))[1], hessian(g)(x)))


def test_a_gradient_penalty_in_a_training_loss():
    """The penalty is a function of the input's gradient, and its own gradient goes to the weights."""
    w, x = Tensor(A(3)), A(5, 3)

    def loss():
        slope = grad(lambda x: np.tanh(x @ w).sum())(x)
        return (np.tanh(x @ w) ** 2).mean() + ((slope * slope).sum(axis=1) - 1).mean() ** 2

    loss().backward()
    base, h = w.numpy().copy(), 1e-6
    for i in range(3):
        w.data = base + h * np.eye(3)[i]
        plus = loss().item()
        w.data = base - h * np.eye(3)[i]
        assert abs((plus - loss().item()) / (2 * h) - w.grad.numpy()[i]) < 1e-6


def test_the_penalty_by_create_graph_gives_the_same():
    w, x = Tensor([0.3, -0.2]), Tensor([1.0, 2.0])
    (slope,) = gradients(np.tanh(x * w).sum(), [x], create_graph=True)
    (slope * slope).sum().backward()
    by_transform = grad(lambda w: (grad(lambda x: np.tanh(x * w).sum())(x.numpy()) ** 2).sum())(w.numpy())
    close(w.grad, by_transform)


def test_unrolled_gradient_descent_is_differentiated():
    """Three steps on (w - target)^2 shrink the distance by (1 - 2 lr)^3."""
    def after(lr, start=5.0, target=1.0):
        w = start * (lr * 0 + 1)
        for _ in range(3):
            w = w - lr * grad(lambda w: (w - target) ** 2)(w)
        return (w - target) ** 2

    lr = 0.1
    close(grad(after)(lr), 16 * 6 * (1 - 2 * lr) ** 5 * -2)
    close(grad(grad(after))(lr), 16 * 30 * (1 - 2 * lr) ** 4 * 4)
    close(grad(after, argnums=1)(lr, 5.0), 2 * 4 * (1 - 2 * lr) ** 6)


def test_backward_with_create_graph_makes_grads_that_differentiate():
    x = Tensor([1.0, 2.0])
    (x ** 3).sum().backward(create_graph=True)
    first = x.grad
    x.grad = None
    (first ** 2).sum().backward()
    close(x.grad, 36 * x.numpy() ** 3)


NEST = {"w": np.array([1.0, 2.0]), "layers": [np.array([[3.0]]), (4.0, Tensor([5.0]))]}


def nest_loss(p, scale=1.0):
    return scale * ((p["w"] ** 2).sum() + (p["layers"][0] ** 3).sum() + p["layers"][1][0] ** 2 * p["layers"][1][1].sum())


def test_nests_go_in_and_come_out():
    slope = grad(nest_loss)(NEST)
    assert isinstance(slope, dict) and list(slope) == ["w", "layers"]
    assert isinstance(slope["layers"], list) and isinstance(slope["layers"][1], tuple)
    for got, expected in [(slope["w"], [2, 4]), (slope["layers"][0], [[27]]), (slope["layers"][1][0], 40), (slope["layers"][1][1], [16])]:
        close(got, np.array(expected, float))
        assert got.shape == np.shape(expected)
    tangent = {"w": np.ones(2), "layers": [np.ones((1, 1)), (1.0, np.ones(1))]}
    close(jvp(nest_loss, (NEST,), (tangent,))[1], 6 + 27 + 40 + 16)
    value, (product,) = hvp(nest_loss, (NEST,), (tangent,))
    close(product["layers"][1][1], [8.0])
    close(product["layers"][1][0], 10 + 8)
    pulled = vjp(lambda p: {"a": p["w"] * 2, "b": [p["layers"][0]]}, NEST)[1]({"a": np.ones(2), "b": [np.ones((1, 1))]})
    close(pulled[0]["w"], [2.0, 2.0])
    close(pulled[0]["layers"][1][1], [0.0])
    rows = jacobian(lambda p: (p["w"] * 2, p["layers"][0].sum()))(NEST)
    assert isinstance(rows, tuple)
    close(rows[0]["w"], 2 * np.eye(2))
    close(rows[1]["layers"][0], [[1.0]])
    close(hessian(nest_loss)(NEST)["layers"][1][0]["layers"][1][1], [[8.0]])


def test_named_tuples_and_empty_nests():
    import collections
    Point = collections.namedtuple("Point", "x y")
    slope = grad(lambda p: p.x * p.y)(Point(2.0, 3.0))
    assert type(slope) is Point and (slope.x.item(), slope.y.item()) == (3.0, 2.0)
    assert grad(lambda p, x: x * x)({}, Tensor(2.0)) == {}
    close(grad(lambda x: (x * x).sum())(np.zeros((0, 3))), np.zeros((0, 3)))


def test_lists_of_numbers_are_arrays():
    close(grad(lambda x: (x ** 2).sum())([1.0, 2.0]), [2.0, 4.0])
    close(grad(lambda x: (x ** 2).sum())([[1.0, 2.0], [3.0, 4.0]]), [[2.0, 4.0], [6.0, 8.0]])
    close(hessian(lambda x: (x ** 2).sum())([1.0, 2.0]), 2 * np.eye(2))


def test_argnums():
    f = lambda a, b, c=1.0: a * a * b * c
    close(grad(f)(2.0, 3.0), 12.0)
    close(grad(f, 1)(2.0, 3.0), 4.0)
    close(grad(f, argnums=-1)(2.0, 3.0, 5.0), 12.0)
    close(grad(f, argnum=1)(2.0, 3.0, c=10.0), 40.0)
    for argnums in ((1, 0), [1, 0]):
        b, a = grad(f, argnums)(2.0, 3.0)
        assert (b.item(), a.item()) == (4.0, 12.0)
    assert isinstance(grad(f, (0,))(2.0, 3.0), tuple)
    value, (a,) = value_and_grad(f, argnums=(0,))(2.0, 3.0)
    assert (value.item(), a.item()) == (12.0, 12.0)
    close(jacobian(lambda a, b: a * b, argnums=1)(np.ones(2), np.ones(2)), np.eye(2))
    (aa, ab), (ba, bb) = hessian(f, argnums=(0, 1))(2.0, 3.0)
    assert [h.item() for h in (aa, ab, ba, bb)] == [6.0, 4.0, 4.0, 0.0]
    close(jacobian(lambda a, b: a * b, argnum=1)(np.ones(2), np.ones(2)), np.eye(2))
    close(hessian(f, argnum=0)(2.0, 3.0), [[6.0]])
    grad(lambda x, n: x * n)(2.0, 3)  # an integer argument is fine as long as nobody differentiates by it


def test_has_aux():
    slope, aux = grad(lambda x: (x * x, {"y": x + 1, "note": "text"}), has_aux=True)(3.0)
    assert slope.item() == 6.0 and aux["y"].item() == 4.0 and aux["note"] == "text" and not aux["y"].requires_grad
    (value, aux), slope = value_and_grad(lambda x: (x * x, [x]), has_aux=True)(3.0)
    assert (value.item(), aux[0].item(), slope.item()) == (9.0, 3.0, 6.0)


def test_what_does_not_depend_has_zero_derivatives():
    x, w = np.ones((2, 3)), Tensor(2.0)
    constant = lambda x: as_tensor(3.0)
    for f in (constant, lambda x: w * 2, lambda x: (x.detach() * w).sum()):
        close(grad(f)(x), np.zeros((2, 3)))
        close(jvp(f, (x,), (x,))[1], 0.0)
        close(vjp(f, x)[1](1.0)[0], np.zeros((2, 3)))
        close(hvp(f, (x,), (x,))[1][0], np.zeros((2, 3)))
        close(jacobian(f)(x), np.zeros((2, 3)))
        close(hessian(f)(x), np.zeros((6, 6)))
    close(gradients(w * w, [w, Tensor([1.0, 1.0])])[1], [0.0, 0.0])
    close(hessian(lambda x: x.sum())(x), np.zeros((6, 6)))  # linear: its gradient depends on nothing
    close(hvp(lambda x: x.sum(), (x,), (x,))[1][0], np.zeros((2, 3)))
    slopes = grad(lambda a, b: (a * a).sum(), (0, 1))(np.ones(2, np.float32), np.ones(3, np.float32))
    close(slopes[1], np.zeros(3))
    assert slopes[1].dtype == np.float32


def test_shapes_of_jacobians_and_hessians():
    x = A(2, 3)
    assert jacobian(lambda x: x @ np.ones((3, 4)))(x).shape == (2, 4, 2, 3)
    assert jacobian(lambda x: x.sum())(x).shape == (2, 3)
    assert jacobian(lambda x: x)(np.ones((0, 2))).shape == (0, 2, 0, 2)
    assert hessian(lambda x: (x ** 3).sum())(x).shape == (6, 6)
    close(hessian(lambda x: (x ** 3).sum())(x), np.diag(6 * x.ravel()))
    assert hessian(lambda x: x ** 3)(2.0).shape == (1, 1)


def test_gradients_where_one_input_depends_on_another():
    x = Tensor(2.0)
    y = x * x
    z = y * x + y
    by_x, by_y = gradients(z, [x, y], retain_graph=True)
    close(by_y, 3.0)          # x + 1, with x held
    close(by_x, 4 + 3 * 4.0)  # the direct part y, and by way of y
    close(gradients(z, [y, x], retain_graph=True)[1], by_x)
    close(gradients(z, [z])[0], 1.0)
    assert x.grad is None and y.grad is None
    close(gradients(x * x, x)[0], 4.0)  # one Tensor alone is accepted
    close(gradients(x * np.ones(2), [x], grad=np.array([1.0, 5.0]))[0], 6.0)


def test_results_of_gradients_are_tensors_of_the_inputs_shape_and_dtype():
    a, b = Tensor(np.ones((2, 1), np.float32)), Tensor(np.ones(3))
    for g, t in zip(gradients((a * b).sum(), [a, b]), (a, b)):
        assert isinstance(g, Tensor) and (g.shape, g.dtype) == (t.shape, t.dtype)


def test_no_grad_inside_outside_and_as_decorator():
    w = Tensor(3.0)
    with no_grad():
        assert not (w * w).requires_grad
        close(grad(lambda x: x * x)(3.0), 6.0)  # a transform records for itself
        close(grad(grad(lambda x: x ** 3))(2.0), 12.0)
        close(hessian(lambda x: x ** 3)(2.0), [[12.0]])
        assert not grad(lambda x: x * w)(2.0).requires_grad
        with no_grad():
            pass
        assert not (w * w).requires_grad
    assert (w * w).requires_grad
    assert not no_grad()(lambda: w * w)().requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        1 / 0
    assert (w * w).requires_grad


# ### checkpoint


def test_checkpoint_is_the_function_itself_with_all_its_derivatives():
    x, w = A(3), A(3)
    f = lambda x, w: (np.tanh(x * w) ** 2).sum()
    g = lambda x, w: checkpoint(f, x, w)
    close(g(Tensor(x), Tensor(w)), f(Tensor(x), Tensor(w)))
    for transform in (grad, hessian, value_and_grad):
        for i in (0, 1):
            a, b = transform(f, i)(x, w), transform(g, i)(x, w)
            for p, q in zip(a, b) if isinstance(a, tuple) else [(a, b)]:
                close(p, q)
    w = Tensor(w, requires_grad=False)
    third = lambda f: grad(lambda x: grad(lambda x: (grad(f)(x, w) ** 2).sum())(x).sum())(x)
    close(third(f), third(g))
    close(third(f), third(lambda x, w: checkpoint(lambda x, w: checkpoint(f, x, w), x, w)))


def test_checkpoint_reaches_parameters_it_closes_over():
    manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), A(5, 3).astype(np.float32)
    plain = gradients((model(x) ** 2).sum(), model.parameters())
    (checkpoint(model, Tensor(x)) ** 2).sum().backward()
    for p, g in zip(model.parameters(), plain):
        close(p.grad, g, rtol=1e-5, atol=1e-6)


def test_checkpoint_draws_the_same_random_numbers_again():
    x, calls = Tensor(np.ones(1000)), []

    def f(x):
        calls.append(1)
        return F.dropout(x, 0.5)

    manual_seed(3)
    y = checkpoint(f, x)
    after = F.dropout(np.ones(4), 0.5)
    y.backward(np.ones(1000))
    close(x.grad, y)  # twice where kept, zero where dropped, in the same places
    assert len(calls) == 2
    manual_seed(3)
    F.dropout(x, 0.5)
    close(F.dropout(np.ones(4), 0.5), after)  # the stream goes on as if f had run once


def test_checkpoint_keeps_no_intermediate_results():
    died, x = [], Tensor(np.ones(10))

    def f(x):
        y = np.tanh(x)
        died.append(weakref.ref(y))
        return y * y

    y = checkpoint(f, x)
    assert died[0]() is None and y.requires_grad


# ### How much a transform computes


def test_hessian_and_vjp_run_the_function_once():
    calls = []

    def f(x):
        calls.append(1)
        return (np.tanh(x) ** 2).sum()

    hessian(f)(A(20))
    assert len(calls) == 1
    _, pull = vjp(f, A(20))
    pull(1.0), pull(2.0)
    assert len(calls) == 2
    jacobian(lambda x: f(x) * np.ones(4))(A(20))
    assert len(calls) == 3


def test_nothing_is_computed_for_operands_that_need_no_gradient():
    """A raw array, a constant Tensor, and in `gradients` all that was not asked for."""
    calls = []
    rule = lambda name: lambda g, y, a, b: (calls.append(name), g)[1]
    add = nanoad.primitive(rule("a"), rule("b"))(lambda a, b: a + b)
    x, w = Tensor(np.ones(3)), Tensor(np.ones(3))
    for a, b, expected in [(x, np.ones(3), "a"), (np.ones(3), x, "b"), (x, as_tensor(np.ones(3)), "a"), (x, 2.0, "a"), (x, x.detach(), "a"),
                           (x, w, "ab")]:
        calls.clear()
        add(a, b).sum().backward()
        assert "".join(calls) == expected
    calls.clear()
    gradients(add(x, w).sum(), [w])
    grad(lambda p: add(x, p).sum())(np.ones(3))
    grad(lambda p: add(add(x, x), p).sum())(np.ones(3))
    assert calls == ["b"] * 3

    asked = []

    @nanoad.fused(lambda a, b: a * b)
    def times(a, b):
        return a * b, lambda g, wanted: (asked.append(list(wanted)), (g * b, g * a))[1]

    times(x, np.ones(3)).sum().backward()
    times(np.ones(3), w).sum().backward()
    assert asked == [[True, False], [False, True]]


def test_hvp_costs_at_most_four_gradients():
    """A 3-layer tanh MLP of 100,000 parameters, batch 256."""
    rng = np.random.default_rng(0)
    sizes = [128, 256, 200, 80]
    weights = [rng.standard_normal((a, b)) / math.sqrt(a) for a, b in itertools.pairwise(sizes)]
    assert 90_000 < sum(w.size for w in weights) < 110_000
    x = rng.standard_normal((256, sizes[0]))

    def loss(*weights):
        h = x
        for w in weights:
            h = np.tanh(h @ w)
        return (h * h).mean()

    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    one = grad(loss, (0, 1, 2))
    for attempt in range(3):  # the machine may be busy with something else
        pairs = [(seconds(lambda: one(*weights)), seconds(lambda: hvp(loss, weights, weights))) for _ in range(9)]
        ratio = np.median([h for _, h in pairs]) / np.median([g for g, _ in pairs])
        if ratio <= 4:
            return
    raise AssertionError(f"hvp takes {ratio:.1f} times as long as grad")


# ## NumPy's functions
#
# Every entry of the tables, called with NumPy's own signatures: once on arrays, once on Tensors.

NUMPY = {
    np.add: [lambda a, b: np.add(a, b), lambda a, b: np.add(1, b)], np.subtract: [lambda a, b: np.subtract(a, b)],
    np.multiply: [lambda a, b: np.multiply(a, b)], np.true_divide: [lambda a, b: np.divide(a, b), lambda a, b: np.true_divide(a, 2)],
    np.power: [lambda a, b: np.power(a, b), lambda a, b: np.power(a, 2), lambda a, b: np.power(2.0, a)],
    **{f: [lambda a, b, f=f: f(a), lambda a, b, f=f: f(b)] for f in (
        np.negative, np.positive, np.absolute, np.fabs, np.square, np.reciprocal, np.exp, np.log, np.sqrt, np.sin, np.cos, np.tan, np.tanh,
        np.log1p, np.expm1)},
    np.logaddexp: [lambda a, b: np.logaddexp(a, b), lambda a, b: np.logaddexp(a, 0), lambda a, b: np.logaddexp(0.5, b)],
    np.maximum: [lambda a, b: np.maximum(a, b), lambda a, b: np.maximum(a, 1)], np.minimum: [lambda a, b: np.minimum(a, b), lambda a, b: np.minimum(1, a)],
    np.matmul: [lambda a, b: np.matmul(a, b.T), lambda a, b: np.matmul(b[0], a[0])],
    **{f: [lambda a, b, f=f: f(a), lambda a, b, f=f: f(a, 0), lambda a, b, f=f: f(a, axis=(0, 1)), lambda a, b, f=f: f(a, axis=-1, keepdims=True),
           lambda a, b, f=f: f(a, axis=None)] for f in (np.sum, np.mean, np.var, np.std, np.max, np.min, np.amax, np.amin)},
    np.where: [lambda a, b: np.where(a > 1, a, b), lambda a, b: np.where(a > 1, a, 0), lambda a, b: np.where(b < 1, 0.5, b)],
    np.clip: [lambda a, b: np.clip(a, 0.5, 1.0), lambda a, b: np.clip(a, None, 1.0), lambda a, b: np.clip(a, a_min=0.7, a_max=1), lambda a, b: np.clip(a, 0.7, None)],
    np.reshape: [lambda a, b: np.reshape(a, (3, 2)), lambda a, b: np.reshape(a, -1), lambda a, b: np.reshape(a, [2, -1])],
    np.ravel: [lambda a, b: np.ravel(a)], np.copy: [lambda a, b: np.copy(a)],
    np.transpose: [lambda a, b: np.transpose(a), lambda a, b: np.transpose(a, (0, 1)), lambda a, b: np.transpose(a, axes=[1, 0]), lambda a, b: np.transpose(a, None)],
    np.swapaxes: [lambda a, b: np.swapaxes(a, 0, 1), lambda a, b: np.swapaxes(a, axis1=-1, axis2=0)],
    np.moveaxis: [lambda a, b: np.moveaxis(a, 0, -1), lambda a, b: np.moveaxis(a, [0, 1], [1, 0])],
    np.expand_dims: [lambda a, b: np.expand_dims(a, 0), lambda a, b: np.expand_dims(a, axis=(0, 2))],
    np.squeeze: [lambda a, b: np.squeeze(a[:1]), lambda a, b: np.squeeze(a[:1], axis=0)],
    np.broadcast_to: [lambda a, b: np.broadcast_to(a, (2, 2, 3)), lambda a, b: np.broadcast_to(a, shape=(1, 2, 3))],
    np.concatenate: [lambda a, b: np.concatenate([a, b]), lambda a, b: np.concatenate((a, b), axis=1), lambda a, b: np.concatenate([a, b], None), lambda a, b: np.concatenate([a, a, b], -1)],
    np.stack: [lambda a, b: np.stack([a, b]), lambda a, b: np.stack((a, b), axis=-1)],
    np.split: [lambda a, b: np.split(a, 2)[1], lambda a, b: np.split(a, [1, 2], axis=1)[1], lambda a, b: np.split(a, 3, -1)[0]],
    np.pad: [lambda a, b: np.pad(a, 1), lambda a, b: np.pad(a, ((0, 1), (2, 0))), lambda a, b: np.pad(a, (1, 0), mode="constant"), lambda a, b: np.pad(a, 1, "constant")],
    np.vstack: [lambda a, b: np.vstack([a, b]), lambda a, b: np.vstack((a[0], b)), lambda a, b: np.vstack([a[None], b[None]])],
    np.dot: [lambda a, b: np.dot(a, b.T), lambda a, b: np.dot(a[0], b[0]), lambda a, b: np.dot(a, 2.0), lambda a, b: np.dot(a[None], b.T), lambda a, b: np.dot(a, b[1])],
    np.vdot: [lambda a, b: np.vdot(a, b)], np.outer: [lambda a, b: np.outer(a, b)],
    np.full_like: [lambda a, b: np.full_like(a, 3.0), lambda a, b: np.full_like(a, b[0, 1])],
    np.einsum: [lambda a, b: np.einsum("ij,kj->ik", a, b), lambda a, b: np.einsum("ij->j", a), lambda a, b: np.einsum("ij,ij", a, b, optimize=True)],
}
ALSO = [  # keywords that mean something
    lambda a, b: np.sum(a, dtype=np.float32), lambda a, b: np.mean(a, axis=0, dtype=np.float64), lambda a, b: np.var(a, axis=1, ddof=1),
    lambda a, b: np.std(a, ddof=1, keepdims=True), lambda a, b: a.sum(axis=0, keepdims=True), lambda a, b: a.mean(0), lambda a, b: a.var(axis=1, ddof=1),
    lambda a, b: a.std(0), lambda a, b: a.max(axis=1), lambda a, b: a.min(), lambda a, b: a.reshape(3, 2), lambda a, b: a.reshape((3, -1)),
    lambda a, b: a.transpose(1, 0), lambda a, b: a.transpose(), lambda a, b: a.T @ b, lambda a, b: a.swapaxes(0, 1), lambda a, b: a[:1].squeeze(),
    lambda a, b: a.flatten(), lambda a, b: a.ravel(), lambda a, b: a.dot(b.T), lambda a, b: a.clip(0.5, 1), lambda a, b: a.astype(np.float32), lambda a, b: a.copy(),
    lambda a, b: abs(-a), lambda a, b: -a, lambda a, b: sum([a, b]), lambda a, b: np.amax(a, 0),
]


def test_every_numpy_function_of_the_tables_is_tried():
    assert set(NUMPY) == set(nanoad._UFUNCS) | set(nanoad._FUNCTIONS)


@pytest.mark.parametrize("call", [pytest.param(c, id=f"{f.__name__}-{i}") for f, calls in NUMPY.items() for i, c in enumerate(calls)]
                         + [pytest.param(c, id=f"also-{i}") for i, c in enumerate(ALSO)])
def test_numpy_functions_take_tensors_as_they_take_arrays(call):
    for dtype in (np.float64, np.float32):
        a, b = (np.random.default_rng(i).uniform(0.3, 2, (2, 3)).astype(dtype) for i in (1, 2))
        expected = call(a, b)
        for x, y in [(Tensor(a), Tensor(b)), (Tensor(a), Tensor(b, requires_grad=False)), (Tensor(a, requires_grad=False), Tensor(b))]:
            result = call(x, y)
            assert isinstance(result, Tensor) and result.shape == expected.shape and result.dtype == expected.dtype
            close(result, expected, rtol=1e-12 if expected.dtype == np.float64 else 1e-5)
        if dtype == np.float64 == expected.dtype:
            check_grad(lambda x: call(x, Tensor(b)), a)


ZERO_DERIVATIVE = [
    np.sign, np.floor, np.ceil, np.trunc, np.rint, np.round, np.isnan, np.isinf, np.isfinite, np.signbit, np.logical_not, np.isneginf, np.isposinf,
    np.argmax, np.argmin, np.argsort, np.nonzero, np.count_nonzero, np.any, np.all, np.shape, np.ndim, np.size, np.zeros_like, np.ones_like,
    np.array2string, np.array_repr, np.array_str, np.result_type,
    *[lambda x, f=f: f(x, 0.5) for f in (np.floor_divide, np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal, np.logical_and,
                                         np.logical_or, np.logical_xor, np.isclose, np.allclose, np.array_equal)],
    lambda x: np.searchsorted(x, 0.2), lambda x: np.argmax(x, axis=0), lambda x: np.argsort(x, axis=-1), lambda x: np.less(0.5, x), lambda x: np.round(x, 1),
    lambda x: np.empty_like(x).shape, lambda x: np.zeros_like(x, dtype=int), lambda x: x.argmax(), lambda x: x.argmin(axis=0),
    lambda x: x > 0, lambda x: x == x, lambda x: x != 0.5, lambda x: x <= [0.1, 0.2, 0.3], lambda x: np.ones(3) < x, lambda x: x.shape, lambda x: x.ndim, lambda x: x.size,
    lambda x: np.ones(3) // (x + 2),
]


@pytest.mark.parametrize("f", ZERO_DERIVATIVE)
def test_functions_with_zero_derivative_give_plain_results(f):
    array = np.array([-0.3, 0.1, 1.7])
    result, expected = f(Tensor(array)), f(array)
    assert not isinstance(result, Tensor) and type(result) is type(expected)
    if f not in (np.array_repr,):
        assert np.array_equal(result, expected)


REFUSED = {
    "inv": lambda x: np.linalg.inv(x), "solve": lambda x: np.linalg.solve(x, x), "cumsum": lambda x: np.cumsum(x), "prod": lambda x: np.prod(x),
    "sort": lambda x: np.sort(x), "add.reduce": lambda x: np.add.reduce(x), "multiply.outer": lambda x: np.multiply.outer(x, x),
    "add.accumulate": lambda x: np.add.accumulate(x), "add.at": lambda x: np.add.at(x, 0, 1), "arctan2": lambda x: np.arctan2(x, x),
    "sinh": lambda x: np.sinh(x), "remainder": lambda x: np.remainder(x, 2), "modf": lambda x: np.modf(x), "divmod": lambda x: np.divmod(x, 2.0),
    "add with out=": lambda x: np.add(x, 1, out=np.zeros((2, 2))), "exp with where=": lambda x: np.exp(x, where=np.ones((2, 2), bool)),
    "sum.*out": lambda x: np.sum(x, out=np.zeros(())), "sum.*where": lambda x: np.sum(x, where=np.eye(2) > 0),
    "max.*initial": lambda x: np.max(x, initial=3.0), "fft": lambda x: np.fft.fft(x), "histogram": lambda x: np.histogram(x), "trace": lambda x: np.trace(x),
    "tensordot": lambda x: np.tensordot(x, x), "clip": lambda x: np.clip(x, 0, 1, out=np.zeros((2, 2))), "reshape": lambda x: np.reshape(x, (4,), order="F"),
    "pad": lambda x: np.pad(x, 1, mode="edge"), "copyto": lambda x: np.copyto(np.zeros((2, 2)), x),
    "full_like ": lambda x: np.full_like(np.zeros((2, 2)), x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nanoad_cannot_differentiate_is_refused_by_name(name):
    """A TypeError, since a result without a gradient, or of another meaning, would be silently wrong."""
    with pytest.raises(TypeError, match=name.strip() if name != "full_like " else None):
        REFUSED[name](Tensor(np.array([[2.0, 0.5], [0.5, 1.0]])))


def test_a_tracked_tensor_does_not_become_an_array_by_accident():
    t = Tensor([1.0, 2.0])
    for convert in (np.asarray, np.array, lambda t: np.array([t, t]), lambda t: np.array([t[0], t[1]]), lambda t: np.array([[t], [t]]), np.ascontiguousarray,
                    lambda t: np.zeros(2).__setitem__(slice(None), t), lambda t: np.float64(t)):
        with pytest.raises(TypeError):
            convert(t)
    close(np.asarray(t.detach()), [1.0, 2.0])
    assert t.numpy() is t.data and isinstance(t.numpy(), np.ndarray) and isinstance((t.sum() * 2).data, np.ndarray)


@pytest.mark.parametrize("op", ["+", "-", "*", "/", "**", "@"])
@pytest.mark.parametrize("other", [np.array([1.5, 2.5]), np.array([[1.5, 2.5], [0.5, 1.0]]), np.float64(2.0), np.float32(2.0), np.array([1, 2]), [1.5, 2.5], 2, 2.5, True])
def test_operators_with_arrays_lists_and_numbers_on_either_side(op, other):
    if op == "@" and np.ndim(other) == 0:
        return
    x = np.array([0.5, 2.0])
    for source in (f"t {op} o", f"o {op} t"):
        expected = eval(source, {"t": x, "o": np.asarray(other)})
        t = Tensor(x)
        result = eval(source, {"t": t, "o": other})
        assert type(result) is Tensor
        close(result, expected)
        check_grad(lambda t: eval(source, {"t": t, "o": other}), x)
    t = Tensor(x)
    t += 1
    t *= 2  # these make new tensors, and both are on the tape
    t.sum().backward()
    assert t.grad is None


def test_lists_are_constants_and_lists_of_tensors_are_stacked():
    a, b = Tensor(1.0), Tensor(2.0)
    t = Tensor([[a, b], [b, 3.0]])
    assert t.shape == (2, 2)
    (t * [[1.0, 10.0], [100.0, 1000.0]]).sum().backward()
    assert (a.grad.item(), b.grad.item()) == (1.0, 110.0)
    close(F.mse_loss([a, b], [1.0, 0.0]), 2.0)
    close(F.add([1.0, 2.0], [3.0, 4.0]), [4.0, 6.0])
    close(F.mul([1.0, 2.0], 2), [2.0, 4.0])
    close(F.stack([[1.0, 2.0], Tensor([3.0, 4.0])]), [[1.0, 2.0], [3.0, 4.0]])
    for f in (F.relu, F.softmax, F.sigmoid, F.gelu, F.tanh, F.neg, F.sum, F.logsumexp, F.softplus, F.log_softmax, F.max):
        close(f([0.5, -1.0]), f(np.array([0.5, -1.0])))
        assert isinstance(f([0.5, -1.0]), Tensor)
    for f in (F.relu, F.sigmoid, F.gelu, F.tanh, F.neg, F.softplus, F.abs, F.exp):
        close(f(0.5), f(np.array(0.5)))
    with pytest.raises(TypeError):  # two lists have no operator of ours
        [a] @ [b]


# ### Programs written for NumPy
#
# Each is run on plain arrays for its central differences and on Tensors for its derivative: nothing
# in it knows which.


def log_likelihood(theta, x=A(20)):
    mean, log_scale = theta[0], theta[1]
    z = (x - mean) * np.exp(-log_scale)
    return np.sum(-0.5 * z ** 2 - log_scale - 0.5 * np.log(2 * np.pi))


def solve(a, b):
    """Gaussian elimination without pivoting, on rows."""
    n, rows = len(b), [np.concatenate([a[i], b[i:i + 1]]) for i in range(len(b))]
    for i in range(n):
        rows[i] = rows[i] / rows[i][i]
        for j in range(n):
            if j != i:
                rows[j] = rows[j] - rows[i] * rows[j][i]
    return np.stack([row[n] for row in rows])


RIDGE_X, RIDGE_Y = A(8, 3), A(8)


def ridge(log_penalty):
    """The validation loss of a ridge regression, by its penalty."""
    x, y = RIDGE_X[:5], RIDGE_Y[:5]
    w = solve(x.T @ x + np.exp(log_penalty) * np.eye(3), x.T @ y)
    return np.mean((RIDGE_X[5:] @ w - RIDGE_Y[5:]) ** 2)


def rnn(weights, xs=A(6, 2)):
    w, u = weights[:, :3], weights[:, 3:]
    h = np.zeros(3)
    for x in xs:
        h = np.tanh(w @ h + u @ x)
    return np.sum(h ** 2)


def pendulum(start):
    """Energy after 20 steps of Runge-Kutta (1901) of a damped pendulum."""
    f = lambda s: np.stack([s[1], -np.sin(s[0]) - 0.1 * s[1]])
    s, dt = start, 0.1
    for _ in range(20):
        k1 = f(s)
        k2 = f(s + dt / 2 * k1)
        k3 = f(s + dt / 2 * k2)
        k4 = f(s + dt * k3)
        s = s + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return 0.5 * s[1] ** 2 - np.cos(s[0])


def gaussian_process(theta, x=np.linspace(0, 1, 4), y=A(4)):
    """The log marginal likelihood, by the kernel's length scale and noise; the determinant by elimination."""
    distance = (x[:, None] - x[None, :]) ** 2
    kernel = np.exp(-0.5 * distance * np.exp(-2 * theta[0])) + np.exp(theta[1]) * np.eye(len(x))
    log_det, rest = 0.0, kernel
    while len(rest):
        log_det = log_det + np.log(rest[0, 0])
        rest = rest[1:, 1:] - np.outer(rest[1:, 0], rest[0, 1:]) / rest[0, 0]
    return -0.5 * y @ solve(kernel, y) - 0.5 * log_det


def newton_square_root(x):
    y = x
    while abs(float(y * y - x)) > 1e-13:
        y = (y + x / y) / 2
    return y


PROGRAMS = [(log_likelihood, np.array([0.3, -0.2])), (ridge, np.array(-0.5)), (rnn, A(3, 5)), (pendulum, np.array([1.0, 0.3])),
            (gaussian_process, np.array([-0.7, -1.0])), (newton_square_root, np.array(2.0)), (lambda x: np.sum(np.tanh(x) ** 2), A(4))]


@pytest.mark.parametrize("f, x", PROGRAMS)
def test_numpy_programs_differentiate_as_they_stand(f, x):
    weights, h = np.random.default_rng(0).standard_normal(x.shape), 1e-6
    value, slope = value_and_grad(f)(x)
    close(value, f(x))
    numeric = (f(x + h * weights) - f(x - h * weights)) / (2 * h)
    assert abs(np.sum(slope.numpy() * weights) - numeric) < 1e-6 * max(1, abs(numeric))
    second = hvp(f, (x,), (weights,))[1][0]
    numeric = (grad(f)(x + h * weights).numpy() - grad(f)(x - h * weights).numpy()) / (2 * h)
    close(second, numeric, rtol=1e-5, atol=1e-6)


def test_the_ridge_penalty_has_its_closed_form():
    """dw/dlog(c) = -c (X'X + cI)^-1 w."""
    x, y, c = RIDGE_X, RIDGE_Y, 0.7
    a = x.T @ x + c * np.eye(3)
    by_log = jacobian(lambda log_c: solve(x.T @ x + np.exp(log_c) * np.eye(3), x.T @ y))(math.log(c))
    close(by_log, -c * np.linalg.solve(a, np.linalg.solve(a, x.T @ y)))


@pytest.mark.parametrize("path", sorted((SHARED / "programs").glob("*.py")), ids=lambda p: p.stem)
@pytest.mark.slow
def test_programs_of_the_family_run_unchanged(path):
    data = SHARED / "data"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NANOAD_DATA": str(data)}
    run = subprocess.run([sys.executable, "-W", "error", str(path)], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


# ## The tensor


def test_dtypes_follow_numpy():
    f4, f8 = Tensor(np.ones(2, np.float32)), Tensor(np.ones(2))
    for made, dtype in [(Tensor(1), "f8"), (Tensor([1, 2]), "f8"), (Tensor(np.array([True])), "f8"), (Tensor(np.ones(2, np.int8)), "f8"),
                        (Tensor(2.5), "f8"), (Tensor(np.float32(1)), "f4"), (Tensor(np.ones(2, np.float16)), "f2"), (as_tensor([1, 2]), "f8"),
                        (as_tensor(np.ones(2, np.float32)), "f4"), (f4 + f8, "f8"), (f4 + np.ones(2), "f8"), (f4 * np.ones(2, np.float32), "f4"),
                        (F.sum(np.array([1, 2])), "f8"), (f4 > 0, bool), (f4 * (f4.numpy() > 0), "f4"), (f4.astype(np.float64), "f8"), (f8.astype("f4"), "f4"),
                        (F.stack([f4, f4]), "f4"), (Tensor([f4[0], f4[1]]), "f4"), (F.cross_entropy(f4.reshape(1, 2), np.array([0])), "f4"),
                        (F.dropout(f4, 0.5), "f4"), (Tensor(1, requires_grad=False), "f8")]:
        assert made.dtype == np.dtype(dtype)


@pytest.mark.parametrize("source", [
    "t + 1", "1 - t", "t * 2.5", "2 / t", "t ** 2", "t ** 0.5", "t ** 1.7", "2 ** t", "-t", "abs(t)", "t + True", "t.sum() * 0.5", "t.mean()", "t.var()", "t.max() + 1",
    "np.exp(t.sum())", "t[0] * 3", "t[0] ** 2", "np.maximum(t, 0)", "np.maximum(t[0], 0.1)", "np.where(t > 1, t, 0)", "np.where(t > 1, t, 0.5)", "np.clip(t, 0, 1)", "F.gelu(t[0])",
    "F.sigmoid(t[0])", "F.softplus(t[0])", "F.relu(t[0])", "F.softmax(t)", "np.logaddexp(t, 0)", "t @ t", "(t @ t) / 3", "np.sqrt(t.sum()) + 1", "t.std()", "F.logsumexp(t) - 1",
    "F.mse_loss(t, [1, 2, 3])", "F.binary_cross_entropy_with_logits(t, [1, 0, 1])", "F.hinge_loss(t, [1, 1, -1])", "F.pad(t, 1)", "np.tan(t[0])", "np.reciprocal(t[0])", "t.mean() ** -2",
    "F.layer_norm(t, np.ones(3, np.float32))", "F.layer_norm(t, np.ones(3, np.float32), np.zeros(3, np.float32))"])
def test_python_numbers_do_not_widen_float32(source):
    """Scalars too, where NumPy 1 computes in float64; forward, backward and twice backward."""
    t = Tensor(np.array([0.5, 1.5, 2.0], np.float32))
    out = eval(source, {"t": t, "np": np, "F": F})
    assert out.dtype == np.float32
    (first,) = gradients(out, [t], np.ones(out.shape, np.float32), create_graph=True)
    assert first.dtype == np.float32 and first.shape == t.shape
    (first * t).sum().backward()
    assert (t.grad.dtype, t.grad.shape) == (np.float32, t.shape)


def test_a_gradient_has_its_tensors_dtype_and_shape():
    a, b, c = Tensor(np.ones((3, 1), np.float32)), Tensor(np.ones(4)), Tensor(np.ones((), np.float16))
    ((a * b + c) * np.ones((2, 3, 4))).sum().backward()
    for t, value in ((a, 8), (b, 6), (c, 24)):
        assert (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype)
        close(t.grad, np.full(t.shape, value))
    assert isinstance(a.grad, Tensor) and not a.grad.requires_grad


def test_gradients_accumulate_in_leaves_and_nowhere_else():
    x = Tensor([1.0, 2.0])
    y = x * x
    y.sum().backward()
    y2 = (x * 3).sum()
    y2.backward()
    close(x.grad, [5.0, 7.0])
    assert y.grad is None and y2.grad is None
    for twice in (lambda: x + x, lambda: x * 2, lambda: F.concatenate([x, x]), lambda: np.stack([x, x])):
        x.grad = None
        twice().sum().backward()
        close(x.grad, [2.0, 2.0])
    leaf = Tensor(2.0)
    leaf.backward()
    assert leaf.grad.item() == 1.0


def test_how_a_tensor_prints():
    assert str(Tensor([2.0, 4.0])) == "[2. 4.]" and str(Tensor(3.0)) == "3.0" and f"{Tensor([1.0])}" == "[1.]"
    t = Tensor(np.array([[1.5, 2.0]], np.float32), label="weights")
    assert re.fullmatch(r"Tensor\(\[\[1\.5, 2\. *\]\], dtype=float32, label='weights'\)", repr(t))
    assert repr(Tensor(3.0)) == "Tensor(3., dtype=float64)" and repr(Tensor(np.zeros((0, 2)))).startswith("Tensor([]")
    assert repr(Tensor(2.0) * 1) == "Tensor(2., dtype=float64)"
    assert f"{Tensor(2.0):.3f}" == "2.000" and f"{Tensor([[2.0]]):5.1f}" == "  2.0"
    assert nanoad.Value is Tensor


def test_conversions_and_containers():
    t = Tensor([[1.5, 2.5], [3.5, 4.5]], label="t")
    assert (t.shape, t.ndim, t.size, t.dtype, len(t), t.label) == ((2, 2), 2, 4, np.float64, 2, "t")
    assert [row.shape for row in t] == [(2,), (2,)] and all(isinstance(row, Tensor) for row in t)
    sum(row[0] for row in t).backward()
    close(t.grad, [[1, 0], [1, 0]])
    first, second = t
    close(second, [3.5, 4.5])
    one = Tensor([[2.75]])
    assert (one.item(), float(one), type(one.item())) == (2.75, 2.75, float)
    assert t.tolist() == [[1.5, 2.5], [3.5, 4.5]] and bool(Tensor(1.0)) and not Tensor(0.0)
    assert {t: 1}[t] == 1  # hashable by identity, though == compares elements
    assert (t == t).all() and (t != 2.5).sum() == 3 and (t > Tensor(2.0)).tolist() == [[False, True], [True, True]]
    assert np.array_equal(np.array([1.5, 9.0]) == t, [[True, False], [False, False]])


def test_data_goes_in_as_a_copy():
    array = np.ones(2)
    t, shared = Tensor(array), as_tensor(array)
    array[0] = 5
    assert t.tolist() == [1.0, 1.0] and shared.tolist() == [5.0, 1.0]
    constant = Tensor([1.0, 2.0], requires_grad=False)
    for copied in (Tensor(constant), constant.copy(), np.copy(constant)):
        copied.data[0] = 9
        assert constant.tolist() == [1.0, 2.0]
    assert np.shares_memory(t.detach().numpy(), t.numpy())  # as in PyTorch


def test_a_tensor_of_a_tensor_is_tied_to_it():
    x = Tensor([1.0, 2.0])
    y = Tensor(x)
    (y * y).sum().backward()
    close(x.grad, [2.0, 4.0])
    assert not Tensor(x, requires_grad=False).requires_grad and as_tensor(x) is x


def test_leaves_can_be_copied_and_pickled():
    x = Tensor(np.array([1.0, 2.0], np.float32), label="x")
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm2d(3))
    for clone in (copy.deepcopy, copy.copy, lambda a: pickle.loads(pickle.dumps(a))):
        y = clone(x)
        assert (y.label, y.requires_grad, y.dtype) == ("x", True, np.float32) and y is not x
        (x * y).sum().backward()
        close(x.grad, y)
        x.grad = None
        close(y.grad, [1.0, 2.0])
    twin = copy.deepcopy(model)
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters()):
        assert type(q) is nanoad.Parameter and not np.shares_memory(p.numpy(), q.numpy()) and np.array_equal(p.numpy(), q.numpy())


# ## The tape


def test_a_deep_tape_needs_no_recursion():
    x = Tensor(1.0)
    y = x
    for _ in range(50_000):
        y = y * 1.00001
    depth = len(inspect.stack(0))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 60)
    try:
        y.backward(retain_graph=True)
        close(gradients(y, [x])[0], x.grad)
        del y
    finally:
        sys.setrecursionlimit(limit)
    close(x.grad, 1.00001 ** 50_000, rtol=1e-9)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's account of memory")
def test_a_tape_of_a_million_operations():
    n = 1_000_000
    x = Tensor(np.ones(1))
    before, y = resident(), x
    for _ in range(n // 2):
        y = np.sin(y) + 1e-3
    per_op = (resident() - before) / n
    assert per_op < 2000, f"{per_op:.0f} bytes per operation"
    first = weakref.ref(y)
    y.backward()
    assert np.isfinite(x.grad.item())
    for _ in range(n // 2):
        y = y * 1.0
    del y  # freed without a walk, too
    assert first() is None


def test_memory_falls_while_the_tape_is_walked():
    alive, refs = [], []

    @nanoad.primitive(lambda g, y, x: (alive.append(sum(r() is not None for r in refs)), g)[1])
    def watch(x):
        return x + 0

    y = watch(Tensor(np.ones(3)))
    for _ in range(20):
        y = np.tanh(y)
        refs.append(weakref.ref(y))
    loss = y.sum()
    del y
    loss.backward()
    assert alive[0] <= 1  # at most the one whose cotangent has just been handed on
    loss2 = np.exp(watch(Tensor(1.0)))
    loss2.backward(retain_graph=True)
    loss2.backward()
    assert len(alive) == 3


def test_nothing_is_part_of_a_reference_cycle():
    manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Dropout(0.5))
    gpt, x, ids = nanoad.GPT(5, 8, 2, 1, 4, dropout=0.1), A(2, 1, 6, 6).astype(np.float32), np.array([[1, 2, 3]])
    f = lambda x: (np.tanh(x) ** 3).sum()
    programs = [
        lambda: F.cross_entropy(conv(x), np.array([0, 2])).backward(), lambda: F.cross_entropy(gpt(ids)[0], np.array([0, 2, 1])).backward(),
        lambda: f(Tensor(A(3))), lambda: f(Tensor(A(3))).backward(retain_grads=True), lambda: grad(grad(f))(2.0),
        lambda: hessian(f)(A(3)), lambda: jvp(f, (A(3),), (A(3),)), lambda: vjp(f, A(3))[1](1.0), lambda: jacobian(np.tanh)(A(3)), lambda: gpt.generate(ids, 3),
        lambda: checkpoint(f, Tensor(A(3))).backward(), lambda: nanoad.SGD(conv.parameters(), 0.1).step()]
    for program in programs:
        program()
        conv.zero_grad(), gpt.zero_grad()
    gc.collect()
    gc.disable()
    try:
        for i, program in enumerate(programs):
            program()
            conv.zero_grad(), gpt.zero_grad()
            assert gc.collect() == 0, f"program {i} left cycles"
        y = np.exp(Tensor(A(3)))
        z, dies = y * y, weakref.ref(y)
        del y
        assert dies() is not None
        z.sum().backward()
        assert dies() is None
    finally:
        gc.enable()


def test_a_released_tape_says_so():
    for again in (lambda y, x: y.backward(), lambda y, x: gradients(y, [x]), lambda y, x: (y * 2).backward(), lambda y, x: grad(lambda w: w * y)(1.0).backward()):
        x = Tensor(2.0)
        y = x * x
        y.backward()
        with pytest.raises(RuntimeError, match="mul: .*retain_graph"):
            again(y, x)
    x = Tensor(2.0)
    y = x * x
    for _ in range(3):
        y.backward(retain_graph=True)
    close(x.grad, 12.0)
    a = x * 3  # two results share a part of the tape: the second walk finds it gone
    b, c = a * a, a + a
    b.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        c.backward()


def test_retain_grads_leaves_gradients_everywhere():
    x = Tensor(2.0)
    y = x * x
    z = y * 3
    z.backward(retain_grads=True)
    assert (z.grad.item(), y.grad.item(), x.grad.item()) == (1.0, 3.0, 12.0)


def test_two_threads_give_what_they_give_alone():
    def work(seed):
        manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))
        optimizer, x = nanoad.Adam(model.parameters(), lr=0.01), np.random.default_rng(seed).standard_normal((32, 4)).astype(np.float32)
        results = []
        for _ in range(30):
            loss = (model(x) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with no_grad():
                results.append(model(x).sum().item())
            results.append(hessian(lambda w: (np.tanh(w) ** 2).sum())(x[0, :3].astype(np.float64)).tolist())
        return results

    alone, together = [work(s) for s in range(4)], {}
    threads = [threading.Thread(target=lambda s=s: together.__setitem__(s, work(s))) for s in range(4)]
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(old)
    assert [together[s] for s in range(4)] == alone


# ### Writes in between
#
# Between forward and backward the tape needs the values it saw. A write is detected; what is not a
# write in between is not reported, however often `.data` is read.

WRITES = {
    "element": lambda x, y: x.data.__setitem__(0, 5.0),
    "in place": lambda x, y: exec("x.data -= 0.1", {"x": x}),
    "replaced": lambda x, y: setattr(x, "data", np.array([5.0, 5.0])),
    "by numpy()": lambda x, y: x.numpy().fill(0.0),
    "an intermediate result": lambda x, y: y.data.__setitem__(0, 5.0),
    "read before, too": lambda x, y: (x.data, x.data.__setitem__(0, 5.0), x.data),
    "by a ufunc": lambda x, y: np.multiply(x.data, 2, out=x.data),
    "by an optimizer": lambda x, y: (setattr(x, "grad", as_tensor([1.0, 1.0])), nanoad.SGD([x], 0.1).step()),
    "through a view": lambda x, y: x.data[1:].fill(0.0),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_between_forward_and_backward_is_detected(how):
    x = Tensor([1.0, 2.0], label="x")
    y = x * x
    loss = np.tanh(y).sum()
    WRITES[how](x, y)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def test_load_state_dict_between_forward_and_backward_is_detected():
    model = nn.Linear(2, 1)
    loss = (model(np.ones((3, 2))) ** 2).sum()
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def test_a_write_through_an_array_taken_before_the_forward_pass():
    x = Tensor([1.0, 2.0])
    held = x.data
    loss = (x * x).sum()
    held[0] = 5.0
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def test_ordinary_loops_are_not_reported():
    x, target = A(6, 2), A(6)
    w, b = Tensor(np.zeros(2), label="w"), Tensor(0.0)
    losses = []
    for _ in range(5):
        loss = ((x @ w + b - target) ** 2).mean()
        losses.append(float(loss.data))
        w.data, b.numpy(), loss.data.copy()  # reading is harmless
        loss.backward()
        for p in (w, b):
            p.data -= 0.1 * p.grad
            p.data = p.data - 0.0 * p.grad.data
            p.grad = None
    assert losses == sorted(losses, reverse=True)
    optimizer = nanoad.SGD([w, b], 0.1)
    for _ in range(3):
        loss = ((x @ w + b - target) ** 2).mean()
        w.data.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        w.data[0] *= 1.0
        w.data *= 0.99  # decay by hand, after the step
    y = w * 2
    y.data
    y.sum().backward(retain_graph=True)
    data = w.data
    y.sum().backward()
    assert data is w.data


def test_data_can_only_be_replaced_by_its_like():
    t = Tensor(np.ones(3, np.float32))
    t.data = [1, 2, 3]
    t.data = Tensor(np.zeros(3, np.float32))
    assert t.dtype == np.float32 and t.tolist() == [0.0, 0.0, 0.0]
    for wrong in (np.ones(2, np.float32), np.ones(3), np.ones((3, 1), np.float32), 1.0):
        with pytest.raises(ValueError, match=r"t\.data is float32 of shape \(3,\)"):
            t.data = wrong


# ## Numbers
#
# What is large must not overflow, what is small must not vanish, and infinities mean what they mean.

BIG = np.array([1e4, -1e4, 0.0, 88.0, -88.0, 1e-3], np.float32)


def softmax_exactly(x):
    e = np.exp(x.astype(np.longdouble) - x.max())
    return e / e.sum()


@pytest.mark.parametrize("f, exact, slope", [
    (F.sigmoid, [1, 0, 0.5, 1, 6.054602e-39, 0.50025], [0, 0, 0.25, 6.054602e-39, 6.054602e-39, 0.24999994]),
    (F.softplus, [1e4, 0, math.log(2), 88, 6.054602e-39, 0.6936473], [1, 0, 0.5, 1, 6.054602e-39, 0.50025]),
    (F.tanh, [1, -1, 0, 1, -1, 1e-3], [0, 0, 1, 0, 0, 1]),
    (F.gelu, [1e4, 0, 0, 88, 0, 5.003989e-4], [1, 0, 0.5, 1, 0, 0.50079788]),
    (F.relu, [1e4, 0, 0, 88, 0, 1e-3], [1, 0, 0, 1, 0, 1]),
], ids=["sigmoid", "softplus", "tanh", "gelu", "relu"])
def test_activations_of_large_numbers_in_float32(f, exact, slope):
    x = Tensor(BIG)
    with np.errstate(under="ignore"):
        y = f(x)
        y.sum().backward()
        close(y, np.array(exact, np.float64), rtol=3e-6, atol=2e-38)
        close(x.grad, np.array(slope, np.float64), rtol=3e-6, atol=1e-38)
        twice = grad(lambda x: (grad(lambda x: f(x).sum())(x) ** 2).sum())(BIG)
    assert np.isfinite(twice.numpy()).all()


def test_softmax_and_its_relatives_of_large_numbers_in_float32():
    p = softmax_exactly(BIG)
    targets = np.array([1])
    for x in (BIG, BIG[::-1].copy(), BIG * 0 + 1e4, BIG * 0 - 1e4):
        p = softmax_exactly(x)
        lse = float(np.log(np.exp(x.astype(np.longdouble) - x.max()).sum()) + x.max())
        close(F.softmax(x), p.astype(np.float64), rtol=1e-6, atol=1e-38)
        close(F.logsumexp(x), lse, rtol=1e-6)
        loss, slope = value_and_grad(lambda x: F.cross_entropy(x.reshape(1, -1), targets))(x)
        close(loss, lse - float(x[1]), rtol=1e-6)
        close(slope, p.astype(np.float64) - np.eye(6)[1], rtol=1e-5, atol=1e-7)
        for f in (lambda x: F.softmax(x)[0], F.logsumexp, lambda x: F.log_softmax(x)[0], lambda x: F.cross_entropy(x.reshape(1, -1), targets)):
            assert np.isfinite(hessian(f)(x).numpy()).all()


def test_log_softmax_equals_extended_precision():
    x = np.random.default_rng(0).uniform(-50, 50, (40, 30))
    wide = x.astype(np.longdouble)
    exact = (wide - wide.max(1, keepdims=True)) - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
    close(F.log_softmax(x), exact.astype(np.float64), rtol=1e-13, atol=1e-14)
    single = F.log_softmax(x.astype(np.float32))
    wide = x.astype(np.float32).astype(np.longdouble)
    exact = (wide - wide.max(1, keepdims=True)) - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
    close(single, exact.astype(np.float64), rtol=1e-6, atol=2e-7)


def test_minus_infinity_masks():
    x = Tensor([[0.0, -np.inf, 1.0], [-np.inf, -np.inf, 2.0]])
    p = np.exp([0, 1]) / np.exp([0, 1]).sum()
    close(F.softmax(x), [[p[0], 0, p[1]], [0, 0, 1]])
    close(F.logsumexp(x, axis=1), [math.log(1 + math.e), 2.0])
    assert F.logsumexp(np.array([-np.inf, -np.inf])).item() == -np.inf
    assert np.isneginf(F.log_softmax(x).numpy()).tolist() == [[False, True, False], [True, True, False]]
    for f in (lambda x: F.softmax(x)[:, 2].sum(), lambda x: F.logsumexp(x, axis=1).sum(), lambda x: F.cross_entropy(x, np.array([2, 2])), lambda x: F.log_softmax(x)[:, 2].sum()):
        assert np.isfinite(grad(f)(x).numpy()).all() and np.isfinite(hessian(f)(x).numpy()).all()
    causal = F.scaled_dot_product_attention(A(1, 4, 2), A(1, 4, 2), np.eye(4)[None], is_causal=True).numpy()[0]
    assert (causal[np.triu_indices(4, 1)] == 0).all()
    close(causal.sum(axis=1), np.ones(4))


def test_binary_cross_entropy_of_large_logits_and_certain_probabilities():
    x, t = np.array([1e4, -1e4, 1e4, -1e4], np.float32), np.array([1, 0, 0, 1], np.float32)
    loss, slope = value_and_grad(F.binary_cross_entropy_with_logits)(x, t)
    close(loss, 5e3)
    close(slope, np.array([0, 0, 0.25, -0.25]))
    close(F.binary_cross_entropy([1.0, 0.0], [1.0, 0.0]), 0.0)
    close(F.binary_cross_entropy([0.0, 1.0], [1.0, 0.0]), 100.0)
    assert np.isfinite(grad(F.binary_cross_entropy)(np.array([1.0, 0.0, 1.0, 0.5]), np.array([1.0, 0.0, 1.0, 0.0])).numpy()).all()


@pytest.mark.parametrize("width", [1, 2, 3, 48, 64, 100, 768])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, -1e4 / 3])
def test_normalization_of_constant_rows_gives_the_bias(width, value):
    rows = np.full((2, width), value, np.float32)
    x, weight, bias = Tensor(rows), np.full(width, 2, np.float32), np.linspace(0, 1, width, dtype=np.float32)
    y = F.layer_norm(x, weight, bias)
    y.backward(np.ones((2, width)))
    assert np.isfinite(x.grad.numpy()).all()
    close(y, np.broadcast_to(bias, (2, width)), atol=1e-3)
    images = Tensor(rows.reshape(2, width, 1, 1) * np.ones((1, 1, 2, 3), np.float32))
    y = F.batch_norm(images, np.zeros(width, np.float32), np.ones(width, np.float32), weight, bias, training=True)
    y.backward(np.ones(y.shape))
    assert np.isfinite(images.grad.numpy()).all()
    close(y, np.broadcast_to(bias[:, None, None], y.shape), atol=1e-3)


def test_normalization_of_large_numbers_in_float32():
    x = (1e4 * np.random.default_rng(0).uniform(-1, 1, (8, 16))).astype(np.float32)
    ones, zeros = np.ones(16, np.float32), np.zeros(16, np.float32)
    wide = x.astype(np.float64)
    for y, axis in ((F.layer_norm(x, ones, zeros), 1), (F.batch_norm(x, zeros.copy(), ones.copy(), ones, zeros, training=True), 0)):
        close(y, (wide - wide.mean(axis, keepdims=True)) / np.sqrt(wide.var(axis, keepdims=True) + 1e-5), rtol=1e-4, atol=1e-5)


def test_infinities_and_nans_go_through_as_in_numpy():
    x = np.array([np.inf, -np.inf, np.nan, 1.0])
    with np.errstate(all="ignore"):
        for f in (np.exp, np.tanh, np.abs, np.sqrt, np.log1p, lambda x: np.maximum(x, 0), lambda x: np.minimum(x, 0), lambda x: x * 0, lambda x: x - x, np.sum, np.mean, np.max,
                  np.min, lambda x: np.clip(x, -1, 1), lambda x: np.logaddexp(x, x), lambda x: np.logaddexp(x, 0.0), lambda x: x ** 2, lambda x: 1 / x):
            close(f(Tensor(x)), f(x))
            grad(lambda x: np.sum(f(x)))(x)
        close(F.logsumexp(np.array([np.inf, 1.0])), np.inf)
        close(F.sigmoid(x), [1, 0, np.nan, 1 / (1 + math.exp(-1))])
        close(F.softplus(x), [np.inf, 0, np.nan, math.log(1 + math.e)])
        close(grad(lambda x: F.softplus(x).sum())(np.array([np.inf, -np.inf, 0.0])), [1, 0, 0.5])
        assert np.isnan(F.softmax(Tensor([np.nan, 1.0])).numpy()).all() and np.isnan(F.cross_entropy(np.array([[np.nan, 1.0]]), np.array([1])).item())
        assert np.isnan(grad(lambda x: (x * np.nan).sum())(np.ones(2)).numpy()).all()


def test_ties_and_corners():
    one = lambda f, *x: [g.tolist() for g in grad(f, tuple(range(len(x))))(*map(np.array, x))]
    assert one(lambda x: F.relu(x).sum(), [0.0, 1.0, -1.0]) == [[0.0, 1.0, 0.0]]
    assert one(lambda x: F.abs(x).sum(), [0.0]) == [[0.0]]
    assert one(lambda a, b: F.maximum(a, b).sum(), [1.0, 2.0], [1.0, 0.0]) == [[0.5, 1.0], [0.5, 0.0]]
    assert one(lambda a, b: F.minimum(a, b).sum(), [1.0, 2.0], [1.0, 0.0]) == [[0.5, 0.0], [0.5, 1.0]]
    assert one(lambda x: x.max(), [3.0, 1.0, 3.0]) == [[0.5, 0.0, 0.5]]
    assert one(lambda x: x.min(axis=1).sum(), [[1.0, 1.0], [2.0, 1.0]]) == [[[0.5, 0.5], [0.0, 1.0]]]
    assert one(lambda x: F.max_pool2d(x.reshape(1, 1, 2, 2), 2).sum(), [1.0, 3.0, 3.0, 3.0]) == [[0.0, 1.0, 0.0, 0.0]]
    assert one(lambda x: F.clip(x, 0, 1).sum(), [0.0, 1.0, 2.0]) == [[1.0, 1.0, 0.0]]
    for p in (0, 1, 2, 3):
        assert one(lambda x: (x ** p).sum(), [0.0]) == [[1.0 if p == 1 else 0.0]]
    assert one(lambda x: (x ** np.array([0.0, 1.0, 2.0])).sum(), [0.0, 0.0, 0.0]) == [[0.0, 1.0, 0.0]]
    assert one(lambda x, p: (x ** p).sum(), [0.0, 0.0], [1.0, 2.0]) == [[1.0, 0.0], [0.0, 0.0]]
    assert hessian(lambda x: (x ** 2).sum())(np.zeros(2)).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    assert grad(grad(grad(lambda x: x ** 3)))(0.0).item() == 6.0
    assert F.var(np.ones((0, 3)), axis=1).shape == (0,) and F.sum(np.ones((0, 3))).item() == 0
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile

import numpy as np
import pytest

import nanoad

# ## Data files
#
# The tests bring their own miniature data sets: the loaders read where `_SOURCES` points them, and
# a server on the loopback interface plays every kind of bad mirror.

TEXT = "tinyshakespeare/input.txt"
CIFAR = "cifar10/cifar-10-binary.tar.gz"


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def cifar_archive(records=2, leave_out=(), cut=0, extra=()):
    """A .tar.gz laid out as CIFAR-10's, of `records` photographs in each batch."""
    rng, buffer = np.random.default_rng(1), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for member in extra:
            archive.addfile(member)
        for batch in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            data = rng.integers(0, 10, (records, 3073), dtype=np.uint8).tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{batch}.bin")
            member.size = len(data) - cut
            if batch not in leave_out:
                archive.addfile(member, io.BytesIO(data[:member.size]))
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder; `.expect(name, content, *mirrors)` says what a file must hold."""
    monkeypatch.setenv("NANOAD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(nanoad, "_SOURCES", {})

    class Folder(type(tmp_path)):
        def expect(self, name, content, *mirrors):
            digest = hashlib.sha256(content).hexdigest()
            nanoad._SOURCES[name] = (mirrors, len(content), digest)
            return self / name

    return Folder(tmp_path / "data")


class BadMirror(http.server.BaseHTTPRequestHandler):
    """/behaviour/file: misbehaves in the way the first part of the path says."""

    def do_GET(self):
        good, self.close_connection = self.server.content, True
        how = self.path.split("/")[1]
        self.server.asked.append(how)
        if how in ("404", "500"):
            return self.send_error(int(how))
        if how == "silent":
            self.server.over.wait(5)
            return None
        if how == "gibberish":
            return self.wfile.write(b"\0\1\2\3 not HTTP at all\r\n\r\n")
        body = {"html": b"<!DOCTYPE html><title>Log in</title>", "wrong": good[::-1], "empty": b"",
                "short": good[:len(good) // 2], "endless": good * 50}.get(how, good)
        self.send_response(200)
        self.send_header("Content-Length", str(len(good) if how in ("dropped", "trickle")
                                               else len(body)))
        self.end_headers()
        if how == "trickle":
            with contextlib.suppress(OSError):
                while not self.server.over.wait(0.05):
                    self.wfile.write(b"x")
        else:
            with contextlib.suppress(OSError):
                self.wfile.write(body[:len(body) // 2] if how == "dropped" else body)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadMirror)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.over, server.asked = threading.Event(), []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 2000


def test_a_file_in_the_data_folder_is_used_and_its_content_is_checked(data_folder):
    put(data_folder.expect(TEXT, PLAY), PLAY)
    assert nanoad.load_tinyshakespeare() == PLAY.decode()


@pytest.mark.parametrize("how", ["404", "500", "gibberish", "html", "wrong", "empty", "short",
                                 "dropped", "endless", "silent", "trickle"])
def test_a_bad_mirror_is_passed_over_for_the_next(data_folder, mirror, monkeypatch, how):
    monkeypatch.setattr(nanoad, "_TIMEOUT", 0.3)
    mirror.content = PLAY
    path = data_folder.expect(TEXT, PLAY, f"{mirror.url}/{how}/{{}}", mirror.url + "/good/{}")
    start = time.monotonic()
    assert nanoad.load_tinyshakespeare() == PLAY.decode()
    assert time.monotonic() - start < 2 and mirror.asked == [how, "good"]
    assert path.read_bytes() == PLAY and os.listdir(path.parent) == ["input.txt"]
    nanoad.load_tinyshakespeare()
    assert mirror.asked == [how, "good"]  # the second time the file is there


@pytest.mark.parametrize("how", ["404", "html", "dropped", "silent"])
def test_without_a_good_mirror_the_error_says_what_to_do(data_folder, mirror, monkeypatch, how):
    monkeypatch.setattr(nanoad, "_TIMEOUT", 0.3)
    mirror.content = PLAY
    path = data_folder.expect(TEXT, PLAY, f"{mirror.url}/{how}/{{}}", "http://127.0.0.1:9/{}")
    with pytest.raises(OSError) as caught:
        nanoad.load_tinyshakespeare()
    message = str(caught.value)
    for part in (f"{mirror.url}/{how}/input.txt", "http://127.0.0.1:9/input.txt", str(path),
                 hashlib.sha256(PLAY).hexdigest(), "NANOAD_DATA"):
        assert part in message
    assert not path.exists() and not list(data_folder.rglob("*.tmp"))


def test_a_gzip_mirror_is_unpacked_and_compared_by_content(data_folder, mirror):
    mirror.content = gzip.compress(PLAY, 1)
    data_folder.expect(TEXT, PLAY, mirror.url + "/short/{}.gz", mirror.url + "/good/{}.gz")
    assert nanoad.load_tinyshakespeare() == PLAY.decode()


DAMAGE = {
    "truncated": lambda good: good[:len(good) // 2],
    "an HTML page": lambda good: b"<!DOCTYPE html><html>Sorry</html>",
    "empty": lambda good: b"",
    "one bit": lambda good: good[:200] + bytes([good[200] ^ 1]) + good[201:],
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_reported_and_replaced_once(data_folder, mirror, suffix, damage):
    path = data_folder.expect(TEXT, PLAY, mirror.url + "/good/{}")
    bad = DAMAGE[damage](gzip.compress(PLAY) if suffix else PLAY)
    put(path.with_name(path.name + suffix), bad)
    mirror.content = PLAY
    with pytest.warns(UserWarning) as caught:
        assert nanoad.load_tinyshakespeare() == PLAY.decode()
    message = str(caught[0].message)
    assert hashlib.sha256(PLAY).hexdigest() in message and path.name + suffix in message
    assert "found" in message and caught[0].filename == __file__
    assert nanoad.load_tinyshakespeare() == PLAY.decode()  # without a warning
    assert mirror.asked == ["good"]


def test_a_gzip_bomb_is_not_unpacked(data_folder):
    path = data_folder.expect(TEXT, PLAY)
    put(path.with_name("input.txt.gz"), gzip.compress(bytes(200_000_000), 1))
    with pytest.warns(UserWarning, match="found"), pytest.raises(OSError):
        nanoad.load_tinyshakespeare()


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path, data_folder, mirror):
    mirror.content = PLAY
    path = data_folder.expect(TEXT, PLAY, mirror.url + "/good/{}")
    put(tmp_path / "data", b"a file where the folder should be")
    with pytest.raises(OSError) as caught:
        nanoad.load_tinyshakespeare()
    assert str(path) in str(caught.value)


def test_two_processes_that_download_at_once_both_get_the_file(data_folder, mirror):
    mirror.content = PLAY
    path = data_folder.expect(TEXT, PLAY, mirror.url + "/good/{}")
    program = (f"import nanoad; nanoad._SOURCES = {nanoad._SOURCES!r}\n"
               "for _ in range(20):\n"
               f"    assert nanoad._download({TEXT!r}, {str(path)!r}) == nanoad._content({TEXT!r})")
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(nanoad.__file__))
           + os.pathsep + os.environ.get("PYTHONPATH", "")}
    both = [subprocess.Popen([sys.executable, "-c", program], env=env) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert path.read_bytes() == PLAY and os.listdir(path.parent) == ["input.txt"]


@pytest.fixture
def digits(data_folder):
    """Six digits in each split, in place; returns (images, labels)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    for stem in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            put(data_folder.expect(f"mnist/{stem}-{kind}-ubyte", idx(array)), idx(array))
    return images, labels


def test_load_mnist_gives_floats_in_0_to_1_and_integer_labels(digits):
    images, labels = digits
    for split in ("train", "test"):
        x, y = nanoad.load_mnist(split)
        assert x.shape == (6, 1, 28, 28) and x.dtype == np.float32 and y.dtype == np.int64
        np.testing.assert_array_equal(x[:, 0], images.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(y, labels)
        assert nanoad.load_mnist(split, flatten=True)[0].shape == (6, 784)
    with pytest.raises(ValueError, match="'valid'"):
        nanoad.load_mnist("valid")


def test_load_mnist_refuses_a_label_too_few(digits, data_folder):
    name = "mnist/train-labels-idx1-ubyte"
    put(data_folder.expect(name, idx(np.arange(5))), idx(np.arange(5)))
    with pytest.raises(ValueError, match="expected 6 labels, found 5"):
        nanoad.load_mnist()


GRID = idx(np.zeros((3, 4, 5)))


@pytest.mark.parametrize("raw, complaint", [
    (GRID[:-1], r"expected 60 bytes .* \(3, 4, 5\), found 59"),
    (GRID + b"\0", "found 61"),
    (GRID[:10], "IDX header of 16 bytes.*found 10 bytes"),
    (b"", "found 0 bytes"),
    (b"\0\0\x0d\3" + GRID[4:], "IDX header"),
    (idx(np.zeros(60)), "IDX header"),
    (b"<!DOCTYPE html><html><body>Not found", "DOCTYPE"),
    (GRID[:4] + b"\xff" * 12 + GRID[16:], "found 60"),
])
def test_a_bad_idx_file_is_named_with_what_was_expected_and_found(raw, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        nanoad._read_idx(raw, "images", 3)
    assert str(caught.value).startswith("images: ")


def test_cifar10_is_read_out_of_the_archive(data_folder):
    raw = cifar_archive(records=3)
    put(data_folder.expect(CIFAR, raw), raw)
    x, y = nanoad.load_cifar10()
    assert x.shape == (15, 3, 32, 32) and x.dtype == np.float32 and y.dtype == np.int64
    first = np.random.default_rng(1).integers(0, 10, (3, 3073), dtype=np.uint8)
    np.testing.assert_array_equal(x[:3].reshape(3, -1), first[:, 1:] / np.float32(255))
    np.testing.assert_array_equal(y[:3], first[:, 0])
    assert nanoad.load_cifar10("test")[0].shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="'both'"):
        nanoad.load_cifar10("both")


@pytest.mark.parametrize("raw, complaint", [
    (cifar_archive(leave_out=["data_batch_3"]), "data_batch_3.bin .* found none"),
    (cifar_archive(cut=1), "records of 3073 bytes, found 6,145 bytes"),
    (cifar_archive(cut=2 * 3073), "found 0 bytes"),
    (cifar_archive()[:9000], "whole .tar.gz archive"),
    (b"<html>try again later</html>", "<html>"),
    (gzip.compress(b"not a tar file"), "whole .tar.gz archive"),
    (b"", "found 0 bytes"),
])
def test_a_bad_cifar10_archive_is_named_with_what_was_found(data_folder, raw, complaint):
    put(data_folder.expect(CIFAR, raw), raw)
    with pytest.raises(ValueError, match=complaint) as caught:
        nanoad.load_cifar10()
    assert CIFAR in str(caught.value)


def test_nothing_in_a_hostile_archive_is_written_anywhere(data_folder, tmp_path):
    climber, absolute = tarfile.TarInfo("../../climbed"), tarfile.TarInfo(str(tmp_path / "abs"))
    link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    raw = cifar_archive(leave_out=["data_batch_1"], extra=[climber, absolute, link])
    path = put(data_folder.expect(CIFAR, raw), raw)
    with pytest.raises(ValueError, match="data_batch_1.bin .* found none"):
        nanoad.load_cifar10()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def flips(raw, count=1000):
    rng = np.random.default_rng(0)
    for at, bit in zip(rng.integers(len(raw), size=count), rng.integers(8, size=count)):
        yield raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1:]


@pytest.mark.parametrize("kind", ["idx", "gzip", "cifar"])
def test_a_thousand_flipped_bits_never_give_wrong_data(data_folder, kind):
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 251
    content = cifar_archive(1) if kind == "cifar" else idx(images)
    name = CIFAR if kind == "cifar" else "mnist/train-images-idx3-ubyte"
    path = data_folder.expect(name, content)
    path = put(path, content) if kind != "gzip" else put(path.with_name(path.name + ".gz"), b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for flipped in flips(gzip.compress(content) if kind == "gzip" else content):
            path.write_bytes(flipped)
            try:
                assert nanoad._content(name) == content
            except OSError as error:
                assert str(path).removesuffix(".gz") in str(error)


def test_the_parsers_alone_give_a_clear_error_or_an_array_whatever_the_bytes():
    archive, batches = cifar_archive(1), [f"data_batch_{i}" for i in range(1, 6)]
    for flipped in flips(GRID):
        with contextlib.suppress(ValueError):
            assert nanoad._read_idx(flipped, "images", 3).dtype == np.uint8
    for flipped in flips(archive):
        with contextlib.suppress(ValueError):
            assert nanoad._read_cifar10(flipped, CIFAR, batches)[0].shape[1:] == (3, 32, 32)
    for end in range(0, len(archive), 37):
        with contextlib.suppress(ValueError):
            nanoad._read_cifar10(archive[:end], CIFAR, batches)


# ## DataLoader, CharTokenizer, make_moons


def test_data_loader_covers_everything_once_in_order():
    x, y = np.arange(20).reshape(10, 2), np.arange(10)
    batches = list(nanoad.DataLoader(x, y, batch_size=4))
    assert [len(b) for b, _ in batches] == [4, 4, 2] and len(nanoad.DataLoader(x, y, 4)) == 3
    np.testing.assert_array_equal(np.concatenate([b for b, _ in batches]), x)
    np.testing.assert_array_equal(np.concatenate([t for _, t in batches]), y)
    assert [len(b) for b, _ in nanoad.DataLoader(x, y, 4, drop_last=True)] == [4, 4]
    assert len(nanoad.DataLoader(x, y, 4, drop_last=True)) == 2
    assert len(nanoad.DataLoader(x, y, 5)) == 2 and len(nanoad.DataLoader(x[:0], y[:0], 5)) == 0
    assert list(nanoad.DataLoader(x[:0], y[:0], 5)) == []


def test_data_loader_shuffles_x_with_y_and_manual_seed_fixes_how():
    x = np.arange(50)
    loader = nanoad.DataLoader(x, x * 2, batch_size=7, shuffle=True)
    nanoad.manual_seed(3)
    first, second = [np.concatenate([np.stack(b) for b in loader], axis=1) for _ in range(2)]
    assert (first[1] == 2 * first[0]).all() and sorted(first[0]) == list(x)
    assert (first != second).any()
    nanoad.manual_seed(3)
    np.testing.assert_array_equal(np.concatenate([np.stack(b) for b in loader], axis=1), first)


def test_data_loader_transform_may_write_into_its_batch():
    x, y = np.zeros((6, 2), np.float32), np.arange(6)

    def brighten(batch, rng):
        batch += rng.random() + 1
        return batch[:, :1]

    for shuffle in (False, True):
        for batch, _ in nanoad.DataLoader(x, y, 3, shuffle=shuffle, transform=brighten):
            assert batch.shape == (3, 1) and batch.min() >= 1
    assert not x.any()


@pytest.mark.parametrize("x, y, size, complaint", [
    (np.zeros((5, 2)), np.zeros(4), 2, r"\(5, 2\).*\(4,\)"), (np.zeros(5), 3.0, 2, r"\(5,\)"),
    (np.zeros(5), np.zeros(5), 0, "got 0"), (np.zeros(5), np.zeros(5), -3, "got -3"),
    (np.zeros(5), np.zeros(5), 2.5, "got 2.5"),
])
def test_data_loader_names_the_numbers_that_do_not_fit(x, y, size, complaint):
    with pytest.raises(ValueError, match=complaint):
        nanoad.DataLoader(x, y, batch_size=size)


def test_tokenizer_round_trip():
    text = "To be, or not to be: \u03b1\u03b2 \U0001f3ad\n"
    tokenizer = nanoad.CharTokenizer(text)
    assert tokenizer.chars == "".join(sorted(set(text))) and tokenizer.vocab_size == len(set(text))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids.tolist())
    assert nanoad.CharTokenizer(tokenizer.chars).encode(text).tolist() == ids.tolist()
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""


def test_tokenizer_names_what_it_does_not_know():
    tokenizer = nanoad.CharTokenizer("abc")
    with pytest.raises(ValueError, match="'z' at position 2 .* 3 characters"):
        tokenizer.encode("abzy")
    for ids, complaint in (([0, 3], "id 3 is outside 0..2"), ([-1], "id -1"), ([0.5], "float64"),
                           ([[0, 1]], r"\(1, 2\)"), (1, r"\(\)")):
        with pytest.raises(ValueError, match=complaint):
            tokenizer.decode(ids)


def test_make_moons_makes_two_half_circles():
    nanoad.manual_seed(0)
    x, y = nanoad.make_moons(201, noise=0)
    assert x.shape == (201, 2) and x.dtype == np.float32
    assert y.dtype == np.int64 and sorted(np.bincount(y)) == [100, 101]
    centre = np.stack([y, 0.5 * y], axis=1)
    np.testing.assert_allclose(np.hypot(*(x - centre).T), 1, atol=1e-6)
    assert (np.where(y == 0, 1, -1) * (x - centre)[:, 1] >= -1e-6).all()
    nanoad.manual_seed(0)
    np.testing.assert_array_equal(nanoad.make_moons(201, noise=0)[0], x)
    for bad in ((0, 0.1), (10, -1)):
        with pytest.raises(ValueError, match="make_moons"):
            nanoad.make_moons(*bad)


# ## save and load


def same(a, b):
    if isinstance(a, nanoad.Tensor):
        a = a._data
    if isinstance(a, (np.ndarray, np.generic)):
        return (isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape
                and np.asarray(a).tobytes() == b.tobytes())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return isinstance(b, float) and np.float64(a).tobytes() == np.float64(b).tobytes()
    return type(a) is type(b) and a == b


def small_state():
    return {"model": {"0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, "step": 7,
            "chars": "\nab", "best": 0.1, "rng": [1, 2 ** 100], "done": False, "note": None}


def test_a_state_comes_back_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "floats": [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, float("inf"), -float("inf"),
                   float("nan"), *rng.standard_normal(50).tolist()],
        "ints": [0, -1, 2 ** 63, 2 ** 200, -(10 ** 50)], "bools": [True, False, None],
        "strings": ["", "\u03b1\U0001f3ad\n\0", "\ud800", "NaN"],
        "pair": (1, (2, [3])), "empty": [{}, [], ()],
        "arrays": [np.asfortranarray(rng.random((3, 4))), rng.random((4, 6))[::2, ::3],
                   np.float32(0.1), np.int64(3), np.zeros((0, 3)), np.array(2.5), np.array([True]),
                   np.array(["a", "bc"]), np.arange(3, dtype=">i4"), np.array([np.nan, -0.0])],
        "tensor": nanoad.Tensor([1.0, 2.0]), "rng": rng.bit_generator.state,
    }
    nanoad.save(tmp_path / "state", state)
    assert os.listdir(tmp_path) == ["state"]  # exactly the name that was asked for
    loaded = nanoad.load(str(tmp_path / "state"))
    assert same(state, loaded)
    assert loaded["arrays"][0].flags.writeable
    again = np.random.default_rng()
    again.bit_generator.state = loaded["rng"]
    assert again.random() == rng.random()


def test_states_need_not_be_dicts(tmp_path):
    for state in (np.arange(3), 3, "text", None, [np.zeros(2), {"": np.ones(1)}], {}):
        nanoad.save(tmp_path / "s", state)
        assert same(state, nanoad.load(tmp_path / "s"))


def test_a_checkpoint_is_a_plain_npz_with_dotted_names_and_no_date(tmp_path):
    state = {"model": {"blocks": [{"attn.qkv.weight": np.ones((2, 2))}]}, "lr": 0.5}
    nanoad.save(tmp_path / "a.npz", state)
    nanoad.save(tmp_path / "b.npz", state)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["model.blocks.0.attn.qkv.weight"], np.ones((2, 2)))
        assert json.loads(file["nanoad"].tobytes())["lr"] == 0.5 and len(file.files) == 2
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_names_that_clash_or_are_strange_still_come_back(tmp_path):
    keys = ["nanoad", "a.b", "a", "a.npy", "../../etc/passwd", "/abs", "C:\\x", "nul\0l", "", ".",
            "file", "\ud800", "x" * 5000, "x" * 5000 + "y", "\u03b1", "allow_pickle", "a b", "a_b"]
    state = {key: np.array(i) for i, key in enumerate(keys)}
    state["a"] = {"b": np.array(99), "npy": np.array(98)}
    nanoad.save(tmp_path / "s", state)
    assert same(state, nanoad.load(tmp_path / "s")) and os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("state, complaint", [
    ({"a": {"b": object()}}, "a.b is a object"), ({"a": {3: 1}}, "a has 3"),
    ({"a": [1j]}, "a.0 is a complex"), (print, "the state is a builtin"),
    ({"a": np.array([None, 1])}, "a is an array of objects"),
])
def test_what_cannot_be_saved_is_named_before_any_file_is_touched(tmp_path, state, complaint):
    with pytest.raises(TypeError, match=complaint):
        nanoad.save(tmp_path / "s", state)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    nanoad.save(path, small_state())
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="s.npz is not a whole checkpoint"):
            nanoad.load(path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        nanoad.load(path)


def test_a_checkpoint_with_any_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    nanoad.save(path, small_state())
    for flipped in flips(path.read_bytes()):
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="s.npz is not a whole checkpoint"):
            nanoad.load(path)


def test_what_save_did_not_write_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    (tmp_path / "page.npz").write_text("<!DOCTYPE html>")
    for name in ("other.npz", "page.npz"):
        with pytest.raises(ValueError, match=f"{name} is not a whole checkpoint.*something else"):
            nanoad.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent.npz"):
        nanoad.load(tmp_path / "absent.npz")


def forge(path, members, compression=zipfile.ZIP_STORED):
    """A file with the right digest and whatever members an attacker would like."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.comment = nanoad._STAMP + bytes(64)
        for name, content in members.items():
            archive.writestr(name, content)
    body = path.read_bytes()[:-64]
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())


def npy(array, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def tree(text):
    return npy(np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/nanoad-was-unpickled",)


def absurd():
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10 ** 15,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(80)


HOSTILE = {
    "a pickle": {"nanoad.npy": tree('["array", "a"]'),
                 "a.npy": npy(np.array([Bomb()], dtype=object), allow_pickle=True)},
    "a pickled tree": {"nanoad.npy": npy(np.array([Bomb()], dtype=object), allow_pickle=True)},
    "a path upwards": {"nanoad.npy": tree('["array", "../../b"]'), "../../a.npy": npy(np.ones(2))},
    "no such array": {"nanoad.npy": tree('["array", "b"]')},
    "no such kind": {"nanoad.npy": tree('["set", 1, 2]')},
    "no kind": {"nanoad.npy": tree("[]")},
    "not JSON": {"nanoad.npy": tree("{'a': 1}")},
    "not text": {"nanoad.npy": tree(b"\xff\xfe\x00")},
    "too deep": {"nanoad.npy": tree('{"a":' * 100_000 + "1" + "}" * 100_000)},
    "nothing": {}, "not npy": {"nanoad.npy": b"hello"}, "empty member": {"nanoad.npy": b""},
    "absurd shape": {"nanoad.npy": tree('["array", "a"]'), "a.npy": absurd()},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_forged_checkpoint_is_refused_and_runs_and_writes_nothing(tmp_path, name):
    forge(tmp_path / "forged.npz", HOSTILE[name])
    with pytest.raises(ValueError, match="forged.npz is not a checkpoint written by nanoad.save"):
        nanoad.load(tmp_path / "forged.npz")
    assert os.listdir(tmp_path) == ["forged.npz"]
    assert not os.path.exists("/tmp/nanoad-was-unpickled")


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    members = {"nanoad.npy": tree('["array", "a"]'), "a.npy": npy(np.zeros(10 ** 6))}
    forge(tmp_path / "bomb.npz", members, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        nanoad.load(tmp_path / "bomb.npz")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits of file size are POSIX")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    program = """if True:
        import resource, signal, sys, nanoad, numpy as np
        nanoad.save("last.npz", {"step": 1})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for n in (2_500, 10_000, 1_000_000):
            try:
                nanoad.save("last.npz", {"step": 2, "w": np.zeros(n)})
            except OSError as error:
                assert "last.npz" in str(error) and "untouched" in str(error), error
            else:
                sys.exit("a full disk went unnoticed")
        """
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(nanoad.__file__))
           + os.pathsep + os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    assert nanoad.load(tmp_path / "last.npz") == {"step": 1}
    assert os.listdir(tmp_path) == ["last.npz"]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), KeyboardInterrupt()])
def test_whatever_fails_while_saving_the_old_checkpoint_stays(tmp_path, monkeypatch, step, error):
    nanoad.save(tmp_path / "last.npz", small_state())

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr("builtins.open", fail)
        else:
            patch.setattr(os, step, fail)
        with pytest.raises(type(error), match="last.npz" if isinstance(error, OSError) else None):
            nanoad.save(tmp_path / "last.npz", {"step": 8})
    assert same(small_state(), nanoad.load(tmp_path / "last.npz"))
    assert os.listdir(tmp_path) == ["last.npz"]


def test_a_folder_that_cannot_take_the_file_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    for path, kind in ((tmp_path / "file" / "s.npz", NotADirectoryError),
                       (tmp_path / "missing" / "s.npz", FileNotFoundError),
                       (tmp_path / "folder", IsADirectoryError)):
        with pytest.raises(kind) as caught:
            nanoad.save(path, {"step": 1})
        assert str(path) in str(caught.value)
    assert {p.name for p in tmp_path.rglob("*")} == {"file", "folder"}


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_a_folder_that_became_read_only_keeps_the_old_checkpoint(tmp_path):
    nanoad.save(tmp_path / "last.npz", {"step": 1})
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="untouched"):
            nanoad.save(tmp_path / "last.npz", {"step": 2})
    finally:
        tmp_path.chmod(0o755)
    assert nanoad.load(tmp_path / "last.npz") == {"step": 1}


def test_saving_over_a_link_replaces_what_it_points_at(tmp_path):
    nanoad.save(tmp_path / "real.npz", {"step": 1})
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    nanoad.save(tmp_path / "link.npz", {"step": 2})
    assert (tmp_path / "link.npz").is_symlink()
    assert nanoad.load(tmp_path / "real.npz") == {"step": 2}


# ## draw and plot


def test_draw_as_text_shows_ops_values_shapes_labels_and_gradients():
    x, w = nanoad.Tensor([1.0, 2.0], label="x"), nanoad.Tensor(3.0, label="w")
    x.grad, w.grad = nanoad.Tensor([3.0, 4.0]), nanoad.Tensor(-1.5)
    y = x * w
    z = y + y
    z.label = "z"
    assert nanoad.draw(z, format="text").split("\n") == [
        "z = add  float64[2]",
        "├─ mul  float64[2]  [1]",
        "│  ├─ x  float64[2]  grad norm 5",
        "│  └─ w  3  grad -1.5",
        "└─ [1] above",
    ]
    assert nanoad.draw(nanoad.Tensor(2.5), format="text") == "2.5"
    with pytest.raises(TypeError, match="float"):
        nanoad.draw(2.5, format="text")


def test_draw_as_text_of_a_deep_tape_neither_recurses_nor_goes_on_and_on():
    t = nanoad.Tensor(0.0)
    for _ in range(20_000):
        t = t + t
    lines = nanoad.draw(t, format="text").split("\n")
    assert len(lines) == 201 and "200 lines" in lines[-1]


def test_draw_makes_a_digraph():
    graphviz = pytest.importorskip("graphviz")
    a = nanoad.Tensor(2.0, label='a "\\l')
    graph = nanoad.draw(a * 3 + a, format="png")
    assert isinstance(graph, graphviz.Digraph) and graph.format == "png"
    assert graph.source.count("->") == 4 and "mul" in graph.source and "add" in graph.source


def test_draw_without_graphviz_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(ImportError, match=r"nanoad\[viz\].*text"):
        nanoad.draw(nanoad.Tensor(1.0))


def test_plot_draws_a_curve_and_survives_what_is_not_finite():
    lines = nanoad.plot(np.linspace(5, 1, 500), width=50, height=8).split("\n")
    assert len(lines) == 8 and lines[0].split()[0].startswith("4.9") and lines[0].endswith("╮")
    assert all(len(line) <= 50 for line in lines) and lines[-1].rstrip("─").endswith("╰")
    assert "┤" in nanoad.plot([1.0, np.nan, np.inf, -np.inf, 2.0]) and "─" in nanoad.plot([3])
    assert "no finite" in nanoad.plot([]) and "no finite" in nanoad.plot([np.nan])
    assert len(nanoad.plot([2, 2, 2], height=5).split("\n")) == 5
