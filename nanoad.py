"""nanoad: reverse-mode automatic differentiation, and what stands on it, in one file of NumPy.

A Tensor is a NumPy array that remembers where it came from. Ask the last one of a computation
for its derivatives, and every array that had a part in it learns how much it mattered:

>>> x = Tensor([1.0, 2.0, 3.0])
>>> loss = (x * x).sum()
>>> loss.backward()
>>> print(x.grad)
[2. 4. 6.]
>>> print(grad(grad(lambda x: x ** 3))(2.0))
12.0

Read from top to bottom, the chapters are: the **tensor**; the **tape** it writes and the walk back
along it; the **functional transforms** (`grad`, `vjp`, `jvp`, `hvp`, `hessian`), which make new
functions out of yours; the **operations**, each with its derivative; **modules**, which hold
parameters; **optimizers**, which move them; **loaders**, which fetch data; and last **saving,
drawing and the public names**. You need NumPy, a little calculus, and no other file.
`python nanoad.py` gives a tour.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import heapq
import inspect
import itertools
import math
import os
import sys
import threading
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

# ## The tensor
#
# What must an array remember, so that we can differentiate through it later?
#
# Take `y = x * w`. If somebody downstream tells us that the final result changes by `g` per unit
# of `y`, the chain rule says it changes by `g * w` per unit of `x` and by `g * x` per unit of `w`.
# To say so we must know three things: *which operation* made `y`, *what it was made of*, and the
# *values* that went in. A Tensor is an array plus exactly these, and nothing happens with them
# until a derivative is wanted. All Tensors of one computation, each pointing at its operands, are
# what the field calls the tape.
#
# One field needs a word. `_seq` is drawn from a global counter when the tensor is made. A result
# is always made after its operands, so sorting by `_seq` sorts a computation into an order in
# which it could have happened. The walk back, further down, needs no other map.

_clock = itertools.count(1)

class _Mode(threading.local):
    """What each thread has to itself: whether it writes a tape, and its random numbers."""

    recording = True
    rng: np.random.Generator | None = None

_mode = _Mode()

def _rng() -> np.random.Generator:
    """The calling thread's source of random numbers."""
    if _mode.rng is None:
        _mode.rng = np.random.default_rng()
    return _mode.rng

def manual_seed(seed: int | Sequence[int]) -> None:
    """Fix initialization, dropout, shuffling and sampling of the calling thread.

    Each thread has a stream of its own, so that threads neither wait for one another nor disturb
    one another's results. A sequence of integers, such as `(seed, step)`, names a stream too.
    """
    _mode.rng = np.random.default_rng(seed)

class Tensor:
    """An n-dimensional array that can be differentiated through.

    `data` is anything NumPy makes an array of. float32 stays float32 and float64 stays float64;
    integers and bools become float64, since an integer cannot carry a gradient. The array is
    copied. A list that holds Tensors is stacked, and gradients flow through the stacking.

    A Tensor has ndarray's operators and methods, and NumPy's own functions (`np.exp(t)`,
    `np.sum(t, axis=0)`) work on it and differentiate. Raw arrays, lists and numbers beside it in
    an operation are constants. Comparisons give plain bool arrays. Raises TypeError for data
    that is not real numbers.
    """

    __slots__ = ("_data", "requires_grad", "grad", "label", "_seq", "_guard",
                 "_op", "_args", "_values", "_params", "_pullback", "__weakref__")

    def __init__(self, data: Any, requires_grad: bool = True, label: str = "") -> None:
        made = None
        if isinstance(data, Tensor):
            made = identity(data) if requires_grad else data.detach()
        elif isinstance(data, (list, tuple)) and _holds_tensor(data):
            made = as_tensor(data) if requires_grad else as_tensor(data).detach()
        _fill(self, _real_array(data if made is None else made._data, copy=True), requires_grad)
        self.label = label
        if made is not None and made._op is not None:
            for slot in ("requires_grad", "_op", "_args", "_values", "_params", "_pullback"):
                setattr(self, slot, getattr(made, slot))

    shape = property(lambda self: self._data.shape, doc="The size along each axis.")
    dtype = property(lambda self: self._data.dtype, doc="The NumPy type of the elements.")
    ndim = property(lambda self: self._data.ndim, doc="The number of axes.")
    size = property(lambda self: self._data.size, doc="The number of elements.")
    T = property(lambda self: transpose(self), doc="The tensor with its axes reversed.")

    @property
    def data(self) -> np.ndarray:
        """The array itself. Writing into it is not recorded on the tape.

        Between a forward and its backward pass the tape needs the values it saw, so a write in
        between must not pass unnoticed. Once the array of a tracked tensor has been handed out,
        its checksum is kept, and compared when it is used and when the walk back needs it.
        """
        if not isinstance(self._data, np.ndarray):  # NumPy returns scalars for 0-d results
            return np.asarray(self._data)
        if self.requires_grad:
            _renew_guard(self)
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        value = value.numpy() if isinstance(value, Tensor) else value
        array = np.asarray(value, dtype=None if isinstance(value, np.ndarray) else self.dtype)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"t.data is {self.dtype} of shape {self.shape}; it cannot be replaced "
                             f"by {array.dtype} of shape {array.shape}; make a new Tensor for that")
        self._data = array
        _note_write(self)

    def numpy(self) -> np.ndarray:
        """The array, for code outside nanoad: the same memory as `t.data`."""
        return self.data

    def item(self) -> float:
        """The one element, as a Python number. Raises ValueError if there is not exactly one."""
        if self.size != 1:
            raise ValueError(f"item() needs a tensor of one element; this has shape {self.shape}")
        return self._data.item()

    def detach(self) -> Tensor:
        """The same array as a constant: nothing behind it will be differentiated."""
        return _wrap(self._data)

    def backward(self, grad: Any = None, *, create_graph: bool = False,
                 retain_graph: bool = False, retain_grads: bool = False) -> None:
        """Add the derivative of this tensor to `.grad` of every tracked leaf it was made from.

        `grad` is the cotangent, an array of this tensor's shape; a scalar needs none, it is
        seeded with 1. `create_graph` makes the gradients differentiable in turn. The tape is let
        go as it is walked, unless `retain_graph`. `retain_grads` leaves `.grad` on every tensor
        of the tape and keeps the tape, so that `draw` can show both. Raises ValueError for a
        non-scalar without `grad` or a `grad` of another shape, RuntimeError if there is no tape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor was made of constants, so nothing would get a"
                               " gradient. Make an input with Tensor(...), outside of no_grad().")
        seeds = [(self, _seed("backward", self, grad, create_graph))]
        with _recording(create_graph):
            for t, g in _walk(seeds, None, create_graph,
                              retain_graph or create_graph or retain_grads):
                if t._op is None or retain_grads:
                    if not _tracked(g):
                        shared = create_graph or retain_grads or t is self
                        g = _wrap((np.array if shared else np.asarray)(_value(g)))
                    t.grad = g if t.grad is None else t.grad + g

    def __repr__(self) -> str:
        values = np.array2string(np.asarray(self._data), separator=", ", prefix="Tensor(")
        label = f", label={self.label!r}" if self.label else ""
        return f"Tensor({values}, dtype={self.dtype}{label})"

    def __str__(self) -> str:
        return str(self._data)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    __hash__ = object.__hash__

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a Tensor's elements cannot be assigned, since the tape needs what was "
                        "there; use np.where, or write to t.data outside of a computation")

    def __reduce__(self) -> tuple:
        # Copies and pickles are new leaves: they must not share `_seq` with the original.
        if self._op is not None:
            raise TypeError("only leaves can be copied or pickled; use t.detach() on this result")
        return type(self), (np.asarray(self._data), self.requires_grad, self.label)

    # ### What NumPy is told
    #
    # NumPy asks an operand that is not its own before it computes. A function that nanoad knows
    # is answered by nanoad's operation; any other is a TypeError. To convert silently would cut
    # the tape, and the gradient would be wrong rather than missing. The tables are at the end of
    # the chapter on operations.

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.requires_grad:
            raise TypeError("this Tensor needs a gradient, which a plain array would lose: "
                            "use t.numpy() for its values, or a nanoad operation")
        return (np.array if copy else np.asarray)(self._data, dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        constant = not any(map(_tracked, inputs))
        if method == "__call__" and (ufunc in _WITHOUT_GRADIENT or constant and "out" in kwargs):
            return ufunc(*map(_value, inputs), **kwargs)
        if method != "__call__" or kwargs or ufunc not in _UFUNCS:
            how = "" if method == "__call__" else f".{method}"
            given = f" with {', '.join(kwargs)}=" if kwargs else ""
            raise TypeError(f"np.{ufunc.__name__}{how}{given}: nanoad has no derivative for this; "
                            "use t.numpy() if none is needed")
        return _UFUNCS[ufunc](*inputs)

    def __array_function__(self, function: Callable, kinds: Any, args: tuple, kwargs: dict) -> Any:
        if function in _FUNCTIONS:
            return _FUNCTIONS[function](*args, **kwargs)
        if function in _WITHOUT_GRADIENT:
            return function(*_map_tree(_value, args), **_map_tree(_value, kwargs))
        raise TypeError(f"np.{function.__name__}: nanoad has no derivative for this; "
                        "use t.numpy() if none is needed")

Value = Tensor

def _fill(t: Tensor, array: Any, requires_grad: bool) -> Tensor:
    """Make `t` a leaf that holds `array` as it is."""
    t._data, t.requires_grad, t.grad, t.label = array, requires_grad, None, ""
    t._seq, t._guard = next(_clock), None
    t._op = t._args = t._values = t._params = t._pullback = None
    return t

def _wrap(array: Any, requires_grad: bool = False) -> Tensor:
    """A leaf around an array: no copy, no conversion."""
    return _fill(Tensor.__new__(Tensor), array, requires_grad)

def _record(y: Any, op: Callable, args: tuple, values: Any, params: dict,
            pullback: Callable | None) -> Tensor:
    """A result that remembers how it was made."""
    t = Tensor.__new__(Tensor)
    t._data, t.requires_grad, t.grad, t.label = y, True, None, ""
    t._seq, t._guard = next(_clock), None
    t._op, t._args, t._values, t._params, t._pullback = op, args, values, params, pullback
    return t

def _value(a: Any) -> Any:
    return a._data if isinstance(a, Tensor) else a

def _tracked(a: Any) -> bool:
    return isinstance(a, Tensor) and a.requires_grad

def _real_array(data: Any, copy: bool = False) -> np.ndarray:
    """`data` as an array of real floating-point numbers."""
    array = np.array(data) if copy else np.asarray(data)
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    if array.dtype.kind != "f":
        raise TypeError(f"a Tensor holds real numbers; this is {array.dtype}: {str(data)[:60]!r}")
    return array

def as_tensor(data: Any) -> Tensor:
    """`data` itself if it is a Tensor, else a constant Tensor of it (shared memory, no gradient).

    A list that holds Tensors is stacked, and gradients flow through the stacking.
    """
    if isinstance(data, Tensor):
        return data
    if isinstance(data, (list, tuple)) and _holds_tensor(data):
        return stack([as_tensor(a) for a in data])
    return _wrap(_real_array(data))

def _holds_tensor(items: Any) -> bool:
    return any(isinstance(a, Tensor) or isinstance(a, (list, tuple)) and _holds_tensor(a)
               for a in items)

def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())

# A guard is None, or (when the data was last written to, its checksum or None).

def _note_write(t: Tensor) -> None:
    """Note that the data of `t` changed just now; a tape that still needs it will say so."""
    t._guard = next(_clock), None

def _renew_guard(t: Tensor) -> None:
    """Take the checksum of `t`, and note a write if it is not what it was."""
    (written, before), now = t._guard or (0, None), _checksum(t._data)
    t._guard = written if before in (None, now) else next(_clock), now

# ## The tape
#
# How does one number at the end become a derivative for everything at the start?
#
# Let *L* be the end, a scalar, and call the derivative of *L* by some array *v* the *cotangent* of
# *v*; it has the shape of *v*, and says for each element how much *L* moves when that element does.
# The cotangent of *L* itself is 1. Now step backwards. If `y = f(a, b)` and the cotangent of `y` is
# `g`, the chain rule gives what `a` receives by way of `y`: `g` times the Jacobian of `f`. That
# product is all we ever need, never the Jacobian alone, so each operation brings a function that
# computes it: its **VJP rule** (vector-Jacobian product). For `mul` it is `g * b`. An array used
# in several places receives from each, and the parts add up. Visit every tensor after all that
# were made from it, hand its finished cotangent to its rule, pass the results on to its operands:
# that is reverse-mode differentiation. It costs a small multiple of the forward pass, however many
# inputs there are, and that one fact is why neural networks can be trained.
#
# Three properties of this walk carry the rest of the file:
#
# 1. *The order is the clock, backwards.* The tensor with the largest `_seq` still waiting cannot
#    be an operand of another that waits, so its cotangent is complete. A heap of these numbers
#    replaces the usual recursive sort: a tape of a million operations needs no recursion.
# 2. *The tape is let go behind us.* Once a tensor has passed its cotangent on, what it saved is
#    dropped, and memory falls while we walk.
# 3. *A rule is ordinary array code.* Given ndarrays, it computes at NumPy's own speed, and that
#    is the ordinary backward pass. Given Tensors, the same text writes a new tape, so the
#    gradient it returns can be differentiated again. `create_graph` decides which; nothing else
#    in the engine differs, and no second set of rules exists to be wrong.

_RELEASED = ("the tape behind this tensor was already walked and let go; "
             "call backward(retain_graph=True) the first time to walk it again")

def _walk(seeds: list, needed: dict | None, create_graph: bool,
          retain_graph: bool) -> Iterator[tuple[Tensor, Any]]:
    """Yield each tensor behind `seeds` with its finished cotangent, the newest first.

    `seeds` are pairs (tensor, cotangent). Only tensors whose `_seq` is in `needed` are visited, or
    all if it is None. Cotangents are ndarrays, or Tensors under `create_graph`.
    """
    pending: dict = {}  # _seq -> (tensor, the sum of what it has received so far)
    heap: list = []
    for t, g in seeds:
        if t._seq in pending:
            g = pending[t._seq][1] + g
        else:
            heapq.heappush(heap, -t._seq)
        pending[t._seq] = t, g
    while heap:
        t, g = pending.pop(-heapq.heappop(heap))
        yield t, g
        if t._op is None or (needed is not None and not needed[t._seq]):
            continue
        for parent, part in zip(t._args, _pull(t, g, needed, create_graph)):
            if part is None:
                continue
            data, seq = parent._data, parent._seq
            if part.shape != data.shape:
                part = unbroadcast(part, data.shape)
            if part.dtype != data.dtype:
                part = part.astype(data.dtype)
            if seq in pending:
                pending[seq] = parent, pending[seq][1] + part
                continue
            # A rule may return its own g, or a view. A leaf keeps what it receives, and two
            # leaves must not share memory: clipping one gradient would change the other.
            if parent._op is None and not create_graph and (part is g or part.base is not None):
                part = part.copy()
            pending[seq] = parent, part
            heapq.heappush(heap, -seq)
        if not retain_graph:
            t._args = t._values = t._params = t._pullback = None

def _pull(t: Tensor, g: Any, needed: dict | None, create_graph: bool) -> list:
    """What each operand of `t` receives from the cotangent `g` of `t`; None where nothing is due."""
    op = t._op
    if t._args is None:
        raise RuntimeError(f"{op.__name__}: {_RELEASED}")
    if t._guard is not None:
        _check_unwritten(t, t._seq, op)
    wanted = []
    for a in t._args:
        due = isinstance(a, Tensor) and a.requires_grad
        if due and a._guard is not None:
            _check_unwritten(a, t._seq, op)
        wanted.append(due and (needed is None or a._seq in needed))
    if t._pullback is not None:
        if create_graph and op.definition is not None:
            return _pull_by_definition(t, g, wanted)
        return [part if due else None for part, due in zip(t._pullback(g, wanted), wanted)]
    y, values = (t, t._args) if create_graph else (t._data, t._values)
    rules, params = op.rules, t._params
    return [rules[i](g, y, *values, **params) if due else None for i, due in enumerate(wanted)]

def _check_unwritten(t: Tensor, since: int, op: Callable) -> None:
    """Raise if the array of `t` was written to after the operation made at `since` saw it."""
    written, checksum = t._guard
    if written > since or checksum not in (None, _checksum(t._data)):
        name = f"{t.label!r}, " if t.label else ""
        raise RuntimeError(f"{op.__name__}: the data of a tensor ({name}shape {t.shape}) was "
                           "changed between forward and backward, and the gradient would be wrong; "
                           "call backward first, then write")

# ### Broadcasting, and the sum it leaves behind
#
# NumPy stretches a `(3,)` row along a `(4, 3)` table without being asked. Each element of the row
# is then used four times, and an array used several times receives the *sum* of what comes back:
# the cotangent arrives with shape `(4, 3)` and has to be added up over the four. This holds for
# every operation that broadcasts, so the walk does it, here and only here; no rule mentions it.
#
#     row = Tensor([1.0, 2.0, 3.0])
#     (np.ones((4, 3)) * row).sum().backward()
#     print(row.grad)                              # [4. 4. 4.]

def unbroadcast(g: Any, shape: tuple) -> Any:
    """Sum the cotangent `g` (ndarray or Tensor) over the axes that were stretched from `shape`.

    >>> unbroadcast(np.ones((4, 3)), (1, 3))
    array([[4., 4., 4.]])
    """
    extra = g.ndim - len(shape)
    stretched = [i + extra for i, n in enumerate(shape) if n == 1 and g.shape[i + extra] != 1]
    return np.sum(g, axis=(*range(extra), *stretched)).reshape(shape)

@contextlib.contextmanager
def _recording(on: bool) -> Iterator[None]:
    before, _mode.recording = _mode.recording, on
    try:
        yield
    finally:
        _mode.recording = before

def no_grad() -> contextlib.AbstractContextManager:
    """A context manager, and with its parentheses a decorator: this thread writes no tape inside.

    >>> w = Tensor(3.0)
    >>> with no_grad():
    ...     print((w * w).requires_grad)
    False
    """
    return _recording(False)

# ### The reverse pass as a function
#
# `backward` leaves its results in `.grad`, which suits training. To *use* a gradient inside a
# larger computation we want it returned, for the inputs we name and no others. Two observations
# keep that cheap. Nothing older than the oldest input can depend on any input, so the search stops
# at that age. And of what is younger, only tensors on a path from an input to an output matter.

def _paths(outputs: list, inputs: list, beyond: bool = True) -> tuple[dict, list]:
    """The `_seq` of every tensor on a path from `inputs` to `outputs`, with whether to walk on from
    it (from an input only if `beyond`); and the tracked tensors older than all inputs that had a
    part in the outputs."""
    oldest = builtins.min((t._seq for t in inputs), default=math.inf)
    needed = {t._seq: beyond for t in inputs}
    found, older = {t._seq: t for t in outputs}, {}
    waiting = list(outputs)
    while waiting:
        t = waiting.pop()
        if t._op is None or t._seq < oldest or not needed.get(t._seq, True):
            continue
        if t._args is None:
            raise RuntimeError(f"{t._op.__name__}: {_RELEASED}")
        for a in t._args:
            if isinstance(a, Tensor) and a.requires_grad and a._seq not in found:
                if a._seq < oldest:
                    older[a._seq] = a
                else:
                    found[a._seq] = a
                    waiting.append(a)
    for seq in sorted(found):
        if any(isinstance(a, Tensor) and a._seq in needed for a in found[seq]._args or ()):
            needed.setdefault(seq, True)
    return needed, list(older.values())

def _seed(name: str, output: Any, cotangent: Any, create_graph: bool) -> Any:
    """The cotangent to start from: 1 for a scalar, else the array given, which must fit."""
    if not isinstance(output, Tensor):
        raise TypeError(f"{name}: the output must be a Tensor computed from the inputs, not "
                        f"{type(output).__name__} ({str(output)[:40]})")
    if cotangent is None:
        if output.size != 1:
            raise ValueError(f"{name}: the output has shape {output.shape}, and only a scalar has a"
                             " gradient; reduce it with .sum() or .mean(), or pass a cotangent")
        cotangent = np.ones(output.shape, output.dtype)
    if np.shape(cotangent) != output.shape:
        raise ValueError(f"{name}: the cotangent has shape {np.shape(cotangent)}, and the output "
                         f"{output.shape}")
    if create_graph:
        return as_tensor(cotangent)
    return np.asarray(_value(cotangent)).astype(output.dtype, copy=False)

def _gradients(seeds: list, inputs: list, create_graph: bool, retain_graph: bool,
               needed: dict | None = None) -> list[Tensor]:
    """The cotangents that arrive at `inputs`, zeros for an input that had no part."""
    if needed is None:
        needed, _ = _paths([t for t, _ in seeds], inputs)
    wanted = {t._seq for t in inputs}
    seeds = [(t, g) for t, g in seeds if t._seq in needed]
    with _recording(create_graph):
        arrived = {t._seq: g for t, g in _walk(seeds, needed, create_graph, retain_graph)
                   if t._seq in wanted}
    results = []
    for t in inputs:
        g = arrived[t._seq] if t._seq in arrived else np.zeros(t.shape, t.dtype)
        results.append(g if isinstance(g, Tensor) else _wrap(g))
    return results

def gradients(output: Tensor, inputs: Sequence[Tensor], grad: Any = None, *,
              create_graph: bool = False, retain_graph: bool = False) -> tuple[Tensor, ...]:
    """The derivatives of `output` by each of `inputs`, as a tuple of Tensors of their shapes.

    Touches no `.grad`. `grad` is the cotangent of a non-scalar output. An input that had no part
    in the output gets zeros. With `create_graph` the results can be differentiated in turn.
    The counterpart of `torch.autograd.grad`. Raises TypeError, ValueError as `backward` does.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not all(isinstance(t, Tensor) for t in inputs):
        raise TypeError("gradients: every input must be a Tensor that had a part in the output")
    seeds = [(output, _seed("gradients", output, grad, create_graph))]
    return tuple(_gradients(seeds, inputs, create_graph, retain_graph or create_graph))

