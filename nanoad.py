"""nanoad: reverse-mode automatic differentiation, in one file of NumPy.

A Tensor is a NumPy array that remembers where it came from. Ask the last one of a
computation for its derivatives, and every Tensor that it began with learns how much it
mattered:

    >>> x = Tensor([1.0, 2.0, 3.0])
    >>> loss = (x * x).sum()
    >>> loss.backward()
    >>> print(x.grad)
    [2. 4. 6.]
    >>> print(grad(grad(lambda x: x ** 3))(2.0))
    12.0

The file has four parts, and whoever stops early has something whole:

- I, the idea: tensor, operations, the walk back, grad, and what else a walk tells;
- II, the rule book: operations and their derivatives; how to add one and make it fast;
- III, networks: losses, modules, optimizers, convolution, normalization, attention, a
  GPT, many cores;
- IV, the craft, which a good tool needs and the idea does not: the watch over writes,
  memory, nests, the machine, workers, data, saving, drawing; decompositions, NumPy's
  other names; an index of names; a tour.

You need NumPy, calculus, and no other file. `python nanoad.py` gives the tour. (After
the imports, which are Python's own and NumPy, the essay begins.)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import heapq
import inspect
import io
import itertools
import math
import operator
import os
import reprlib
import string
import sys
import threading
import time
import types
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np

__version__ = "2.0.0"

# # Part I. The idea
#
# ## I.1 Tensor: what must an array remember?
#
# Take `y = x * w`. If the final result changes by `g` per unit of `y`, then by the
# chain rule it changes by `g * w` per unit of `x`, and by `g * x` per unit of `w`. To
# say that, we must know *which operation* made `y`, *what it was made of*, and the
# *values* that went in. A Tensor is an array that remembers these:
#
#     >>> x, w = Tensor(2.0, label="x"), Tensor(3.0, label="w")
#     >>> y = x * w
#     >>> print(y, y._op.__name__, y._operands[0] is x, y._operands[1] is w)
#     6.0 mul True True
#     >>> print(draw(y, format="text"))
#     mul  6
#     ├─ x  2
#     └─ w  3
#
# All Tensors of one computation, each pointing at its operands, are called the *tape*.
# It is written forwards, and derivatives are read off it backwards.
#
# Three words are used from here to the end. A Tensor is *tracked* if it was made to be
# differentiated by, or was computed from one that was while a tape was written. Any other
# is a *constant*. A *leaf* remembers no operation: a walk back along the tape ends there.


class Tensor:
    """An n-dimensional array that can be differentiated through.

    `data` is anything that NumPy makes an array of, and is copied. Integers and bools
    become float64, since they cannot take the small steps that a derivative is about.
    `dtype` is another floating-point type to convert to. A list that holds Tensors is
    stacked. Raises TypeError for data that are not real numbers.

    With `requires_grad` the Tensor is tracked, else it is a constant. (A tracked copy of
    a tracked Tensor is tied to that one: I.7.) Operators, methods and NumPy's functions
    take everything that is not a Tensor for a constant. Comparisons give plain bool
    arrays.
    """

    __slots__ = (
        "_data",          # the array (a single number may be a NumPy scalar)
        "requires_grad",  # whether it is tracked
        "_grad",          # what `backward` left here, a Tensor, or None
        "label",          # a name, for pictures and messages
        "_time",          # when it was made: operands come before results
        "_op",            # the operation that made it; None for a leaf
        "_operands",      # its arguments by position; () for a leaf, None if let go
        "_settings",      # its arguments by name, such as axis=0
        # Skip these: the fast way back (II.7), the watch over writes (IV.1), what an
        # earlier walk has met (IV.3), and Python's weak references.
        "_pullback", "_written", "_checksum", "_leaves", "__weakref__",
    )

    def __init__(self, data: Any, requires_grad: bool = True, label: str = "",
                 dtype: Any = None) -> None:
        _require_flag("Tensor: requires_grad", requires_grad)
        source = as_tensor(data)
        if dtype is not None:
            source = astype(source, dtype)
        array = np.array(source._data)
        if requires_grad and _mode.recording and source.requires_grad:
            # A tracked copy of a tracked tensor remembers that one, as the result of the
            # operation `identity`. Nested derivatives need this (I.7).
            _fill(self, array, identity, (source,))
        else:
            _fill(self, array, requires_grad=requires_grad)
        self.label = label

    shape = property(lambda self: self._data.shape, doc="The size along each axis.")
    dtype = property(lambda self: self._data.dtype, doc="The elements' NumPy type.")
    ndim = property(lambda self: self._data.ndim, doc="The number of axes.")
    size = property(lambda self: self._data.size, doc="The number of elements.")

    @property
    def data(self) -> np.ndarray:
        """The array, to read and to write.

        What is assigned to it has its shape and dtype, and is taken without a copy.
        """
        return _hand_out(self)  # and watch it (IV.1)

    @data.setter
    def data(self, value: Any) -> None:
        _replace_data(self, value)

    def detach(self) -> Tensor:
        """The same array as a constant: nothing behind it will be differentiated."""
        return _wrap(self._data)

    @property
    def grad(self) -> Tensor | None:
        """What `backward` added up here: a Tensor of this shape and dtype, or None.

        May be set to None, an array of this shape, or a number for all elements.
        """
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self._grad = _as_gradient(value, self)

    def backward(self, grad: Any = None, *, create_graph: bool = False,
                 retain_graph: bool = False, retain_grads: bool = False) -> None:
        """Add the derivatives of this tensor to `.grad` of the leaves it was made from.

        `grad` says how much each element counts (I.3); a scalar counts as 1. The tape
        is let go as it is walked, unless `retain_graph`. `create_graph` makes the
        gradients differentiable in turn (I.6), `retain_grads` leaves `.grad` on every
        tensor, for `draw` to show; both retain the tape. Raises ValueError for a
        non-scalar without `grad`, or a `grad` of another shape; RuntimeError if there is
        no tape.
        """
        _backward(self, grad, create_graph, retain_graph or retain_grads, retain_grads)


Value = Tensor  # as it is called in Karpathy's micrograd
_clock = itertools.count(1)


def _fill(t: Tensor, array: np.ndarray, op: Callable | None = None, operands: tuple = (),
          settings: dict | None = None, pullback: Callable | None = None,
          requires_grad: bool = True) -> Tensor:
    """Give a new tensor its contents. A leaf has no operation and no operands."""
    t._data = array
    t.requires_grad = requires_grad
    t._grad = None
    t.label = ""
    t._time = next(_clock)
    t._op = op
    t._operands = operands
    t._settings = settings or {}
    t._pullback = pullback
    t._written = 0
    t._checksum = None
    t._leaves = None
    return t


def _wrap(array: np.ndarray, requires_grad: bool = False) -> Tensor:
    """A leaf that holds this very array."""
    return _fill(Tensor.__new__(Tensor), array, requires_grad=requires_grad)


def as_tensor(data: Any) -> Tensor:
    """`data` if it is a Tensor, else a constant, not copied. Lists of Tensors stack."""
    if isinstance(data, Tensor):
        return data
    if _holds_tensor(data):
        return stack([as_tensor(item) for item in data])
    return _wrap(_float_array(data))


def _value(a: Any) -> Any:
    """The array of a Tensor; all else as it is."""
    return a._data if isinstance(a, Tensor) else a


def _tracked(a: Any) -> bool:
    return isinstance(a, Tensor) and a.requires_grad


# ## I.2 Operations: what is one?
#
# An operation is a function on ndarrays, with a **VJP rule** for each operand that says
# what the operand receives:
#
#     mul = primitive(lambda g, y, a, b: g * b,   # for a
#                     lambda g, y, a, b: g * a)(  # for b
#                     operator.mul)
#
# Read the first of these two slowly, once. Let `a` move by a small `da`. Then `y = a * b`
# moves by `da * b`. How does the final result L move? `g` holds the slope of L by each
# element of `y`, so L moves by the sum of `g * (da * b)` over all elements. That is the
# sum of `(g * b) * da`. So the slope of L by each element of `a` is what stands before
# `da`: `g * b`. (It has the shape of y. If `a` was stretched to that shape, I.4 sums it
# back.) All rules are found in this way: move an operand, see how the result moves,
# multiply by `g`, add up, and read off the factor. Take `y = sum(a)`: y moves by the sum
# of `da`, and L by `g` times that, which is the sum of `g * da`. So each element of `a`
# receives the same `g`. A rule is given `g`, the result `y` and the operands, and uses
# the ones it needs.
#
# These things have names. The slope `g` of L by each element of an array is the
# **cotangent** of that array. The rule is a vector-Jacobian product, or VJP: it
# multiplies the vector `g` by the matrix of all slopes of `y` by `a`, without ever
# making that matrix.
#
# `primitive` makes an operation of a function and its rules.


def primitive(*rules: Callable | None, each: Callable | None = None) -> Callable:
    """Decorate a function on arrays: it becomes an operation with these VJP rules.

    There is one per operand. A rule `(g, y, *operands, **settings) -> cotangent` is
    array code for ndarrays and Tensors alike; it returns a new array, `g` itself or a
    view of it, and never an operand itself. None stands for an operand without a
    gradient. Whatever else a call is given, by position or by name, are settings, such
    as an axis. An operation on any number of operands gives one rule for all, `each(i,
    g, y, *operands, **settings)` for operand i. (II.1 adds an operation.)
    """
    def decorate(forward: Callable) -> Callable:
        arity = sys.maxsize if each else len(rules)
        operation = _operation(forward, arity)
        operation.rules = rules
        operation.each = each
        return operation

    return decorate


# A call computes on bare arrays. If an operand is tracked, the result remembers the
# operation and its arguments; else it is a constant:
#
#     y = forward(*map(_value, args))
#     return _fill(..., y, operation, args) if any(map(_tracked, args)) else _wrap(y)
#
# The real one does this in two steps more. Usually the arguments are Tensors and
# Python's numbers. Any other call, say with a list, is first made such a one by
# `_admit`. And it is `_compute` that calls `forward`, and explains its errors. (Both
# are in II.9. The `pullback` is None, but for the fused operations of II.7.)


def _operation(forward: Callable, arity: int) -> Callable:
    """The operation that computes `forward`, with `arity` operands, then settings."""

    @functools.wraps(forward)
    def operation(*args: Any, **settings: Any) -> Tensor:
        kinds = set(map(type, args))
        if settings or not (Tensor in kinds and kinds <= _PLAIN):
            args, settings = _admit(operation, args, settings)
        y, pullback, tracked = _compute(operation, forward, args, settings)
        if tracked and _mode.recording:
            return _fill(Tensor.__new__(Tensor), y, operation, args, settings, pullback)
        return _wrap(y)

    operation.arity = arity
    operation.rules = ()  # `primitive` sets them,
    operation.pull = None  # and `fused` another way back (II.7)
    operation.__name__ = operation.__qualname__ = forward.__name__.strip("_")
    return operation


# Here are the first ten operations. The examples use some others from part II, such as
# `sum` and `**`. If a derivative is simpler in terms of the result, the rule uses that:
# the derivative of exp is `y` itself. (`operator.mul(a, b)` is `a * b`. Two are functions
# of our own, for the sake of their names. The annotations are those of the operation.)


@primitive(lambda g, y, x: g)
def identity(x: Any) -> Tensor:
    return x


@primitive(lambda g, y, a, b: g / b,
           lambda g, y, a, b: -g * y / b)
def div(a: Any, b: Any, /) -> Tensor:
    return a / b


neg = primitive(lambda g, y, x: -g)(operator.neg)
add = primitive(lambda g, y, a, b: g,
                lambda g, y, a, b: g)(operator.add)
sub = primitive(lambda g, y, a, b: g,
                lambda g, y, a, b: -g)(operator.sub)
mul = primitive(lambda g, y, a, b: g * b,
                lambda g, y, a, b: g * a)(operator.mul)
exp = primitive(lambda g, y, x: g * y)(np.exp)
log = primitive(lambda g, y, x: g / x)(np.log)
sin = primitive(lambda g, y, x: g * np.cos(x))(np.sin)
cos = primitive(lambda g, y, x: -g * np.sin(x))(np.cos)

# The operators of a Tensor *are* these operations; where the Tensor stands on the
# right, as in `2 - t`, Python asks for the reflected one.
def _reflected(op: Callable) -> Callable:
    def operator_(self: Tensor, other: Any) -> Tensor:
        return op(other, self)

    return operator_


for _name, _f in dict(add=add, sub=sub, mul=mul, truediv=div).items():
    setattr(Tensor, f"__{_name}__", _f)
    setattr(Tensor, f"__r{_name}__", _reflected(_f))
Tensor.__neg__ = neg

# Whether a tape is written can be switched off for a while, in one thread. A class
# attribute is the default of each thread, and `set` replaces it for a while.


class _Mode(threading.local):
    """What each thread has for itself. (Later parts add fields.)"""

    recording = True  # whether a tape is written

    @contextlib.contextmanager
    def set(self, **fields: Any) -> Iterator[None]:
        """Inside, the fields have these values; afterwards all is as before."""
        before = {name: getattr(self, name) for name in fields}
        self.__dict__.update(fields)
        try:
            yield
        finally:
            self.__dict__.update(before)


_mode = _Mode()


def no_grad() -> contextlib.AbstractContextManager:
    """A context manager or, with its parentheses, a decorator: no tape is written."""
    return _mode.set(recording=False)


# ## I.3 The naive walk: which order is right?
#
# How does one number at the end become a derivative for everything at the start? Let the
# end be a scalar, L. Its own cotangent is 1. (To start from an array y with a cotangent g
# means to take `L = sum(g * y)`.) Now step backwards. If `y = f(a, b)` has the cotangent
# `g`, the rules of f say what `a` and `b` receive by way of y. A tensor that is used in
# several places receives a share from each, and by the chain rule the shares add up.
#
# So a walk keeps a list of the tensors that wait, each with the sum of what it has
# received so far. It takes one of them, hands its cotangent through the rules, and adds
# the shares to the operands, which then wait, too. Which one does it take? The youngest:
#
#     >>> def naive_walk(end):
#     ...     waiting = {end: 1.0}
#     ...     while waiting:
#     ...         t = max(waiting, key=lambda t: t._time)  # the youngest
#     ...         g = waiting.pop(t)
#     ...         if t._op is None:
#     ...             t.grad = g  # a leaf: nothing is behind it
#     ...             continue
#     ...         for a, rule in zip(t._operands, t._op.rules):
#     ...             share = rule(g, t._data, *map(_value, t._operands))
#     ...             waiting[a] = waiting.get(a, 0) + share
#     ...
#     >>> x = Tensor(3.0)
#     >>> naive_walk(x * x + x)
#     >>> print(x.grad)  # 2 x + 1
#     7.0
#
# (As keys of a dict, two tensors are two, however equal their values: II.8.)
#
# That is reverse-mode differentiation. Each operation is visited once, and its rules
# cost about what it cost itself: so, however many inputs there are, the walk costs a
# small multiple of the forward pass. That one fact is why neural networks can be
# trained. (An exception are views, such as `x[i]`: it costs nothing, but has a
# cotangent as large as x.)
#
# Why is the youngest right? A result is made after its operands, so *whatever uses t is
# younger than t*. When t is the youngest that waits, nothing that uses it is waiting. And
# nothing that uses it can come to wait later, since from here on only operands are added,
# which are older still. But whatever uses t, and leads to the end, waits at some time: it
# is the end, or an operand of something that has its turn before. So it has had its turn
# already, and the cotangent of t is complete. Take `y = a * b` and `z = y + a`, where a,
# b, y, z have the times 1, 2, 3, 4:
#
#            z:4       what waits, with its cotangent    is taken
#           /   \      z:4 <- 1                          z, whose shares go to y and a
#         y:3    |     y:3 <- 1,  a:1 <- 1               y, whose shares go to a and b
#        /   \   |     b:2 <- a,  a:1 <- 1 + b           b, a leaf
#     b:2     a:1      a:1 <- 1 + b                      a, a leaf, with both its shares
#
# Had `a` been taken before `y`, the share `b` would have come too late.
#
# Where does this walk fail, or waste?
#
# - If `x`, of shape (3,), is added to a table (4, 3), it receives a (4, 3). (I.4)
# - In `2 * x`, the 2 would have to wait, and it has no time. (I.5: who receives)
# - `max` looks at all waiting tensors at each step. (I.5: a heap)
# - Everything stays in memory until the last tensor is dropped. (I.5: letting go)
# - The walk goes to all leaves, even if only one was asked for. (I.5: routes)
# - It overwrites a gradient that was there. For a batch that is too large one calls it
#   twice, with one half each, and wants the sum. (I.5)
# - It leaves a gradient on constants, too. (I.5: who receives)
# - The gradients that it leaves cannot be differentiated again. (I.6)
#
# ## I.4 Broadcasting: what does stretching leave behind?
#
# NumPy stretches a `(3,)` row along a `(4, 3)` table without being asked. Each element
# of the row is then used four times, so it receives the *sum* of four shares: the
# cotangent, `(4, 3)`, is added up over the four rows. The walk does this, and no rule
# mentions it.


def unbroadcast(g: Any, shape: tuple[int, ...]) -> Any:
    """Sum the cotangent `g` over the axes that were stretched from `shape`.

        >>> row = Tensor([1.0, 2.0, 3.0])
        >>> (np.ones((4, 3)) * row).sum().backward()
        >>> print(row.grad, unbroadcast(np.ones((4, 3)), (3,)))
        [4. 4. 4.] [4. 4. 4.]
    """
    extra = g.ndim - len(shape)  # axes that NumPy put in front: here 1
    padded = (1,) * extra + shape  # here (1, 3)
    stretched = tuple(i for i, n in enumerate(g.shape) if n != padded[i])  # here (0,)
    if extra < 0 or any(padded[i] != 1 for i in stretched):
        raise ValueError(f"a cotangent of shape {g.shape} for an operand of shape "
                         f"{shape}, which does not stretch to it: a rule returns the "
                         "shape of its operand, or of y")
    if g.dtype == np.float16:
        g = g.astype(np.float32)  # in float16, many small numbers would not add up
    return np.sum(g, axis=stretched).reshape(shape)


# ## I.5 The real walk: what does care add?
#
# **The walk** is the naive one with a heap instead of `max`. (Python's heap gives out
# the smallest number, so it holds the negative times.) It does not recurse, for a tape
# may be a million operations deep. A time serves as a tensor's name, since no two
# tensors have the same. Its cares A to D are explained below. `route` says what to
# visit; until you come to it, read it as None, which means everything.


def _walk(seeds: list[tuple], route: _Route | None, create_graph: bool,
          retain_graph: bool) -> Iterator[tuple[Tensor, Any]]:
    """Walk back from `seeds`, pairs (tensor, cotangent), and yield such pairs.

    The youngest comes first. A cotangent is an ndarray; with `create_graph`, a Tensor.
    """
    waiting: dict[int, tuple[Tensor, Any]] = {}  # time -> (tensor, its sum of shares)
    heap: list[int] = []  # -time of each that waits

    def receive(t: Tensor, share: Any, g: Any) -> None:
        share = _fit(share, t, g, create_graph)  # (A, B)
        if t._time in waiting:
            share = waiting[t._time][1] + share
        else:
            heapq.heappush(heap, -t._time)
        waiting[t._time] = t, share

    for t, g in seeds:
        receive(t, g, g)
    while heap:
        t, g = waiting.pop(-heapq.heappop(heap))
        yield t, g
        if t._op is None or (route is not None and t._time not in route.through):
            continue  # a leaf, or nothing that was asked for is behind t
        _check_tape(t)  # (C)
        operands = t._operands[:t._op.arity]  # without the settings
        wanted = [isinstance(a, Tensor) and a.requires_grad
                  and (route is None or a._time in route.times) for a in operands]
        pull = t._op.pull or _pull_by_rules
        for a, share in zip(operands, pull(t, g, wanted, create_graph)):
            if share is not None:
                receive(a, share, g)
        share = None  # (D)
        if not (retain_graph or create_graph):
            t._operands = t._settings = t._pullback = None  # (D)


# Who receives? Only a tracked operand on the route is `wanted`; numbers and constants
# receive nothing. And what? `_pull_by_rules` asks the rules. It gives them arrays; with
# `create_graph`, it gives them the Tensors themselves (I.6 says why).


def _pull_by_rules(t: Tensor, g: Any, wanted: list[bool], create_graph: bool) -> list:
    """What each operand of `t` receives from its cotangent `g`; None if not wanted."""
    if create_graph:
        y, args = t, t._operands
    else:
        y, args = t._data, [a._data if isinstance(a, Tensor) else a for a in t._operands]
    # (If there are no rules, there is one for any number of operands.)
    rules = t._op.rules or [functools.partial(t._op.each, i) for i in range(len(wanted))]
    return [rule(g, y, *args, **t._settings) if is_wanted and rule else None
            for rule, is_wanted in zip(rules, wanted)]


# **A.** A cotangent has the shape and dtype of its tensor, even if that was stretched
# (I.4), or the rule computed in another dtype.
#
# **B.** A rule may return `g` itself, as those of `add` do, or a view of it. Then two
# leaves would be handed one array, and whoever wrote to the gradient of one would
# change the other's. So a leaf receives a copy, unless the rule made a new array.
# (Other tensors' cotangents may share their memory, since the walk writes to none.)


def _fit(share: Any, t: Tensor, g: Any, create_graph: bool) -> Any:
    """What a rule returned, given `g`, as its operand `t` may receive it."""
    if isinstance(share, Tensor) and not create_graph:
        share = share._data  # a rule may call operations of ours
    if share.shape != t._data.shape:
        share = unbroadcast(share, t._data.shape)
    if share.dtype != t._data.dtype:
        share = share.astype(t._data.dtype)
    if t._op is None and not create_graph:  # a leaf
        is_new = share is not g and share.base is None  # (a view has a base)
        return share if is_new else share.copy()
    return share


# **C.** The rules read the arrays that t was made of. Are these still there, and as they
# were? An earlier walk may have let them go (D), and somebody may have written to them
# since. Then `_check_tape` (IV.1) raises an error.
#
# **D.** When the walk has passed through a tensor, it lets go of what that was made of,
# so that memory falls as we go. (It lets go of the last share, too, which its name
# would keep while the next shares are computed.)
#
# **The route.** For the derivatives of some outputs by certain inputs, a walk need only
# visit what lies between them. Say we want the derivative of z by x:
#
#     j:1     k:2 = exp(j)     x:3     y:4 = k * x     w:5 = sin(k)     z:6 = y * w
#
# Search back from z to all that it was made of. Then go forwards through what was found:
# on the route are the inputs, and whatever has an operand on the route. The walk goes
# *through* the latter.
#
#     found           6, 5, 4, 3, 2
#     on the route    3; 4, by 3; 6, by 4; and not 5, whose only operand is 2
#
# Why was j not found? A tensor is made of older ones. So k, which is older than x, was
# not made of x, and neither was anything behind k. The time of the oldest input is the
# *horizon*, and where the search meets something older, it turns back. (It notes what it
# met there as `older`, for I.7.)
#
#     >>> j = Tensor(1.0)
#     >>> k = np.exp(j)
#     >>> x = Tensor(2.0)
#     >>> y, w = k * x, np.sin(k)
#     >>> z = y * w
#     >>> route = _find_route([z], [x])
#     >>> print([t._time in route.times for t in (j, k, x, y, w, z)], route.older[0] is k)
#     [False, False, True, True, False, True] True


class _Route(NamedTuple):
    """Which way a walk has to go. (A set of times keeps no tensor alive.)"""

    times: set[int]      # of all tensors on the route
    through: set[int]    # of those among them that have an operand on the route
    older: list[Tensor]  # the tracked ones, met beyond the horizon


def _find_route(outputs: Iterable, inputs: Sequence[Tensor],
                horizon: int | None = None) -> _Route:
    """The route from `outputs` to `inputs`. (IV.2 gives a horizon of its own.)"""
    if horizon is None:
        horizon = min((t._time for t in inputs), default=0)

    older = []
    operands_of: dict[int, list[Tensor]] = {}  # time of a tensor -> its tracked operands
    to_visit = list(outputs)
    while to_visit:
        t = to_visit.pop()
        if not _tracked(t) or t._time in operands_of:
            continue
        if t._time < horizon:
            older.append(t)
            operands_of[t._time] = []  # turn back
            continue
        if t._operands is None:
            _check_not_behind(t, inputs)  # let go (D): raise if one may be (IV.3)
        operands_of[t._time] = [a for a in t._operands or () if _tracked(a)]
        to_visit += operands_of[t._time]

    times = {t._time for t in inputs}
    through = set()
    for moment in sorted(operands_of):  # operands before results
        if any(a._time in times for a in operands_of[moment]):
            through.add(moment)
            times.add(moment)
    return _Route(times, through, older)


# **Users call two functions**, which begin with a cotangent of the output, by default 1:
#
#     backward     for t, g in a walk everywhere:      if t is a leaf, add g to t.grad
#     gradients    for t, g in a walk on the route:    if t is an input, keep g
#
# What they keep has memory of its own. At a leaf, that is so already (B).


def _to_keep(t: Tensor, g: Any) -> Tensor:
    """The cotangent `g` of `t`, to be kept: a Tensor with memory of its own."""
    if isinstance(g, Tensor):
        return _copy(g)
    return _wrap(np.asarray(g) if t._op is None else np.array(g))


def _backward(output: Tensor, grad: Any, create_graph: bool, retain_graph: bool,
              retain_grads: bool) -> None:
    if not output.requires_grad:
        raise RuntimeError("backward: this tensor was made of constants or inside "
                           "no_grad(), so there is no tape to walk back on")
    seed = _first_cotangent("backward", output, grad, create_graph)
    leaves = types.SimpleNamespace(times=set(), complete=False)  # that the walk meets
    with _mode.set(recording=create_graph):
        for t, g in _walk([(output, seed)], None, create_graph, retain_graph):
            t._leaves = leaves  # t was made of no others (IV.3)
            if t._op is None:
                leaves.times.add(t._time)
            if t._op is None or retain_grads:
                _accumulate(t, _to_keep(t, g))  # t.grad = t.grad + g
    leaves.complete = True


# The second comes in three layers:
#
#     function       what it adds                               who calls it
#     `gradients`    checks what it is given                    users
#     `_gradients`   zeros for an input that is not reached     transforms (IV.3)
#     `_walk_to`     finds the route, keeps what is asked for   whoever wants no zeros


def gradients(output: Tensor, inputs: Tensor | Sequence[Tensor], grad: Any = None, *,
              create_graph: bool = False,
              retain_graph: bool = False) -> tuple[Tensor, ...]:
    """The derivatives of `output` by each of `inputs`, as a tuple.

    They are zeros for an input that had no part. Touches no `.grad`; `grad`,
    `create_graph` and `retain_graph` are as in `Tensor.backward`. (In PyTorch:
    `torch.autograd.grad`.) Raises RuntimeError for an input that is a constant.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    _require_tracked("gradients", inputs)
    seed = _first_cotangent("gradients", output, grad, create_graph)
    slopes = _gradients([(output, seed)], inputs, create_graph, retain_graph)
    if len(set(inputs)) < len(inputs):  # asked for twice: a gradient for each
        slopes = [_copy(slope) for slope in slopes]
    return tuple(slopes)


def _gradients(seeds: list[tuple], inputs: Sequence[Tensor], create_graph: bool,
               retain_graph: bool = False, route: _Route | None = None) -> list[Tensor]:
    """The cotangents that reach `inputs`, to keep; zeros where none does."""
    reached = _walk_to(inputs, seeds, create_graph, retain_graph, route)
    with _mode.set(recording=create_graph):
        return [_to_keep(t, reached[t]) if t in reached
                else _wrap(np.zeros_like(t._data)) for t in inputs]


def _walk_to(inputs: Sequence[Tensor], seeds: list[tuple], create_graph: bool = False,
             retain_graph: bool = False,
             route: _Route | None = None) -> dict[Tensor, Any]:
    """A walk from `seeds` to `inputs`: of each input that it reaches, the cotangent."""
    route = route or _find_route([t for t, _ in seeds], inputs)
    asked = set(inputs)
    with _mode.set(recording=create_graph):
        walk = _walk(seeds, route, create_graph, retain_graph)  # begins in the next line
        return {t: g for t, g in walk if t in asked}


# ## I.6 Twice: why can a gradient be differentiated?
#
# A rule is ordinary array code. Given ndarrays, it computes at NumPy's own speed. Given
# Tensors, *the same text* writes a new tape, and the gradient that it returns can be
# differentiated again. (Where a rule has a function of `np`, NumPy hands the call over
# to us: II.2.)
#
#     >>> rule = mul.rules[0]  # lambda g, y, a, b: g * b
#     >>> print(repr(rule(1.0, None, 2.0, 3.0)), repr(rule(1.0, None, 2.0, Tensor(3.0))))
#     3.0 Tensor(3., dtype=float64)
#
# `create_graph` decides which: with it, the first cotangent is a Tensor, the rules are
# given Tensors (`_pull_by_rules`, I.5), and recording is on during the walk
# (`_walk_to`). The result `y`, too, is then the Tensor, so the derivative of a rule
# that uses it goes on through y. There is no second set of rules that could be wrong.
# The rest of the walk, `+` and the sum in `unbroadcast`, is recorded like the rules.
# The new tape is made of the first one, and younger. So the order of I.3 is right for
# the second walk, too, and the first walk has to retain its tape. Here is `x * x * x`,
# three times over:
#
#     >>> x = Tensor(2.0)
#     >>> y = x * x * x
#     >>> slope, = gradients(y, [x], create_graph=True)
#     >>> bend, = gradients(slope, [x], create_graph=True)
#     >>> third, = gradients(bend, [x])
#     >>> print(slope, bend, third)  # 3 x^2, 6 x, 6
#     12.0 12.0 6.0
#
# ## I.7 grad: how do nested ones stay apart?
#
# How do we turn a function into the function of its derivative? `grad(f)` runs `f` on a
# fresh Tensor that holds your argument, walks the tape this wrote back to it, and
# returns what arrived. No `.grad` is touched. For one argument, a number, it is this:
#
#     >>> def naive_grad(f):
#     ...     def slope(x):
#     ...         x = Tensor(x)  # a new one; if x is tracked, it is still tied to that
#     ...         return gradients(f(x), [x], create_graph=True)[0]
#     ...     return slope
#     ...
#     >>> print(naive_grad(naive_grad(naive_grad(lambda x: x ** 4)))(2.0))  # 4 * 3 * 2 * x
#     48.0
#
# Why does it nest? The outer one hands the inner one a Tensor instead of a number. The
# inner backward pass is array code (I.6), so on Tensors it is recorded, like any other
# computation, and the outer one walks back along it.
#
# Do nested ones get confused? Here the inner derivative is that of `x * y` by y, which
# is `x`. So the outer one asks for the derivative of `x * x`, which is 6 at 3:
#
#     >>> print(grad(lambda x: x * grad(lambda y: x * y)(2.0))(3.0))
#     6.0
#
# An engine that marks "the variable we differentiate by" with a flag on the values may
# move x and y together in the inner function, or take its result for a constant. Then
# its answer is wrong. (This is called perturbation confusion: Siskind and Pearlmutter,
# 2005.) It cannot happen here. Every call makes *new* tensors for its own arguments, and
# keeps the cotangents of *those objects* only. `x`, and whatever is made of x alone, is
# another object and not on the inner route. But the inner result was computed from `x`,
# so the outer walk meets `x` there like any other operand.
#
# The naive one has one fault: *it records every walk*. But nobody can ask for the second
# derivative of a single `grad(f)(3.0)`. Then the walk should run on bare ndarrays, which
# is faster, and the gradient should be a constant. When can somebody ask?
#
# *When the search for the route has met a tracked tensor that is older than our inputs*
# (`older`, I.5). For:
#
# 1. Whoever asks for a derivative later asks by a tensor of their own, which had a part
#    in the gradient. That was computed from y's tape and a constant, the first cotangent.
#    So their tensor is on y's tape, or behind something there.
# 2. It is older than our inputs, which are made when f is called.
# 3. Go from y back to it, step by step. Every tensor on this way is tracked, for it was
#    made of theirs, or is theirs. One of them is the first that is older than our inputs:
#    there the search turns back, and notes it.
#
# (One exception: if f makes a tracked tensor of its own and hands it out, say by
# appending it to a list, that is younger than our inputs, and missed.)
#
#     >>> def careful_grad(f):
#     ...     def slope(x):
#     ...         x = Tensor(x)
#     ...         y = f(x)
#     ...         somebody_may_ask = bool(_find_route([y], [x]).older)
#     ...         return gradients(y, [x], create_graph=somebody_may_ask)[0]
#     ...     return slope
#     ...
#     >>> slope = careful_grad(lambda x: x * x)
#     >>> print(slope(3.0).requires_grad, slope(Tensor(3.0)).requires_grad)
#     False True
#
# Look into `grad(grad(f))(3.0)`, for an f that returns `x * x`:
#
#     a:1    the outer input                    older than b: somebody may ask
#     b:2    identity(a), the inner input       the horizon of the inner search
#     y:3    b * b, the result of f             where the inner search begins
#     s:4    1 * b + 1 * b, the slope           written by the inner walk (three in one)
#
# The inner search goes from y to b, and looks at the operands of b, too, since b is not
# older than the horizon, but just there. So it meets a, and the inner walk is recorded.
# The outer search goes from s by b to a, its own input, and meets nothing older. So the
# outer walk runs on bare arrays.
#
# Can an inner walk let go of a tape that an outer one needs? If it is recorded, it
# retains the tape. If not, it lets go only of tensors made since its inputs. Who could
# still want these? A walk that starts from the gradient; but the gradient is then a
# constant, and no walk starts there.
#
# **If you have come this far, you have the whole idea.** The rest of the file uses it.
# (The `grad` that users call is `careful_grad` for any number of arguments, which may
# also be dicts and lists of arrays. It is in IV.3.)
#
# ## I.8 From vjp to hessian: what else does one walk tell?
#
# The *Jacobian* J has the slope of y_i by x_j in row i, column j. To walk from y with the
# cotangent u is to differentiate `sum_i u_i y_i` (I.3), so x_j receives `sum_i u_i J_ij`:
# the walk computes `J^T u`. Everything below is made of that one product, in a few lines
# each. Let x be a vector, and y = f(x) another.
#
# **Vector times Jacobian (vjp).** f runs once, and then there may be a walk for each u:
#
#     >>> def naive_vjp(f, x):
#     ...     x = Tensor(x)
#     ...     y = f(x)
#     ...     return y, lambda u: gradients(y, [x], u, retain_graph=True)[0]
#
# **Jacobian.** A cotangent that is 1 at one element of the output, and 0 elsewhere, picks
# the slopes of that element, which are a row of J:
#
#     >>> def naive_jacobian(f, x):
#     ...     y, vjp_fn = naive_vjp(f, x)
#     ...     return np.stack([vjp_fn(u) for u in np.eye(y.size)])
#     ...
#     >>> print(*naive_jacobian(lambda x: x ** 2, [1.0, 2.0]))
#     [2. 0.] [0. 4.]
#
# **Hessian.** That is the Jacobian of the gradient:
#
#     >>> print(*naive_jacobian(naive_grad(lambda x: (x ** 3).sum()), [1.0, 2.0]))  # 6 x
#     [6. 0.] [ 0. 12.]
#
# **Hessian times vector (hvp).** A Hessian H is its own transpose, for the second
# derivatives of a smooth f are equal in either order. So `H v` is `H^T v`, which is one
# walk back from the gradient with the cotangent v. It costs as much as a few gradients
# (Pearlmutter, 1994):
#
#     >>> def naive_hvp(f, x, v):
#     ...     x = Tensor(x)
#     ...     slope, = gradients(f(x), [x], create_graph=True)
#     ...     return gradients(slope, [x], v)[0]
#     ...
#     >>> print(naive_hvp(lambda x: (x ** 3).sum(), [1.0, 2.0], [1.0, 1.0]))  # 6 x v
#     [ 6. 12.]
#
# **Jacobian times vector (jvp).** A *tangent* v says how fast the inputs move, and
# forward mode asks how fast f then moves: `J v`. It comes out of two walks back
# (Townsend, 2017):
#
# 1. The first starts from the output, with `create_graph` and a tracked cotangent u. The
#    result is `s = J^T u`. It is linear in u, for every rule is linear in its `g`.
# 2. The second starts from s with the cotangent v, and goes back to u. It multiplies by
#    the transpose of `J^T`, so it gives `J v`. The value of u does not matter, since a
#    linear function has the same slope everywhere: zeros will do. (One exception: equal
#    eigenvalues, IV.10.)
#
# In formulas: `s = J^T u`, so the Jacobian of s by u is `J^T`, and the second walk gives
# `(J^T)^T v = J v`.
#
#     >>> def naive_jvp(f, x, v):
#     ...     x = Tensor(x)
#     ...     y = f(x)
#     ...     u = Tensor(np.zeros(y.shape))
#     ...     s, = gradients(y, [x], u, create_graph=True)
#     ...     return gradients(s, [u], v)[0]
#     ...
#     >>> print(naive_jvp(np.sin, [0.0, np.pi], [2.0, 3.0]))  # cos(x) v
#     [ 2. -3.]
#
# The functions that users call are `grad`, `value_and_grad`, `vjp`, `jvp`, `hvp`,
# `jacobian` and `hessian` (IV.3).


# # Part II. The rule book
#
# ## II.1 How to add an operation, and how to test it
#
# To add an operation, write the function and one rule per operand, and call it by its
# name. The function receives arrays and returns one, so it may use all of NumPy; rules
# may use operators, functions of `np`, and operations. `check_grad` tests the rules:
#
#     >>> @primitive(lambda g, y, x: g / (1 + x * x))
#     ... def my_arctan(x):
#     ...     return np.arctan(x)
#     ...
#     >>> check_grad(my_arctan, np.array([-1.0, 0.5, 2.0]), order=3) < 1e-6
#     True
#     >>> print(grad(grad(my_arctan))(1.0))  # -2x / (1 + x*x)**2
#     -0.5
#
# (If that is too slow, II.7 has a faster kind, for which this is the definition.)
#
# `check_grad` compares the first derivative with differences of the function, then the
# second with differences of the first, and so on, up to `order`. The slope of a
# function by one element x is nearly its *central difference*, `(f(x + h) - f(x - h)) /
# 2h`, with a small h. What the Taylor series has beyond the slope makes an error of
# some h^2, and rounding makes one of some 1e-16 / h. With h = 1e-5 (`eps`), neither
# exceeds some 1e-10. A wrong rule is wrong by far more than `rtol`, 1e-5.
#
# A function that returns an array is tested as one number, a weighted sum of its
# elements. The weights are random: the plain sum of a softmax is 1 whatever x is, so a
# rule that gave zeros would pass.


def check_grad(f: Callable, *args: Any, order: int = 2, rtol: float = 1e-5,
               eps: float = 1e-5) -> float:
    """Compare the derivatives of f, up to `order`, with central differences.

    f takes Tensors and returns one of any shape. It is tested at `args`, in float64,
    for each argument that holds floating-point numbers. Returns the largest error,
    relative to max(1, |derivative|). Raises AssertionError if that exceeds `rtol`, and
    names the worst element and both its values; ValueError if there is nothing to test.
    """
    which = [i for i, a in enumerate(args) if np.asarray(_value(a)).dtype.kind == "f"]
    if order < 1 or not which:
        raise ValueError(f"check_grad: needs an order of at least 1, not {order}, and "
                         "an argument that holds floating-point numbers, such as 3.0")
    args = tuple(as_tensor(np.array(_value(a), np.float64)) if i in which else a
                 for i, a in enumerate(args))

    def weighted(*args: Any) -> Tensor:
        """The weighted sum of f's elements."""
        (y,) = _outputs("check_grad", [f(*args)])  # as a Tensor (IV.3)
        return (y * np.random.default_rng(0).uniform(0.5, 1.5, y.shape)).sum()

    gradient = grad(weighted, which)
    error = _largest_error(weighted, gradient(*args), args, which, rtol, eps)
    if order == 1:
        return error

    def slopes(*args: Any) -> Tensor:
        """All elements of the gradient in one vector: what the next order tests."""
        return concatenate([slope.reshape(-1) for slope in gradient(*args)])

    return max(error, check_grad(slopes, *args, order=order - 1, rtol=rtol, eps=eps))


def _largest_error(f: Callable, slopes: tuple, args: tuple, which: list[int],
                   rtol: float, eps: float) -> float:
    """The largest relative error of f's `slopes` by the arguments `which`."""
    largest, worst = 0.0, ""
    for i, slope in zip(which, slopes):
        for index, analytic in np.ndenumerate(slope._data):
            step = np.zeros(slope.shape)
            step[index] = eps
            above = f(*args[:i], args[i] + step, *args[i + 1:])
            below = f(*args[:i], args[i] - step, *args[i + 1:])
            numeric = (above.item() - below.item()) / (2 * eps)
            error = float(abs(numeric - analytic) / max(1.0, abs(numeric)))
            if math.isnan(error):
                error = math.inf
            if error > largest:
                largest = error
                worst = (f"by argument {i} at index {index}: numeric {numeric:.9g}, "
                         f"analytic {analytic:.9g}")
    if largest > rtol:
        raise AssertionError(f"check_grad: the derivative {worst}")
    return largest


# ## II.2 NumPy: how does `np.exp(t)` arrive here?
#
# Before NumPy computes, it asks any operand of a foreign type. Its elementwise
# functions (the "ufuncs", like exp) call the operand's `__array_ufunc__`, and most
# others call its `__array_function__`. So our `exp` answers `np.exp(t)`:
#
#     >>> t = Tensor([0.0, 1.0])
#     >>> np.exp(t)._op is exp, np.sum(t, axis=0)._op is sum_
#     (True, True)
#
# (`array * t` is np.multiply to NumPy, and arrives here, too.) What becomes of a call?
#
# - The table `_FUNCTIONS` holds every function that has an answer. It begins with those
#   of part I and grows where the operations are defined; IV.11 adds the rest.
# - A function is called with the bare arrays if its derivative is zero wherever it has
#   one, as for `np.sign`, or if it only asks for a shape (`_WITHOUT_GRADIENT`, IV.11).
#   Any other function is, too, if all its Tensors are constants, which have no gradient
#   to lose.
# - Every other call raises TypeError: going on with bare arrays would cut the tape, and
#   the gradient would be wrong.
_FUNCTIONS = {  # a function of NumPy -> ours that answers for it
    np.positive: identity, np.negative: neg,
    np.add: add, np.subtract: sub, np.multiply: mul, np.true_divide: div,
    np.exp: exp, np.log: log, np.sin: sin, np.cos: cos,
}


def _answers(*functions: Callable | None) -> Callable:
    """Decorate the function that answers for these functions of NumPy."""
    def register(answer: Callable) -> Callable:
        for function in functions:
            if function is not None:  # None: the installed NumPy lacks it
                _FUNCTIONS[function] = answer
        return answer

    return register


def _array_ufunc(self: Tensor, ufunc: np.ufunc, method: str, *inputs: Any,
                 **kwargs: Any) -> Any:
    """The result of `ufunc(*inputs, **kwargs)`, where a Tensor is involved."""
    if method == "__call__" and not kwargs and ufunc in _FUNCTIONS:
        return _FUNCTIONS[ufunc](*inputs)  # the usual case

    # What is left has where= or out=, or is np.add.reduce or the like, or is not ours.
    if any(isinstance(a, Tensor) for a in kwargs.get("out", ())):
        raise TypeError(f"numpy.{ufunc.__name__}: out= cannot be a Tensor; use its "
                        "result")
    if ufunc in _WITHOUT_GRADIENT or not any(map(_tracked, inputs)):
        return getattr(ufunc, method)(*map(_value, inputs), **kwargs)

    name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
    raise TypeError(_no_derivative("numpy", name, kwargs))


def _array_function(self: Tensor, function: Callable, types: Any, args: tuple,
                    kwargs: dict) -> Any:
    """The result of `function(*args, **kwargs)`, where an argument holds a Tensor."""
    if function in _FUNCTIONS:
        return _FUNCTIONS[function](*args, **kwargs)

    # The Tensor may be in a list, as for np.block. `_flatten` lists what is in such
    # nests, and `_map_tree` applies a function to it (IV.3).
    items, _ = _flatten((args, kwargs))
    if function in _WITHOUT_GRADIENT or not any(map(_tracked, items)):
        return function(*_map_tree(_value, args), **_map_tree(_value, kwargs))
    raise TypeError(_no_derivative(function.__module__, function.__name__))


# If another function does the same and has a derivative, the message names it.
_INSTEAD = {
    "add.reduce": "np.sum", "multiply.reduce": "np.prod",
    "add.accumulate": "np.cumsum", "multiply.accumulate": "np.cumprod",
    "cumulative_sum": "np.cumsum", "cumulative_prod": "np.cumprod",
    "maximum.reduce": "np.max", "minimum.reduce": "np.min",
    "put": "np.where", "copyto": "np.where", "place": "np.where",
    "multiply.outer": "np.outer", "modf": "np.fmod(t, 1)", "block": "np.concatenate",
}


def _no_derivative(module: str, name: str, options: Iterable[str] = ()) -> str:
    instead = _INSTEAD.get(name, "a function of nanoad.functional")
    with_options = " with " + ", ".join(f"{o}=" for o in options) if options else ""
    return (f"{module}.{name}{with_options}: nanoad has no derivative for this; use "
            f"{instead}, or call an operation of your own (nanoad.primitive), or "
            "t.numpy() if no gradient is wanted")


def _array(self: Tensor, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """The array itself, for which np.asarray and `array[0] = t` ask."""
    if self.requires_grad:
        raise TypeError("a Tensor that needs a gradient is no array, and as one it "
                        "would lose it: use np.stack or np.concatenate to join "
                        "Tensors, nanoad.Tensor([t, u]) for a list of them, and "
                        "t.numpy() if no gradient is wanted")
    return (np.array if copy else np.asarray)(self._data, dtype=dtype)


Tensor.__array_ufunc__ = _array_ufunc
Tensor.__array_function__ = _array_function
Tensor.__array__ = _array

# ## II.3 Element by element: what stands beside g?
#
# Beside g stands the derivative that every table of calculus has. Here an element of
# the result depends on one element of each operand, so each operand receives `g` times
# that derivative, and this section is such a table. `_define` makes one row of it from
# a name, a function and its rules.
_ELEMENT_BY_ELEMENT = "{}, element by element, with NumPy's broadcasting and dtypes."


def _define(name: str, forward: Callable, *rules: Callable,
            answers: Callable | None = None,
            doc: str = _ELEMENT_BY_ELEMENT) -> Callable:
    """Make an operation, which answers for `forward` if that is NumPy's.

    It also answers for `answers`: give that if `forward` is our own or has two names.
    """
    operation = _named(primitive(*rules)(forward), name, doc)
    if isinstance(forward, np.ufunc) or forward.__module__ in ("numpy", "numpy.linalg"):
        _FUNCTIONS[forward] = operation
    if answers is not None:
        _FUNCTIONS[answers] = operation
    return operation


def _named(operation: Callable, name: str, doc: str = _ELEMENT_BY_ELEMENT) -> Callable:
    """Name and document the operation, so that help() shows it as one of ours."""
    operation.__name__ = operation.__qualname__ = name
    operation.__module__ = __name__
    operation.__doc__ = doc.format(name)
    return operation


for _f in _FUNCTIONS.values():  # so far, the operations of part I
    _named(_f, _f.__name__)

exp2 = _define("exp2", np.exp2, lambda g, y, x: g * (y * math.log(2)))
expm1 = _define("expm1", np.expm1, lambda g, y, x: g * (y + 1))
log2 = _define("log2", np.log2, lambda g, y, x: g / (x * math.log(2)))
log10 = _define("log10", np.log10, lambda g, y, x: g / (x * math.log(10)))
log1p = _define("log1p", np.log1p, lambda g, y, x: g / (1 + x))
sqrt = _define("sqrt", np.sqrt, lambda g, y, x: g / (2 * y))
cbrt = _define("cbrt", np.cbrt, lambda g, y, x: g / (3 * y * y))

tan = _define("tan", np.tan, lambda g, y, x: g * (1 + y * y))
arctan = _define("arctan", np.arctan, lambda g, y, x: g / (1 + x * x))
# (1 - x) * (1 + x) is 1 - x^2, and keeps its digits where x is near 1.
arcsin = _define("arcsin", np.arcsin, lambda g, y, x: g / np.sqrt((1 - x) * (1 + x)))
arccos = _define("arccos", np.arccos, lambda g, y, x: -g / np.sqrt((1 - x) * (1 + x)))

sinh = _define("sinh", np.sinh, lambda g, y, x: g * np.cosh(x))
cosh = _define("cosh", np.cosh, lambda g, y, x: g * np.sinh(x))
tanh = _define("tanh", np.tanh, lambda g, y, x: g * (1 - y * y))
arctanh = _define("arctanh", np.arctanh, lambda g, y, x: g / ((1 - x) * (1 + x)))
# These are divided by the roots of x^2 + 1 and x^2 - 1. As x^2 may overflow, `hypot`
# takes the first, and the second is a product of two roots.
arcsinh = _define("arcsinh", np.arcsinh, lambda g, y, x: g / np.hypot(1, x))
arccosh = _define("arccosh", np.arccosh,
                  lambda g, y, x: g / (np.sqrt(x - 1) * np.sqrt(x + 1)))

deg2rad = _define("deg2rad", np.deg2rad, lambda g, y, x: g * (math.pi / 180),
                  answers=np.radians)
rad2deg = _define("rad2deg", np.rad2deg, lambda g, y, x: g * (180 / math.pi),
                  answers=np.degrees)

_copy = _define("copy", lambda x: np.array(x), lambda g, y, x: g, answers=np.copy)


@primitive(lambda g, y, x, dtype: g)
def astype(x: Any, dtype: Any) -> Tensor:
    """x as another floating-point type; the walk converts the gradient back."""
    if np.dtype(dtype).kind != "f":
        raise TypeError(f"a Tensor holds floating-point numbers, not {np.dtype(dtype)}")
    return x.astype(dtype)


# ### One word each: where would calculus alone go wrong?
#
# *Remainders.* Between its jumps, floor(a/b) is a constant. So the remainder `a - b
# floor(a/b)` has slope 1 by a, and -floor(a/b) by b. (fmod has trunc for floor.)
mod = _define("mod", np.remainder,
              lambda g, y, a, b: g,
              lambda g, y, a, b: -g * (a // b))
fmod = _define("fmod", np.fmod,
               lambda g, y, a, b: g,
               lambda g, y, a, b: -g * np.trunc(a / b))

# *Powers.* The slopes of `y = x ** p` are `p x ** (p - 1)` by x, and `y log x` by p:
#
#     slope    where            the formula gives           we take
#     by x     x = p = 0        0 * 0 ** -1 = nan           0 * 0 ** 0 = 0
#     by p     x = 0, p > 0     0 * log 0   = nan           0 * log 1  = 0
#              x = 0, p = 0     1 * log 0   = -inf          1 * log 1  = 0
#              x = 0, p < 0     inf * log 0 = -inf          the same
#              x < 0            nan, and NumPy warns        the same: there is no slope
def _to_the_power(x: Any, p: Any) -> Any:
    """x ** p. Products are ten times faster than the C library's pow."""
    if isinstance(p, (int, float)):
        if p == 1:
            return x
        if p == 2:
            return x * x
        if p == 3:
            return x * x * x
    return x ** p


def _power_slope(x: Any, p: Any) -> Any:
    """p x ** (p - 1)"""
    if isinstance(p, (int, float)) and p != 0:
        return p * _to_the_power(x, p - 1)
    return p * x ** np.where((p == 0) & (x == 0), 0, p - 1)


def _log_of_base(x: Any, p: Any) -> Any:
    """log x; but 0 where x = 0 and p >= 0."""
    return np.log(np.where((x == 0) & (p >= 0), 1, x))


power = _define("power", _to_the_power,
                lambda g, y, x, p: g * _power_slope(x, p),
                lambda g, y, x, p: g * (y * _log_of_base(x, p)),
                answers=np.power)


# *Distance and angle.* `hypot` is the distance of (a, b) from the origin, and its
# slopes are a and b divided by it. At the origin, a kink, they are taken as 0 (0
# divided by 1). `arctan2(a, b)` is the angle whose tangent is t = a/b. The slope of
# arctan, 1 / (1 + t^2), times those of t, 1/b and -a/b^2, gives `b / (a^2 + b^2)` and
# `-a / (a^2 + b^2)`. That sum of squares overflows where its root, the distance, does
# not, so we divide by the distance twice.
hypot = _define("hypot", np.hypot,
                lambda g, y, a, b: g * (a / np.where(y == 0, 1, y)),
                lambda g, y, a, b: g * (b / np.where(y == 0, 1, y)))


def _over_distance_twice(c, a, b):
    """c / (a^2 + b^2), where c is a or b; 0 at the origin."""
    distance = np.hypot(a, b)
    distance = np.where(distance == 0, 1, distance)
    return c / distance / distance


arctan2 = _define("arctan2", np.arctan2,
                  lambda g, y, a, b: g * _over_distance_twice(b, a, b),
                  lambda g, y, a, b: -g * _over_distance_twice(a, a, b))

# *Logarithms of sums.* `log(1 + e^x)` overflows at x = 89 in float32; NumPy's
# logaddexp(x, 0) is the same function and does not. (sigmoid is e^-log(1 + e^-x).) Here
# is what defines y, and its derivative by x (or a), which is then solved for y':
#
#     softplus    e^y = 1 + e^x     e^y y' = e^x        y' = (e^y - 1) / e^y = 1 - e^-y
#     sigmoid     1/y = 1 + e^-x    -y' / y^2 = -e^-x   y' = y^2 (1/y - 1)   = y (1 - y)
#     logaddexp   e^y = e^a + e^b   e^y y' = e^a        y' = 1 / (1 + e^(b - a))
#
# The first is -expm1(-y), the last sigmoid(a - b). For logaddexp2, in powers of 2,
# every exponent is multiplied by log 2, and the slope is sigmoid((a - b) log 2).
softplus = _define("softplus", lambda x: np.logaddexp(x, 0),
                   lambda g, y, x: -g * np.expm1(-y),
                   doc="log(1 + exp(x)), without overflow.")
sigmoid = _define("sigmoid", lambda x: np.exp(-np.logaddexp(-x, 0)),
                  lambda g, y, x: g * (y * (1 - y)),
                  doc="1 / (1 + exp(-x)), without overflow.")
logaddexp = _define("logaddexp", np.logaddexp,
                    lambda g, y, a, b: g * sigmoid(a - b),
                    lambda g, y, a, b: g * sigmoid(b - a))
logaddexp2 = _define("logaddexp2", np.logaddexp2,
                     lambda g, y, a, b: g * sigmoid((a - b) * math.log(2)),
                     lambda g, y, a, b: g * sigmoid((b - a) * math.log(2)))

# ### Choosing: why not multiply by a mask?
#
# An operation that chooses between elements passes the cotangent to the chosen ones and
# 0 to the rest. That looks like `g * mask`. But cotangents can be infinite, as the
# slope of sqrt at 0 is, and `inf * 0` is nan where 0 is wanted.
#
# `np.where(mask, g, 0)` is right, but takes seven times as long as a product when the
# mask is irregular, because the processor cannot predict its jumps. So we do multiply,
# though not the numbers: we multiply their *bits*, read as integers. Times 1, all bits
# stay; times 0, they become the bits of 0.0.
#
#     >>> bits = np.array([np.inf, 1.5]).view(np.int64)
#     >>> print((bits * np.array([False, True])).view(np.float64))
#     [0.  1.5]
#
@primitive(lambda g, y, x, mask: _chosen(g, mask))
def _chosen(x: Any, mask: Any) -> Tensor:
    """x where the bool array `mask`, which broadcasts to x, is True; else 0."""
    y = np.empty_like(x)
    _write_chosen(y, x, mask)
    return y


def _write_chosen(out: np.ndarray, x: np.ndarray, mask: Any) -> None:
    """Write `_chosen(x, mask)` to `out`, an array of the shape and dtype of x."""
    if x.dtype.itemsize > 8:  # there is no integer as long as a longdouble
        out[...] = np.where(mask, x, 0)
    else:
        bits = f"i{x.dtype.itemsize}"
        np.multiply(x.view(bits), np.asarray(mask).view("i1"), out=out.view(bits))


@_answers(np.where)
@primitive(None,
           lambda g, y, c, a, b: _chosen(g, c),
           lambda g, y, c, a, b: _chosen(g, np.logical_not(c)))
def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the bool array `condition` is True, else b.

    The condition has no gradient.
    """
    if np.asarray(condition).dtype.kind != "b":
        raise TypeError("the condition must be a bool array, such as x > 0")
    return np.where(condition, a, b)


# At a kink any slope between the two one-sided ones is right; abs and relu take 0. But
# the rules of abs and hypot multiply by it, which is faster: there, an infinite g gives
# nan, as in PyTorch. (np.clip is NumPy's fastest way to do relu. `y != 0`, unlike
# `y > 0`, lets g pass where y is nan.)
abs_ = _define("abs", np.abs, lambda g, y, x: g * np.sign(x), answers=np.fabs)
relu = _define("relu", lambda x: np.clip(x, 0, np.inf),
               lambda g, y, x: _chosen(g, y != 0),
               doc="max(x, 0), element by element.")


# The chosen one of two operands receives all of g; if they tie, each receives half. Of
# nan and a number, maximum makes nan, and both receive all of g (as in PyTorch). So the
# rule asks whether the *other* differs from the result, and nan differs from all:
#
#                mine  other  y     other != y   mine == other   mine receives
#     maximum    5     3      5     yes          no              g
#                3     5      5     no           no              0
#                3     3      3     no           yes             g/2
#                nan   3      nan   yes          no              g
#                3     nan    nan   yes          no              g
#     fmax       nan   3      3     no           no              0
#                3     nan    3     yes          no              g
def _to_the_chosen(g, y, mine, other):
    """What the operand `mine` receives."""
    return _chosen(g, other != y) + _chosen(0.5 * g, mine == other)


_rules_of_two = (lambda g, y, a, b: _to_the_chosen(g, y, a, b),
                 lambda g, y, a, b: _to_the_chosen(g, y, b, a))
maximum = _define("maximum", np.maximum, *_rules_of_two)
minimum = _define("minimum", np.minimum, *_rules_of_two)
fmax = _define("fmax", np.fmax, *_rules_of_two)
fmin = _define("fmin", np.fmin, *_rules_of_two)

# Within the bounds x equals y, and receives g; nan counts as outside (as in PyTorch).
_clip = _define("clip", lambda x, low, high: np.clip(x, low, high),
                lambda g, y, x, low, high: _chosen(g, x == y))


def clip(x: Any, low: Any = None, high: Any = None) -> Tensor:
    """x limited to [low, high], which are constants. The gradient passes within."""
    if _tracked(low) or _tracked(high):
        raise TypeError("clip: the bounds are constants; for Tensors use maximum and "
                        "minimum")
    return _clip(x, _value(low), _value(high))


# ## II.4 Moving elements: what undoes a move?
#
# A move is undone by sending each element back to where it came from. If an element was
# taken twice, two cotangents arrive there, and they are *added*:
#
#     >>> x = Tensor([1.0, 2.0, 3.0])
#     >>> x[[0, 0, 2]].backward([5.0, 6.0, 7.0])
#     >>> print(x.grad)
#     [11.  0.  7.]
#
# Indexing takes elements out, *scatter-add* puts them back, and each is the other's
# rule. The naive scatter is a loop, `for i, g_i in zip(index, g): out[i] += g_i`. Its
# fast form, `np.bincount([0, 0, 2], weights=[5, 6, 7])`, gives the same 11, 0 and 7.
#
# bincount has one axis. If x has several, number its elements from 0 on, and let the
# index pick numbers. These are the places to add at:
#
#     >>> np.arange(6).reshape(3, 2)[[0, 0, 2]]
#     array([[0, 1],
#            [0, 1],
#            [4, 5]])
#
# An index of numbers and slices, or a mask, names no element twice. For these
# `out[index] = x` is enough.
getitem = _define("getitem", lambda x, index: x[index],
                  lambda g, y, x, index: scatter_add(g, index, x.shape),
                  doc="x[index], with NumPy's basic and advanced indexing.")


@primitive(lambda g, y, x, index, shape: g[index])
def scatter_add(x: Any, index: Any, shape: tuple) -> Tensor:
    """Zeros of `shape`, with the elements of x added at `index`."""
    out = np.zeros(shape, x.dtype)
    if _names_none_twice(index):
        out[index] = x
        return out
    if x.dtype.itemsize > 8:
        np.add.at(out, index, x)  # bincount would round a longdouble
        return out

    places = np.arange(out.size).reshape(shape)[index]
    weights = np.broadcast_to(x, places.shape)
    sums = np.bincount(places.ravel(), weights.ravel(), out.size)  # (out.size,)
    return sums.reshape(shape).astype(x.dtype)


def _names_none_twice(index: Any) -> bool:
    """Whether `index` is a mask, or has only numbers, slices, None and `...`."""
    if isinstance(index, np.ndarray):
        return index.dtype == bool
    entries = index if isinstance(index, tuple) else (index,)
    harmless = (int, np.integer, slice, type(None), type(...))
    return all(isinstance(entry, harmless) for entry in entries)


# ### Any move: where did each element come from?
#
# An operation that only moves or repeats elements needs no rule of its own. Let NumPy
# move the *positions* 1, 2, 3, ... instead of the elements: the result tells where each
# element came from, and its cotangent goes there. Take tril, which fills the upper
# triangle with zeros:
#
#     positions   moved    cotangent   x receives
#       1 2        1 0        5 6         5 0       6 goes to position 0, which stands
#       3 4        3 4        7 8         7 8       for all zeros, and is cut off
_like_np = functools.partial(_define, doc="As np.{}, with the same arguments.")


def _moves(name: str, move: Callable, answers: Callable | None = None) -> Callable:
    """The operation `move`, whose result holds elements of its argument, and zeros."""
    def send_back(g, y, x, *settings, **named_settings):
        positions = np.arange(1, x.size + 1).reshape(x.shape)
        came_from = move(positions, *settings, **named_settings)  # y's shape
        received = scatter_add(g, came_from, (x.size + 1,))  # by position
        return received[1:].reshape(x.shape)

    return _like_np(name, move, send_back, answers=answers)


roll = _moves("roll", np.roll)
flip = _moves("flip", np.flip)
rot90 = _moves("rot90", np.rot90)
repeat = _moves("repeat", np.repeat)
tile = _moves("tile", np.tile)
diag = _moves("diag", np.diag)
diagonal = _moves("diagonal", np.diagonal)
tril = _moves("tril", np.tril)
triu = _moves("triu", np.triu)
take = _moves("take",
              lambda a, indices, axis=None, *, mode="raise":
              np.take(a, indices, axis, mode=mode),
              answers=np.take)
take_along_axis = _moves("take_along_axis",
                         lambda arr, indices, axis=-1:
                         np.take_along_axis(arr, indices, axis),
                         answers=np.take_along_axis)


# Sorting moves elements, too; argsort tells which. (By default, ties keep their order.)
@_answers(np.sort)
def sort(x: Any, axis: int | None = -1, kind: str | None = None) -> Tensor:
    """A copy of x, sorted along an axis (also as `t.sort()`); None flattens x first."""
    x = as_tensor(x)
    if axis is not None:
        _axes("sort", x, axis)  # (II.5) raises an error that names the shape
    order = np.argsort(_value(x), axis, kind or "stable")
    return take_along_axis(x, order, axis)


# ### The same elements in another shape: what undoes a view?
#
# Another view undoes it. NumPy makes views without touching an element, and the rules
# need not touch one, either. To undo a new shape, the rule restores the shape of x.
#
# To undo an order of the axes, such as (2, 0, 1), say where each axis of x is now: axis
# 0 is at place 1, axis 1 at place 2, axis 2 at place 0. These places, (1, 2, 0), are
# the order for the way back. np.argsort finds them.
def _in_the_shape_of_x(g, y, x, *_, **__):
    return g.reshape(x.shape)


def _permuted_back(g, y, x, *axes):
    if not axes or axes[0] is None:  # the axes were reversed
        return g.T
    order = np.ravel(axes) % x.ndim  # from numbers or from a tuple
    return g.transpose(np.argsort(order))


reshape = _like_np("reshape", lambda x, *shape: x.reshape(*shape), _in_the_shape_of_x)
expand_dims = _like_np("expand_dims", lambda x, axis: np.expand_dims(x, axis),
                       _in_the_shape_of_x, answers=np.expand_dims)
squeeze = _like_np("squeeze", lambda x, axis=None: np.squeeze(x, axis),
                   _in_the_shape_of_x, answers=np.squeeze)
transpose = _like_np("transpose", lambda x, *axes: x.transpose(*axes), _permuted_back)
swapaxes = _like_np("swapaxes", lambda x, axis1, axis2: x.swapaxes(axis1, axis2),
                    lambda g, y, x, axis1, axis2: g.swapaxes(axis1, axis2),
                    answers=np.swapaxes)
moveaxis = _like_np("moveaxis",
                    lambda x, source, destination: np.moveaxis(x, source, destination),
                    lambda g, y, x, source, destination:
                    np.moveaxis(g, destination, source),
                    answers=np.moveaxis)
# (The walk sums over the copies: I.4.)
broadcast_to = _like_np("broadcast_to", lambda x, shape: np.broadcast_to(x, shape),
                        lambda g, y, x, shape: g,
                        answers=np.broadcast_to)


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """x with the axes `start_dim` to `end_dim` joined into one, as in torch.flatten."""
    shape = np.shape(_value(x)) or (1,)  # a single number becomes a vector
    axes = range(len(shape))
    try:
        first, last = axes[start_dim], axes[end_dim]  # axes[-1] is the last
        if first > last:
            raise IndexError
    except (IndexError, TypeError):
        raise ValueError(f"flatten of shape {shape}: there are no axes {start_dim!r} "
                         f"to {end_dim!r}") from None
    joined = math.prod(shape[first:last + 1])
    return reshape(x, (*shape[:first], joined, *shape[last + 1:]))


# ### Joined, cut, and framed: whose slice is it?
#
# Each operand of a concatenation receives the slice of g that lies where the operand
# was put: operands of 2 and 3 rows receive `g[0:2]` and `g[2:5]`. One rule, `each`
# (I.2), serves any number of operands. (`_with_shape`, II.6, makes arrays of lists and
# numbers.)
def _narrow(x: Any, axis: int, start: int, n: int) -> Any:
    """x[start:start + n] along an axis, as in torch.narrow."""
    before = (slice(None),) * (axis % x.ndim)
    return x[(*before, slice(start, start + n))]


def _slice_of_operand(i, g, y, *xs, axis):
    start = sum(x.shape[axis] for x in xs[:i])
    return _narrow(g, axis, start, xs[i].shape[axis])


@primitive(each=_slice_of_operand)
def _concatenate(*xs: Any, axis: int) -> Tensor:
    return np.concatenate(xs, axis)


@_answers(np.concatenate)
def concatenate(tensors: Sequence, axis: int | None = 0) -> Tensor:
    """The tensors joined end to end along an axis; None flattens them first."""
    if axis is None:
        return _concatenate(*(np.reshape(t, -1) for t in tensors), axis=0)
    return _concatenate(*map(_with_shape, tensors), axis=axis)


@_answers(np.stack)
def stack(tensors: Sequence, axis: int = 0) -> Tensor:
    """The tensors, all of one shape, side by side along a new axis."""
    shapes = {np.shape(t) for t in tensors}
    if len(shapes) != 1:
        raise ValueError(f"stack: needs tensors of one shape, and got {sorted(shapes)}")
    return concatenate([np.expand_dims(_with_shape(t), axis) for t in tensors], axis)


def split(x: Any, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """x cut along an axis into equal sections (a number) or at indices (a list)."""
    return _cut(np.split, x, sections, axis)


def _cut(cut: Callable, x: Any, where_to_cut: Any, axis: int) -> list[Tensor]:
    """x cut along an axis where `cut`, such as np.split, cuts the row 0, 1, 2, ..."""
    x = as_tensor(x)
    try:
        pieces = cut(np.arange(x.shape[axis]), where_to_cut)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"split of shape {x.shape} along axis {axis}: "
                         f"{error}") from None
    return [_narrow(x, axis, piece[0] if piece.size else 0, piece.size)
            for piece in pieces]


# A frame of x's own elements is a move, like those above. A frame of constants is cut
# off on the way back.
_pad_with_elements = _moves("pad",
                            lambda x, pad_width, mode: np.pad(x, pad_width, mode))


def _without_frame(g, y, x, pad_width, value):
    before = np.broadcast_to(pad_width, (x.ndim, 2))[:, 0]  # (x.ndim,)
    return g[tuple(slice(b, b + n) for b, n in zip(before, x.shape))]


_pad_with_constant = _define("pad",
                             lambda x, pad_width, value:
                             np.pad(x, pad_width, constant_values=value),
                             _without_frame)


@_answers(np.pad)
def pad(x: Any, pad_width: Any, mode: str = "constant", *,
        constant_values: float = 0) -> Tensor:
    """x in a frame of zeros, or of other `constant_values`.

    `pad_width` is a number, (before, after), a pair per axis, or {axis: pair}. In the
    modes "edge", "reflect", "symmetric" and "wrap" of np.pad, the frame is made of
    elements of x. Raises TypeError for other modes.
    """
    if isinstance(pad_width, dict):
        pairs = np.zeros((np.ndim(x), 2), int)
        for axis, pair in pad_width.items():
            pairs[axis] = pair
        pad_width = pairs
    if mode in ("edge", "reflect", "symmetric", "wrap"):
        return _pad_with_elements(x, pad_width, mode)
    if mode != "constant":
        raise TypeError(f"pad: no derivative for mode={mode!r}; there is one for "
                        "constant, edge, reflect, symmetric and wrap")
    return _pad_with_constant(x, pad_width, constant_values)


# ## II.5 Reductions: what does a sum hand back?
#
# A sum hands its cotangent, unchanged, to every element that it added up. Take x of
# shape (4, 3) and `y = sum(x, axis=0)`, of shape (3,). If one element `x[i, j]` moves
# by `dx`, `y[j]` moves by the same `dx`, and L by `g[j] * dx`. So `x[i, j]` receives
# `g[j]`, whatever i is. In arrays, g of shape (3,) regains the axis that was summed
# away, which gives (1, 3), and is stretched along it to (4, 3):
#
#     >>> def stretched(g, y, x, axis):
#     ...     return np.broadcast_to(np.expand_dims(g, axis), x.shape)
#     ...
#     >>> @primitive(stretched)
#     ... def naive_sum(x, axis):
#     ...     return np.sum(x, axis)
#     ...
#     >>> x = Tensor(np.ones((4, 3)))
#     >>> naive_sum(x, 0).backward([1.0, 2.0, 3.0])
#     >>> print(x.grad[0], x.grad[3])
#     [1. 2. 3.] [1. 2. 3.]
#
# The real rule is the same, also for several axes or all. A mean of n elements hands an
# n-th of g to each. (`_fast_sum`, np.sum in less time, stands at the section's end.)
def _restore(r: Any, x: Any, axis: Any) -> Any:
    """r, a reduction of x, with the lost axes as axes of length 1."""
    if axis is None or r.ndim == x.ndim:  # a number, or the axes were kept
        return r
    return np.expand_dims(r, axis)


def _count(x: Any, y: Any) -> int:
    """How many elements of x went into each element of y, a reduction of x."""
    return x.size // max(1, y.size)


@primitive(lambda g, y, x, axis=None, keepdims=False:
           np.broadcast_to(_restore(g, x, axis), x.shape))
def sum_(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The sum over all elements, or over the axes given."""
    return _fast_sum(x, axis, keepdims).astype(x.dtype, copy=False)


# (The `max` is for an empty x: dividing by 0 would warn.)
@primitive(lambda g, y, x, axis=None, keepdims=False:
           np.broadcast_to(_restore(g, x, axis) / max(1, _count(x, y)), x.shape))
def mean(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The mean over all elements, or over the axes given."""
    total = _fast_sum(x, axis, keepdims)
    return (total / _count(x, total)).astype(x.dtype, copy=False)


@_answers(np.trace)
def trace(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Tensor:
    """The sum along a diagonal."""
    return sum_(diagonal(x, offset, axis1, axis2), -1)


# ### Spread and extremes: what of equal elements?
#
# The variance is the mean square of `x - mean(x)`. Written like this, it needs no rule,
# and neither does its root, `std`. But if all elements are equal, the variance is 0,
# and the slope of the root is infinite. We want the slope 0 there. It is not enough to
# choose 0 *after* the root, for the root's rule would still divide by 0, and 0 / 0 is
# nan. So the root is taken of 1 there, and then dropped.
def var(x: Any, axis: int | tuple | None = None, ddof: int = 0,
        keepdims: bool = False) -> Tensor:
    """The variance, with divisor n - ddof, as in np.var (torch.var has ddof=1)."""
    x = as_tensor(x)
    if x.dtype == np.float16:  # its squares overflow from 256 on
        return astype(var(astype(x, np.float32), axis, ddof, keepdims), np.float16)

    total = sum_(x, axis, keepdims=True)
    n = _count(x, total)
    if n <= ddof and total.size:
        raise ValueError(f"var of shape {x.shape} over axis {axis}: {n} elements are "
                         f"too few for ddof={ddof}")
    centred = x - total / n
    return sum_(centred * centred, axis, keepdims) / (n - ddof)


def std(x: Any, axis: int | tuple | None = None, ddof: int = 0,
        keepdims: bool = False) -> Tensor:
    """The standard deviation, the root of `var`. Equal elements have the gradient 0."""
    variance = var(x, axis, ddof, keepdims)
    is_zero = variance == 0
    root = sqrt(where(is_zero, 1, variance))
    return where(is_zero, variance, root)


# The largest (or smallest) element receives the cotangent. Several that tie share it
# evenly: the maximum of [3, 1, 3] hands back [g/2, 0, g/2]. If an element is nan, so is
# the result, and all receive nan. (In `maximum`, both receive g: so it is in PyTorch.)
def _to_ties(g, y, x, axis=None, keepdims=False):
    y = _restore(y, x, axis)
    g = _restore(g, x, axis)
    is_nan = np.isnan(y)
    winners = (x == y) | is_nan
    count = np.sum(winners, axis, keepdims=True)
    shares = np.where(is_nan, np.nan, g / count).astype(g.dtype)
    return _chosen(np.broadcast_to(shares, x.shape), winners)


@primitive(_to_ties)
def max_(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The largest element, or the largest over the axes given."""
    return np.max(x, axis, keepdims=keepdims)


@primitive(_to_ties)
def min_(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The smallest element, or the smallest over the axes given."""
    return np.min(x, axis, keepdims=keepdims)


# ### Softmax: how do large exponentials add up?
#
# Large exponentials overflow: in float32, e^89 is infinite. But a number that is
# subtracted from all of x cancels in `softmax(x) = e^x / sum(e^x)`. If that is the
# largest element, no exponential exceeds e^0 = 1. `logsumexp`, the logarithm y of the
# sum, adds it back at the end. Its slope by x_j is `e^x_j / sum(e^x)`, the softmax
# again, and that is `e^(x_j - y)`, since `sum(e^x) = e^y`.
@primitive(lambda g, y, x, axis=None, keepdims=False:
           _restore(g, x, axis) * np.exp(x - _restore(y, x, axis)))
def logsumexp(x: Any, axis: int | tuple | None = None,
              keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))), without overflow.

    If all x are -inf, it is -inf, with gradient nan.
    """
    top = np.max(x, axis=axis, keepdims=True)
    # (-inf - -inf would be nan.)
    top = np.where(np.isfinite(top), top, x.dtype.type(0))
    with np.errstate(divide="ignore"):  # log(0)
        y = np.log(_fast_sum(np.exp(x - top), axis, keepdims=True)) + top
    return (y if keepdims else np.squeeze(y, axis)).astype(x.dtype, copy=False)


# The rule of `y = softmax(x)` is easier to find for its logarithm, `z_i = x_i - log S`,
# where S is the sum of all e^x_k. The slope of log S by x_j is `e^x_j / S = y_j`, as
# above. Let x_j move by dx:
#
#     z_i moves by     ([i = j] - y_j) dx           [i = j] is 1 for i = j, else 0
#     x_j receives     g_j - y_j sum_i(g_i)         g times that, added up over i
#     y_i moves by     y_i ([i = j] - y_j) dx       as y_i = e^z_i
#     x_j receives     g_j y_j - y_j sum_i(g_i y_i)
#
# In arrays, log_softmax has the rule `g - y * sum(g)`, with its exponential for y, and
# softmax `y * (g - sum(g * y))`. (`_row_sum`, `_row_dot` and `_row_max` reduce with
# keepdims=True, and stand at the section's end.)
@primitive(lambda g, y, x, axis=-1: y * (g - _row_dot(g, y, axis)))
def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along an axis."""
    if x.size == 0:
        return x
    e = np.exp(x if _is_moderate(x) else x - _row_max(x, axis))
    e *= 1 / _row_sum(e, axis)
    return e


@primitive(lambda g, y, x, axis=-1: g - np.exp(y) * _row_sum(g, axis))
def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """The logarithm of softmax, exact even where softmax underflows."""
    if x.size == 0:
        return x
    z = x - _row_max(x, axis)
    z -= np.log(_row_sum(np.exp(z), axis))
    return z


# ### Products and running sums: what of zeros?
#
# The derivative of a product by one element is the product of all others. We cannot
# compute that as `y / x`, for the element may be 0. So the first half of the elements
# is multiplied by the second half, again and again, until one element is left. This
# needs only the rule of `mul`:
#
#     [2 3 0 5]  ->  [2*0 3*5] = [0 15]  ->  [0*15] = [0]
#
# A running product takes log2(n) steps, too: each element is multiplied by the one
# before it, then by the one 2 before it, then 4 before it (Hillis and Steele, 1986):
#
#     [a b c d]  ->  [a ab bc cd]  ->  [a ab abc abcd]
#
# A running sum hands each cotangent to all elements that had been added by then, so its
# rule is a running sum from the end.
def prod(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The product of all elements, or over the axes given."""
    x, axes = _joined("prod", x, axis)  # (..., n)
    if x.shape[-1] == 0:
        # An empty product is 1. (The empty sum, 0, keeps x on the tape.)
        x = 1 + sum_(x, -1, keepdims=True)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        odd_one = x[..., 2 * half:]
        x = concatenate([x[..., :half] * x[..., half:2 * half], odd_one], -1)
    y = x[..., 0]
    return expand_dims(y, axes) if keepdims else y


def cumprod(x: Any, axis: int | None = None) -> Tensor:
    """The running product along an axis; None flattens x first."""
    y, _ = _joined("cumprod", x, axis)  # (..., n)
    step = 1
    while step < y.shape[-1]:
        y = concatenate([y[..., :step], y[..., step:] * y[..., :-step]], -1)
        step *= 2
    return y if axis is None else moveaxis(y, -1, axis)


@primitive(lambda g, y, x, axis=None:
           np.flip(np.cumsum(np.flip(g, axis), axis), axis).reshape(x.shape))
def cumsum(x: Any, axis: int | None = None) -> Tensor:
    """The running sum along an axis; None flattens x first."""
    return np.cumsum(x, axis)


def _joined(name: str, x: Any, axis: int | tuple | None) -> tuple[Tensor, tuple]:
    """x with the named axes joined into one, the last; and the named axes' numbers.

        >>> y, axes = _joined("prod", np.ones((2, 3, 4)), (0, 2))
        >>> print(y.shape, axes)
        (3, 8) (0, 2)
    """
    x = as_tensor(x)
    axes = _axes(name, x, axis)
    moved = moveaxis(x, axes, tuple(range(-len(axes), 0)))
    staying = moved.shape[:x.ndim - len(axes)]
    length = math.prod(moved.shape[x.ndim - len(axes):])
    return reshape(moved, (*staying, length)), axes


def _axes(name: str, x: Any, axis: int | tuple | None) -> tuple[int, ...]:
    """The numbers, from 0 on, of the named axes; None means all. Errors have `name`."""
    numbers = range(x.ndim)
    if axis is None:
        return tuple(numbers)
    named = axis if isinstance(axis, tuple) else (axis,)
    try:
        axes = tuple(numbers[a] for a in named)  # numbers[-1] is the last
    except IndexError:
        raise IndexError(f"{name} of {x.shape}: axis {axis} is out of bounds") from None
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name} of {x.shape}: axis {axis} names an axis twice")
    return axes


# ### Quantiles: which elements is one made of?
#
# A quantile is made of two neighbours in sorted order. To learn which two, we ask NumPy
# for the same quantile of the places 0, 1, ..., n - 1. Take 40, 10, 80, 20 and q =
# 0.75. The quantile of the places 0 to 3 is 2.25. So that of 10, 20, 40, 80 lies a
# quarter of the way from place 2 to place 3: it is `0.75 * 40 + 0.25 * 80`. Sorting,
# indexing and products have rules, so nothing else is needed:
#
#     >>> x = Tensor([40.0, 10.0, 80.0, 20.0])
#     >>> y = np.quantile(x, 0.75)
#     >>> print(y, *gradients(y, [x]))
#     50.0 [0.75 0.   0.25 0.  ]
#
@_answers(np.quantile)
def quantile(x: Any, q: Any, axis: int | tuple | None = None, *, method: str = "linear",
             keepdims: bool = False) -> Tensor:
    """The numbers below which a part q of the elements lies.

    q and `method` are as in NumPy.
    """
    if _tracked(q):
        raise TypeError("quantile: has no derivative by q; give q.numpy()")
    q = _value(q)
    shape = np.shape(_value(x))
    x, axes = _joined("quantile", x, axis)  # (..., n)
    n = x.shape[-1]
    if n == 0:
        raise ValueError(f"quantile of {shape}: there are no elements along the axis "
                         "given")
    try:
        place = np.quantile(np.arange(float(n)), q, method=method)  # q's shape
    except ValueError as error:  # by q, or by the method
        raise ValueError(f"quantile of {shape}, q = {q}: {error}") from None

    # Here x was (2, n, 3), axis is 1, and q is (5,):
    y = _at_places(sort(x, -1), place)  # (2, 3, 5)
    if keepdims:  # (`axes` count from the front, q's is the last)
        y = expand_dims(y, axes)  # (2, 1, 3, 5)
    last_axes = tuple(range(-place.ndim, 0))
    return moveaxis(y, last_axes, tuple(range(place.ndim)))  # (5, 2, 1, 3)


def _at_places(ordered: Tensor, place: np.ndarray) -> Tensor:
    """The elements at `place` along the last axis: between two, a mixture of both.

    From `ordered` (2, 3, n) and `place` (5,) it makes a (2, 3, 5).
    """
    below = ordered[..., np.floor(place).astype(int)]
    above = ordered[..., np.ceil(place).astype(int)]
    part = np.asarray(place % 1, ordered.dtype)
    rest = np.asarray(1 - part, ordered.dtype)
    above = where(part > 0, above, 0)  # inf * 0 would be nan
    y = below * rest + above * part

    # A nan sorts last, and makes every quantile nan.
    last = ordered[..., -1]
    last = last.reshape(last.shape + (1,) * place.ndim)  # (2, 3, 1)
    return where(np.isnan(last), np.nan, y)


# ### The same in less time
#
# NumPy starts anew for each row, and for a short row that start takes most of the time.
# So rows are summed by a product with ones, as in `[3 4 5] @ [1 1 1] = 12`, and one
# call of reduceat takes their maxima (II.7 has the times). Where that does not fit, we
# use plain np.sum and np.max.
#
# And rounding? In a row of 131,072 equal numbers of float32, a bad case, the product is
# wrong by some 1e-6 of the sum, and np.sum, which adds in pairs, by 1e-7. In a column,
# which layer_norm sums, they are wrong by some 1e-5 and 1e-3. So softmax and the kernels
# of part III use the product at any length. Only `_fast_sum` leaves long rows to np.sum.
_ones = functools.lru_cache(16)(np.ones)  # it keeps its last 16 results


def _rows(x: Any) -> Any:
    """x with all axes but the last joined into one."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _row_sum(x: Any, axis: Any = -1) -> Any:
    """sum(x, axis, keepdims=True), in array code."""
    n = x.shape[-1]
    # Of rows of 5, OpenBLAS 0.3.31 makes the right product, but also reads memory that
    # nobody has set. What it reads there may make NumPy warn.
    if axis not in (-1, x.ndim - 1) or n == 5:
        return np.sum(x, axis=axis, keepdims=True)
    return np.dot(_rows(x), _ones(n, x.dtype)).reshape(*x.shape[:-1], 1)


def _row_dot(a: Any, b: Any, axis: Any = -1) -> Any:
    """sum(a * b, axis, keepdims=True), in array code; einsum makes no array a * b."""
    if axis not in (-1, a.ndim - 1):
        return np.sum(a * b, axis=axis, keepdims=True)
    return np.einsum("...i,...i->...", a, b)[..., None]


def _row_max(x: np.ndarray, axis: Any = -1) -> np.ndarray:
    """max(x, axis, keepdims=True)."""
    if axis not in (-1, x.ndim - 1) or x.size == 0 or not x.flags.c_contiguous:
        return np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    # Of the elements [3 1 4 2], and rows that start at [0 2], reduceat makes [3 4].
    starts = np.arange(0, x.size, x.shape[-1])
    maxima = np.maximum.reduceat(x.reshape(-1), starts)
    return maxima.reshape(*x.shape[:-1], 1)


def _is_moderate(x: np.ndarray) -> bool:
    """Whether |x| <= 40. Then e^x < 1e18, and softmax needs no maxima."""
    if x.dtype == np.float16:  # in which e^12 is infinite
        return False
    return bool(np.max(x, initial=0) <= 40 and np.min(x, initial=0) >= -40)


def _fast_sum(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    """np.sum, fast for short rows of float32; float16 is added up in float32."""
    if x.dtype == np.float16:
        return np.sum(x, axis=axis, dtype=np.float32, keepdims=keepdims)

    rows = _short_rows(x, axis)  # for x (2, 3, 4) and axis (1, 2): (2, 12)
    if rows is None:
        return np.sum(x, axis=axis, keepdims=keepdims)
    lost = x.ndim - rows.ndim + 1  # 2 axes
    shape = rows.shape[:-1] + (1,) * lost if keepdims else rows.shape[:-1]
    return _row_sum(rows).reshape(shape)


def _short_rows(x: np.ndarray, axis: Any) -> np.ndarray | None:
    """x with the named axes joined into one, if they are the last ones, but not all.

    Else None; also if x is not float32, or the rows are longer than 4,096.
    """
    if axis is None or x.dtype != np.float32:
        return None
    named = axis if isinstance(axis, tuple) else (axis,)
    n = len(named)
    from_the_end = sorted(a if a < 0 else a - x.ndim for a in named)
    if not 0 < n < x.ndim or from_the_end != list(range(-n, 0)):
        return None
    length = math.prod(x.shape[-n:])
    return x.reshape(*x.shape[:-n], length) if length <= 4096 else None


# ## II.6 Linear algebra: why the transposes?
#
# For `Y = A B`, each `Y_ij = sum_k A_ik B_kj`. `A_ik` meets `B_kj` in every column j,
# so it receives `sum_j g_ij B_kj`, which is `g B^T`. Likewise B receives `A^T g`. If i,
# j and k run over different numbers, the shapes alone allow nothing else.
#
#     >>> A, B = Tensor([[1.0, 2.0]]), Tensor([[3.0], [5.0]])
#     >>> (A @ B).backward(grad=[[10.0]])
#     >>> print(A.grad, B.grad.T)
#     [[30. 50.]] [[10. 20.]]
#
# Part III needs what follows, down to `linear`, and what the letters of einsum mean.
# The rest can wait. (Determinants and decompositions are in IV.10.)
def _mT(a: Any) -> Any:
    """The transpose of each matrix in a stack, or of one. (NumPy 2 has it as mT.)"""
    return a.swapaxes(-1, -2)


@primitive(lambda g, y, a, b: g @ _mT(b),
           lambda g, y, a, b: _mT(a) @ g)
def _matmul(a: Any, b: Any) -> Tensor:
    return np.matmul(a, b)  # matrices, or stacks of them


def _with_shape(x: Any) -> Any:
    """x as a Tensor or an array, since a list has no shape.

    The dtype is settled later, by the operation that sees all the operands.
    """
    if isinstance(x, np.generic):  # a single number of NumPy's
        return np.asarray(x)
    return x if isinstance(x, (Tensor, np.ndarray)) else as_tensor(x)


# NumPy's `@` also takes vectors. We treat a vector as a matrix of one row or one
# column. If a is a stack and b a single matrix, we treat a as one long matrix of all
# its rows (`_rows`, II.5), which BLAS multiplies in one go.
@_answers(np.matmul)
def matmul(a: Any, b: Any) -> Tensor:
    """a @ b as in NumPy, for every rank: vectors, matrices, stacks of matrices."""
    a, b = _with_shape(a), _with_shape(b)
    rank_a, rank_b = a.ndim, b.ndim
    if 0 in (rank_a, rank_b) or a.shape[-1] != b.shape[-2 if rank_b > 1 else 0]:
        raise ValueError(f"matmul of {a.shape}, {b.shape}: a's last axis must be as "
                         "long as b's last but one (a vector's only one); for a "
                         "number use *")

    if rank_b == 1:  # (..., k), (k,): b is a column
        return _matmul(_rows(a), np.expand_dims(b, 1)).reshape(a.shape[:-1])
    if rank_b == 2 and rank_a != 2:  # (..., k), (k, n): all rows of a
        return _matmul(_rows(a), b).reshape(a.shape[:-1] + b.shape[1:])
    if rank_a == 1:  # (k,), (..., k, n): a is a row
        return _matmul(np.expand_dims(a, 0), b).squeeze(-2)
    return _matmul(a, b)


@_answers(np.dot)
def dot(a: Any, b: Any) -> Tensor:
    """The sum over a's last axis and b's last but one (a vector's only one).

    If one of them is a number, a * b.
    """
    a, b = _with_shape(a), _with_shape(b)
    if 0 in (a.ndim, b.ndim):
        return mul(a, b)
    return matmul(a, b) if b.ndim <= 2 else tensordot(a, b, (-1, -2))


# `linear` is `x @ W^T + b` with W stored as (out, in), as in PyTorch. By the rule of
# matmul, x receives `g W`, and W^T receives `x^T g`, so W receives `g^T x`. All leading
# axes of x are joined into one, so each of these is one product.
@primitive(lambda g, y, x, weight, bias=None: (_rows(g) @ weight).reshape(x.shape),
           lambda g, y, x, weight, bias=None: _rows(g).T @ _rows(x),
           lambda g, y, x, weight, bias=None: g)  # asked only if there is a bias
def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """x @ weight.T + bias: (..., in), (out, in), (out,) -> (..., out)."""
    fits = x.shape[-1:] == weight.shape[1:]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError("needs an input (..., in), a weight (out, in) and a bias "
                         "(out,)")
    y = _rows(x) @ weight.T  # (rows, out)
    y = y.reshape(*x.shape[:-1], len(weight))
    return y if bias is None else _plus(y, bias)


def _plus(y: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """y + bias, computed in place unless the bias has a wider dtype."""
    if np.result_type(y, bias) != y.dtype:
        return y + bias
    return np.add(y, bias, out=y)


# ### einsum: what do the letters say?
#
# `einsum("ij,jk->ik", A, B)` gives each axis a letter. It multiplies the elements whose
# letters agree, and adds up over the letters that the output lacks. Here it is `A @ B`.
#
# **The rule: g takes the operand's place, and the letters of the operand change places
# with those of the output.** So A receives the einsum "ik,jk->ij" of g and B. With the
# numbers from above:
#
#     >>> B, g = np.array([[3.0], [5.0]]), np.array([[10.0]])
#     >>> print(np.einsum("ik,jk->ij", g, B))
#     [[30. 50.]]
#
# Why? The forward and the backward step are both loops over all letters:
#
#     for all i, j, k:    Y[i, k]  += A[i, j] * B[j, k]
#     for all i, j, k:    gA[i, j] += g[i, k] * B[j, k]
#
# In each round of the first loop, `A[i, j]` is multiplied by `B[j, k]`, and the product
# is added to `Y[i, k]`. So in the same round of the second loop, `A[i, j]` receives
# `g[i, k] * B[j, k]`. The same holds for any letters and any number of operands.
def _einsum_rule(i: int, g: Any, y: Any, *operands: Any, subscripts: str) -> Any:
    inputs, output = subscripts.split("->")  # in the example "ij,jk" and "ik"
    terms, factors = inputs.split(","), list(operands)  # ["ij", "jk"], [A, B]
    term_of_operand = terms[i]  # for A, "ij"
    terms[i], factors[i] = output, g  # ["ik", "jk"], [g, B]
    subscripts = ",".join(terms) + "->" + term_of_operand  # "ik,jk->ij"
    return np.einsum(subscripts, *factors, optimize=len(factors) > 1)


@primitive(each=_einsum_rule)
def _einsum(*operands: Any, subscripts: str) -> Tensor:
    # (`optimize` finds a good order of products, and leaves them to BLAS if it can.)
    return np.einsum(subscripts, *operands, optimize=len(operands) > 1)


# The rule relies on two things:
#
# 1. No operand has a letter twice. Of "ii->i" the rule would make "i->ii", and einsum
#    does not allow a letter twice in its output.
# 2. Each letter of an operand has a *partner*: it is in the output, or in another
#    operand, too. Of "ij,jk->k" the rule would make "k,jk->ij", where neither g nor B
#    says how long i is.
#
# So before it calls `_einsum`, `einsum` takes the diagonal of a letter that an operand
# has twice, and sums over a letter without a partner. Both have rules of their own.
# Here "iij,jk->k" becomes a product of a vector and a matrix:
#
#     subscripts     shapes                 what was done
#     "iij,jk->k"    (2, 2, 3), (3, 4)
#     "ji,jk->k"     (3, 2), (3, 4)         the diagonal of i, which NumPy puts last
#     "j,jk->k"      (3,), (3, 4)           the sum over i, which has no partner
@_answers(np.einsum)
def einsum(subscripts: str, *operands: Any, optimize: Any = True) -> Tensor:
    """np.einsum: `einsum("ij,j->i", a, b)`, or by numbers, `einsum(a, [0, 1], b, [1])`.

    Dots, repeated letters and stretched axes mean what they mean in NumPy. Whatever
    `optimize` says, a good order of the products is chosen. Raises ValueError if
    letters and shapes do not fit together, or if more than 52 letters are needed.
    """
    if not isinstance(subscripts, str):
        subscripts, operands = _einsum_by_letters(subscripts, *operands)
    operands = [_with_shape(x) for x in operands]
    shapes = tuple(x.shape for x in operands)
    try:
        terms, output = _einsum_terms(subscripts, shapes)  # ("iij", "jk"), "k"
        pairs = [_einsum_diagonal(term, x) for term, x in zip(terms, operands)]
        pairs = _einsum_drop_short(pairs)  # (explained where it stands)
        pairs = _einsum_drop_alone(pairs, output)
    except ValueError as error:
        were = ", ".join(map(str, shapes)) or "no operands"
        raise ValueError(f"einsum of {were} by {subscripts!r}: {error}") from None

    inputs = ",".join(term for term, _ in pairs)
    return _einsum(*(x for _, x in pairs), subscripts=f"{inputs}->{output}")


def _einsum_diagonal(term: str, x: Any) -> tuple[str, Any]:
    """Replace the axes of each letter that occurs more than once by their diagonal."""
    for letter in term:
        while term.count(letter) > 1:
            i = term.index(letter)
            j = term.index(letter, i + 1)
            if x.shape[i] != x.shape[j]:
                sizes = sorted([x.shape[i], x.shape[j]])
                raise ValueError(f"{letter!r} is a diagonal, and needs axes of one "
                                 f"size, not of sizes {sizes}")
            x = np.diagonal(x, axis1=i, axis2=j)  # (..., n): the diagonal comes last
            term = term.replace(letter, "", 2) + letter
    return term, x


def _einsum_drop_alone(pairs: list[tuple[str, Any]], output: str) -> list:
    """Sum each operand over its letters without a partner, which occur only once."""
    letters = "".join(term for term, _ in pairs) + output  # for "ji,jk->k", "jijkk"
    alone = [c for c in letters if letters.count(c) == 1]  # ["i"]
    return [_einsum_sum(term, x, alone) for term, x in pairs]


def _einsum_sum(term: str, x: Any, letters: list[str]) -> tuple[str, Any]:
    """Sum x over the axes that have these letters."""
    axes = tuple(i for i, letter in enumerate(term) if letter in letters)
    if not axes:
        return term, x
    rest = "".join(letter for letter in term if letter not in letters)
    return rest, np.sum(x, axis=axes)


# Before that, one thing more. NumPy stretches an axis of length 1 to a longer one of
# the same letter, as j in "ij,jk->ik" of shapes (2, 1) and (3, 4). We sum such a
# *short* axis away, since the longer one has the letter, too. That leaves "i,jk->ik" of
# (2,) and (3, 4). Now all axes of a letter have one length, and j has no partner.
def _einsum_drop_short(pairs: list[tuple[str, Any]]) -> list:
    """Sum each operand over its short axes; refuse a letter of two other lengths."""
    lengths: dict[str, int] = {}  # of the letters that are not of length 1 everywhere
    for term, x in pairs:
        for letter, n in zip(term, x.shape):
            if n == 1:
                continue
            first = lengths.setdefault(letter, n)  # n, if the letter is new
            if n != first:
                raise ValueError(f"axes of sizes {first} and {n} both are {letter!r}")

    without_short = []
    for term, x in pairs:
        short = [c for c, n in zip(term, x.shape) if n == 1 and c in lengths]
        without_short.append(_einsum_sum(term, x, short))
    return without_short


# The rest is notation, and can be skipped: numbers in place of letters, dots, and an
# output that is left out.
_LETTERS = string.ascii_uppercase + string.ascii_lowercase  # in sorted order
_LETTER_OF = {**dict(enumerate(_LETTERS)), ...: "..."}


def _einsum_by_letters(*arguments: Any) -> tuple[str, tuple]:
    """Turn numbers into letters: (a, [0, 1], b, [1], [0]) is ("AB,B->A", (a, b))."""
    subscripts = ",".join(map(_einsum_term, arguments[1::2]))  # the 2nd, 4th, ...
    if len(arguments) % 2:  # the last one is the output's
        subscripts += "->" + _einsum_term(arguments[-1])
    return subscripts, arguments[:-1:2]  # the 1st, 3rd, ... are the operands


def _einsum_term(numbers: Any) -> str:
    """Turn one list of numbers into letters: [0, 1] is "AB"."""
    if not isinstance(numbers, (list, tuple)) or not set(numbers) <= set(_LETTER_OF):
        raise TypeError("einsum: needs a string such as 'ij,jk->ik', or a list of "
                        "numbers from 0 to 51 after each operand")
    return "".join(_LETTER_OF[n] for n in numbers)


# Dots stand for axes without a letter, so they get letters that are not in use. If
# several operands have dots, these align at the right, as in broadcasting: if the
# longest are "AB", dots for one axis are "B".
#
#     >>> _einsum_terms("...i,i...->...", ((2, 5, 3), (3, 5)))
#     (('ABi', 'iB'), 'AB')
#
# If the output is left out, it has the dots, and all letters that occur once.
@functools.lru_cache(256)
def _einsum_terms(subscripts: str, shapes: tuple) -> tuple[tuple[str, ...], str]:
    """The letters of each operand, and of the output."""
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(shapes):
        more = "more" if len(terms) > len(shapes) else "fewer"
        raise ValueError(f"the subscripts are of {more} operands")
    if not arrow:
        output = "..." + "".join(c for c in _LETTERS if inputs.count(c) == 1)

    terms, dots = _einsum_spell_dots(terms, shapes)
    for term, shape in zip(terms, shapes):
        if not set(term) <= set(_LETTERS):
            raise ValueError("subscripts are letters, ',', '->' and '...'")
        if len(term) != len(shape):
            many = "many" if len(term) > len(shape) else "few"
            raise ValueError(f"too {many} subscripts for shape {shape}")

    if dots and "..." not in output:
        raise ValueError("the output needs the dots, too; to add up over their axes, "
                         "give them letters")
    output = output.replace("...", dots, 1)
    if not set(output) <= set("".join(terms)) or len(set(output)) < len(output):
        raise ValueError("the output must name letters of the operands, each once")
    return tuple(terms), output


def _einsum_spell_dots(terms: list[str], shapes: tuple) -> tuple[list[str], str]:
    """The terms with letters for their dots, and the letters of the longest dots."""
    # For each operand, how many axes its dots stand for:
    numbers = [len(shape) - len(term.replace("...", "")) if "..." in term else 0
               for term, shape in zip(terms, shapes)]

    longest = max(0, *numbers)
    free = [c for c in _LETTERS if c not in "".join(terms)]
    if longest > len(free):
        raise ValueError("with its dots this takes more than 52 letters")
    dots = "".join(free[:longest])
    spelled = [term.replace("...", dots[longest - n:], 1)  # the last n letters
               for term, n in zip(terms, numbers)]
    return spelled, dots


# ### The inverse: how is a rule of matrices found?
#
# All such rules are found in one way. Write `<X, Y>` for the sum of all `X_ij Y_ij`, so
# that the loss moves by `<g, dY>` if Y moves by dY. Then:
#
# 1. Differentiate the equation that defines Y, to express dY by dA.
# 2. In `<g, dY>`, move the factors around dA over to g: `<g, P dA Q>` is
#    `<P^T g Q^T, dA>` (the rule of matmul, twice).
# 3. A receives the matrix that now stands beside dA.
#
# (Giles, 2008, has the whole collection.) For *inv*, `Y = A^-1`:
#
#     1  differentiate A Y = I      dA Y + A dY = 0
#        times Y from the left      dY = -Y dA Y     (for a number, dy = -da / a^2)
#     2  move both Y over to g      <g, -Y dA Y> = <-Y^T g Y^T, dA>
#     3  A receives                 -Y^T g Y^T
inv = _define("inv", np.linalg.inv, lambda g, y, a: -_mT(y) @ g @ _mT(y),  # step 3
              doc="The inverse of each matrix. Raises LinAlgError if one is singular.")


# For *solve*, `Y = A^-1 B`:
#
#     1  differentiate A Y = B      dA Y + A dY = dB
#     2  solve for dY               dY = A^-1 (dB - dA Y)
#     3  move A^-1 over to g        <g, dY> = <h, dB - dA Y>   with h = A^-T g
#     4  B receives                 h, which solves A^T h = g
#     5  move Y over to h           <h, -dA Y> = <-h Y^T, dA>
#     6  A receives                 -h Y^T
@primitive(lambda g, y, a, b: -np.linalg.solve(_mT(a), g) @ _mT(y),  # step 6
           lambda g, y, a, b: np.linalg.solve(_mT(a), g))  # step 4
def _solve(a: Any, b: Any) -> Tensor:
    return np.linalg.solve(a, b)


@_answers(np.linalg.solve)
def solve(a: Any, b: Any) -> Tensor:
    """The x with a @ x = b, for a (..., n, n) and b (n,) or (..., n, k).

    Raises LinAlgError if a is singular.
    """
    a, b = _admit_together(a, b)
    # (A vector has one axis to NumPy 2, and one axis less than a to NumPy 1: IV.4.)
    is_vectors = b.ndim == (a.ndim - 1 if _OLD_NUMPY else 1)
    columns = expand_dims(b, -1) if is_vectors else b  # (..., n, k)
    are_matrices = a.ndim > 1 and columns.ndim > 1
    if not are_matrices or not a.shape[-2] == a.shape[-1] == columns.shape[-2]:
        raise ValueError(f"solve of {a.shape}, {b.shape}: needs square matrices "
                         "(..., n, n) and a vector (n,) or columns (..., n, k); "
                         "else lstsq")
    x = _solve(a, columns)
    return x[..., 0] if is_vectors else x


# ## II.7 Fused operations: how is one made fast?
#
# Take `x * sigmoid(x)` (swish: Ramachandran and others, 2017). Written this way, it
# puts two operations on the tape, each with arrays of its own. To make it one
# operation, write a **kernel**: a function on bare arrays that returns the result and
# the `pullback`. The pullback is a function that does the whole backward step, and
# remembers what it needs:
#
#     >>> def definition(x):
#     ...     return x * sigmoid(x)
#     ...
#     >>> @fused(definition, operands=1)
#     ... def swish(x):
#     ...     s = 1 / (1 + np.exp(-x))  # sigmoid(x), with the slope s * (1 - s)
#     ...     def pullback(g, wanted):
#     ...         return (g * (s + x * s * (1 - s)),)  # one cotangent for each operand
#     ...     return x * s, pullback
#     ...
#     >>> print(f"{swish(1.0):.6f} {grad(swish)(1.0):.6f} {grad(definition)(1.0):.6f}")
#     0.731059 0.927671 0.927671
#
# A kernel may be clever and work in place, and it need not care for second derivatives:
# with `create_graph` the walk does not call the pullback, but computes the definition
# anew and differentiates that.
#
#     >>> print(f"{grad(grad(swish))(1.0):.12f} {grad(grad(definition))(1.0):.12f}")
#     0.302366118810 0.302366118810
#
# So the definition is at once the explanation, the oracle for the tests, and the source
# of every higher derivative.


def fused(definition: Callable, operands: int | None = None) -> Callable:
    """Decorate a kernel `(arrays) -> (result, pullback)` to make it an operation.

    `definition` computes the same result by other operations. The first `operands`
    arguments (by default, all that are given by position) are operands, and get
    gradients. `pullback(g, wanted)` returns a cotangent for each operand, and may give
    None where `wanted` is False. A cotangent is a new array, or `g`, or a view. The
    pullback must not write to `g` or to what it remembers, because a tape may be walked
    twice. float16 operands arrive as float32.
    """
    def decorate(kernel: Callable) -> Callable:
        arity = sys.maxsize if operands is None else operands
        operation = _operation(_in_float32(kernel), arity)
        operation.pull = _pull_fused
        operation.definition = _in_float32(definition)
        return operation

    return decorate


def _pull_fused(t: Tensor, g: Any, wanted: list[bool], create_graph: bool) -> Sequence:
    """What each operand receives, or None, by the pullback or by the definition."""
    if create_graph:
        return _pull_by_definition(t, g, wanted)
    shares = t._pullback(g, wanted)
    return [share if is_wanted else None for share, is_wanted in zip(shares, wanted)]


# "By the definition" means to compute the result once more, by other operations, and to
# walk the new tape back to the operands. Each operand must receive its own share alone.
# But in f(x, x) both operands are one tensor, and in f(x, 2 * x) the walk would go on
# from the second to the first. So we replace every wanted operand by its `identity`: a
# new tensor, used nowhere else, at which the walk ends.


def _pull_by_definition(t: Tensor, g: Tensor, wanted: list[bool]) -> list:
    """What each wanted operand receives, as Tensors with a tape of their own."""
    arguments = list(t._operands)  # and settings given by position
    for i, is_wanted in enumerate(wanted):
        if is_wanted:
            arguments[i] = identity(arguments[i])
    y = t._op.definition(*arguments, **t._settings)

    inputs = [a for a, is_wanted in zip(arguments, wanted) if is_wanted]
    shares = iter(_gradients([(y, g)], inputs, create_graph=True, retain_graph=True))
    return [next(shares) if is_wanted else None for is_wanted in wanted]


# The largest *float16* is 65,504, and a sum of squares soon exceeds it and becomes
# infinite. So kernels and definitions compute in float32, and the result is rounded to
# float16 unless another operand has a wider dtype.


def _in_float32(f: Callable) -> Callable:
    """f in float32 where it gets float16. It gives a result, or (result, pullback)."""
    @functools.wraps(f)
    def wide(*arguments: Any, **settings: Any) -> Any:
        dtypes = [a.dtype for a in arguments if isinstance(a, (np.ndarray, Tensor))]
        if np.float16 not in dtypes:
            return f(*arguments, **settings)

        result = f(*map(_widened, arguments), **settings)
        if np.float32 in dtypes or np.float64 in dtypes:
            return result  # NumPy has given it the wider dtype
        if not isinstance(result, tuple):
            return result.astype(np.float16)

        y, pullback = result  # the way back is in float32, too
        return y.astype(np.float16), lambda g, wanted: pullback(_widened(g), wanted)

    return wide


def _widened(a: Any) -> Any:
    """An array of float16 in float32; anything else as it is."""
    return a.astype(np.float32) if getattr(a, "dtype", None) == np.float16 else a


# ### What NumPy is slow at
#
# Kernels differ from their definitions where NumPy is slow. Here is where; comments in
# the kernels refer to these points by the words in capitals. (Times are for
# float32 on one core of an Intel server, Sapphire Rapids, with NumPy 2.4.)
#
# - ROWS. A reduction starts anew for every row. The sums of 4,096 rows of 32 numbers
#   take 78 us by `sum(axis=1)`, and 9 us by `_row_sum` (II.5). Their maxima take 330 us
#   by `max(axis=1)`, and 200 us by `_row_max`. The maximum of the whole array takes
#   9 us, and is often enough (`_is_moderate`).
# - LOOPS. An operation on a view runs an inner loop along the last axis in memory, and
#   each start of that loop costs time. So the longest axis should lie last: adding an
#   array (128, 16, 14, 14) to the inside of a padded one takes 340 us with lines of 14
#   numbers, and 200 us with the batch last.
# - PASSES. Each operation reads and writes whole arrays, and beyond a few hundred
#   kilobytes this takes nearly all of the time. So kernels work in place. And where
#   there are many passes (eight forwards in gelu below), all of them go over one block
#   while it is in the processor's cache, and then over the next.
# - PRODUCTS. Only products such as matmul and dot reach BLAS, the library that
#   multiplies matrices at full speed. It is fastest if both lie in memory row by row
#   (`order="C"`). `A @ B^T` and `(B @ A^T)^T` are equal, but OpenBLAS is up to twice as
#   fast at the one whose product has more rows.
# - SCATTER. When several rows are added to one place, NumPy goes element by element,
#   even in bincount (II.4). A product with one-hot rows is several times faster.
_BLOCK = 1 << 16  # elements: four blocks fill a cache of 1 MiB


def _blocks(*arrays: np.ndarray) -> Iterator[list]:
    """Matching pieces of dense arrays with the same layout in memory, as flat views."""
    flat = [a.ravel(order="K") for a in arrays]  # in the order of memory: no copy
    for i in range(0, flat[0].size, _BLOCK):
        yield [a[i:i + _BLOCK] for a in flat]


def _dense(x: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """x without gaps in memory, its axes in the order of `like`; copied if need be."""
    out = np.empty_like(x if like is None else like)  # in that order, without gaps
    if x.strides == out.strides:
        return x
    out[...] = x
    return out


# gelu is `x` times the probability `p` that a standard normal number is below x. We
# define it by the approximation of Hendrycks and Gimpel (2016) that GPT-2 uses and
# PyTorch calls `approximate="tanh"`. (The exact one needs erf, which NumPy lacks.)
#
#     p = (1 + tanh(u)) / 2,   u = scale * x + cubic * x^3
#
#     1  solve for tanh           tanh(u) = 2 p - 1
#     2  the slope of tanh is     1 - tanh(u)^2 = 1 - (2 p - 1)^2 = 4 p (1 - p)
#     3  so that of p is          dp/dx = 2 p (1 - p) du/dx
#     4  and that of x p is       p + x dp/dx = p (1 + (1 - p) v)    with v = 2 x du/dx
#     5  du/dx put in             v = x (2 scale + 6 cubic x^2)
#
# So the kernel returns `x * p`, and its pullback `g * p * (1 + (1 - p) * v)`. Both are
# computed block by block (PASSES) and in place: what is needed on the way to a result
# stands where the result will be.
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = _GELU_SCALE * 0.044715


def _gelu_definition(x):
    return 0.5 * x * (1 + np.tanh(x * (_GELU_SCALE + _GELU_CUBIC * (x * x))))


@fused(_gelu_definition, operands=1)
def gelu(x: Any) -> Tensor:
    """The Gaussian error linear unit, `x * P(normal < x)`, approximated by tanh."""
    x = _dense(x)
    y, p = np.empty_like(x), np.empty_like(x)
    for x_, y_, p_ in _blocks(x, y, p):  # x_ is a block of x
        np.multiply(x_, x_, out=p_)
        p_ *= _GELU_CUBIC
        p_ += _GELU_SCALE
        p_ *= x_  # u
        np.tanh(p_, out=p_)
        p_ *= 0.5
        p_ += 0.5
        np.multiply(x_, p_, out=y_)

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dx = _dense(g, x), np.empty_like(x)
        for g_, x_, p_, dx_ in _blocks(g, x, p, dx):
            np.multiply(x_, x_, out=dx_)
            dx_ *= 6 * _GELU_CUBIC
            dx_ += 2 * _GELU_SCALE
            dx_ *= x_  # v
            dx_ *= 1 - p_
            dx_ += 1
            dx_ *= p_
            dx_ *= g_
        return (dx,)

    return y, pullback


# ## II.8 Methods: what else can a Tensor do?
#
# The methods and operators that a Tensor shares with ndarray have the same names. A
# function whose first argument is the tensor can serve as a method unchanged. Only the
# first three of `_METHODS`, below, are written for it.
#
#     >>> t = Tensor([1.0, 2.0, 4.0])
#     >>> print(t.sum(), t // 2, t > 1)
#     7.0 [0. 1. 2.] [False  True  True]
#
def _item(self: Tensor) -> float:
    """The one element, as a Python number. Raises ValueError for any other size."""
    if self.size != 1:
        raise ValueError(f"item() needs a tensor of one element, and this has shape "
                         f"{self.shape}: use .tolist(), or index one element first")
    return self._data.item()


def _tolist(self: Tensor) -> Any:
    """The elements as Python numbers, in nested lists."""
    return self._data.tolist()


def _numpy(self: Tensor) -> np.ndarray:
    """The array that `data` gives, in the same memory."""
    return self.data


# Each of these becomes the method of its name: `t.sum(axis=0)` calls `sum_(t, axis=0)`.
# (`t.argmax()` calls `np.argmax(t)`, and NumPy hands that call over to us: II.2.)
_METHODS = [
    _item, _tolist, _numpy,
    abs_, exp, log, sqrt, sin, cos, tanh, sigmoid, relu, clip, astype, _copy,
    reshape, transpose, swapaxes, squeeze, flatten, repeat, take, diagonal, sort,
    sum_, mean, var, std, max_, min_, prod, cumsum, cumprod, trace, dot,
    np.ravel, np.argmax, np.argmin, np.argsort, np.round, np.nonzero, np.any, np.all,
]
for _f in _METHODS:
    setattr(Tensor, _f.__name__.strip("_"), _f)
Tensor.T = property(transpose, doc="The tensor with its axes reversed.")
Tensor.mT = property(_mT, doc="The last two axes exchanged.")

# The other operators are set like the first ones in I.2. (Python passes self to
# np.argmax as to any `def`. To a ufunc it does not; hence the two lambdas.)
for _name, _f in dict(
    pow=power, matmul=matmul, mod=mod,
    floordiv=lambda a, b: np.floor_divide(a, b), divmod=lambda a, b: np.divmod(a, b),
).items():
    setattr(Tensor, f"__{_name}__", _f)
    setattr(Tensor, f"__r{_name}__", _reflected(_f))


# Comparisons give plain bool arrays. (They are set from outside the class: an `__eq__`
# inside would remove `__hash__`, and a Tensor could not be a key of a dict.)
def _comparison(name: str) -> Callable:
    """The method of this name: NumPy's, on the arrays."""
    def compare(self: Tensor, other: Any) -> np.ndarray:
        return getattr(np.asarray(self._data), name)(_value(other))

    return compare


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Tensor, _name, _comparison(_name))


# The last methods are those that Python's own functions and brackets call, such as
# `len(t)` and `t[0]`. One of them needs care. `math.sin(t)` calls `float(t)` and
# returns a plain float, so the tape would end there and the derivative be lost.
# Therefore, while a transform such as grad runs your function, `float(t)` and `int(t)`
# raise TypeError if t was made from the transform's inputs. (`t.item()` is allowed: it
# says that only the number is wanted.)
def _plain_number(t: Tensor) -> float:
    """The element of t as a Python number, unless a derivative would be lost."""
    for run in _mode.runs:  # the transforms that are running a function now (IV.3)
        # t itself is on the route from t to the inputs (I.5) only if made from them.
        if t.requires_grad and t._time in _find_route([t], run.inputs).times:
            raise TypeError(f"{run.name}: float() of a tensor that is being "
                            "differentiated, as in math.sin(t) or array[0] = t, would "
                            "lose its derivative; use NumPy's function, as in "
                            "np.sin(t), or t.item() if no derivative is wanted")
    return t.item()


def _repr(self: Tensor) -> str:
    values = np.array2string(np.asarray(self._data), separator=", ", prefix="Tensor(")
    shape = f", shape={self.shape}" if "..." in values else ""
    label = f", label={self.label!r}" if self.label else ""
    return f"Tensor({values}{shape}, dtype={self.dtype}{label})"


def _setitem(self: Tensor, index: Any, value: Any) -> None:
    raise TypeError("a Tensor's elements cannot be assigned; use np.where, or write to "
                    "t.data")


for _name, _f in dict(
    pos=identity, abs=abs_, getitem=getitem, setitem=_setitem, repr=_repr,
    str=lambda t: str(t._data),
    format=lambda t, spec: format(t.item(), spec) if spec else str(t),
    float=lambda t: float(_plain_number(t)),
    int=lambda t: int(_plain_number(t)),
    bool=lambda t: bool(t._data),
    len=lambda t: len(t._data),
    iter=lambda t: (t[i] for i in range(len(t))),
).items():
    setattr(Tensor, f"__{_name}__", _f)


# A gradient may be set by hand, as in `t.grad = 0.0`: a number stands for all elements.
def _as_gradient(value: Any, t: Tensor) -> Tensor | None:
    """`value` as a gradient for `t`: None, or a Tensor of its shape and dtype."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = _wrap(np.asarray(value, t.dtype))
    if value.ndim == 0 and t.ndim > 0:
        value = broadcast_to(value, t.shape)
    if value.shape != t.shape:
        raise ValueError(f"a gradient of shape {value.shape} for "
                         f"{t.label or 'a tensor'} of shape {t.shape}: they must agree")
    return value if value.dtype == t.dtype else astype(value, t.dtype)


# ## II.9 Arguments: what may be an operand?
#
# The functions and the rules of this part expect floating-point arrays and Python's
# numbers. A user also gives lists, masks and integers, and gives operands by name.
#
#     >>> t = Tensor([0.5, 0.25], dtype=np.float32)
#     >>> print(where([True, False], b=np.array([7, 7]), a=t))  # t, or else 7
#     [0.5 7. ]
#
# In the usual call, all arguments are Tensors and Python's numbers given by position, and
# are used as they are. Any other call is made such a one by `_admit`, in three steps:
#
# a. Operands given by name are put at their positions, because rules go by position.
# b. A list becomes an array.
# c. Integers and bools become floating-point numbers. (Those of the condition stay: it
#    has no derivative, and so its rule is None.)
#
#     >>> args, settings = _admit(where, ([True, False],), dict(b=np.array([7, 7]), a=t))
#     >>> print(args[0], args[1] is t, args[2], settings)
#     [ True False] True [7. 7.] {}
#
# Then `_compute` calls the function, here `np.where` of three arrays. And because t is
# tracked, the result remembers `where` and `args`.


# The usual call (I.2) has a Tensor, and besides it only these.
_PLAIN = {Tensor, int, float}


def _admit(operation: Callable, args: tuple, settings: dict) -> tuple[tuple, dict]:
    """The arguments of an operation, converted for its function and its rules."""
    name, count = operation.__name__, operation.arity
    if settings:
        args, settings = _by_position(operation, args, settings)  # (a)
    operands = [a if type(a) in _PLAIN else _admit_operand(name, a)
                for a in args[:count]]  # (b)
    operands = _to_floating(operands, operation.rules)  # (c)
    return (*operands, *args[count:]), settings  # after the operands come settings


# **a** asks the function for the names of its arguments. (One in C does not tell.)


def _by_position(operation: Callable, args: tuple, settings: dict) -> tuple[tuple, dict]:
    """Move the operands that were given by name to their positions."""
    operand_names, setting_names = _argument_names(operation)
    settings = dict(settings)
    for name in operand_names[len(args):]:
        if name not in settings:
            break  # (those behind a gap are refused later)
        args = (*args, settings.pop(name))

    for name, a in settings.items():
        if _tracked(a) and name not in setting_names:
            known = "have no names: give by position"
            if operand_names:
                known = f"are {', '.join(operand_names)}, each once"
            raise TypeError(f"{operation.__name__}: has no place for an operand "
                            f"{name!r}; its operands {known}")
        settings[name] = _setting(operation, a)
    return args, settings


def _argument_names(operation: Callable) -> tuple[tuple, tuple]:
    """The names of its operands, and of its settings.

        >>> _argument_names(where), _argument_names(sum_)
        ((('condition', 'a', 'b'), ()), (('x',), ('axis', 'keepdims')))
    """
    code = getattr(inspect.unwrap(operation), "__code__", None)
    if code is None:
        return (), ()
    # (Quicker than inspect.signature: a call with a setting by name comes here.)
    names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
    count = min(operation.arity, code.co_argcount)
    return names[:count], names[count:]


# **b** makes `t * [1, 2]` possible, and `t * [t, 2]`, where the list becomes a Tensor.
# Python's numbers stay, because NumPy gives them the dtype of the array they meet. An
# argument of any other kind also stays, and the function will refuse it.


def _admit_operand(name: str, a: Any) -> Any:
    """An operand as a Tensor, an array or a number; anything else as it is."""
    if type(a) is np.ndarray or isinstance(a, (Tensor, int, float)) or a is None:
        return a
    if isinstance(a, (list, tuple)):
        return as_tensor(a) if _holds_tensor(a) else np.asarray(a)
    if isinstance(a, (np.matrix, np.ma.MaskedArray)):
        raise TypeError(f"{name}: a {type(a).__name__} has operators of its own, which "
                        "a Tensor's are not; give np.asarray of it")
    if type(a).__name__ == "Tensor" and hasattr(type(a), "__array_ufunc__"):
        raise TypeError(f"{name}: a Tensor of {type(a).__module__}, which is another "
                        f"copy of nanoad than {__name__}; import one of them "
                        "everywhere")
    return np.asarray(a) if hasattr(a, "__array__") or isinstance(a, np.generic) else a


def _holds_tensor(a: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return any(map(_holds_tensor, a))
    return isinstance(a, Tensor)


# **c** makes `t * mask` and `log(counts)` possible. (Unconverted, a uint8 would wrap at
# 255, and its logarithm would be float16.) Beside floating-point arrays, an integer
# array takes the dtype that NumPy would compute in, so a mask beside float32 leaves the
# result float32. Without any, it becomes float64. If all operands are Python's numbers,
# they become float64 arrays.
#
#     >>> mask, counts = np.array([True, False]), np.array([7, 7])
#     >>> [a.dtype.name for a in _to_floating([t, mask, counts])]
#     ['float32', 'float32', 'float64']


def _to_floating(operands: list, rules: Sequence = ()) -> list:
    """The operands, with integers and bools made floating, unless their rule is None."""
    arrays = [a for a in operands if isinstance(a, (Tensor, np.ndarray))]
    kinds = {a.dtype.kind for a in arrays}
    if kinds == {"f"}:
        return operands  # the most frequent case
    floats = [a.dtype for a in arrays if a.dtype.kind == "f"]
    has_no_rule = [i for i, rule in enumerate(rules) if rule is None]
    floating = []
    for i, a in enumerate(operands):
        if i not in has_no_rule:
            if isinstance(a, np.ndarray) and a.dtype.kind in "biu":
                a = a.astype(np.result_type(a.dtype, *floats) if floats else np.float64)
            elif not arrays and isinstance(a, (int, float)):
                a = np.asarray(a, np.float64)
        floating.append(a)
    return floating


# A function that calls several operations on its operands, such as `solve`, first
# converts them together. Otherwise, if the first operation reshaped a bool mask alone,
# the mask would become float64, and then so would the result with a float32 operand.
# (Where all operands end in one operation, as in matmul, that converts them, and
# `_with_shape`, II.6, is enough.)


def _admit_together(*operands: Any) -> list[Tensor]:
    """The operands as Tensors, converted as if one operation took them all."""
    admitted = [_admit_operand("an operand", a) for a in operands]
    return [as_tensor(a) for a in _to_floating(admitted)]


# A constant Tensor may be a setting, as in `layer_norm(x, w, b, eps=Tensor(1e-5,
# False))`. One that needs a gradient is refused, because a setting gets none.


def _setting(operation: Callable, a: Any) -> Any:
    if _tracked(a):
        raise TypeError(f"{operation.__name__}: a Tensor that needs a gradient was given "
                        "where a setting belongs (a shape, an axis, an eps, integers), "
                        "and would get none; use .item() or .numpy()")
    return _value(a)


# Then the operation computes.


def _compute(operation: Callable, forward: Callable, args: tuple,
             settings: dict) -> tuple[np.ndarray, Callable | None, bool]:
    """The result of `forward` on the arrays, its pullback, and whether to remember it."""
    arrays, tracked = [], False
    for a in args:
        if isinstance(a, Tensor):
            tracked = tracked or a.requires_grad
            if a._checksum is not None:
                _renew_checksum(a)  # its array was handed out (IV.1)
            a = a._data
        arrays.append(a)
    if tracked and len(args) > operation.arity:
        for a in args[operation.arity:]:
            _setting(operation, a)  # raises if it is tracked

    try:
        result = forward(*arrays, **settings)
        y, pullback = result if operation.pull is _pull_fused else (result, None)
        if _OLD_NUMPY or y.dtype.kind != "f":
            y = _settle_dtype(y, operation, arrays)  # (IV.4)
    except (ValueError, TypeError, IndexError) as error:
        raise _explained(error, operation, arrays) from None
    return y, pullback, tracked


def _explained(error: Exception, operation: Callable, arrays: list) -> Exception:
    """An error of the same kind that also names the operation and the shapes."""
    shapes = [str(a.shape) for a in arrays if hasattr(a, "shape")] or ["no array"]
    kinds = (np.linalg.LinAlgError, IndexError, ValueError, TypeError)
    kind = next(kind for kind in kinds if isinstance(error, kind))
    return kind(f"{operation.__name__} of {', '.join(shapes)}: {error}")


# The data of a new Tensor (I.1) are not an operand, and are converted on their own.


def _float_array(data: Any) -> np.ndarray:
    """`data` as a floating-point array, copied only if needed."""
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"a Tensor holds real numbers; this is {array.dtype}: "
                        f"{str(data)[:60]!r}")
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _require_flag(what: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{what} is True or False, not {value!r:.40}; for a shape, "
                        "give np.zeros(shape) as the data")


# # Part III. Networks
#
# ## III.1 Losses: how wrong is a prediction?
#
# A loss says in one number how wrong the predictions are, and training makes it small.
# Take a network that is to name the class of each row. It returns a score of any size
# for every class (the field calls them *logits*). **Softmax** turns the scores into
# probabilities: exp makes them positive, and dividing by their sum makes them add up to
# 1. The **cross-entropy** is minus the logarithm of the probability of the right class.
# It is 0 if the network is sure and right, and grows as the network becomes surer of
# another class.
#
#     >>> def naive_cross_entropy(logits, targets):  # (N, C), (N,)
#     ...     e = np.exp(logits)
#     ...     p = e / np.sum(e, axis=1, keepdims=True)  # (N, C), the softmax
#     ...     right = p[np.arange(len(targets)), targets]  # (N,)
#     ...     return -np.mean(np.log(right))
#     ...
#     >>> logits, targets = np.array([[2.0, 2.0]]), np.array([1])  # a row, of class 1
#     >>> loss, slope = value_and_grad(naive_cross_entropy)(logits, targets)
#     >>> print(f"{loss:.3f}", slope)
#     0.693 [[ 0.5 -0.5]]
#
# Two equal scores give 1/2 each, and -log(1/2) is 0.693. To learn is to move the scores
# against the slope: the wrong one down, the right one up. What is the slope in general?
# For one row x,
#
# 1. the loss is `-log(exp(x[target]) / sum(exp(x)))`. The logarithm of a quotient is a
#    difference, so this is `log(sum(exp(x))) - x[target]`;
# 2. the derivative of the first term by x is the softmax (II.5); that of `x[target]` is
#    1 at the target and 0 elsewhere, a row that is called *one-hot*;
# 3. so the gradient is `softmax - one_hot`: the probabilities, less what they should
#    have been. Above it is [1/2 1/2] - [0 1]. The mean over N rows divides it by N.
#
# The naive code fails for large scores: exp(1000) is infinite. So the kernel first
# subtracts the largest score of each row (II.5). And it uses the formula of step 1,
# since a probability may round to 0, and log(0) is infinite.
#
#     >>> print(cross_entropy(np.array([[0.0, 1000.0]]), np.array([0])))
#     1000.0
def _cross_entropy_definition(logits, targets):
    return -np.mean(log_softmax(logits)[np.arange(len(targets)), targets])


@fused(_cross_entropy_definition, operands=1)
def cross_entropy(logits: Any, targets: Any) -> Tensor:
    """The mean of -log softmax(logits)[target]: (N, C), integers (N,) -> a scalar.

    Raises ValueError if shapes or targets do not fit, and TypeError if the targets are
    not integers.
    """
    _check_classes(logits, targets)
    n, classes = logits.shape
    targets = _whole_numbers("targets", targets, classes)
    at_target = np.arange(n), targets  # one element of each row

    x = logits - _row_max(logits)  # (N, C)
    x_target = x[at_target]  # (N,), a copy: the next line overwrites x
    e = np.exp(x, out=x)
    total = _row_sum(e)  # (N, 1)
    losses = np.log(total[:, 0]) - x_target  # (N,), by step 1

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        share = np.asarray(g / n, e.dtype)  # what each row receives
        dx = e * (share / total)  # (N, C): share * softmax, which is e / total
        dx[at_target] -= share  # less share * one_hot
        return (dx,)

    return np.mean(losses), pullback


def _whole_numbers(what: str, ids: Any, count: int) -> np.ndarray:
    """`ids` as an integer array. Raises an error unless all are in 0..count-1."""
    ids = np.asarray(_value(ids))
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what} must be a plain array of integers, not {ids.dtype}; "
                        "if they are whole, write .astype(int), "
                        "and of a Tensor .data.astype(int)")
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise ValueError(f"{what} must be from 0 to {count - 1}, "
                         f"not {ids.min()} to {ids.max()}")
    return ids


def _check_classes(logits: np.ndarray, targets: Any) -> None:
    shape = np.shape(targets)
    if logits.ndim >= 2 and shape == logits.shape:
        raise ValueError("the targets are the numbers of the classes, one for each "
                         f"row, and not one-hot rows {shape}; "
                         "write targets.argmax(-1)")
    if logits.ndim != 2:
        raise ValueError("needs logits (N, C) and targets (N,); for (B, T, C) and "
                         "(B, T) write logits.reshape(-1, C) and targets.reshape(-1)")
    if shape != logits.shape[:1]:
        raise ValueError("needs one target for each row of logits (N, C), "
                         f"not targets {shape}")
    if len(logits) == 0:
        raise ValueError("there are no rows, and so there is no mean")


# The other losses apply a formula element by element, and take the mean. They do not
# broadcast: a prediction (N, 1) minus a target (N,) would be (N, N), and nobody would
# see from its mean that the loss is wrong. (float16 is computed in float32, as in a
# kernel: II.7.)
@_in_float32
def _mean_loss(prediction: Any, target: Any, *, name: str, formula: Callable) -> Tensor:
    """The mean of formula(prediction, target), for two arrays of the same shape."""
    prediction = as_tensor(prediction)
    target = as_tensor(target)
    if prediction.shape != target.shape:
        raise ValueError(f"{name}: the prediction has shape {prediction.shape} and the "
                         f"target {target.shape}; reshape one, for a loss does not "
                         "broadcast")
    if prediction.size == 0:
        raise ValueError(f"{name}: there are no elements, and so there is no mean")
    return mean(formula(prediction, target.astype(prediction.dtype)))


def mse_loss(prediction: Any, target: Any) -> Tensor:
    """The mean squared difference. Raises ValueError if the two shapes differ."""
    return _mean_loss(prediction, target, name="mse_loss",
                      formula=lambda p, t: (p - t) ** 2)


# If the answer is yes (t = 1) or no (t = 0), one score x is enough. The probability of
# yes is s = sigmoid(x), that of no is 1 - s. The loss is again -log of the right one,
# or in one formula, `-t log(s) - (1 - t) log(1 - s)`. With s = 1 / (1 + exp(-x)),
# `-log(s)` is `log(1 + exp(-x))`, which is `softplus(-x)`. As 1 - s = sigmoid(-x),
# `-log(1 - s)` is `softplus(x)`. These do not overflow (II.3).
def binary_cross_entropy_with_logits(logits: Any, target: Any) -> Tensor:
    """The mean of -log probability of the target, if 1 has probability sigmoid(logits).

    Targets are in [0, 1]. Raises ValueError if the two shapes differ.
    """
    return _mean_loss(logits, target, name="binary_cross_entropy_with_logits",
                      formula=lambda x, t: t * softplus(-x) + (1 - t) * softplus(x))


# If the network gives a probability p instead of a score, the loss is `-t log(p) - (1 -
# t) log(1 - p)`, whose derivative by p is
#
#     -t / p + (1 - t) / (1 - p) = (-t (1 - p) + (1 - t) p) / (p (1 - p))
#                                = (p - t) / (p (1 - p))
#
# If p is 0 or 1, one logarithm is infinite. As in PyTorch, we limit each to at least
# -100. A limited logarithm has the slope 0, and so the most wrong predictions would not
# be corrected. Therefore the rule for p is the derivative without the limit; only its
# denominator is at least 1e-12.
def _limited_log(p: Any) -> Any:
    return np.log(np.clip(p, math.exp(-100), 1))


@primitive(lambda g, y, p, t: g * (p - t) / np.maximum(p * (1 - p), 1e-12),
           lambda g, y, p, t: g * (_limited_log(1 - p) - _limited_log(p)))
def _log_loss(p, t):
    return -(t * _limited_log(p) + (1 - t) * _limited_log(1 - p))


def binary_cross_entropy(probability: Any, target: Any) -> Tensor:
    """The mean of -log probability of the target, if 1 has the given `probability`.

    -log is held to at most 100. Raises ValueError if the two shapes differ, or if a
    probability is outside [0, 1].
    """
    probability = as_tensor(probability)
    if not np.all((probability >= 0) & (probability <= 1)):
        raise ValueError("binary_cross_entropy: the probabilities must be in [0, 1]; "
                         "for scores of any size there is "
                         "binary_cross_entropy_with_logits")
    return _mean_loss(probability, target, name="binary_cross_entropy",
                      formula=_log_loss)


def hinge_loss(prediction: Any, target: Any) -> Tensor:
    """The mean of max(0, 1 - target * prediction), for targets -1 or 1.

    Raises ValueError for other targets, or if the two shapes differ.
    """
    target = as_tensor(target)
    if not np.all((target == 1) | (target == -1)):
        raise ValueError("hinge_loss: the targets must be -1 or 1; "
                         "of 0 and 1 make 2 * t - 1")
    return _mean_loss(prediction, target, name="hinge_loss",
                      formula=lambda p, t: relu(1 - t * p))


# ## III.2 Modules: where do the numbers live?
#
# The numbers that training changes live in a network, and this is one:
#
#     >>> manual_seed(0)
#     >>> model = MLP(2, [16, 1])  # two inputs, a layer of 16, one output
#     >>> print(model)
#     MLP(
#       (0): Linear(weight=(16, 2), bias=(16,))
#       (1): ReLU()
#       (2): Linear(weight=(1, 16), bias=(1,))
#     )
#     >>> print(model(np.zeros((5, 2))).shape)  # five points, an answer for each
#     (5,)
#
# A layer of your own is a class with an `__init__` that sets attributes and a `forward`
# that computes with them. This one multiplies each column by a factor that training
# finds:
#
#     >>> class Scale(Module):
#     ...     def __init__(self, columns):
#     ...         self.factor = Tensor(np.ones(columns))
#     ...
#     ...     def forward(self, x):  # (N, columns) -> (N, columns)
#     ...         return x * self.factor
#     ...
#
# There is no registry. To find the parameters, look through the attributes, in the
# order in which they were set, and through those of the modules among them:
#
#     >>> def naive_parameters(module, prefix=""):
#     ...     for name, value in vars(module).items():
#     ...         if isinstance(value, Module):
#     ...             yield from naive_parameters(value, f"{prefix}{name}.")
#     ...         elif isinstance(value, Tensor) and value.requires_grad:
#     ...             yield f"{prefix}{name}", value
#     ...
#     >>> print(*(name for name, _ in naive_parameters(Sequential(Scale(2), model))))
#     0.factor 1.0.weight 1.0.bias 1.2.weight 1.2.bias
#
# The kind of an attribute decides what becomes of it:
#
#     | attribute                       | trained | saved | for example               |
#     | ------------------------------- | ------- | ----- | ------------------------- |
#     | a Parameter, or a tracked leaf  | yes     | yes   | a weight                  |
#     | a constant Tensor, an ndarray   | no      | yes   | batch norm's running mean |
#     | a tracked result                | no      | no    | the last hidden state     |
#     | a number, a text, a function    | no      | no    | a setting                 |
#
# So a plain Tensor is trained. To save one without training it, make it a constant with
# `t.detach()`. A weight can be *frozen* for part of the training, by
# `p.requires_grad = False`. A plain Tensor is then a constant, and no longer listed. A
# Parameter still is, so that the optimizer has it when it thaws.


class Parameter(Tensor):
    """A Tensor that its module trains, and still lists while it is frozen.

    It has the dtype of its data: give float32 for use beside layers, which are float32.
    """

    __slots__ = ()


_PLAIN.add(Parameter)  # beside a Tensor it needs no conversion (II.9)


def _is_trained(value: Any) -> bool:
    """Whether an attribute is a parameter: a Parameter, or a tracked leaf."""
    return isinstance(value, Parameter) or (_tracked(value) and value._op is None)


def _is_saved(value: Any) -> bool:
    """Whether an attribute is saved: a parameter, a constant Tensor or an array."""
    constant = isinstance(value, Tensor) and not value.requires_grad
    return constant or isinstance(value, np.ndarray) or _is_trained(value)


# The real search also looks into lists, tuples and dicts, and puts the position or key
# into the dotted name. It has two steps. `_held` finds what one module holds, also
# inside its lists. `Module._contents` then goes on into the modules among these:
#
#     >>> module = Module()
#     >>> module.blocks = [Linear(2, 2), ReLU()]
#     >>> print(*(name for name, _ in _held(module)))
#     blocks.0 blocks.1
#     >>> print(*(name for name, _ in module._contents()))
#     blocks.0 blocks.0.weight blocks.0.bias blocks.1


def _held(holder: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that a module, list, tuple or dict holds."""
    items = vars(holder) if isinstance(holder, Module) else holder
    pairs = items.items() if isinstance(items, dict) else enumerate(items)

    for key, value in pairs:
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple, dict)):
            yield from _held(value, f"{name}.")
        else:
            _refuse_unsearchable(name, value)
            yield name, value


class Module:
    """The base of layers: set attributes in `__init__`, and write a `forward`."""

    training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What it computes. Each class writes its own; users call the module."""
        raise NotImplementedError(f"{type(self).__name__} has no forward method; write "
                                  "one in the class, `def forward(self, x): ...`")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`, with arrays of floats in the dtype of the parameters.

        (Otherwise, float64 data would make a float32 network compute in float64.) A
        list given by position is stacked to one array or Tensor. A tuple stays, because
        it may be a setting, such as an axis.
        """
        args = [self._convert(self._stack(a)) for a in args]
        kwargs = {name: self._convert(a) for name, a in kwargs.items()}
        return self.forward(*args, **kwargs)

    # What is in it?

    def _contents(self, prefix: str = "",
                  above: tuple = ()) -> Iterator[tuple[str, Any]]:
        """(dotted name, value) of everything in this module and all modules below it.

        An object that occurs twice is listed twice, under both names. But no module is
        listed inside itself (`above` are those that we are in), or else the search
        would never end after `child.parent = self`.
        """
        above = (*above, self)
        for name, value in _held(self, prefix):
            if not isinstance(value, Module):
                yield name, value
            elif all(value is not module for module in above):
                yield name, value
                yield from value._contents(f"{name}.", above)

    def modules(self) -> list:
        """This module and all modules below it, each once."""
        below = [value for _, value in self._contents() if isinstance(value, Module)]
        by_identity = {id(module): module for module in [self, *below]}
        return list(by_identity.values())

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """(dotted name, parameter) pairs; one that occurs twice has its first name."""
        names = {}
        for name, value in self._contents():
            if _is_trained(value):
                names.setdefault(value, name)  # (Tensors hash by identity)
        return [(name, parameter) for parameter, name in names.items()]

    def parameters(self) -> list[Tensor]:
        """The parameters, each once."""
        return [parameter for _, parameter in self.named_parameters()]

    # Training

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> Self:
        """Set `training`, which dropout and batch norm read, here and below."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set this module and all below it to evaluation."""
        return self.train(False)

    # Saving and converting. (The functions are at the section's end.)

    def _state(self) -> dict[str, Any]:
        """Dotted name -> Tensor or array, for everything that is saved."""
        state = {}
        for name, value in self._contents():
            if _is_saved(value):
                if name in state:
                    raise ValueError(f"state_dict: two arrays are named {name!r}; give "
                                     "one another name, or a dict's key without a dot")
                state[name] = value
        return state

    def state_dict(self) -> dict[str, np.ndarray]:
        """Dotted name -> a copy, for parameters and constants, say running means."""
        return {name: np.array(_value(item)) for name, item in self._state().items()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Copy in the arrays of a state_dict: all, or none if there is an error.

        Raises KeyError if names are missing or unknown (`strict=False` passes over
        these), ValueError if a shape differs, TypeError if floats would become
        integers.
        """
        current = self._state()
        for name, array in _fitting("load_state_dict", current, state, strict).items():
            _overwrite(current[name], array)

    def astype(self, dtype: Any) -> Self:
        """Convert parameters and constants in place, say to float64; returns self.

        Tensors, lists and dicts stay the same objects, because others may refer to
        them. Arrays and tuples, which cannot change their dtype or items, are replaced.
        Integers and bools keep their dtype. Gradients are forgotten.
        """
        dtype = np.dtype(dtype)
        if dtype.kind != "f":
            raise TypeError("Module.astype: parameters are floating-point numbers, and "
                            f"cannot become {dtype}; use float32 or float64")
        for module in self.modules():
            _as_dtype(vars(module), dtype)
        return self

    # Care

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse an array in a parameter's place: it would silently not be trained."""
        if isinstance(value, np.ndarray) and _is_trained(getattr(self, name, None)):
            raise TypeError(f"{type(self).__name__}.{name} is a parameter, and an "
                            f"array would not be trained; write .{name}.data = ... or "
                            "assign a Tensor")
        super().__setattr__(name, value)

    def _stack(self, value: Any) -> Any:
        """A list as one array, or as a Tensor if it holds any; all else as it is."""
        if not isinstance(value, list):
            return value
        try:
            return as_tensor(value) if _holds_tensor(value) else np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: a list is stacked to one array, "
                             f"but the items of this one differ in shape ({error}); "
                             "several arrays go into a tuple") from None

    def _convert(self, value: Any) -> Any:
        """An array of floats in the dtype of the first parameter; all else as it is."""
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            return value
        dtypes = (p.dtype for _, p in self._contents() if _is_trained(p))
        return value.astype(next(dtypes, value.dtype), copy=False)

    # (For a module that is met inside itself, recursive_repr writes three dots.)
    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        settings = [f"{name}={_brief(value)}" for name, value in vars(self).items()
                    if name != "training" and _is_shown(value)]
        head = f"{type(self).__name__}({', '.join(settings)}"

        # (A layer of a Sequential, whose name is a number, may be a function.)
        layers = [f"({name}): {_brief(value)}" for name, value in _held(self)
                  if isinstance(value, Module) or name.isdigit()]
        if not layers:
            return f"{head})"
        # Each level stands two columns further in.
        below = "\n".join(layers).replace("\n", "\n  ")
        return f"{head}\n  {below}\n)"


# ### Layers
#
# A layer is a function together with the numbers it needs. `Linear` and `linear` are
# the model for all: the class makes a weight, and `forward` gives it to the function.
# (Some functions come in III.4 to III.6; here, see which arrays their layers keep.)
#
# Where do the weights begin? If all were zero, all units would receive the same
# gradient and stay alike for ever, so weights begin at random. How large should they
# be? A unit adds up n products of weights and inputs. If their signs are random, most
# of the sum cancels, and about sqrt(n) times one product is left. So with weights of a
# size of about 1 / sqrt(n), the sum is about as large as one input, through many layers.
# Linear and Conv2d draw them evenly between -1 / sqrt(n) and 1 / sqrt(n), as PyTorch
# does, so that its learning rates fit. (That is a little less: their root mean square is
# 1 / sqrt(3 n), and numbers shrink by sqrt(3) in each layer.)


_Mode.rng = None  # each thread's; None until it is asked for


def _rng() -> np.random.Generator:
    if _mode.rng is None:
        _mode.rng = np.random.default_rng()
    return _mode.rng


def manual_seed(seed: int | Sequence[int]) -> None:
    """Seed this thread's initialization, dropout, shuffling and sampling."""
    _mode.rng = np.random.default_rng(seed)


def _uniform(bound: float, *shape: int) -> Parameter:
    """A float32 parameter, drawn between -bound and bound."""
    values = _rng().uniform(-bound, bound, shape)
    return Parameter(values.astype(np.float32))


def _positive(what: str, **sizes: int) -> None:
    """Raise ValueError unless all sizes are positive integers."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{what}: {name} must be a positive integer, got {size!r}")


class Linear(Module):
    """x @ weight.T + bias, with a weight of shape (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        _positive("Linear", in_features=in_features, out_features=out_features)
        bound = 1 / math.sqrt(in_features)
        self.weight = _uniform(bound, out_features, in_features)
        self.bias = _uniform(bound, out_features) if bias else None

    def forward(self, x: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


class Conv2d(Module):
    """`conv2d` with a weight of shape (out_channels, in_channels, kh, kw).

    Sizes are numbers, or pairs for height and width. With `padding="same"` (and stride
    1) the result is as large as the image.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any,
                 stride: Any = 1, padding: Any = 0, bias: bool = True) -> None:
        _positive("Conv2d", in_channels=in_channels, out_channels=out_channels)
        height, width = _pair(kernel_size, "Conv2d: kernel_size")  # (III.4)
        # These two are called for their errors only.
        _pair(stride, "Conv2d: stride")
        _around(padding, (height, width), stride, "Conv2d: padding")

        self.stride = stride
        self.padding = padding
        products = in_channels * height * width  # that each output adds up
        bound = 1 / math.sqrt(products)
        self.weight = _uniform(bound, out_channels, in_channels, height, width)
        self.bias = _uniform(bound, out_channels) if bias else None

    def forward(self, x: Any) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, oh, ow)."""
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


class BatchNorm2d(Module):
    """`batch_norm` of each channel, with running statistics for evaluation."""

    def __init__(self, num_features: int, eps: float = 1e-5,
                 momentum: float = 0.1) -> None:
        _positive("BatchNorm2d", num_features=num_features)
        self.eps = eps
        self.momentum = momentum
        self.weight = Parameter(np.ones(num_features, np.float32))
        self.bias = Parameter(np.zeros(num_features, np.float32))
        # Plain arrays are saved, but not trained.
        self.running_mean = np.zeros(num_features, np.float32)
        self.running_var = np.ones(num_features, np.float32)

    def forward(self, x: Any) -> Tensor:
        """(N, C, H, W) or (N, C) -> the same shape."""
        return batch_norm(x, self.running_mean, self.running_var, self.weight,
                          self.bias, training=self.training, momentum=self.momentum,
                          eps=self.eps)


class LayerNorm(Module):
    """`layer_norm` over the last axis, which has `normalized_shape` elements."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5,
                 bias: bool = True) -> None:
        _positive("LayerNorm", normalized_shape=normalized_shape)
        self.eps = eps
        self.weight = Parameter(np.ones(normalized_shape, np.float32))
        self.bias = Parameter(np.zeros(normalized_shape, np.float32)) if bias else None

    def forward(self, x: Any) -> Tensor:
        """(..., normalized_shape) -> the same shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(Module):
    """A table with one row for each of `num_embeddings` integers, at first N(0, 1)."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        shape = (num_embeddings, embedding_dim)
        _positive("Embedding", num_embeddings=shape[0], embedding_dim=shape[1])
        self.weight = Parameter(_rng().standard_normal(shape, np.float32))

    def forward(self, ids: Any) -> Tensor:
        """Integers (...) -> (..., embedding_dim)."""
        return embedding(ids, self.weight)


# The other layers have no arrays. They make a function a module, so that it has its
# settings with it, and `print` shows it.


class Dropout(Module):
    """`dropout` with probability p in training. In evaluation, x is left as it is."""

    def __init__(self, p: float = 0.5) -> None:
        _check_share("Dropout", p)
        self.p = p

    def forward(self, x: Any) -> Tensor:
        """Any shape -> the same shape."""
        return dropout(x, self.p, training=self.training)


class _Pool2d(Module):
    """The base of the two pools. Sizes are numbers, or pairs for height and width.

    Windows lie side by side unless a stride is given.
    """

    def __init__(self, kernel_size: Any, stride: Any = None) -> None:
        name = type(self).__name__
        # `_pair` is called for its errors only.
        _pair(kernel_size, f"{name}: kernel_size")
        if stride is not None:
            _pair(stride, f"{name}: stride")
        self.kernel_size = kernel_size
        self.stride = stride


class MaxPool2d(_Pool2d):
    """`max_pool2d`: the largest element of each window."""

    def forward(self, x: Any) -> Tensor:
        """(N, C, H, W) -> (N, C, oh, ow)."""
        return max_pool2d(x, self.kernel_size, self.stride)


class AvgPool2d(_Pool2d):
    """`avg_pool2d`: the mean of each window."""

    def forward(self, x: Any) -> Tensor:
        """(N, C, H, W) -> (N, C, oh, ow)."""
        return avg_pool2d(x, self.kernel_size, self.stride)


class Flatten(Module):
    """Each item of a batch, such as an image, as one row."""

    def forward(self, x: Any) -> Tensor:
        """(N, ...) -> (N, the product of the other sizes)."""
        if np.ndim(x) == 0:
            raise ValueError("Flatten: needs a batch (N, ...), not a single number")
        return reshape(x, len(x), math.prod(x.shape[1:]))


class ReLU(Module):
    """`relu` as a layer: the larger of x and 0."""

    def forward(self, x: Any) -> Tensor:
        """Any shape -> the same shape."""
        return relu(x)


class Tanh(Module):
    """`tanh` as a layer: into (-1, 1)."""

    def forward(self, x: Any) -> Tensor:
        """Any shape -> the same shape."""
        return tanh(x)


class Sigmoid(Module):
    """`sigmoid` as a layer: into (0, 1)."""

    def forward(self, x: Any) -> Tensor:
        """Any shape -> the same shape."""
        return sigmoid(x)


class GELU(Module):
    """`gelu` as a layer: a relu without the corner."""

    def forward(self, x: Any) -> Tensor:
        """Any shape -> the same shape."""
        return gelu(x)


class CrossEntropy(Module):
    """`cross_entropy` as a module."""

    def forward(self, logits: Any, targets: Any) -> Tensor:
        """Logits (N, C) and integer targets (N,) -> a scalar."""
        return cross_entropy(logits, targets)


class MSE(Module):
    """`mse_loss` as a module."""

    def forward(self, prediction: Any, target: Any) -> Tensor:
        """Two arrays of one shape -> a scalar."""
        return mse_loss(prediction, target)


CrossEntropyLoss = CrossEntropy  # as PyTorch calls them
MSELoss = MSE


# ### One layer after another


class Sequential(Module):
    """Layers, one after another. A layer is a module, or any function of one argument.

        >>> model = Sequential(Linear(2, 3), np.tanh, Linear(3, 1))
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']

    `model[1]` is a layer, `model[:2]` a Sequential of two. `len` and `for` work as
    well. Parameters inside a function are not found: to train them, put them in a
    Module.
    """

    def __init__(self, *layers: Callable) -> None:
        for i, layer in enumerate(layers):
            _require_layer(i, layer)
            setattr(self, str(i), layer)  # layer 0 is the attribute "0"

    def forward(self, x: Any) -> Any:
        """Pass x from layer to layer."""
        for layer in self:
            x = layer(x)
        return x

    def _layers(self) -> list[tuple[str, Any]]:
        """(number, layer) pairs: the attributes whose name is a number."""
        return [(name, layer) for name, layer in vars(self).items() if name.isdigit()]

    def __iter__(self) -> Iterator[Callable]:
        return iter([layer for _, layer in self._layers()])

    def __len__(self) -> int:
        return len(self._layers())

    def __getitem__(self, index: int | slice) -> Any:
        layers = self._layers()
        if isinstance(index, slice):
            part = Sequential()
            # model[1:] begins with its layer "1", as in PyTorch.
            vars(part).update(layers[index])
            return part
        try:
            return layers[index][1]
        except IndexError:
            name = type(self).__name__
            raise IndexError(f"{name} has {len(layers)} layers, no [{index}]") from None


class MLP(Sequential):
    """Linear layers from nin to the sizes nouts, with relu between them.

    A last size of 1 is dropped, as in micrograd: (N, nin) -> (N,), (nin,) -> a scalar.
    """

    def __init__(self, nin: int, nouts: Sequence[int]) -> None:
        if isinstance(nouts, (int, np.integer)):
            raise TypeError(f"MLP: nouts has a size for each layer: [{nouts}], "
                            f"not {nouts}")
        sizes = [nin, *nouts]
        _positive("MLP", layers=len(sizes) - 1)

        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [Linear(fan_in, fan_out), ReLU()]
        # No relu at the end: an answer may be negative.
        super().__init__(*layers[:-1])

    def forward(self, x: Any) -> Tensor:
        """(..., nin) -> (..., nouts[-1]), or (...) if nouts[-1] is 1."""
        y = super().forward(x)
        return y.squeeze(-1) if y.shape[-1] == 1 else y


# ### Care: searching, printing, converting, loading
#
# The search for parameters needs what has an order and can be read again. Sequential
# needs what can be called.
def _refuse_unsearchable(name: str, value: Any) -> None:
    """Raise TypeError for a generator, or a set with modules in it."""
    if isinstance(value, types.GeneratorType):
        raise TypeError(f"{name} is a generator, which is read but once; "
                        "make it a list")
    is_set = isinstance(value, (set, frozenset))
    if is_set and any(isinstance(item, Module) for item in value):
        raise TypeError(f"{name} is a set, which has no order; make it a list")


def _require_layer(i: int, layer: Any) -> None:
    """Raise TypeError, with advice, unless Sequential can use `layer` number i."""
    if isinstance(layer, type):
        name = layer.__name__
        raise TypeError(f"Sequential: layer {i} is the class {name}; write {name}(...)")
    if not callable(layer):
        raise TypeError(f"Sequential: layer {i} is a {type(layer).__name__}, but "
                        "layers are modules or functions; of a list, write "
                        "Sequential(*layers)")


def _is_shown(value: Any) -> bool:
    """Whether `repr` shows an attribute beside its module's name."""
    if isinstance(value, tuple):
        return all(isinstance(n, (int, float)) for n in value)
    return isinstance(value, (Tensor, int, float, str))


def _brief(value: Any) -> str:
    """A Tensor as its shape, a function as its name, and all else as its repr."""
    if isinstance(value, Tensor):
        return str(value.shape)
    return getattr(value, "__name__", None) or repr(value)


# `Module.astype` converts whatever it can in place. `_as_dtype` returns what a list or
# dict shall hold instead of `value`: `value` itself, if that could be changed, or else
# a converted copy.
def _as_dtype(value: Any, dtype: np.dtype) -> Any:
    if isinstance(value, (list, dict)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(pairs):
            value[key] = _as_dtype(item, dtype)
    elif isinstance(value, tuple):
        items = [_as_dtype(item, dtype) for item in value]
        is_namedtuple = hasattr(value, "_make")
        return value._make(items) if is_namedtuple else tuple(items)
    elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(dtype)
    elif isinstance(value, Tensor) and _is_saved(value):
        value._data = np.asarray(value._data, dtype)
        value.grad = None
        _note_write(value)
    return value


# To load a state, we check all arrays before the first is written. So an error leaves
# the module as it was. The names and shapes are PyTorch's, such as `1.0.weight`, and
# (out, in) for a Linear. A state_dict can go in both directions, with two exceptions:
# PyTorch's BatchNorm2d also counts batches (num_batches_tracked, which `strict=False`
# passes over), and our attention's qkv.weight and proj.weight are called in_proj_weight
# and out_proj.weight there.
def _fitting(what: str, current: dict, state: dict, strict: bool = True) -> dict:
    """Name -> the array in `state` that will replace the `current` one, in its dtype.

    Raises an error that says which name (if `strict`), shape or kind of dtype differs.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{what}: needs a dict of arrays, such as state_dict() "
                        f"returns, not a {type(state).__name__}")

    missing = sorted(current.keys() - state.keys())
    unknown = sorted(state.keys() - current.keys())
    if strict and (missing or unknown):
        raise KeyError(f"{what}: missing {missing}, unknown {unknown}")

    fitting = {}
    for name in current:
        if name not in state:
            continue
        old = np.asarray(_value(current[name]))
        new = np.asarray(_value(state[name]))
        if new.shape != old.shape:
            raise ValueError(f"{what}: {name} has shape {new.shape}, not {old.shape}")
        if not np.can_cast(new.dtype, old.dtype, casting="same_kind"):
            raise TypeError(f"{what}: {name} holds {new.dtype}, which cannot become "
                            f"{old.dtype}")
        fitting[name] = new.astype(old.dtype, copy=False)
    return fitting


def _overwrite(target: Tensor | np.ndarray, array: np.ndarray) -> None:
    """Copy an array into a Tensor or array that a module saves."""
    if isinstance(target, Tensor):
        # A 0-d result may be a NumPy scalar, which cannot be written to.
        target._data = np.asarray(target._data)
        _note_write(target)
    _value(target)[...] = array


# ## III.3 Optimizers: how far?
#
# Gradients say which way is down, but not how far to go. Here is all of training, once.
# The data are points of two classes, each class in the shape of a half moon (IV.6).
#
#     >>> manual_seed(0)
#     >>> points, labels = make_moons(100, noise=0.1)
#     >>> model = MLP(2, [16, 1])
#     >>> for step in range(100):
#     ...     loss = binary_cross_entropy_with_logits(model(points), labels)
#     ...     loss.backward()
#     ...     for p in model.parameters():
#     ...         p.data -= 0.5 * p.grad.data
#     ...         p.grad = None
#     ...
#     >>> loss.item() < 0.3  # before the first step it is 0.61
#     True
#
# Every optimizer below is the inner loop, with a different rule for how far a parameter
# moves. A rule may remember something about each parameter, its *states*. **SGD**
# (stochastic gradient descent) with momentum moves like a ball that rolls downhill. Its
# state is a velocity: the sum of all gradients so far, each of which fades by a tenth
# in every later step:
#
#     >>> def naive_sgd(x, g, velocity, lr=0.1, momentum=0.9):
#     ...     velocity = momentum * velocity + g
#     ...     return x - lr * velocity, velocity
#     ...
#     >>> x, velocity = 1.0, 0.0
#     >>> for g in [1.0, 1.0, 1.0]:  # downhill in the same direction, three times
#     ...     x, velocity = naive_sgd(x, g, velocity)
#     ...     print(f"{x:.3f} {velocity:.2f}")
#     0.900 1.00
#     0.710 1.90
#     0.439 2.71
#
# The steps of SGD scale with the gradients, whose sizes can differ a thousandfold from
# layer to layer. **Adam** divides by that size. It keeps two running averages, of the
# gradient and of its square, and moves by about lr, whatever the scale. (An average
# begins at 0. If all gradients are g, it is (1 - b) g after one step, and after k steps
# (1 - b^k) g. It is divided by this factor.)
#
#     >>> def naive_adam(x, g, mean, square, step, lr=0.1, b1=0.9, b2=0.999, eps=1e-8):
#     ...     mean = b1 * mean + (1 - b1) * g
#     ...     square = b2 * square + (1 - b2) * g * g
#     ...     direction = mean / (1 - b1 ** step)
#     ...     size = np.sqrt(square / (1 - b2 ** step))  # root mean square (RMS)
#     ...     return x - lr * direction / (size + eps), mean, square
#     ...
#     >>> for g in [1000.0, 0.001]:
#     ...     x, mean, square = naive_adam(1.0, g, mean=0.0, square=0.0, step=1)
#     ...     print(f"{x:.3f}")
#     0.900
#     0.900
#
# The classes mainly add speed. A network may have fifty small arrays of parameters, and
# calling NumPy ten times on each takes longer than the arithmetic. So the parameters
# are copied end to end into one flat array, the gradients into a second, and each state
# into one more. For the network above:
#
#     weight (16, 2)    bias (16,)    weight (1, 16)    bias (1,)
#     |-----------------|-------------|-----------------|----------|
#     0                32            48                64         65    _bounds
#
# Then the rule, `_update`, runs once, on all 65 numbers. `step` decides which
# parameters move, and `_move` takes their numbers to the rule and back.


class Optimizer:
    """The base of all optimizers: a subclass names its states and writes `_update`.

    `params` are leaf Tensors (an iterable, a Module, or one Tensor). `lr`, the learning
    rate, and the other `settings` become attributes: numbers of at least 0, or tuples
    of these. Raises TypeError if a parameter is not a leaf Tensor; ValueError if there
    are no parameters, one is listed twice, or a setting is wrong.
    """

    _state_names: tuple[str, ...] = ()  # what `_update` takes after g

    def __init__(self, params: Any, lr: float, **settings: Any) -> None:
        name = type(self).__name__
        self.params = _listed(name, params)
        _check_parameters(name, self.params)
        for p in self.params:
            # A 0-d array may be a NumPy scalar, which cannot be written to.
            p._data = np.asarray(p._data)
        for key, value in dict(settings, lr=lr).items():
            _check_setting(name, key, value)
            setattr(self, key, value)

        # How many steps each parameter has made:
        self.steps = np.zeros(len(self.params), np.int64)
        # In a flat array, parameter i lies from _bounds[i] to _bounds[i + 1].
        ends = np.cumsum([p.size for p in self.params]).tolist()
        self._bounds = [0, *ends]
        dtype = np.result_type(*[p.dtype for p in self.params])  # the widest
        self._state = {key: np.zeros(ends[-1], dtype) for key in self._state_names}

        # Every step allocates the same arrays. While the optimizer exists, the process
        # keeps the memory of those it has freed (IV.4).
        _keep_freed_memory(self)

    def _update(self, step: int, x: np.ndarray, g: np.ndarray,
                *states: np.ndarray) -> None:
        """Move the parameters x, and renew the states, in place; g may be overwritten.

        All are flat arrays of one length. `step` counts the steps of these parameters,
        from 1.
        """
        raise NotImplementedError(f"{type(self).__name__} has no _update method")

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        has_gradient = [p.grad is not None for p in self.params]
        self.steps += has_gradient

        # Adam's rule needs the count of steps, and a parameter without a gradient makes
        # none. So only neighbours with one count move together: of 7 7 0 7, where 0
        # stays, the first two, then the last. Usually all parameters are one group.
        counts = np.where(has_gradient, self.steps, 0).tolist()
        first = 0
        for count, neighbours in itertools.groupby(counts):
            end = first + len(list(neighbours))
            if count > 0:
                self._move(first, end, count)
            first = end

    def _move(self, first: int, end: int, step: int) -> None:
        """Make step number `step` of the parameters `first` to `end - 1`."""
        params = self.params[first:end]
        arrays = [p._data for p in params]
        g = np.concatenate([p.grad._data.ravel() for p in params])
        place = slice(self._bounds[first], self._bounds[end])
        states = [state[place] for state in self._state.values()]

        # Arrays that lie end to end in memory, as DataParallel lays them, are pieces of
        # one flat array (IV.5), which moves in place. Others are copied there and back.
        x = _side_by_side(arrays)
        is_copy = x is None
        if is_copy:
            x = np.concatenate([a.ravel() for a in arrays])
        for block in _blocks(x, g, *states):  # each block fits the cache (II.7)
            self._update(step, *block)
        if is_copy:
            _copy_back(x, arrays)

        for p in params:
            _note_write(p)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: the parameters' steps, lr, and the states."""
        states = {key: state.copy() for key, state in self._state.items()}
        return {"steps": self.steps.copy(), "lr": float(self.lr), **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict.

        Raises KeyError if names differ, ValueError if shapes do.
        """
        state = dict(state)
        # (A file of the version before this one has one number for all parameters.)
        if "steps" in state and np.ndim(state["steps"]) == 0:
            state["steps"] = np.full(len(self.params), state["steps"])
        what = f"{type(self).__name__}.load_state_dict"
        new = _fitting(what, self.state_dict(), state)
        self.steps = new["steps"].copy()
        self.lr = float(new["lr"])
        self._state = {key: new[key].copy() for key in self._state}


def _copy_back(flat: np.ndarray, arrays: list[np.ndarray]) -> None:
    """Copy the parts of `flat` into the arrays, which are end to end in it."""
    start = 0
    for a in arrays:
        a[...] = flat[start:start + a.size].reshape(a.shape)
        start += a.size


def _listed(name: str, params: Any) -> list[Tensor]:
    """The Tensors of a Module or of an iterable, or one Tensor, as a list."""
    if isinstance(params, Module):
        params = params.parameters()
    params = [params] if isinstance(params, Tensor) else list(params)
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: needs Tensors, such as model.parameters(), not "
                            f"{type(p).__name__}")
    return params


def _check_parameters(name: str, params: list[Tensor]) -> None:
    if not params:
        raise ValueError(f"{name}: there are no parameters to optimize")
    if len(set(params)) < len(params):
        raise ValueError(f"{name}: a parameter is listed twice")
    if any(p._op is not None for p in params):
        raise TypeError(f"{name}: parameters must be leaf Tensors, not results of "
                        "operations")


def _check_setting(name: str, key: str, value: Any) -> None:
    numbers = np.asarray(value)  # (of a tuple, such as Adam's betas, each)
    is_number = numbers.dtype.kind in "iuf"
    if not (is_number and np.all((0 <= numbers) & (numbers < np.inf))):
        raise ValueError(f"{name}: {key} must be at least 0, and finite, not {value!r}")


class SGD(Optimizer):
    """Descent with momentum (Polyak, 1964).

    With `nesterov`, a step uses the velocity that the next step would have if the
    gradient stayed the same: g + momentum * velocity (Sutskever and others, 2013).
    `weight_decay` times the parameter is added to its gradient, so that a parameter
    shrinks where nothing else moves it.
    """

    _state_names = ("velocity",)

    def __init__(self, params: Any, lr: float = 0.01, momentum: float = 0.0,
                 nesterov: bool = False, weight_decay: float = 0.0) -> None:
        if nesterov and momentum == 0:
            raise ValueError("SGD: nesterov needs a momentum")
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)
        self.nesterov = nesterov

    def _update(self, step: int, x: np.ndarray, g: np.ndarray,
                velocity: np.ndarray) -> None:
        if self.weight_decay:
            g += self.weight_decay * x

        direction = g
        if self.momentum:
            velocity *= self.momentum
            velocity += g
            direction = g + self.momentum * velocity if self.nesterov else velocity
        x -= self.lr * direction


class Adam(Optimizer):
    """Steps of about lr: the mean gradient over its RMS (Kingma and Ba, 2015).

    `betas` are the factors (b1, b2), in [0, 1), by which the means of the gradient and
    of its square fade in each step. `weight_decay` is as in SGD.
    """

    _state_names = ("mean", "square")
    _decoupled = False  # whether weight_decay leaves the gradient as it is

    def __init__(self, params: Any, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"{type(self).__name__}: betas must be two in [0, 1), "
                             f"not {betas}")
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _update(self, step: int, x: np.ndarray, g: np.ndarray, mean: np.ndarray,
                square: np.ndarray) -> None:
        if self._decoupled:
            x *= 1 - self.lr * self.weight_decay
        elif self.weight_decay:
            g += self.weight_decay * x

        b1, b2 = self.betas
        mean *= b1
        mean += (1 - b1) * g
        square *= b2
        square += (1 - b2) * (g * g)

        c = 1 - b1 ** step
        root = math.sqrt(1 - b2 ** step)
        # naive_adam's step is `lr * (mean / c) / (sqrt(square) / root + eps)`. Multiply
        # numerator and denominator by root, and take the numbers to the front:
        rate = self.lr * root / c
        x -= rate * (mean / (np.sqrt(square) + self.eps * root))


class AdamW(Adam):
    """Adam whose weight_decay shrinks x itself (Loshchilov and Hutter, 2019).

    Adam adds the decay to the gradient, and so divides it by the gradient's size:
    parameters with large gradients hardly decay.
    """

    _decoupled = True

    def __init__(self, params: Any, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class CosineWarmupLR:
    """Sets an optimizer's lr: a line up to its first value, then half a cosine down.

    Call `step()` after each optimizer step. (Loshchilov and Hutter, 2017; no restarts.)

        >>> sgd = SGD(Tensor(0.0), lr=1.0)
        >>> schedule = CosineWarmupLR(sgd, warmup_steps=2, total_steps=6)
        >>> print(*(f"{schedule.rate(step):.2f}" for step in range(7)))
        0.50 1.00 1.00 0.85 0.50 0.15 0.00

    After `total_steps` the rate stays at `min_lr`.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int,
                 min_lr: float = 0.0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"CosineWarmupLR: {warmup_steps} warmup_steps "
                             f"of {total_steps} steps")
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_lr = min_lr
        self.max_lr = optimizer.lr
        self._go_to(0)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, 2, ..."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        cosine = math.cos(math.pi * min(1.0, done))
        return self.min_lr + 0.5 * (self.max_lr - self.min_lr) * (1 + cosine)

    def step(self) -> None:
        """Move on to the next step's learning rate."""
        self._go_to(self.steps + 1)

    def _go_to(self, step: int) -> None:
        self.steps = step
        self.optimizer.lr = self.rate(step)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {"steps": self.steps, "max_lr": self.max_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict."""
        self.max_lr = float(state["max_lr"])
        self._go_to(int(state["steps"]))


# One strange batch can have a gradient a hundred times as long as all others, and undo
# in one step what a thousand steps have learned. So gradients are often shortened to a
# usual length. Take two parameters with the gradients 3 and 4. Their joint norm is
# sqrt(9 + 16) = 5. If at most 1 is allowed, both are divided by 5.
def clip_grad_norm(params: Any, max_norm: float) -> float:
    """Scale gradients to a joint 2-norm of at most max_norm; returns the norm before.

    `params` are as for an optimizer. If the norm is not finite, the gradients stay as
    they are. Raises ValueError unless max_norm is above 0. (Pascanu, Mikolov and
    Bengio, 2013.)
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be above 0, not {max_norm}")
    params = [p for p in _listed("clip_grad_norm", params) if p.grad is not None]

    # float16 is computed in float32: its squares may be too large for float16 (II.7),
    # and a small factor would be 0 in it.
    grads = [astype(p.grad, np.float32) if p.dtype == np.float16 else p.grad
             for p in params]
    squares = [float(np.vdot(g._data, g._data)) for g in grads]
    norm = math.sqrt(sum(squares))

    if max_norm < norm < math.inf:
        for p, g in zip(params, grads):
            p.grad = g * (max_norm / norm)  # (converted to the dtype of p)
    return norm


# ## III.4 Images: a convolution as a product?
#
# A convolution slides a small window over an image, and at every place takes the same
# weighted sum of what it sees. Here are an image of 4 x 4, and all windows of 3 x 3 in
# it:
#
#      0  1  2  3
#      4  5  6  7         0  1  2       1  2  3       4  5  6       5  6  7
#      8  9 10 11         4  5  6       5  6  7       8  9 10       9 10 11
#     12 13 14 15         8  9 10       9 10 11      12 13 14      13 14 15
#
# If each window is written as a column, all weighted sums are one product: a row of 9
# weights times a matrix of 9 x 4 (im2col: Chellapilla, Puri and Simard, 2006). If all
# weights are 1, the product is the sum of each window. (`_gather`, below, gives the
# rows of the matrix.)
#
#     >>> image = np.arange(16).reshape(1, 1, 4, 4)  # one image of one channel
#     >>> columns = np.stack(_gather(image, (3, 3), (1, 1))).reshape(9, 4)
#     >>> print(np.ones(9, int) @ columns)
#     [45 54 81 90]
#     >>> print(columns)
#     [[ 0  1  4  5]
#      [ 1  2  5  6]
#      [ 2  3  6  7]
#      [ 4  5  8  9]
#      [ 5  6  9 10]
#      [ 6  7 10 11]
#      [ 8  9 12 13]
#      [ 9 10 13 14]
#      [10 11 14 15]]
#
# Now read the matrix by rows. Each row belongs to one position *in the window*: the
# first, [0 1 4 5], is what the four windows see in their upper left corner. That is the
# image without its last two rows and columns: a slice, and NumPy's slices cost nothing.
# So we gather nine slices, and need not visit window after window.
#
# A color image has three channels, and a window sees all of them. Then a column has 27
# numbers. And each row of 27 weights makes one channel of the result.
#
# The way back goes through the same slices: what a row of the matrix receives is added
# to the image where that row was gathered. If every entry receives 1, each pixel
# receives the number of windows that see it:
#
#     >>> ones = [np.ones((2, 2), int)] * 9
#     >>> print(_scatter_back(ones, image, (3, 3), (1, 1))[0, 0])
#     [[1 2 2 1]
#      [2 4 4 2]
#      [2 4 4 2]
#      [1 2 2 1]]
#
# Pooling gathers in the same way, and takes the maximum of the slices, or their mean.
#
# Images are (N, C, H, W): batch, channels, height and width. Results have height and
# width (oh, ow). Sizes of windows, strides and paddings are one number, or a pair for
# height and width.


def _slices(n: int, k: int, step: int) -> list[slice]:
    """For each position in a window of k, what all windows on a line of n see there.

    On a line of 5, with a step of 2, two windows of 3 fit: [0 1 2] and [2 3 4]. In
    their first position they see 0 and 2:

        >>> print(*[np.arange(5)[position] for position in _slices(5, 3, 2)])
        [0 2] [1 3] [2 4]
    """
    last = n - k  # no window begins later
    return [slice(i, i + last + 1, step) for i in range(k)]


def _gather(x: Any, kernel_size: Any, stride: Any = None) -> list:
    """For each position in a window, what all windows see there: a view (N, C, oh, ow).

    The positions are taken row by row. If the stride is None, it is the kernel's size.
    """
    (kh, kw), (sh, sw) = _window_sizes(x, kernel_size, stride)  # checked, see below
    rows = _slices(x.shape[2], kh, sh)
    columns = _slices(x.shape[3], kw, sw)
    return [x[:, :, i, j] for i in rows for j in columns]


def _scatter_back(shares: Iterable, x: np.ndarray, kernel_size: Any,
                  stride: Any) -> np.ndarray:
    """The transpose of `_gather`: zeros like x, with each share added in its view."""
    dx = np.zeros_like(x)
    for view, share in zip(_gather(dx, kernel_size, stride), shares):
        view += share  # and so to dx
    return dx


# A convolution takes three steps: pad, gather, weighted sum. (`_around` says how many
# zeros go before and after each line. It stands at the section's end, with all that
# reads sizes and refuses wrong ones.) In the einsum, k is the position in the window.
def _conv2d_definition(x, weight, bias=None, stride=1, padding=0):
    o, c, *kernel = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), *_around(padding, kernel, stride)))
    windows = np.stack(_gather(padded, kernel, stride))  # (kh kw, N, C, oh, ow)
    weight = weight.reshape(o, c, -1)  # (O, C, kh kw)
    y = np.einsum("knchw,ock->nohw", windows, weight)  # (N, O, oh, ow)
    return y if bias is None else y + bias.reshape(-1, 1, 1)


# The kernel takes the same steps, but lays the images out in another order. A slice of
# an image has short lines, of some ten pixels, and NumPy is slow at those (see LOOPS,
# II.7). But a batch has a hundred images. So in memory the batch is last, (C, H, W, N),
# and the lines are long. Callers see a transposed view of that, (N, C, H, W), as
# always. Elementwise operations keep the order in memory, so the next convolution
# finds the batch last, too. The product is
#
#     weight (O, C kh kw) @ columns (C kh kw, oh ow N) -> y (O, oh ow N)
#
# In backward, the weight receives `g @ columns^T`. The columns receive `weight^T @ g`,
# which is scattered back to the image.
_BATCH_LAST = (1, 2, 3, 0)   # (N, C, H, W) -> (C, H, W, N)
_BATCH_FIRST = (3, 0, 1, 2)  # and back, to the order that callers see


def _pad_batch_last(x: np.ndarray, around: list[tuple]) -> tuple[np.ndarray, tuple]:
    """x amid zeros, with the batch last in memory, and the indices of x in that."""
    n, c, h, w = x.shape
    (top, bottom), (left, right) = around
    padded = np.zeros((c, top + h + bottom, left + w + right, n), x.dtype)
    padded = padded.transpose(_BATCH_FIRST)  # a view
    inside = np.s_[:, :, top:top + h, left:left + w]
    padded[inside] = x
    return padded, inside


@fused(_conv2d_definition, operands=3)
def conv2d(x: Any, weight: Any, bias: Any = None, stride: Any = 1,
           padding: Any = 0) -> Tensor:
    """The weighted sums over windows, as in PyTorch: (N, C, H, W) -> (N, O, oh, ow).

    The weight is (O, C, kh, kw) and the bias (O,). `padding` zeros are put around the
    images; "same" keeps their size (for stride 1). ValueError if shapes do not fit.
    """
    _check_conv2d(x, weight, bias)
    o, c, *kernel = weight.shape
    padded, inside = _pad_batch_last(x, _around(padding, kernel, stride))
    views = [view.transpose(_BATCH_LAST) for view in _gather(padded, kernel, stride)]
    k = len(views)  # kh kw
    _, oh, ow, n = views[0].shape  # (C, oh, ow, N)

    def columns():  # made twice, for kept they take too much memory
        return np.stack(views, axis=1).reshape(c * k, oh * ow * n)

    matrix = weight.reshape(o, c * k)
    y = matrix @ columns()  # (O, oh ow N)
    y = y if bias is None else _plus(y, bias[:, None])

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = g.transpose(_BATCH_LAST).reshape(o, oh * ow * n)
        dx = dweight = dbias = None
        if wanted[0]:
            shares = (matrix.T @ g).reshape(c, k, oh, ow, n)  # (C, kh kw, oh, ow, N)
            shares = shares.transpose(1, 4, 0, 2, 3)  # (kh kw, N, C, oh, ow)
            dx = _scatter_back(shares, padded, kernel, stride)[inside]
        if wanted[1]:  # g @ columns^T, as a transpose (see PRODUCTS, II.7)
            dweight = (columns() @ g.T).T.reshape(weight.shape)
        if bias is not None and wanted[2]:
            dbias = _row_sum(g)[:, 0]
        return dx, dweight, dbias

    return y.reshape(o, oh, ow, n).transpose(_BATCH_FIRST), pullback  # (N, O, oh, ow)


# The largest element of a window receives the window's cotangent, and the others
# receive nothing. If several are largest, the first receives it. A nan counts as the
# largest, as in PyTorch.
def _max_pool2d_definition(x, kernel_size, stride=None):
    largest, *others = _gather(x, kernel_size, stride)
    for other in others:
        stays = (largest >= other) | np.isnan(largest)
        largest = np.where(stays, largest, other)
    return largest


# The kernel finds the largest elements by np.maximum. On the way back it goes through
# the positions in order, and for each asks which windows are to give their g to the
# image here. `chosen` are those that have their largest element here and have not given
# yet. For one window of 2 x 2, [[3, 7], [7, 1]], it goes like this:
#
#     the element       3      7      7      1
#     is the largest    no     yes    yes    no
#     unclaimed         yes    yes    no     no
#     chosen            no     yes    no     no
#
# If windows overlap, a pixel may be chosen by several, and adds up what it receives.
@fused(_max_pool2d_definition, operands=1)
def max_pool2d(x: Any, kernel_size: Any, stride: Any = None) -> Tensor:
    """The largest element of each window, (N, C, H, W) -> (N, C, oh, ow).

    If the stride is None, it is the kernel's size. Raises ValueError if the windows do
    not fit.
    """
    views = _gather(x, kernel_size, stride)
    y = functools.reduce(np.maximum, views)
    overlap = stride is not None and np.any(np.greater(kernel_size, stride))

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = _dense(g, y)
        has_nan = np.isnan(np.max(y, initial=0))  # if not, no view is searched for one
        dx = np.zeros_like(x)
        share = np.empty_like(y)  # (N, C, oh, ow), as are the next two
        unclaimed = np.ones_like(y, bool)
        for view, target in zip(views, _gather(dx, kernel_size, stride)):
            chosen = view == y
            if has_nan:
                chosen |= np.isnan(view)  # because nan == nan is False
            chosen &= unclaimed
            unclaimed ^= chosen  # these were unclaimed so far
            if overlap:
                _write_chosen(share, g, chosen)  # g where chosen, else 0 (II.3)
                target += share
            else:
                _write_chosen(target, g, chosen)
        return (dx,)

    return y, pullback


def _avg_pool2d_definition(x, kernel_size, stride=None):
    return np.mean(np.stack(_gather(x, kernel_size, stride)), axis=0)


@fused(_avg_pool2d_definition, operands=1)
def avg_pool2d(x: Any, kernel_size: Any, stride: Any = None) -> Tensor:
    """The mean of each window, with the arguments of `max_pool2d`."""
    views = _gather(x, kernel_size, stride)
    y = functools.reduce(np.add, views) / len(views)

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        share = g / len(views)
        return (_scatter_back(itertools.repeat(share), x, kernel_size, stride),)

    return y, pullback


# The rest of this section reads sizes, and refuses those that do not fit.
def _pair(size: Any, what: str, least: int = 1) -> tuple[int, int]:
    """(height, width), from a pair or from one number for both."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    are_whole = all(isinstance(n, (int, np.integer)) for n in pair)
    if len(pair) != 2 or not are_whole or min(pair) < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, or two "
                         f"for height and width, not {size!r}")
    return pair


def _window_sizes(x: Any, kernel_size: Any, stride: Any) -> tuple[tuple, tuple]:
    """The kernel and the stride as pairs, if such windows fit into x."""
    kernel = _pair(kernel_size, "the kernel size")
    strides = kernel if stride is None else _pair(stride, "the stride")
    if x.ndim != 4:
        raise ValueError(f"images are (N, C, H, W), not of {x.ndim} axes; "
                         "one image is x[None]")
    size = tuple(x.shape[2:])
    if kernel[0] > size[0] or kernel[1] > size[1]:
        raise ValueError(f"a window of {kernel} does not fit into images of {size}, "
                         "padding included")
    return kernel, strides


def _around(padding: Any, kernel: Sequence[int], stride: Any,
            what: str = "the padding") -> list[tuple[int, int]]:
    """The zeros to put before and after each line: [(top, bottom), (left, right)].

    A line of n with k - 1 zeros more has n places for a window of k: that is "same".
    """
    if padding != "same":
        height, width = _pair(padding, f"{what}, if it is not 'same',", least=0)
        return [(height, height), (width, width)]

    if _pair(stride, "the stride") != (1, 1):
        half = tuple(k // 2 for k in kernel)
        raise ValueError(f"{what} 'same' is for stride 1, not {stride}; with another, "
                         f"write padding={half}")
    # Of an odd number of zeros, the last side has one more (as in PyTorch).
    return [((k - 1) // 2, k // 2) for k in kernel]


def _check_conv2d(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> None:
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError("needs images (N, C, H, W) and a weight (O, C, kh, kw); "
                         "one image is x[None]")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"the images (N, C, H, W) have {x.shape[1]} channels, and the "
                         f"weight (O, C, kh, kw) is for {weight.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError("the bias must have one number for each of "
                         f"{len(weight)} output channels, not {bias.shape}")


# ## III.5 Normalization: what is taken from g?
#
# To normalize a row of numbers, subtract their mean and divide by their standard
# deviation. Then the mean is 0 and the deviation 1: whatever the layers before have
# done to the scale, the next layer receives numbers of the scale it is used to.
#
#     >>> def normalize(x, axis=-1, eps=1e-5):  # eps: for a row of equal numbers
#     ...     centred = x - x.mean(axis, keepdims=True)
#     ...     s = np.sqrt((centred * centred).mean(axis, keepdims=True) + eps)
#     ...     return centred / s, s
#     ...
#     >>> x = np.array([[1.0, 2.0, 6.0], [2.0, 3.0, 7.0], [-1.0, 1.0, 9.0]])
#     >>> xhat, s = normalize(x)
#     >>> print(xhat.round(2))
#     [[-0.93 -0.46  1.39]
#      [-0.93 -0.46  1.39]
#      [-0.93 -0.46  1.39]]
#
# The three rows come out alike. The second is the first with 1 added to each number.
# The third is the first with every number twice as far from the mean, 3. So there are
# two directions in which a row can move while the result `xhat` stands still: all
# numbers up, and all further out. If x moves in these, the final result does not move,
# so no gradient comes back along them. If x moves at right angles to both, the mean and
# the deviation s stand still to first order, and xhat moves as x does, divided by s.
# Let h be the gradient that xhat receives. To find what x receives, take away the parts
# of h along both directions, and divide the rest by s:
#
#            h - mean(h)
#           /|
#          / |  the rest
#         /  |
#        0---+--------> xhat
#         taken away
#
# The part of h along a vector v is `v * (h @ v) / (v @ v)`. For "up", v is (1, ..., 1),
# and v @ v is n: the part is `mean(h)`. For "out", v is xhat, and again v @ v is n,
# because the squares of xhat have the mean 1: the part is `xhat * mean(h * xhat)`.
# Because xhat sums to 0, the two directions are at right angles, and their parts can be
# taken away one after the other. So the way back is three lines:
#
#     >>> def normalize_back(h, xhat, s, axis=-1):
#     ...     up = h.mean(axis, keepdims=True)
#     ...     out = xhat * (h * xhat).mean(axis, keepdims=True)
#     ...     return (h - up - out) / s
#     ...
#     >>> h = np.array([[1.0, 0.0, 0.0]] * 3)
#     >>> dx = normalize_back(h, xhat, s)
#     >>> np.allclose(dx, grad(lambda x: (normalize(x)[0] * h).sum())(x))
#     True
#
# The picture leaves out eps, but the three lines are exact with it. Let x move by v:
#
# 1. `c = x - mean(x)` moves by `dc = v - mean(v)`.
# 2. From `s^2 = mean(c*c) + eps` we have `2 s ds = 2 mean(c * dc)`. So s moves by
#    `ds = mean(c * dc) / s`, which is `mean(xhat * dc)`.
# 3. In that, `mean(xhat * mean(v))` is 0, because xhat has the mean 0. So `ds` is
#    `mean(xhat * v)`.
# 4. `xhat = c / s` moves by `dc / s - c ds / s^2 = (dc - xhat * ds) / s`, which is
#
#         (v - mean(v) - xhat * mean(xhat * v)) / s
#
# 5. The matrix that does this to v, `(I - 1 1^T / n - xhat xhat^T / n) / s`, is
#    symmetric. So its transpose, which takes h back to x, does the same to h.
#
# **Layer norm** normalizes each row, along the last axis. **Batch norm** normalizes
# each channel over the whole batch: an array (N, C) along axis 0, and images (N, C, H,
# W) along the axes (0, 2, 3). Both then scale and shift by a learned weight and bias.
# For an array (N, C), the kernels would be these lines, without care:
#
#     >>> def naive_norm(x, weight, bias, axis):  # (N, C), (C,), (C,)
#     ...     xhat, s = normalize(x, axis)
#     ...     def pullback(g):
#     ...         dx = normalize_back(g * weight, xhat, s, axis)  # h is g * weight
#     ...         return dx, (g * xhat).sum(0), g.sum(0)  # for x, weight and bias
#     ...     return xhat * weight + bias, pullback
#     ...
#     >>> weight, bias = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.5, 1.0])
#     >>> y, pullback = naive_norm(x, weight, bias, axis=-1)
#     >>> np.allclose(y, layer_norm(x, weight, bias))
#     True
#     >>> y, pullback = naive_norm(x, weight, bias, axis=0)
#     >>> running = np.zeros(3), np.ones(3)  # see below
#     >>> np.allclose(y, batch_norm(x, *running, weight, bias, training=True))
#     True
#
# In evaluation, an image is judged by itself, without a batch. So in training, batch
# norm also moves two arrays, the *running* mean and variance, some of the way towards
# those of each batch. In evaluation, it uses these two instead.
#
# ### Layer norm
def _layer_norm_definition(x, weight, bias=None, eps=1e-5):
    centred = x - mean(x, -1, keepdims=True)
    variance = mean(centred * centred, -1, keepdims=True)
    xhat = centred / sqrt(variance + eps)
    return xhat * weight if bias is None else xhat * weight + bias


# The kernel sums rows by products (see ROWS, II.7), and adds one precaution. The mean
# of large numbers comes out rounded: near a million, a float32 is a multiple of 1/16.
# So the mean of `x - mean(x)` is not quite 0. It is the *error* of the mean, and is
# subtracted in turn (Chan, Golub and LeVeque, 1983).
@fused(_layer_norm_definition, operands=3)
def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Normalize each row of x, (..., n): subtract its mean, divide by its deviation.

    The result is scaled by `weight` (n,) and shifted by `bias` (n,) or None. The
    deviation is the root of the sum of the variance and `eps`. Raises ValueError for
    other shapes. (Ba, Kiros and Hinton, 2016)
    """
    n = x.shape[-1] if x.ndim else 0
    if weight.shape != (n,) or bias is not None and bias.shape != (n,):
        raise ValueError("the weight and the bias must be as long as the last axis of "
                         "the input")

    rows = _rows(x)  # (rows, n)
    xhat = rows - _row_sum(rows) / n  # not yet divided by s
    xhat -= _row_sum(xhat) / n  # the error of the mean
    inverse = 1 / np.sqrt(_row_dot(xhat, xhat) / n + eps)  # 1 / s, (rows, 1)
    xhat *= inverse
    y = xhat * weight
    if bias is not None:
        y = _plus(y, bias)

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = g.reshape(xhat.shape)
        g_xhat = g * xhat
        dweight = _row_sum(g_xhat.T)[:, 0]  # (n,), the sum of each column
        dbias = _row_sum(g.T)[:, 0]
        # As h = g * weight, the sum of h over each row is the product g @ weight.
        mean_h = np.dot(g, weight)[:, None] / n  # (rows, 1)
        mean_h_xhat = np.dot(g_xhat, weight)[:, None] / n

        dx = g * weight  # h
        dx -= mean_h
        dx -= np.multiply(xhat, mean_h_xhat, out=g_xhat)  # g_xhat is not needed again
        dx *= inverse
        return dx.reshape(x.shape), dweight, dbias

    return y.reshape(x.shape), pullback


# ### Batch norm
#
# The definition is the same, along other axes. (`running` and `momentum` are unused:
# differentiating twice must not move the running statistics again.)
def _batch_norm_definition(x, weight, bias, eps, running, momentum):
    last = x.swapaxes(1, -1)  # (N, W, H, C): weight and bias broadcast
    axes = tuple(range(x.ndim - 1))  # all but the channels
    centred = last - mean(last, axes, keepdims=True)
    variance = mean(centred * centred, axes, keepdims=True)
    y = centred / sqrt(variance + eps) * weight + bias
    return y.swapaxes(1, -1)


# Layer norm's kernel subtracts the mean, then the error of the mean. For many images,
# each is a slow pass over memory (see PASSES, II.7). Two facts save one of the two:
#
# 1. With `m = mean(x)`, the variance `mean((x - m)^2)` is `mean(x*x) - 2 m m + m m`, or
#    `mean(x*x) - m^2`, for which x need not be centred. But digits are lost if m is
#    large: for 1001 and 1003, the variance 1 is 1004005 - 1004004.
# 2. If all numbers of a channel move down by the same, the result stays. So the kernel
#    subtracts a *guess* of the mean, and normalizes the `rest`, whose mean is small:
#
#     >>> def quick_norm(x, weight, bias, eps=1e-5):  # (N, C), (C,), (C,)
#     ...     rest = x - x[0]  # a poor guess
#     ...     mean = rest.mean(0)
#     ...     variance = (rest * rest).mean(0) - mean * mean
#     ...     scale = weight / np.sqrt(variance + eps)
#     ...     shift = bias - mean * scale
#     ...     return rest * scale + shift  # (rest - mean) / s * weight + bias
#     ...
#     >>> np.allclose(quick_norm(x, weight, bias), y)  # the last y of naive_norm
#     True
#
# The way back is `(h - mean(h) - xhat * mean(h * xhat)) / s`, where h is `g * weight`.
# The weight is one number per channel, so it can be taken out of each term. And xhat is
# `centred / s`, where `centred` is x less its mean. So, with `scale = weight / s`,
#
#     dx = (g - mean(g) - centred * slope) * scale,    slope = mean(g * xhat) / s
#
# The kernel does this for images (N, C, P), with P pixels each. `_spread` (below) lets
# one number per channel, (C,), broadcast with them.
@fused(_batch_norm_definition, operands=3)
def _batch_norm(x, weight, bias, eps, running, momentum):
    """batch_norm in training; moves the arrays `running` towards mean and variance."""
    shape = x.shape
    x = x.astype(np.result_type(x, weight, bias), copy=False)
    x = x.reshape(*shape[:2], math.prod(shape[2:]))  # (N, C, P)
    n = x.shape[0] * x.shape[2]  # numbers per channel

    guess = _guess(x)
    rest = x - _spread(guess, x)  # (N, C, P)
    mean = _channel_means(rest)  # (C,), as are the next
    variance = _channel_means(rest, rest) - mean * mean
    variance = np.maximum(variance, 0)  # rounding may take it below 0
    inverse = 1 / np.sqrt(variance + eps)  # 1 / s
    scale = inverse * weight
    shift = bias - mean * scale
    y = rest  # in place
    y *= _spread(scale, x)
    y += _spread(shift, x)

    mean_x = guess + mean
    unbiased = variance * (n / (n - 1))
    for average, new in zip(running, (mean_x, unbiased)):
        average += momentum * (new - average)  # in place

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = g.reshape(x.shape)
        centred = x - _spread(mean_x, x)  # not kept: it takes as much memory as x
        mean_g = _channel_means(g)
        mean_g_xhat = _channel_means(g, centred) * inverse
        slope = mean_g_xhat * inverse
        dx = _batch_norm_dx(g, centred, mean_g, slope, scale)
        return dx.reshape(shape), n * mean_g_xhat, n * mean_g  # sums: n times the means

    return y.reshape(shape), pullback


# How good is the guess? Say it is d below the mean of x. The images that it was made
# from then lie d below on average, and their squared distances have a mean of at least
# d^2. They are a sixteenth of all, so the variance is at least d^2 / 16. In it, what is
# subtracted, `mean * mean`, is d^2: at most 16 variances, which costs about one digit.
def _guess(x: np.ndarray) -> np.ndarray:
    """The mean of each channel in the first sixteenth of the images, (C,)."""
    return _channel_means(x[:math.ceil(len(x) / 16)])


# Sums need care, too. A float32 that has grown large loses what is added to it. So a
# channel is not added up in one run of a million numbers: first the images are, up to
# 1,024 of them at each pixel, and then the pixels, which np.sum adds up by halves.
def _channel_means(*arrays: np.ndarray) -> np.ndarray:
    """The means over each channel, (C,), of an array (N, C, P) or a product of two."""
    subscripts = ",".join(["ncp"] * len(arrays)) + "->cp"
    count, _, pixels = arrays[0].shape
    sums = 0  # (C, P)
    for i in range(0, count, 1024):
        sums = sums + np.einsum(subscripts, *(a[i:i + 1024] for a in arrays))
    return np.sum(sums, axis=1) / (count * pixels)


# Images (N, C, P) lie in memory in one of two ways. For each, one shape of the numbers
# per channel makes NumPy's inner loop long (see LOOPS, II.7):
#
#     made by    order in memory    shape of the numbers    the loop runs through
#     a user     N, C, P            (C, P), repeated        an image, C P numbers
#     conv2d     C, P, N            (C, 1)                  a channel, P N numbers
def _spread(numbers: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(C,) -> (C, P) or (C, 1), to broadcast with x, (N, C, P), by x's layout."""
    column = numbers[:, None]
    return column if _is_batch_last(x) else np.repeat(column, x.shape[2], axis=1)


def _is_batch_last(x: np.ndarray) -> bool:
    return x.strides[0] < x.strides[1]


def _batch_norm_dx(g, centred, mean_g, slope, scale):
    """(g - mean_g - centred * slope) * scale, in the memory of `centred`."""
    minus_slope, mean_g, scale = [_spread(a, centred) for a in (-slope, mean_g, scale)]
    # Take a few images at a time, if they lie one after the other (see PASSES, II.7).
    step = len(g) if _is_batch_last(centred) else max(1, _BLOCK // centred[0].size)
    for i in range(0, len(g), step):
        dx = centred[i:i + step]
        dx *= minus_slope
        dx += g[i:i + step]
        dx -= mean_g
        dx *= scale
    return centred


@_in_float32
def _batch_norm_in_evaluation(x, weight, bias, *, running_mean, running_var, eps):
    """batch_norm in evaluation: `x * scale + shift`, from the running statistics."""
    scale = weight / np.sqrt(running_var.astype(x.dtype) + eps)
    shift = bias - scale * running_mean.astype(x.dtype)
    y = x.swapaxes(1, -1) * scale + shift  # channels last, to broadcast
    return y.swapaxes(1, -1)


def batch_norm(x: Any, running_mean: np.ndarray, running_var: np.ndarray, weight: Any,
               bias: Any, training: bool = False, momentum: float = 0.1,
               eps: float = 1e-5) -> Tensor:
    """Normalize each channel of x, (N, C) or (N, C, H, W), by its mean and deviation.

    In training, the mean and variance are the batch's own, and the arrays
    `running_mean` and `running_var`, both (C,), move towards them in place by the share
    `momentum` (the variance unbiased, as PyTorch keeps it). In evaluation, the running
    ones are used. The result is scaled by `weight` (C,) and shifted by `bias` (C,).
    Raises ValueError for other shapes, TypeError for running statistics that are not
    arrays of floats. (Ioffe and Szegedy, 2015)
    """
    x, weight, bias = as_tensor(x), as_tensor(weight), as_tensor(bias)
    running_mean, running_var = _value(running_mean), _value(running_var)
    _check_batch_norm(x, running_mean, running_var, weight, bias, training)
    if training:
        return _batch_norm(x, weight, bias, eps, (running_mean, running_var), momentum)
    return _batch_norm_in_evaluation(x, weight, bias, running_mean=running_mean,
                                     running_var=running_var, eps=eps)


def _check_batch_norm(x: Tensor, running_mean: Any, running_var: Any, weight: Tensor,
                      bias: Tensor, training: bool) -> None:
    c = weight.size
    if x.ndim < 2 or x.shape[1] != c:
        raise ValueError(f"batch_norm: needs (N, C, ...) with C = {c}, the length of "
                         f"the weight, and not {x.shape}")
    if training and x.size <= c:
        raise ValueError(f"batch_norm: {x.shape} has one value per channel, or none, "
                         "which is too few to train on; give a larger batch, or "
                         "training=False")
    running = {"running_mean": running_mean, "running_var": running_var}
    for name, array in running.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise TypeError(f"batch_norm: {name} is written to, so it must be an array "
                            f"of floats, not {array!r:.60}")
    for name, array in dict(running, weight=weight, bias=bias).items():
        if array.shape != (c,):
            raise ValueError(f"batch_norm: {name} has shape {array.shape}, not ({c},)")


# ## III.6 Attention: who looks at whom?
#
# Each position of a sequence asks by its *query*, is found by its *key*, and gives its
# *value*. The product of a query with a key is a score. Softmax turns the scores of a
# query into weights, and the result is the weighted mean of the values. Causal means
# that a position sees only itself and the positions before it: the scores of later
# positions become -inf, and their weights 0. If all scores are alike, each position
# gives equal weight to all that it sees. (The values here are unit vectors, so each row
# of the result shows the weights.)
#
#     >>> alike = np.zeros((3, 2))
#     >>> y = scaled_dot_product_attention(alike, alike, np.eye(3), is_causal=True)
#     >>> print(y.numpy().round(2))
#     [[1.   0.   0.  ]
#      [0.5  0.5  0.  ]
#      [0.33 0.33 0.33]]
#
# The shapes have B sequences, H heads, T positions that ask and S that answer, D
# numbers in a query or key, and Dv in a value. A score is a sum of D products. If these
# are random, the sum has a size of about sqrt(D), so scores are divided by that. Else,
# for a large D, softmax would give nearly all weight to one position.
def _attention_definition(q, k, v, is_causal=False):
    scores = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]))  # (..., T, S)
    if is_causal:
        ahead = np.triu(np.ones(scores.shape[-2:], bool), 1)  # above the diagonal
        scores = np.where(ahead, -np.inf, scores)
    return softmax(scores) @ v  # (..., T, Dv)


# This is the way back, with Q, K, V for the operands, `Z = Q K^T / sqrt(D)` for the
# scores, `P = softmax(Z)` and `Y = P V`. Each step takes a rule of part II:
#
# 1. From the product Y = P V (II.6), V receives `P^T g`, and P receives `dP = g V^T`.
# 2. From the softmax (II.5), Z receives `dZ = P * (dP - d)`, where d is one number for
#    each row, `d_i = sum_j P_ij dP_ij`.
# 3. From the product Q K^T, Q receives `dZ K / sqrt(D)`, and K `dZ^T Q / sqrt(D)`.
#
# The sum in step 2 runs over S positions, but there is a shorter one. By step 1,
# `dP_ij` is the inner product of g_i, row i of g, with V_j. So (Dao and others, 2022)
#
#     d_i = sum_j P_ij (g_i . V_j) = g_i . (sum_j P_ij V_j) = g_i . Y_i
#
# which has only Dv terms. The kernel does just that. It works in place: the array p
# holds first the scores, and then P. And if the scores are of moderate size, as they
# nearly always are, it takes two shortcuts. The mask, -inf, is added, which is faster
# than selecting, but would turn a score of inf into nan. And the maximum of each row is
# not subtracted, since exp cannot overflow (II.5).
@functools.lru_cache(8)
def _mask(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """-inf where a key (column) lies ahead of a query (row), else 0: (T, S)."""
    ahead = np.triu(np.ones(shape, bool), 1)
    return np.where(ahead, -np.inf, 0).astype(dtype)


def _attend(q, k, v, is_causal, out=None):
    """Return Y, (..., T, Dv), written to `out`, and P, (..., T, S)."""
    scale = 1 / math.sqrt(q.shape[-1])
    p = q @ np.multiply(_mT(k), scale, order="C")  # the scores (see PRODUCTS, II.7)
    mask = _mask(p.shape[-2:], p.dtype) if is_causal else None
    if _is_moderate(p):
        if is_causal:
            p += mask
    else:
        if is_causal:
            np.copyto(p, -np.inf, where=mask < 0)
        p -= _row_max(p)
    np.exp(p, out=p)
    p *= 1 / _row_sum(p)
    return np.matmul(p, v, out=out), p


def _attend_back(g, q, k, v, y, p, out=(None, None, None)):
    """Return the gradients of q, k and v, written to `out`."""
    scale = 1 / math.sqrt(q.shape[-1])
    dz = g @ _mT(v)  # step 1: dP, (..., T, S), soon dZ
    dz -= _row_dot(g, y)  # step 2: less d
    dz *= p
    dq = np.matmul(dz, k * scale, out=out[0])
    dk = np.matmul(_mT(dz), q * scale, out=out[1])
    dv = np.matmul(_mT(p), g, out=out[2])
    return dq, dk, dv


@fused(_attention_definition, operands=3)
def scaled_dot_product_attention(q: Any, k: Any, v: Any,
                                 is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, for q (..., T, D), k (..., S, D) and v (..., S, Dv).

    The result is (..., T, Dv). With `is_causal`, position i sees positions 0 to i.
    Raises ValueError if the shapes disagree. (Vaswani and others, 2017)
    """
    if (min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[:-2] != k.shape[:-2]
            or q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]):
        raise ValueError("needs queries (..., T, D), keys (..., S, D) and values "
                         "(..., S, Dv), with the same leading axes")
    y, p = _attend(q, k, v, is_causal)

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        return _attend_back(g, q, k, v, y, p)

    return y, pullback


# A transformer computes q, k and v of all heads by one product, side by side in one
# array. So attention begins by taking this apart, and ends by joining the heads:
def _heads(qkv: Any, num_heads: int) -> Any:
    """(B, T, 3 H D) -> (3, B, H, T, D), a view."""
    b, t, c = qkv.shape
    d = c // (3 * num_heads)
    return qkv.reshape(b, t, 3, num_heads, d).transpose(2, 0, 3, 1, 4)


def _merge(y: Any) -> Any:
    """(B, H, T, D) -> (B, T, H D)."""
    b, h, t, d = y.shape
    return y.swapaxes(1, 2).reshape(b, t, h * d)


def _causal_self_attention_definition(qkv, num_heads):
    q, k, v = _heads(qkv, num_heads)
    return _merge(_attention_definition(q, k, v, is_causal=True))


# The kernel saves copies. It reads q, k and v as views of that array, and writes their
# gradients into the same views of another. The results of the heads, too, are written
# where `_merge` finds them joined. And it takes a few sequences at a time, a *group*,
# so that their P, about two blocks in size, stays in the cache (PASSES, II.7).
@fused(_causal_self_attention_definition, operands=1)
def causal_self_attention(qkv: Any, num_heads: int) -> Tensor:
    """Causal attention in `num_heads` heads, (B, T, 3 * C) -> (B, T, C).

    qkv holds queries, keys and values of all heads: (B, T, 3, num_heads, D), D = C /
    num_heads, with the last three axes joined. Raises ValueError if it cannot be
    divided like this.
    """
    if num_heads < 1 or qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError("needs q, k and v side by side, (B, T, 3 * C), and a C that "
                         f"{num_heads} heads divide")
    heads = _heads(qkv, num_heads)  # (3, B, H, T, D)
    _, b, h, t, d = heads.shape
    y = np.empty((b, t, h, d), qkv.dtype).swapaxes(1, 2)  # (B, H, T, D)
    step = max(1, 2 * _BLOCK // max(1, h * t * t))
    groups = [slice(i, i + step) for i in range(0, b, step)]
    results = []  # (y, p) of each group
    for group in groups:
        q, k, v = heads[:, group]
        results.append(_attend(q, k, v, is_causal=True, out=y[group]))

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = g.reshape(b, t, h, d).swapaxes(1, 2)  # (B, H, T, D)
        dqkv = np.empty_like(qkv)
        dheads = _heads(dqkv, num_heads)
        for group, result in zip(groups, results):
            q, k, v = heads[:, group]
            dq, dk, dv = dheads[:, group]  # views, which are written to
            _attend_back(g[group], q, k, v, *result, out=(dq, dk, dv))
        return (dqkv,)

    return _merge(y), pullback


# ### Embedding and dropout
#
# How does a network read a letter? It looks up that letter's row in a table. On the way
# back, each row receives the sum of what its uses receive. Here letter 2 is used twice,
# and letter 1 not at all:
#
#     >>> table = Tensor(np.zeros((3, 2)))
#     >>> embedding([2, 0, 2], table).backward(np.array([[1, 2], [3, 4], [10, 20]]))
#     >>> print(table.grad)
#     [[ 3.  4.]
#      [ 0.  0.]
#      [11. 22.]]
#
# To look up is to multiply the table by one-hot rows, each with a 1 at its letter's
# number: [0 0 1] for letter 2. So the way back is the transpose of these rows times g.
# If the table is small, we really do multiply, because to add rows one after the other
# is slow in NumPy (see SCATTER, II.7).
def _lookup_definition(weight, ids):
    return weight[ids]


@fused(_lookup_definition, operands=1)
def _lookup(weight, ids):
    """The kernel of `embedding`, with the weight first, as its only operand."""
    vocabulary, width = weight.shape

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        if vocabulary > 1024:  # nearly all factors would be 0
            return (_value(scatter_add(g, ids, weight.shape)),)
        one_hot = np.zeros((ids.size, vocabulary), g.dtype)
        one_hot[np.arange(ids.size), ids.reshape(-1)] = 1
        return (one_hot.T @ g.reshape(ids.size, width),)

    return weight[ids], pullback


def embedding(ids: Any, weight: Any) -> Tensor:
    """The rows of weight (V, C) that an integer array names: ids.shape + (C,).

    Raises ValueError for ids outside 0..V-1 or a weight that is not 2-d, TypeError for
    ids that are not integers.
    """
    weight = as_tensor(weight)
    if weight.ndim != 2:
        raise ValueError("embedding: the weight must be a table (V, C), not "
                         f"{weight.shape}")
    ids = _whole_numbers("embedding: ids", ids, weight.shape[0])
    return _lookup(weight, ids)


# Dropout sets random elements to 0 in training, so that the network cannot rely on any
# single one. The rest is scaled up, so that the mean stays what it was: with p = 1/2,
# the half that is kept is doubled.
def dropout(x: Any, p: float = 0.5, training: bool = True) -> Tensor:
    """In training, set elements to 0 with probability p, and divide others by 1 - p.

    Otherwise, return x. Raises ValueError unless 0 <= p < 1. (Srivastava and others,
    2014)
    """
    _check_share("dropout", p)
    x = as_tensor(x)
    if not training or p == 0:
        return x
    keep = _rng().random(x.shape, np.float32) >= p
    return x * (keep * np.asarray(1 / (1 - p), x.dtype))


def _check_share(name: str, p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{name}: p, the share of elements to drop, must be at least "
                         f"0 and below 1, not {p}")


# ## III.7 A GPT: what does it learn?
#
# It learns to predict, at every position of a text, which token comes next. The text is
# its own teacher: the targets are the tokens, shifted by one. A window of nine
# characters makes eight lessons:
#
#     has read    s    sh    she    she_    she_s    she_se    she_sel    she_sell
#     next is     h    e     _      s       e        l         l          s
#
# Here is the whole training, on all such windows of one sentence, and what the network
# then writes by itself:
#
#     >>> sentence = "she sells sea shells by the sea shore."
#     >>> tokenizer = CharTokenizer(sentence)  # each character has a number, its id
#     >>> ids = tokenizer.encode(sentence)  # (38,)
#     >>> windows = np.lib.stride_tricks.sliding_window_view(ids, 9)  # (30, 9)
#     >>> x, y = windows[:, :-1], windows[:, 1:]  # what it reads, what is next: (30, 8)
#     >>> manual_seed(0)
#     >>> size = tokenizer.vocab_size
#     >>> gpt = GPT(size, embed_dim=32, num_heads=4, num_layers=2, block_size=8)
#     >>> optimizer = AdamW(gpt.parameters(), lr=0.01)
#     >>> for step in range(100):
#     ...     logits = gpt(x)  # (B, T, V): a score for every token to be next
#     ...     loss = cross_entropy(logits.reshape(-1, size), y.reshape(-1))
#     ...     optimizer.zero_grad()
#     ...     loss.backward()
#     ...     optimizer.step()
#     >>> prompt = tokenizer.encode("she sells")[None]  # (1, T)
#     >>> print(tokenizer.decode(gpt.generate(prompt, 29, top_k=1)[0]))
#     she sells sea shells by the sea shore.
#
# Each token starts as a row of numbers that says what it is, plus a row that says where
# it stands. Then each block adds two things to this running sum, the *residual stream*:
# what the positions learn from one another (attention), and what each makes of it by
# itself (an MLP). In the end, the product of the stream at a position with the row of a
# token is the score of that token. For B sequences of T positions, C numbers for each,
# and V tokens in the vocabulary:
#
#     ids                                              (B, T)
#     x = row of the token + row of the position       (B, T, C)
#     for each block:
#         x = x + attention(layer_norm(x))             (B, T, C)
#         x = x + mlp(layer_norm(x))                   (B, T, C)
#     scores = layer_norm(x) @ (rows of all tokens)^T  (B, T, V)
#
# The modules below are these lines. They are nearly GPT-2 (Radford and others, 2019),
# whose attention also has biases, and dropout on its weights.


class MultiHeadAttention(Module):
    """Self-attention: `num_heads` heads share the embed_dim numbers of a position.

    Attention is causal, that is, no position sees a later one, unless
    `is_causal=False`. `dropout` is the share of the result's elements that are dropped.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0,
                 bias: bool = False, is_causal: bool = True) -> None:
        _positive("MultiHeadAttention", embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"MultiHeadAttention: embed_dim={embed_dim} is no "
                             f"multiple of {num_heads} heads, so they cannot share it "
                             "evenly")
        self.num_heads = num_heads
        self.is_causal = is_causal
        # Queries, keys and values come from one product, side by side (III.6).
        self.qkv = Linear(embed_dim, 3 * embed_dim, bias)
        self.proj = Linear(embed_dim, embed_dim, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Any) -> Tensor:
        """(B, T, embed_dim) -> (B, T, embed_dim)."""
        embed_dim = self.proj.weight.shape[1]
        if np.ndim(x) != 3 or x.shape[2] != embed_dim:
            raise ValueError(f"MultiHeadAttention: needs (B, T, {embed_dim}), not"
                             f" {np.shape(x)}")

        qkv = self.qkv(x)  # (B, T, 3C)
        if self.is_causal:
            y = causal_self_attention(qkv, self.num_heads)  # (B, T, C)
        else:
            q, k, v = _heads(qkv, self.num_heads)  # (B, H, T, C / H) each
            y = _merge(scaled_dot_product_attention(q, k, v))  # (B, T, C)
        return self.dropout(self.proj(y))


class Block(Module):
    """A layer of a transformer: attention, then an MLP, each after a layer norm."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        self.ln1 = LayerNorm(embed_dim)
        self.ln2 = LayerNorm(embed_dim)
        self.attn = MultiHeadAttention(embed_dim, num_heads, dropout)
        self.mlp = Sequential(Linear(embed_dim, 4 * embed_dim), GELU(),
                              Linear(4 * embed_dim, embed_dim))
        self.dropout = Dropout(dropout)

    def forward(self, x: Any) -> Tensor:
        """(B, T, embed_dim) -> (B, T, embed_dim)."""
        x = x + self.attn(self.ln1(x))  # attn ends with its own dropout
        x = x + self.dropout(self.mlp(self.ln2(x)))
        return x


class GPT(Module):
    """A decoder-only transformer, like GPT-2.

    It reads up to block_size token ids at a time. The rows of the positions are
    learned. One matrix serves for looking tokens up and for scoring them (Press and
    Wolf, 2017). `generate` continues a text; section III.7 has a training loop.
    """

    def __init__(self, vocab_size: int, embed_dim: int, num_heads: int, num_layers: int,
                 block_size: int, dropout: float = 0.0) -> None:
        _positive("GPT", vocab_size=vocab_size, embed_dim=embed_dim,
                  num_heads=num_heads, num_layers=num_layers, block_size=block_size)
        self.block_size = block_size
        self.dropout = Dropout(dropout)
        self.tok_emb = Embedding(vocab_size, embed_dim)
        self.pos_emb = Embedding(block_size, embed_dim)
        self.blocks = [Block(embed_dim, num_heads, dropout) for _ in range(num_layers)]
        self.ln_f = LayerNorm(embed_dim)
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Draw weights with a deviation of 0.02, as GPT-2 does, and set biases to 0.

        The residual stream adds up 2 * layers terms. The sum of n independent terms
        deviates sqrt(n) times as much as one. So the weights that make these terms, the
        last ones of attention and of MLP, are smaller by sqrt(2 * layers).
        """
        terms = 2 * len(self.blocks)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                makes_term = name.endswith(("attn.proj.weight", "mlp.2.weight"))
                scale = 0.02 / math.sqrt(terms) if makes_term else 0.02
                noise = _rng().standard_normal(parameter.shape, np.float32)
                parameter._data[...] = scale * noise
            elif name.endswith("bias"):
                parameter._data[...] = 0

    def forward(self, ids: Any) -> Tensor:
        """The score of every token to be next: (B, T), T <= block_size -> (B, T, V)."""
        ids = self._token_ids("GPT", ids)
        length = ids.shape[1]
        if length > self.block_size:
            raise ValueError(f"GPT: reads at most block_size={self.block_size} "
                             f"positions, not {ids.shape}; write ids[:, "
                             f"-{self.block_size}:] for the last ones")

        tokens = self.tok_emb(ids)  # (B, T, C)
        positions = self.pos_emb(np.arange(length))  # (T, C)
        x = self.dropout(tokens + positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x)  # (B, T, C)
        return linear(self.ln_f(x), self.tok_emb.weight)  # (B, T, V)

    def _token_ids(self, what: str, ids: Any) -> np.ndarray:
        """Return `ids` as an array of integers (B, T), T > 0, or raise an error."""
        vocab_size = len(self.tok_emb.weight)
        ids = _whole_numbers(f"{what}: token ids", ids, vocab_size)
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"{what}: needs token ids (B, T) with T > 0, not "
                             f"{ids.shape}; a single sequence is a batch of one, "
                             "ids[None]")
        return ids

    def generate(self, idx: Any, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None) -> np.ndarray:
        """Continue token ids (B, T), without dropout: (B, T + max_new_tokens).

        Each token is drawn from the softmax of the logits divided by `temperature`: the
        lower it is, the more often the likeliest token is drawn. With `top_k`, only the
        k likeliest can be drawn (and those that tie with the last of them).
        `manual_seed` fixes the draws. If the text is long, only its last block_size
        tokens are read.
        """
        text = [np.array(self._token_ids("generate", idx), np.int64)]  # (B, T)
        for tokens in self.stream(text[0], max_new_tokens, temperature, top_k):
            text.append(tokens[:, None])  # (B, 1)
        return np.concatenate(text, axis=1)

    def stream(self, idx: Any, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None) -> Iterator[np.ndarray]:
        """Yield the tokens of `generate` one by one, (B,) each, as they are drawn."""
        if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 0:
            raise ValueError("generate: max_new_tokens must be an integer from 0, not "
                             f"{max_new_tokens!r}")
        if not temperature > 0:
            raise ValueError("generate: temperature must be above 0, not "
                             f"{temperature!r}; to take the likeliest token every "
                             "time, write top_k=1")
        if top_k is not None:
            _positive("generate", top_k=top_k)
        if not _computes(self, GPT.forward):
            raise TypeError("generate: reads as GPT.forward does, but "
                            f"{type(self).__name__} has a forward of its own; write a "
                            "generate to go with it")
        ids = np.array(self._token_ids("generate", idx), np.int64)
        # (`_write_tokens` is a generator, which begins only when a token is asked for.
        # So the arguments are checked here.)
        return _write_tokens(self, ids, max_new_tokens, temperature, top_k)  # (III.8)


# ## III.8 Writing: what need not be computed again?
#
# To write a token, a network reads the text so far, takes the logits of the last
# position, draws a token from them, and appends it. The plain way is a few lines:
#
#     >>> text = prompt  # "she sells", of the last section
#     >>> for _ in range(29):
#     ...     last = gpt(text[:, -gpt.block_size:]).numpy()[:, -1]  # (B, V)
#     ...     text = np.concatenate([text, last.argmax(axis=1)[:, None]], axis=1)
#     >>> print(np.array_equal(text, gpt.generate(prompt, 29, top_k=1)))
#     True
#
# But for one new token it reads all the old ones again, and nothing about them is new:
# attention is causal, so no position depends on what comes after it. A new position
# needs only the keys and values of the old ones, in each block. A *cache* keeps these,
# so that each token costs the work of one position. For the network above, with 2
# blocks of 4 heads of 8 numbers, the cache is two arrays:
#
#     >>> cache = _new_cache(gpt, batch=1)
#     >>> print([a.shape for a in cache])  # k and v, B, H, positions, D
#     [(2, 1, 4, 8, 8), (2, 1, 4, 8, 8)]
#     >>> logits = _read_on(gpt, prompt[:, :3], cache, start=0)  # "she", at 0, 1 and 2
#     >>> logits = _read_on(gpt, prompt[:, 3:4], cache, start=3)  # " ", which sees them
#     >>> np.allclose(logits, gpt(prompt[:, :4]).numpy()[:, -1], atol=1e-5)
#     True
#
# Once the text is longer than block_size, the window slides. Every token then stands
# one place further to the left and has another position's row added to it, so the whole
# window must be read anew. If a text begins with three tokens, and block_size is 8:
#
#     tokens so far   the window   in the cache   to be read
#     3               0 to 2       none           0 to 2
#     4               0 to 3       0 to 2         3
#     ...
#     8               0 to 7       0 to 6         7
#     9               1 to 8       none (moved)   1 to 8
#     10              2 to 9       none (moved)   2 to 9


def _write_tokens(gpt: GPT, ids: np.ndarray, count: int, temperature: float,
                  top_k: int | None) -> Iterator[np.ndarray]:
    """Yield `count` tokens (B,) that continue `ids` (B, T), one after another."""
    cache = _new_cache(gpt, len(ids)) if _can_be_cached(gpt) else None
    modules = gpt.modules()
    start = 0  # how many positions of the window are in the cache
    for _ in range(count):
        window = ids[:, -gpt.block_size:]  # (B, T), T <= block_size
        if ids.shape[1] > gpt.block_size:
            start = 0  # the window has moved
        # (For each token anew, since the caller may use the network in between.)
        with _evaluating(modules), no_grad():
            if cache is None:
                logits = gpt(window).numpy()[:, -1]  # (B, V)
            else:
                logits = _read_on(gpt, window[:, start:], cache, start)
        start = window.shape[1]

        # (A temperature of type np.float64 would turn float32 logits into float64.)
        new = _sample(logits / np.float32(temperature), top_k)  # (B, 1)
        ids = np.concatenate([ids, new], axis=1)
        yield new[:, 0]


# Reading with a cache repeats the lines of GPT.forward, Block.forward and
# MultiHeadAttention.forward, with two differences. There is no tape, so this is for
# `generate` alone; and after the attention of the last block, only the last position
# goes on.


def _new_cache(gpt: GPT, batch: int) -> list[np.ndarray]:
    """Empty arrays for the keys and values of each block: (2, B, H, block_size, D)."""
    weight = gpt.tok_emb.weight  # (V, C)
    heads = [block.attn.num_heads for block in gpt.blocks]
    return [np.empty((2, batch, h, gpt.block_size, weight.shape[1] // h), weight.dtype)
            for h in heads]


def _read_on(gpt: GPT, ids: np.ndarray, cache: list[np.ndarray],
             start: int) -> np.ndarray:
    """The logits (B, V) of what follows `ids` (B, N), which are added to the cache.

    Either they are a whole window, and `start` is 0; or they are one token at position
    `start`, and the cache holds those before it.
    """
    positions = start + np.arange(ids.shape[1])  # (N,)
    x = gpt.dropout(gpt.tok_emb(ids) + gpt.pos_emb(positions))  # (B, N, C)
    last = len(gpt.blocks) - 1
    for i, block in enumerate(gpt.blocks):
        x = x + _attend_cached(block.attn, block.ln1(x), cache[i], start)
        if i == last:  # no later block will look at the other positions
            x = x[:, -1:]  # (B, 1, C)
        x = x + block.dropout(block.mlp(block.ln2(x)))
    logits = linear(gpt.ln_f(x), gpt.tok_emb.weight)  # (B, 1, V)
    return logits.numpy()[:, 0]


def _attend_cached(attn: MultiHeadAttention, x: Tensor, cache: np.ndarray,
                   start: int) -> Tensor:
    """MultiHeadAttention.forward for new positions only: (B, N, C) -> (B, N, C)."""
    q, k, v = _heads(attn.qkv(x).numpy(), attn.num_heads)  # (B, H, N, D) each
    end = start + q.shape[2]
    cache[0, :, :, start:end] = k
    cache[1, :, :, start:end] = v
    keys, values = cache[:, :, :, :end]  # (B, H, end, D) each

    # A single new position sees all the others. If there are several, they are the
    # whole window, and none of them may see a later one.
    y = scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1)
    return attn.dropout(attn.proj(_merge(y)))


# What if somebody gives the network blocks of another class, or attention that is not
# causal? Then the lines above are not what these blocks compute, and the network is
# read the plain way. (A module that replaces `ln1`, `ln2` or `mlp` must treat each
# position by itself, as these do.)


def _can_be_cached(gpt: GPT) -> bool:
    """Whether `_read_on` computes the same as the network's blocks."""
    usual = [_computes(block, Block.forward)
             and _computes(block.attn, MultiHeadAttention.forward)
             and block.attn.is_causal
             for block in gpt.blocks]
    # `_read_on` picks the last position in the last block, so there has to be one.
    return len(usual) > 0 and all(usual)


def _computes(module: Module, forward: Callable) -> bool:
    """Whether `module(x)` runs this `forward`, and not one put in its place."""
    if type(module).__call__ is not Module.__call__:
        return False
    function = getattr(module.forward, "__func__", None)  # of the bound method
    return function is forward


@contextlib.contextmanager
def _evaluating(modules: list[Module]) -> Iterator[None]:
    """Inside, the modules are in evaluation mode; afterwards, as they were before."""
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in zip(modules, training):
            module.training = was_training


# How is a token drawn with the probabilities softmax(l), for logits l? By adding random
# noise, and taking the largest sum:
#
# 1. Let each token i have a bell that rings at random times, on average exp(l_i) times
#    an hour. The first ring of all is from token i with the probability
#    `exp(l_i) / sum_j exp(l_j)`, its part of all the rings. That is the softmax.
# 2. The time to a bell's first ring is `E_i / exp(l_i)`, where E_i is drawn from the
#    exponential distribution (one ring an hour). The logarithm is `log(E_i) - l_i`.
# 3. Whoever rings first has the smallest of these, and the largest `l_i - log(E_i)`.
#    The noise, -log(E_i), is said to have a Gumbel distribution. NumPy can draw it.


def _sample(logits: np.ndarray, top_k: int | None) -> np.ndarray:
    """Draw an index for each row of logits (B, V), or of its top k: (B, 1)."""
    if top_k is not None and top_k < logits.shape[1]:
        # The others get -inf, which is never the largest sum.
        kth_largest = np.partition(logits, -top_k)[:, -top_k, None]  # (B, 1)
        logits = np.where(logits < kth_largest, -np.inf, logits)

    noise = _rng().gumbel(size=logits.shape)  # (B, V)
    return np.argmax(logits + noise, axis=1)[:, None]


# ## III.9 Many cores: how is a batch shared?
#
# Cut the batch into shares, let each processor compute one, and add up. This is right
# because the mean loss of a batch is a weighted mean of the mean losses of its shares,
# and its gradient is the same weighted mean of their gradients. Take one parameter
# w = 2, a loss whose slope is the mean of x, and a batch of five rows:
#
#     >>> w, x = Tensor(2.0), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
#     >>> def loss(x):
#     ...     return (w * x).mean()
#     ...
#     >>> with DataParallel(w, loss, processes=2) as parallel:
#     ...     value = parallel(x)
#     ...
#     >>> print(f"{value:.4g} {w.grad.item():.4g}")
#     6 3
#
# **Why not threads?** Only one of Python's threads runs at a time, the one that holds a
# lock. NumPy releases this lock while it computes, but then waits for it again, and a
# step of training is a thousand short computations. With two threads, a step of a GPT
# took as long as with one, 22 ms. With two *processes*, which have a lock each, it took
# 13 ms (on two cores).
#
# **What do processes share?** They share nothing, unless they ask for it. `os.fork`
# makes a copy of this process, our *worker*, with the same model and the same loss
# function, even if that is a lambda. From then on each process writes to its own
# memory, except for a part that is common to all: it holds the parameters, and the
# gradients of each worker. All else goes through a *pipe*, a queue of bytes between two
# processes.
#
# **The step above**, with shares of 3 rows and 2:
#
#        the parent: share 0                             the worker: share 1
#        -------------------                             -------------------
#     1. cuts the batch                   -- pipe ---->  receives its rows, 4 and 5
#     2. computes rows 1, 2 and 3:                       computes its rows:
#        the loss is 4, the slope 2                      the loss is 9, the slope 4.5
#        times 3/5: 2.4 and 1.2                          times 2/5: 3.6 and 1.8
#     3. waits for 3.6                    <-- pipe ----  sends its part of the loss
#     4. reads 1.8 and adds up: 6 and 3   <== common ==  has written its slope there
#     5. optimizer.step()                 == common ==>  sees the new w in the next step
#
# The parent adds up in the order of the shares, whichever was computed first. So with
# the same number of processes, the result is the same, bit for bit.
#
# **What is sent in step 1**, besides the rows? A worker is a copy of the parent as it
# was at the fork. So the parent tells it what may have changed since: which parameters
# are frozen, which modules are in training, and what batch norm has noted (III.5).
# Also, dropout must not draw the same numbers in all shares. So each call has a
# *stream*, one or more integers, and share k draws from a generator with the seed
# `(*stream, k)`.


class _Job(NamedTuple):
    """What a process is to compute, for one share."""

    kind: str  # "gradient" or "evaluate"
    arrays: tuple  # the share's rows of each array
    weight: float  # its part of all rows: above, 3/5 or 2/5
    stream: tuple[int, ...]  # which random numbers to draw
    state: tuple  # what may have changed (see `_state_now`)


# **How are gradients added in step 4?** A process lays its gradients side by side in
# one flat array, so the parent adds those of a worker by a single `+=`. Each gradient
# is a view of its piece:


class _Layout:
    """How arrays lie side by side in flat ones, one for each dtype among them.

        >>> layout = _Layout([np.zeros((2, 2)), np.zeros(3)])
        >>> (flat,), (a, b) = layout.allocate(np.zeros)
        >>> a += 1
        >>> print(flat)
        [1. 1. 1. 1. 0. 0. 0.]
    """

    def __init__(self, arrays: Iterable) -> None:
        self._sizes: dict[np.dtype, int] = {}  # of the flat arrays
        self._places: list[tuple] = []  # of each piece: dtype, slice, shape
        for a in arrays:
            start = self._sizes.get(a.dtype, 0)
            end = start + a.size
            self._sizes[a.dtype] = end
            self._places.append((a.dtype, slice(start, end), a.shape))

    def allocate(self, empty: Callable) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Flat arrays, each made by `empty(size, dtype)`, and the pieces, as views."""
        flats = {dtype: empty(size, dtype) for dtype, size in self._sizes.items()}
        pieces = []
        for dtype, place, shape in self._places:
            pieces.append(flats[dtype][place].reshape(shape))
        return list(flats.values()), pieces


# Now the class. First come the methods that a user calls. The call itself has step 4;
# `_compute_all` has steps 1 to 3. If a share fails, its answer is the exception, which
# is raised once all have answered: an answer left in a pipe would spoil the next call.
# Section IV.5 says how a worker is made, and what happens when one dies.


class DataParallel:
    """Share every batch among forked processes; each computes a part of the gradient.

    `parallel(x, y)`, followed by `optimizer.step()`, is a step of training (III.9).

    - `params` is a Module, or its parameters (as for an optimizer). With each batch,
      the workers are told which parameters are frozen and, of a Module, its `training`
      flags and what else it saves (such as running statistics: III.2). Changes that a
      worker makes to its copy of these are lost. After other changes (such as another
      layer), make a new DataParallel.
    - `loss(*arrays)` is given a share of the batch, and returns the mean over its rows,
      a scalar Tensor. Any other state that it changes is changed only in the process
      that runs it.
    - `evaluate(*arrays)` is given a share, too, and returns a number or an array.
    - `processes` is the number of processes, this one included (default: the number of
      cores). With 1, or if the system cannot fork (Windows, macOS: a warning says so),
      this process computes all.

    While the DataParallel is open, parameters live in memory common to all processes,
    and BLAS is held to one thread. Make it before other threads run, and call it from
    one thread at a time. `close()`, or the end of `with`, ends the workers.

    After a call, `flat_gradients` has all gradients side by side, in one array for each
    dtype among the parameters. Each `.grad` is a view of its piece, or None where the
    piece is zero because no loss depends on the parameter. To train on several
    machines, add up their `flat_gradients`, too.
    """

    def __init__(self, params: Any, loss: Callable, *, evaluate: Callable | None = None,
                 processes: int | None = None) -> None:
        self.processes = _cores() if processes is None else processes
        _positive("DataParallel", processes=self.processes)
        if self.processes > 1 and not _CAN_FORK:
            warnings.warn("DataParallel: this system cannot fork; one process computes "
                          "all", RuntimeWarning, stacklevel=2)
            self.processes = 1

        self._loss = loss
        self._evaluate = evaluate
        self._params = _listed("DataParallel", params)
        self._module = params if isinstance(params, Module) else None
        self._modules = params.modules() if isinstance(params, Module) else []
        self._calls = 0
        # A number that manual_seed decides, drawn from a copy, so that making a
        # DataParallel does not change what the program draws later.
        self._seed = int(copy.deepcopy(_rng()).integers(1 << 62))
        self.flat_gradients: list[np.ndarray] = []

        _keep_freed_memory(self)  # as an optimizer does
        self._layout = _Layout(self._params)
        # The team has the workers; a worker leaves its gradient in its `flats`. (IV.5)
        self._team = _Team(self._params, self._layout, self.processes,
                           self._compute_share)

    def __call__(self, *arrays: Any, stream: Iterable[int] = ()) -> float:
        """Put the gradient of the batch's mean loss in each `.grad`; return that loss.

        The arrays have the same length, and are cut by rows, as np.array_split does.
        The old `.grad` is replaced, by None if no share's loss depends on the
        parameter. Integers in `stream` name the random numbers: share k draws from
        `manual_seed((*stream, k))`. Without `stream`, they differ from call to call.
        The caller's own random numbers are not disturbed.

        An exception in a share is raised here (a worker's as a RuntimeError with its
        traceback), and the next call may succeed. If a worker was killed, this raises
        RuntimeError and closes the DataParallel.
        """
        flats, pieces = self._layout.allocate(np.empty)
        self._calls += 1
        stream = tuple(stream) or (self._seed, self._calls)
        # Steps 1 to 3. An answer is a share's part of the loss, and for each parameter
        # whether it depends on that.
        answers = self._compute_all("gradient", arrays, stream, pieces)

        # Step 4. The parent's own gradient is in `flats`: add those of the workers.
        busy = self._team.workers[:len(answers) - 1]
        for worker in busy:
            for flat, addend in zip(flats, worker.flats):
                flat += addend
        for i, p in enumerate(self._params):
            is_reached = any(reached[i] for _, reached in answers)
            p.grad = _wrap(pieces[i]) if is_reached else None
        self.flat_gradients = flats
        return sum(loss for loss, _ in answers)

    def evaluate(self, *arrays: Any) -> list:
        """[evaluate(share) for each share], in the order of the rows, without a tape.

        There are as many shares as processes, or as rows if these are fewer. The random
        numbers are the same in every call.
        """
        if self._evaluate is None:
            raise TypeError("DataParallel: has no function for it; give evaluate=...")
        return self._compute_all("evaluate", arrays, (self._seed, 0), None)

    def close(self) -> None:
        """End the workers, and move the parameters back into memory of this process."""
        self._team.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("DataParallel: cannot be copied or pickled, for it has "
                        "processes")

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _compute_all(self, kind: str, arrays: tuple, stream: tuple[int, ...],
                     pieces: list | None) -> list:
        """The answers of all shares. The parent's own gradient goes into `pieces`."""
        if self._team.is_closed:
            raise RuntimeError("DataParallel: this one is closed")
        if os.getpid() != self._team.parent:
            raise RuntimeError("DataParallel: this process is a fork of the one that "
                               "made it, and would talk to the same workers; make "
                               "another")

        first, *others = self._jobs(kind, arrays, stream)  # step 1
        busy = self._team.workers[:len(others)]
        try:
            self._team.copy_moved_parameters()  # if `.data` is another array by now
            for worker, job in zip(busy, others):
                worker.send(job)
            answers = [self._try_first_share(first, pieces)]  # step 2
            answers += [worker.receive() for worker in busy]  # step 3
        except BaseException:
            self.close()  # also after Ctrl-C: answers may be in the pipes
            raise

        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _jobs(self, kind: str, arrays: tuple, stream: tuple[int, ...]) -> list[_Job]:
        """Cut the batch: a job for each share that has rows."""
        arrays = [np.asarray(_value(a)) for a in arrays]
        lengths = [a.shape[0] if a.ndim else 0 for a in arrays]
        if not arrays or lengths[0] == 0 or len(set(lengths)) > 1:
            shapes = ", ".join(str(a.shape) for a in arrays) or "none"
            raise ValueError("DataParallel: needs arrays with equally many rows, "
                             f"not {shapes}")

        state = self._state_now() if self._team.workers else ()
        shares = zip(*[np.array_split(a, self.processes) for a in arrays])
        return [_Job(kind, share, len(share[0]) / lengths[0], stream, state)
                for share in shares if len(share[0]) > 0]

    def _state_now(self) -> tuple:
        """What may change in the parent, such as by `model.eval()` or by batch norm."""
        tracked = [p.requires_grad for p in self._params]
        training = [module.training for module in self._modules]
        constants = [_value(constant) for constant in _constants(self._module)]
        return tracked, training, constants

    def _try_first_share(self, job: _Job, pieces: list | None) -> Any:
        """The answer of the parent's share, or its exception."""
        try:
            self._require_same_parameters()  # now, while the workers compute
            return self._compute_share(0, job, pieces)
        except Exception as error:
            return error

    def _require_same_parameters(self) -> None:
        """Raise RuntimeError if the module has other parameters than it had."""
        now = self._params if self._module is None else self._module.parameters()
        if [id(p) for p in now] != [id(p) for p in self._params]:
            raise RuntimeError("DataParallel: the module has other parameters than it "
                               "had; make a new DataParallel")

    # All processes run the methods below. The parent's share is number 0.

    def _compute_share(self, share: int, job: _Job, pieces: list | None) -> Any:
        """The answer to a job. A gradient goes into `pieces` (else None)."""
        if share > 0:
            self._take_state(*job.state)
        with _mode.set(rng=np.random.default_rng((*job.stream, share))):
            if job.kind == "gradient":
                return self._compute_gradient(job, pieces)
            with no_grad():
                return self._evaluate(*job.arrays)

    def _compute_gradient(self, job: _Job, pieces: list) -> tuple[float, list[bool]]:
        """Write gradients to `pieces`. Return the loss, and which params it reaches."""
        loss = self._loss(*job.arrays)
        if not _tracked(loss) or loss.size != 1:
            raise TypeError("DataParallel: the loss must be a scalar Tensor made of "
                            f"the parameters, not {loss!r:.60}")
        loss = loss * job.weight  # above, times 3/5 or 2/5
        seed = np.ones(loss.shape, loss.dtype)
        slopes = _walk_to(self._params, [(loss, seed)])  # (I.5)
        for piece, p in zip(pieces, self._params):
            piece[...] = slopes.get(p, 0)
        return loss.item(), [p in slopes for p in self._params]

    def _take_state(self, tracked: list, training: list, constants: list) -> None:
        """Give the parameters and the module the state that they have in the parent."""
        for p, is_tracked in zip(self._params, tracked):
            p.requires_grad = is_tracked
        for module, is_training in zip(self._modules, training):
            module.training = is_training
        for constant, sent in zip(_constants(self._module), constants, strict=True):
            _overwrite(constant, sent)


def _constants(module: Module | None) -> list:
    """The Tensors and arrays that a module saves but does not train, each once."""
    if module is None:
        return []
    saved = [value for _, value in module._contents() if _is_saved(value)]
    by_identity = {id(value): value for value in saved if not _is_trained(value)}
    return list(by_identity.values())


# # Part IV. The craft
#
# ## IV.1 Writes: who changed my array?
#
# An operation does not copy its operands, so a write to one of them between the forward
# and the backward pass would change the derivative. The derivative below should be 6.
# The rules of `mul` would read 100 and silently make it 200, so the walk raises an
# error instead:
#
#     >>> x = Tensor(3.0)
#     >>> y = x * x
#     >>> x.data[...] = 100.0
#     >>> y.backward()
#     Traceback (most recent call last):
#     RuntimeError: mul: data of a Tensor () was changed between forward and backward; call backward first, then write
#
# **The naive watch** is a clock. A function that writes to a tensor notes the time in
# `_written`, by the counter that also says when tensors were made:
#
#     1    x is made
#     2    y = x * x
#     3    x is written to, and x._written is 3
#     4    z = x * x
#
# A walk that comes to y may need x as it was at time 2. The write at 3 is later, so the
# walk raises an error. (It does so even if the rules of y do not read x.) From z it may
# go on, since z was made of what was written.


def _note_write(t: Tensor) -> None:
    t._written = next(_clock)


def _check_tape(t: Tensor) -> None:
    """Raise RuntimeError if a walk cannot go on from `t` to its operands."""
    if t._operands is None:
        raise RuntimeError(f"{t._op.__name__}: the tape behind this tensor was let go "
                           "by an earlier walk; to walk it twice, give the first walk "
                           "retain_graph=True")
    for a in (t, *t._operands):
        if isinstance(a, Tensor) and (a._written or a._checksum is not None):
            _check_unwritten(a, t)


def _check_unwritten(a: Tensor, t: Tensor) -> None:
    """Raise RuntimeError if `a` was written to after `t`, which is made of it."""
    if not a.requires_grad:
        return  # a constant is not watched
    if a._checksum is not None:
        _renew_checksum(a)  # (below)
    if a._written > t._time:
        raise RuntimeError(f"{t._op.__name__}: data of {a.label or 'a Tensor'} {a.shape} "
                           "was changed between forward and backward; call backward "
                           "first, then write")


# **What if NumPy writes?** NumPy can write to an array that was handed out (`x.data`),
# and nobody is told. So we take a *checksum* when we hand the array out, and again
# whenever it is about to be read, by an operation or by a walk that needs the old
# contents. If the checksum has changed, we note the write then. That is soon enough,
# since nothing was made of x between the write and this moment. (In the list above, the
# second `x * x` notes the 3 before its result z gets the 4.)
#
# As long as no caller has the array, `_checksum` is None and nothing is computed. From
# then on, each operation on x reads the array once more, for a crc32.
#
#     a write                                                  is noticed
#     through x.data, x.numpy() or a view, whenever taken      yes
#     by x.data = array, or later through that array           yes
#     by optimizers, load_state_dict, `x -= 1` (below)         yes
#     to a constant's array, or an array given as operand      no
#     through x.detach().data or x.T.data, which share memory  only if x.data was taken too


def _hand_out(t: Tensor) -> np.ndarray:
    """The array of `t`, for a caller who may write to it."""
    if t.requires_grad:
        _renew_checksum(t)
    t._data = np.asarray(t._data)  # a NumPy scalar becomes an array, to write to
    return t._data


def _renew_checksum(t: Tensor) -> None:
    """Take the checksum, and note a write if it has changed."""
    now = zlib.crc32(np.ascontiguousarray(t._data))
    if t._checksum not in (None, now):
        _note_write(t)
    t._checksum = now


def _replace_data(t: Tensor, value: Any) -> None:
    """Do `t.data = value`."""
    value = _value(value)
    array = value if isinstance(value, np.ndarray) else np.asarray(value, t.dtype)
    if array.shape != t.shape or array.dtype != t.dtype:
        raise ValueError(f"t.data is {t.dtype} of shape {t.shape} and cannot become "
                         f"{array.dtype} of shape {array.shape}; make a new Tensor for "
                         "that")
    t._data = array
    _renew_checksum(t)  # since the caller has the array, too
    _note_write(t)


# **Gradients are written to, too,** for example by a user who clips them in place. So
# each has memory of its own (`_to_keep`, I.5; or its part of DataParallel's, III.9), and
# what is added to one makes a new array.
_accumulating = threading.Lock()  # several threads may walk back to the same leaves


def _accumulate(t: Tensor, g: Tensor) -> None:
    """Add the cotangent `g` to `t.grad`."""
    with _accumulating:
        t._grad = g if t._grad is None else t._grad + g


# **`p -= lr * p.grad`** has two meanings. While a tape is written it makes a new Tensor,
# like all arithmetic. Under no_grad(), on a tracked leaf, it writes into the array, as
# in PyTorch: this is how one writes an optimizer by hand.


def _in_place(op: Callable) -> Callable:
    """The method for an operator such as `-=`."""

    def operator_(self: Tensor, other: Any) -> Tensor:
        result = op(self, other)
        if _mode.recording or self._op is not None or not self.requires_grad:
            return result
        if result.shape != self.shape:
            raise ValueError(f"{op.__name__} in place: {self.shape} cannot become "
                             f"{result.shape}")
        self._data[...] = result._data
        _note_write(self)
        return self

    return operator_


for _name, _f in dict(add=add, sub=sub, mul=mul, truediv=div, pow=power).items():
    setattr(Tensor, f"__i{_name}__", _in_place(_f))


# A copied or unpickled Tensor is a new leaf, made at that moment.
def _reduce(t: Tensor) -> tuple:
    if t._op is not None:
        raise TypeError("only leaves can be copied or pickled, and this is the result "
                        f"of {t._op.__name__}; use t.detach()")
    return type(t), (np.asarray(t._data), t.requires_grad, t.label)


Tensor.__reduce__ = _reduce


# ## IV.2 Checkpoint: memory for time?
#
# A tape keeps every intermediate result until the walk has passed it. A checkpoint
# keeps none of them, and computes them again when the walk arrives. It makes the whole
# function one operation. The rule of this operation runs the function again, with a
# tape, and walks back on that:
#
#     >>> def naive_checkpoint(f, x):
#     ...     def rule(g, y, x):
#     ...         _, pull = vjp(f, x)  # f again, now with a tape
#     ...         return pull(g)[0]  # and back along it, to f's one argument
#     ...     operation = primitive(rule)(f)
#     ...     return operation(x)  # f computes on bare arrays, so it writes no tape
#     ...
#     >>> x = Tensor(0.0)
#     >>> y = naive_checkpoint(lambda x: np.exp(np.sin(x)), x)
#     >>> print(y._operands[0] is x)  # nothing between them
#     True
#     >>> y.backward()
#     >>> print(x.grad)  # exp(sin(0)) * cos(0)
#     1.0
#
# The naive version lacks three things. *Other operands*: f may close over Tensors, such
# as the parameters of a module, and these receive nothing. *Chance*: if f uses dropout,
# the second run must draw the same numbers as the first. *A check* that both runs give
# the same result.
#
# How do we find out what f reads? We run it once with a tape, and then drop the tape.
# (It is in memory for a moment, so checkpoint a model in pieces.) All that f makes is
# younger than the moment when it began, and all that it reads is older. A search for a
# route (I.5) with that moment for its horizon lists what f reads as `older`. Here f
# reads w and x, and makes h and y:
#
#     >>> w, x = Tensor(3.0, label="w"), Tensor(2.0, label="x")  # w:1, x:2
#     >>> began = next(_clock)  # 3
#     >>> h = w * x  # h:4
#     >>> y = np.sin(h)  # y:5
#     >>> print([t.label for t in _find_route([y], [], horizon=began).older])
#     ['x', 'w']
#
# These are the operands of the checkpoint. In the backward pass f runs again, and a
# small walk goes back along the new tape to them. They are older than its horizon, the
# moment when the second run began, so it goes no further. They receive what it brings.


def checkpoint(f: Callable, *args: Any) -> Tensor:
    """f(*args), whose intermediate results are computed again in the backward pass.

    Saves memory for time (Griewank and Walther, 2000). f returns one Tensor, and what
    it closes over (a module's parameters) gets gradients too. The second run draws the
    same random numbers; other effects of f, such as those on batch norm's running
    statistics, happen twice. The backward pass raises RuntimeError if f then gives
    another result.
    """
    if not callable(f) or not args:
        raise TypeError("checkpoint: takes the function and its arguments: "
                        "checkpoint(f, x)")
    rng_before = copy.deepcopy(_rng())
    began = next(_clock)
    (y,) = _outputs("checkpoint", [f(*args)])  # as a Tensor (IV.3)
    operands = tuple(_find_route([y], [], horizon=began).older)
    if not operands or not _mode.recording:  # there is nothing to differentiate
        return y.detach()

    def run_again() -> Tensor:
        with _mode.set(recording=True, rng=copy.deepcopy(rng_before)):
            return f(*args)

    # The result remembers `checkpoint` as its operation, and `run_again` as a setting.
    return _fill(Tensor.__new__(Tensor), y._data, checkpoint, operands,
                 {"run_again": run_again})


def _pull_checkpoint(t: Tensor, g: Any, wanted: list[bool], create_graph: bool) -> list:
    """What each operand receives, or None: f runs again, and a walk goes back."""
    began = next(_clock)
    again = t._settings["run_again"]()
    _require_same_result(again, t)

    inputs = [a for a, is_wanted in zip(t._operands, wanted) if is_wanted]
    route = _find_route([again], inputs, horizon=began)
    reached = _walk_to(inputs, [(again, g)], create_graph, retain_graph=create_graph,
                       route=route)
    return [reached.get(a) for a in t._operands]


def _require_same_result(again: Any, t: Tensor) -> None:
    """Raise RuntimeError if f gave another result than `t`, but for rounding."""
    tolerance = math.sqrt(np.finfo(t.dtype).eps)  # half of the digits
    is_same = isinstance(again, Tensor) and again.shape == t.shape and np.allclose(
        again._data, t._data, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not is_same:
        raise RuntimeError("checkpoint: f gave another result when it was run again "
                           "for the backward pass; has something that it uses changed, "
                           "such as a module's training flag?")


# To the walk (I.5), `checkpoint` is an operation with any number of operands.
checkpoint.arity = sys.maxsize
checkpoint.pull = _pull_checkpoint


# ## IV.3 Transforms: what if an argument is a dict of lists?
#
# The transforms that users call take more than the one vector of I.7 and I.8. An argument
# may be a *nest* of dicts, lists and tuples of arrays, as the parameters of a model are,
# and the gradient is built like it:
#
#     >>> def loss(p, x):
#     ...     return ((p["w"] * x + p["b"]) ** 2).sum()
#     ...
#     >>> p = {"w": np.array(2.0), "b": np.array(1.0)}
#     >>> print(*grad(loss)(p, 3.0).values())  # 2 (w x + b) x, and 2 (w x + b)
#     42.0 14.0
#
# A walk knows only a flat list of tensors. So we take a nest apart into the list of its
# *items*, and put the results together in the same structure:
#
#     >>> items, rebuild = _flatten({"w": 1, "layers": (2, 3)})
#     >>> print(items, rebuild([10, 20, 30]))
#     [1, 2, 3] {'w': 10, 'layers': (20, 30)}
#
# One function does both. It goes through a nest, and builds a nest of the same
# structure from what `f` returns for each item. To flatten, f adds the item to a list;
# to rebuild, f returns the next of the other items.


def _map_tree(f: Callable, tree: Any) -> Any:
    """Apply `f` to all items of a nest, and return the same nest of its results."""
    if _is_item(tree):
        return f(tree)
    if isinstance(tree, dict):
        return {key: _map_tree(f, item) for key, item in tree.items()}
    items = [_map_tree(f, item) for item in tree]
    if hasattr(tree, "_make"):  # a namedtuple
        return tree._make(items)
    return items if isinstance(tree, list) else tuple(items)


def _flatten(tree: Any) -> tuple[list, Callable[[Iterable], Any]]:
    """The items of `tree`, and a function that builds the same nest of other items."""
    items: list = []
    _map_tree(items.append, tree)

    def rebuild(others: Iterable) -> Any:
        others = iter(others)
        return _map_tree(lambda item: next(others), tree)

    return items, rebuild


# What is an item? Anything but a dict, list or tuple is one. So is a list that stands
# for an array: one of numbers, or of such lists of one shape. [[1.0], [2.0]] is one
# item, and [[1.0], 2.0] holds two.


def _is_item(tree: Any) -> bool:
    if not isinstance(tree, list):
        return not isinstance(tree, (dict, tuple))
    if all(map(np.isscalar, tree)):  # (also if it is empty)
        return True
    if not all(isinstance(row, list) and _is_item(row) for row in tree):
        return False
    return len({np.shape(row) for row in tree}) == 1


# ### What do the transforms have in common?
#
# Each begins as `careful_grad` does (I.7). For one argument and no nests, that is
#
#     inputs = [a new Tensor, tied to the argument if that is tracked]
#     output = f(*inputs)
#     route = _find_route([output], inputs)
#     somebody_may_ask = bool(route.older)
#
# and a `_Run` does the same for nests. (Functions such as `_choose_arguments` and
# `_outputs` convert what a caller gave, or refuse it. They end this section.) The
# transforms differ in the walks that follow, which are those of I.8. Somebody may also
# ask by a tangent or a cotangent that they gave, if it is tracked.
#
# Inside no_grad(), f is still recorded, since one cannot walk back without a tape; but
# the last walk is not, and the gradient is a constant. (So this is how to spare its
# tape if f reads the parameters of a network, which are older than its inputs.)
_Mode.runs = ()  # this thread's; float(t) asks for them (II.8)


class _Run:
    """A function run by a transform: fresh inputs, the output, the route between."""

    def __init__(self, name: str, f: Callable, args: Sequence,
                 kwargs: dict | None = None, argnums: Any = None,
                 tangents: Any = ()) -> None:
        self.name = name
        # With args (a, {"w": b}) and argnums 1: {"w": b} is chosen, and b its only item.
        chosen, put_back = _choose_arguments(name, args, argnums)
        items, self.rebuild = _flatten(chosen)
        self.inputs = [_fresh_input(name, item) for item in items]
        args = put_back(self.rebuild(self.inputs))
        with _mode.set(recording=True, runs=(*_mode.runs, self)):
            self.output = f(*args, **kwargs or {})
        self.route = _find_route(_flatten(self.output)[0], self.inputs)
        # (Outside the `with`, for it is the caller's mode that counts.)
        self.somebody_may_ask = self.may_be_asked(tangents)

    def may_be_asked(self, vectors: Any) -> bool:
        """Whether somebody may ask for derivatives of what a walk gives.

        An older tensor can ask (I.7), and so can a tracked one among `vectors`, the
        cotangents or tangents that the walk is given.
        """
        if not _mode.recording:
            return False
        items, _ = _flatten(vectors)
        return bool(self.route.older) or any(map(_tracked, items))

    @property
    def value(self) -> Any:
        """The output for the caller: constant, if nobody else can ask."""
        if self.somebody_may_ask:
            return self.output
        return _map_tree(lambda a: a.detach() if _tracked(a) else a, self.output)

    def walk_back(self, outputs: Sequence[Tensor], cotangents: Sequence,
                  create_graph: bool, retain_graph: bool = False) -> list[Tensor]:
        """What reaches the inputs from these cotangents of the outputs (None is 1)."""
        seeds = _seeds(self.name, outputs, cotangents, create_graph)
        return _gradients(seeds, self.inputs, create_graph, retain_graph, self.route)

    def slopes(self) -> list[Tensor]:
        """The gradient of a scalar output, to be differentiated again (I.8)."""
        output = _outputs(self.name, [self.output])
        return self.walk_back(output, [None], create_graph=True)


def value_and_grad(f: Callable, argnums: int | Sequence[int] = 0,
                   has_aux: bool = False, *, argnum: Any = None) -> Callable:
    """The function that returns (f(...), gradient of f), for an f that returns a scalar.

    The gradient, a Tensor, is built like the argument at `argnums` (`argnum` in HIPS
    autograd), or is a tuple of such if that is one; zeros for an argument that has no
    part. With `has_aux`, f returns (scalar, anything), and the value is that pair.
    Raises ValueError if f is not scalar, TypeError for integer arguments; warns if f
    returns a plain number, whose derivative is zero.

        >>> print(*value_and_grad(lambda x: (x ** 2).sum())(np.array([1.0, 3.0])))
        10.0 [2. 6.]
    """
    argnums = argnums if argnum is None else argnum

    @functools.wraps(f)
    def function(*args: Any, **kwargs: Any) -> tuple:
        return _value_and_slopes("value_and_grad", f, args, kwargs, argnums, has_aux)

    return function


def _value_and_slopes(name: str, f: Callable, args: Sequence, kwargs: dict, argnums: Any,
                      has_aux: bool) -> tuple:
    run = _Run(name, f, args, kwargs, argnums)
    scalar = _first_of_pair(name, run.output) if has_aux else run.output
    slopes = run.walk_back(_outputs(name, [scalar]), [None], run.somebody_may_ask)
    return run.value, run.rebuild(slopes)


def grad(f: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
         argnum: Any = None) -> Callable:
    """The function that returns the gradient of f, which returns a scalar.

    (If it does not, see `jacobian`.) It returns a Tensor like the argument at `argnums`
    (see `value_and_grad`); with `has_aux`, (gradient, aux). `.numpy()` makes an array
    of it; NumPy's functions take it as it is.

        >>> slope = grad(lambda x: x * x)  # a constant, unless x is tracked
        >>> print(slope(2.0).requires_grad, slope(Tensor(2.0)).requires_grad)
        False True
    """
    argnums = argnums if argnum is None else argnum

    @functools.wraps(f)
    def function(*args: Any, **kwargs: Any) -> Any:
        value, slope = _value_and_slopes("grad", f, args, kwargs, argnums, has_aux)
        return (slope, value[1]) if has_aux else slope

    return function


def vjp(f: Callable, *primals: Any) -> tuple[Any, Callable]:
    """`(f(*primals), vjp_fn)`, where `vjp_fn(u)` is `J^T u`, like the tuple of primals.

    The *primals* are the arguments to differentiate at; the cotangent u is built like f's
    result. f runs once, however often vjp_fn does.

        >>> value, vjp_fn = vjp(lambda x: x ** 2, np.array([1.0, 3.0]))
        >>> print(value, *vjp_fn(np.array([1.0, 10.0])))
        [1. 9.] [ 2. 60.]
    """
    if not primals:
        raise TypeError("vjp: takes the function and its arguments: vjp(f, x)")
    primals = _map_tree(_copied_argument, primals)  # callers may write to theirs
    run = _Run("vjp", f, primals)
    outputs = _outputs("vjp", _flatten(run.output)[0])

    def vjp_fn(cotangent: Any) -> tuple:
        if cotangent is None:  # 1 for a scalar, as in `backward`
            cotangents = [None] * len(outputs)
        else:
            cotangents = _match("vjp", cotangent, run.output)
        create_graph = run.may_be_asked(cotangents)
        slopes = run.walk_back(outputs, cotangents, create_graph, retain_graph=True)
        return run.rebuild(slopes)

    return run.value, vjp_fn


def jvp(f: Callable, primals: Sequence, tangents: Sequence) -> tuple[Any, Any]:
    """`(f(*primals), J v)`, both built like f's result, where v are the tangents.

        >>> print(jvp(np.sin, (0.0,), (2.0,))[1])
        2.0
    """
    _require_tuples("jvp", primals, tangents)
    run = _Run("jvp", f, primals, tangents=tangents)  # (which say whether to record)
    items, rebuild = _flatten(run.output)
    outputs = _outputs("jvp", items)
    u = [_wrap(np.zeros(y.shape, y.dtype), True) for y in outputs]
    s = run.walk_back(outputs, u, create_graph=True)  # walk 1
    v = _match("jvp", tuple(tangents), tuple(primals))
    seeds = _seeds("jvp", s, v, run.somebody_may_ask)
    return run.value, rebuild(_gradients(seeds, u, run.somebody_may_ask))  # walk 2


def hvp(f: Callable, primals: Sequence, vector: Sequence) -> tuple[Tensor, tuple]:
    """`(f(*primals), Hessian of f times vector)`, the product as a tuple like `primals`.

        >>> x, v = np.array([1.0, 2.0]), np.array([1.0, 1.0])
        >>> print(*hvp(lambda x: (x ** 3).sum(), (x,), (v,)))
        9.0 (Tensor([ 6., 12.], dtype=float64),)
    """
    _require_tuples("hvp", primals, vector)
    run = _Run("hvp", f, primals, tangents=vector)
    slopes = run.slopes()
    v = _match("hvp", tuple(vector), tuple(primals))
    seeds = _seeds("hvp", slopes, v, run.somebody_may_ask)
    return run.value, run.rebuild(_gradients(seeds, run.inputs, run.somebody_may_ask))


# ### jacobian and hessian: what of a nest?
#
# Each element of the output takes one walk, as in I.8. If the output is a nest, so is
# its Jacobian, and each item of the Jacobian is a nest built like the arguments. A
# Hessian is the Jacobian of the slopes, which are a nest built like the arguments, too.


def jacobian(f: Callable, argnums: int | Sequence[int] = 0, *,
             argnum: Any = None) -> Callable:
    """The function that returns the Jacobian of f: shape out.shape + in.shape.

    Each row takes one walk.

        >>> print(*jacobian(lambda x: x ** 2)(np.array([1.0, 2.0])))
        [2. 0.] [0. 4.]
    """
    argnums = argnums if argnum is None else argnum

    @functools.wraps(f)
    def function(*args: Any, **kwargs: Any) -> Any:
        run = _Run("jacobian", f, args, kwargs, argnums)
        return _map_tree(lambda y: _jacobian(run, y, run.route), run.output)

    return function


def hessian(f: Callable, argnums: int | Sequence[int] = 0, *,
            argnum: Any = None) -> Callable:
    """The function that returns the Hessian of a scalar f: shape in.shape + in.shape.

    f runs once, and each row takes one walk. For a nest of arguments, the Hessian is a
    nest of such nests.

        >>> print(*hessian(lambda x: (x ** 3).sum())(np.array([1.0, 2.0])))
        [6. 0.] [ 0. 12.]
    """
    argnums = argnums if argnum is None else argnum

    @functools.wraps(f)
    def function(*args: Any, **kwargs: Any) -> Any:
        run = _Run("hessian", f, args, kwargs, argnums)
        slopes = run.slopes()
        route = _find_route(slopes, run.inputs)  # the slopes have a new tape
        return _map_tree(lambda y: _jacobian(run, y, route), run.rebuild(slopes))

    return function


def _jacobian(run: _Run, y: Any, route: _Route) -> Any:
    """The derivatives of `y` by all inputs, each of shape y.shape + input.shape.

    The route may be that of several outputs, which does no harm.
    """
    (y,) = _outputs(run.name, [y])
    rows = []
    for unit in np.eye(y.size).reshape(y.size, *y.shape):
        seeds = _seeds(run.name, [y], [unit], run.somebody_may_ask)
        row = _gradients(seeds, run.inputs, run.somebody_may_ask, retain_graph=True,
                         route=route)
        rows.append(row)
    jacobians = []
    for i, x in enumerate(run.inputs):
        if rows:
            block = stack([row[i] for row in rows])  # (y.size, *x.shape)
        else:  # y has no elements
            block = np.zeros((0, *x.shape), x.dtype)
        jacobians.append(reshape(block, y.shape + x.shape))
    return run.rebuild(jacobians)


# ### What if a tape was let go?
#
# The search for a route (I.5) asks each tensor for its operands. A tensor whose tape a
# `backward` has let go no longer has them. That is an error if an input may be behind
# that tensor. But a function may have a training loop inside, and return x times its
# last loss. So `backward` notes, in the `_leaves` of each tensor that it passes, the
# times of all leaves that it meets: x is not among them. (They count as `complete` if
# no error ended it before.) Below, s is the loss, made of w alone:
#
#     >>> x, w = Tensor(3.0), Tensor(2.0)  # x:1, w:2
#     >>> s = w * w  # s:3
#     >>> s.backward()  # lets go; s._leaves.times is {2}
#     >>> print(gradients(s * x, [x])[0])  # 1 is not in it, so x is not behind s
#     4.0
#     >>> gradients(s * x, [w])  # 2 is in it
#     Traceback (most recent call last):
#     RuntimeError: mul: the tape behind this tensor was let go by an earlier walk; to walk it twice, give the first walk retain_graph=True


def _check_not_behind(t: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise RuntimeError if an input may be behind `t`, whose operands were let go."""
    if any(_may_be_behind(t, x) for x in inputs):
        _check_tape(t)  # raises


def _may_be_behind(t: Tensor, x: Tensor) -> bool:
    """Whether `t`, whose operands were let go, may have been made of `x`."""
    if x._time >= t._time:
        return False  # operands are older
    is_known = t._leaves is not None and t._leaves.complete
    is_leaf = x._op is None
    return not (is_known and is_leaf) or x._time in t._leaves.times


# ### What is refused?
#
# Each of these functions converts what it can, and refuses the rest with an error that
# names the transform:
#
#     `_choose_arguments`   by which arguments?        those at `argnums`, each once
#     `_fresh_input`        have they a derivative?    if they are floating-point numbers
#     `_outputs`            did f return Tensors?      numbers are taken, with a warning
#     `_first_cotangent`    what does a walk begin     one of the same shape; 1 for a
#                           with?                      scalar
#     `_match`              is a nest built like       its items, in the other's order
#                           another?
#
#     >>> chosen, put_back = _choose_arguments("grad", (1.0, 2.0, 3.0), argnums=(0, 2))
#     >>> print(chosen, put_back((10.0, 30.0)))
#     (1.0, 3.0) [10.0, 2.0, 30.0]


def _choose_arguments(name: str, args: Sequence, argnums: Any) -> tuple[Any, Callable]:
    """The argument at `argnums`, or a tuple of them (None: all); how to replace them."""
    is_one = isinstance(argnums, (int, np.integer))
    positions = range(len(args)) if argnums is None else np.ravel(argnums).tolist()
    if not all(isinstance(i, int) for i in positions):
        raise TypeError(f"{name}: argnums is a whole number or several, not "
                        f"{argnums!r}")
    if any(i not in range(-len(args), len(args)) for i in positions):
        raise ValueError(f"{name}: no argument {argnums} among the {len(args)} "
                         "positional ones, which are counted from 0")
    positions = [i % len(args) for i in positions]  # -1 is the last
    if len(set(positions)) < len(positions):
        raise ValueError(f"{name}: argnums={argnums} names an argument twice")

    def put_back(chosen: Any) -> list:
        arguments = list(args)
        for i, argument in zip(positions, [chosen] if is_one else chosen):
            arguments[i] = argument
        return arguments

    chosen = tuple(args[i] for i in positions)
    return chosen[0] if is_one else chosen, put_back


def _require_tuples(name: str, primals: Any, tangents: Any) -> None:
    for given in (primals, tangents):
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"{name}: primals and tangents are tuples, one entry per "
                            f"argument, such as (x,); and not a {type(given).__name__}")


def _fresh_input(name: str, x: Any) -> Tensor:
    """A new tensor to differentiate by; tied to `x`, if that is tracked (I.7)."""
    array = np.asarray(_value(x))
    if array.dtype.kind != "f":  # Tensor(3) is 3.0, but 3 may be a count here
        raise TypeError(f"{name}: the argument {str(x)[:40]} is {array.dtype}, which "
                        "has no derivative; make it floating-point, as in 3.0")
    return identity(x) if _tracked(x) and _mode.recording else _wrap(array, True)


def _copied_argument(x: Any) -> Any:
    """A copy, tied to `x` if that is tracked. (`_fresh_input` will refuse integers.)"""
    return _copy(x) if _tracked(x) else np.array(_value(x))


def _outputs(name: str, items: Iterable) -> list[Tensor]:
    """What a function returned, as Tensors; plain numbers and arrays are constants."""
    tensors = []
    for item in items:
        if not isinstance(item, (Tensor, np.ndarray, np.generic, int, float)):
            raise TypeError(f"{name}: the function must return what it computes from "
                            f"its arguments, and not a {type(item).__name__} "
                            f"({str(item)[:40]})")
        if not isinstance(item, Tensor):
            warnings.warn(f"{name}: the function returned a plain "
                          f"{type(item).__name__}, so its derivative is zero; was a "
                          "Tensor converted on the way?",
                          stacklevel=_level_of_caller())
        tensors.append(as_tensor(item))
    return tensors


def _level_of_caller() -> int:
    """The `stacklevel` by which a warning points to the code that called this file."""
    level = 1
    frame = sys._getframe(1)
    here = frame.f_code.co_filename
    while frame.f_back is not None and frame.f_code.co_filename == here:
        level += 1
        frame = frame.f_back
    return level


def _first_of_pair(name: str, output: Any) -> Any:
    if not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError(f"{name}: with has_aux=True the function must return (scalar, "
                        f"aux), not {type(output).__name__}")
    return output[0]


def _first_cotangent(name: str, output: Tensor, cotangent: Any,
                     create_graph: bool) -> Any:
    """The cotangent that a walk starts with: the one given, or 1 for a scalar."""
    if not isinstance(output, Tensor):
        raise TypeError(f"{name}: a {type(output).__name__} ({str(output)[:40]}) is no "
                        "Tensor")
    if cotangent is None and output.size == 1:
        cotangent = np.ones(output.shape)
    if np.shape(cotangent) != output.shape:
        given = "none" if cotangent is None else f"one of shape {np.shape(cotangent)}"
        raise ValueError(f"{name}: an output of shape {output.shape} needs a cotangent "
                         f"of its shape, not {given}; make a scalar of it, as by "
                         ".sum(), or give a cotangent")
    if create_graph:
        # A tracked cotangent stays on the tape, even inside no_grad(): jvp's second walk
        # looks for its u there (I.8).
        with _mode.set(recording=True):
            return astype(as_tensor(cotangent), output.dtype)
    return np.asarray(_value(cotangent), output.dtype)


def _seeds(name: str, outputs: Iterable[Tensor], cotangents: Iterable,
           create_graph: bool) -> list[tuple]:
    """The pairs (output, cotangent) that a walk starts with."""
    return [(y, _first_cotangent(name, y, g, create_graph))
            for y, g in zip(outputs, cotangents)]


def _require_tracked(name: str, inputs: Iterable) -> None:
    """Check the inputs of `gradients`: it runs no f, so they must be tracked already."""
    for t in inputs:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: a {type(t).__name__} ({str(t)[:40]}) is no "
                            "Tensor on the tape")
        if not t.requires_grad:
            raise RuntimeError(f"{name}: the input {t.label or str(t)[:40]} is a "
                               "constant, of which no tape is written; make it by "
                               "Tensor(...), outside no_grad()")


# A cotangent is built like its result, and a tangent like its argument. To pair them,
# we go through both nests at once, and match dicts by key. The result or the argument
# decides what is an item, since [1.0, 1.0] may belong to one array or to two:
#
#     >>> for like in np.ones(2), (1.0, 1.0):
#     ...     print([item.shape for item in _match("vjp", [1.0, 1.0], like)])
#     [(2,)]
#     [(), ()]


def _match(name: str, tree: Any, like: Any) -> list[Tensor]:
    """The items of `tree`, as Tensors, in the order of the items of `like`."""
    if _is_item(like) and not isinstance(tree, dict):  # (a dict is refused below)
        item = as_tensor(tree)
        shape = np.shape(_value(like))
        if item.shape != shape:
            raise ValueError(f"{name}: needs a vector of shape {shape} here, and was "
                             f"given one of {item.shape}")
        return [item]

    keys = _keys(like)
    if keys is None or _keys(tree) != keys:
        raise TypeError(f"{name}: needs {_outline(like)}, and was given "
                        f"{_outline(tree)}")
    items = []
    for key in keys:
        items += _match(name, tree[key], like[key])
    return items


def _keys(tree: Any) -> Any:
    """The keys of a dict, or the positions in a list or tuple; else None."""
    if isinstance(tree, dict):
        return tree.keys()
    return range(len(tree)) if isinstance(tree, (list, tuple)) else None


def _outline(tree: Any) -> str:
    """The structure of a nest, for messages: {'a': (2,), 'b': ()}."""
    return str(_map_tree(lambda item: np.shape(_value(item)), tree))


# ## IV.4 The machine: what had to be measured?
#
# What do NumPy, its BLAS, the C library and the system do that we did not ask for?
#
# **Imports.** A module that few programs need is imported in the function that uses it.
#
# **Dtypes.** The result of an operation may need another dtype (II.9). A Tensor holds
# floats, so integers and bools become float64, and complex numbers are refused. And
# NumPy 1 (we support 1.26) made a float64 of `np.float32(1) * 2.0`, though not of an
# array of float32 times 2.0. With it, we convert a result back to the dtype of the
# operands, if they have only one (but not that of `astype`, which says its own).
_OLD_NUMPY = np.lib.NumpyVersion(np.__version__) < "2.0.0"


def _settle_dtype(y: np.ndarray, operation: Callable, arrays: list) -> np.ndarray:
    """The result of an operation, in the floating-point type that it should have."""
    y = _float_array(y)
    if not _OLD_NUMPY or operation is astype:
        return y
    operands = [a for a in arrays if isinstance(a, (np.ndarray, np.generic))]
    dtypes = {a.dtype for a in operands if a.dtype.kind == "f"}
    return y.astype(dtypes.pop(), copy=False) if len(dtypes) == 1 else y


# **How many cores?** A process may be confined to some of the machine's cores.
def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # 0: of this process
    return os.cpu_count() or 1


# **Fork.** Windows has no os.fork. macOS has it, but its own libraries do not survive
# it. Python 3.12 and later warn of a fork while other threads run, BLAS's idle ones
# included: a lock that a thread holds stays locked in the copy, where that thread does
# not exist. Our workers only compute with NumPy, and point 5 of IV.5 deals with its
# locks.
_CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin"


def _fork() -> int:
    """Call os.fork: it returns 0 in the new process, and its number in the old one."""
    # (stdout may be None, or closed.)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()  # else the copy may print the buffer a second time
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        return os.fork()


# **BLAS** computes NumPy's matrix products, with a thread for each core. With a process
# for each core as well, the threads would be in each other's way. NumPy has no function
# to set their number, but OpenBLAS, which comes with NumPy, has one.
# (OPENBLAS_NUM_THREADS=1 in the environment does the same, if set before NumPy is
# imported.)
def _set_blas_threads(count: int | None) -> int | None:
    """Give OpenBLAS `count` threads; return how many it had (None: no OpenBLAS)."""
    get_threads, set_threads = _openblas()
    before = get_threads()
    set_threads(count)
    return before


@functools.cache
def _openblas() -> tuple[Callable, Callable]:
    """OpenBLAS's functions to get and set its threads, or two that do nothing."""
    import ctypes

    names = ("scipy_openblas_{}_num_threads64_",  # as it comes with NumPy 2
             "openblas_{}_num_threads64_",  # with NumPy 1
             "openblas_{}_num_threads")  # with the system
    # Linux lists in this file what the process has loaded. Other systems have no such
    # file, and their threads stay as they are.
    with contextlib.suppress(OSError), open("/proc/self/maps") as loaded:
        for path in {line.split()[-1] for line in loaded if "openblas" in line}:
            library = ctypes.CDLL(path)
            for name in names:
                if hasattr(library, name.format("get")):
                    return library[name.format("get")], library[name.format("set")]
    return lambda: None, lambda count: None


# **The allocator.** Each step of training makes and drops the same arrays of a few
# megabytes. glibc, the C library of most Linuxes, gives such memory back to the system
# at once, and gets it again page by page. That takes half of the time of a CNN's step.
# So while an optimizer or a DataParallel lives, this process keeps the memory that it
# frees. Two settings control this (mallopt(3)), and we raise both to their maximum:
#
# - A block of M_MMAP_THRESHOLD bytes or more comes from the system and goes back to it.
# - Smaller blocks come from a heap, which keeps up to M_TRIM_THRESHOLD free bytes at
#   its end.
#
# When the last optimizer and DataParallel is gone, all free memory goes back, and
# M_TRIM_THRESHOLD is lowered to twice the other, which is glibc's own choice.
# (M_MMAP_THRESHOLD stays high, as glibc sets it itself when large blocks are freed.)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as in glibc's malloc.h
_LARGEST_INT = (1 << 31) - 1  # so all free memory is kept
_LARGEST_THRESHOLD = 32 << 20  # 32 MiB, which is glibc's limit
# The ids of the optimizers and DataParallels that live:
_trainers: set[int] = set()


def _keep_freed_memory(trainer: Any) -> None:
    """Let glibc keep freed memory as long as `trainer` lives."""
    if _glibc() is None:
        return
    _glibc().mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
    _glibc().mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    _trainers.add(id(trainer))
    when_gone = weakref.finalize(trainer, _give_back, id(trainer))
    when_gone.atexit = False  # at Python's end the system takes all back


def _give_back(trainer_id: int) -> None:
    """When the last trainer is gone, give back the kept memory, and keep no more."""
    _trainers.discard(trainer_id)
    if not _trainers:
        _glibc().mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        _glibc().malloc_trim(0)  # keep 0 free bytes


@functools.cache
def _glibc() -> Any:
    """The C library if it is glibc, else None."""
    import ctypes

    with contextlib.suppress(OSError, TypeError):  # (TypeError: on Windows)
        library = ctypes.CDLL(None)  # what this process has loaded
        if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
            return library
    return None


# ## IV.5 Workers: what if one dies?
#
# DataParallel (III.9) forks its workers. Each is a copy of the program, and does only
# this:
#
#     while True:
#         job = pipe.recv()  # waits
#         pipe.send(answer(job))
#
# That is all, as long as nothing happens. Five things may: we end a worker (1), a
# worker dies (2), the parent dies (3), the user presses Ctrl-C (4), or a worker never
# begins (5). Even then, no process may wait for ever, and no worker may run on when it
# is no longer needed. Each of the five is told below: what can go wrong, and then the
# code that deals with it. After them come a worker's whole life and the team of all
# workers. There, a number in parentheses marks the line that belongs to a point. But
# first, the memory that all processes share.
#
# ### Common memory
#
# A fork gives the new process a copy of all memory, except of what was asked for by
# `mmap`: that stays common to both. So we ask before the fork.


def _shared(size: int, dtype: np.dtype) -> np.ndarray:
    """A flat array of zeros, common to this process and all that it forks later."""
    import mmap

    num_bytes = max(1, size * dtype.itemsize)  # (mmap refuses 0)
    memory = mmap.mmap(-1, num_bytes)  # -1: it belongs to no file
    return np.frombuffer(memory, dtype, size)


# ### 1. We end a worker
#
# A worker has nothing to tidy up, so we kill it, by SIGKILL, the signal that no process
# can refuse. Two things can go wrong:
#
# - The system keeps an entry for a dead process until its parent has asked how it
#   ended. If nobody asks, the entries pile up. So we ask, by `os.waitpid`.
# - Once that has been asked, by us or by other code, the system may give the number of
#   the process to a new one. A signal would hit a stranger. So we send none to a
#   process that is known to have ended.


class _Process:
    """A process that we have forked, as we see it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid  # its number
        self.has_ended = False  # as far as we know
        # None if we do not know it; -n if it was killed by signal n.
        self.exit_code: int | None = None

    def end(self) -> None:
        """End the process, whatever it is doing."""
        import signal

        if self._still_runs():
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(self.pid, signal.SIGKILL)
            self.wait(seconds=math.inf)

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` for the process to end."""
        deadline = time.monotonic() + seconds
        while self._still_runs() and time.monotonic() < deadline:
            time.sleep(0.001)  # so as not to ask all the time

    def _still_runs(self) -> bool:
        """Ask the system whether the process runs. If not, note how it has ended."""
        if self.has_ended:
            return False
        try:
            # WNOHANG means: do not wait. If the process still runs, pid is then 0.
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # others have asked before, and know how
            self.has_ended = True
            return False
        if pid == 0:
            return True
        self.has_ended = True
        self.exit_code = os.waitstatus_to_exitcode(status)
        return False


# ### 2. A worker dies
#
# The system may kill a worker when memory runs out. The parent, which waits for its
# answer, must not wait for ever. It need not: the system closes the pipe's end in the
# dead process, so at the other end `recv` raises EOFError, and `send` OSError. We make
# an error of these that says how the worker ended. (DataParallel then ends the others:
# `_compute_all`, III.9.)


class _Worker(_Process):
    """A process at the other end of a pipe, which gets jobs and sends answers."""

    def __init__(self, pid: int, pipe: Any, flats: list[np.ndarray]) -> None:
        super().__init__(pid)
        self.pipe = pipe  # our end of it
        self.flats = flats  # the gradient that it computes, in common memory

    def send(self, job: _Job) -> None:
        """Give the worker its share. Raises RuntimeError if it is dead."""
        try:
            self.pipe.send(job)
        except OSError:
            raise self._lost() from None

    def receive(self) -> Any:
        """Wait for the worker's answer, or the exception that it met.

        Raises RuntimeError if it is dead.
        """
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None

    def end(self) -> None:
        """End the worker, whatever it is doing."""
        self.pipe.close()
        super().end()

    def _lost(self) -> RuntimeError:
        """The error to raise when the other end of the pipe is closed."""
        import signal

        # The system closes a pipe a moment before it reports the end of the process.
        self.wait(seconds=1)
        code = self.exit_code
        if not self.has_ended:  # the worker's own code has closed the pipe
            how = "has closed its pipe, and is ended"  # (by DataParallel.close)
        elif code is None:
            how = "ended"
        elif code >= 0:
            how = f"ended with exit code {code}"
        else:
            how = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += ", as the system does when memory runs out"
        return RuntimeError(f"DataParallel: worker process {self.pid} {how}")


# ### 3. The parent dies
#
# Then the parent's end of the pipe is closed, and `recv` in the worker raises EOFError,
# which ends the worker. That is not enough in two cases:
#
# - The worker is in the middle of a long share, and does not call `recv`.
# - Another process has a copy of the parent's end, for a fork copies all open ends of
#   pipes. While one copy is open, `recv` waits. Our workers close theirs, but the
#   program may have forked others.
#
# So a thread in each worker asks, four times a second, for the number of its parent.
# When that has died, the system makes another process the parent.


def _follow(parent: int) -> None:
    """End this process when `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)


# ### 4. Ctrl-C
#
# Ctrl-C sends the signal SIGINT to all processes of a terminal, and Python makes a
# KeyboardInterrupt of it. In a worker, that would print a traceback of its own. So
# workers ignore the signal; the parent, when interrupted, ends them.
#
# But a KeyboardInterrupt may come between any two steps of the parent. If it comes
# right after a fork, the new worker is not yet on the parent's list, and would never be
# ended. So SIGINT has to wait while the list is changed:


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Make Ctrl-C wait until the `with` block is done."""
    import signal

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])  # what is blocked now
    try:  # first, so that `finally` undoes it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers(workers: list[_Worker], parent: int, blas_threads: int | None) -> None:
    """End the workers if this process is their parent and not a copy of it."""
    if os.getpid() != parent:
        return
    with _interrupts_held():
        for worker in workers:
            worker.end()
        workers.clear()
        _set_blas_threads(blas_threads)  # (IV.4)


# ### 5. A worker never begins
#
# Another thread of the program may compute a matrix product at the moment of the fork.
# Then it may hold OpenBLAS's lock on its buffers. The worker has a copy of this lock,
# but not of the thread that would release it. So its first product waits for ever.
#
# A worker therefore computes a product at once, and only then says "ready". If the
# parent does not hear this in time, it ends that worker and forks another. To begin
# takes about a millisecond. We wait longer each time, since it may also be the machine
# that is slow.
_SECONDS_TO_BEGIN = (1, 2, 4, 8, 16)


def _add_worker(team: _Team, flats: list[np.ndarray], answer: Callable) -> None:
    """Add a worker to the team: fork until one begins in time."""
    for seconds in _SECONDS_TO_BEGIN:
        with _interrupts_held():  # (4)
            worker = _fork_worker(team, flats, answer)
            team.workers.append(worker)
        if worker.pipe.poll(seconds) and worker.receive() == "ready":
            return
        with _interrupts_held():  # (4)
            team.workers.remove(worker)
            worker.end()
    raise RuntimeError(f"DataParallel: {len(_SECONDS_TO_BEGIN)} workers in a row "
                       "were forked and never began; is another thread of this "
                       "program in the way? Make the DataParallel before it starts")


# ### A worker's life
#
# Both processes return from the fork. The old one notes the new worker. The new one
# lives as a worker, and never comes back to the program that it is a copy of.


def _fork_worker(team: _Team, flats: list[np.ndarray], answer: Callable) -> _Worker:
    """Fork a process that lives as a worker: it computes `answer(job)` for each job."""
    from multiprocessing import Pipe

    parents_end, workers_end = Pipe()
    pid = _fork()  # (IV.4)
    if pid == 0:  # we are the new process
        # Close our copies of the parent's ends. While one is open, the worker at its
        # other end waits, even if the parent is dead. (3)
        for copied in [parents_end, *(worker.pipe for worker in team.workers)]:
            copied.close()
        _live_as_worker(team, workers_end, answer)
    workers_end.close()  # so that the worker's death really closes it (2)
    return _Worker(pid, parents_end, flats)


def _live_as_worker(team: _Team, pipe: Any, answer: Callable) -> NoReturn:
    """Answer jobs until the pipe is closed. Whatever happens, end the process."""
    try:
        import signal
        import traceback

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore it (4)
        # The program may handle this one, and so would its copy.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The fork was made while interrupts were held. The copy need not hold them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        follower = threading.Thread(target=_follow, args=[team.parent], daemon=True)
        follower.start()  # (3)
        # A fork copies a piece of memory only once somebody writes to it. Python's
        # garbage collector would write to every object, so it is to leave these alone.
        gc.freeze()
        team.use_common_memory()
        _mode.recording = True  # even if the fork was made inside no_grad()
        np.ones((128, 128)) @ np.ones((128, 128))  # large: needs a buffer (5)
        pipe.send("ready")

        while True:
            job = pipe.recv()
            try:
                pipe.send(answer(job))
            except BaseException:
                message = f"DataParallel: in a worker\n\n{traceback.format_exc()}"
                pipe.send(RuntimeError(message))
    finally:
        os._exit(1)  # (without `finally` and `atexit`)


# ### The team
#
# A DataParallel cuts batches and adds up. Its team has the workers, and moves the
# parameters into common memory and back. A caller may have the array of a parameter and
# write to it (IV.1 notes that by a `_checksum`). Then this array stays the parameter's,
# and is copied to the common one before each job.


class _Team:
    """The workers of one DataParallel, and the parameters in common memory.

    Each worker answers a job by `compute_share(share, job, pieces)`, which leaves its
    gradient in `pieces`. With a single process, which is the parent, there are no
    workers, and nothing is moved.
    """

    def __init__(self, params: list, layout: _Layout, processes: int,
                 compute_share: Callable) -> None:
        self.parent = os.getpid()
        self.workers: list[_Worker] = []  # number k computes share k + 1
        self.is_closed = False
        self._params = params
        self._layout = layout
        self._common: list[np.ndarray] = []  # of each parameter, with workers
        self._end: Callable | None = None  # ends the workers, if there are any
        if processes > 1:
            self._start(processes, compute_share)

    def _start(self, processes: int, compute_share: Callable) -> None:
        """Move the parameters into common memory, and fork the workers."""
        _, self._common = self._layout.allocate(_shared)
        for p, common in zip(self._params, self._common):
            common[...] = p._data
            if p._checksum is None:  # else a caller has the array
                p._data = common

        threads = _set_blas_threads(1)  # (IV.4)
        # Runs when the team is gone, if nobody has called `close`. (It is given the
        # list of workers and not the team, which it would keep alive.)
        self._end = weakref.finalize(
            self, _end_workers, self.workers, self.parent, threads)
        try:
            for share in range(1, processes):
                flats, pieces = self._layout.allocate(_shared)
                answer = functools.partial(compute_share, share, pieces=pieces)
                _add_worker(self, flats, answer)
        except BaseException:  # such as OSError: no more processes
            self.close()
            raise

    def copy_moved_parameters(self) -> None:
        """Copy into common memory the parameters whose array is another one."""
        for p, common in zip(self._params, self._common):
            if p._data is common:
                continue
            if p.dtype != common.dtype:
                raise TypeError(f"DataParallel: a parameter of {common.dtype} is now "
                                f"{p.dtype}; make a new DataParallel after astype")
            common[...] = p._data

    def use_common_memory(self) -> None:
        """In a worker, where no caller has an array: read all parameters from there."""
        for p, common in zip(self._params, self._common):
            p._data = common

    def close(self) -> None:
        """End the workers, and move the parameters back into memory of this process."""
        self.is_closed = True
        if self._end is None:
            return
        with _interrupts_held():
            self._end()
            self._end = None
            _, private = self._layout.allocate(np.empty)
            for p, common, array in zip(self._params, self._common, private):
                array[...] = common
                # (An array that a caller has stays the parameter's, even if common.)
                if p._data is common and p._checksum is None:
                    p._data = array
            self._common = []


# ### What an optimizer gains
#
# Parameters that lie side by side in common memory are a part of one flat array, which
# an optimizer moves at once (`_move`, III.3). Say this array is of float32 and begins
# at address 1000. One view has the addresses 1008 to 1020, the next 1020 to 1036. Each
# begins where the one before it ends, so together they are `flat[8 // 4:36 // 4]`.


def _side_by_side(arrays: list[np.ndarray]) -> np.ndarray | None:
    """The part of a flat array that its views `arrays` cover end to end, or None."""
    flat = arrays[0].base  # the array that it is a view of
    if type(flat) is not np.ndarray or flat.ndim != 1:
        return None

    start = end = arrays[0].ctypes.data  # addresses
    for a in arrays:
        is_piece = a.base is flat and a.dtype == flat.dtype and a.flags.c_contiguous
        if not is_piece or a.ctypes.data != end:
            return None
        end += a.nbytes

    zero = flat.ctypes.data
    return flat[(start - zero) // flat.itemsize:(end - zero) // flat.itemsize]


# ## IV.6 Data: is it the right data?
#
# A training loop takes its data in batches. A batch is a few rows of `x` with the same
# rows of `y`, and each pass has a new order:
#
#     >>> manual_seed(0)
#     >>> points, labels = make_moons(10)
#     >>> for x, y in DataLoader(points, labels, batch_size=4, shuffle=True):
#     ...     print(x.shape, y.shape)
#     (4, 2) (4,)
#     (4, 2) (4,)
#     (2, 2) (2,)


class DataLoader:
    """Iterate over batches (x_batch, y_batch), ndarrays, of `x` and `y`, of one length.

    With `shuffle` each pass has a new order, which `manual_seed` fixes; `drop_last`
    drops a short last batch. `transform(x_batch, rng)` returns the array that replaces
    x_batch (augmentation); batches are copies, so it may write in place. Raises
    ValueError if the lengths differ or `batch_size` is not a positive integer.
    """

    def __init__(self, x: Any, y: Any, batch_size: int = 32, shuffle: bool = False,
                 drop_last: bool = False, transform: Callable | None = None) -> None:
        self.x = np.asarray(x)
        self.y = np.asarray(y)
        if self.x.ndim == 0 or self.x.shape[:1] != self.y.shape[:1]:
            raise ValueError(f"DataLoader: x {self.x.shape} and y {self.y.shape} "
                             "differ in length; give one element of y for each "
                             "row of x")
        _positive("DataLoader", batch_size=batch_size)
        self.batch_size = int(batch_size)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.transform = transform

    def __len__(self) -> int:
        """The number of batches in a pass."""
        whole, rest = divmod(len(self.x), self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        length = len(self.x)
        order = _rng().permutation(length) if self.shuffle else np.arange(length)
        for i in range(len(self)):
            rows = order[i * self.batch_size:(i + 1) * self.batch_size]
            x = self.x.take(rows, axis=0)
            y = self.y.take(rows, axis=0)
            if self.transform:
                x = self.transform(x, _rng())
            yield x, y


class CharTokenizer:
    """Number the distinct characters of `text` from 0, in code point order.

    `.chars` holds these characters as a string, so `CharTokenizer(tokenizer.chars)` is
    the same tokenizer. Raises ValueError if `text` is empty.

        >>> tokenizer = CharTokenizer("hello")
        >>> tokenizer.chars, tokenizer.encode("hole"), tokenizer.decode([1, 0, 2, 2])
        ('ehlo', array([1, 3, 2, 0]), 'hell')
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("CharTokenizer: the text is empty; give one that has "
                             "every character to be numbered")
        self.chars = "".join(sorted(set(text)))
        self.vocab_size = len(self.chars)
        self._ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text: str) -> np.ndarray:
        """int64 ids of shape (len(text),); raises ValueError for unknown characters."""
        try:
            return np.array([self._ids[char] for char in text], np.int64)
        except KeyError as error:
            (char,) = error.args
            place = text.index(char)
            raise ValueError(f"CharTokenizer: {char!r} at position {place} is not "
                             f"among the {self.vocab_size} characters it knows; leave "
                             "it out, or make a tokenizer of a text that has it"
                             ) from None

    def decode(self, ids: Any) -> str:
        """The text of a 1-d sequence of ids; raises ValueError for an unknown id."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"CharTokenizer: ids must be 1-d integers, not {ids.dtype}"
                             f"{ids.shape}; of a batch, decode one row at a time")
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"CharTokenizer: id {outside[0]} is outside 0.."
                             f"{self.vocab_size - 1}; decode takes what encode gives")
        return "".join([self.chars[i] for i in ids.tolist()])


def make_moons(n_samples: int = 100,
               noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaving half circles, a small problem that no straight line solves.

    Returns points, float32 (n_samples, 2), and labels 0 and 1, int64 (n_samples,).
    `noise` is a standard deviation. Raises ValueError if `noise` is negative or
    `n_samples` is below 1.
    """
    if n_samples < 1 or noise < 0:
        raise ValueError("make_moons: needs n_samples >= 1 and noise >= 0, "
                         f"not {n_samples} and {noise}")
    labels = _rng().permutation(np.arange(n_samples) % 2)

    # Label 0 has the upper half circle, with the centre (0, 0). Label 1 has the lower,
    # with the centre (1, 0.5).
    angle = np.pi * (_rng().random(n_samples) + labels)  # 0 to π, or π to 2π
    across = np.cos(angle) + labels
    up = np.sin(angle) + 0.5 * labels
    points = _rng().normal(np.stack([across, up], axis=1), noise)
    return points.astype(np.float32), labels.astype(np.int64)


# ### Which bytes are believed?
#
# A network trained on half a file still learns something, and nobody suspects the file.
# Hence one rule for all data sets: **bytes are believed only after their SHA-256 has
# been compared**, wherever they came from. Then no header or shape needs a check. The
# SHA-256 is that of the *unpacked* content, because the same text can be packed into
# different gzip files. (CIFAR-10's archive has one source, so its SHA-256 is that of
# the packed file.)
#
# `_data_file` looks in the data folder, `_download` tries the mirrors, and `_verified`
# compares. `_SOURCES` gives the mirrors of each file and its content's size and digest.
_MNIST = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/{}.gz",
    "https://storage.googleapis.com/cvdf-datasets/mnist/{}.gz",
)
_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/{}",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/{}",
)
_CIFAR = ("https://www.cs.toronto.edu/~kriz/{}",)

_SOURCES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "tinyshakespeare/input.txt": (_SHAKESPEARE, 1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "mnist/train-images-idx3-ubyte": (_MNIST, 47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "mnist/train-labels-idx1-ubyte": (_MNIST, 60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "mnist/t10k-images-idx3-ubyte": (_MNIST, 7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "mnist/t10k-labels-idx1-ubyte": (_MNIST, 10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    "cifar10/cifar-10-binary.tar.gz": (_CIFAR, 170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
}


def _sha256(content: bytes | memoryview) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _data_file(name: str) -> bytes:
    """The verified content of a data file, from the data folder or else a mirror."""
    beside = os.path.join(os.path.dirname(__file__), "data")
    folder = os.environ.get("NANOAD_DATA") or beside
    path = os.path.abspath(os.path.join(folder, name))

    for candidate in (path, path + ".gz"):
        if os.path.exists(candidate):
            try:
                return _verified(_read(candidate), candidate, name)
            except ValueError as error:
                print(f"nanoad: {error}; looking for a good copy", file=sys.stderr)

    return _download(name, path)  # stores it at `path`, tried first next time


def _verified(raw: bytes, place: str, name: str) -> bytes:
    """The content of a data file, given the bytes found at `place`, a path or a URL.

    Raises ValueError if the content does not have the digest in `_SOURCES`.
    """
    _, size, digest = _SOURCES[name]
    content = raw
    if place.endswith(".gz") and not name.endswith(".gz"):
        unpacker = zlib.decompressobj(wbits=31)  # 31: expects a gzip header
        with contextlib.suppress(zlib.error):  # not gzip: `raw` itself is compared
            # The limit stops a gzip bomb, a small file that unpacks to a huge one.
            content = unpacker.decompress(raw, size + 1)

    found = _sha256(content)
    if found != digest:
        raise ValueError(f"{place}: expected {size:,} bytes with SHA-256 {digest}, "
                         f"found {len(content):,} bytes with {found}; it starts "
                         f"{raw[:24]!r}")
    return content


def _download(name: str, path: str) -> bytes:
    """Fetch a data file from the first mirror that has it, and store it at `path`."""
    mirrors, size, digest = _SOURCES[name]
    failures = []
    for mirror in mirrors:
        url = mirror.format(os.path.basename(name))
        try:
            content = _verified(_fetch(url, size), url, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            _write_whole(path, content)
            return content
        except Exception as error:  # whatever failed, the next mirror may work
            failures.append(f"{url}: {error}")

    tried = "\n  ".join(failures)
    raise OSError(f"cannot get {name}:\n  {tried}\n"
                  f"Put it by hand at {path} ({size:,} bytes, SHA-256 {digest}), "
                  "or set NANOAD_DATA to a folder that has it.")


# If only each read had a time-out, a server that sends one byte at a time could hold us
# for days. So a mirror must also average 10 kB/s after the first ten seconds.
_TIMEOUT = 10.0
_SLOWEST = 10_000


def _fetch(url: str, size: int) -> bytes:
    """The bytes at `url`; stops when too many have arrived for a content of `size`.

    (A packed file may be a little larger than its content: 4096 bytes are enough.)
    """
    import urllib.request

    received = bytearray()
    start = time.monotonic()
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply:
        while len(received) <= size + 4096:
            piece = reply.read1(1 << 16)
            if not piece:
                break
            received += piece

            if time.monotonic() - start > _TIMEOUT + len(received) / _SLOWEST:
                raise TimeoutError(f"only {len(received):,} bytes arrived in time")
            if sys.stderr is not None and sys.stderr.isatty():
                progress = f"{url}: {len(received) / 1e6:.1f} MB"
                print(progress, end="\r", file=sys.stderr, flush=True)
    return bytes(received)


# ### Three formats
#
# Now the bytes are the right ones, and each loader makes arrays of them. Two of the
# data sets have two parts, "train" and "test":
def _require_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")


# MNIST comes as IDX: four bytes give the dtype and the number of dimensions, four more
# give each dimension, and the array follows. So it begins after 4 + 3 * 4 = 16 bytes
# for images, and after 4 + 4 = 8 for labels.
def load_mnist(split: str = "train",
               flatten: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 60,000 ("train") or 10,000 ("test") handwritten digits.

    Returns images, float32 in [0, 1] of shape (N, 1, 28, 28), or (N, 784) with
    `flatten`, and labels, int64 of shape (N,). Raises OSError if neither the data
    folder nor a mirror has the files. (LeCun, Cortes and Burges, 1998)
    """
    _require_split(split)
    stem = "mnist/train" if split == "train" else "mnist/t10k"
    pixels = np.frombuffer(_data_file(f"{stem}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(_data_file(f"{stem}-labels-idx1-ubyte"), np.uint8, offset=8)

    shape = (-1, 784) if flatten else (-1, 1, 28, 28)
    images = np.divide(pixels.reshape(shape), 255, dtype=np.float32)
    return images, labels.astype(np.int64)


# CIFAR-10 is read in its binary form, because its Python form is a pickle (IV.7). Each
# record is a label byte and 3 x 32 x 32 bytes of red, green and blue. The archive is
# unpacked in memory, so no name inside it ever becomes a path on the disk.
def load_cifar10(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's 50,000 ("train") or 10,000 ("test") small colour photographs.

    Returns images and labels as `load_mnist` does, but images of shape (N, 3, 32, 32),
    and raises the same errors. The download is 170 MB. (Krizhevsky, 2009)
    """
    import tarfile

    _require_split(split)
    batches = ["test_batch.bin"]
    if split == "train":
        batches = [f"data_batch_{i}.bin" for i in range(1, 6)]

    archive = zlib.decompress(_data_file("cifar10/cifar-10-binary.tar.gz"), wbits=31)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        paths = [f"cifar-10-batches-bin/{batch}" for batch in batches]
        raw = [tar.extractfile(path).read() for path in paths]

    records = np.frombuffer(b"".join(raw), np.uint8).reshape(-1, 3073)
    labels = records[:, 0]  # (N,)
    pixels = records[:, 1:].reshape(-1, 3, 32, 32)  # (N, 3, 32, 32)
    return np.divide(pixels, 255, dtype=np.float32), labels.astype(np.int64)


def load_tinyshakespeare() -> str:
    """The 1,115,394 characters of Shakespeare that char-rnn (Karpathy, 2015) learned.

    Raises OSError as `load_mnist` does.
    """
    return _data_file("tinyshakespeare/input.txt").decode("utf-8")


# ## IV.7 Saving: how does a run survive a power cut?
#
# A run saves its state now and then, and goes on from the last state it saved. A state
# is any nested dict that the script chooses: weights, optimizer moments, the step, the
# vocabulary. It comes back as it was, but Tensors and NumPy scalars become arrays:
#
#     >>> import tempfile
#     >>> weights = [Tensor([1.0, 2.0]), np.eye(2)]
#     >>> state = {"step": 3, "weights": weights, "pair": ("a", None)}
#     >>> with tempfile.TemporaryDirectory() as folder:
#     ...     save(f"{folder}/run.npz", state)
#     ...     again = load(f"{folder}/run.npz")
#     ...     print(list(np.load(f"{folder}/run.npz")))  # without nanoad
#     ['nanoad', 'weights.0', 'weights.1']
#     >>> again["step"], again["weights"][0], again["pair"]
#     (3, array([1., 2.]), ('a', None))
#
# The file is an .npz, a zip archive of arrays. Each array of the state is a member,
# named by its dotted path. The member `nanoad` holds the rest, with the arrays' names,
# as JSON text. Nothing is pickled: a pickle is a program, and a checkpoint may come
# from a stranger. Lists, tuples and arrays become JSON lists that begin with their
# kind:
#
#     >>> arrays = {}
#     >>> _describe({"step": 3, "pair": ("a", np.eye(2))}, "", arrays), list(arrays)
#     ({'step': 3, 'pair': ['tuple', 'a', ['array', 'pair.1']]}, ['pair.1'])
#
# The naive way, `np.savez(path, **arrays)`, can fail in two ways. Each has a remedy:
#
# 1. *It is cut off while it writes.* Then the old checkpoint is destroyed and the new
#    one is unfinished. So we write a new file beside the old one, and then give it
#    the old one's name (`_write_whole`).
# 2. *The file is damaged on the disk.* Zip's own checksums cover each member, but not
#    the list of members: one bit flipped there, and an array is missing without an
#    error. But a zip archive may end with a comment, and there we write the SHA-256 of
#    all bytes before it, in 64 characters. `load` compares this first.
_STAMP = b"nanoad checkpoint; the SHA-256 of all before it: "


def save(path: str | os.PathLike, state: Any) -> None:
    """Write `state` to `path`: nested dicts and lists of arrays, Tensors, plain values.

    At every moment `path` holds the old checkpoint or the new one, and the new one gets
    the old one's permissions. Tensors and NumPy scalars come back as arrays, all else
    as it was, floats bit for bit. Raises a TypeError that names what cannot be saved,
    and OSError if the file cannot be written.
    """
    import json
    import zipfile

    arrays: dict[str, np.ndarray] = {}
    description = json.dumps(_describe(state, "", arrays))
    members = {"nanoad": np.frombuffer(description.encode(), np.uint8), **arrays}

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = _STAMP + bytes(64)  # room for the digest
        for name, array in members.items():
            # (Without a date, equal states give equal files. With zip64, an array may
            # be larger than 2 GiB.)
            info = zipfile.ZipInfo(name + ".npy")
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)

    content = file.getvalue()[:-64]
    content += _sha256(content).encode()
    # (If the path is a link, the file that it leads to is replaced, not the link.)
    _write_whole(os.path.realpath(os.fsdecode(path)), content)


def _describe(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """What JSON stores for the part of a state at `path`; adds its arrays to `arrays`.

    That is a dict, a plain value, or a list ["list", ...], ["tuple", ...] or
    ["array", member].
    """
    where = path or "the state"

    def below(key: Any) -> str:
        return f"{path}.{key}".strip(".")  # at the top, `path` is ""

    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"save: keys must be strings, but {where} has "
                                f"{key!r}; write str({key!r}) there")
        return {key: _describe(item, below(key), arrays) for key, item in value.items()}

    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        items = [_describe(item, below(i), arrays) for i, item in enumerate(value)]
        return [kind, *items]

    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        array = np.asarray(_value(value))
        if array.dtype.hasobject:
            raise TypeError(f"save: {where} is an array of objects, which only pickle "
                            "could store; convert it to numbers or to a list")
        name = _new_name(path, arrays)
        arrays[name] = array
        return ["array", name]

    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"save: {where} is a {type(value).__name__}, which cannot be "
                    "saved; make it a dict, list or tuple of arrays, Tensors, numbers, "
                    "strings and None")


def _new_name(path: str, arrays: dict[str, np.ndarray]) -> str:
    """A name for the array at `path`, also safe as the name of an unpacked file.

    Two paths may give one name (the key `a.b`, and `b` in `a`); the later gets a `_`.
    """
    name = "".join(c if c.isalnum() or c in "_.-" else "_" for c in path)
    name = name[:200] or "array"
    while name in arrays or name == "nanoad":
        name += "_"
    return name


def load(path: str | os.PathLike) -> Any:
    """The state that `save` wrote to `path`.

    Nothing in the file is run or unpacked to the disk. Raises FileNotFoundError if
    there is no such file, and ValueError if it differs in any bit from what `save`
    wrote.
    """
    import json

    raw = _read(os.fsdecode(path))
    digest = _sha256(memoryview(raw)[:-64])  # (without a copy)
    if not raw.endswith(_STAMP + digest.encode()):
        raise ValueError(f"{path} is not a whole checkpoint, but cut, damaged or "
                         "something else; load takes what nanoad.save has written")
    try:
        arrays = _unpack(raw)
        description = json.loads(arrays["nanoad"].tobytes())
        return _undescribe(description, arrays)
    except Exception as error:
        # The digest is right, so the file is undamaged, but `save` did not write it.
        message = f"{path} is not a checkpoint written by nanoad.save: {error}"
        raise ValueError(message) from error


def _unpack(raw: bytes) -> dict[str, np.ndarray]:
    """The arrays in an archive; raises ValueError if `save` cannot have made it."""
    import zipfile

    arrays = {}
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = archive.infolist()
        # `save` never compresses, so its members together are smaller than the file.
        # Without these checks a small forged file could unpack to fill the memory.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a member is compressed")
        if sum(member.file_size for member in members) > len(raw):
            raise ValueError("the members overlap")

        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _undescribe(description: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The part of a state that `_describe` described."""
    if isinstance(description, dict):
        return {key: _undescribe(item, arrays) for key, item in description.items()}
    if not isinstance(description, list):
        return description  # a plain value

    kind, *items = description
    if kind == "array":
        (name,) = items
        return arrays[name]
    if kind not in ("list", "tuple"):
        raise ValueError(f"it has a {kind!r}, which is no list, tuple or array")
    rebuilt = [_undescribe(item, arrays) for item in items]
    return rebuilt if kind == "list" else tuple(rebuilt)


# A checkpoint or a download must appear under its final name whole or not at all, even
# if the power fails or two processes write it at once. That takes five steps, and only
# the fourth changes what other processes see under that name:
#
# 1. Open a file under a name that nobody else uses, *in the same folder*, because a
#    rename is atomic only within one file system.
# 2. Give it the permissions of the file that it replaces, if there is one.
# 3. Fill it and force it to the disk; otherwise the rename might get there before the
#    content.
# 4. Rename it.
# 5. Force the folder to the disk, because the new name is stored in the folder.
#
# A `.tmp` file stays behind only if its process is killed outright or the power fails.
def _write_whole(path: str, content: bytes) -> None:
    """Atomically replace the file at `path` by this content; raises OSError."""
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "xb") as file:  # step 1
            with contextlib.suppress(OSError):  # perhaps there is no old file
                os.chmod(temporary, os.stat(path).st_mode & 0o777)  # step 2
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # step 3
        os.replace(temporary, path)  # step 4
    except OSError as error:
        message = f"{error.strerror}; what was there before is untouched"
        raise OSError(error.errno, message, path) from None
    finally:  # after an error; a rename leaves nothing
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    with contextlib.suppress(OSError):  # some systems cannot do this with a folder
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)  # step 5
        finally:
            os.close(folder)


# ## IV.8 Drawing: what does a tape look like?
#
# Each operation stands above its operands. A node that occurs twice gets a number, and
# its details are given once:
#
#     >>> x = Tensor(2.0, label="x")
#     >>> w = Tensor(5.0, label="w")
#     >>> y = x * w + 3 * x
#     >>> y.backward(retain_grads=True)
#     >>> print(draw(y, format="text"))
#     add  16  grad 1
#     ├─ mul  10  grad 1
#     │  ├─ x  2  grad 8  [1]
#     │  └─ w  5  grad 2
#     └─ mul(3, ·)  6  grad 1
#        └─ x [1] above
#
# The picture (`draw(y)`, by the package graphviz) has the leaves above and the result
# below. Text and picture are made from the same rows: one for the result, and one for
# each operand of each operation. (A number has no row: the 3 stands in `mul(3, ·)`.)
# There are at most 200 rows, because a tape may be a million operations long.


class _TapeRow(NamedTuple):
    """A line of the text, or an arrow of the picture."""

    node: Any  # a Tensor, or an array that is an operand
    result: Tensor | None  # computed from it; None for the tensor drawn
    branch: str  # the lines that lead to it, such as "│  ├─ "
    again: bool  # an earlier row has it, and its operands


def _tape_rows(node: Any, result: Tensor | None, branch: str,
               seen: set[int]) -> Iterator[_TapeRow]:
    """Yield the row of `node`, and then those of its operands, each with all below it.

    `seen` has the ids of the nodes that have a row.
    """
    again = id(node) in seen
    seen.add(id(node))
    yield _TapeRow(node, result, branch, again)
    if again:
        return

    below = branch.replace("├─", "│ ").replace("└─", "  ")  # "│  ├─ " gives "│  │  "
    operands = [a for a in _operands_of(node) if not _is_number(a)]
    for i, operand in enumerate(operands, start=1):
        fork = "└─ " if i == len(operands) else "├─ "
        yield from _tape_rows(operand, node, below + fork, seen)


def _operands_of(node: Any) -> list:
    """The operands of a node's operation: Tensors, arrays, numbers, but no settings."""
    if not isinstance(node, Tensor) or node._op is None or node._operands is None:
        return []  # a leaf, or backward let its operands go
    operands = node._operands[:node._op.arity]
    return [a for a in operands if a is not None]  # a bias may be None


def _is_number(operand: Any) -> bool:
    """Whether an operand is a number, shown not as a row but inside `power(·, 2)`."""
    return not isinstance(operand, Tensor) and np.ndim(operand) == 0


# A node is shown with its kind (operation, parameter, leaf or constant), its name, its
# value and its gradient. A parameter is a leaf that a module trains. In the functions
# below, `names` maps the id of each parameter to its name in the module.
def _kind(node: Any, names: dict[int, str]) -> str:
    if not _tracked(node):
        return "constant"
    if node._op is not None:
        return "operation"
    return "parameter" if isinstance(node, Parameter) or id(node) in names else "leaf"


def _label(node: Any, names: dict[int, str]) -> str:
    """The name that the user or the module gave a node, or ""."""
    return getattr(node, "label", "") or names.get(id(node), "")


def _name_of(node: Any, names: dict[int, str]) -> str:
    """A node's label and the operation that made it, such as `loss = power(·, 2)`."""
    label = _label(node, names)
    if _kind(node, names) != "operation":
        return label
    operation = node._op.__name__
    operands = _operands_of(node)
    if any(map(_is_number, operands)):
        places = [f"{float(a):.5g}" if _is_number(a) else "·" for a in operands]
        operation += f"({', '.join(places)})"
    return f"{label} = {operation}" if label else operation


def _facts(node: Any) -> list[str]:
    """A node's value (dtype and shape unless it is one element), and its gradient."""
    array = np.asarray(_value(node))
    is_number = array.size == 1
    facts = [f"{array.dtype}{list(array.shape)}"]
    if is_number:
        facts = [f"{array.item():.5g}"]
    if not isinstance(node, Tensor):
        return facts

    if node.grad is not None:
        g = node.grad._data
        size = f"{g.item():.5g}" if is_number else f"norm {np.linalg.norm(g):.5g}"
        facts.append(f"grad {size}")
    if node._op is not None and node._operands is None:
        facts.append("let go by backward")
    return facts


def draw(tensor: Tensor, format: str = "svg", *, rankdir: str = "TB",
         model: Module | None = None) -> Any:
    """Draw the tape of `tensor`: operations, leaves, parameters and constants.

    The parameters of `model` are drawn with their names in it. Returns a str for
    `format="text"`, else a `graphviz.Digraph`, which a notebook shows (raises
    ImportError without that package). `rankdir` is the picture's direction from leaves
    to result: "TB" (top to bottom), "BT", "LR" or "RL"; raises ValueError for any
    other. Backward lets the tape go, so draw before it, or call backward with
    `retain_grads=True`. Raises TypeError if `tensor` is not a Tensor or `model` is not
    a Module.

        >>> layer = Linear(2, 3)
        >>> print(draw(layer(np.ones((4, 2))), format="text", model=layer))
        linear  float32[4, 3]
        ├─ constant  float32[4, 2]
        ├─ parameter weight  float32[3, 2]
        └─ parameter bias  float32[3]
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"draw: needs a Tensor, not a {type(tensor).__name__}")
    if rankdir not in ("TB", "BT", "LR", "RL"):
        raise ValueError(f"draw: rankdir is 'TB', 'BT', 'LR' or 'RL', not {rankdir!r}")
    if not isinstance(model, Module | None):
        raise TypeError(f"draw: model must be a Module, not {type(model).__name__}")
    parameters = model.named_parameters() if model is not None else []
    names = {id(parameter): name for name, parameter in parameters}

    # Each row is at most one call of `_tape_rows` deeper than the one before it. So 200
    # rows do not overflow Python's stack, however deep the tape.
    walk = _tape_rows(tensor, result=None, branch="", seen=set())
    rows = list(itertools.islice(walk, 200))
    note = "... 200 lines are enough" if next(walk, None) else ""
    if format == "text":
        return _draw_text(rows, names, note)
    return _draw_graph(rows, names, note, format, rankdir)


def _draw_text(rows: list[_TapeRow], names: dict[int, str], note: str) -> str:
    """A line for each row. A node that occurs again is numbered and described once."""
    marks: dict[int, str] = {}  # id of a node that occurs again -> its mark
    for row in rows:
        if row.again:
            marks.setdefault(id(row.node), f"[{len(marks) + 1}]")

    lines = []
    for row in rows:
        mark = marks.get(id(row.node), "")
        if row.again:
            text = f"{_label(row.node, names)} {mark} above".strip()
        else:
            name = _name_of(row.node, names)
            kind = _kind(row.node, names)
            if kind in ("parameter", "constant") or not name:
                name = f"{kind} {name}".strip()  # such as "parameter bias"
            text = "  ".join([name, *_facts(row.node), mark]).strip()
        lines.append(row.branch + text)
    return "\n".join([*lines, note]).rstrip()


# In the picture the kinds differ in shape and colour.
_STYLES = {
    "operation": {"shape": "box", "style": "filled", "fillcolor": "white"},
    "leaf": {"shape": "box", "style": "rounded,filled", "fillcolor": "#cfe2ff"},
    "parameter": {"shape": "box", "style": "rounded,filled", "fillcolor": "#d3efd0"},
    "constant": {"shape": "plaintext", "fontcolor": "#707070"},
}
_FONT = {"fontname": "Helvetica", "fontsize": "11"}


def _draw_graph(rows: list[_TapeRow], names: dict[int, str], note: str, format: str,
                rankdir: str) -> Any:
    """A graphviz.Digraph with an arrow from each operand to its result."""
    try:
        import graphviz
    except ImportError:
        raise ImportError("draw needs the package graphviz (pip install graphviz, or "
                          "nanoad[viz]), unless format is 'text'") from None

    graph = graphviz.Digraph(format=format)
    graph.attr("graph", rankdir=rankdir, label=note, ranksep="0.3", nodesep="0.2",
               **_FONT)
    graph.attr("node", height="0.3", margin="0.12,0.06", color="#404040", **_FONT)
    graph.attr("edge", color="#707070", arrowsize="0.6")
    for row in rows:
        key = str(id(row.node))
        kind = _kind(row.node, names)
        if not row.again:
            lines = [_name_of(row.node, names), *_facts(row.node)]
            caption = graphviz.escape("\n".join(filter(None, lines)))
            graph.node(key, caption, **_STYLES[kind])
        if row.result is not None:
            straightness = "8" if kind == "operation" else "1"
            graph.edge(key, str(id(row.result)), weight=straightness)
    return graph


# ## IV.9 Plot: does the loss fall?
#
# A terminal can show the curve of the loss in characters:
#
#     >>> training = (range(5), [4, 2, 1, 1, 1])
#     >>> validation = ([2, 4], [2, 2])
#     >>> losses = {"training": training, "validation": validation}
#     >>> print(plot(losses, width=36, height=4, title="loss", xlabel="step"))
#                  loss
#        ── training   o validation
#     4 ┤──╮
#     3 ┤  ╰──╮
#     2 ┤     ╰────╮ o          o
#     1 ┤          ╰─────────────
#       └────────────────────────
#        0         step         4
#
# The plot is made in four stages. We follow them in a small one, of seven columns and
# four rows. Its step 1 has two values, and step 4 has none that is finite:
#
#     >>> steps, values = [0, 1, 1, 3, 4, 6], [4, 1, 3, 4, np.nan, 1]
#     >>> print(plot({"loss": (steps, values)}, width=19, height=4))
#        ── loss
#     4 ┤─╮ ╭
#     3 ┤ │╭╯
#     2 ┤ ╰╯
#     1 ┤      ─
#
#     column    0     1     2     3     4     5     6
#     values    4    1 3          4    nan          1
#     mean      4     2    nan    4    nan   nan    1    (1)
#     line      4     2     3     4    nan   nan    1    (2)
#     row       0     2     1     0    nan   nan    3    (3)
#
# 1. The axis of steps is cut into columns, one for each character. In each column a
#    curve becomes one number: the mean of its finite values there, or nan.
# 2. The first curve is drawn as a line. So a column without steps, such as 2, gets its
#    value from the straight line between its neighbours. But a column that has steps
#    and no finite value, such as 4, is a gap, which no line bridges.
# 3. The axis of values is cut into rows, from the highest number (row 0) to the lowest,
#    and each number is rounded to a row. There the other curves get their marks.
# 4. The line is drawn. Where it changes rows, as in column 1, the column gets a corner
#    in each of the two rows, and strokes between.


def _by_column(steps: np.ndarray, values: np.ndarray, first: float, last: float,
               columns: int, is_line: bool) -> np.ndarray:
    """A curve's value in each column, or nan; the axis goes from `first` to `last`."""
    span = last - first or 1  # 1 for a single step, where 0 / 0 would be nan
    column_of = np.rint((steps - first) / span * (columns - 1)).astype(int)
    is_finite = np.isfinite(values)
    mean = np.full(columns, np.nan)
    for column in np.unique(column_of[is_finite]):  # (1)
        mean[column] = values[is_finite & (column_of == column)].mean()

    if not is_line or len(steps) == 0:
        return mean
    occupied = np.unique(column_of)  # the columns with steps
    return np.interp(np.arange(columns), occupied, mean[occupied],  # (2)
                     left=np.nan, right=np.nan)


def _draw_curves(means: list[np.ndarray], low: float, high: float,
                 height: int) -> list[str]:
    """The rows of the picture, from the highest to the lowest."""
    grid = np.full((height, len(means[0])), " ")
    span = high - low or 1  # 1 for a constant, where 0 / 0 would be nan
    for i, mean in enumerate(means):
        rows = np.rint((high - mean) / span * (height - 1))  # (3)
        if i == 0:
            _draw_line(grid, rows)  # (4)
        else:
            (marked,) = np.isfinite(rows).nonzero()
            grid[rows[marked].astype(int), marked] = _mark(i)
    return ["".join(row) for row in grid]


def _draw_line(grid: np.ndarray, rows: np.ndarray) -> None:
    """Draw a curve into `grid`; `rows` has its row in each column, or nan in a gap."""
    is_drawn = np.isfinite(rows)
    for x in is_drawn.nonzero()[0]:
        row = int(rows[x])
        before = int(rows[x - 1]) if x > 0 and is_drawn[x - 1] else row
        if before == row:  # level, or at the start, or after a gap
            grid[row, x] = "─"
        elif before < row:  # it falls
            grid[before, x] = "╮"
            grid[before + 1:row, x] = "│"
            grid[row, x] = "╰"
        else:
            grid[before, x] = "╯"
            grid[row + 1:before, x] = "│"
            grid[row, x] = "╭"


def _mark(i: int) -> str:
    """The mark of curve i: a line for the first, else an ASCII character."""
    return "──" if i == 0 else "ox+*#"[(i - 1) % 5]


def plot(values: Any, width: int = 72, height: int = 12, *, title: str = "",
         xlabel: str = "") -> str:
    """Curves in `height` rows of at most `width` characters, as a str.

    `values` is 1-d, at steps 0, 1, 2 ..., or a dict of label -> (steps, values). The
    first curve is drawn as a line, the others as marks, and a dict gets a legend above.
    `title` stands above all. `xlabel` names the axis of steps, which is drawn only if
    `xlabel` is given. Nan and inf leave a gap. Raises ValueError if steps and values
    differ in length, if a step is not finite, or if `width` or `height` is below 1. A
    `width` below 13 counts as 13, and a long title or legend is not cut.
    """
    _positive("plot", width=width, height=height)
    curves = _curves(values)
    if not any(np.isfinite(y).any() for _, y in curves.values()):
        return "(no finite values to plot)"

    columns = max(width - 12, 1)  # 10 characters for a tick, 2 for the axis
    every_step = np.concatenate([steps for steps, _ in curves.values()])
    first, last = every_step.min(), every_step.max()
    means = [_by_column(steps, heights, first, last, columns, is_line=i == 0)
             for i, (steps, heights) in enumerate(curves.values())]
    low, high = np.nanmin(means), np.nanmax(means)
    ticks = [f"{tick:.4g}" for tick in np.linspace(high, low, height)]
    margin = max(map(len, ticks))
    indent = " " * (margin + 2)  # as wide as "{tick} ┤"

    lines = []
    if title:
        lines.append(f"{indent}{title:^{columns}}")
    if isinstance(values, dict):
        legend = [f"{_mark(i)} {label}" for i, label in enumerate(curves)]
        lines.append(indent + "   ".join(legend))
    for tick, row in zip(ticks, _draw_curves(means, low, high, height)):
        lines.append(f"{tick:>{margin}} ┤{row}")
    if xlabel:
        left, right = f"{first:.6g}", f"{last:.6g}"
        room = max(columns - len(left) - len(right), 0)
        lines.append(" " * margin + " └" + "─" * columns)
        lines.append(f"{indent}{left}{xlabel:^{room}}{right}")
    return "\n".join(line.rstrip() for line in lines)


def _curves(values: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The curves to plot: label -> (steps, values), two 1-d arrays of floats."""
    if not isinstance(values, dict):
        values = np.asarray(values, np.float64).ravel()
        return {"": (np.arange(len(values), dtype=np.float64), values)}

    curves = {}
    for label, pair in values.items():
        if len(pair) != 2:
            raise ValueError(f"plot: {label} must be a pair (steps, values), not "
                             f"{len(pair)} items")
        steps, heights = (np.asarray(a, np.float64) for a in pair)
        is_curve = steps.ndim == 1 and steps.shape == heights.shape
        if not (is_curve and np.isfinite(steps).all()):
            raise ValueError(f"plot: {label} has steps {steps.shape} and values "
                             f"{heights.shape}; both must be 1-d and of one length, "
                             "and all steps finite")
        curves[label] = steps, heights
    return curves


# ## IV.10 Decompositions: what can a factor's motion be?
#
# Each rule is found as in II.6: say how the result moves if A moves by dA, put that
# into the motion of the loss, and read off what stands beside dA. The steps are
# numbered, and the code points to them. **Read as far as eigh, with a pencil.**
#
# In all of them, dX is how X moves, I is the identity, and gX is the cotangent of X.
# (If there is only one result, its cotangent is g.) `<X, Y>` is the sum of all products
# `X_ij Y_ij`. The loss moves by the sum of `<gX, dX>` over the results X. We need two
# identities:
#
#     <X, P Y Q> = <P^T X Q^T, Y>       what stands around Y moves over to X (II.6)
#     <X, Y^T>   = <X^T, Y>             the same products, added up in another order
#
# What is new? There is one equation, say `A = Q R`, and two factors that move. Yet the
# equation determines both motions, because neither factor can move freely:
#
# - A *triangular* factor stays triangular.
# - A factor with *orthonormal* columns, `V^T V = I`, can only turn. As `V^T V` stays I,
#   `dV^T V + V^T dV = 0`. So `V^T dV` is minus its own transpose: it is
#   *antisymmetric*, and has zeros on its diagonal.
#
# ### The determinant: what is its slope where it is 0?
#
# Let C_ij be the cofactor of A_ij: the determinant of A without row i and column j,
# with the sign of the chessboard, which is + where i + j is even.
#
#     1  expand along row i         det A = sum_j A_ij C_ij
#     2  no C_ij contains row i     so C_ij is the slope of det A by A_ij
#     3  for all elements           d(det A) = <C, dA>
#     4  the loss moves by          g <C, dA>, so A receives g C
#     5  Cramer's rule              A C^T = det(A) I
#     6  A^-1 before it             C^T = det(A) A^-1, so C = det(A) A^-T
#
# A singular matrix has no inverse, but it has cofactors:
#
#     >>> print(grad(np.linalg.det)(np.array([[2.0, 1.0], [4.0, 2.0]])))
#     [[ 2. -4.]
#      [-1.  2.]]
#
# Their transpose, the *adjugate*, can be computed by products alone. It is the last,
# H_(n-1), of these matrices (a theorem of Faddeev and LeVerrier):
#
#     H_0 = I,    H_k = p_k I - A H_(k-1)    with p_k = trace(A H_(k-1)) / k
#
# For n = 2 it is H_1 = trace(A) I - A. Above, that is [[2, -1], [-4, 2]]. From n = 10
# or so on the formula loses digits, so the rule uses the inverse where there is one.
def _adjugate(a: Any) -> Any:
    """The transposed cofactors of a, by products alone."""
    eye = np.eye(a.shape[-1], dtype=a.dtype)
    h = eye  # H_0
    for k in range(1, a.shape[-1]):
        product = a @ h
        traces = np.trace(product, axis1=-2, axis2=-1)[..., None, None]
        h = traces / k * eye - product  # H_k
    return h


def _det_rule(g: Any, y: Any, a: Any) -> Any:
    g, y = g[..., None, None], y[..., None, None]  # (..., 1, 1), to go with a
    is_regular = y != 0
    if np.all(is_regular):
        return g * y * _mT(np.linalg.inv(a))  # steps 4 and 6

    # Some are singular. inv would refuse them, so it gets I in their place.
    eye = np.eye(a.shape[-1], dtype=a.dtype)
    by_inverse = y * np.linalg.inv(np.where(is_regular, a, eye))
    return g * _mT(np.where(is_regular, by_inverse, _adjugate(a)))  # step 4


det = _define("det", np.linalg.det, _det_rule, doc="The determinant of each matrix.")


# ### Several results: how are they one operation?
#
# An operation has one result. So a decomposition packs its matrices into one array, one
# above the other. Indexing, whose rule we have, cuts them apart again, and so do the
# rules, by np.split. With k = min(m, n):
#
#     eigh of (n, n)    w, V           (1 + n, n)
#     svd  of (m, n)    U, s, V        (m + 1 + n, k)
#     qr   of (m, n)    Q, R           (m + n, n)         for m >= n
@functools.cache
def _result_type(function: Callable) -> Callable:
    """The namedtuple in which this function of NumPy returns its results."""
    return type(function(np.eye(1)))


# The logarithm of |det A| has the slope 1 / det(A) by det A. So by step 6 of det, A
# receives `g A^-T`, where g is that of the logarithm, g[1]. (The sign has the slope 0.)
@primitive(lambda g, y, a: g[1][..., None, None] * _mT(np.linalg.inv(a)))
def _slogdet(a: Any) -> Tensor:
    return np.stack(np.linalg.slogdet(a))  # (2, ...): the signs, the logarithms


@_answers(np.linalg.slogdet)
def slogdet(a: Any) -> tuple[Tensor, Tensor]:
    """(sign, logabsdet) of the determinant, even where it would over- or underflow."""
    packed = _slogdet(a)
    return _result_type(np.linalg.slogdet)(packed[0], packed[1])


# ### eigh: how do eigenvectors turn?
#
# A symmetric A is `V W V^T`. The columns of V are its eigenvectors, which are
# orthonormal, and W is diag(w). V moves by `dV = V C`, the same columns mixed by a
# small C, which is `V^T dV` and so antisymmetric. For example, let A be diag(1, 3). Its
# V is I. Now both elements beside the diagonal move by 0.02:
#
#     >>> w, V = np.linalg.eigh(np.array([[1.0, 0.02], [0.02, 3.0]]))
#     >>> print(abs(V).round(3))  # (the signs are LAPACK's choice)
#     [[1.   0.01]
#      [0.01 1.  ]]
#
# Both eigenvectors have turned by 0.02 / (3 - 1): the closer the eigenvalues, the
# further. That is step 5, and the rest moves it over to g.
#
#     1  A = V W V^T moves by       dA = dV W V^T + V dW V^T + V W dV^T
#     2  between V^T and V          P = V^T dV W + dW + W dV^T V  with P = V^T dA V
#     3  as V^T dV = C = -C^T       P = C W + dW - W C
#     4  on the diagonal            P_ii = dw_i,                  as C_ii = 0
#     5  elsewhere                  P_ij = C_ij w_j - w_i C_ij,
#                                   so C_ij = P_ij / (w_j - w_i)
#
#     6  the loss moves by          <gw, dw> + <gV, V C>
#     7  V moves over               = <gw, dw> + <c, C>           with c = V^T gV
#     8  by 4 and 5                 = <M, P>                      with M_ii = gw_i
#                                               and  M_ij = c_ij / (w_j - w_i)
#     9  as P = V^T dA V            = <V M V^T, dA>
#     10 as dA is symmetric         A receives V sym(M) V^T, with sym(M) = (M + M^T) / 2
#
# NumPy reads one triangle of A, and takes A for symmetric. The cotangent has one half
# in each triangle, as in PyTorch, so it is right where A stays symmetric however it
# moves, as `x @ x.T` does.
#
# If eigenvalues are equal, their eigenvectors may be any that span the same plane, and
# have no derivative: step 5 divides by 0, and the result is inf or nan. If two are
# close, the derivative loses digits, as w_j - w_i does. But 0 / 0 counts as 0, so that
# whoever uses the eigenvalues alone, where gV = 0, gets no nan. (jvp, too, walks back
# with zeros, I.8. So what it says of the motion of such eigenvectors means nothing.)
def _ratio(a: Any, b: Any) -> Any:
    """a / b, and 0 where both are 0."""
    return a / np.where((a == 0) & (b == 0), 1, b)


def _sym(x: Any) -> Any:
    """The symmetric part of x."""
    return (x + _mT(x)) / 2


def _eigh_rule(g: Any, y: Any, a: Any, uplo: str = "L") -> Any:
    w, v = np.split(y, [1], axis=-2)  # (..., 1, n), (..., n, n)
    gw, gv = np.split(g, [1], axis=-2)
    c = _mT(v) @ gv  # step 7
    eye = np.eye(a.shape[-1], dtype=a.dtype)
    differences = w - _mT(w)  # w_j - w_i in row i, column j
    m = eye * gw + _ratio((1 - eye) * c, differences)  # step 8
    return v @ _sym(m) @ _mT(v)  # step 10


@primitive(_eigh_rule)
def _eigh(a: Any, uplo: str = "L") -> Tensor:
    w, v = np.linalg.eigh(a, uplo)
    return np.concatenate([w[..., None, :], v], axis=-2)  # (..., 1 + n, n)


@_answers(np.linalg.eigh)
def eigh(a: Any, UPLO: str = "L") -> tuple[Tensor, Tensor]:
    """(eigenvalues, eigenvectors) of symmetric a: (..., n); columns of (..., n, n).

    Eigenvectors of equal eigenvalues have no derivative (inf or nan). The eigenvalues
    themselves have a first one, for functions that do not depend on their order.
    """
    packed = _eigh(a, uplo=UPLO)
    return _result_type(np.linalg.eigh)(packed[..., 0, :], packed[..., 1:, :])


# **You may stop here and go on with IV.11**: the rest is for who uses these functions.
#
# ### svd: what if two bases turn?
#
# `A = U S V^T`, with `S = diag(s)` and orthonormal columns in U and in V. First let A
# be square. Then both bases turn: `dU = U C` and `dV = V D`, with antisymmetric C and
# D. For example, let A be diag(3, 1). Both elements beside the diagonal move by 0.02:
# at first both up, then one up and one down. How far does U turn, and how far away from
# V? (As `V V^T` is I, `U V^T` is I until they part.)
#
#     >>> for below in (0.02, -0.02):
#     ...     U, s, Vt = np.linalg.svd(np.array([[3.0, 0.02], [below, 1.0]]))
#     ...     print(abs(U)[0, 1].round(3), abs(U @ Vt)[0, 1].round(3))
#     0.01 0.0
#     0.005 0.01
#
# A symmetric motion turns U and V together, by 0.02 / (3 - 1), as in eigh. An
# antisymmetric one turns them apart, each by 0.02 / (3 + 1); only that is new. Any
# motion is a sum of these two, which C + D and C - D answer in steps 7 and 8.
#
#     1  A = U S V^T moves by       dA = dU S V^T + U dS V^T + U S dV^T
#     2  between U^T and V          P = C S + dS + S dV^T V       with P = U^T dA V
#     3  as dV^T V = D^T = -D       P = C S + dS - S D
#     4  on the diagonal            P_ii = ds_i,                  as C_ii = D_ii = 0
#     5  elsewhere                  P_ij = C_ij s_j - s_i D_ij
#     6  there, as C_ji = -C_ij     P_ji = -C_ij s_i + s_j D_ij
#     7  5 plus 6                   P_ij + P_ji = (C + D)_ij (s_j - s_i)
#     8  5 minus 6                  P_ij - P_ji = (C - D)_ij (s_j + s_i)
#
#     9  the loss moves by          <gs, ds> + <gU, U C> + <gV, V D>
#     10 U and V move over          = <gs, ds> + <c, C> + <d, D>
#                                   with c = U^T gU and d = V^T gV
#     11 sums and differences       <c, C> + <d, D>
#        (c D and d C cancel)       = <(c + d) / 2, C + D> + <(c - d) / 2, C - D>
#     12 by 7 and 8                 = <X, P + P^T> + <Z, P - P^T>
#                                   with X_ij = (c + d)_ij / 2 / (s_j - s_i),
#                                   Z_ij = (c - d)_ij / 2 / (s_j + s_i), X_ii = Z_ii = 0
#     13 <X, P^T> is <X^T, P>       = <X + X^T + Z - Z^T, P>
#     14 with 4, the loss moves by  <M, P>,   with M = diag(gs) + X + X^T + Z - Z^T
#     15 as P = U^T dA V            A receives U M V^T
#
# **Skip this** if A is square. If A is tall, U has fewer columns than rows, and dU also
# has a part outside of the space that they span: `dU = U C + E dU`, with `C = U^T dU`
# and `E = I - U U^T`. As `U^T E` is 0, that part drops out of step 2, and all that
# follows is as before. It adds to what A receives:
#
#     16 E before 1, as E U = 0     E dA = E dU S V^T
#     17 V S^-1 behind it           E dA V S^-1 = E dU,           as V^T V = I
#     18 the loss also moves by     <gU, E dA V S^-1> = <E gU S^-1 V^T, dA>,  as E^T = E
#     19 A also receives            E gU S^-1 V^T,  and E gU is gU - U c
#
# If A is wide, the same holds for V and A^T.
def _svd_rule(g: Any, y: Any, a: Any) -> Any:
    m, n = a.shape[-2:]
    u, s, v = np.split(y, [m, m + 1], axis=-2)  # (..., m, k), (..., 1, k), (..., n, k)
    gu, gs, gv = np.split(g, [m, m + 1], axis=-2)
    c, d = _mT(u) @ gu, _mT(v) @ gv  # step 10, (..., k, k)

    eye = np.eye(min(m, n), dtype=a.dtype)
    x = _ratio((1 - eye) * (c + d), s - _mT(s)) / 2  # step 12
    z = _ratio((1 - eye) * (c - d), s + _mT(s)) / 2
    middle = eye * gs + x + _mT(x) + z - _mT(z)  # the M of step 14
    ga = u @ middle @ _mT(v)  # step 15
    if m > n:
        ga = ga + _ratio(gu - u @ c, s) @ _mT(v)  # step 19
    if n > m:
        ga = ga + u @ _mT(_ratio(gv - v @ d, s))  # step 19, transposed
    return ga


@primitive(_svd_rule)
def _svd(a: Any) -> Tensor:
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return np.concatenate([u, s[..., None, :], _mT(vt)], axis=-2)  # (..., m + 1 + n, k)


@_answers(np.linalg.svd)
def svd(a: Any, full_matrices: bool = True, compute_uv: bool = True) -> Any:
    """(U, S, Vh) with a = U @ diag(S) @ Vh, S descending; S alone without `compute_uv`.

    Where singular values are equal, or 0, U and Vh have no derivative; compare `eigh`.
    Raises TypeError if `full_matrices` asks for columns that a does not determine.
    """
    a = as_tensor(a)
    m = a.shape[-2] if a.ndim > 1 else 0  # (NumPy refuses a vector, below)
    packed = _svd(a)
    singular = packed[..., m, :]
    if not compute_uv:
        return singular
    if full_matrices and a.shape[-1] != m:
        raise TypeError(f"svd of {a.shape}: with full_matrices some columns are "
                        "arbitrary, without a derivative; write np.linalg.svd(a, "
                        "full_matrices=False)")
    u, v = packed[..., :m, :], packed[..., m + 1:, :]
    return _result_type(np.linalg.svd)(u, singular, _mT(v))


# ### Cholesky: how does a triangle move?
#
# A symmetric A is `L L^T`, with L lower triangular (Murray, 2016). For n = 1 that is
# `A = l^2`, so `dA = 2 l dl`, and dl is *half* of dA / l. For matrices, let `low(Y)` be
# the lower triangle of Y with half of its diagonal. It finds a triangular X if only
# `X + X^T` is known:
#
#     X = [1 0]    X + X^T = [2 2]    low(X + X^T) = [1 0]
#         [2 3]              [2 6]                   [2 3]
#
# And as low only scales elements, `<X, low(Y)>` is `<low(X), Y>`.
#
#     1  A moves by                 dA = dL L^T + L dL^T
#     2  between L^-1 and L^-T      L^-1 dA L^-T = X + X^T        with X = L^-1 dL
#     3  X is lower triangular      X = low(L^-1 dA L^-T)
#     4  the loss moves by          <gL, dL> = <gL, L X> = <L^T gL, X>
#     5  by 3                       = <L^T gL, low(L^-1 dA L^-T)>
#     6  low changes sides          = <low(L^T gL), L^-1 dA L^-T>
#     7  A receives                 L^-T low(L^T gL) L^-1
#     8  as dA is symmetric         or the symmetric part of that (as in eigh)
def _low(x: Any) -> Any:
    """The lower triangle of x, with half of its diagonal."""
    n = x.shape[-1]
    return (np.tri(n, dtype=x.dtype) - np.eye(n, dtype=x.dtype) / 2) * x


def _cholesky_rule(g: Any, y: Any, a: Any) -> Any:
    inside = _low(_mT(y) @ g)
    left = np.linalg.solve(_mT(y), inside)  # step 7: L^-T before it
    ga = np.linalg.solve(_mT(y), _mT(left))  # L^-1 behind it, all transposed
    return _sym(ga)  # step 8


_cholesky = primitive(_cholesky_rule)(np.linalg.cholesky)


@_answers(np.linalg.cholesky)
def cholesky(a: Any, *, upper: bool = False) -> Tensor:
    """The lower triangular L with L @ L.T = a for symmetric a.

    With `upper`, its transpose. Raises LinAlgError if a is not positive definite.
    """
    lower = _cholesky(a)
    return _mT(lower) if upper else lower


# ### qr: how do both kinds move together?
#
# `A = Q R`, with orthonormal columns in Q, so that `Q^T dQ` is antisymmetric, and R
# upper triangular, so that `low` finds its motion (Seeger and others, 2017). For
# example, let A be diag(2, 1), so that Q is I. The 0 below the diagonal moves by 0.02:
#
#     >>> Q, R = np.linalg.qr(np.array([[2.0, 0.0], [0.02, 1.0]]))
#     >>> print(*abs(Q).round(3), "and", *abs(R).round(3))  # (without LAPACK's signs)
#     [1.   0.01] [0.01 1.  ] and [2.   0.01] [0. 1.]
#
# Q has turned by 0.02 / 2, but the second column of A stayed. So it now has 0.01 of Q's
# first column, as R says. In general, with the example's numbers in hundredths:
#
#     P = Q^T dA R^-1    says how A moves                             [0  0]  [1  0]
#     X = dR R^-1        says how R moves: an upper triangle, too     [0  1]  [0  0]
#     Q^T dQ = P - X     says how Q moves: it is antisymmetric        [0 -1]  [1  0]
#
#     1  A = Q R moves by           dA = dQ R + Q dR
#     2  R^-1 behind it             dA R^-1 = dQ + Q X
#     3  Q^T before it              P = Q^T dQ + X
#     4  plus its transpose         P + P^T = X + X^T,  as Q^T dQ cancels
#     5  X^T is lower triangular    X^T = low(P + P^T), which is [0 0] [1 0]
#
#     6  the loss moves by          <gQ, dQ> + <gR, dR>
#     7  by 2, and as dR = X R      = <gQ, dA R^-1> - <gQ, Q X> + <gR, X R>
#     8  the last two terms are     <gR R^T - Q^T gQ, X>
#     9  both sides transposed      = <Y, X^T>             with Y = R gR^T - gQ^T Q
#     10 by 5                       = <Y, low(P + P^T)> = <low(Y), P + P^T>
#     11 <Z, P^T> is <Z^T, P>       = <N, P>               with N = low(Y) + low(Y)^T
#     12 in all, with P put in      <gQ, dA R^-1> + <N, Q^T dA R^-1>
#     13 Q, R^-1 move over          = <(gQ + Q N) R^-T, dA>,  which A receives
#
# A wide A is `[A1 A2] = Q [R1 R2]`, where A1 is square. The rule is for `A1 = Q R1`,
# and `R2 = Q^T A2` is a composition.
def _qr_rule(g: Any, y: Any, a: Any) -> Any:
    q, r = np.split(y, [a.shape[-2]], axis=-2)  # (..., m, n), (..., n, n)
    gq, gr = np.split(g, [a.shape[-2]], axis=-2)

    # R^-1 must exist. (What rounding makes of a 0 on the diagonal counts as 0.)
    diagonal = np.abs(np.diagonal(_value(r), axis1=-2, axis2=-1))  # (..., n)
    largest = np.max(diagonal, axis=-1, keepdims=True, initial=0)
    if np.any(diagonal <= max(a.shape[-2:]) * np.finfo(a.dtype).eps * largest):
        raise np.linalg.LinAlgError("qr: no derivative where columns depend on each "
                                    "other (R has a 0 on its diagonal, up to rounding)")

    low = _low(r @ _mT(gr) - _mT(gq) @ q)  # low(Y), by steps 9 and 10
    left = gq + q @ (low + _mT(low))  # gQ + Q N
    return _mT(np.linalg.solve(r, _mT(left)))  # step 13, the solve transposed


@primitive(_qr_rule)
def _qr(a: Any) -> Tensor:
    return np.concatenate(np.linalg.qr(a), axis=-2)  # (..., m + n, n)


@_answers(np.linalg.qr)
def qr(a: Any, mode: str = "reduced") -> Any:
    """(Q, R) with a = Q @ R, orthonormal columns times an upper triangle.

    Mode "r" gives R. Backward raises LinAlgError if the first columns are dependent.
    """
    a = as_tensor(a)
    if a.ndim < 2 or mode not in ("reduced", "r"):
        raise TypeError(f"qr of {a.shape}, mode {mode!r}: needs matrices and mode "
                        "'reduced' or 'r'; what the others add has no derivative")
    m, n = a.shape[-2:]
    packed = _qr(a[..., :m])
    q, r = packed[..., :m, :], packed[..., m:, :]
    if n > m:
        r = concatenate([r, _mT(q) @ a[..., m:]], axis=-1)
    return r if mode == "r" else _result_type(np.linalg.qr)(q, r)


# ### pinv: what stands for an inverse?
#
# Least squares are solved by the pseudo-inverse P. For a regular A it is A^-1, and
# moves by `-P dA P` (II.6). For any A it is the one matrix with
#
#     A P A = A,    P A P = P,    A P and P A symmetric
#
# What P lacks of an inverse is `E = I - A P` and `F = I - P A`. Both are symmetric, and
# E A, P E, A F and F P are 0. (For example, `E A` is `A - A P A`.) As long as the rank
# of A stays the same, P moves smoothly (Golub and Pereyra, 1973), by three pieces:
#
#     dP =          P P^T dA^T E  +  F dA^T P^T P  -  P dA P
#     A receives    E g^T P P^T   +  P^T P g^T F   -  P^T g P^T
#
# Let A be the column [2, 0]. Its P is the row [0.5, 0], so P A = 1, F = 0, and E keeps
# only the second element. If the 0 in A moves, `P dA` is 0, but the first piece is not:
# for a motion by 0.04, it is `0.25 [0, 0.04] E`, which is [0, 0.01].
#
#     >>> print(np.linalg.pinv(np.array([[2.0], [0.04]])).round(3))
#     [[0.5  0.01]]
#
# Why? I is E + A P, and also F + P A. So dP is `dP E + dP A P`, and dP A P is in turn
# `F dP A P + P A dP A P`. Each of these three pieces has an equation of its own:
#
#     1  P E = 0 moves by           dP E = -P dE
#     2  as A P = P^T A^T           P = P A P = P P^T A^T
#     3  (E A)^T = A^T E = 0, too   A^T dE = -dA^T E
#     4  2 and 3 put into 1         dP E = -P P^T A^T dE = P P^T dA^T E
#
#     5  likewise by F P = A F = 0  F dP = F dA^T P^T P
#     6  A P behind it              F dP A P = F dA^T P^T P,      as P A P = P
#
#     7  A P A = A moves by         dA P A + A dP A + A P dA = dA
#     8  between P and P            P dA P + P A dP A P + P dA P = P dA P
#     9  so                         P A dP A P = -P dA P
#
#     10 the first in <g, dP>       <P P^T g E, dA^T> = <E g^T P P^T, dA>, and so on
def _pinv_rule(g: Any, y: Any, a: Any, rcond: Any = None) -> Any:
    gt, pt = _mT(g), _mT(y)
    first = gt @ y @ pt  # g^T P P^T
    second = pt @ y @ gt  # P^T P g^T
    by_e = first - a @ (y @ first)  # E before it
    by_f = second - (second @ y) @ a  # F behind it
    return by_e + by_f - pt @ g @ pt


@_answers(np.linalg.pinv)
@primitive(_pinv_rule)
def pinv(a: Any, rcond: Any = None) -> Tensor:
    """The pseudo-inverse; singular values below `rcond` times the largest count as 0.

    Its derivative is right for changes of a that do not change the rank.
    """
    return np.linalg.pinv(a) if rcond is None else np.linalg.pinv(a, rcond)


# ## IV.11 NumPy's other names: what needs no new idea?
#
# NumPy has hundreds of functions. When one meets a Tensor, it gets one of four answers.
#
# 1. Nearly all are *compositions* of operations that we have, so their derivatives
#    follow. For example, np.ptp, the range of the values, is a maximum minus a minimum:
#
#         >>> t = Tensor([4.0, 1.0, 2.0])
#         >>> y = np.ptp(t)
#         >>> print(y, y._op is sub, *gradients(y, [t]))
#         3.0 True [ 1. -1.  0.]
#
# 2. A few have a *rule* of their own, because a composition would fail: np.sinc is
#    `sin(u) / u` with `u = pi x`, which at 0 is 0/0.
#
# 3. Some give *plain values*, because their derivative is zero wherever they have one,
#    or because they ask for a shape or an order:
#
#         >>> np.floor(t / 3), np.argsort(t)
#         (array([1., 0., 0.]), array([1, 2, 0]))
#
# 4. All others, such as `np.fft.fft` and `np.put`, are *refused* if the Tensor needs a
#    gradient. The TypeError says what to use instead (II.2).
#
# These functions are of the third kind. (np.histogram is, too.)
_WITHOUT_GRADIENT = {getattr(np, name) for name in """
    sign floor ceil trunc rint fix round around floor_divide imag angle
    isnan isinf isfinite isneginf isposinf isreal iscomplex isrealobj iscomplexobj
    signbit equal not_equal less less_equal greater greater_equal
    logical_and logical_or logical_not logical_xor
    isclose allclose array_equal array_equiv isin any all
    argmax argmin nanargmax nanargmin argsort argpartition argwhere lexsort searchsorted
    nonzero flatnonzero count_nonzero digitize unique
    shape ndim size zeros_like ones_like empty_like
    result_type can_cast may_share_memory shares_memory
    array2string array_repr array_str
    """.split()} | {np.linalg.matrix_rank}

# **You may stop here and go on with IV.12**: the rest is for looking up.
#
# ### What is answered
#
# NumPy code may use these functions, which are of the first two kinds:
#
#     arithmetic      add subtract multiply divide remainder fmod divmod negative
#                     positive square reciprocal power float_power sqrt cbrt hypot
#     exponentials    exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2
#     trigonometry    sin cos tan arcsin arccos arctan arctan2 sinc deg2rad rad2deg
#                     degrees radians sinh cosh tanh arcsinh arccosh arctanh
#     choosing        where maximum minimum fmax fmin absolute fabs clip heaviside
#                     nan_to_num choose select piecewise sort partition
#     of real input   real conjugate real_if_close copy full_like
#     moving          roll flip fliplr flipud rot90 repeat tile resize delete insert
#                     append take take_along_axis diag diagflat diagonal tril triu
#     other shapes    reshape ravel transpose swapaxes moveaxis rollaxis
#                     matrix_transpose squeeze expand_dims atleast_1d atleast_2d
#                     atleast_3d broadcast_to broadcast_arrays meshgrid
#     joining         concatenate stack hstack vstack row_stack dstack column_stack pad
#     cutting         split array_split hsplit vsplit dsplit unstack
#     reductions      sum mean average var std max amax min amin ptp prod trace nansum
#                     nanmean median quantile percentile cov corrcoef trapezoid
#     scans           cumsum cumprod diff ediff1d gradient
#     products        matmul dot vdot inner outer einsum tensordot kron cross vecdot
#                     matvec vecmat convolve correlate interp
#     np.linalg       solve inv det slogdet cholesky eigh eigvalsh svd svdvals qr pinv
#                     lstsq norm vector_norm matrix_norm cond matrix_power multi_dot
#
# ### How to read an entry
#
# `_FUNCTIONS[np.x]`, or `@_answers(np.x)`, makes an entry the answer to np.x (II.2).
# Its settings have NumPy's names and order, and Python refuses all others, such as
# `out`. (Arrays go by position: a public function may say x where NumPy says a.)
# Several operands become Tensors by `_admit_together` (II.9), so that a mask beside
# float32 leaves the result float32. A step that chooses or counts has no derivative, so
# it uses the array, `_value(x)`. `_require` refuses operands that do not fit.
def _require(holds: bool, name: str, operands: Sequence, needs: str) -> None:
    if not holds:
        shapes = ", ".join(str(np.shape(a)) for a in operands)
        raise ValueError(f"{name} of {shapes}: needs {needs}")


# ### In one line
#
# Most entries say what they are in a line of one table. Its lines use these helpers.
def _with_dtype(op: Callable) -> Callable:
    """The reduction as NumPy calls it, with a dtype to compute in as third argument."""
    def answer(a, axis=None, dtype=None, **more):  # more: keepdims, and ddof of var
        return op(a if dtype is None else astype(a, dtype), axis, **more)

    return answer


def _nansum(a, axis=None, keepdims=False):
    return sum_(where(np.isnan(a), 0, a), axis, keepdims)


def _nanmean(a, axis=None, keepdims=False):
    count = np.sum(~np.isnan(a), axis, dtype=a.dtype, keepdims=keepdims)
    return _nansum(a, axis, keepdims) / count


def _at_least(function: Callable, *arrays: Any) -> Tensor | tuple:
    """np.atleast_1d or its like: each array in the shape that NumPy gives it."""
    results = [reshape(t, function(_value(t)).shape) for t in map(as_tensor, arrays)]
    return results[0] if len(results) == 1 else tuple(results)


def _join(prepare: Callable, arrays: Sequence, axis: int) -> Tensor:
    """The arrays, each prepared, end to end along an axis."""
    return concatenate([prepare(t) for t in _admit_together(*arrays)], axis)


_FUNCTIONS.update({
    # elements (all numbers are real here)
    np.conjugate: identity, np.real: identity, np.real_if_close: identity,
    np.square: lambda x: x * x,
    np.reciprocal: lambda x: 1 / x,
    np.float_power: lambda a, b: power(astype(a, np.float64), b),
    np.divmod: lambda a, b: (np.floor_divide(_value(a), _value(b)), mod(a, b)),
    np.heaviside: lambda x, at_zero:  # 0 or 1, but `at_zero` where x is 0
        where(np.equal(x, 0), at_zero, np.heaviside(_value(x), 0)),
    # shapes
    np.transpose: lambda a, axes=None: transpose(a, axes),
    np.ravel: lambda a: reshape(a, -1),
    np.reshape: lambda a, shape=None, *, newshape=None:  # its name before NumPy 2.1
        reshape(a, newshape if shape is None else shape),
    np.atleast_1d: lambda *arys: _at_least(np.atleast_1d, *arys),
    np.atleast_2d: lambda *arys: _at_least(np.atleast_2d, *arys),
    np.atleast_3d: lambda *arys: _at_least(np.atleast_3d, *arys),
    # joining
    np.append: lambda arr, values, axis=None: concatenate([arr, values], axis),
    np.vstack: lambda tup: _join(np.atleast_2d, tup, 0),
    np.dstack: lambda tup: _join(np.atleast_3d, tup, 2),
    np.hstack: lambda tup:  # vectors along their only axis
        _join(np.atleast_1d, tup, 0 if as_tensor(tup[0]).ndim < 2 else 1),
    np.column_stack: lambda tup:
        _join(lambda t: t if t.ndim > 1 else reshape(t, (-1, 1)), tup, 1),
    # cutting
    np.split: lambda ary, indices_or_sections, axis=0:
        split(ary, indices_or_sections, axis),
    np.array_split: lambda ary, indices_or_sections, axis=0:
        _cut(np.array_split, ary, indices_or_sections, axis),
    np.hsplit: lambda ary, indices_or_sections:
        split(ary, indices_or_sections, 0 if ary.ndim == 1 else 1),
    np.vsplit: lambda ary, indices_or_sections: split(ary, indices_or_sections, 0),
    np.dsplit: lambda ary, indices_or_sections: split(ary, indices_or_sections, 2),
    # reductions
    np.sum: _with_dtype(sum_), np.prod: _with_dtype(prod), np.mean: _with_dtype(mean),
    np.var: _with_dtype(var), np.std: _with_dtype(std),
    np.cumsum: _with_dtype(cumsum), np.cumprod: _with_dtype(cumprod),
    np.nansum: _with_dtype(_nansum), np.nanmean: _with_dtype(_nanmean),
    np.max: lambda a, axis=None, *, keepdims=False: max_(a, axis, keepdims),
    np.min: lambda a, axis=None, *, keepdims=False: min_(a, axis, keepdims),
    np.ptp: lambda a, axis=None, *, keepdims=False:
        max_(a, axis, keepdims) - min_(a, axis, keepdims),
    np.median: lambda a, axis=None, *, keepdims=False: median(a, axis, keepdims),
    np.percentile: lambda a, q, axis=None, *, method="linear", keepdims=False:
        quantile(a, np.true_divide(q, 100), axis, method=method, keepdims=keepdims),
    # linear algebra
    np.vdot: lambda a, b: matmul(*(reshape(t, -1) for t in _admit_together(a, b))),
    np.linalg.eigvalsh: lambda a, UPLO="L": eigh(a, UPLO)[0],
})
_FUNCTIONS.update({np.amax: _FUNCTIONS[np.max], np.amin: _FUNCTIONS[np.min]})

# These move elements of one array (II.4). `_moves` enters them in the table.
for _f in (np.fliplr, np.flipud, np.diagflat, np.rollaxis, np.delete, np.resize):
    _moves(_f.__name__, _f)


# ### Elements
@_answers(np.clip)
def _clip_by_name(a, a_min=None, a_max=None, *, min=None, max=None):
    return clip(a, min if a_min is None else a_min, max if a_max is None else a_max)


# `sinc(x) = sin(u) / u` with `u = pi x`. Its derivative, `(cos(u) - sinc(x)) / x`, is
# 0/0 at 0 and loses digits nearby. There we differentiate the series of sinc, which is
# `1 - u^2 / 3! + u^4 / 5! - ...`, and get `pi (-2 u / 3! + 4 u^3 / 5! - ...)`. For
# |x| < 1/2, eleven terms give all digits of float64.
def _sinc_slope(x: Any) -> Any:
    is_near = np.abs(_value(x)) < 0.5
    u = np.pi * np.where(is_near, x, 0)
    near = 0  # the series over pi u, by Horner's rule
    for k in range(11, 0, -1):
        near = near * u * u + (-1) ** k * 2 * k / math.factorial(2 * k + 1)
    near = np.pi * u * near

    x = np.where(is_near, 1, x)  # so that `far` is not 0/0 where it is unused
    far = (np.cos(np.pi * x) - np.sinc(x)) / x
    return np.where(is_near, near, far)


sinc = _define("sinc", np.sinc, lambda g, y, x: g * _sinc_slope(x))


@_answers(np.nan_to_num)
@primitive(lambda g, y, x, *_, **__: _chosen(g, np.isfinite(x)))
def nan_to_num(x: Any, copy: bool = True, nan: float = 0.0, posinf: float | None = None,
               neginf: float | None = None) -> Tensor:
    """A copy of x with numbers for nan, inf and -inf; the gradient there is 0."""
    return np.nan_to_num(x, nan=nan, posinf=posinf, neginf=neginf)


@_answers(np.histogram)
def _histogram(a, bins=10, range=None, density=None, weights=None):
    """Plain values: the counts have no derivative by a. (By the weights they do.)"""
    if _tracked(weights):
        raise TypeError("np.histogram: no derivative by its weights; use scatter_add")
    return np.histogram(_value(a), _value(bins), range, density, _value(weights))


@_answers(np.select)
def _select(condlist, choicelist, default=0):
    """The choice of the first condition that holds, which is therefore applied last."""
    result = default
    for condition, choice in zip(condlist[::-1], choicelist[::-1], strict=True):
        result = where(condition, choice, result)
    return result


@_answers(np.piecewise)
def _piecewise(x, condlist, funclist, *args, **kw):
    """Each function gets only the x for which its condition is the last that holds."""
    if np.ndim(condlist) == np.ndim(x):  # one mask, not a list of masks
        condlist = [condlist]
    count = len(condlist)
    if len(funclist) not in (count, count + 1):
        raise ValueError(f"np.piecewise: {count} conditions, {len(funclist)} functions")
    chosen = np.full(np.shape(x), count)  # each x's function; `count` if no mask holds
    for i, condition in enumerate(condlist):
        chosen[np.reshape(condition, np.shape(x)).astype(bool)] = i

    result = where(False, x, 0)  # zeros, tied to x
    for i, f in enumerate(funclist):
        mask = chosen == i
        if mask.any():
            value = f(x[mask], *args, **kw) if callable(f) else f
            result = result + scatter_add(astype(value, x.dtype), mask, x.shape)
    return result


# ### Moves and shapes
#
# A function may also move the elements of several arrays. As in II.4, we let it move
# positions: those that the elements have when all arrays are laid end to end. To insert
# [7 8] into [4 5 6] at 1, we insert the positions [3 4] into [0 1 2] at 1. That gives
# [0 3 4 1 2], which picks 4 7 8 5 6 out of 4 5 6 7 8.
def _moves_several(move: Callable, *operands: Any) -> Tensor:
    tensors = _admit_together(*operands)
    ends = np.cumsum([t.size for t in tensors])
    positions = [np.arange(end - t.size, end).reshape(t.shape)
                 for t, end in zip(tensors, ends)]
    return concatenate(tensors, axis=None)[move(*positions)]


@_answers(np.insert)
def _insert(arr, obj, values, axis=None):
    values = astype(values, np.asarray(_value(arr)).dtype)
    return _moves_several(lambda a, v: np.insert(a, obj, v, axis), arr, values)


@_answers(np.choose)
def _choose(a, choices, *, mode="raise"):
    return _moves_several(lambda *c: np.choose(_value(a), c, mode=mode), *choices)


@_answers(np.partition)
def partition(x: Any, kth: int | Sequence[int], axis: int | None = -1,
              kind: str = "introselect") -> Tensor:
    """x with element number `kth` where sorting would put it, as by np.partition."""
    order = np.argpartition(_value(x), kth, axis, kind)
    return take_along_axis(x, order, axis)


@_answers(np.full_like)
def _full_like(a, fill_value, dtype=None):  # the fill may be a Tensor
    return broadcast_to(astype(fill_value, dtype or a.dtype), np.shape(a))


@_answers(np.broadcast_arrays)
def _broadcast_arrays(*args):
    shape = np.broadcast_shapes(*map(np.shape, args))
    return tuple(broadcast_to(a, shape) for a in _admit_together(*args))


@_answers(np.meshgrid)
def _meshgrid(*xi, indexing="xy", sparse=False):
    """Each of xi along an axis of its own; unless `sparse`, stretched to one shape."""
    _require(indexing in ("xy", "ij"), "np.meshgrid", xi,
             f"indexing='xy' or 'ij', not {indexing!r}")
    xi = _admit_together(*xi)
    shaped = np.meshgrid(*map(_value, xi), indexing=indexing, sparse=True)
    grids = tuple(reshape(x, array.shape) for x, array in zip(xi, shaped))
    return grids if sparse else np.broadcast_arrays(*grids)


# ### Reductions and differences
def median(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The middle element, or the mean of the two in the middle."""
    return quantile(x, 0.5, axis, keepdims=keepdims)


@_answers(np.average)
def average(x: Any, axis: int | tuple | None = None, weights: Any = None,
            returned: bool = False, *, keepdims: bool = False) -> Any:
    """The weighted mean; if `returned`, the pair (mean, sum of weights).

    The weights have the shape of x or, for a single axis, are a vector of its length.
    """
    if weights is None:
        weights = np.ones_like(as_tensor(x))
    x, weights = _admit_together(x, weights)
    if weights.shape != x.shape:
        is_one = axis is not None and not isinstance(axis, tuple)
        _require(is_one and weights.shape == (x.shape[axis],), "average", [x, weights],
                 "weights like x or an axis; these fit neither that nor the axis")
        moved = moveaxis(x, axis, -1)
        weights = moveaxis(broadcast_to(weights, moved.shape), -1, axis)
    weights = astype(weights, np.result_type(x.dtype, weights.dtype))  # for the sums
    total = sum_(weights, axis, keepdims)
    if np.any(total == 0) and x.size:
        raise ZeroDivisionError("average: the weights add up to 0, so there is no mean")
    y = sum_(x * weights, axis, keepdims) / total
    return (y, total) if returned else y


@_answers(np.diff)
def diff(x: Any, n: int = 1, axis: int = -1, prepend: Any = None,
         append: Any = None) -> Tensor:
    """The differences of neighbours along an axis, taken n times, as by np.diff."""
    if n < 0:
        raise ValueError(f"diff: n must be at least 0, not {n}")
    if n == 0:
        return as_tensor(x)
    pieces = _admit_together(*(a for a in (prepend, x, append) if a is not None))
    x = pieces[0] if prepend is None else pieces[1]
    if len(pieces) > 1:
        edge = np.sum(_value(x), axis, keepdims=True).shape  # a number fills this
        x = concatenate([a if a.ndim else broadcast_to(astype(a, x.dtype), edge)
                         for a in pieces], axis)
    y = moveaxis(x, axis, 0)
    for _ in range(n):
        y = y[1:] - y[:-1]
    return moveaxis(y, 0, axis)


@_answers(np.ediff1d)
def _ediff1d(ary, to_end=None, to_begin=None):
    pieces = _admit_together(*(a for a in (to_begin, ary, to_end) if a is not None))
    i = 0 if to_begin is None else 1  # where ary is
    pieces[i] = diff(reshape(pieces[i], -1))
    return concatenate(pieces, axis=None)


@_answers(getattr(np, "trapezoid", None) or np.trapz)  # its name before NumPy 2
def _trapezoid(y, x=None, dx=1.0, axis=-1):
    """The integral of y over x by trapezoids, each its width times its mean height."""
    if x is not None:
        y, x = _admit_together(y, x)
        dx = diff(x if x.ndim == 1 else moveaxis(x, axis, -1))
    y = moveaxis(y, axis, -1)
    return sum_(dx * (y[..., 1:] + y[..., :-1]) / 2, -1)


# np.gradient joins neighbouring points by chords. The slope at an inner point is the
# mean of the slopes of its two chords, in which the shorter chord counts more. The
# slope at an end is that of its only chord. With edge_order=2, a parabola is laid
# through the end and the two points next to it. On a parabola, a chord's slope is the
# mean of the slopes at its two ends, so `first = 2 chord - inner`.
#
# Take x^2 at the points 0, 1 and 3. The chords have lengths 1 and 2, and slopes 1 and
# 4. So the slope at 1 is `(1 * 2 + 4 * 1) / (1 + 2) = 2`. Those at the ends are
# `2 * 1 - 2 = 0` and `2 * 4 - 2 = 6`. All three are 2 x, as they should be.
def _slope(f: Any, spacing: Any, axis: int, edge_order: int) -> Tensor:
    f = moveaxis(f, axis, 0)  # (n, ...)
    spacing = astype(spacing, f.dtype)
    # spacing holds the points, or the step between any two
    steps = diff(spacing) if spacing.ndim else broadcast_to(spacing, (len(f) - 1,))
    steps = reshape(steps, (-1,) + (1,) * (f.ndim - 1))
    chord = (f[1:] - f[:-1]) / steps  # (n - 1, ...)
    before, after = steps[:-1], steps[1:]
    inner = (chord[:-1] * after + chord[1:] * before) / (before + after)  # (n - 2, ...)
    first, last = chord[:1], chord[-1:]
    if edge_order == 2:
        first, last = 2 * first - inner[:1], 2 * last - inner[-1:]
    return moveaxis(concatenate([first, inner, last]), 0, axis)


@_answers(np.gradient)
def _gradient(f, *varargs, axis=None, edge_order=1):
    """The slopes of the samples f along each axis, from neighbour to neighbour."""
    f = as_tensor(f)
    axes = range(f.ndim) if axis is None else np.ravel(axis).tolist()
    spacings = varargs or (1.0,)
    if len(spacings) == 1:
        spacings = spacings * len(axes)
    if len(spacings) != len(axes) or edge_order not in (1, 2):
        raise TypeError(f"np.gradient: {len(varargs)} spacings for {len(axes)} axes, "
                        f"and edge_order={edge_order} (1 or 2)")
    _require(all(f.shape[a] > edge_order for a in axes), "np.gradient", [f],
             f"{edge_order + 1} elements along each axis")
    slopes = [_slope(f, h, a, edge_order) for h, a in zip(spacings, axes)]
    return slopes[0] if len(slopes) == 1 else slopes


@_answers(np.cov)
def _cov(m, y=None, rowvar=True, bias=False, ddof=None, *, dtype=np.float64):
    """The covariances of the variables, which are rows, or columns if not `rowvar`."""
    def as_rows(a):
        a = np.atleast_2d(astype(a, dtype))
        return a if rowvar or len(a) == 1 else a.T  # NumPy does not transpose one row

    x = as_rows(m) if y is None else concatenate([as_rows(m), as_rows(y)])
    ddof = int(not bias) if ddof is None else ddof
    centred = x - mean(x, 1, keepdims=True)
    return squeeze(centred @ centred.T / (x.shape[1] - ddof))


@_answers(np.corrcoef)
def _corrcoef(x, y=None, rowvar=True, *, dtype=np.float64):
    """The covariances, divided by the standard deviations of both variables."""
    c = _cov(x, y, rowvar, dtype=dtype)
    if c.ndim == 0:
        return c / c
    spread = sqrt(diagonal(c))
    return c / spread[:, None] / spread


@_answers(np.interp)
def _interp(x, xp, fp, left=None, right=None):
    """The value at each x of the line through its two neighbouring points (xp, fp)."""
    x, xp, fp = _admit_together(x, xp, fp)
    _require(xp.ndim == 1 and xp.shape == fp.shape and len(xp) > 1, "interp", [xp, fp],
             "at least two points, given by two vectors of one length")
    above = np.searchsorted(_value(xp), _value(x), side="right")
    i = np.clip(above - 1, 0, len(xp) - 2)  # the last point that is not above x
    slope = (fp[i + 1] - fp[i]) / (xp[i + 1] - xp[i])
    inf_times_0 = (x == xp[i]) & ~np.isfinite(slope)  # in the product below
    slope = np.where(inf_times_0, 0, slope)
    y = fp[i] + slope * (x - xp[i])
    y = np.where(x < xp[0], fp[0] if left is None else left, y)
    return np.where(x > xp[-1], fp[-1] if right is None else right, y)


# ### Products of vectors and matrices
def bmm(a: Any, b: Any) -> Tensor:
    """The products of two stacks of matrices, (n, i, k) @ (n, k, j) -> (n, i, j)."""
    _require(np.ndim(a) == np.ndim(b) == 3 and len(a) == len(b), "bmm", [a, b],
             "(n, i, k) and (n, k, j); for all else there is matmul")
    return matmul(a, b)


@_answers(np.inner)
def inner(a: Any, b: Any) -> Tensor:
    """The products of a and b, added up over the last axis of both."""
    a, b = _admit_together(a, b)
    return a * b if 0 in (a.ndim, b.ndim) else tensordot(a, b, (-1, -1))


@_answers(np.outer)
def outer(a: Any, b: Any) -> Tensor:
    """a_i * b_j for all elements of both: (a.size, b.size)."""
    a, b = _admit_together(a, b)
    return reshape(a, (-1, 1)) * reshape(b, -1)


@_answers(np.tensordot)
def tensordot(a: Any, b: Any, axes: Any = 2) -> Tensor:
    """The products of a and b, added up over axes that they share.

    `axes` is the number of these (the last of a, the first of b), or a pair of lists.
    The other axes of a come first in the result, then those of b.
    """
    a, b = _admit_together(a, b)
    if isinstance(axes, (int, np.integer)):
        axes = range(a.ndim - axes, a.ndim), range(axes)
    left, right = (np.ravel(one).astype(int).tolist() for one in axes)
    try:
        fit = [a.shape[i] for i in left] == [b.shape[j] for j in right]
    except IndexError:
        fit = False
    _require(fit, "tensordot", [a, b],
             f"pairs of axes of one length, each named once; not {left} and {right}")

    # In each of a and b, the n elements to be added up form a row.
    a, _ = _joined("tensordot", a, tuple(left))  # (..., n)
    b, _ = _joined("tensordot", b, tuple(right))  # (..., n)
    y = matmul(_rows(a), _mT(_rows(b)))
    return reshape(y, a.shape[:-1] + b.shape[:-1])


@_answers(np.kron)
def kron(a: Any, b: Any) -> Tensor:
    """The Kronecker product: each element of a is replaced by b times that element."""
    a, b = _admit_together(a, b)
    a = expand_dims(a, tuple(range(1, 2 * a.ndim, 2)))  # (2, 3) -> (2, 1, 3, 1)
    b = expand_dims(b, tuple(range(0, 2 * b.ndim, 2)))  # (5, 7) -> (1, 5, 1, 7)
    y = a * b  # (2, 5, 3, 7)
    return reshape(y, tuple(m * n for m, n in zip(y.shape[::2], y.shape[1::2])))


@_answers(np.cross)
def cross(a: Any, b: Any, axisa: int = -1, axisb: int = -1, axisc: int = -1,
          axis: int | None = None) -> Tensor:
    """The cross products of vectors of length 3, which lie along the given axes."""
    if axis is not None:
        axisa = axisb = axisc = axis
    a, b = _admit_together(a, b)
    a, b = moveaxis(a, axisa, -1), moveaxis(b, axisb, -1)
    _require(a.shape[-1] == b.shape[-1] == 3, "cross", [a, b],
             "vectors of length 3 (moved last here); give those of length 2 a zero")
    j, k = [1, 2, 0], [2, 0, 1]  # c_0 is a_1 b_2 - a_2 b_1, and so on around
    c = a[..., j] * b[..., k] - a[..., k] * b[..., j]
    return moveaxis(c, -1, axisc)


# In a convolution `y_n = sum_k a_k v_(n-k)`, a_k is multiplied by v_(n-k) in y_n. So it
# receives `sum_n g_n v_(n-k)`, the correlation of g with v. Likewise v_k receives the
# correlation of g with a.
@primitive(lambda g, y, a, v: np.correlate(g, v, "valid"),
           lambda g, y, a, v: np.correlate(g, a, "valid"))
def _convolve(a: Any, v: Any) -> Tensor:
    return np.convolve(a, v)


@_answers(np.convolve)
def convolve(a: Any, v: Any, mode: str = "full") -> Tensor:
    """The "full" convolution, its middle ("same"), or the full overlap ("valid")."""
    a, v = _admit_together(a, v)
    known = mode in ("full", "same", "valid")
    _require(a.ndim == v.ndim == 1 and known, "convolve", [a, v],
             f"two vectors, and the mode 'full', 'same' or 'valid'; got {mode!r}")
    short, long = sorted([len(a), len(v)])
    y = _convolve(a, v)  # (long + short - 1,)
    if mode == "valid":
        return y[short - 1:long]
    if mode == "same":
        return y[(short - 1) // 2:][:long]
    return y


@_answers(np.correlate)
def correlate(a: Any, v: Any, mode: str = "valid") -> Tensor:
    """The correlation of vectors, `y_k = sum_n a_(n+k) v_n`; modes as in convolve."""
    a, v = _admit_together(a, v)
    if len(a) < len(v):  # NumPy's "same" is then that of (v, a), reversed
        return correlate(v, a, mode)[::-1]
    return convolve(a, v[::-1], mode)


@_answers(np.linalg.multi_dot)
def _multi_dot(arrays):
    """The product, from its thinner end: `A (B v)` costs less than `(A B) v`."""
    arrays = _admit_together(*arrays)
    rows = math.prod(arrays[0].shape[:-1])  # 1 if it is a vector
    columns = math.prod(arrays[-1].shape[1:])
    if rows <= columns:
        return functools.reduce(matmul, arrays)
    return functools.reduce(lambda product, a: matmul(a, product), arrays[::-1])


@_answers(np.linalg.matrix_power)
def matrix_power(a: Any, n: int) -> Tensor:
    """The matrix a to the power n, by squaring. For n below 0, of its inverse."""
    a = as_tensor(a)
    is_square = a.ndim > 1 and a.shape[-1] == a.shape[-2]
    _require(is_square and isinstance(n, (int, np.integer)), "matrix_power", [a],
             f"square matrices and an integer, and got {n!r}")
    if n < 0:
        return matrix_power(inv(a), -n)
    if n == 0:
        return as_tensor(np.broadcast_to(np.eye(a.shape[-1], dtype=a.dtype), a.shape))
    if n == 1:
        return a
    half = matrix_power(a, n // 2)
    return half @ half @ a if n % 2 else half @ half


@_answers(np.linalg.lstsq)
def lstsq(a: Any, b: Any, rcond: float | None = None) -> tuple:
    """The x for which `sum((a @ x - b) ** 2)` is least, for each column of b.

    a is (m, n), b (m,) or (m, k). Returns (x, residuals, rank, singular values of a).
    The residuals are those sums if the rank is n and n is below m; else they are empty.
    """
    a, b = _admit_together(a, b)
    _require(a.ndim == 2 and b.ndim in (1, 2) and len(a) == len(b), "lstsq", [a, b],
             "a matrix (m, n), and a vector (m,) or columns (m, k)")
    m, n = a.shape
    singular = svd(a, compute_uv=False)  # (min(m, n),)
    if rcond is None:
        rcond = np.finfo(singular.dtype).eps * max(m, n)
    rank = int(np.sum(_value(singular) > rcond * np.max(_value(singular), initial=0)))

    x = matmul(pinv(a, rcond), b)
    errors = b - matmul(a, x)
    residuals = np.sum(errors * errors, axis=0).reshape(-1)
    if not rank == n < m:
        residuals = residuals[:0]
    return x, residuals, rank, singular


# ### Norms
#
# The length of a vector x has the slope `x / |x|`, and 0 (II.3) at its kink, x = 0.
@primitive(lambda g, y, x:
           (_chosen(g, y != 0) / np.where(y == 0, 1, y))[..., None] * x)
def _length(x: Any) -> Tensor:
    return np.sqrt(np.sum(x * x, axis=-1))


def _norm_of_vectors(x: Any, ord: float) -> Any:
    """The norm over the last axis: `sum(abs(x) ** ord) ** (1 / ord)`."""
    _require(isinstance(ord, (int, float, np.number)), "norm", [x],
             f"a number, not {ord!r}, for vectors; names are for matrices, so two axes")
    if ord == 2:
        return _length(x)
    if ord == 0:  # a count: constant nearly everywhere
        return as_tensor(np.sum(x != 0, axis=-1, dtype=x.dtype))
    if abs(ord) == np.inf:
        return max_(abs_(x), -1) if ord > 0 else min_(abs_(x), -1)
    total = sum_(abs_(x) ** ord, -1)
    is_zero = total == 0  # the root's slope is infinite at 0
    return where(is_zero, 0, where(is_zero, 1, total) ** (1 / ord))


def _norm_of_matrices(x: Any, ord: Any) -> Any:
    """The norm over the last two axes: the largest or the least size, or their sum."""
    if ord in ("nuc", 2, -2):
        sizes = svd(x, compute_uv=False)
    elif ord in (1, -1):
        sizes = sum_(abs_(x), -2)  # of the columns
    elif ord in (np.inf, -np.inf):
        sizes = sum_(abs_(x), -1)  # of the rows
    else:
        raise ValueError(f"norm of {x.shape} by ord {ord!r}: a matrix has norms by "
                         "'fro', 'nuc', 1, -1, 2, -2, inf and -inf")
    if ord == "nuc":
        return sum_(sizes, -1)
    return max_(sizes, -1) if ord > 0 else min_(sizes, -1)


@_answers(np.linalg.norm)
def norm(x: Any, ord: Any = None, axis: int | tuple | None = None,
         keepdims: bool = False) -> Tensor:
    """The norm of vectors along an axis, or of matrices along two; `ord` as in NumPy.

    At 0 the derivative of the length is 0, as in PyTorch. If several elements are the
    largest, they share the gradient.
    """
    x = as_tensor(x)
    axes = tuple(range(x.ndim)) if axis is None else tuple(np.ravel(axis).tolist())
    _require(len(axes) in (1, 2) or axis is None and ord is None, "norm", [x],
             f"one axis or two, and got {axes}")
    is_matrix = len(axes) == 2
    if is_matrix and ord not in (None, "fro"):
        y = _norm_of_matrices(moveaxis(x, axes, (-2, -1)), ord)
        return expand_dims(y, axes) if keepdims else y
    if is_matrix or ord is None:
        ord = 2  # the length of all elements, as one vector
    return _vector_norm(x, axis=axes, keepdims=keepdims, ord=ord)


def _vector_norm(x, *, axis=None, keepdims=False, ord=2):
    """The norm over one axis, or over several, whose elements are then one vector."""
    rows, axes = _joined("norm", x, axis)  # (..., n)
    y = _norm_of_vectors(rows, ord)
    return expand_dims(y, axes) if keepdims else y


@_answers(np.linalg.cond)
def _cond(x, p=None):
    if p in (None, 2):
        singular = svd(x, compute_uv=False)
        return singular[..., 0] / singular[..., -1]
    return norm(x, p, (-2, -1)) * norm(inv(x), p, (-2, -1))


# ### What some NumPys lack
#
# NumPy 2 added names. Those in np.linalg work on the last two axes.
def _matvec(x1, x2):
    a, b = _admit_together(x1, x2)
    return matmul(a, b[..., None])[..., 0]  # (..., m, n) @ (..., n, 1)


def _vecdot(x1, x2, axis=-1):
    a, b = (moveaxis(x, axis, -1) for x in _admit_together(x1, x2))
    return matmul(a[..., None, :], b[..., None])[..., 0, 0]  # (..., 1, n) @ (..., n, 1)


def _newer(module: Any, **answers: Callable) -> None:
    """Enter the answers to these functions, where the installed NumPy has them."""
    for name, answer in answers.items():
        _answers(getattr(module, name, None))(answer)


_newer(np,
       row_stack=_FUNCTIONS[np.vstack],
       unstack=lambda x, *, axis=0: tuple(moveaxis(x, axis, 0)),
       matrix_transpose=lambda x: _mT(x),
       vecdot=_vecdot, matvec=_matvec,
       vecmat=lambda x1, x2: _matvec(np.swapaxes(x2, -1, -2), x1))
_newer(np.linalg,
       matmul=matmul, outer=outer, tensordot=tensordot, vecdot=_vecdot,
       cross=lambda x1, x2, *, axis=-1: cross(x1, x2, axis=axis),
       diagonal=lambda x, *, offset=0: diagonal(x, offset, -2, -1),
       trace=lambda x, *, offset=0: trace(x, offset, -2, -1),
       matrix_transpose=lambda x: _mT(x),
       svdvals=lambda x: svd(x, compute_uv=False),
       vector_norm=_vector_norm,
       matrix_norm=lambda x, *, keepdims=False, ord="fro":
           norm(x, ord, (-2, -1), keepdims))

# Python's TypeError for a wrong argument gives the function's name. That of a lambda is
# `<lambda>`, and those of helpers begin with `_`. These answers get NumPy's name.
for _function, _f in _FUNCTIONS.items():
    if _f.__qualname__.startswith(("<", "_")):
        _f.__qualname__ = f"np.{_function.__name__}"

# ## IV.12 Names: where is X?
#
# This is the index. These private names are met everywhere: `_value`,
# `_tracked`, `_wrap` (I.1), `_mode` (I.2), `_find_route` (I.5), `_answers` (II.2),
# `_define` (II.3), `_row_sum` (II.5), `_mT` (II.6), `_rng`, `_positive` (III.2).
#
# An entry is a topic with its sections, and its public names. Each of these is a name
# of nanoad itself, such as `nanoad.Adam`. One that is listed under a namespace is also
# in the module of that name, such as `nanoad.optim.Adam`.
_INDEX = {
    "": {  # in no namespace
        "tensor (I.1, I.2, I.4; manual_seed III.2)":
            "Tensor Value as_tensor unbroadcast no_grad manual_seed",
        "operations of your own (I.2, II.7)": "primitive fused",
        "saving (IV.7)": "save load",
    },
    "functional": {
        "transforms (I.5 to I.8, IV.3)":
            "gradients value_and_grad grad vjp jvp hvp jacobian hessian",
        "care (IV.2, II.1)": "checkpoint check_grad",
        "elementwise (I.2, II.3; gelu II.7, sinc IV.11)":
            "identity neg add sub mul div mod fmod exp exp2 expm1 log log2 log10 log1p"
            " sqrt cbrt hypot power sin cos tan arcsin arccos arctan arctan2 sinc"
            " deg2rad rad2deg sinh cosh tanh arcsinh arccosh arctanh softplus sigmoid"
            " logaddexp logaddexp2 gelu astype",
        "choosing elements (II.3, IV.11)":
            "where maximum minimum fmax fmin abs relu clip nan_to_num",
        "moving elements (II.4; partition IV.11)":
            "getitem scatter_add roll flip rot90 repeat tile diag diagonal tril triu"
            " take take_along_axis sort partition reshape flatten transpose swapaxes"
            " moveaxis expand_dims squeeze broadcast_to concatenate stack split pad",
        "reductions (II.5, IV.11)":
            "sum mean average var std max min prod cumsum cumprod diff trace median"
            " quantile logsumexp softmax log_softmax",
        "products (II.6, IV.11)":
            "matmul bmm linear einsum dot inner outer tensordot kron cross convolve"
            " correlate matrix_power",
        "linear algebra (II.6, IV.10; lstsq, norm IV.11)":
            "solve inv det slogdet cholesky eigh svd qr pinv lstsq norm",
        "images (III.4)": "conv2d max_pool2d avg_pool2d",
        "normalization (III.5)": "layer_norm batch_norm",
        "transformer (III.6)":
            "scaled_dot_product_attention causal_self_attention embedding dropout",
        "losses (III.1)":
            "cross_entropy mse_loss binary_cross_entropy"
            " binary_cross_entropy_with_logits hinge_loss",
    },
    "nn": {
        "modules (III.2)": "Parameter Module Sequential MLP",
        "layers (III.2)":
            "Linear Conv2d MaxPool2d AvgPool2d BatchNorm2d LayerNorm Embedding Dropout"
            " Flatten ReLU GELU Tanh Sigmoid",
        "losses (III.2)": "CrossEntropy CrossEntropyLoss MSE MSELoss",
        "transformer (III.6, III.7)": "MultiHeadAttention Block GPT",
    },
    "optim": {
        "optimizers (III.3)": "Optimizer SGD Adam AdamW CosineWarmupLR clip_grad_norm",
        "many cores (III.9)": "DataParallel",
    },
    "data": {
        "loaders (IV.6)":
            "load_mnist load_cifar10 load_tinyshakespeare make_moons DataLoader"
            " CharTokenizer",
    },
    "viz": {
        "drawing (IV.8, IV.9)": "draw plot",
    },
}


# Four public names are also Python's. In this file, and after `from nanoad import *`,
# `sum` is Python's. Ours is `sum_` in this file, and elsewhere `nanoad.sum`.
_ALSO_OF_PYTHON = {"sum": sum_, "max": max_, "min": min_, "abs": abs_}


def __getattr__(name: str) -> Any:
    """nanoad.sum and the like. (Python calls this for a name that is not a global.)"""
    if name in _ALSO_OF_PYTHON:
        return _ALSO_OF_PYTHON[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Each namespace becomes a module. For `viz`, by hand, that would be:
#
#     viz = types.ModuleType("nanoad.viz")  # a global here, so it is `nanoad.viz`
#     viz.draw, viz.plot = draw, plot
#     sys.modules["nanoad.viz"] = viz  # where `import nanoad.viz` looks
__all__: list[str] = []  # what `from nanoad import *` gives

for _space, _topics in _INDEX.items():
    _names = " ".join(_topics.values()).split()
    __all__ += [name for name in _names if name not in _ALSO_OF_PYTHON]
    if _space:
        _module = types.ModuleType(f"{__name__}.{_space}")
        _module.__doc__ = f"Here are {', '.join(_names)}."
        _module.__all__ = _names
        for _name in _names:
            vars(_module)[_name] = _ALSO_OF_PYTHON.get(_name) or globals()[_name]
        globals()[_space] = sys.modules[_module.__name__] = _module


def __dir__() -> list[str]:
    """The names that an editor offers: the public ones, and the namespaces."""
    return [*__all__, *(space for space in _INDEX if space)]


# The rest is cosmetic: **go on with IV.13**. By `from __future__ import annotations`
# each annotation is a string. help() shows its repr, `x: 'Any'`. Here each becomes a
# string whose repr has no quotes. (Of an operation, help() shows the `__wrapped__`.)
class _Unquoted(str):
    __repr__ = str.__str__


def _unquote_annotations() -> None:
    for item in list(globals().values()):
        functions = vars(item).values() if inspect.isclass(item) else [item]
        for f in functions:
            f = getattr(f, "__wrapped__", f)
            if inspect.isfunction(f) and f.__module__ == __name__:
                for name, hint in f.__annotations__.items():
                    f.__annotations__[name] = _Unquoted(hint)


_unquote_annotations()

# ## IV.13 The tour: what can all this do?
#
# `python nanoad.py` shows it in a few seconds: it prints and runs each paragraph below.
_TOUR = r"""
# The derivative of x sin x is sin x + x cos x. We compute it at x = 2, by hand and by
# the tape. We draw the tape: each operation over its operands, with the gradient that
# reached it.
x = Tensor(2.0, label="x")
y = x * np.sin(x)
y.backward(retain_grads=True)
print(math.sin(2) + 2 * math.cos(2), x.grad)
print(draw(y, format="text"))

# A gradient is a computation too, so it has a gradient: 2 cos x - x sin x.
print(2 * math.cos(2) - 2 * math.sin(2), grad(grad(lambda x: x * np.sin(x)))(2.0))

# So Newton's method gets its Hessian. It fits the 50 weights of a logistic regression
# in five steps:
rng = np.random.default_rng(0)
A, t = rng.standard_normal((200, 50)), rng.choice([-1.0, 1.0], 200)
def loss(w):
    return np.sum(np.log(1 + np.exp(-t * (A @ w)))) + 5 * np.sum(w * w)
w = np.zeros(50)
for newton_step in range(5):
    slope = grad(loss)(w)
    print(f"loss {loss(w):.5f}, norm of the gradient {np.linalg.norm(slope):.1e}")
    w = w - np.linalg.solve(hessian(loss)(w), slope).numpy()

# A network learns which of two moons a point belongs to. We plot its loss, and then
# what it learned: the region where it says 1 is shaded, and the points are o (0) and
# x (1).
manual_seed(1)
points, labels = make_moons(200, noise=0.15)
model = MLP(2, [16, 16, 1])
losses = []
optimizer = Adam(model.parameters(), lr=0.02)
for step in range(300):
    loss = binary_cross_entropy_with_logits(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(plot(losses, height=8))
across, up = np.meshgrid(np.linspace(-1.5, 2.5, 72), np.linspace(1.5, -1.0, 20))
picture = np.where(model(np.stack([across, up], axis=-1)) > 0, ":", " ")
columns = ((points[:, 0] + 1.5) / 4 * 71).round().clip(0, 71).astype(int)
rows = ((1.5 - points[:, 1]) / 2.5 * 19).round().clip(0, 19).astype(int)
picture[rows, columns] = np.where(labels, "x", "o")
print(*map("".join, picture), sep="\n")
"""


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # "?" for what the terminal cannot show
    scope = dict(globals())
    try:
        for step in _TOUR.strip().split("\n\n"):
            print(f"\n{step}\n")
            exec(step, scope)
        sys.stdout.flush()
    except BrokenPipeError:  # as by `| head`, which stops reading
        os._exit(1)