# ## Functional transforms
#
# How do we turn a function into the function of its derivatives?
#
# The tape is a means; what mathematics speaks of is `f` and `f'`. A transform takes a function and
# returns one: `grad(f)` runs `f` on fresh Tensors that hold your arguments, walks the tape this
# wrote, and hands back the gradient. No `.grad` is touched. Arguments may be numbers, arrays,
# Tensors, or dicts, lists and tuples of them, and the results have the same structure.
#
# **Why a gradient can be differentiated again.** Inside `grad(grad(f))` the inner gradient is
# computed by the rules, and the rules are array code. The outer transform has put Tensors where
# arrays would be, so the inner backward pass is itself recorded, like any other computation, and
# the outer one walks back along it. One rule, two uses; third derivatives need nothing more.
#
# **Why nested transforms do not get confused.** Look at
#
#     grad(lambda x: x * grad(lambda y: x * y)(2.0))(3.0)
#
# The inner derivative is `x`, so the whole is the derivative of `x * x`, which is 6 at 3. An engine
# that marks "the variable we differentiate by" with a flag on the values cannot tell the `x` that
# occurs inside from the `y` it is asked about, and may answer 3, or 5. The mistake is called
# perturbation confusion, and here it has no room. Every call of a transform makes *new* tensors for
# its own arguments and asks for the derivative by *those objects*. `x` is another object, older
# than `y`, so the inner walk stops at it; but the inner result was computed from it, so to the
# outer walk it is an operand like any other.
#
# One decision is left: when must the inner walk itself be recorded? Exactly when somebody else can
# still ask, that is when a tracked tensor older than the transform's own inputs had a part in the
# result. `_paths` reports those; if there are none, the walk runs on bare ndarrays.

def _flatten(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """The leaves of nested dicts, lists and tuples, and a function that builds the same nest again.

    A list of nothing but numbers is an array, as it is for NumPy, and so a leaf.
    """
    if isinstance(tree, dict):
        children, build = list(tree.values()), lambda items: dict(zip(tree, items))
    elif isinstance(tree, tuple):
        children, build = tree, getattr(type(tree), "_make", tuple)
    elif isinstance(tree, list) and not _only_numbers(tree):
        children, build = tree, list
    else:
        return [tree], lambda leaves: leaves[0]
    parts = [_flatten(child) for child in children]

    def rebuild(leaves: list) -> Any:
        leaves = iter(leaves)
        return build([back(list(itertools.islice(leaves, len(part)))) for part, back in parts])

    return [leaf for part, _ in parts for leaf in part], rebuild

def _only_numbers(items: list) -> bool:
    return all(_only_numbers(a) if isinstance(a, list) else isinstance(a, (int, float, np.generic))
               for a in items)

def _map_tree(f: Callable, tree: Any) -> Any:
    leaves, rebuild = _flatten(tree)
    return rebuild([f(leaf) for leaf in leaves])

def _input(name: str, x: Any) -> Tensor:
    """A new tensor to differentiate by. It is tied to `x` if somebody else tracks that."""
    if isinstance(x, Tensor):
        return identity(x) if x.requires_grad and _mode.recording else _wrap(x._data, True)
    array = np.asarray(x)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: can differentiate only by real floating-point numbers, not by "
                        f"{str(x)[:40]} ({array.dtype}); write 3.0 for 3, or use .astype(float)")
    return _wrap(array, True)

def _run(name: str, f: Callable, args: tuple, argnums: int | Sequence[int], kwargs: dict) -> tuple:
    """Call `f` with the arguments at `argnums` made fresh tensors: (its result, those tensors as a
    flat list, a function that gives such a list the structure of the arguments)."""
    positions = [argnums] if isinstance(argnums, int) else list(argnums)
    for i in positions:
        if i not in range(-len(args), len(args)):
            raise ValueError(f"{name}: argnums asks for argument {i}, but the function was called "
                             f"with {len(args)} positional arguments")
    leaves, rebuild = _flatten(tuple(args[i] for i in positions))
    inputs = [_input(name, leaf) for leaf in leaves]
    call = list(args)
    for i, argument in zip(positions, rebuild(inputs)):
        call[i] = argument
    with _recording(True):
        out = f(*call, **kwargs)
    one = isinstance(argnums, int)
    return out, inputs, (lambda flat: rebuild(flat)[0]) if one else rebuild

def _outputs(name: str, out: Any) -> tuple[list, Callable]:
    leaves, rebuild = _flatten(out)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: the function must return Tensors computed from its arguments;"
                            f" {type(leaf).__name__} ({str(leaf)[:40]}) has lost track of them")
    return leaves, rebuild

def _settle(a: Any, recorded: bool) -> Any:
    """What leaves a transform: still on the tape if somebody can ask, else a constant."""
    return a.detach() if isinstance(a, Tensor) and not recorded else a

def value_and_grad(f: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
                   argnum: int | None = None) -> Callable:
    """The function that returns (f(...), gradient of f) where f returns a scalar.

    The gradient has the structure of the argument at `argnums`; for a tuple of numbers it is a
    tuple of such. With `has_aux`, f returns (scalar, anything), and so does the value. Raises
    ValueError if f is not scalar, TypeError for integer arguments or if f returns no Tensor.

    >>> value, slope = value_and_grad(lambda x: (x ** 2).sum())(np.array([1.0, 3.0]))
    >>> print(value, slope)
    10.0 [2. 6.]
    """
    argnums = argnums if argnum is None else argnum

    @functools.wraps(f)
    def value_and_gradient(*args: Any, **kwargs: Any) -> tuple:
        out, inputs, structure = _run("grad", f, args, argnums, kwargs)
        aux = None
        if has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError("grad: with has_aux the function must return (scalar, aux)")
            out, aux = out
        seed = _seed("grad", out, None, False)
        beside = [a for a in _flatten(aux)[0] if isinstance(a, Tensor)]
        needed, older = _paths([out, *beside], inputs)
        recorded = bool(older) and _mode.recording
        seeds = [(out, as_tensor(seed) if recorded else seed)]
        slope = structure(_gradients(seeds, inputs, recorded, recorded, needed))
        value = _settle(out, recorded)
        if has_aux:
            value = value, _map_tree(lambda a: _settle(a, recorded), aux)
        return value, slope

    return value_and_gradient

def grad(f: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
         argnum: int | None = None) -> Callable:
    """The function that returns the gradient of f, or (gradient, aux) with `has_aux`.

    Otherwise as `value_and_grad`. Transforms nest in any combination:

    >>> print(grad(lambda x: x * grad(lambda y: x * y)(2.0))(3.0))
    6.0
    """
    both = value_and_grad(f, argnums, has_aux, argnum=argnum)

    @functools.wraps(f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, slope = both(*args, **kwargs)
        return (slope, value[1]) if has_aux else slope

    return gradient

def vjp(f: Callable, *primals: Any) -> tuple[Any, Callable]:
    """`(f(*primals), vjp_fn)`, where `vjp_fn(cotangent)` is the tuple of the primals' cotangents.

    The cotangent has the structure and shapes of f's result. f runs once, however often `vjp_fn`
    is called.
    """
    out, inputs, structure = _run("vjp", f, primals, range(len(primals)), {})
    outputs, rebuild = _outputs("vjp", out)
    needed, older = _paths(outputs, inputs)

    def vjp_fn(cotangent: Any) -> tuple:
        parts, _ = _flatten(cotangent)
        if len(parts) != len(outputs):
            raise ValueError(f"vjp: the function returned {len(outputs)} arrays, and the cotangent "
                             f"has {len(parts)}")
        recorded = _mode.recording and (bool(older) or any(map(_tracked, parts)))
        seeds = [(t, _seed("vjp", t, c, recorded)) for t, c in zip(outputs, parts)]
        return structure(_gradients(seeds, inputs, recorded, True, needed))

    recorded = bool(older) and _mode.recording
    return rebuild([_settle(t, recorded) for t in outputs]), vjp_fn

def _inner(name: str, parts: list, vectors: Any, inputs: list) -> Tensor:
    """The inner product of `parts` with `vectors`, which must be shaped like `inputs`."""
    vectors, _ = _flatten(tuple(vectors) if isinstance(vectors, list) else vectors)
    shapes = [x.shape for x in inputs]
    if [np.shape(v) for v in vectors] != shapes:
        raise ValueError(f"{name}: primals of shapes {shapes} need tangents of the same shapes, not"
                         f" {[np.shape(v) for v in vectors]}; both are tuples, an entry per argument")
    return functools.reduce(add, ((a * v).sum() for a, v in zip(parts, vectors)))

def jvp(f: Callable, primals: Sequence, tangents: Sequence) -> tuple[Any, Any]:
    """`(f(*primals), the directional derivative of f along tangents)`.

    Forward mode out of reverse mode: `u -> vjp_fn(u)` is linear, and the transpose of a linear map
    is what its own VJP computes; so differentiate `<vjp_fn(u), tangent>` by `u` (Townsend, 2017).

    >>> print(jvp(np.sin, (0.0,), (2.0,))[1])
    2.0
    """
    out, inputs, _ = _run("jvp", f, tuple(primals), range(len(primals)), {})
    outputs, rebuild = _outputs("jvp", out)
    needed, older = _paths(outputs, inputs)
    recorded = _mode.recording and (bool(older) or any(map(_tracked, _flatten(tangents)[0])))
    u = [_wrap(np.zeros(t.shape, t.dtype), True) for t in outputs]
    with _recording(True):
        parts = _gradients(list(zip(outputs, u)), inputs, True, True, needed)
        pulled = _inner("jvp", parts, tangents, inputs)
    pushed = _gradients([(pulled, _seed("jvp", pulled, None, recorded))], u, recorded, recorded)
    return rebuild([_settle(t, recorded) for t in outputs]), rebuild(pushed)

def hvp(f: Callable, primals: Sequence, vector: Sequence) -> tuple[Tensor, tuple]:
    """`(f(*primals), Hessian of f times vector)`, the product as a tuple like `primals`.

    The Hessian is never formed: this is the gradient of `<grad f, vector>`, a few times the cost
    of one gradient (Pearlmutter, 1994).
    """
    out, inputs, structure = _run("hvp", f, tuple(primals), range(len(primals)), {})
    seed = _seed("hvp", out, None, True)
    needed, older = _paths([out], inputs)
    recorded = _mode.recording and (bool(older) or any(map(_tracked, _flatten(vector)[0])))
    with _recording(True):
        slopes = _gradients([(out, seed)], inputs, True, True, needed)
        slope = _inner("hvp", slopes, vector, inputs)
    seeds = [(slope, _seed("hvp", slope, None, recorded))]
    return _settle(out, recorded), structure(_gradients(seeds, inputs, recorded, recorded))

def _jacobians(outputs: list, inputs: list, recorded: bool) -> list[list[Tensor]]:
    """For each output and each input, the array of shape out.shape + in.shape, a walk per row."""
    blocks = []
    for out in outputs:
        needed, _ = _paths([out], inputs)
        rows = []
        for unit in np.eye(out.size, dtype=out.dtype).reshape(out.size, *out.shape):
            seed = as_tensor(unit) if recorded else unit
            rows.append(_gradients([(out, seed)], inputs, recorded, True, needed))
        blocks.append([])
        for i, x in enumerate(inputs):
            column = [row[i] for row in rows]
            block = stack(column) if column else _wrap(np.zeros(0, x.dtype))
            blocks[-1].append(block.reshape(out.shape + x.shape))
    return blocks

def jacobian(f: Callable, argnums: int | Sequence[int] = 0, *,
             argnum: int | None = None) -> Callable:
    """The function that returns the Jacobian of f: shape out.shape + in.shape, one walk per row.

    >>> print(jacobian(lambda x: x ** 2)(np.array([1.0, 2.0])))
    [[2. 0.]
     [0. 4.]]
    """
    argnums = argnums if argnum is None else argnum

    @functools.wraps(f)
    def jacobian_of_f(*args: Any, **kwargs: Any) -> Any:
        out, inputs, structure = _run("jacobian", f, args, argnums, kwargs)
        outputs, rebuild = _outputs("jacobian", out)
        recorded = bool(_paths(outputs, inputs)[1]) and _mode.recording
        return rebuild([structure(row) for row in _jacobians(outputs, inputs, recorded)])

    return jacobian_of_f

def hessian(f: Callable, argnums: int | Sequence[int] = 0, *,
            argnum: int | None = None) -> Callable:
    """The function that returns the Hessian of a scalar f: (size, size) for an argument of `size`.

    For an argument that is a nest of arrays, a nest of nests of such blocks. f runs once, its
    gradient is computed once and recorded, and each row is one walk along that record.

    >>> print(hessian(lambda x: (x ** 3).sum())(np.array([1.0, 2.0])))
    [[ 6.  0.]
     [ 0. 12.]]
    """
    argnums = argnums if argnum is None else argnum

    @functools.wraps(f)
    def hessian_of_f(*args: Any, **kwargs: Any) -> Any:
        out, inputs, structure = _run("hessian", f, args, argnums, kwargs)
        seed = _seed("hessian", out, None, True)
        needed, older = _paths([out], inputs)
        recorded = bool(older) and _mode.recording
        slopes = _gradients([(out, seed)], inputs, True, True, needed)
        rows = [structure([block.reshape(g.size, x.size) for block, x in zip(row, inputs)])
                for row, g in zip(_jacobians(slopes, inputs, recorded), slopes)]
        return structure(rows)

    return hessian_of_f

def checkpoint(f: Callable, *args: Any) -> Tensor:
    """f(*args) as it is, but its intermediate results are recomputed in the backward pass.

    Saves the memory of everything inside f, for the time of running it twice. f returns one Tensor;
    tensors it closes over (a module's parameters) get their gradients too. Random numbers drawn
    inside f are drawn again alike. (Griewank and Walther, 2000.)
    """
    if not _mode.recording:
        return f(*args)
    drawn = _rng().bit_generator.state
    which = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def run() -> tuple[Tensor, list, list]:
        start = _wrap(np.zeros(()), True)
        out, inputs, _ = _run("checkpoint", f, args, which, {})
        _outputs("checkpoint", out)
        return out, inputs, _paths([out], [start, *inputs], beyond=False)[1]

    out, _, closed_over = run()

    def pullback(g: Any, wanted: list) -> list:
        rng, again = _rng(), isinstance(g, Tensor)
        now, rng.bit_generator.state = rng.bit_generator.state, drawn
        with _recording(again):
            out, inputs, _ = run()
        rng.bit_generator.state = now
        targets = [*inputs, *closed_over]
        needed, _ = _paths([out], targets, beyond=False)
        parts = _gradients([(out, g)], targets, again, again, needed)
        return parts if again else [part._data for part in parts]

    operands = (*(args[i] for i in which), *closed_over)
    if not any(a.requires_grad for a in operands):
        return out.detach()
    return _record(out._data, checkpoint, operands, None, {}, pullback)

checkpoint.definition = None

def check_grad(f: Callable, *args: Any, order: int = 2, rtol: float = 1e-5,
               eps: float = 1e-5) -> float:
    """Compare derivatives of f with central differences, up to `order`: how to test an operation.

    f takes Tensors and returns one of any shape. It is tested at `args`, in float64, by each of
    them that holds floating-point numbers. Returns the largest error found, relative to
    max(1, |derivative|). Raises AssertionError that names the worst element and both its values.

    >>> check_grad(lambda x, y: x * np.sin(y), np.array([1.0, 2.0]), 0.5) < 1e-6
    True
    """
    if order < 1:
        raise ValueError(f"check_grad: order must be at least 1, not {order}")
    args = [np.array(_value(a), np.float64) if np.asarray(_value(a)).dtype.kind == "f" else a
            for a in args]
    which = [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    rng, weights = np.random.default_rng(0), None

    def weighted(*a: Any) -> Tensor:
        nonlocal weights
        y = f(*(as_tensor(x) if i in which else x for i, x in enumerate(a)))
        _outputs("check_grad", [y])
        weights = rng.uniform(0.5, 1.5, y.shape) if weights is None else weights
        return (y * weights).sum()

    worst = (-1.0, "")
    for i, exact in zip(which, grad(weighted, which)(*args)):
        for index in np.ndindex(args[i].shape):
            numeric, exact_here = _slope(weighted, args, i, index, eps), float(exact._data[index])
            error = builtins.abs(numeric - exact_here) / builtins.max(1, builtins.abs(numeric))
            error = math.inf if math.isnan(error) else error
            worst = builtins.max(worst, (error, f"by argument {i} at index {index}: numeric "
                                                f"{numeric:.9g}, analytic {exact_here:.9g}"))
    if worst[0] > rtol:
        raise AssertionError(f"check_grad: the derivative {worst[1]}")
    if order == 1 or not which:
        return worst[0]
    along = [rng.uniform(0.5, 1.5, args[i].shape) for i in which]
    return builtins.max(worst[0], check_grad(
        lambda *a: _inner("check_grad", grad(weighted, which)(*a), along, along),
        *args, order=order - 1, rtol=rtol, eps=eps))

def _slope(f: Callable, args: list, i: int, index: tuple, eps: float) -> float:
    """The central difference of f by one element of its argument i."""
    def at(step: float) -> float:
        moved = args[i].copy()
        moved[index] += step
        return float(f(*args[:i], moved, *args[i + 1:]))

    return (at(eps) - at(-eps)) / (2 * eps)

# ## Operations
#
# What does an operation consist of?
#
# Of a function on ndarrays, and its VJP rules, one per operand. A rule is given the cotangent `g`
# of the result, the result `y` and the operands, and returns the cotangent of its operand (before
# broadcasting is undone). `primitive` makes an operation of the two:
#
#     @primitive(lambda g, y, a, b: g * b,
#                lambda g, y, a, b: g * a)
#     def mul(a, b):
#         return a * b
#
# When the operation is called, Tensors among its operands are unwrapped, the function computes on
# bare arrays, and if one of them is tracked, the result remembers the operation and its operands.
#
# Some compositions deserve one fast kernel. A `fused` operation is introduced by its *definition*,
# a few lines of other operations, and then by a kernel that computes the same on bare arrays and
# returns the result together with a `pullback`, the whole backward step as a closure over whatever
# it wants to keep. A kernel is free to be clever, in place and without a thought for second
# derivatives, because under `create_graph` the walk differentiates the definition instead. So the
# definition is at once the explanation, the test oracle, and the source of every higher derivative.

def primitive(*rules: Callable, each: Callable | None = None) -> Callable:
    """Decorate a function on arrays to make it an operation with these VJP rules, one per operand.

    An operation on any number of operands gives one rule `each(i, g, y, *operands)` instead.
    """
    return lambda forward: _operation(forward, _Each(each) if each else rules, None)

def fused(definition: Callable) -> Callable:
    """Decorate a kernel `(arrays) -> (result, pullback)` to make it an operation.

    `pullback(g, wanted)` returns a cotangent for each operand, and may give None where `wanted` is
    False. It must not write to `g` or to what it keeps: the tape may be walked twice.
    """
    return lambda kernel: _operation(kernel, (), definition)

class _Each:
    """Rules for operand 0, 1, 2, ... out of one rule that is told which."""

    def __init__(self, rule: Callable) -> None:
        self.rule = rule

    def __getitem__(self, i: int) -> Callable:
        return functools.partial(self.rule, i)

_OLD_NUMPY = np.lib.NumpyVersion(np.__version__) < "2.0.0"

def _operation(forward: Callable, rules: Any, definition: Callable | None) -> Callable:
    @functools.wraps(forward)
    def operation(*args: Any, **params: Any) -> Tensor:
        values, constant, tracked = [], True, False
        for a in args:
            if isinstance(a, Tensor):
                constant, tracked = False, tracked or a.requires_grad
                if a._guard is not None and a._guard[1] is not None:
                    _renew_guard(a)
                a = a._data
            elif a.__class__ is list and a:
                convert = as_tensor if _holds_tensor(a) else np.asarray
                return operation(*(convert(b) if b is a else b for b in args), **params)
            values.append(a)
        if params and any(isinstance(p, Tensor) for p in params.values()):
            return operation(*inspect.signature(forward).bind(*args, **params).args)
        if constant and not any(isinstance(v, np.ndarray) for v in values):
            values = [np.asarray(v) if isinstance(v, (int, float)) else v for v in values]
        try:
            y, pullback = forward(*values, **params), None
            if definition is not None:
                y, pullback = y
            if y.dtype.kind != "f":
                y = _real_array(y)
        except (ValueError, TypeError, IndexError) as error:
            raise _at_the_call(operation, values, error) from None
        if _OLD_NUMPY:
            y = _with_weak_numbers(y, args)
        if tracked and _mode.recording:
            return _record(y, operation, args, values, params, pullback)
        return _wrap(y)

    operation.rules, operation.definition = rules, definition
    return operation

def _at_the_call(op: Callable, values: list, error: Exception) -> Exception:
    """The same error, saying which operation failed and on what shapes."""
    shapes = ", ".join(str(v.shape) for v in values if isinstance(v, (np.ndarray, np.generic)))
    kind = next(k for k in (IndexError, ValueError, TypeError) if isinstance(error, k))
    return kind(f"{op.__name__.strip('_')} of shapes {shapes}: {error}")

def _with_weak_numbers(y: Any, args: tuple) -> Any:
    """NumPy 1 computes float32 scalars with Python numbers in float64; NumPy 2 does not."""
    dtypes = {a.dtype for a in args if isinstance(a, (Tensor, np.ndarray))}
    conversion = any(isinstance(a, (type, np.dtype)) for a in args)  # astype
    return y.astype(dtypes.pop()) if len(dtypes) == 1 and not conversion else y

def _pull_by_definition(t: Tensor, g: Tensor, wanted: list) -> list:
    """What `_pull` returns, from a recording of the operation's definition at the same operands."""
    operands = [identity(a) if due else a for a, due in zip(t._args, wanted)]
    out = t._op.definition(*operands, **t._params)
    parts = iter(_gradients([(out, g)], list(itertools.compress(operands, wanted)), True, True))
    return [next(parts) if due else None for due in wanted]

# ### Element by element
#
# Most operations are one NumPy function and a rule of one line, so they stand in a table: the name,
# the function, the rules. The rule of a function of one variable is `g` times its derivative, and
# where the derivative is simpler in terms of the result, it says so: for tanh it is `1 - y*y`.

def _elementwise(name: str, forward: Callable, *rules: Callable) -> Callable:
    forward.__name__ = forward.__qualname__ = name
    forward.__doc__ = f"{name}, element by element, with NumPy's broadcasting and dtypes."
    return primitive(*rules)(forward)

identity = _elementwise("identity", lambda x: x, lambda g, y, x: g)
_copy = _elementwise("copy", lambda x: np.array(x), lambda g, y, x: g)
neg = _elementwise("neg", lambda x: -x, lambda g, y, x: -g)
add = _elementwise("add", lambda a, b: a + b, lambda g, y, a, b: g, lambda g, y, a, b: g)
sub = _elementwise("sub", lambda a, b: a - b, lambda g, y, a, b: g, lambda g, y, a, b: -g)
mul = _elementwise("mul", lambda a, b: a * b, lambda g, y, a, b: g * b, lambda g, y, a, b: g * a)
div = _elementwise("div", lambda a, b: np.true_divide(a, b),
                   lambda g, y, a, b: g / b, lambda g, y, a, b: -g * y / b)
exp = _elementwise("exp", lambda x: np.exp(x), lambda g, y, x: g * y)
expm1 = _elementwise("expm1", lambda x: np.expm1(x), lambda g, y, x: g * (y + 1))
log = _elementwise("log", lambda x: np.log(x), lambda g, y, x: g / x)
log1p = _elementwise("log1p", lambda x: np.log1p(x), lambda g, y, x: g / (1 + x))
sqrt = _elementwise("sqrt", lambda x: np.sqrt(x), lambda g, y, x: g / (2 * y))
sin = _elementwise("sin", lambda x: np.sin(x), lambda g, y, x: g * np.cos(x))
cos = _elementwise("cos", lambda x: np.cos(x), lambda g, y, x: -g * np.sin(x))
tanh = _elementwise("tanh", lambda x: np.tanh(x), lambda g, y, x: g * (1 - y * y))

# `log(1 + exp(x))` overflows at x = 89 in float32; NumPy's logaddexp(x, 0) is the same and does not.
# The derivative of softplus is sigmoid(x) = 1 - exp(-y), since exp(y) = 1 + exp(x).

logaddexp = _elementwise("logaddexp", lambda a, b: np.logaddexp(a, b),
                         lambda g, y, a, b: g * np.exp(a - _finite(y)),
                         lambda g, y, a, b: g * np.exp(b - _finite(y)))
softplus = _elementwise("softplus", lambda x: np.logaddexp(x, np.zeros((), x.dtype)),
                        lambda g, y, x: -g * np.expm1(-y))
sigmoid = _elementwise("sigmoid", lambda x: np.exp(-np.logaddexp(-x, np.zeros((), x.dtype))),
                       lambda g, y, x: g * (y * (1 - y)))

# At a kink any slope between the two sides is right. abs and relu take 0 there; where two operands
# tie, each gets half: `a >= b` and `a > b` count 2 for a win, 1 for a tie.

abs = _elementwise("abs", lambda x: np.abs(x), lambda g, y, x: g * np.sign(x))
relu = _elementwise("relu", lambda x: _positive_part(x), lambda g, y, x: g * np.greater(x, 0))
maximum = _elementwise("maximum", lambda a, b: np.maximum(a, b),
                       lambda g, y, a, b: (g * np.greater_equal(a, b) + g * np.greater(a, b)) * 0.5,
                       lambda g, y, a, b: (g * np.greater_equal(b, a) + g * np.greater(b, a)) * 0.5)
minimum = _elementwise("minimum", lambda a, b: np.minimum(a, b),
                       lambda g, y, a, b: (g * np.less_equal(a, b) + g * np.less(a, b)) * 0.5,
                       lambda g, y, a, b: (g * np.less_equal(b, a) + g * np.less(b, a)) * 0.5)

@primitive(None, lambda g, y, condition, a, b: np.where(condition, g, 0),
           lambda g, y, condition, a, b: np.where(condition, 0, g))
def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the bool array `condition` holds, else b. The condition has no gradient."""
    if np.asarray(condition).dtype.kind != "b":
        raise TypeError("the condition must be a bool array, such as x > 0")
    return np.where(condition, a, b)

@primitive(lambda g, y, x, low, high: g * np.equal(x, y))
def _clip(x: Any, low: Any, high: Any) -> Tensor:
    return np.clip(x, low, high)

def clip(x: Any, low: Any = None, high: Any = None) -> Tensor:
    """x limited to [low, high], which are constants; the gradient passes where x is within."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise TypeError("clip: the bounds are constants; for a Tensor use maximum and minimum")
    return _clip(x, low, high)

def _to_the(x: Any, p: Any) -> Any:
    """x ** p in array code; small powers are products, ten times faster than the C library's pow."""
    if isinstance(p, (int, float)):
        if p in (0, 1, 2, 3):
            return (np.ones_like, lambda x: x, lambda x: x * x, lambda x: x * x * x)[int(p)](x)
        if p in (0.5, -1):
            return np.sqrt(x) if p == 0.5 else 1 / x
    return np.power(x, p)

def _lower(p: Any) -> Any:
    """The exponent in the derivative p * x ** (p - 1). For p = 0 any will do, but 0 ** -1."""
    if isinstance(p, (int, float)):
        return p - 1 if p else 1
    return np.where(np.equal(p, 0), 1, p - 1)

@primitive(lambda g, y, x, p: g * (p * _to_the(x, _lower(p))),
           lambda g, y, x, p: g * (y * np.log(np.where(np.equal(x, 0), 1, x))))
def power(x: Any, p: Any) -> Tensor:
    """x ** p, element by element. The derivative by p is taken as 0 where x is 0."""
    return _to_the(x, p)

@primitive(lambda g, y, x, dtype: g)
def astype(x: Any, dtype: Any) -> Tensor:
    """x as another floating-point type; the gradient is converted back (by the walk)."""
    if np.dtype(dtype).kind != "f":
        raise TypeError(f"a Tensor holds floating-point numbers, not {np.dtype(dtype)}")
    return x.astype(dtype)

# **How to add an operation.** Write the function and one rule per operand, and check it; there is
# nothing to register. The rule is array code: operators, and functions of `np`.
#
#     @primitive(lambda g, y, x: g / (1 + x * x))
#     def arctan(x):
#         return np.arctan(x)
#
#     check_grad(arctan, np.array([-1.0, 0.5, 2.0]), order=3)
#
# **A fused one.** The definition of gelu is the approximation of Hendrycks and Gimpel (2016) that
# GPT-2 uses and PyTorch calls `approximate="tanh"`; the exact one needs erf, which NumPy lacks.

_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715

def _gelu_definition(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x * x * x)))

# With `t` for the tanh and `u` for its argument, `y = x/2 (1 + t)` and
# `dy/dx = (1 + t)/2 + x/2 (1 - t*t) du/dx`. The kernel goes over the array in blocks that stay in
# the processor's cache, since the arithmetic is quick and memory is what one waits for.

@fused(_gelu_definition)
def gelu(x: Any) -> Tensor:
    """The Gaussian error linear unit, `x * P(normal < x)`, in its tanh approximation."""
    x = _dense(x, x)
    y, t = np.empty_like(x), np.empty_like(x)
    for x_, y_, t_ in _blocks(x, y, t):
        np.tanh(x_ * (_GELU_SCALE + (_GELU_SCALE * _GELU_CUBIC) * (x_ * x_)), out=t_)
        np.multiply(0.5 * x_, 1 + t_, out=y_)

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dx = _dense(g, x), np.empty_like(x)
        for g_, x_, t_, dx_ in _blocks(g, x, t, dx):
            du = _GELU_SCALE + (3 * _GELU_SCALE * _GELU_CUBIC) * (x_ * x_)
            np.multiply(0.5 * g_, 1 + t_ + x_ * (1 - t_ * t_) * du, out=dx_)
        return (dx,)

    return y, pullback

_BLOCK = 1 << 14  # elements: a dozen float32 blocks fit a level-2 cache of 1 MiB

def _blocks(*arrays: np.ndarray) -> Iterator[list]:
    """Matching pieces of dense arrays with the same layout in memory, as flat views."""
    flat = [a.ravel(order="K") for a in arrays]
    for i in range(0, flat[0].size, _BLOCK):
        yield [a[i:i + _BLOCK] for a in flat]

def _dense(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """x, laid out in memory as `like` is, but without gaps; copied only if it must be."""
    out = np.empty_like(like)
    if x.strides == out.strides:
        return x
    out[...] = x
    return out

def _positive_part(x: np.ndarray) -> np.ndarray:
    """max(x, 0). NumPy compares two arrays several times faster than an array and a number."""
    x = _dense(x, x)
    y, zeros = np.empty_like(x), np.zeros(builtins.min(x.size, _BLOCK), x.dtype)
    for x_, y_ in _blocks(x, y):
        np.maximum(x_, zeros[:x_.size], out=y_)
    return y

# ### Shape
#
# These move elements about without touching them; the rule moves them back. Most of them return
# views, so they cost next to nothing.

@primitive(lambda g, y, x, shape: g.reshape(x.shape))
def _reshape(x: Any, shape: tuple) -> Tensor:
    return x.reshape(shape)

def _spread(args: tuple) -> tuple:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args

def reshape(x: Any, *shape: Any) -> Tensor:
    """x with another shape of the same size, `reshape(x, 2, -1)` or `reshape(x, (2, -1))`."""
    return _reshape(as_tensor(x), _spread(shape))

@primitive(lambda g, y, x, axes: np.transpose(g, tuple(np.argsort(axes))))
def _transpose(x: Any, axes: tuple) -> Tensor:
    return x.transpose(axes)

def transpose(x: Any, *axes: Any) -> Tensor:
    """x with its axes in another order; reversed if none is given."""
    x, axes = as_tensor(x), _spread(axes)
    axes = range(x.ndim)[::-1] if axes in ((), (None,)) else axes
    return _transpose(x, tuple(a + x.ndim if a < 0 else a for a in axes))

@primitive(lambda g, y, x, axis1, axis2: g.swapaxes(axis1, axis2))
def swapaxes(x: Any, axis1: int, axis2: int) -> Tensor:
    """x with two axes exchanged."""
    return x.swapaxes(axis1, axis2)

@primitive(lambda g, y, x, source, destination: np.moveaxis(g, destination, source))
def moveaxis(x: Any, source: Any, destination: Any) -> Tensor:
    """x with some axes moved to new positions; the others keep their order."""
    return np.moveaxis(x, source, destination)

@primitive(lambda g, y, x, axis: g.reshape(x.shape))
def expand_dims(x: Any, axis: int | tuple) -> Tensor:
    """x with a new axis of size 1 at each position `axis` of the result."""
    return np.expand_dims(x, axis)

@primitive(lambda g, y, x, axis=None: g.reshape(x.shape))
def squeeze(x: Any, axis: int | tuple | None = None) -> Tensor:
    """x without its axes of size 1, or without those named."""
    return np.squeeze(x, axis)

@primitive(lambda g, y, x, shape: g)
def broadcast_to(x: Any, shape: tuple) -> Tensor:
    """x stretched to `shape` by NumPy's rules. (The sum in the backward pass is the walk's.)"""
    return np.broadcast_to(x, shape)

def _slice(axis: int, start: int, stop: int) -> tuple:
    """The index that takes start:stop along an axis."""
    return (*[slice(None)] * axis, slice(start, stop))

@primitive(each=lambda i, g, y, *xs, axis: g[_slice(
    axis, start := builtins.sum(x.shape[axis] for x in xs[:i]), start + xs[i].shape[axis])])
def _concatenate(*xs: Any, axis: int) -> Tensor:
    return np.concatenate(xs, axis)

def concatenate(tensors: Sequence, axis: int | None = 0) -> Tensor:
    """The tensors joined end to end along an axis they have; None flattens them first."""
    tensors = [reshape(t, -1) if axis is None else as_tensor(t) for t in tensors]
    axis = axis or 0
    return _concatenate(*tensors, axis=axis + tensors[0].ndim if axis < 0 else axis)

def stack(tensors: Sequence, axis: int = 0) -> Tensor:
    """The tensors, all of one shape, side by side along a new axis."""
    shapes = {np.shape(t) for t in tensors}
    if len(shapes) != 1:
        raise ValueError(f"stack: needs tensors of one shape, and was given {sorted(shapes)}")
    return concatenate([expand_dims(t, axis) for t in tensors], axis)

def split(x: Any, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """x cut along an axis into equal sections (a number) or at indices (a list), as np.split does."""
    x = as_tensor(x)
    axis, = _axes(x, axis)
    sizes = [piece.shape[axis] for piece in np.split(x._data, sections, axis)]
    return [x[_slice(axis, stop - n, stop)] for n, stop in zip(sizes, np.cumsum(sizes).tolist())]

@primitive(lambda g, y, x, pad_width: g[tuple(slice(before, before + n) for (before, _), n in zip(
    np.broadcast_to(pad_width, (x.ndim, 2)).tolist(), x.shape))])
def pad(x: Any, pad_width: Any) -> Tensor:
    """x with zeros around it: `pad_width` is a number, (before, after), or one such pair per axis."""
    return np.pad(x, pad_width)

# Indexing takes elements out, scatter-add puts them back, and each is the other's rule. An index
# may name an element twice, and then both cotangents must arrive: hence *add*. `np.add.at` does
# that slowly; numbering the elements and counting with weights does the same and is fast.

@primitive(lambda g, y, x, index: _scatter(g, index, x.shape))
def getitem(x: Any, index: Any) -> Tensor:
    """x[index], with NumPy's basic and advanced indexing."""
    return x[index]

@primitive(lambda g, y, x, index, shape: g[index])
def scatter_add(x: Any, index: Any, shape: tuple) -> Tensor:
    """Zeros of `shape` with the elements of x added at `index`: the transpose of indexing."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(p is None or p is ... or isinstance(p, (int, np.integer, slice)) for p in parts):
        out = np.zeros(shape, x.dtype)
        out[index] = x  # a basic index names no element twice
        return out
    size = math.prod(shape)
    number = np.arange(size).reshape(shape)[index]
    weights = np.broadcast_to(x, number.shape).ravel()
    return np.bincount(number.ravel(), weights, size).reshape(shape).astype(x.dtype)

def _scatter(g: Any, index: Any, shape: tuple) -> Any:
    op = scatter_add if isinstance(g, Tensor) else scatter_add.__wrapped__
    return op(g, index, shape)

# ### Reductions
#
# A sum hands its cotangent to everything that was added up. `_restore` gives a reduced array the
# shape that stretches against what it was reduced from.

def _axes(x: Any, axis: Any) -> list[int]:
    """The axes that `axis` names, as numbers from 0."""
    named = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if any(a not in range(-x.ndim, x.ndim) for a in named):
        raise ValueError(f"axis {axis} is out of bounds for an array of shape {x.shape}")
    return [a % x.ndim for a in named]

def _restore(y: Any, x: Any, axis: Any, keepdims: bool) -> Any:
    reduced = _axes(x, axis)
    return y if keepdims else y.reshape(
        tuple(1 if i in reduced else n for i, n in enumerate(x.shape)))

def _stretch(y: Any, x: Any, axis: Any, keepdims: bool) -> Any:
    return np.broadcast_to(_restore(y, x, axis, keepdims), x.shape)

# NumPy's own reductions start anew for every row, which for short rows is most of their time. A
# sum over the last axes is faster as a product with ones, a row's maximum by reduceat.

@primitive(lambda g, y, x, axis=None, keepdims=False: _stretch(g, x, axis, keepdims))
def sum(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The sum over all elements, or over the axes given."""
    axes = sorted(_axes(x, axis))
    rows, row = x.shape[:x.ndim - len(axes)], math.prod(x.shape[x.ndim - len(axes):])
    if axes != list(range(len(rows), x.ndim)) or not rows or row > 4096 or x.dtype != np.float32:
        return np.sum(x, axis=axis, keepdims=keepdims)
    y = x.reshape(math.prod(rows), row) @ np.ones(row, x.dtype)
    return y.reshape(*rows, *[1] * (len(axes) if keepdims else 0))

@primitive(lambda g, y, x, axis=None, keepdims=False:
           _stretch(g * (y.size / builtins.max(1, x.size)), x, axis, keepdims))
def mean(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The mean over all elements, or over the axes given."""
    count = math.prod(x.shape[a] for a in _axes(x, axis))
    total = sum.__wrapped__ if count else np.mean  # np.mean warns of empty rows
    return total(x, axis=axis, keepdims=keepdims) / builtins.max(1, count)

def var(x: Any, axis: int | tuple | None = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """The variance, divided by n - ddof, as np.var has it (torch.var has ddof=1)."""
    x = as_tensor(x)
    count = math.prod(x.shape[a] for a in _axes(x, axis))
    if count <= ddof:
        raise ValueError(f"var of shape {x.shape} over axis {axis}: {count} elements are too few")
    centred = x - mean(x, axis, keepdims=True)
    return sum(centred * centred, axis, keepdims) / (count - ddof)

def std(x: Any, axis: int | tuple | None = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """The standard deviation, the square root of `var`."""
    return sqrt(var(x, axis, ddof, keepdims))

def _shared_by_ties(g: Any, y: Any, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    winners = np.equal(x, _restore(y, x, axis, keepdims))
    share = _restore(g, x, axis, keepdims) / np.sum(winners, axis=axis, keepdims=True)
    return np.where(winners, share, 0)

@primitive(_shared_by_ties)
def max(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The largest element; ties share the gradient evenly."""
    return np.max(x, axis=axis, keepdims=keepdims)

@primitive(_shared_by_ties)
def min(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The smallest element; ties share the gradient evenly."""
    return np.min(x, axis=axis, keepdims=keepdims)

# The exponentials of large numbers overflow, but softmax does not change when a constant is
# subtracted from all its inputs. Subtract the largest, and nothing exceeds exp(0) = 1.

def _finite(m: Any) -> Any:
    """m with 0 for what is infinite: in a row of nothing but -inf, -inf minus the largest is -inf."""
    return np.where(np.isfinite(m), m, 0)

@primitive(lambda g, y, x, axis=None, keepdims=False: _restore(g, x, axis, keepdims)
           * np.exp(x - _finite(_restore(y, x, axis, keepdims))))
def logsumexp(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))), without overflow. The derivative is softmax(x) = exp(x - y)."""
    m = _finite(np.max(x, axis=axis, keepdims=True)).astype(x.dtype)
    with np.errstate(divide="ignore"):  # log(0) = -inf is the right answer for a row of -inf
        y = np.log(np.sum(np.exp(x - m), axis=axis, keepdims=True)) + m
    return y if keepdims else np.squeeze(y, axis)

def _row_max(x: np.ndarray) -> np.ndarray:
    if x.size == 0 or not x.flags.c_contiguous:
        return np.max(x, axis=-1, keepdims=True)
    starts = np.arange(0, x.size, x.shape[-1])
    return np.maximum.reduceat(x.reshape(-1), starts).reshape(*x.shape[:-1], 1)

def _row_sum(x: Any) -> Any:
    return (x @ np.ones(x.shape[-1], x.dtype))[..., None]

def _along_last(op: Callable, x: Any, axis: int) -> Tensor:
    x = as_tensor(x)
    return op(x) if axis in (-1, x.ndim - 1) else swapaxes(op(swapaxes(x, axis, -1)), axis, -1)

# With `y = softmax(x)`, `dy_i/dx_j = y_i (1[i=j] - y_j)`, so `g` comes back as
# `y * (g - sum(g * y))`; for the logarithm of y it is `g - y * sum(g)`.

@primitive(lambda g, y, x: y * (g - _row_sum(g * y)))
def _softmax(x: Any) -> Tensor:
    e = x - _row_max(x)
    np.exp(e, out=e)
    e *= 1 / _row_sum(e)
    return e

@primitive(lambda g, y, x: g - np.exp(y) * _row_sum(g))
def _log_softmax(x: Any) -> Tensor:
    z = x - _row_max(x)
    z -= np.log(_row_sum(np.exp(z)))
    return z

def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along an axis."""
    return _along_last(_softmax, x, axis)

def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """The logarithm of softmax, exact also where softmax underflows."""
    return _along_last(_log_softmax, x, axis)

# ### Linear algebra
#
# For `Y = A B`, each `Y_ij = sum_k A_ik B_kj`. `A_ik` meets `B_kj` in every column j, so it
# receives `sum_j g_ij B_kj`, which is `g B^T`; likewise B receives `A^T g`. Nothing but the shapes
# would have allowed anything else.

@primitive(lambda g, y, a, b: g @ b.swapaxes(-1, -2),
           lambda g, y, a, b: a.swapaxes(-1, -2) @ g)
def _matmul(a: Any, b: Any) -> Tensor:
    return np.matmul(a, b)

def matmul(a: Any, b: Any) -> Tensor:
    """a @ b with NumPy's meaning for every rank: vectors, matrices, and stacks of matrices.

    Raises ValueError naming the shapes if they do not fit.
    """
    a, b = as_tensor(a), as_tensor(b)
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul of shapes {a.shape}, {b.shape}: the last axis of the first must "
                         "be as long as the last but one (or only) axis of the second")
    if a.ndim == 1:
        return matmul(expand_dims(a, 0), b).squeeze(0 if b.ndim == 1 else -2)
    if b.ndim == 1:
        return matmul(a, expand_dims(b, 1)).squeeze(-1)
    if a.ndim > 2 and b.ndim == 2:  # a stack times one matrix is one tall matrix times it
        return _matmul(_rows(a), b).reshape(*a.shape[:-1], b.shape[1])
    return _matmul(a, b)

def _rows(x: Any) -> Any:
    """x with all axes but the last made one, in array code."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

def bmm(a: Any, b: Any) -> Tensor:
    """The products of two stacks of matrices, (n, i, k) @ (n, k, j) -> (n, i, j), one by one."""
    a, b = as_tensor(a), as_tensor(b)
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0]:
        raise ValueError(f"bmm of shapes {a.shape}, {b.shape}: needs two equally long stacks")
    return matmul(a, b)

# `linear` is `x @ W^T + b` with W stored as (out, in), the way PyTorch stores it. All leading axes
# of x are one long axis to it, so each gradient is a single product.

@primitive(lambda g, y, x, weight, bias=None: (_rows(g) @ weight).reshape(x.shape),
           lambda g, y, x, weight, bias=None: _rows(g).swapaxes(0, 1) @ _rows(x),
           lambda g, y, x, weight, bias: g)
def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """x @ weight.T + bias: (..., in), (out, in), (out,) -> (..., out)."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"an input {x.shape} does not fit a weight {weight.shape}, (out, in)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias {bias.shape} does not fit a weight {weight.shape}, (out, in)")
    y = _rows(x) @ weight.T
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], len(weight))

# An einsum is a sum of products over indices, so by an operand it differentiates into an einsum of
# the cotangent with the other operands. Two cases need one more factor: an index that only this
# operand has was summed away, and comes back by a row of ones; an index it has twice picked a
# diagonal, and comes back by an identity matrix.

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

def _einsum_rule(i: int, g: Any, y: Any, *xs: Any, spec: str) -> Any:
    inputs, output = spec.split("->")
    names = inputs.split(",")
    others = [(names[k], x) for k, x in enumerate(xs) if k != i]
    factors, target = [(output, g), *others], ""
    for c, n in zip(names[i], xs[i].shape):
        if c in target:
            fresh = next(f for f in _LETTERS if f not in spec + target)
            factors.append((c + fresh, np.eye(n, dtype=g.dtype)))
            c = fresh
        elif not any(c in name for name, _ in factors):
            factors.append((c, np.ones(n, g.dtype)))
        target += c
    return np.einsum(",".join(n for n, _ in factors) + "->" + target, *(x for _, x in factors))

@primitive(each=_einsum_rule)
def _einsum(*xs: Any, spec: str) -> Tensor:
    return np.einsum(spec, *xs, optimize=len(xs) > 1)

def einsum(subscripts: str, *operands: Any) -> Tensor:
    """np.einsum with a subscripts string, `einsum("bij,bjk->bik", a, b)`; `...` is understood."""
    if not isinstance(subscripts, str):
        raise TypeError("einsum: the subscripts must be a string, such as 'ij,jk->ik'")
    xs = [as_tensor(x) for x in operands]
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    names, unused = inputs.split(","), "".join(c for c in _LETTERS if c not in subscripts)
    extra = [x.ndim - len(n) + 3 if "..." in n else 0 for n, x in zip(names, xs)]
    if len(names) != len(xs) or any(e < 0 or len(n) - 3 * ("..." in n) + e != x.ndim
                                    for n, x, e in zip(names, xs, extra)):
        raise ValueError(f"einsum: {subscripts!r} does not fit shapes {[x.shape for x in xs]}")
    dots = unused[:builtins.max(extra)]  # the letters that `...` stands for, aligned at the right
    if not arrow:
        once = sorted(c for c in set(inputs) - set(".,") if inputs.count(c) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    names = [n.replace("...", dots[len(dots) - e:]) for n, e in zip(names, extra)]
    return _einsum(*xs, spec=",".join(names) + "->" + output.replace("...", dots))

# ### Images
#
# A convolution slides a small window over an image and takes the same weighted sum everywhere.
# Said with arrays: *gather* all windows, then multiply by the weights, once. Images are stored as
# (N, C, H, W): batch, channels, height, width.

def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)

def _out_size(x: Any, kernel: tuple, stride: tuple) -> tuple[int, int]:
    """Height and width of the result of a window over x (already padded). Raises ValueError."""
    if x.ndim != 4:
        raise ValueError("images are (batch, channels, height, width)")
    if builtins.min(*kernel, *stride) < 1:
        raise ValueError(f"kernel size {kernel} and stride {stride} must be at least 1")
    if x.shape[2] < kernel[0] or x.shape[3] < kernel[1]:
        raise ValueError(f"a window of {tuple(kernel)} is larger than the (padded) image, "
                         f"{x.shape[2:]}: the result would be empty")
    return (x.shape[2] - kernel[0]) // stride[0] + 1, (x.shape[3] - kernel[1]) // stride[1] + 1

def _windows(x: Any, kernel: tuple, stride: tuple) -> Any:
    """All windows of x, (N, C, H, W) -> (N, C, kh, kw, oh, ow), in array code."""
    oh, ow = _out_size(x, kernel, stride)
    rows = np.arange(kernel[0])[:, None] + stride[0] * np.arange(oh)  # (kh, oh)
    columns = np.arange(kernel[1])[:, None] + stride[1] * np.arange(ow)  # (kw, ow)
    return x[:, :, rows[:, None, :, None], columns[None, :, None, :]]

# The kernels keep images with the batch last, (C, H, W, N) in memory, and show them as (N, C, H, W)
# through a transposed view. A line of an image is 14 numbers, and NumPy pays for every loop it
# begins; with the batch last, W * N numbers lie side by side. Elementwise operations keep the order
# in memory, so from one layer to the next nothing is moved.

def _batch_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(1, 2, 3, 0)

def _batch_first(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 0, 1, 2)

def _shifts(x: np.ndarray, kernel: tuple, stride: tuple) -> Iterator[tuple]:
    """For each position (i, j) in a window, the view of x (C, H, W, N) that all windows have there."""
    oh, ow = _out_size(_batch_first(x), kernel, stride)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield i, j, x[:, i:i + stride[0] * oh:stride[0], j:j + stride[1] * ow:stride[1]]

def _conv2d_definition(x: Any, weight: Any, bias: Any = None, stride: Any = 1,
                       padding: Any = 0) -> Any:
    (top, left), kernel = _pair(padding), weight.shape[2:]
    windows = _windows(np.pad(x, ((0, 0), (0, 0), (top, top), (left, left))), kernel, _pair(stride))
    y = np.einsum("ncijhw,ocij->nohw", windows, weight)
    return y if bias is None else y + bias.reshape(-1, 1, 1)

# The kernel lays the windows out as the columns of a matrix per image (im2col: Chellapilla and
# others, 2006), so the sum becomes a matrix product. Backward, the product is undone by its two
# transposes, and the gather by adding each position's share back where it was read.
@fused(_conv2d_definition)
def conv2d(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0) -> Tensor:
    """Convolve images (N, C, H, W) with weight (O, C, kh, kw): (N, O, oh, ow), as torch's conv2d.

    `stride` and `padding` are a number or a pair. Raises ValueError for channels that disagree
    and for an empty result.
    """
    (top, left), stride = _pair(padding), _pair(stride)
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] or top < 0 or left < 0:
        raise ValueError(f"images (N, C, H, W) and weight (O, C, kh, kw) must have the same C, and "
                         f"padding {padding} must not be negative")
    (n, c, h, w), (o, _, *kernel) = x.shape, weight.shape
    padded = np.zeros((c, h + 2 * top, w + 2 * left, n), x.dtype)
    padded[:, top:top + h, left:left + w] = _batch_last(x)
    oh, ow = _out_size(_batch_first(padded), kernel, stride)
    columns = np.empty((c, *kernel, oh, ow, n), x.dtype)
    for i, j, view in _shifts(padded, kernel, stride):
        columns[:, i, j] = view
    columns = columns.reshape(math.prod(weight.shape[1:]), oh * ow * n)  # (C kh kw, oh ow N)
    matrix = weight.reshape(o, -1)  # (O, C kh kw)
    y = matrix @ columns
    if bias is not None:
        y += bias[:, None]

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dx, dw, db = _batch_last(g).reshape(o, oh * ow * n), None, None, None
        if wanted[0]:
            back = (matrix.T @ g).reshape(c, *kernel, oh, ow, n)
            dx = np.zeros(padded.shape, x.dtype)
            for i, j, view in _shifts(dx, kernel, stride):
                view += back[:, i, j]
            dx = _batch_first(dx[:, top:top + h, left:left + w])
        if wanted[1]:  # (g @ columns.T, written so that OpenBLAS is twice as fast)
            dw = (columns @ g.T).T.reshape(weight.shape)
        if any(wanted[2:]):
            db = g @ np.ones(g.shape[1], g.dtype)
        return dx, dw, db

    return _batch_first(y.reshape(o, oh, ow, n)), pullback

def _kernel_and_stride(kernel_size: Any, stride: Any) -> tuple[tuple, tuple]:
    return _pair(kernel_size), _pair(kernel_size if stride is None else stride)

def _max_pool2d_definition(x: Any, kernel_size: Any, stride: Any = None) -> Any:
    windows = _windows(x, *_kernel_and_stride(kernel_size, stride))
    n, c, kh, kw, oh, ow = windows.shape
    windows = windows.reshape(n, c, kh * kw, oh, ow)
    first = np.argmax(windows, axis=2)
    n, c, h, w = np.ogrid[:n, :c, :oh, :ow]
    return windows[n, c, first, h, w]

@fused(_max_pool2d_definition)
def max_pool2d(x: Any, kernel_size: Any, stride: Any = None) -> Tensor:
    """The largest of each window, (N, C, H, W) -> (N, C, oh, ow). The first gets the gradient."""
    kernel, stride = _kernel_and_stride(kernel_size, stride)
    x, y = _batch_last(x), None
    for _, _, view in _shifts(x, kernel, stride):
        y = view.copy(order="K") if y is None else np.maximum(y, view, out=y)

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        dx, free = np.zeros_like(x), np.ones_like(y, bool)  # free: windows nobody has claimed yet
        g, pairs = _dense(_batch_last(g), y), zip(_shifts(x, kernel, stride), _shifts(dx, kernel, stride))
        for (_, _, view), (_, _, to) in pairs:
            hit = (view == y) & free
            free ^= hit
            to += g * hit
        return (_batch_first(dx),)

    return _batch_first(y), pullback

def _avg_pool2d_definition(x: Any, kernel_size: Any, stride: Any = None) -> Any:
    return np.mean(_windows(x, *_kernel_and_stride(kernel_size, stride)), axis=(2, 3))

@fused(_avg_pool2d_definition)
def avg_pool2d(x: Any, kernel_size: Any, stride: Any = None) -> Tensor:
    """The mean of each window, (N, C, H, W) -> (N, C, oh, ow)."""
    kernel, stride = _kernel_and_stride(kernel_size, stride)
    x, y, share = _batch_last(x), None, 1 / math.prod(kernel)
    for _, _, view in _shifts(x, kernel, stride):
        y = view.copy(order="K") if y is None else np.add(y, view, out=y)
    y *= share

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        dx, g = np.zeros_like(x), _batch_last(g) * share
        for _, _, view in _shifts(dx, kernel, stride):
            view += g
        return (_batch_first(dx),)

    return _batch_first(y), pullback

# ### Normalization
#
# Batch norm and layer norm do the same over different axes: subtract the mean, divide by the
# standard deviation, then scale and shift by learned numbers. Write `xhat = (x - mean) / s`. The
# cotangent of xhat is `h = g * weight`; going back through s and the mean takes away from h the two
# directions in which x can move without moving xhat, which are its mean and its part along xhat:
#
#     dx = (h - mean(h) - xhat * mean(h * xhat)) / s
#
# Both kernels are this line. (Ioffe and Szegedy, 2015; Ba, Kiros and Hinton, 2016.)

def _batch_norm_definition(x: Any, weight: Any, bias: Any, eps: float, note: Any = None) -> Any:
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *[1] * (x.ndim - 2))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    variance = np.mean(centred * centred, axis=axes, keepdims=True)
    return centred / np.sqrt(variance + eps) * weight.reshape(shape) + bias.reshape(shape)

# In float32 the mean of large numbers is off by a rounding error, which would pass for a signal
# where all numbers are equal. So the mean of what is left is subtracted once more.

@fused(_batch_norm_definition)
def _batch_norm(x: Any, weight: Any, bias: Any, eps: float, note: Any = None) -> Tensor:
    last = np.moveaxis(x, 0, -1)  # (C, ..., N), the order in which the image kernels leave it
    rows = last.reshape(x.shape[1], x.size // x.shape[1])
    count, ones = rows.shape[1], np.ones(rows.shape[1], x.dtype)
    mean = rows @ ones / count
    centred = rows - mean[:, None]
    rest = centred @ ones / count
    centred -= rest[:, None]
    variance = np.einsum("ij,ij->i", centred, centred) / count
    inverse = 1 / np.sqrt(variance + np.asarray(eps, x.dtype))
    if note is not None:
        note(mean + rest, variance, count)
    y = centred * (weight * inverse)[:, None]
    y += bias[:, None]

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dx = np.moveaxis(g, 0, -1).reshape(rows.shape), None
        total, along = g @ ones, np.einsum("ij,ij->i", g, centred) * inverse
        if wanted[0]:  # along is the sum of g * xhat
            dx = centred * (-along * inverse / count)[:, None]
            dx += g
            dx -= (total / count)[:, None]
            dx *= (weight * inverse)[:, None]
            dx = np.moveaxis(dx.reshape(last.shape), -1, 0)
        return dx, along, total

    return np.moveaxis(y.reshape(last.shape), -1, 0), pullback

def batch_norm(x: Any, running_mean: np.ndarray, running_var: np.ndarray, weight: Any, bias: Any,
               training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Normalize each channel of x, (N, C) or (N, C, H, W), over all else.

    In training by the batch's own mean and variance, and the running arrays move towards them
    (the variance unbiased, as PyTorch keeps it); otherwise by the running ones. Raises ValueError
    when training on one value per channel.
    """
    x = as_tensor(x)
    if x.ndim < 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"batch_norm: axis 1 of {x.shape} must have {len(weight)} channels")
    if not training:
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = as_tensor(weight) / np.sqrt(running_var + eps).astype(x.dtype)
        shift = bias - scale * running_mean.astype(x.dtype)
        return x * scale.reshape(shape) + shift.reshape(shape)
    if x.size // builtins.max(1, x.shape[1]) < 2:
        raise ValueError(f"batch_norm: training needs more than one value per channel, and the "
                         f"input is {x.shape}")

    def note(mean: np.ndarray, variance: np.ndarray, count: int) -> None:
        running_mean.__iadd__(momentum * (mean - running_mean))
        running_var.__iadd__(momentum * (variance * (count / (count - 1)) - running_var))

    return _batch_norm(x, weight, bias, eps, note=note)

def _layer_norm_definition(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Any:
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    y = centred / np.sqrt(variance + eps) * weight
    return y if bias is None else y + bias

@fused(_layer_norm_definition)
def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Normalize x over its last axis, scale by `weight` and shift by `bias`, both of that size."""
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError("the weight must be as long as the last axis of the input")
    rows = _rows(x)
    averages = np.full(rows.shape[1], 1 / rows.shape[1], x.dtype)
    xhat = rows - (rows @ averages)[:, None]
    xhat -= (xhat @ averages)[:, None]
    variance = np.einsum("ij,ij->i", xhat, xhat) / rows.shape[1]
    inverse = 1 / np.sqrt(variance + np.asarray(eps, x.dtype))
    xhat *= inverse[:, None]
    y = xhat * weight
    if bias is not None:
        y += bias

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = g.reshape(rows.shape)
        dx = None
        if wanted[0]:
            dx = g * weight
            along = np.einsum("ij,ij->i", dx, xhat) / rows.shape[1]
            dx -= (dx @ averages)[:, None]
            dx -= xhat * along[:, None]
            dx *= inverse[:, None]
            dx = dx.reshape(x.shape)
        dw = np.einsum("ij,ij->j", g, xhat) if wanted[1] else None
        return dx, dw, np.ones(len(g), g.dtype) @ g if any(wanted[2:]) else None

    return y.reshape(x.shape), pullback

# ### Attention, embedding, dropout
#
# Attention (Vaswani and others, 2017) lets each position of a sequence look at others: its *query*
# is compared with every *key*, and the *values* are averaged with the softmax of the scores as
# weights. Causal means that a position sees itself and what came before. Shapes: B sequences, H
# heads, T positions, D numbers per head.

def _attention_definition(q: Any, k: Any, v: Any, is_causal: bool = False) -> Any:
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]))  # (..., T, S)
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    return softmax(scores) @ v

# With E the exponentials of the scores and r one over their row sums, `Y = r (E V)`: the small
# result is normalized, not the large matrix. Backward, with `h = r g`, `dV = E^T h`, and what
# reaches the scores is `E * (h V^T - rowsum(h * Y))`, since the softmax's own row sum over T
# weights equals this one over D numbers (Dao and others, 2022).

def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, is_causal: bool,
            out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The result (written to `out`), E and r."""
    e = (q * np.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)) @ k.swapaxes(-1, -2)
    if is_causal:
        e += np.triu(np.full(e.shape[-2:], -np.inf, e.dtype), 1)
    e -= _row_max(e)
    np.exp(e, out=e)
    r = 1 / _row_sum(e)
    y = np.matmul(e, v, out=out)
    y *= r
    return y, e, r

def _attend_back(g: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, y: np.ndarray,
                 e: np.ndarray, r: np.ndarray, out: Any = (None, None, None)) -> tuple:
    """The gradients of q, k and v (written to `out`)."""
    scale, h = np.asarray(1 / math.sqrt(q.shape[-1]), q.dtype), g * r
    ds = h @ v.swapaxes(-1, -2)
    ds -= np.einsum("...i,...i->...", h, y)[..., None]
    ds *= e
    return (np.matmul(ds, k * scale, out=out[0]),
            np.matmul(ds.swapaxes(-1, -2), q * scale, out=out[1]),
            np.matmul(e.swapaxes(-1, -2), h, out=out[2]))

@fused(_attention_definition)
def scaled_dot_product_attention(q: Any, k: Any, v: Any, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: (..., T, D), (..., S, D), (..., S, D) -> (..., T, D).

    With `is_causal`, position i sees positions 0 to i. Raises ValueError if the shapes disagree.
    """
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError("queries, keys and values must agree in all leading axes; queries and keys"
                         " in the last axis; keys and values in the last but one")
    y, e, r = _attend(q, k, v, is_causal)
    return y, lambda g, wanted: _attend_back(g, q, k, v, y, e, r)

# A transformer computes q, k and v of all heads by one product, side by side in one array. Taking
# them out as views, and writing their gradients into views of one array, saves all the copying.

def _heads(qkv: Any, num_heads: int) -> Any:
    b, t, c = qkv.shape
    parts = qkv.reshape(b, t, 3, num_heads, c // (3 * num_heads))
    return parts.transpose(2, 0, 3, 1, 4)  # (3, B, H, T, D)

def _merge(y: Any) -> Any:
    b, h, t, d = y.shape
    return y.transpose(0, 2, 1, 3).reshape(b, t, h * d)

def _self_attention_definition(qkv: Any, num_heads: int) -> Any:
    heads = _heads(qkv, num_heads)
    return _merge(_attention_definition(heads[0], heads[1], heads[2], is_causal=True))

# The kernel takes a few sequences at a time, so that their E stays in the cache.

@fused(_self_attention_definition)
def causal_self_attention(qkv: Any, num_heads: int) -> Tensor:
    """Causal attention in `num_heads` heads: (B, T, 3 * C) -> (B, T, C); qkv is q, k, v in one."""
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"needs (B, T, 3 * C) with C divisible by {num_heads} heads")
    b, t, c = qkv.shape
    merged = np.empty((b, t, c // 3), qkv.dtype)
    y = merged.reshape(b, t, num_heads, -1 if merged.size else 0).transpose(0, 2, 1, 3)
    q, k, v = _heads(qkv, num_heads)  # each (B, H, T, D), as y
    step = builtins.max(1, 4 * _BLOCK // builtins.max(1, num_heads * t * t))
    parts = [slice(i, i + step) for i in range(0, b, step)]
    kept = [_attend(q[s], k[s], v[s], True, out=y[s]) for s in parts]

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = g.reshape(b, t, *y.shape[1::2]).transpose(0, 2, 1, 3)
        dqkv = np.empty_like(qkv)
        to = _heads(dqkv, num_heads)
        for s, (y_s, e, r) in zip(parts, kept):
            _attend_back(g[s], q[s], k[s], v[s], y_s, e, r, out=to[:, s])
        return (dqkv,)

    return merged, pullback

def _whole_numbers(what: str, ids: Any, count: int) -> np.ndarray:
    """`ids` as an integer array with all elements in 0..count-1, or an error that says why not."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what} must be a plain array of integers, not {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        bad = ids[(ids < 0) | (ids >= count)].reshape(-1)[0]
        raise ValueError(f"{what} must be from 0 to {count - 1}; found {bad}")
    return ids

def _embedding_definition(ids: Any, weight: Any) -> Any:
    return weight[ids]

# Looking up row i is multiplying by a one-hot vector. For the backward pass of a small vocabulary
# we really do multiply: one product beats adding up rows one at a time.
@fused(_embedding_definition)
def embedding(ids: Any, weight: Any) -> Tensor:
    """The rows of weight (V, C) named by an integer array: ids.shape + (C,)."""
    ids = _whole_numbers("ids", ids, len(weight))

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        if len(weight) > 1024:
            return None, scatter_add.__wrapped__(g, ids, weight.shape)
        one_hot = np.zeros((ids.size, len(weight)), g.dtype)
        one_hot[np.arange(ids.size), ids.reshape(-1)] = 1
        return None, one_hot.T @ g.reshape(ids.size, weight.shape[1])

    return weight[ids], pullback

def _check_dropout(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be at least 0 and below 1, not {p}")

def dropout(x: Any, p: float = 0.5, training: bool = True) -> Tensor:
    """In training, set elements to 0 with probability p and scale the others by 1 / (1 - p)."""
    _check_dropout(p)
    x = as_tensor(x)
    if not training or p == 0:
        return x
    keep = _rng().random(x.shape, np.float32) >= p
    return x * (keep * np.asarray(1 / (1 - p), x.dtype))

# ### Losses

def _cross_entropy_definition(logits: Any, targets: Any) -> Any:
    return -np.mean(log_softmax(logits)[np.arange(len(targets)), targets])

# The gradient of the softmax's logarithm is what makes this loss pleasant: `softmax - one_hot`.
@fused(_cross_entropy_definition)
def cross_entropy(logits: Any, targets: Any) -> Tensor:
    """The mean of -log softmax(logits)[target]: logits (N, C), integer targets (N,) -> a scalar.

    Raises ValueError for shapes that disagree or targets outside 0..C-1, TypeError for targets
    that are not a plain integer array.
    """
    if logits.ndim != 2 or np.shape(targets) != logits.shape[:1]:
        raise ValueError("logits must be (N, C) and targets (N,); of a sequence, reshape logits "
                         "(B, T, C) to (B * T, C) and targets to (B * T,)")
    if len(logits) == 0:
        raise ValueError("the mean over no rows at all is undefined")
    targets = _whole_numbers("targets", targets, logits.shape[1])
    rows = np.arange(len(targets))
    p = logits - _row_max(logits)
    picked = p[rows, targets]
    np.exp(p, out=p)
    total = _row_sum(p)[:, 0]
    loss = np.mean(np.log(total) - picked)

    def pullback(g: np.ndarray, wanted: list) -> tuple:
        dx = p * (g / len(rows) / total)[:, None].astype(p.dtype)
        dx[rows, targets] -= np.asarray(g / len(rows), p.dtype)
        return (dx, None)

    return loss, pullback

def _prediction_and_target(name: str, prediction: Any, target: Any) -> tuple[Tensor, Any]:
    """Both, of one shape and dtype. No loss broadcasts: (N, 1) against (N,) would be (N, N)."""
    prediction = as_tensor(prediction)
    target = as_tensor(target)
    if not target.requires_grad:
        target = target.astype(prediction.dtype)
    if prediction.shape != target.shape:
        raise ValueError(f"{name}: prediction {prediction.shape} and target {target.shape} must have"
                         " one shape; reshape one of them, for a loss does not broadcast")
    if prediction.size == 0:
        raise ValueError(f"{name}: the mean over no elements is undefined")
    return prediction, target

def mse_loss(prediction: Any, target: Any) -> Tensor:
    """The mean squared difference of two arrays of one shape."""
    prediction, target = _prediction_and_target("mse_loss", prediction, target)
    difference = prediction - target
    return mean(difference * difference)

def binary_cross_entropy_with_logits(logits: Any, target: Any) -> Tensor:
    """The mean of -log probability, where sigmoid(logits) is the probability of target 1.

    With s the sigmoid, `-(t log s + (1-t) log(1-s)) = softplus(x) - t x`, which never overflows.
    """
    logits, target = _prediction_and_target("binary_cross_entropy_with_logits", logits, target)
    return mean(softplus(logits) - logits * target)

def binary_cross_entropy(probability: Any, target: Any) -> Tensor:
    """The same of probabilities in [0, 1], their logarithms held above -100 as PyTorch does."""
    p, target = _prediction_and_target("binary_cross_entropy", probability, target)
    if not (np.all(p._data >= 0) and np.all(p._data <= 1)):
        raise ValueError("binary_cross_entropy: probabilities must lie in [0, 1]; for other numbers"
                         " there is binary_cross_entropy_with_logits")
    least = math.exp(-100)
    return -mean(target * log(clip(p, least)) + (1 - target) * log(clip(1 - p, least)))

def hinge_loss(prediction: Any, target: Any) -> Tensor:
    """The mean of max(0, 1 - target * prediction), for targets -1 and 1."""
    prediction, target = _prediction_and_target("hinge_loss", prediction, target)
    if not np.all(np.equal(np.abs(_value(target)), 1)):
        raise ValueError("hinge_loss: targets must be -1 or 1")
    return mean(relu(1 - prediction * target))

# ### What a Tensor can do, and what NumPy may ask of it
#
# The operations exist; here they become operators, methods and NumPy's own functions.

for _name, _op in dict(add=add, sub=sub, mul=mul, truediv=div, pow=power, matmul=matmul).items():
    setattr(Tensor, f"__{_name}__", _op)
    setattr(Tensor, f"__r{_name}__", lambda self, other, op=_op: op(other, self))
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Tensor, _name, lambda self, other, compare=_name: getattr(
        np.asarray(self._data), compare)(_value(other)))
for _op in (abs, exp, log, sqrt, sin, cos, tanh, sigmoid, relu, clip, astype, _copy, sum, mean, var,
            std, max, min, reshape, transpose, swapaxes, squeeze):
    setattr(Tensor, _op.__name__, _op)
Tensor.__neg__, Tensor.__abs__, Tensor.__getitem__ = neg, abs, getitem
Tensor.flatten = Tensor.ravel = lambda self: reshape(self, -1)
Tensor.dot = lambda self, other: _dot(self, other)
Tensor.argmax = lambda self, axis=None: np.argmax(self._data, axis)
Tensor.argmin = lambda self, axis=None: np.argmin(self._data, axis)
Tensor.tolist = lambda self: self._data.tolist()

def _dot(a: Any, b: Any) -> Tensor:
    if np.ndim(b) > 2:
        raise TypeError(f"np.dot with a Tensor of shape {np.shape(b)}: use np.matmul or np.einsum")
    return mul(a, b) if np.ndim(a) == 0 or np.ndim(b) == 0 else matmul(a, b)

def _reduction(op: Callable) -> Callable:
    """A reduction with the arguments that NumPy passes."""
    return lambda a, axis=None, dtype=None, *, keepdims=False, **ddof: op(
        as_tensor(a) if dtype is None else astype(a, dtype), axis, keepdims=keepdims, **ddof)

def _pad_with_zeros(array: Any, pad_width: Any, mode: str = "constant") -> Tensor:
    if mode != "constant":
        raise TypeError(f"np.pad of a Tensor: nanoad has no derivative for mode {mode!r}")
    return pad(array, pad_width)

_UFUNCS = {
    np.add: add, np.subtract: sub, np.multiply: mul, np.true_divide: div, np.power: power,
    np.negative: neg, np.positive: identity, np.absolute: abs, np.fabs: abs,
    np.square: lambda x: x * x, np.reciprocal: lambda x: 1 / x, np.exp: exp, np.expm1: expm1,
    np.log: log, np.log1p: log1p, np.logaddexp: logaddexp, np.sqrt: sqrt, np.sin: sin, np.cos: cos,
    np.tan: lambda x: sin(x) / cos(x), np.tanh: tanh, np.maximum: maximum, np.minimum: minimum,
    np.matmul: matmul,
}
_FUNCTIONS = {
    np.sum: _reduction(sum), np.mean: _reduction(mean), np.var: _reduction(var),
    np.std: _reduction(std), np.max: _reduction(max), np.min: _reduction(min),
    np.amax: _reduction(max), np.amin: _reduction(min), np.where: where,
    np.clip: lambda a, a_min=None, a_max=None, *, min=None, max=None: clip(
        a, min if a_min is None else a_min, max if a_max is None else a_max),
    np.reshape: lambda a, shape=None, *, newshape=None: reshape(
        a, newshape if shape is None else shape),
    np.ravel: lambda a: reshape(a, -1), np.transpose: lambda a, axes=None: transpose(a, axes),
    np.swapaxes: swapaxes, np.moveaxis: lambda a, source, destination: moveaxis(a, source, destination),
    np.expand_dims: lambda a, axis: expand_dims(a, axis), np.copy: lambda a: _copy(a),
    np.squeeze: lambda a, axis=None: squeeze(a, axis), np.pad: _pad_with_zeros,
    np.broadcast_to: lambda array, shape: broadcast_to(array, shape),
    np.concatenate: lambda arrays, axis=0: concatenate(arrays, axis),
    np.stack: lambda arrays, axis=0: stack(arrays, axis),
    np.vstack: lambda tup: concatenate([expand_dims(t, 0) if np.ndim(t) == 1 else t for t in tup]),
    np.split: lambda ary, indices_or_sections, axis=0: split(ary, indices_or_sections, axis),
    np.dot: lambda a, b: _dot(a, b), np.vdot: lambda a, b: _dot(reshape(a, -1), reshape(b, -1)),
    np.outer: lambda a, b: reshape(a, -1, 1) * reshape(b, 1, -1),
    np.einsum: lambda subscripts, *operands, optimize=None: einsum(subscripts, *operands),
    np.full_like: lambda a, fill_value, dtype=None: broadcast_to(
        astype(fill_value, dtype or a.dtype), a.shape),
}
for _function, _op in _FUNCTIONS.items():  # a TypeError for a wrong argument shall say whose it was
    if "<lambda>" in _op.__qualname__:
        _op.__qualname__ = f"np.{_function.__name__}"

# Their derivative is zero wherever it exists: they give plain arrays, and so do questions of shape.
_WITHOUT_GRADIENT = {getattr(np, _name) for _name in (
    "sign floor ceil trunc rint round floor_divide isnan isinf isfinite signbit equal not_equal less"
    " less_equal greater greater_equal logical_and logical_or logical_not logical_xor isneginf"
    " isposinf isclose allclose array_equal argmax argmin argsort searchsorted nonzero"
    " count_nonzero any all shape ndim size zeros_like ones_like empty_like array2string array_repr"
    " array_str result_type may_share_memory shares_memory").split()}

# ## Modules
#
# Where do the numbers live that training changes?
#
# A Module is an object with Parameters among its attributes, and other modules that have some of
# their own. There is no registry: whoever wants the parameters looks through the attributes, in
# the order in which they were set. An ndarray attribute (batch norm's running mean) is saved with
# the parameters but not trained. Names and shapes are PyTorch's, so its state_dict is ours too.

class Parameter(Tensor):
    """A Tensor that its module trains."""

    __slots__ = ()

class Module:
    """The base of all layers and networks: give it attributes in `__init__`, write `forward`.

    Calling a module runs `forward`, after raw floating-point arrays among the arguments have been
    converted to the parameters' dtype. Lists that hold Tensors are stacked.
    """

    training = True

    def forward(self, *args: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward method")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*(a if isinstance(a, Tensor) else self._argument(a) for a in args), **kwargs)

    def _argument(self, a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            a = as_tensor(a) if _holds_tensor(a) else np.asarray(a)
        if isinstance(a, np.ndarray) and a.dtype.kind == "f":
            first = next(self._parameters(), None)
            a = a if first is None else a.astype(first.dtype, copy=False)
        return a

    def _named(self, prefix: str = "") -> Iterator[tuple[str, Module, str, Any]]:
        """Everything saved, as (dotted name, its module, its attribute, it), in order."""
        for key, value in vars(self).items():
            for name, item in _numbered(prefix + key, value):
                if isinstance(item, Module):
                    yield from item._named(name + ".")
                elif isinstance(item, (Parameter, np.ndarray)):
                    yield name, self, key, item

    def _parameters(self) -> Iterator[Parameter]:
        return (item for _, _, _, item in self._named() if isinstance(item, Parameter))

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """(dotted name, parameter) pairs; one that occurs twice is listed once."""
        named: dict = {}
        for name, _, _, item in self._named():
            if isinstance(item, Parameter):
                named.setdefault(id(item), (name, item))
        return list(named.values())

    def parameters(self) -> list[Parameter]:
        """The parameters, each once."""
        return [parameter for _, parameter in self.named_parameters()]

    def modules(self) -> list[Module]:
        """This module and all below it."""
        below = [item for key, value in vars(self).items() for _, item in _numbered(key, value)]
        return [self] + [m for child in below if isinstance(child, Module) for m in child.modules()]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and running statistics by their dotted names, as PyTorch has them."""
        return {name: np.array(_value(item)) for name, _, _, item in self._named()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Copy arrays into this module. Raises KeyError for missing or, if strict, unknown names, and
        ValueError for shapes that differ; then nothing has been changed."""
        own = {name: _value(item) for name, _, _, item in self._named()}
        missing = [name for name in own if name not in state]
        unknown = [name for name in state if name not in own] if strict else []
        if missing or unknown:
            raise KeyError(f"load_state_dict: missing {missing[:5]}, not in this {type(self).__name__}: {unknown[:5]}")
        arrays = {name: np.asarray(_value(state[name]), own[name].dtype) for name in own}
        for name, array in arrays.items():
            if array.shape != own[name].shape:
                raise ValueError(f"load_state_dict: {name} has shape {array.shape}; this module needs {own[name].shape}")
        for name, _, _, item in self._named():
            if isinstance(item, Parameter):
                _note_write(item)
            own[name][...] = arrays[name]

    def astype(self, dtype: Any) -> Module:
        """Convert all parameters and running statistics in place, for instance to float64; returns self."""
        if np.dtype(dtype).kind != "f":
            raise TypeError(f"Module.astype: parameters are floating-point numbers, not {dtype}")
        for _, module, key, item in list(self._named()):
            if isinstance(item, Parameter):
                item._data, item.grad = item._data.astype(dtype), None
                _note_write(item)
            else:
                setattr(module, key, item.astype(dtype))
        return self

    def train(self, mode: bool = True) -> Module:
        """Set this and all modules below to training, which dropout and batch norm ask about."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """The opposite of train()."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def __repr__(self) -> str:
        below, details = "", []
        for name, item in (pair for items in vars(self).items() for pair in _numbered(*items)):
            if isinstance(item, Module):
                below += f"\n  ({name}): " + repr(item).replace("\n", "\n  ")
            elif isinstance(item, Tensor):
                details.append(f"{name}: {item.shape}")
            elif isinstance(item, (int, float, tuple)) and name != "training":
                details.append(f"{name}={item}")
        return f"{type(self).__name__}({', '.join(details)}{below}{chr(10) * bool(below)})"

def _numbered(name: str, value: Any) -> list[tuple[str, Any]]:
    """(name, value), or for a list of modules or parameters (name.0, ...), (name.1, ...), ..."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, (Module, Parameter)) for v in value):
        return [(f"{name}.{i}", v) for i, v in enumerate(value)]
    return [(name, value)]

def _uniform(shape: tuple, fan_in: int) -> Parameter:
    """PyTorch's default for linear and convolutional layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return Parameter(_rng().uniform(-bound, bound, shape).astype(np.float32))

def _positive(name: str, **sizes: int) -> None:
    for key, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}: {key} must be a positive integer, not {size!r}")

class Linear(Module):
    """x @ weight.T + bias, weight (out_features, in_features): (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        _positive("Linear", in_features=in_features, out_features=out_features)
        self.weight = _uniform((out_features, in_features), in_features)
        self.bias = _uniform((out_features,), in_features) if bias else None

    def forward(self, x: Any) -> Tensor:
        return linear(as_tensor(x), self.weight, self.bias)

class Conv2d(Module):
    """`conv2d` with weight (out_channels, in_channels, kh, kw): (N, C, H, W) -> (N, O, oh, ow)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1,
                 padding: Any = 0, bias: bool = True) -> None:
        _positive("Conv2d", in_channels=in_channels, out_channels=out_channels)
        kernel, self.stride, self.padding = _pair(kernel_size), stride, padding
        _positive("Conv2d", kernel_height=kernel[0], kernel_width=kernel[1])
        fan_in = in_channels * math.prod(kernel)
        self.weight = _uniform((out_channels, in_channels, *kernel), fan_in)
        self.bias = _uniform((out_channels,), fan_in) if bias else None

    def forward(self, x: Any) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)

class _Pool(Module):
    def __init__(self, kernel_size: Any, stride: Any = None) -> None:
        self.kernel_size, self.stride = kernel_size, stride

class MaxPool2d(_Pool):
    """`max_pool2d`: the largest element of each window."""

    def forward(self, x: Any) -> Tensor:
        return max_pool2d(x, self.kernel_size, self.stride)

class AvgPool2d(_Pool):
    """`avg_pool2d`: the mean of each window."""

    def forward(self, x: Any) -> Tensor:
        return avg_pool2d(x, self.kernel_size, self.stride)

class BatchNorm2d(Module):
    """`batch_norm` over the channels of (N, C, H, W), with running statistics for evaluation."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        _positive("BatchNorm2d", num_features=num_features)
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = (Parameter(f(num_features, np.float32)) for f in (np.ones, np.zeros))
        self.running_mean, self.running_var = (f(num_features, np.float32) for f in (np.zeros, np.ones))

    def forward(self, x: Any) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                          self.training, self.momentum, self.eps)

class LayerNorm(Module):
    """`layer_norm` over the last axis."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, bias: bool = True) -> None:
        _positive("LayerNorm", normalized_shape=normalized_shape)
        self.eps, self.weight = eps, Parameter(np.ones(normalized_shape, np.float32))
        self.bias = Parameter(np.zeros(normalized_shape, np.float32)) if bias else None

    def forward(self, x: Any) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

class Embedding(Module):
    """A table (num_embeddings, embedding_dim) looked up by integers: (...) -> (..., embedding_dim)."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        _positive("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.weight = Parameter(_rng().standard_normal((num_embeddings, embedding_dim), np.float32))

    def forward(self, ids: Any) -> Tensor:
        return embedding(ids, self.weight)

class Dropout(Module):
    """`dropout`: active in training, nothing in evaluation."""

    def __init__(self, p: float = 0.5) -> None:
        _check_dropout(p)
        self.p = p

    def forward(self, x: Any) -> Tensor:
        return dropout(x, self.p, self.training)

class Flatten(Module):
    """(N, ...) -> (N, everything else)."""

    def forward(self, x: Any) -> Tensor:
        return reshape(x, len(x), -1) if len(x) else reshape(x, 0, math.prod(x.shape[1:]))

def _layer(name: str, function: Callable) -> type:
    """A module without parameters that does what a function does."""
    return type(name, (Module,), {"forward": lambda self, *args: function(*args), "__module__": __name__,
                                  "__doc__": f"`{function.__name__}` as a module."})

ReLU, GELU, Tanh, Sigmoid = (_layer(name, f) for name, f in (
    ("ReLU", relu), ("GELU", gelu), ("Tanh", tanh), ("Sigmoid", sigmoid)))
CrossEntropy, MSE = _layer("CrossEntropy", cross_entropy), _layer("MSE", mse_loss)

class Sequential(Module):
    """The layers given, one after another."""

    def __init__(self, *layers: Module) -> None:
        for i, layer in enumerate(layers):
            setattr(self, str(i), layer)

    def __getitem__(self, i: int) -> Module:
        return [m for m in vars(self).values() if isinstance(m, Module)][i]

    def __len__(self) -> int:
        return builtins.sum(isinstance(m, Module) for m in vars(self).values())

    def forward(self, x: Any) -> Tensor:
        for layer in self:
            x = layer(x)
        return x

class MLP(Sequential):
    """Linear layers of these sizes with relu between them: (N, nin) -> (N, nouts[-1]).

    A last size of 1 is dropped from the result, as micrograd's MLP does: (N, nin) -> (N,) and
    (nin,) -> a scalar.

    >>> MLP(2, [16, 1])(np.zeros((5, 2))).shape
    (5,)
    """

    def __init__(self, nin: int, nouts: Sequence[int]) -> None:
        _positive("MLP", layers=len(nouts))
        layers: list[Module] = []
        for fan_in, fan_out in itertools.pairwise([nin, *nouts]):
            layers += [Linear(fan_in, fan_out), ReLU()]
        super().__init__(*layers[:-1])

    def forward(self, x: Any) -> Tensor:
        y = super().forward(x)
        return y.squeeze(-1) if y.shape[-1] == 1 else y

# ### A transformer
#
# The GPT below is the decoder of "Language Models are Unsupervised Multitask Learners" (Radford
# and others, 2019). Each block adds two things to a running sum, the residual stream: what the
# positions learn from one another (attention), and what each makes of it by itself (the MLP).

class _KeysAndValues:
    """What one attention layer has seen of a text: keys and values of shape (B, H, T, D)."""

    def __init__(self) -> None:
        self.k: np.ndarray | None = None
        self.v: np.ndarray | None = None

    def extend(self, k: np.ndarray, v: np.ndarray) -> None:
        self.k = k if self.k is None else np.concatenate([self.k, k], axis=2)
        self.v = v if self.v is None else np.concatenate([self.v, v], axis=2)

class MultiHeadAttention(Module):
    """Causal self-attention in `num_heads` heads: (B, T, C) -> (B, T, C)."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = False) -> None:
        _positive("MultiHeadAttention", embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"MultiHeadAttention: {embed_dim} channels do not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv, self.proj = Linear(embed_dim, 3 * embed_dim, bias), Linear(embed_dim, embed_dim, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Any, seen: _KeysAndValues | None = None) -> Tensor:
        qkv = self.qkv(x)  # (B, T, 3C)
        if seen is None:
            return self.dropout(self.proj(causal_self_attention(qkv, self.num_heads)))
        q, k, v = _heads(qkv._data, self.num_heads)  # each (B, H, T, D)
        seen.extend(k, v)
        # A single new position sees all before it, so only the first call needs the causal mask.
        y, _, _ = _attend(q, seen.k, seen.v, is_causal=q.shape[2] > 1)
        return self.proj(_wrap(_merge(y)))

class _Block(Module):
    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        self.ln1, self.ln2 = LayerNorm(embed_dim), LayerNorm(embed_dim)
        self.attn = MultiHeadAttention(embed_dim, num_heads, dropout)
        self.mlp = Sequential(Linear(embed_dim, 4 * embed_dim), GELU(), Linear(4 * embed_dim, embed_dim),
                              Dropout(dropout))

    def forward(self, x: Tensor, seen: _KeysAndValues | None = None) -> Tensor:
        x = x + self.attn(self.ln1(x), seen)
        return x + self.mlp(self.ln2(x))

class GPT(Module):
    """A decoder-only transformer: integers (B, T), T <= block_size -> logits (B, T, vocab_size).

    Learned positions, pre-norm blocks, and one matrix for embedding tokens and scoring them (Press
    and Wolf, 2017). Weights start at N(0, 0.02), those that write to the residual stream smaller
    by sqrt(2 * num_layers), as GPT-2's.
    """

    def __init__(self, vocab_size: int, embed_dim: int, num_heads: int, num_layers: int, block_size: int,
                 dropout: float = 0.0) -> None:
        _positive("GPT", vocab_size=vocab_size, num_layers=num_layers, block_size=block_size)
        self.block_size = block_size
        self.tok_emb, self.pos_emb = Embedding(vocab_size, embed_dim), Embedding(block_size, embed_dim)
        self.dropout = Dropout(dropout)
        self.blocks = [_Block(embed_dim, num_heads, dropout) for _ in range(num_layers)]
        self.ln_f = LayerNorm(embed_dim)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = 0.02 / math.sqrt(2 * num_layers) if name.endswith(("proj.weight", "mlp.2.weight")) else 0.02
                p._data[...] = _rng().standard_normal(p.shape, np.float32) * np.float32(scale)
            elif name.endswith("bias"):
                p._data[...] = 0

    def forward(self, ids: Any, seen: list[_KeysAndValues] | None = None) -> Tensor:
        ids = _whole_numbers("GPT: token ids", ids if isinstance(ids, Tensor) else np.asarray(ids), len(self.tok_emb.weight))
        start = 0 if seen is None or seen[0].k is None else seen[0].k.shape[2]
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.block_size - start:
            raise ValueError(f"GPT: token ids must be (batch, time) with time from 1 to {self.block_size}, not {ids.shape}")
        x = self.tok_emb(ids) + self.pos_emb(np.arange(start, start + ids.shape[1]))  # (B, T, C)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if seen is None else seen[i])
        return linear(self.ln_f(x), self.tok_emb.weight)  # (B, T, V)

    def generate(self, idx: Any, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> np.ndarray:
        """Continue integer sequences (B, T) by sampling: (B, T + max_new_tokens).

        Keys and values of what was read are kept, so a new token costs one position's work. Once the
        window of block_size is full it slides, and every position changes its place; then the
        window is read anew. `temperature` divides the logits; `top_k` samples among the k likeliest.
        """
        idx = np.array(idx)
        if idx.ndim != 2 or idx.shape[1] == 0 or max_new_tokens < 0:
            raise ValueError(f"generate: token ids {idx.shape} must be (batch, time) with time at "
                             f"least 1, and max_new_tokens {max_new_tokens} not negative")
        if not temperature > 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"generate: temperature {temperature} must be above 0, and top_k {top_k}"
                             " at least 1")
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            with no_grad():
                seen = None
                for _ in range(max_new_tokens):
                    full = seen is None or seen[0].k.shape[2] == self.block_size
                    if full:
                        seen = [_KeysAndValues() for _ in self.blocks]
                    logits = self(idx[:, -self.block_size:] if full else idx[:, -1:], seen)._data[:, -1]
                    idx = np.concatenate([idx, _sample(logits / np.float32(temperature), top_k)], axis=1)
        finally:
            for module, mode in modes:
                module.training = mode
        return idx

def _sample(logits: np.ndarray, top_k: int | None) -> np.ndarray:
    """One index per row of logits (B, V), drawn from their softmax: (B, 1)."""
    if top_k is not None and top_k < logits.shape[1]:
        least = np.partition(logits, -top_k, axis=1)[:, -top_k:].min(axis=1, keepdims=True)
        logits = np.where(logits < least, -np.inf, logits)
    # The Gumbel-max trick: argmax(logits + Gumbel noise) is a draw from softmax(logits).
    return np.argmax(logits + _rng().gumbel(size=logits.shape), axis=1)[:, None]

# ## Optimizers
#
# Gradients say which way is down. How far should each parameter go?
#
# An update rule is a few lines on arrays, and a network has fifty small arrays of parameters. To
# call NumPy ten times on each takes longer than the arithmetic. So the optimizer works on one flat
# array that all parameters are copied into, and its own state is as flat. It goes over it in
# pieces that fit the cache, then copies the results back.

class Optimizer:
    """The base of all optimizers. A subclass names its state arrays and writes `_update`."""

    _state_names: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Tensor], lr: float, **settings: float) -> None:
        self.params = list(params)
        if not self.params:
            raise ValueError(f"{type(self).__name__}: there are no parameters to optimize")
        if not all(isinstance(p, Tensor) and p._op is None for p in self.params):
            raise TypeError(f"{type(self).__name__}: parameters must be leaf Tensors, such as "
                            "model.parameters()")
        if len({id(p) for p in self.params}) < len(self.params):
            raise ValueError(f"{type(self).__name__}: a parameter is listed more than once")
        for name, value in dict(lr=lr, **settings).items():
            if not value >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, and is {value}")
        self.lr, self.steps = lr, 0
        self._ends = np.cumsum([p.size for p in self.params]).tolist()
        dtype = np.result_type(*[p.dtype for p in self.params])
        self._state = {name: np.zeros(self._ends[-1], dtype) for name in self._state_names}
        _calm_the_allocator()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        self.steps += 1
        for has_gradient, run in itertools.groupby(range(len(self.params)), lambda i: self.params[i].grad is not None):
            if has_gradient:
                run = list(run)
                self._step_run([self.params[i] for i in run], self._ends[run[0]] - self.params[run[0]].size)

    def _step_run(self, params: list, start: int) -> None:
        """Update neighbouring parameters, the first of which begins at `start` in the flat state."""
        x = np.concatenate([p._data.ravel() for p in params])
        g = np.concatenate([p.grad._data.ravel() for p in params])
        for i in range(0, x.size, _BLOCK):
            state = [s[start + i:start + builtins.min(i + _BLOCK, x.size)] for s in self._state.values()]
            self._update(x[i:i + _BLOCK], g[i:i + _BLOCK], *state)
        end = 0
        for p in params:
            end += p.size
            p._data[...] = x[end - p.size:end].reshape(p.shape)
            _note_write(p)

    def _update(self, x: np.ndarray, g: np.ndarray, *state: np.ndarray) -> None:
        """Change x and the state in place; g is the gradient and may be overwritten."""
        raise NotImplementedError(f"{type(self).__name__} has no _update method")

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: the step count, the learning rate and the state arrays."""
        return {"steps": self.steps, "lr": self.lr, **{k: s.copy() for k, s in self._state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict. Raises KeyError, ValueError if it is another optimizer's."""
        missing = {"steps", "lr", *self._state} ^ set(state)
        if missing:
            raise KeyError(f"{type(self).__name__}.load_state_dict: {sorted(missing)} missing or unknown")
        for name, own in self._state.items():
            if np.shape(state[name]) != own.shape:
                raise ValueError(f"{type(self).__name__}.load_state_dict: {name} is for {np.size(state[name])} "
                                 f"numbers, and these parameters have {own.size}")
        for name, own in self._state.items():
            own[...] = state[name]
        self.steps, self.lr = int(state["steps"]), float(state["lr"])

@functools.cache
def _calm_the_allocator() -> None:
    """Make glibc keep freed memory: once, when training begins.

    A training step makes and drops the same arrays of a few megabytes each time. By default glibc
    gives such memory back to the kernel and faults it in again page by page, which took half of
    the time of a CNN's step. Freeing one block of just under 32 MiB raises its thresholds
    (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; see mallopt(3)) for the rest of the process.
    """
    np.empty((32 << 20) - (1 << 16), np.uint8)

class SGD(Optimizer):
    """Gradient descent with momentum, Nesterov's if asked (Sutskever and others, 2013), as PyTorch's."""

    _state_names = ("velocity",)

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, momentum: float = 0.0,
                 nesterov: bool = False, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and momentum == 0:
            raise ValueError("SGD: nesterov needs a momentum")
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay

    def _update(self, x: np.ndarray, g: np.ndarray, velocity: np.ndarray) -> None:
        if self.weight_decay:
            g += self.weight_decay * x
        if self.momentum:
            velocity *= self.momentum
            velocity += g
            g = g + self.momentum * velocity if self.nesterov else velocity
        x -= self.lr * g

class Adam(Optimizer):
    """Steps of about lr in every direction: the mean gradient over its root mean square.

    Kingma and Ba (2015). weight_decay is added to the gradient, as in PyTorch's Adam.
    """

    _state_names = ("mean", "square")

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"{type(self).__name__}: betas must be at least 0 and below 1, not {betas}")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def _update(self, x: np.ndarray, g: np.ndarray, mean: np.ndarray, square: np.ndarray) -> None:
        self._decay(x, g)
        (b1, b2), t = self.betas, self.steps
        mean *= b1
        mean += (1 - b1) * g
        g *= g
        g *= 1 - b2
        square *= b2
        square += g
        # With both means corrected for their start at zero (divided by 1 - b^t), the step is
        # lr * mean / (sqrt(square) + eps); the two corrections are folded into three numbers.
        np.sqrt(square, out=g)
        g += self.eps * math.sqrt(1 - b2 ** t)
        np.divide(mean, g, out=g)
        g *= self.lr * math.sqrt(1 - b2 ** t) / (1 - b1 ** t)
        x -= g

    def _decay(self, x: np.ndarray, g: np.ndarray) -> None:
        if self.weight_decay:
            g += self.weight_decay * x

class AdamW(Adam):
    """Adam with decoupled weight decay: x shrinks by lr * weight_decay each step, whatever its
    gradient (Loshchilov and Hutter, 2019)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _decay(self, x: np.ndarray, g: np.ndarray) -> None:
        x *= 1 - self.lr * self.weight_decay

class CosineWarmupLR:
    """Sets an optimizer's lr: a straight line up to its first lr, then half a cosine down to min_lr.

    Call `step()` after each optimizer step. (Loshchilov and Hutter, 2017, without restarts.)
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int, min_lr: float = 0.0) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"CosineWarmupLR: needs an optimizer, not {type(optimizer).__name__}")
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"CosineWarmupLR: warmup_steps {warmup_steps} must be below total_steps {total_steps}")
        self.optimizer, self.max_lr, self.min_lr = optimizer, optimizer.lr, min_lr
        self.warmup_steps, self.total_steps, self.steps = warmup_steps, total_steps, 0
        optimizer.lr = self.rate(0)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, 2, ..."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        done = builtins.min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr + 0.5 * (self.max_lr - self.min_lr) * (1 + math.cos(math.pi * done))

    def step(self) -> None:
        """Move on to the next step's learning rate."""
        self.steps += 1
        self.optimizer.lr = self.rate(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"steps": self.steps, "max_lr": self.max_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict."""
        self.steps, self.max_lr = int(state["steps"]), float(state["max_lr"])
        self.optimizer.lr = self.rate(self.steps)

def clip_grad_norm(params: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients together so that their joint 2-norm is at most max_norm; returns it as it was.

    (Pascanu, Mikolov and Bengio, 2013.) A norm that is not finite leaves the gradients alone.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be above 0, not {max_norm}")
    params = [p for p in params if p.grad is not None]
    norm = math.sqrt(builtins.sum(float(np.vdot(p.grad._data, p.grad._data)) for p in params))
    if max_norm < norm < math.inf:
        for p in params:
            if p.grad.requires_grad:  # made by create_graph: still to be differentiated
                p.grad = p.grad * (max_norm / norm)
            else:
                p.grad._data *= max_norm / norm
    return norm

# ## Loaders
#
# Where does the data come from, and how do we know that it is the right data? A network trained on
# half a file still learns something, so a damaged file costs an evening before anyone suspects it.
# Hence one rule for everything in this chapter: **bytes are believed only after their SHA-256 has
# been compared**, whether they came from the disk a moment ago or from a mirror. A digest compares
# the *unpacked* content, because two gzip files of one text may differ in every byte.
#
# The table: each file's place under the data folder, its mirrors, its content's size and digest.
_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/{}.gz",
          "https://storage.googleapis.com/cvdf-datasets/mnist/{}.gz")
_TEXT = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/{}",
         "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/{}")
_SOURCES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "tinyshakespeare/input.txt": (_TEXT, 1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "mnist/train-images-idx3-ubyte": (_MNIST, 47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "mnist/train-labels-idx1-ubyte": (_MNIST, 60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "mnist/t10k-images-idx3-ubyte": (_MNIST, 7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "mnist/t10k-labels-idx1-ubyte": (_MNIST, 10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    "cifar10/cifar-10-binary.tar.gz": (("https://www.cs.toronto.edu/~kriz/{}",), 170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
}

# A mirror may be silent for ten seconds, and after the first ten must average 10 kB/s: a time-out
# on each read alone would let a server that sends one byte at a time hold us for days.
_TIMEOUT = 10.0

def _fetch(url: str, size: int) -> bytes:
    """The bytes behind `url`, of which no more than about `size` are accepted."""
    import time
    from urllib.request import urlopen
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    received, start = bytearray(), time.monotonic()
    with urlopen(url, timeout=_TIMEOUT) as reply:
        while part := reply.read1(1 << 16):
            received += part
            if len(received) > size + 4096:  # packing what does not compress adds a few bytes
                raise ValueError(f"it sends more than the {size:,} bytes expected")
            if time.monotonic() - start > _TIMEOUT + len(received) / 10_000:
                raise TimeoutError(f"only {len(received):,} bytes arrived in time")
            if on_terminal:
                print(f"\r{url}: {len(received) / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    if on_terminal:
        print(file=sys.stderr)
    return bytes(received)

def _verified(raw: bytes, where: str, name: str) -> bytes:
    """The content of `raw`, unpacked if `where` ends in .gz; ValueError if it is not `name`'s."""
    import hashlib
    _, size, digest = _SOURCES[name]
    content, flaw = raw, ""
    if where.endswith(".gz") and not name.endswith(".gz"):
        unpack = zlib.decompressobj(wbits=31)  # 31: deflate within a gzip header and checksum
        try:
            content = unpack.decompress(raw, size + 1)  # never more, whatever the file promises
            if not unpack.eof and len(content) <= size:
                flaw = ", from a gzip file cut short"
        except zlib.error as error:
            flaw = f", which is no gzip file or a broken one ({error})"
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"{where}: expected {size:,} bytes with SHA-256 {digest}, found "
                         f"{len(content):,} bytes with SHA-256 {found}{flaw}; the file starts "
                         f"{raw[:24]!r}")
    return content

# A file must appear under its final name whole or not at all, even if the power fails or two
# processes write it at once. So each writer fills a file of its own *in the same folder* (a rename
# is atomic only within one file system), forces it to the disk, and then renames it. Checkpoints
# are written the same way.
def _write_whole(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Replace the file at `path` by what `write(file)` writes, atomically; OSError if it cannot."""
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "xb+") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too must not leave the temporary file behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # the name is the folder's data, where folders can be synced
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

def _download(name: str, path: str) -> bytes:
    """The content of data file `name` from the first mirror that has it, stored at `path` too."""
    from http.client import HTTPException
    mirrors, size, digest = _SOURCES[name]
    failures = []
    for mirror in mirrors:
        url = mirror.format(os.path.basename(name))
        try:
            content = _verified(_fetch(url, size), url, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            _write_whole(path, lambda file: file.write(content))
            return content
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url}: {error}")
            if hasattr(error, "close"):  # an HTTPError is also the reply, still open
                error.close()
    raise OSError(
        f"cannot get {name}:\n  " + "\n  ".join(failures) + f"\nPut it by hand at {path} (content "
        f"of {size:,} bytes, SHA-256 {digest}), or name a folder that has it by NANOAD_DATA.")

# A download is stored unpacked under the plain name, which is looked at first. So a damaged file,
# of either form, is in nobody's way once its replacement has arrived.
def _content(name: str) -> bytes:
    """The verified content of data file `name`: from the data folder, or else from a mirror."""
    here = os.path.dirname(os.path.abspath(__file__))
    folder = os.environ.get("NANOAD_DATA") or os.path.join(here, "data")
    path = os.path.join(os.path.abspath(folder), *name.split("/"))
    for candidate in filter(os.path.exists, (path, path + ".gz")):
        with open(candidate, "rb") as file:
            raw = file.read()
        try:
            return _verified(raw, candidate, name)
        except ValueError as error:
            warnings.warn(f"{error}; looking for a good copy", stacklevel=3)
    return _download(name, path)

# MNIST (LeCun, Cortes and Burges 1998) comes as IDX: two zero bytes, 8 for unsigned bytes, the
# number of dimensions, each dimension as a big-endian uint32, and then the array itself.
def _read_idx(raw: bytes, name: str, ndim: int) -> np.ndarray:
    magic, start = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if raw[:4] != magic or len(raw) < start:
        raise ValueError(f"{name}: expected an IDX header of {start} bytes that starts {magic!r} "
                         f"({ndim}-d, unsigned bytes), found {len(raw):,} bytes: {raw[:24]!r}")
    shape = tuple(np.frombuffer(raw, ">u4", ndim, offset=4).tolist())
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{name}: expected {math.prod(shape):,} bytes after a header that says "
                         f"{shape}, found {len(raw) - start:,}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)

def _by_split(split: str, train: Any, test: Any) -> Any:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return train if split == "train" else test

def load_mnist(split: str = "train", flatten: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 60,000 ("train") or 10,000 ("test") handwritten digits.

    Returns images, float32 in [0, 1] of shape (N, 1, 28, 28), or (N, 784) with `flatten`, and
    labels, int64 of shape (N,). OSError if the files are neither in the data folder nor to be had.
    """
    stem = _by_split(split, "mnist/train", "mnist/t10k")
    image_file, label_file = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
    images = _read_idx(_content(image_file), image_file, 3)
    labels = _read_idx(_content(label_file), label_file, 1)
    if len(images) != len(labels):
        raise ValueError(f"{label_file}: expected {len(images):,} labels, found {len(labels):,}")
    x = np.divide(images, 255, dtype=np.float32)
    return x.reshape(len(x), -1) if flatten else x[:, None], labels.astype(np.int64)

# CIFAR-10 (Krizhevsky 2009) is read in its binary form, since the other one is a pickle, and a
# pickle is a program. Each record is a label byte and 3 x 32 x 32 bytes of red, green and blue. The
# archive is read where it lies, so no name inside it ever becomes a path on the disk.
def _read_cifar10(raw: bytes, name: str, batches: list[str]) -> tuple[np.ndarray, np.ndarray]:
    import io
    import tarfile
    wanted, members = [f"cifar-10-batches-bin/{batch}.bin" for batch in batches], {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as archive:
            for member in archive:
                if member.isreg() and member.name in wanted:
                    members[member.name] = archive.extractfile(member).read()
    except Exception as error:  # a damaged archive makes tarfile, gzip and zlib raise ten kinds
        raise ValueError(f"{name}: expected a whole .tar.gz archive, found {len(raw):,} bytes that "
                         f"start {raw[:24]!r} ({error})") from error
    for member in wanted:
        length = len(members.get(member, b""))
        if length == 0 or length % 3073:
            raise ValueError(f"{name}: expected a member {member} of whole records of 3073 bytes, "
                             f"found {f'{length:,} bytes' if member in members else 'none'}")
    records = np.frombuffer(b"".join(members[m] for m in wanted), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)

def load_cifar10(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's 50,000 ("train") or 10,000 ("test") small colour photographs.

    Returns images, float32 in [0, 1] of shape (N, 3, 32, 32), and labels, int64 of shape (N,).
    OSError if the archive (170 MB) is neither in the data folder nor to be had.
    """
    batches = _by_split(split, [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"])
    name = "cifar10/cifar-10-binary.tar.gz"
    images, labels = _read_cifar10(_content(name), name, batches)
    return np.divide(images, 255, dtype=np.float32), labels

def load_tinyshakespeare() -> str:
    """The 1,115,394 characters of Shakespeare that Karpathy (2015) trained char-rnn on."""
    return _content("tinyshakespeare/input.txt").decode("utf-8")

def make_moons(n_samples: int = 100, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaving half circles, the smallest problem that no straight line solves.

    Returns points, float32 (n_samples, 2), and labels 0 or 1, int64 (n_samples,), in random order.
    `noise` is the standard deviation of what is added to each coordinate.
    """
    if n_samples < 1 or noise < 0:
        raise ValueError(f"make_moons: needs n_samples >= 1, noise >= 0; got {n_samples}, {noise}")
    rng = _rng()
    y = rng.permutation(np.arange(n_samples) % 2)
    angle = np.pi * rng.random(n_samples)
    side = 1 - 2 * y  # +1 for the upper moon; the lower one is its half turn, shifted
    x = np.stack([side * np.cos(angle) + y, side * np.sin(angle) + 0.5 * y], axis=1)
    return (x + noise * rng.standard_normal(x.shape)).astype(np.float32), y.astype(np.int64)

class DataLoader:
    """Iterate over `x` and `y` (same length) in batches of (x_batch, y_batch), as ndarrays.

    With `shuffle` each pass has a new order, which `manual_seed` fixes; `drop_last` drops a short
    last batch. `transform(x_batch, rng)` returns what takes x_batch's place (augmentation); batches
    are copies, so it may write in place. ValueError: lengths that differ, a batch_size below 1.

    >>> [len(x) for x, y in DataLoader(np.zeros((10, 2)), np.zeros(10), batch_size=4)]
    [4, 4, 2]
    """

    def __init__(self, x: Any, y: Any, batch_size: int = 32, shuffle: bool = False,
                 drop_last: bool = False,
                 transform: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None):
        self.x, self.y = np.asarray(x), np.asarray(y)
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) != len(self.y):
            raise ValueError(f"DataLoader: x {self.x.shape} and y {self.y.shape} differ in length")
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"DataLoader: batch_size must be an integer >= 1, got {batch_size!r}")
        self.batch_size, self.shuffle, self.drop_last = int(batch_size), shuffle, drop_last
        self.transform = transform

    def __len__(self) -> int:
        whole, rest = divmod(len(self.x), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        n = len(self.x)
        order = _rng().permutation(n) if self.shuffle else np.arange(n)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            rows = order[start:start + self.batch_size]
            x = self.x.take(rows, axis=0)
            yield x if self.transform is None else self.transform(x, _rng()), self.y.take(rows, 0)

class CharTokenizer:
    """Number the distinct characters of `text` from 0, in code point order.

    `.chars` holds them as a string, so `CharTokenizer(tokenizer.chars)` is the same tokenizer.

    >>> tokenizer = CharTokenizer("hello")
    >>> tokenizer.chars, tokenizer.encode("hole").tolist(), tokenizer.decode([1, 0, 2, 2])
    ('ehlo', [1, 3, 2, 0], 'hell')
    """

    def __init__(self, text: str):
        self.chars = "".join(sorted(set(text)))
        self.vocab_size = len(self.chars)
        self._ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text: str) -> np.ndarray:
        """int64 ids of shape (len(text),); ValueError for a character outside the vocabulary."""
        try:
            return np.fromiter(map(self._ids.__getitem__, text), np.int64, len(text))
        except KeyError:
            at = next(i for i, char in enumerate(text) if char not in self._ids)
            raise ValueError(f"CharTokenizer: {text[at]!r} at position {at} is not among the "
                             f"{self.vocab_size} characters of the vocabulary") from None

    def decode(self, ids: Any) -> str:
        """The text of a 1-d sequence of ids; ValueError for one outside the vocabulary."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"CharTokenizer: ids must be 1-d integers, got {ids.dtype}{ids.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise ValueError(f"CharTokenizer: id {bad} is outside 0..{self.vocab_size - 1}")
        return "".join(map(self.chars.__getitem__, ids.tolist()))

# ## Saving
#
# How does a night of training survive the power cut at six? A checkpoint is whatever nested dict
# the script likes: weights, optimizer moments, the state of a random generator, the vocabulary. The
# file is an .npz, so `np.load` opens it without nanoad. Each array is a member named by its dotted
# path; all the rest, with the structure, is JSON in a member of its own; nothing is pickled. The
# file's last 64 characters are the SHA-256 of all that stands before them (they fill the comment
# that a zip file may end with), so one comparison tells a whole checkpoint from a damaged one
# before any parser has read a byte of it.
_STAMP = b"nanoad checkpoint; the SHA-256 of all before it: "

def _describe(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """What JSON stores for `value`, once its arrays have been put into `arrays`.

    A dict stays a dict, and a list begins with its kind: ["list", ...], ["tuple", ...], or
    ["array", member]. Keys are free, so two paths may spell one name (`a.b`); the later gets a `_`.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"save: keys must be strings, {path or 'the state'} has {key!r}")
        return {key: _describe(value[key], f"{path}.{key}".strip("."), arrays) for key in value}
    if isinstance(value, (list, tuple)):
        items = (_describe(item, f"{path}.{i}".strip("."), arrays) for i, item in enumerate(value))
        return ["list" if isinstance(value, list) else "tuple", *items]
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and not isinstance(value, str):
        array = np.asarray(value._data if isinstance(value, Tensor) else value)
        if array.dtype.hasobject:
            raise TypeError(f"save: {path} is an array of objects, which only pickle could store")
        name = "".join(c if c.isalnum() or c in "_.-" else "_" for c in path)[:200] or "array"
        while name in arrays:
            name += "_"
        arrays[name] = array
        return ["array", name]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save: {path or 'the state'} is a {type(value).__name__}; what can be saved "
                    "is dicts, lists, tuples, arrays, Tensors, numbers, strings and None")

def _write_members(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    import hashlib
    import zipfile
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = _STAMP + bytes(64)
        for name, array in arrays.items():
            # A ZipInfo of our own has no date in it: equal states make equal files.
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    file.seek(-64, os.SEEK_END)  # the zip file leaves room for the digest that it cannot know
    file.truncate()
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    file.write(digest.hexdigest().encode())

def save(path: str | os.PathLike, state: Any) -> None:
    """Write `state`, nested dicts and lists of arrays, Tensors and plain values, to `path`.

    The file is replaced atomically: at every moment `path` holds the old checkpoint or the new.
    Tensors and NumPy scalars come back from `load` as arrays, everything else as it was, floats bit
    for bit. TypeError names what cannot be saved; OSError means that the old file is untouched.
    """
    import json
    arrays: dict[str, np.ndarray] = {"nanoad": np.empty(0, np.uint8)}  # takes the name
    text = json.dumps(_describe(state, "", arrays))
    arrays["nanoad"] = np.frombuffer(text.encode(), np.uint8)
    path = os.fsdecode(path)
    try:
        _write_whole(os.path.realpath(path), lambda file: _write_members(file, arrays))
    except OSError as error:
        why = f"save: {error.strerror or error}; what was there before is untouched"
        raise OSError(error.errno, why, path) from error

def load(path: str | os.PathLike) -> Any:
    """The state that `save` wrote to `path`. Reads only: nothing in the file is run or unpacked.

    FileNotFoundError if there is no such file; ValueError if it is not, to the last bit, what
    `save` wrote.
    """
    import hashlib
    import io
    import json
    path = os.fsdecode(path)
    with open(path, "rb") as file:
        raw = file.read()
    found = hashlib.sha256(memoryview(raw)[:-64]).hexdigest().encode()
    if raw[-64 - len(_STAMP):-64] != _STAMP:
        raise ValueError(f"{path} is not a whole checkpoint: it does not end as what nanoad.save "
                         "writes does, so it was cut short, damaged, or written by something else")
    if raw[-64:] != found:
        raise ValueError(f"{path} is not a whole checkpoint: its content has the SHA-256 "
                         f"{found.decode()}, but it expects {raw[-64:]!r}")
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as members:
            # We store, and never compress: so no member can unpack to more than the file's size.
            if {member.compress_type for member in members.zip.infolist()} != {0}:
                raise ValueError("a member is compressed")
            return _rebuild(json.loads(members["nanoad.npy"].tobytes()), members)
    except Exception as error:  # the digest is right and the content wrong: somebody's handiwork
        raise ValueError(f"{path} is not a checkpoint written by nanoad.save: {error}") from error

def _rebuild(value: Any, members: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `_describe`."""
    if isinstance(value, dict):
        return {key: _rebuild(item, members) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "array":
        return members[items[0] + ".npy"]
    return {"list": list, "tuple": tuple}[kind](_rebuild(item, members) for item in items)

# ## Drawing
#
# What does a tape look like? A graph with the output on top and each operation over its operands.
# `draw` shows it as a picture where the graphviz package is installed, and as an indented list of
# characters anywhere. Both come from one walk. It uses a stack of its own, since a tape may be
# deeper than Python recurses, and stops after 200 lines, since nobody reads a drawing of more.
_MOST_LINES = 200

def _tape_rows(output: Tensor) -> Iterator[tuple[Any, Any, str, bool]]:
    """Yield (node, the result it is an operand of, indentation, seen before), results first.

    A Tensor used twice comes twice, its operands once. A last node of None: the tape goes on.
    """
    seen, stack = set(), [(output, None, "", "")]
    for _ in range(_MOST_LINES):
        node, result, indent, below = stack.pop()
        yield node, result, indent, id(node) in seen
        operands = []
        if isinstance(node, Tensor) and id(node) not in seen:
            seen.add(id(node))
            operands = [arg for arg in node._args or ()
                        if isinstance(arg, (Tensor, np.ndarray, np.generic, int, float))]
        for i in reversed(range(len(operands))):
            branch, trunk = ("├─ ", "│  ") if i < len(operands) - 1 else ("└─ ", "   ")
            stack.append((operands[i], node, below + branch, below + trunk))
        if not stack:
            return
    yield None, stack[-1][1], stack[-1][2], False

def _in_short(array: Any) -> str:
    array = np.asarray(array)
    return f"{array.item():.5g}" if array.size == 1 else f"{array.dtype}{list(array.shape)}"

def _caption(node: Any, gap: str) -> str:
    """`label = op`, the value or else type and shape, and the gradient or else its norm."""
    if node is None:
        return f"... {_MOST_LINES} lines are enough"
    if not isinstance(node, Tensor):
        return _in_short(node)
    name = " = ".join(filter(None, (node.label, node._op and node._op.__name__.strip("_"))))
    parts = [name, _in_short(node._data)]
    if node.grad is not None:
        g = node.grad._data
        parts.append(f"grad {_in_short(g) if g.size == 1 else f'norm {np.linalg.norm(g):.5g}'}")
    return gap.join(filter(None, parts))

def _draw_text(output: Tensor) -> str:
    rows = list(_tape_rows(output))
    again = dict.fromkeys(id(node) for node, _, _, seen in rows if seen)  # these get a number
    marks, lines = {key: f"[{i}]" for i, key in enumerate(again, start=1)}, []
    for node, _, indent, seen in rows:
        mark = marks.get(id(node), "")
        text = f"{node.label} {mark} above" if seen else f"{_caption(node, '  ')}  {mark}"
        lines.append(indent + text.strip())
    return "\n".join(lines)

def draw(tensor: Tensor, format: str = "svg") -> Any:
    """Draw the tape of `tensor`: operations, labels, values or shapes, gradients where set.

    Returns a `graphviz.Digraph`, which a notebook shows by itself, or, for `format="text"`, a str
    that needs no package. Backward lets the tape go, so draw before it or after
    `backward(retain_grads=True)`. ImportError without the package graphviz.

    >>> a = Tensor(2.0, label="a")
    >>> print(draw(a * 3 + a, format="text"))
    add  8
    ├─ mul  6
    │  ├─ a  2  [1]
    │  └─ 3
    └─ a [1] above
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"draw: expected a Tensor, got {type(tensor).__name__}")
    if format == "text":
        return _draw_text(tensor)
    try:
        import graphviz
    except ImportError:
        raise ImportError("draw: a picture needs graphviz (pip install 'nanoad[viz]'); "
                          "format=\"text\" needs no package") from None
    graph = graphviz.Digraph(format=format, graph_attr={"rankdir": "BT"})
    for i, (node, result, _, seen) in enumerate(_tape_rows(tensor)):
        name = str(id(node)) if isinstance(node, Tensor) else f"constant {i}"
        if not seen:
            graph.node(name, graphviz.escape(_caption(node, "\n")), shape="box")
        if result is not None:
            graph.edge(name, str(id(result)))
    return graph

# A loss curve belongs in the terminal too, under the numbers that made it.
def plot(values: Any, width: int = 72, height: int = 12) -> str:
    """The curve of `values` (1-d) in `width` by `height` characters, with a labelled y axis.

    Where values outnumber columns, each column shows the mean of its share. Values that are not
    finite leave a gap; if none is finite, the string says so.

    >>> print(plot([4, 2, 1, 1, 2], width=26, height=4))
    4 ┤───╮
    3 ┤   │
    2 ┤   ╰──╮     ╭──
    1 ┤      ╰─────╯
    """
    values = np.array(values, dtype=np.float64).ravel()
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        return "(no finite values to plot)"
    columns = builtins.max(width - 11, 1)
    starts = np.arange(columns) * len(values) // columns
    ends = np.maximum(np.arange(1, columns + 1) * len(values) // columns, starts + 1)
    curve = np.array([values[a:b].mean() for a, b in zip(starts, ends)])
    low, high = np.nanmin(curve), np.nanmax(curve)
    grid, before = np.full((height, columns), " "), None
    for x, value in enumerate(curve):
        row = None if np.isnan(value) else round((high - value) / (high - low or 1) * (height - 1))
        if row is not None and before not in (None, row):
            top, bottom = sorted((before, row))
            grid[top:bottom, x] = "│"
            grid[before, x], grid[row, x] = "╮╰" if row > before else "╯╭"
        elif row is not None:
            grid[row, x] = "─"
        before = row
    ticks = [f"{tick:.4g}" for tick in np.linspace(high, low, height)]
    margin = builtins.max(map(len, ticks))
    return "\n".join(f"{t:>{margin}} ┤{''.join(row).rstrip()}" for t, row in zip(ticks, grid))

# ## The tour
#
# What can all this do? `python nanoad.py` shows it in a few seconds. A step is a heading and the
# very lines that are printed and then run, so what you read on the screen is what happened.
_TOUR = [
    ("A gradient by hand. The derivative of x sin x is sin x + x cos x, so at x = 2:", '''
print(math.sin(2) + 2 * math.cos(2))
'''),
    ("The same by the tape: compute, then walk back from the result to x.", '''
x = Tensor(2.0, label="x")
y = x * np.sin(x)
y.backward(retain_grads=True)
print(x.grad)
'''),
    ("That tape, each operation over its operands, with the gradient that reached them.", '''
print(draw(y, format="text"))
'''),
    ("A gradient is a computation too, so it has a gradient: 2 cos x - x sin x.", '''
f = lambda x: x * np.sin(x)
print(grad(grad(f))(2.0), "by hand:", 2 * math.cos(2) - 2 * math.sin(2))
'''),
    ("Newton's method in 50 dimensions, for a logistic regression. No Hessian is ever made:\n"
     "conjugate gradients need only its product with a vector. The gradient's norm collapses.", '''
rng = np.random.default_rng(0)
A, t = rng.standard_normal((200, 50)), rng.choice([-1.0, 1.0], 200)
loss = lambda w: np.sum(np.log(1 + np.exp(-t * (A @ w)))) + 0.5 * np.sum(w * w)

def newton_step(w, g):
    d, r = np.zeros(50), -g
    p = r
    while r @ r > 1e-20:
        _, (Hp,) = hvp(loss, (w,), (p,))
        step = (r @ r) / (p @ Hp.data)
        d, r, before = d + step * p, r - step * Hp.data, r @ r
        p = r + (r @ r) / before * p
    return d

w = np.zeros(50)
for i in range(6):
    g = grad(loss)(w).data
    print(f"step {i}: loss {float(loss(w)):9.5f}, norm of the gradient {np.linalg.norm(g):.1e}")
    w = w + newton_step(w, g)
'''),
    ("A neural network learns two moons.", '''
manual_seed(1)
points, labels = make_moons(200, noise=0.15)
model = MLP(2, [16, 16, 1])
optimizer, losses = Adam(model.parameters(), lr=0.02), []
for step in range(300):
    loss = binary_cross_entropy_with_logits(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
right = (model(points).data > 0) == labels
print(f"{right.mean():.1%} of the points are on their side of the line")
'''),
    ("Its loss, and what it learned: shaded where it says 1, with the points o (0) and x (1).", '''
print(plot(losses, height=8))
across, down = np.meshgrid(np.linspace(-1.5, 2.5, 72), np.linspace(1.5, -1.0, 20))
said = model(np.stack([across.ravel(), down.ravel()], axis=1)).data.reshape(20, 72)
picture = np.where(said > 0, "░", " ")
for (h, v), label in zip(points, labels):
    if -1.5 < h < 2.5 and -1.0 < v < 1.5:
        picture[int((1.5 - v) / 2.5 * 20), int((h + 1.5) / 4 * 72)] = "ox"[label]
print("\\n".join(map("".join, picture)))
'''),
]

def _tour() -> None:
    scope = dict(globals())
    for heading, code in _TOUR:
        print(f"{heading}\n", *code.strip().split("\n"), sep="\n    ", end="\n\n")
        exec(code, scope)
        print()
    print("Next: python train_gpt.py, python train_mnist.py, or read nanoad.py from the top.")

# ### Public names
#
# Everything is a flat name of this file. For those who like their names sorted, and for programs
# written against PyTorch-like packages, `nanoad.functional`, `nanoad.nn`, `nanoad.optim`,
# `nanoad.data` and `nanoad.viz` are modules too, made here and entered where `import` looks first.
# They are named after the module this file was imported as, so it may be renamed or vendored.

_NAMESPACES = {
    "functional": "grad value_and_grad vjp jvp hvp jacobian hessian gradients checkpoint check_grad add sub mul div "
                  "neg power exp expm1 log log1p sqrt abs sin cos tanh sigmoid relu gelu softplus logaddexp maximum minimum "
                  "where clip astype identity reshape transpose swapaxes moveaxis expand_dims squeeze broadcast_to "
                  "concatenate stack split pad getitem scatter_add embedding sum mean var std max min logsumexp "
                  "softmax log_softmax matmul bmm einsum linear conv2d max_pool2d avg_pool2d batch_norm layer_norm "
                  "scaled_dot_product_attention causal_self_attention dropout cross_entropy mse_loss "
                  "binary_cross_entropy binary_cross_entropy_with_logits hinge_loss",
    "nn": "Module Parameter Linear Conv2d MaxPool2d AvgPool2d BatchNorm2d LayerNorm Embedding Dropout Flatten ReLU "
          "GELU Tanh Sigmoid CrossEntropy MSE Sequential MLP MultiHeadAttention GPT",
    "optim": "Optimizer SGD Adam AdamW CosineWarmupLR clip_grad_norm",
    "data": "DataLoader CharTokenizer load_mnist load_cifar10 load_tinyshakespeare make_moons",
    "viz": "draw plot",
}
__all__ = ["Tensor", "Value", "as_tensor", "no_grad", "unbroadcast", "primitive", "fused", "manual_seed", "save", "load",
           *(name for names in _NAMESPACES.values() for name in names.split())]

for _space, _names in _NAMESPACES.items():
    _module = types.ModuleType(f"{__name__}.{_space}", f"The part of {__name__} that holds: {_names}.")
    _module.__all__ = _names.split()
    vars(_module).update((_name, globals()[_name]) for _name in _module.__all__)
    globals()[_space] = sys.modules[_module.__name__] = _module
del _space, _names, _module, _name, _op

if __name__ == "__main__":
    _tour()
