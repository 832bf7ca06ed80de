"""nanoad: reverse-mode automatic differentiation, and what stands on it, in one file of NumPy.

A Tensor is a NumPy array that remembers where it came from. Ask the last one of a computation for
its derivatives, and every Tensor that it began with learns how much it mattered:

    >>> x = Tensor([1.0, 2.0, 3.0])
    >>> loss = (x * x).sum()
    >>> loss.backward()
    >>> print(x.grad)
    [2. 4. 6.]
    >>> print(grad(grad(lambda x: x ** 3))(2.0))
    12.0

The chapters, from top to bottom, are the **tensor**; the **tape** it writes and the walk back along
it; the **functional transforms** (`grad`, `vjp`, `jvp`, `hvp`, `hessian`), which make new functions
out of yours; the **operations**, each with its derivative; **modules**, which hold parameters;
**optimizers**, which move them; **loaders**, which fetch data; **saving, drawing and the public
names**; and a tour, which `python nanoad.py` runs. You need NumPy, calculus, and no other file.
"""

from __future__ import annotations

import builtins, contextlib, functools, hashlib, heapq, inspect, io, itertools, json, math, os
import pathlib, string, sys, threading, time, types, zipfile, zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
import numpy as np

# ## The tensor
#
# What must an array remember, so that we can differentiate through it later? Take `y = x * w`. If
# the final result changes by `g` per unit of `y`, then by the chain rule it changes by `g * w` per
# unit of `x` and by `g * x` per unit of `w`. To say so we must know *which operation* made `y`,
# *what it was made of*, and the *values* that went in. A Tensor is an array plus exactly these. All
# Tensors of one computation, each pointing at its operands, are what the field calls the tape.

class Tensor:
    """An n-dimensional array that can be differentiated through.
    `data` is anything NumPy makes an array of, and is copied; integers and bools become float64,
    since an integer cannot carry a gradient. A list that holds Tensors is stacked. ndarray's
    operators and methods and NumPy's functions (`np.exp(t)`) differentiate, and treat all that is
    no Tensor as constant; comparisons give plain bool arrays. TypeError for what is no real number.
    With `requires_grad` a Tensor is *tracked*: results made of it remember how, and receive
    gradients. Without, it is a *constant*. A Tensor that no operation made is a *leaf*.
    """
    # After the user's four: the time it was made (`_time`) and last written to (`_guard`), by a
    # counter; its operation, operands, their arrays then, settings, pullback (see "Operations").
    __slots__ = ("_data", "requires_grad", "grad", "label", "_time", "_guard", "__weakref__",
                 "_op", "_operands", "_values", "_settings", "_pullback")
    def __init__(self, data: Any, requires_grad: bool = True, label: str = "") -> None:
        made = as_tensor(data)  # what is tracked keeps its tape: this is `identity` of it
        made = identity(made) if requires_grad and made.requires_grad else made.detach()
        _record(np.array(made._data), made._op, made._operands, made._values, made._settings,
                tracked=requires_grad, t=self)
        self.label = label
    shape = property(lambda self: self._data.shape, doc="The size along each axis.")
    dtype = property(lambda self: self._data.dtype, doc="The NumPy type of the elements.")
    ndim = property(lambda self: self._data.ndim, doc="The number of axes.")
    size = property(lambda self: self._data.size, doc="The number of elements.")
    T = property(lambda self: transpose(self), doc="The tensor with its axes reversed.")
    @property
    def data(self) -> np.ndarray:
        """The array, to read and to write (see "Writes the tape must not miss"); also t.numpy()."""
        if self.requires_grad:
            _renew_guard(self)
        return np.asarray(self._data)  # (NumPy has 0-d results as scalars; of these, a copy)
    @data.setter
    def data(self, value: Any) -> None:
        value = value.data if isinstance(value, Tensor) else value
        array = np.asarray(value, None if isinstance(value, np.ndarray) else self.dtype)
        own, new = (f"{a.dtype} of shape {a.shape}" for a in (self, array))
        if own != new:
            raise ValueError(f"t.data is {own} and cannot become {new}; make a new Tensor for that")
        self._data, self._guard = array, (next(_clock), zlib.crc32(np.ascontiguousarray(array)))
    numpy = lambda self: self.data  # as code outside nanoad knows it: the same memory
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
        `grad` (the cotangent, see "The tape") says how much each element counts; a scalar counts as
        1. `create_graph` makes the gradients differentiable in turn; `retain_grads` leaves `.grad`
        on every tensor, for `draw` to show. Without one of them or `retain_graph`, the tape is let
        go as it is walked. Raises ValueError for a non-scalar without `grad`, or a `grad` of
        another shape; RuntimeError if there is no tape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor was made of constants or inside no_grad()")
        seeds = [(self, _seed("backward", self, grad, create_graph))]
        with _recording(create_graph):
            for t, g in _walk(seeds, None, create_graph, retain_graph or retain_grads,
                              lambda t: t._op is None or retain_grads):
                t.grad = g if t.grad is None else t.grad + g
    def __repr__(self) -> str:
        values = np.array2string(np.asarray(self._data), separator=", ", prefix="Tensor(")
        label = f", label={self.label!r}" if self.label else ""
        return f"Tensor({values}, dtype={self.dtype}{label})"
    __str__ = lambda self: str(self._data)
    __format__ = lambda self, spec: format(self.item(), spec) if spec else str(self)
    __float__ = lambda self: float(self.item())
    __bool__ = lambda self: bool(self._data)
    __len__ = lambda self: len(self._data)
    __iter__ = lambda self: (self[i] for i in range(len(self)))
    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a Tensor's elements cannot be assigned; use np.where, or write to t.data")
    def __reduce__(self) -> tuple:  # copies and pickles are new leaves, with a new `_time`
        if self._op is not None:
            raise TypeError("only leaves can be copied or pickled; use t.detach() on this result")
        return type(self), (np.asarray(self._data), self.requires_grad, self.label)

    # ### What NumPy is told
    #
    # NumPy asks an operand that is not its own before it computes. What nanoad knows is answered by
    # its own operation (the tables end the chapter on operations), and all else is a TypeError: to
    # convert silently would cut the tape, and the gradient would be wrong.
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.requires_grad:
            raise TypeError("a Tensor that needs a gradient is no array: use t.numpy() or np.stack")
        return (np.array if copy else np.asarray)(self._data, dtype=dtype)
    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain, out = method == "__call__", kwargs.get("out")
        if plain and not kwargs and ufunc in _FUNCTIONS:
            return _FUNCTIONS[ufunc](*inputs)
        held = out and not any(map(_tracked, inputs))  # as in `array += t` for a constant t
        if plain and not _holds_tensor(out) and (held or ufunc in _WITHOUT_GRADIENT):
            return ufunc(*map(_value, inputs), **kwargs)
        how = ("" if plain else f".{method}") + (f" with {', '.join(kwargs)}=" if kwargs else "")
        raise TypeError(_NO_DERIVATIVE.format(f"numpy.{ufunc.__name__}{how}"))
    def __array_function__(self, function: Callable, kinds: Any, args: tuple, kwargs: dict) -> Any:
        if function in _FUNCTIONS:
            return _FUNCTIONS[function](*args, **kwargs)
        if function in _WITHOUT_GRADIENT:
            return function(*_map_tree(_value, args), **_map_tree(_value, kwargs))
        raise TypeError(_NO_DERIVATIVE.format(f"{function.__module__}.{function.__name__}"))

Value = Tensor  # as it is called in Karpathy's micrograd
_NO_DERIVATIVE = "{}: nanoad has no derivative for this; use t.numpy() if none is needed"

class _Mode(threading.local):
    """What each thread has for itself: whether it writes a tape, and its random numbers."""
    recording, rng = True, functools.cached_property(lambda self: np.random.default_rng())
_mode, _clock = _Mode(), itertools.count(1)

def manual_seed(seed: int | Sequence[int]) -> None:
    """Seed this thread's initialization, dropout, shuffling and sampling: a number, or several."""
    _mode.rng = np.random.default_rng(seed)

def _record(y, op=None, args=(), values=None, params=None, pullback=None, tracked=True, t=None):
    """Make `t`, or a new tensor, a result that remembers how it was made; without `op`, a leaf."""
    t = Tensor.__new__(Tensor) if t is None else t
    t._data, t.requires_grad, t.grad, t.label = y, tracked, None, ""
    t._time, t._guard = next(_clock), None
    t._op, t._operands, t._values, t._settings, t._pullback = op, args, values, params, pullback
    return t

_wrap = lambda array, requires_grad=False: _record(array, tracked=requires_grad)  # a leaf, no copy
_value = lambda a: a._data if isinstance(a, Tensor) else a
_tracked = lambda a: isinstance(a, Tensor) and a.requires_grad

def _real_array(data: Any) -> np.ndarray:
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"a Tensor holds real numbers; this is {array.dtype}: {str(data)[:60]!r}")
    return array if array.dtype.kind == "f" else array.astype(np.float64)

def as_tensor(data: Any) -> Tensor:
    """`data` if it is a Tensor; a list with Tensors in it, stacked; else a constant, not copied."""
    if isinstance(data, Tensor):
        return data
    return stack([as_tensor(a) for a in data]) if _holds_tensor(data) else _wrap(_real_array(data))

def _holds_tensor(a: Any) -> bool:
    return isinstance(a, Tensor) or isinstance(a, (list, tuple)) and any(map(_holds_tensor, a))

_from_list = lambda a: as_tensor(a) if _holds_tensor(a) else np.asarray(a)  # for list arguments

# ### Writes the tape must not miss
#
# A tensor does not copy its operands, so writing into one between the forward and the backward
# pass would change the derivative without a word. NumPy reports no writes. So a checksum is taken
# when the array is handed out (`t.data`), and compared when a walk needs the elements as they were.
# `_guard` is None until the array is handed out or written to. Then it is the time of the last
# known write (0: none), and the last checksum (None: never handed out).
def _note_write(t: Tensor) -> None:
    t._guard = (next(_clock), t._guard[1] if t._guard else None)

def _renew_guard(t: Tensor) -> None:
    """Take the checksum of `t`, and note a write if it is not what it was."""
    (written, before), now = t._guard or (0, None), zlib.crc32(np.ascontiguousarray(t._data))
    t._guard = (written if before in (None, now) else next(_clock)), now  # None: never seen

def _check_unwritten(t: Tensor, since: int, op: Callable) -> None:
    """Raise if the array of `t` was written to after the operation made at `since` saw it."""
    if t._guard[1] is not None:
        _renew_guard(t)
    if t._guard[0] > since:
        raise RuntimeError(f"{op.__name__}: data of {t.label or 'a Tensor'} {t.shape} was changed "
                           "between forward and backward; call backward first, then write")

# ## The tape
#
# How does one number at the end become a derivative for everything at the start? Let *L* be the
# end, a scalar, and call the derivative of *L* by (with respect to) some array *v* the *cotangent*
# of *v*; it has the shape of *v*, and says for each element how much *L* moves when that element
# does. The cotangent of *L* itself is 1. Now step backwards. If `y = f(a, b)` and the cotangent of
# `y` is `g`, the chain rule gives what `a` receives by way of `y`: `g` times the Jacobian of `f`.
# That product is all we ever need, never the Jacobian alone, so each operation brings a function
# for it: its **VJP rule** (vector-Jacobian product). For `mul` it is `g * b`. An array used in
# several places receives from each, and the parts add up. Visit every tensor after all that were
# made from it, hand its finished cotangent to its rule, pass the results on to its operands: that
# is reverse-mode differentiation. However many inputs there are, it costs a small multiple of the
# forward pass, and that one fact is why neural networks can be trained.
#
#     >>> a, b, rule = Tensor(2.0), Tensor(3.0), mul.rules[0]  # lambda g, y, a, b: g * b
#     >>> y = a * b
#     >>> print(y._op.__name__, y._operands[0] is a, y._values)  # what y remembers
#     mul True [array(2.), array(3.)]
#     >>> (y + a).backward()  # a receives 1, and then b
#     >>> print(a.grad, b.grad, y._operands)  # nothing of the tape is left behind the walk
#     4.0 2.0 None
#     >>> print(repr(rule(1.0, None, 2.0, 3.0)), repr(rule(1.0, None, 2.0, b)))
#     3.0 Tensor(3., dtype=float64)
#
# Three properties of this walk carry the rest of the file:
#
# 1. *The order is the clock, backwards.* A result is made after its operands, and has the larger
#    `_time`. So the largest that waits is no operand of another that waits: its cotangent is
#    complete. A heap replaces the usual recursive sort; a tape may be a million operations deep.
# 2. *The tape is let go behind us.* What a tensor saved is dropped, and memory falls as we walk.
# 3. *A rule is ordinary array code.* Given ndarrays, it computes at NumPy's own speed. Given
#    Tensors, the same text writes a new tape, so the gradient it returns can be differentiated
#    again. `create_graph` decides which; no second set of rules exists to be wrong.

def _walk(seeds, needed, create_graph, retain_graph, keep) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk back from `seeds`, pairs (tensor, cotangent), and yield such pairs where `keep(tensor)`.
    On the way, cotangents are ndarrays, or Tensors under `create_graph`. `needed` has the `_time` of
    each tensor to visit, and whether to go on from there (see `_paths`); None visits all.
    """
    pending: dict = {}  # _time -> (tensor, the sum of what it has received so far)
    for t, g in seeds:
        pending[t._time] = t, (pending[t._time][1] + g if t._time in pending else g)
    heap = sorted(-seq for seq in pending)  # a sorted list is a heap
    while heap:
        t, g = pending.pop(-heapq.heappop(heap))
        if keep(t):
            own = t._op is None and not create_graph  # a leaf's g is copied below if shared
            yield t, (g if _tracked(g) else _wrap(np.asarray(g) if own else np.array(_value(g))))
        if t._op is None or (needed is not None and not needed.get(t._time)):
            continue
        for a, part in _pull(t, g, needed, create_graph):
            if not create_graph and part.__class__ is Tensor:  # a rule may call our operations
                part = part._data
            data, seq = a._data, a._time
            if part.shape != data.shape:
                part = unbroadcast(part, data.shape)
            if part.dtype != data.dtype:
                part = part.astype(data.dtype)
            if seq in pending:
                part = pending[seq][1] + part
            else:
                heapq.heappush(heap, -seq)
                # A rule may return its own g, or a view. A leaf keeps what it receives, and two
                # leaves must not share memory: clipping one gradient would change the other.
                if a._op is None and not create_graph and (part is g or part.base is not None):
                    part = part.copy()
            pending[seq] = a, part
        if not (retain_graph or create_graph):
            t._operands = t._values = t._settings = t._pullback = None

def _pull(t: Tensor, g: Any, needed: dict | None, create_graph: bool) -> Iterable:
    """The operands of `t` to which something is due, each with what it receives from `g`."""
    op, wanted = t._op, []
    if t._guard is not None:
        _check_unwritten(t, t._time, op)
    for a in _require_operands(t):
        due = isinstance(a, Tensor) and a.requires_grad
        if due and a._guard is not None:
            _check_unwritten(a, t._time, op)
        wanted.append(due and (needed is None or a._time in needed))
    if t._pullback is not None:
        by_definition = create_graph and getattr(op, "definition", None)  # see "Operations"
        parts = _pull_by_definition(t, g, wanted) if by_definition else t._pullback(g, wanted)
        return [(a, p) for a, p, due in zip(t._operands, parts, wanted) if due and p is not None]
    # The one switch: a rule is given arrays, or the Tensors they came from, and then writes a tape.
    y, xs = (t, t._operands) if create_graph else (t._data, t._values)
    return [(a, op.rules[i](g, y, *xs, **t._settings)) for i, a in enumerate(t._operands) if wanted[i]]

def _require_operands(t: Tensor) -> tuple:
    if t._operands is None:
        raise RuntimeError(f"{t._op.__name__}: tape let go by a walk without retain_graph=True")
    return t._operands

# ### Broadcasting, and the sum it leaves behind
#
# NumPy stretches a `(3,)` row along a `(4, 3)` table without being asked. Each element of the row
# is then used four times, and what is used several times receives the *sum* of what comes back:
# the cotangent, `(4, 3)`, is added up over the four. The walk does it, and no rule mentions it.
def unbroadcast(g: Any, shape: tuple) -> Any:
    """Sum the cotangent `g` (ndarray or Tensor) over the axes that were stretched from `shape`.

        >>> row = Tensor([1.0, 2.0, 3.0])
        >>> (np.ones((4, 3)) * row).sum().backward()
        >>> print(row.grad, unbroadcast(np.ones((4, 3)), (3,)))
        [4. 4. 4.] [4. 4. 4.]
    """
    before = (1,) * (g.ndim - len(shape)) + shape
    return np.sum(g, axis=tuple(i for i, n in enumerate(before) if n != g.shape[i])).reshape(shape)

@contextlib.contextmanager
def _recording(on: bool) -> Iterator[None]:
    before, _mode.recording = _mode.recording, on
    try:
        yield
    finally:
        _mode.recording = before

def no_grad() -> contextlib.AbstractContextManager:
    """A context manager and, with its parentheses, a decorator: inside, no tape is written."""
    return _recording(False)

# ### The reverse pass as a function
#
# `backward` leaves its results in `.grad`, which suits training. To *use* a gradient inside a
# larger computation we want it returned, for the inputs we name. What is older than all of these
# cannot depend on them, so the search for paths from them to the outputs stops at that age.
def _paths(outputs: list, inputs: list, beyond: bool = True) -> tuple[dict, list]:
    """Search the tape from `outputs` back to `inputs`: what lies between, and what lies behind.
    The first result, `needed`, maps the `_time` of every tensor on a path between them to whether a
    walk goes on from it (from an input if `beyond`, for another may lie behind it). The second has
    the tracked tensors older than all inputs; an outer transform (see below) may ask about them.
    """
    needed = {t._time: beyond for t in inputs}
    oldest = min(needed, default=math.inf)
    found, waiting = {}, list(filter(_tracked, outputs))  # _time -> (tensor, operands)
    for t in waiting:  # which grows
        if t._time not in found:
            further = t._time >= oldest and needed.get(t._time, True)
            found[t._time] = t, [a for a in _require_operands(t) if _tracked(a)] if further else []
            waiting += found[t._time][1]
    for seq in sorted(found):  # operands before results
        if any(a._time in needed for a in found[seq][1]):
            needed.setdefault(seq, True)
    return needed, [t for t, _ in found.values() if t._time < oldest]

def _require_tensors(name: str, tensors: list) -> list:
    for t in tensors:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {type(t).__name__} ({str(t)[:40]}) is no Tensor on the tape")
    return tensors

def _seed(name: str, output: Any, cotangent: Any, create_graph: bool) -> Any:
    """What a walk starts with: the cotangent given (a copy for a leaf, which keeps it), or 1."""
    _require_tensors(name, [output])
    given = np.ones(output.shape) if cotangent is None and output.size == 1 else cotangent
    if np.shape(given) != output.shape:
        raise ValueError(f"{name}: an output of shape {output.shape} needs a cotangent like it, not"
                         f" {np.shape(given) or given}; only a scalar, as by .sum(), needs none")
    if create_graph:  # somebody may want to differentiate by it
        return astype(as_tensor(given), output.dtype)
    return (np.array if output._op is None else np.asarray)(_value(given), output.dtype)

def _gradients(seeds, inputs, create_graph, retain_graph, needed=None) -> list[Tensor]:
    """The cotangents that reach `inputs`, zeros where none does. (Tensors hash by identity.)"""
    needed = needed or _paths([t for t, _ in seeds], inputs)[0]
    with _recording(create_graph):
        got = dict(_walk(seeds, needed, create_graph, retain_graph, set(inputs).__contains__))
    return [got[t] if t in got else _wrap(np.zeros_like(t._data)) for t in inputs]

def gradients(output: Tensor, inputs: Sequence[Tensor], grad: Any = None, *,
              create_graph: bool = False, retain_graph: bool = False) -> tuple[Tensor, ...]:
    """The derivatives of `output` by each of `inputs`, as a tuple; zeros for one that had no part.
    Touches no `.grad`; all else is as in `Tensor.backward`. (In PyTorch: `torch.autograd.grad`.)
    """
    inputs = _require_tensors("gradients", [inputs] if isinstance(inputs, Tensor) else list(inputs))
    seeds = [(output, _seed("gradients", output, grad, create_graph))]
    return tuple(_gradients(seeds, inputs, create_graph, retain_graph))

# ## Functional transforms
#
# How do we turn a function into the function of its derivatives? `grad(f)` runs `f` on fresh
# Tensors that hold your arguments, walks the tape this wrote, and returns the gradient. No `.grad`
# is touched. The arguments may be numbers, arrays, Tensors, or dicts, lists and tuples of them.
#
# **Why a gradient can be differentiated again.** Inside `grad(grad(f))` the inner gradient is
# computed by the rules, and the rules are array code. The outer transform has put Tensors where
# arrays would be, so the inner backward pass is itself recorded, like any other computation, and
# the outer one walks back along it. One rule, two uses; third derivatives need nothing more.
#
#     >>> print(grad(grad(grad(lambda x: x ** 4)))(2.0))  # 4 * 3 * 2 * x
#     48.0
#
# **Why nested transforms do not get confused.** In the example below the inner derivative is `x`,
# so what is asked for is the derivative of `x * x`: 6 at 3. An engine that marks "the variable we
# differentiate by" with a flag on the values cannot tell the `x` inside from the `y` it is asked
# about. It forgets that the inner result depends on `x`, and answers 3; or it moves `x` along with
# `y`, takes the slope of `(3 + e) (2 + e)` for the inner one, and says 5: perturbation confusion.
# Here it has no room. Every call of a transform makes *new* tensors for its own arguments and asks
# for the derivative by *those objects*. `x` is another, older than `y`, so the inner walk stops at
# it; but the inner result was computed from it, so the outer walk meets it like any operand.
#
#     >>> print(grad(lambda x: x * grad(lambda y: x * y)(2.0))(3.0))
#     6.0
#
# **When is the inner walk itself recorded?** When somebody else can still ask, that is, when a
# tracked tensor older than the transform's own inputs had a part in the result, as `_paths` finds.
# If not, the walk runs on bare ndarrays and returns constants (see the example under `grad`).
def _map_tree(f: Callable, tree: Any) -> Any:
    """Apply `f` to all items of nested dicts, lists and tuples; a list of numbers is one item."""
    if isinstance(tree, dict):
        return {key: _map_tree(f, item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)) and not _numbers(tree):
        build = getattr(type(tree), "_make", list if isinstance(tree, list) else tuple)
        return build(_map_tree(f, item) for item in tree)  # (_make: of a namedtuple)
    return f(tree)

_numbers = lambda a: all(map(_numbers, a)) if isinstance(a, list) else np.isscalar(a)

def _flatten(tree: Any) -> tuple[list, Callable[[Iterable], Any]]:
    """The items of `tree`, and a function that builds the same nest of other items."""
    items: list = []
    _map_tree(items.append, tree)
    return items, lambda others: _map_tree(lambda _, other=iter(others): next(other), tree)

def _input(name: str, x: Any) -> Tensor:
    """A new tensor to differentiate by. It is tied to `x` if somebody else tracks that."""
    array = np.asarray(_value(x))
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: {str(x)[:40]} is {array.dtype}; make it floating-point, like 3.0")
    return identity(x) if _tracked(x) and _mode.recording else _wrap(array, True)

def _run(name, f, args, argnums=None, kwargs=None, beside=()) -> tuple:
    """Call `f` with fresh tensors for its arguments at `argnums` (None: all).
    Returns (out, value, inputs, structure, needed, recorded): f's result; the same for the caller,
    constant if nobody else can ask; the tensors; how to give such a list the arguments' structure;
    `needed` of `_paths`; whether to record: if a tracked tensor is `older` or in `beside`.
    """
    if not isinstance(args, (tuple, list)) or not isinstance(beside, (tuple, list)):
        raise TypeError(f"{name}: primals and tangents are tuples, one entry per argument: (x,)")
    args, one = list(args), isinstance(argnums, (int, np.integer))
    positions = range(len(args)) if argnums is None else np.ravel(argnums).tolist()
    if not all(i in range(-len(args), len(args)) for i in positions):
        raise ValueError(f"{name}: no argument {argnums} among the {len(args)} positional ones")
    items, structure = _flatten(args[argnums] if one else tuple(args[i] for i in positions))
    inputs = [_input(name, item) for item in items]
    for i, argument in zip(positions, [structure(inputs)] if one else structure(inputs)):
        args[i] = argument
    with _recording(True):
        out = f(*args, **kwargs or {})
    needed, older = _paths(_flatten(out)[0], inputs)
    recorded = _mode.recording and (bool(older) or any(map(_tracked, _flatten(beside)[0])))
    value = out if recorded else _map_tree(lambda a: a.detach() if _tracked(a) else a, out)
    return out, value, inputs, structure, needed, recorded

def _pull_back(name, outputs, vectors, inputs, create_graph, needed=None, retain_graph=False):
    """The gradients at `inputs` for a nest of cotangents of `outputs` (None: 1, of a scalar)."""
    shapes = [t.shape for t in _require_tensors(name, outputs)]
    parts = [None] * len(shapes) if vectors is None else list(map(as_tensor, _flatten(vectors)[0]))
    if vectors is not None and (given := [v.shape for v in parts]) != shapes:
        raise ValueError(f"{name}: needs vectors of shapes {shapes}, not {given}")
    seeds = [(t, _seed(name, t, v, create_graph)) for t, v in zip(outputs, parts)]
    return _gradients(seeds, inputs, create_graph, retain_graph, needed)

def _transform(name, f, argnums, argnum, finish):
    """The function that runs `f` and returns what `finish` makes of the run."""
    return functools.wraps(f)(lambda *args, **kwargs: finish(
        *_run(name, f, args, argnums if argnum is None else argnum, kwargs)))

def value_and_grad(f: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
                   argnum: Any = None) -> Callable:
    """The function that returns (f(...), gradient of f) where f returns a scalar.
    The gradient is built like the argument at `argnums` (`argnum` in HIPS autograd), or is a tuple
    if that is one. With `has_aux`, f returns (scalar, anything), and the value is that pair. Raises
    ValueError if f is not scalar, TypeError for integer arguments or if f returns no Tensor.

        >>> print(*value_and_grad(lambda x: (x ** 2).sum())(np.array([1.0, 3.0])))
        10.0 [2. 6.]
    """
    def finish(out, value, inputs, structure, needed, recorded):
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError("grad: with has_aux the function must return (scalar, aux)")
        scalar = out[0] if has_aux else out
        return value, structure(_pull_back("grad", [scalar], None, inputs, recorded, needed))
    return _transform("grad", f, argnums, argnum, finish)

def grad(f: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
         argnum: Any = None) -> Callable:
    """The function that returns the gradient of f, which returns a scalar (else see `jacobian`).
    It is like the argument at `argnums`; with `has_aux`, (gradient, aux). See `value_and_grad`.

        >>> slope = grad(lambda x: x * x)  # constant, unless somebody can differentiate by x
        >>> print(slope(2.0).requires_grad, slope(Tensor(2.0)).requires_grad)
        False True
    """
    both = value_and_grad(f, argnums, has_aux, argnum=argnum)
    pick = lambda value, slope: (slope, value[1]) if has_aux else slope
    return functools.wraps(f)(lambda *args, **kwargs: pick(*both(*args, **kwargs)))

def vjp(f: Callable, *primals: Any) -> tuple[Any, Callable]:
    """`(f(*primals), vjp_fn)`; vjp_fn takes a cotangent, built like f's result, to a tuple of those
    of the *primals*, the arguments to differentiate at. f runs once, however often vjp_fn does.
    """
    out, value, inputs, structure, needed, recorded = _run("vjp", f, primals)
    outputs = _require_tensors("vjp", _flatten(out)[0])
    def vjp_fn(cotangent: Any) -> tuple:
        again = _mode.recording and (recorded or any(map(_tracked, _flatten(cotangent)[0])))
        return structure(_pull_back("vjp", outputs, cotangent, inputs, again, needed, True))
    return value, vjp_fn

# A *tangent* v says how fast the inputs move, and forward mode asks how fast f then moves: `J v`.
# It comes out of reverse mode. What `vjp_fn` computes, `s(u) = J^T u`, is linear in the cotangent
# u, so the derivative of the number `s(u) . v` by u is `J v`. Hence: walk back to u along the tape
# of the first walk, with v for the cotangent (Townsend, 2017). Hessian times vector is the same
# second walk, on to the inputs, for the price of a few gradients (Pearlmutter, 1994).
def jvp(f: Callable, primals: Sequence, tangents: Sequence) -> tuple[Any, Any]:
    """`(f(*primals), the directional derivative of f along tangents)`.

        >>> print(jvp(np.sin, (0.0,), (2.0,))[1])
        2.0
    """
    out, value, inputs, _, needed, recorded = _run("jvp", f, primals, beside=tangents)
    outputs, rebuild = _flatten(out)
    u = [_wrap(np.zeros(t.shape, t.dtype), True) for t in _require_tensors("jvp", outputs)]  # any u
    slopes = _gradients(list(zip(outputs, u)), inputs, True, True, needed)
    return value, rebuild(_pull_back("jvp", slopes, tuple(tangents), u, recorded))

def hvp(f: Callable, primals: Sequence, vector: Sequence) -> tuple[Tensor, tuple]:
    """`(f(*primals), Hessian of f times vector)`, the product as a tuple like `primals`."""
    out, value, inputs, structure, needed, recorded = _run("hvp", f, primals, beside=vector)
    slopes = _pull_back("hvp", [out], None, inputs, True, needed)
    return value, structure(_pull_back("hvp", slopes, tuple(vector), inputs, recorded))

def _jacobian(out, value, inputs, structure, needed, recorded, flat=False) -> Any:
    """The Jacobians of each y in `out`: y.shape + in.shape, or (y.size, in.size) if `flat`."""
    def of_one(y: Any) -> Any:
        _require_tensors("jacobian", [y])
        rows = [_gradients([(y, _seed("jacobian", y, unit, recorded))], inputs, recorded, True,
                           needed) for unit in np.eye(y.size).reshape(y.size, *y.shape)]
        columns = map(stack, zip(*rows)) if rows else [np.zeros(0, x.dtype) for x in inputs]
        return structure(reshape(c, (y.size, x.size) if flat else y.shape + x.shape)
                         for c, x in zip(columns, inputs))
    return _map_tree(of_one, out)

def jacobian(f: Callable, argnums: int | Sequence[int] = 0, *, argnum: Any = None) -> Callable:
    """The function that returns the Jacobian of f: shape out.shape + in.shape, one walk per row.

        >>> print(*jacobian(lambda x: x ** 2)(np.array([1.0, 2.0])))
        [2. 0.] [0. 4.]
    """
    return _transform("jacobian", f, argnums, argnum, _jacobian)

def hessian(f: Callable, argnums: int | Sequence[int] = 0, *, argnum: Any = None) -> Callable:
    """The function that returns the Hessian of a scalar f; f runs once, and each row is one walk.
    It is (size, size) for an argument of `size` elements, and a nest of nests of such for a nest.

        >>> print(*hessian(lambda x: (x ** 3).sum())(np.array([1.0, 2.0])))
        [6. 0.] [ 0. 12.]
    """
    def finish(out, value, inputs, structure, needed, recorded):
        slopes = _pull_back("hessian", [out], None, inputs, True, needed)
        needed, _ = _paths(slopes, inputs)
        return _jacobian(structure(slopes), value, inputs, structure, needed, recorded, flat=True)
    return _transform("hessian", f, argnums, argnum, finish)

def checkpoint(f: Callable, *args: Any) -> Tensor:
    """f(*args), whose intermediate results are not kept but recomputed in the backward pass.
    Saves memory for time (Griewank and Walther, 2000). f returns one Tensor; what it closes over (a
    module's parameters) gets gradients too. Random numbers are drawn again alike; other effects of
    f, such as those on batch norm's running statistics, happen twice.
    """
    start, drawn = _wrap(np.zeros(())), _mode.rng.bit_generator.state  # a mark in time
    (out,) = _require_tensors("checkpoint", [f(*args)])
    reads = _paths([out], [start])[1]  # older than `start`: arguments, and what f closes over
    if not reads or not _mode.recording:
        return out.detach()
    def pullback(g: Any, wanted: list) -> list:  # as of a `fused` operation, below
        bits, create_graph = _mode.rng.bit_generator, isinstance(g, Tensor)
        now, bits.state = bits.state, drawn
        with _recording(True):
            again = f(*args)
        bits.state = now
        needed, _ = _paths([again], reads, beyond=False)  # the walk onwards from there is not ours
        return _gradients([(again, g)], reads, create_graph, create_graph, needed)
    return _record(out._data, checkpoint, tuple(reads), None, {}, pullback)

def check_grad(f: Callable, *args: Any, order: int = 2, rtol: float = 1e-5,
               eps: float = 1e-5) -> float:
    """Compare derivatives of f with central differences, up to `order`: how to test an operation.
    f takes Tensors and returns one of any shape; it is tested at `args`, by those of them that hold
    floating-point numbers, in float64. Returns the largest error, relative to max(1, |derivative|).
    Raises AssertionError that names the worst element and both its values.

        >>> check_grad(lambda x, y: x * np.sin(y), np.array([1.0, 2.0]), 0.5) < 1e-6
        True
    """
    which = [i for i, a in enumerate(args) if np.asarray(_value(a)).dtype.kind == "f"]
    if order < 1 or not which:
        raise ValueError(f"check_grad: order {order} is below 1, or no argument a float, like 3.0")
    args = [as_tensor(np.array(_value(a), float)) if i in which else a for i, a in enumerate(args)]
    def weighted(*args: Any) -> Tensor:  # a scalar, in which no two elements cancel
        (y,) = _require_tensors("check_grad", [f(*args)])
        return (y * np.random.default_rng(0).uniform(0.5, 1.5, y.shape)).sum()
    errors = [(0.0, "")]
    for i, exact in zip(which, grad(weighted, which)(*args)):
        moved = lambda step: float(weighted(*args[:i], args[i] + step, *args[i + 1:]))
        for k, (index, analytic) in enumerate(np.ndenumerate(exact._data)):
            step = eps * np.eye(1, exact.size, k).reshape(exact.shape)
            numeric = (moved(step) - moved(-step)) / (2 * eps)
            error = float(abs(numeric - analytic) / max(1, abs(numeric)))
            errors.append((math.inf if math.isnan(error) else error, f"by argument {i} at index "
                           f"{index}: numeric {numeric:.9g}, analytic {analytic:.9g}"))
    error, worst = max(errors)
    if error > rtol:
        raise AssertionError(f"check_grad: the derivative {worst}")
    if order == 1:
        return error
    slopes = lambda *args: concatenate([s.reshape(-1) for s in grad(weighted, which)(*args)])
    return max(error, check_grad(slopes, *args, order=order - 1, rtol=rtol, eps=eps))

# ## Operations
#
# What is an operation? A function on ndarrays and a VJP rule per operand, joined by `primitive`:
#
#     @primitive(lambda g, y, a, b: g * b, lambda g, y, a, b: g * a)
#     def mul(a, b):
#         return a * b
#
# A rule is given the cotangent `g` of the result, the result `y` and the operands, and returns the
# cotangent of its operand. Read the first of these two slowly, once. Move `a` by a small `da`, and
# `y` moves by `da * b`. What L does then is for `g` to say, which holds L's slope by each element
# of `y`: L moves by the sum of `g * (da * b)` over all elements. That is the sum of `(g * b) * da`,
# so L's slope by each element of `a` is what stands before `da`: `g * b`. All rules are found so:
# move an operand, see how the result moves, multiply by `g`, add up, and read off the factor.
#
# When the operation is called, Tensors among its operands are unwrapped, the function computes on
# bare arrays, and if one of the Tensors is tracked, the result remembers operation and operands.
#
# Some compositions deserve one fast kernel. A `fused` operation has a *definition*, a few lines of
# other operations, and a kernel that computes the same on bare arrays and returns, with the result,
# a `pullback`: the whole backward step as a closure over what it keeps. A kernel may be clever, in
# place, and without a thought for second derivatives, because under `create_graph` the walk
# differentiates the definition instead. So the definition is at once the explanation, the test
# oracle, and the source of every higher derivative. (The annotations below are those of the
# finished operation, which takes Tensors, too, and returns one.)
def primitive(*rules: Callable, each: Callable | None = None) -> Callable:
    """Decorate a function on arrays to make it an operation with these VJP rules, one per operand.
    An operation on any number of operands gives one rule `each(i, g, y, *operands)` instead.
    """
    return lambda forward: _operation(forward, _Each(each) if each else rules, None)

def fused(definition: Callable, operands: int = 0) -> Callable:
    """Decorate a kernel `(arrays) -> (result, pullback)` to make it an operation.
    `pullback(g, wanted)` returns a cotangent for each operand, and may give None where `wanted` is
    False. It must not write to `g` or to what it keeps: the tape may be walked twice.
    """
    return lambda kernel: _operation(kernel, (), definition)  # (operands: not used yet)

class _Each(functools.partial):
    """In place of a list of rules: item i is the one rule, told i."""
    __getitem__ = lambda self, i: functools.partial(self, i)
    __len__ = lambda self: sys.maxsize  # for `draw`: every argument is an operand

_OLD_NUMPY = np.lib.NumpyVersion(np.__version__) < "2.0.0"
def _operation(forward: Callable, rules: Any, definition: Callable | None) -> Callable:
    @functools.wraps(forward)
    def operation(*args: Any, **params: Any) -> Tensor:
        values, bare, tracked = [], True, False
        for a in args:
            if isinstance(a, Tensor):
                bare, tracked = False, tracked or a.requires_grad
                if a._guard is not None and a._guard[1] is not None:  # somebody has the array
                    _renew_guard(a)
                a = a._data
            elif a.__class__ is list and a:  # an operand; a tuple would be a setting, like axis
                return operation(*(_from_list(b) if b is a else b for b in args), **params)
            values.append(a)
        # A Tensor given by name is an operand, too, and rules belong to positions.
        if params and any(isinstance(p, Tensor) for p in params.values()):
            bound = inspect.signature(forward).bind(*args, **params)
            bound.apply_defaults()
            return operation(*bound.args, **_map_tree(_value, bound.kwargs))
        # Beside arrays, Python's numbers stay as they are, for they take the arrays' dtype.
        if bare and not any(isinstance(v, np.ndarray) for v in values):
            values = [np.asarray(v) if isinstance(v, (int, float)) else v for v in values]
        try:
            made = forward(*values, **params)
            y, pullback = made if definition is not None else (made, None)
            if y.dtype.kind != "f":
                y = _real_array(y)
        except (ValueError, TypeError, IndexError) as error:  # say which operation, on what
            kind = next(k for k in (IndexError, ValueError, TypeError) if isinstance(error, k))
            shapes = ", ".join(str(v.shape) for v in values if hasattr(v, "shape")) or "no array"
            raise kind(f"{operation.__name__} of {shapes}: {error}") from None
        if _OLD_NUMPY and operation is not astype:  # for which a float32 number * 2.0 is float64
            if {a.dtype.char for a in args if isinstance(a, (Tensor, np.ndarray))} == {"f"}:
                y = y.astype(np.float32)
        return (_record(y, operation, args, values, params, pullback)
                if tracked and _mode.recording else _wrap(y))
    operation.rules, operation.definition = rules, definition
    operation.__name__ = operation.__qualname__ = forward.__name__.strip("_")
    return operation

def _pull_by_definition(t: Tensor, g: Tensor, wanted: list) -> list:
    """What a pullback returns, from a tape of the definition that ends at the operands' copies."""
    operands = [identity(a) if due else a for a, due in zip(t._operands, wanted)]
    out = t._op.definition(*operands, **t._settings)
    parts = iter(_gradients([(out, g)], list(itertools.compress(operands, wanted)), True, True))
    return [next(parts) if due else None for due in wanted]

# ### Element by element
#
# Most operations are one NumPy function and a rule of one line, so they stand in a table: the name,
# the function, the rules. The rule of a function of one variable is `g` times its derivative, and
# where the derivative is simpler in terms of the result, it says so: for tanh it is `1 - y*y`.
_FUNCTIONS: dict[Callable, Callable] = {}  # of NumPy -> what answers for it (see the end)


def _op(name: str, forward: Callable, *rules: Callable,
        doc: str = "{}, element by element, with NumPy's broadcasting and dtypes.") -> Callable:
    """One row of a table: an operation, which also answers for `forward` if that is NumPy's."""
    operation = primitive(*rules)(forward)
    operation.__name__ = operation.__qualname__ = name
    operation.__module__, operation.__doc__ = __name__, doc.format(name)
    if isinstance(forward, np.ufunc) or forward.__module__ in ("numpy", "numpy.linalg"):
        _FUNCTIONS[forward] = operation
    return operation


def _answers(*functions: Callable) -> Callable:
    """Decorate what is to be called in place of these NumPy functions when they meet a Tensor."""
    def register(answer: Callable) -> Callable:
        _FUNCTIONS.update(dict.fromkeys(functions, answer))
        return answer
    return register


identity = _op("identity", lambda x: x, lambda g, y, x: g)
_copy = _op("copy", lambda x: np.array(x), lambda g, y, x: g)  # t.copy(), np.copy(t)
neg = _op("neg", np.negative, lambda g, y, x: -g)
add = _op("add", np.add, lambda g, y, a, b: g, lambda g, y, a, b: g)
sub = _op("sub", np.subtract, lambda g, y, a, b: g, lambda g, y, a, b: -g)
mul = _op("mul", np.multiply, lambda g, y, a, b: g * b, lambda g, y, a, b: g * a)
div = _op("div", np.true_divide, lambda g, y, a, b: g / b, lambda g, y, a, b: -g * y / b)
exp = _op("exp", np.exp, lambda g, y, x: g * y)
expm1 = _op("expm1", np.expm1, lambda g, y, x: g * (y + 1))
log = _op("log", np.log, lambda g, y, x: g / x)
log1p = _op("log1p", np.log1p, lambda g, y, x: g / (1 + x))
sqrt = _op("sqrt", np.sqrt, lambda g, y, x: g / (2 * y))
sin = _op("sin", np.sin, lambda g, y, x: g * np.cos(x))
cos = _op("cos", np.cos, lambda g, y, x: -g * np.sin(x))
tanh = _op("tanh", np.tanh, lambda g, y, x: g * (1 - y * y))

# The derivative of `x ** p` by p is `y log x`, taken as 0 where x is 0. The derivative by x is
# `p x ** (p - 1)`; for p = 0 the exponent is kept at 0, since 0 to the power -1 is infinite. Small
# powers are products, ten times faster than the C library's pow.
_PRODUCTS = {1: lambda x: x, 2: lambda x: x * x, 3: lambda x: x * x * x}
_to_the = lambda x, p: _PRODUCTS[p](x) if isinstance(p, (int, float)) and p in _PRODUCTS else x ** p
power = _op("power", _to_the,
            lambda g, y, x, p: g * (p * _to_the(x, p - 1 + (p == 0))),
            lambda g, y, x, p: g * (y * np.log(np.where(x == 0, 1, x))))

# `log(1 + e^x)` overflows at x = 89 in float32; logaddexp(x, 0) is the same and does not. The
# derivative of logaddexp by a is `e^a / (e^a + e^b) = e^(a - y)`; that of softplus is sigmoid(x),
# or `1 - e^-y`, since `e^y = 1 + e^x`; that of sigmoid is `e^-x y^2 = y (1 - y)`: `1/y = 1 + e^-x`.
_finite = lambda m: np.where(np.isfinite(m), m, 0)  # or -inf minus a result of -inf would be nan
logaddexp = _op("logaddexp", np.logaddexp,
                lambda g, y, a, b: g * np.exp(a - _finite(y)),
                lambda g, y, a, b: g * np.exp(b - _finite(y)))
softplus = _op("softplus", lambda x: np.logaddexp(x, 0), lambda g, y, x: -g * np.expm1(-y),
               doc="log(1 + exp(x)), without overflow.")
sigmoid = _op("sigmoid", lambda x: np.exp(-np.logaddexp(-x, 0)), lambda g, y, x: g * (y * (1 - y)),
              doc="1 / (1 + exp(-x)), without overflow.")

# At a kink any slope between the two sides is right: abs and relu take 0 there, and where two
# operands tie, each gets half. Comparisons give plain bool arrays, which count as 0 and 1.
abs_ = _op("abs", np.abs, lambda g, y, x: g * np.sign(x))
relu = _op("relu", lambda x: np.clip(x, 0, np.inf), lambda g, y, x: g * (x > 0),
           doc="max(x, 0), element by element.")  # clip, as NumPy's fastest way to say so
_to_the_winner = (lambda g, y, a, b: g * (a == y) - g * (a == b) * 0.5,
                  lambda g, y, a, b: g * (b == y) - g * (a == b) * 0.5)
maximum = _op("maximum", np.maximum, *_to_the_winner)
minimum = _op("minimum", np.minimum, *_to_the_winner)
_clip = _op("clip", lambda x, *bounds: np.clip(x, *bounds), lambda g, y, x, *bounds: g * (x == y))

def clip(x: Any, low: Any = None, high: Any = None) -> Tensor:
    """x limited to [low, high], which are constants; the gradient passes where x is within."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise TypeError("clip: the bounds are constants; for a Tensor use maximum and minimum")
    return _clip(x, low, high)

@primitive(None, lambda g, y, c, a, b: np.where(c, g, 0), lambda g, y, c, a, b: np.where(c, 0, g))
def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the bool array `condition` holds, else b. The condition has no gradient."""
    if np.asarray(condition).dtype.kind != "b":
        raise TypeError("the condition must be a bool array, such as x > 0")
    return np.where(condition, a, b)

@primitive(lambda g, y, x, dtype: g)
def astype(x: Any, dtype: Any) -> Tensor:
    """x as another floating-point type; the gradient is converted back (by the walk)."""
    if np.dtype(dtype).kind != "f":
        raise TypeError(f"a Tensor holds floating-point numbers, not {np.dtype(dtype)}")
    return x.astype(dtype)

# ### How to add an operation
#
# Write the function and one rule per operand; nothing is registered, unless it is to be a method or
# to answer a function of `np` (the tables end this chapter). The function may use all of NumPy, for
# it only meets arrays; rules use operators, functions of `np`, operations. `check_grad` tests both.
#
#     >>> @primitive(lambda g, y, x: g / (1 + x * x))
#     ... def arctan(x):
#     ...     return np.arctan(x)
#     ...
#     >>> check_grad(arctan, np.array([-1.0, 0.5, 2.0]), order=3) < 1e-6
#     True
#     >>> print(grad(grad(arctan))(1.0))  # -2x / (1 + x*x)**2
#     -0.5
#
# If that is too slow, write a kernel, and let what you had be its definition. Here is how.
#
# ### In blocks, and fused
#
# gelu, below, takes a dozen passes over an array. Arithmetic is quick, and memory is what one waits
# for; so all passes go over one block while it is in the processor's cache, and then over the next.
_BLOCK = 1 << 16  # elements: four float32 blocks fill a level-2 cache of 1 MiB

def _blocks(*arrays: np.ndarray) -> Iterator[list]:
    """Matching pieces of dense arrays with the same layout in memory, as flat views."""
    flat = [a.ravel(order="K") for a in arrays]
    for i in range(0, flat[0].size, _BLOCK):
        yield [a[i:i + _BLOCK] for a in flat]

def _dense(x: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """x, with its axes in memory in the order of `like` and no gaps; copied only if it must be."""
    out = np.empty_like(x if like is None else like)
    if x.strides == out.strides:
        return x
    out[...] = x
    return out

# gelu is `x` times the probability `p` that a standard normal number is below x. Its definition
# here is the approximation of Hendrycks and Gimpel (2016) that GPT-2 uses and PyTorch calls
# `approximate="tanh"`: `p = (1 + tanh(u)) / 2` with a cubic `u` (NumPy lacks the erf of the exact
# one). As `dp/dx = 2 p (1 - p) du/dx`, the derivative of x p is `p (1 + (1 - p) x 2 du/dx)`. The
# kernel keeps p, and works in place, since new arrays would drive the block out of the cache.
_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715

@fused(lambda x: 0.5 * x * (1 + np.tanh(x * (_GELU_SCALE + _GELU_CUBIC * (x * x)))))
def gelu(x: Any) -> Tensor:
    """The Gaussian error linear unit, `x * P(normal < x)`, in its tanh approximation."""
    x = _dense(_real_array(x))
    y, p = np.empty_like(x), np.empty_like(x)
    for x_, y_, p_ in _blocks(x, y, p):
        np.multiply(x_, x_, out=p_)
        p_ *= _GELU_CUBIC
        p_ += _GELU_SCALE
        p_ *= x_
        np.tanh(p_, out=p_)
        p_ *= 0.5
        p_ += 0.5
        np.multiply(x_, p_, out=y_)
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dx = _dense(g, x), np.empty_like(x)
        for g_, x_, p_, dx_ in _blocks(g, x, p, dx):
            np.multiply(x_, x_, out=dx_)  # after the next two: 2 (scale + 3 cubic x^2)
            dx_ *= 6 * _GELU_CUBIC
            dx_ += 2 * _GELU_SCALE
            dx_ *= x_
            dx_ *= 1 - p_
            dx_ += 1
            dx_ *= p_
            dx_ *= g_
        return (dx,)
    return y, pullback

# ### Shape
#
# These move elements about; the rule moves them back. Most return views, and cost next to nothing.
# What takes NumPy's own arguments stands in a table. (A permutation's inverse is its argsort.)
_np_op = functools.partial(_op, doc="As np.{}, with the same arguments.")
_in_the_shape_of_x = lambda g, y, x, *_, **__: g.reshape(x.shape)
_slice = lambda x, axis, start, n: x[(slice(None),) * (axis % x.ndim) + (slice(start, start + n),)]
reshape = _np_op("reshape", lambda x, *shape: x.reshape(*shape), _in_the_shape_of_x)
transpose = _np_op("transpose", lambda x, *axes: x.transpose(*axes), lambda g, y, x, *axes: (
    g.transpose(np.argsort(np.ravel(axes) % x.ndim)) if axes and axes[0] is not None else g.T))
swapaxes = _np_op("swapaxes", lambda x, axis1, axis2: x.swapaxes(axis1, axis2),
                  lambda g, y, x, axis1, axis2: g.swapaxes(axis1, axis2))
moveaxis = _np_op("moveaxis", lambda x, source, destination: np.moveaxis(x, source, destination),
                  lambda g, y, x, source, destination: np.moveaxis(g, destination, source))
expand_dims = _np_op("expand_dims", lambda x, axis: np.expand_dims(x, axis), _in_the_shape_of_x)
squeeze = _np_op("squeeze", lambda x, axis=None: np.squeeze(x, axis), _in_the_shape_of_x)
broadcast_to = _np_op("broadcast_to", lambda x, shape: np.broadcast_to(x, shape),
                      lambda g, y, x, shape: g)  # the sum in the backward pass is the walk's
pad = _np_op("pad", lambda x, pad_width: np.pad(x, pad_width), lambda g, y, x, pad_width: g[tuple(
    slice(i, i + n) for (i, _), n in zip(np.broadcast_to(pad_width, (x.ndim, 2)), x.shape))],
             doc="Zeros around x: a number of them, (before, after), or one such pair per axis.")

@primitive(each=lambda i, g, y, *xs, axis: _slice(
    g, axis, sum(x.shape[axis] for x in xs[:i]), xs[i].shape[axis]))
def _concatenate(*xs: Any, axis: int) -> Tensor:
    return np.concatenate(xs, axis)

def concatenate(tensors: Sequence, axis: int | None = 0) -> Tensor:
    """The tensors joined end to end along an axis they have; None flattens them first."""
    tensors = [reshape(t, -1) if axis is None else as_tensor(t) for t in tensors]
    return _concatenate(*tensors, axis=axis or 0)

def stack(tensors: Sequence, axis: int = 0) -> Tensor:
    """The tensors, all of one shape, side by side along a new axis."""
    shapes = {np.shape(t) for t in tensors}
    if len(shapes) != 1:
        raise ValueError(f"stack: needs tensors of one shape, and was given {sorted(shapes)}")
    return concatenate([expand_dims(t, axis) for t in tensors], axis)

def split(x: Any, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """x cut along an axis into equal sections (a number) or at indices (a list), as by np.split."""
    x = as_tensor(x)
    try:
        pieces = np.split(np.arange(x.shape[axis]), sections)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"split of shape {x.shape} along axis {axis}: {error}") from None
    return [_slice(x, axis, p[0] if p.size else 0, p.size) for p in pieces]

# Indexing takes elements out, scatter-add puts them back, and each is the other's rule. An index
# may name an element twice, and then both cotangents must arrive: hence *add*. `np.add.at` does
# that slowly; numbering the elements and counting with weights does the same and is fast.
getitem = _op("getitem", lambda x, index: x[index],
              lambda g, y, x, index: scatter_add(g, index, x.shape),
              doc="x[index], with NumPy's basic and advanced indexing.")

@primitive(lambda g, y, x, index, shape: g[index])
def scatter_add(x: Any, index: Any, shape: tuple) -> Tensor:
    """Zeros of `shape` with the elements of x added at `index`: the transpose of indexing."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(p is None or p is ... or isinstance(p, (int, np.integer, slice)) for p in parts):
        out = np.zeros(shape, x.dtype)
        out[index] = x  # a basic index names no element twice
        return out
    number = np.arange(math.prod(shape)).reshape(shape)[index]
    weights = np.broadcast_to(x, number.shape).ravel()
    return np.bincount(number.ravel(), weights, math.prod(shape)).reshape(shape).astype(x.dtype)

# ### Reductions
#
# What does a sum do backwards? Take x of shape (4, 3) and `y = sum(x, axis=0)`, of shape (3,). Move
# one element `x[i, j]` by `dx`: `y[j]` moves by the same `dx`, and L by `g[j] * dx`. So `x[i, j]`
# receives `g[j]`, whatever i is: a sum hands its cotangent, as it is, to everything it added up. In
# arrays, g of shape (3,) regains the axis that was summed away, (1, 3), which is `_restore`, and is
# stretched along it, (4, 3). Stretching and sum are each other's rule, as with indexing. A mean is
# a sum over n, and hands everybody an n-th of g.
_restore = lambda r, x, axis: r if axis is None or r.ndim == x.ndim else np.expand_dims(r, axis)
_stretch = lambda g, x, axis: np.broadcast_to(_restore(g, x, axis), x.shape)

# NumPy's own reductions start anew for every row, which for short rows is most of their time. A
# sum over the last axes is faster as a product with ones, a row's maximum by reduceat. (np.dot
# lets other threads of Python run meanwhile; `@` does so only if its *result* is large.)
_rows = lambda x: x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
_ones = functools.lru_cache(16)(np.ones)

def _row_sum(x: Any, axis: Any = -1) -> Any:
    """sum(x, axis, keepdims=True), in array code. (`_rows` joins all axes but the last.)"""
    if axis not in (-1, x.ndim - 1):
        return np.sum(x, axis=axis, keepdims=True)
    return np.dot(_rows(x), _ones(x.shape[-1], x.dtype)).reshape(*x.shape[:-1], 1)

def _row_max(x: np.ndarray, axis: Any = -1) -> np.ndarray:
    """max(x, axis, keepdims=True)."""
    if axis not in (-1, x.ndim - 1) or x.size == 0 or not x.flags.c_contiguous:
        return np.max(x, axis=axis, keepdims=True)
    rows = np.maximum.reduceat(x.reshape(-1), np.arange(0, x.size, x.shape[-1]))
    return rows.reshape(*x.shape[:-1], 1)

@primitive(lambda g, y, x, axis=None, keepdims=False: _stretch(g, x, axis))
def sum_(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The sum over all elements, or over the axes given."""
    named = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = sorted(a + x.ndim if a < 0 else a for a in named)
    first = x.ndim - len(axes)
    kept, n = x.shape[:first], math.prod(x.shape[first:])
    # NumPy adds in pairs and rounds off less: better for float64, a whole array, more than ~4096.
    if axes != list(range(first, x.ndim)) or first < 1 or n > 4096 or x.dtype != np.float32:
        return np.sum(x, axis=axis, keepdims=keepdims)
    return _row_sum(x.reshape(math.prod(kept), n)).reshape(kept + (1,) * (len(axes) * keepdims))

@primitive(lambda g, y, x, axis=None, keepdims=False:
           _stretch(g * (y.size / max(1, x.size)), x, axis))
def mean(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """The mean over all elements, or over the axes given."""
    y = sum_.__wrapped__(x, axis, keepdims)  # the bare function, left there by functools.wraps
    return y / (x.size // max(1, y.size))

def var(x: Any, axis: int | tuple | None = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """The variance, divided by n - ddof, as np.var has it (torch.var has ddof=1)."""
    x, total = as_tensor(x), sum_(x, axis, keepdims=True)
    n = x.size // max(1, total.size)
    if n <= ddof and total.size:
        raise ValueError(f"var of shape {x.shape} over axis {axis}: {n} elements are too few")
    centred = x - total / n
    return sum_(centred * centred, axis, keepdims) / (n - ddof)

def std(x: Any, axis: int | tuple | None = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """The standard deviation, the square root of `var`."""
    return sqrt(var(x, axis, ddof, keepdims))

def _to_ties(g: Any, y: Any, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    winners = x == _restore(y, x, axis)
    return np.where(winners, _restore(g, x, axis) / np.sum(winners, axis, keepdims=True), 0)

max_ = _np_op("max", lambda x, axis=None, keepdims=False: np.max(x, axis, None, keepdims), _to_ties)
min_ = _np_op("min", lambda x, axis=None, keepdims=False: np.min(x, axis, None, keepdims), _to_ties)

# The exponentials of large numbers overflow. So the largest is subtracted first, and nothing
# exceeds exp(0) = 1. logsumexp adds it back at the end; in softmax it cancels.
@primitive(lambda g, y, x, axis=None, keepdims=False: (
    _restore(g, x, axis) * np.exp(x - _finite(_restore(y, x, axis)))))
def logsumexp(x: Any, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))), without overflow. The derivative is softmax(x) = exp(x - y)."""
    m = _finite(np.max(x, axis=axis, keepdims=True)).astype(x.dtype)
    with np.errstate(divide="ignore"):  # log(0) = -inf is the right answer for a row of -inf
        y = np.log(np.sum(np.exp(x - m), axis=axis, keepdims=True)) + m
    return y if keepdims else np.squeeze(y, axis)

# With `y = softmax(x)`, `dy_i/dx_j = y_i (1[i=j] - y_j)`, so `g` comes back as
# `y * (g - sum(g * y))`; for the logarithm of y it is `g - y * sum(g)`.
@primitive(lambda g, y, x, axis=-1: y * (g - _row_sum(g * y, axis)))
def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along an axis."""
    e = _real_array(x) - _row_max(x, axis)
    np.exp(e, out=e)
    return np.multiply(e, 1 / _row_sum(e, axis), out=e)

@primitive(lambda g, y, x, axis=-1: g - np.exp(y) * _row_sum(g, axis))
def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """The logarithm of softmax, exact also where softmax underflows."""
    z = _real_array(x) - _row_max(x, axis)
    return np.subtract(z, np.log(_row_sum(np.exp(z), axis)), out=z)

# ### Linear algebra
#
# For `Y = A B`, each `Y_ij = sum_k A_ik B_kj`. `A_ik` meets `B_kj` in every column j, so it
# receives `sum_j g_ij B_kj`, which is `g B^T`; likewise B receives `A^T g`. Unless they are square,
# the shapes alone allow nothing else.
_matmul = _np_op("matmul", np.matmul, lambda g, y, a, b: g @ b.swapaxes(-1, -2),
                 lambda g, y, a, b: a.swapaxes(-1, -2) @ g)

def matmul(a: Any, b: Any) -> Tensor:
    """a @ b with NumPy's meaning for every rank: vectors, matrices, and stacks of matrices."""
    a, b = as_tensor(a), as_tensor(b)
    if 0 in (a.ndim, b.ndim) or a.shape[-1] != b.shape[-2:][0]:  # the last but one, or only
        raise ValueError(f"matmul of shapes {a.shape}, {b.shape}: inner axes differ or are missing")
    if b.ndim == 1 or (b.ndim == 2 and a.ndim != 2):  # vectors times one matrix: rows of another
        columns = b if b.ndim == 2 else expand_dims(b, 1)
        return _matmul(_rows(a), columns).reshape((*a.shape[:-1], *b.shape[1:]))
    return _matmul(expand_dims(a, 0), b).squeeze(-2) if a.ndim == 1 else _matmul(a, b)

def bmm(a: Any, b: Any) -> Tensor:
    """The products of two stacks of matrices, (n, i, k) @ (n, k, j) -> (n, i, j), one by one."""
    if np.ndim(a) != 3 or np.ndim(b) != 3 or len(a) != len(b):
        raise ValueError(f"bmm of shapes {np.shape(a)}, {np.shape(b)}: needs stacks of one length")
    return matmul(a, b)

# `linear` is `x @ W^T + b` with W stored as (out, in), the way PyTorch stores it. All leading axes
# of x are one long axis to it, so each gradient is a single product.
@primitive(lambda g, y, x, weight, bias=None: (_rows(g) @ weight).reshape(x.shape),
           lambda g, y, x, weight, bias=None: _rows(g).T @ _rows(x),
           lambda g, y, x, weight, bias: g)
def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """x @ weight.T + bias: (..., in), (out, in), (out,) -> (..., out)."""
    if x.shape[-1:] != weight.shape[1:] or bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError("needs an input (..., in), a weight (out, in) and a bias (out,)")
    y = (_rows(x) @ weight.T).reshape(*x.shape[:-1], len(weight))
    return y if bias is None else np.add(y, bias, out=y)

# An einsum is a sum of products over indices, so by an operand it differentiates into an einsum of
# the others with the cotangent in its place. Two cases need one more factor: an index that only
# this operand has was summed away, and comes back by a row of ones; an index it has twice picked a
# diagonal, and comes back by an identity matrix. `...` is passed on; NumPy finds its axes.
def _einsum_rule(i: int, g: Any, y: Any, subscripts: str, *xs: Any) -> Any:
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    if not arrow:  # NumPy then keeps what occurs once, in alphabetical order
        once = sorted(c for c in inputs if c not in ".," and inputs.count(c) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    xs = [x if isinstance(x, Tensor) else _real_array(x) for x in xs]  # NumPy adds bools to a bool
    factors = list(zip(inputs.split(","), xs))
    (target, x), factors[i - 1] = factors[i - 1], (output, g)  # g for x (0: subscripts)
    front, _, back = target.partition("...")  # the letters of the first axes, and of the last
    for letter, n in [*zip(front, x.shape), *zip(back[::-1], x.shape[::-1])]:
        if target.count(letter) > 1:
            fresh = min({*string.ascii_letters} - {*subscripts, *target})
            target = target.replace(letter, fresh, 1)
            factors.append((letter + fresh, np.eye(n, dtype=g.dtype)))
        elif not any(letter in other for other, _ in factors):
            factors.append((letter, np.ones(n, g.dtype)))
    others, arrays = zip(*factors)
    return np.einsum(",".join(others) + "->" + target, *arrays, optimize=len(arrays) > 1)

@primitive(each=_einsum_rule)
def einsum(subscripts: str, *operands: Any) -> Tensor:
    """np.einsum with a subscripts string, `einsum("bij,bjk->bik", a, b)`; `...` is understood."""
    if not isinstance(subscripts, str):
        raise TypeError("the subscripts must be a string, such as 'ij,jk->ik'")
    if "..." not in subscripts.rpartition("->")[2]:  # then it stands for no axes
        subscripts = subscripts.replace("...", "")
    return np.einsum(subscripts, *map(_real_array, operands), optimize=len(operands) > 1)

# ### Images
#
# A convolution slides a small window over an image and takes the same weighted sum everywhere. Said
# with arrays: *gather* all windows, then multiply by the weights, once. Pooling gathers too, and
# takes the largest or the mean. Images are (N, C, H, W): batch, channels, height, width. Sizes of
# windows, strides and paddings are numbers, or pairs for height and width.
_pair = lambda value: tuple(value) if isinstance(value, (tuple, list)) else (value, value)

def _gather(x: Any, kernel_size: Any, stride: Any = None) -> list:
    """Views (N, C, oh, ow) of x, one for each position in a window: that element of all windows."""
    kernel, stride = _pair(kernel_size), _pair(kernel_size if stride is None else stride)
    axes = list(zip(x.shape[2:], kernel, stride))
    if x.ndim != 4 or any(k < 1 or k > n or s < 1 for n, k, s in axes):
        raise ValueError(f"kernel {kernel} and stride {stride} must be >= 1, and fit (N, C, H, W)")
    rows, columns = ([slice(i, i + n - k + 1, s) for i in range(k)] for n, k, s in axes)
    return [x[:, :, i, j] for i in rows for j in columns]

def _scatter_back(shares: Iterable, x: np.ndarray, kernel_size: Any, stride: Any) -> np.ndarray:
    """The transpose of `_gather`: zeros like x, and each share added where its part was read."""
    dx = np.zeros_like(x)
    for part, share in zip(_gather(dx, kernel_size, stride), shares):
        part += share
    return dx

# The kernels keep images with the batch last, (C, H, W, N) in memory, and show them as (N, C, H, W)
# through a transposed view. A line of a small image is, say, 14 numbers, and NumPy pays for every
# loop it begins; with the batch last, W * N numbers lie side by side. Elementwise operations keep
# the order in memory, so from one layer to the next nothing is moved.
_batch_last = lambda x: x.transpose(*range(1, x.ndim), 0)
_batch_first = lambda x: x.transpose(-1, *range(x.ndim - 1))

# A convolution lays the windows out as the columns of one matrix (im2col: Chellapilla and others,
# 2006), so the weighted sums become a matrix product. Backward, both steps are transposed.
def _conv2d_definition(x, weight, bias=None, stride=1, padding=0):
    (top, left), (o, c, *kernel) = _pair(padding), weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    windows = np.stack(_gather(padded, kernel, stride))  # (kh kw, N, C, oh, ow)
    y = np.einsum("knchw,ock->nohw", windows, weight.reshape(o, c, -1))
    return y if bias is None else y + bias.reshape(-1, 1, 1)

@fused(_conv2d_definition)
def conv2d(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0) -> Tensor:
    """As torch's conv2d: images (N, C, H, W), weight (O, C, kh, kw), (O,) -> (N, O, oh, ow)."""
    top, left = _pair(padding)
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] or top < 0 or left < 0:
        raise ValueError(f"needs (N, C, H, W), (O, C, kh, kw) and a padding from 0, not {padding}")
    (n, c, h, w), (o, _, *kernel) = x.shape, weight.shape
    padded = _batch_first(np.zeros((c, h + 2 * top, w + 2 * left, n), x.dtype))
    inside = np.s_[:, :, top:top + h, left:left + w]
    padded[inside] = x
    parts = [_batch_last(part) for part in _gather(padded, kernel, stride)]
    shape, k = (c, len(parts), *parts[0].shape[1:]), c * len(parts)  # (C, kh kw, oh, ow, N)
    columns = lambda: np.stack(parts, axis=1).reshape(k, math.prod(shape[2:]))
    matrix = weight.reshape(o, k)
    y = matrix @ columns()  # (O, C kh kw) @ (C kh kw, oh ow N)
    if bias is not None:
        y += bias[:, None]
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dx = _batch_last(g).reshape(y.shape), None
        if wanted[0]:
            shares = (matrix.T @ g).reshape(shape).transpose(1, 4, 0, 2, 3)  # as `windows` above
            dx = _scatter_back(shares, padded, kernel, stride)[inside]
        # dw is g @ columns.T, written so that OpenBLAS is twice as fast; by np.dot, see `_row_sum`.
        # To make columns, kh kw times as large as x, again costs less than to keep them.
        dw = np.dot(columns(), g.T).T.reshape(weight.shape) if wanted[1] else None
        return dx, dw, _row_sum(g)[:, 0]
    return _batch_first(y.reshape(o, *shape[2:])), pullback

@fused(lambda *args, **params: functools.reduce(
    lambda best, part: np.where(part > best, part, best), _gather(*args, **params)))
def max_pool2d(x: Any, kernel_size: Any, stride: Any = None) -> Tensor:
    """The largest of each window, (N, C, H, W) -> (N, C, oh, ow). Of equals the first gets g."""
    parts = _gather(x, kernel_size, stride)
    y = functools.reduce(np.maximum, parts)
    apart = stride is None or np.all(np.less_equal(kernel_size, stride))
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dx, free = _dense(g, y), np.zeros_like(x), np.ones_like(y, bool)
        for part, to in zip(parts, _gather(dx, kernel_size, stride)):
            hit = (part == y) & free  # free are the windows that no position has claimed yet
            free ^= hit
            if apart:  # no element is in two windows, so there is nothing to add to
                np.multiply(g, hit, out=to)
            else:
                to += g * hit
        return (dx,)
    return y, pullback

@fused(lambda *args, **params: np.mean(np.stack(_gather(*args, **params)), axis=0))
def avg_pool2d(x: Any, kernel_size: Any, stride: Any = None) -> Tensor:
    """The mean of each window, (N, C, H, W) -> (N, C, oh, ow)."""
    parts = _gather(x, kernel_size, stride)
    return functools.reduce(np.add, parts) / len(parts), lambda g, wanted: (
        _scatter_back([g / len(parts)] * len(parts), x, kernel_size, stride),)

# ### Normalization
#
# Batch norm and layer norm do the same over different axes: subtract the mean, divide by the
# standard deviation, then scale and shift by learned numbers. Write `xhat = (x - mean) / s`. The
# cotangent of xhat is `h = g * weight`; going back through s and the mean takes away from h the two
# directions in which x can move without moving xhat, which are its mean and its part along xhat:
#
#     dx = (h - mean(h) - xhat * mean(h * xhat)) / s
#
# Layer norm normalizes each position, batch norm each channel; the kernels call these rows. Batch
# norm has one weight per row, and so may scale by it last, with 1 / s. (Its definition puts the
# channels last, to broadcast.) Ioffe and Szegedy, 2015; Ba, Kiros and Hinton, 2016.
def _norm_definition(x, weight, bias=None, eps=1e-5, axis=-1):
    centred = x - mean(x, axis, keepdims=True)
    xhat = centred / sqrt(mean(centred * centred, axis, keepdims=True) + eps)
    return xhat * weight if bias is None else xhat * weight + bias

_along = lambda x, y: np.einsum("ij,ij->i", x, y)[:, None]  # inner products of rows: (rows, 1)

def _normalize(x, eps):
    """x - mean, still to be multiplied by 1 / s; and mean, sum of squares and 1 / s of each row."""
    n, first = x.shape[1], x[:, :1]
    centred = x - first  # else, in float32, large equal numbers would not give exactly 0
    rest = _row_sum(centred) / n
    centred -= rest
    squares = _along(centred, centred)
    return centred, first + rest, squares, math.sqrt(n) / np.sqrt(squares + n * eps)

def _normalize_back(h, centred, slope, scale):
    """dx = (h - mean(h) - centred * slope) * scale, given centred or xhat; and h's row sums."""
    total = _row_sum(h)
    dx = centred * -slope
    dx += h
    dx -= total / h.shape[1]
    dx *= scale
    return dx, total

@fused(_norm_definition)
def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Normalize x over its last axis, scale by `weight` and shift by `bias`, both of that size."""
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError("the weight must be as long as the last axis of the input")
    xhat, _, _, inverse = _normalize(_rows(_real_array(x)), eps)
    xhat *= inverse
    y = xhat * weight
    if bias is not None:
        y += bias
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = g.reshape(xhat.shape)
        h = g * weight
        dx, _ = _normalize_back(h, xhat, _along(h, xhat) / h.shape[1], inverse)
        return dx.reshape(x.shape), np.einsum("ij,ij->j", g, xhat), _row_sum(g.T)[:, 0]
    return y.reshape(x.shape), pullback

@fused(lambda x, weight, bias, eps, running, momentum: _norm_definition(
    x.swapaxes(1, -1), weight, bias, eps, axis=tuple(range(x.ndim - 1))).swapaxes(1, -1))
def _batch_norm(x, weight, bias, eps, running, momentum):
    last = _batch_last(x)  # (C, ..., N)
    centred, mean, squares, inverse = _normalize(last.reshape(len(weight), -1), eps)
    n, scale = centred.shape[1], inverse * weight[:, None]
    for kept, new in zip(running, (mean, squares / (n - 1))):
        kept[...] += momentum * (new.ravel() - kept)
    y = centred * scale
    y += bias[:, None]
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g = _batch_last(g).reshape(centred.shape)
        dw = _along(g, centred) * inverse
        dx, db = _normalize_back(g, centred, dw * inverse / n, scale)
        return _batch_first(dx.reshape(last.shape)), dw.ravel(), db.ravel()
    return _batch_first(y.reshape(last.shape)), pullback

def batch_norm(x: Any, running_mean: np.ndarray, running_var: np.ndarray, weight: Any, bias: Any,
               training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Normalize each channel of x, (N, C) or (N, C, H, W), over all else.
    In training by the batch's own mean and variance, towards which the running arrays then move
    (the variance unbiased, as PyTorch keeps it); otherwise by the running ones.
    """
    x, c = as_tensor(x), len(weight)
    if x.ndim < 2 or x.shape[1] != c or training and x.size <= c:
        raise ValueError(f"batch_norm: axis 1 of {x.shape} must have {c} channels; and one value "
                         "per channel, or none, is too few to train on")
    if training:
        return _batch_norm(x, weight, bias, eps, (running_mean, running_var), momentum)
    scale = weight / np.sqrt(running_var + eps).astype(x.dtype)
    shift = bias - scale * running_mean.astype(x.dtype)
    return (x.swapaxes(1, -1) * scale + shift).swapaxes(1, -1)

# ### Attention, embedding, dropout
#
# Attention (Vaswani and others, 2017) lets each position of a sequence look at others: its *query*
# is compared with every *key*, and the *values* are averaged with the softmax of the scores as
# weights. Causal means that a position sees itself and what came before: to the scores of what lies
# ahead, -inf is added. Shapes: B sequences, H heads, T positions, D numbers per head.
_ahead = functools.lru_cache(8)(lambda shape, dtype: np.triu(np.full(shape, -np.inf, dtype), 1))

def _attention_definition(q, k, v, is_causal=False):
    scores = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]))  # (..., T, S)
    return softmax(scores + _ahead(scores.shape[-2:], scores.dtype) if is_causal else scores) @ v

# With E the exponentials of the scores and r one over their row sums, the softmax is `P = r E`, and
# `Y = r (E V)`: the small result is normalized, not the large matrix. Backward, with `h = r g`,
# `dV = E^T h`, and what reaches the scores is `E * (h V^T - rowsum(h * Y))`: softmax's rule sums
# S terms a row, `sum_j P_ij (V_j . g_i)`, and that is `Y_i . g_i`, D terms (Dao and others, 2022).
def _attend(q, k, v, is_causal, out=None):
    """The result (written to `out`), E and r."""
    e = (q * (1 / math.sqrt(q.shape[-1]))) @ k.swapaxes(-1, -2)
    if is_causal:
        e += _ahead(e.shape[-2:], e.dtype)
    e -= _row_max(e)
    np.exp(e, out=e)
    r = 1 / _row_sum(e)
    y = np.matmul(e, v, out=out)
    y *= r
    return y, e, r

def _attend_back(g, q, k, v, y, e, r, out=(None, None, None)):
    """The gradients of q, k and v (written to `out`)."""
    scale, h = 1 / math.sqrt(q.shape[-1]), g * r
    ds = h @ v.swapaxes(-1, -2)
    ds -= np.einsum("...i,...i->...", h, y)[..., None]
    ds *= e
    return (np.matmul(ds, k * scale, out=out[0]),
            np.matmul(ds.swapaxes(-1, -2), q * scale, out=out[1]),
            np.matmul(e.swapaxes(-1, -2), h, out=out[2]))

@fused(_attention_definition)
def scaled_dot_product_attention(q: Any, k: Any, v: Any, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: (..., T, D), (..., S, D), (..., S, E) -> (..., T, E).
    With `is_causal`, position i sees positions 0 to i. Raises ValueError if the shapes disagree.
    """
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError("the shapes must be (..., T, D), (..., S, D) and (..., S, E)")
    kept = _attend(q, k, v, is_causal)
    return kept[0], lambda g, wanted: _attend_back(g, q, k, v, *kept)

# A transformer computes q, k and v of all heads by one product, side by side in one array. Taking
# them out as views, and writing their gradients into views of one array, saves all the copying.
def _heads(qkv: Any, num_heads: int) -> Any:
    b, t, c = qkv.shape  # (B, T, 3 H D) -> (3, B, H, T, D)
    return qkv.reshape(b, t, 3, num_heads, c // (3 * num_heads)).transpose(2, 0, 3, 1, 4)

def _merge(y: Any) -> Any:  # (B, H, T, D) -> (B, T, H D)
    return y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], y.shape[1] * y.shape[3])

# The kernel takes a few sequences at a time, whose E, of about two blocks, stays in the cache.
@fused(lambda qkv, num_heads: _merge(_attention_definition(*_heads(qkv, num_heads), True)))
def causal_self_attention(qkv: Any, num_heads: int) -> Tensor:
    """Causal attention in `num_heads` heads: (B, T, 3 * C) -> (B, T, C); qkv is q, k, v in one."""
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"needs (B, T, 3 * C) with C divisible by {num_heads} heads")
    heads = _heads(_real_array(qkv), num_heads)
    _, b, h, t, d = heads.shape
    y = np.empty((b, t, h, d), heads.dtype).swapaxes(1, 2)  # (B, H, T, D)
    step = max(1, 2 * _BLOCK // max(1, h * t * t))
    parts = [slice(i, i + step) for i in range(0, b, step)]
    kept = [_attend(*heads[:, s], True, out=y[s]) for s in parts]
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        g, dqkv = g.reshape(b, t, h, d).swapaxes(1, 2), np.empty_like(qkv)
        to = _heads(dqkv, num_heads)
        for s, results in zip(parts, kept):
            _attend_back(g[s], *heads[:, s], *results, out=to[:, s])
        return (dqkv,)
    return _merge(y), pullback

def _whole_numbers(what: str, ids: Any, count: int) -> np.ndarray:
    """`ids` as an integer array with all elements in 0..count-1, or an error that says why not."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what} must be a plain array of integers, not {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise ValueError(f"{what} must be from 0 to {count - 1}, not {ids.min()} to {ids.max()}")
    return ids

# Looking up row i is multiplying by a one-hot vector. For the backward pass of a small vocabulary
# we really do multiply: one product beats adding up rows one at a time.
@fused(lambda ids, weight: weight[ids])
def embedding(ids: Any, weight: Any) -> Tensor:
    """The rows of weight (V, C) named by an integer array: ids.shape + (C,)."""
    ids = _whole_numbers("ids", ids, len(weight))
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        if len(weight) > 1024:  # then the product would be slower, for nearly all are zeros
            return None, scatter_add.__wrapped__(g, ids, weight.shape)
        one_hot = np.zeros((ids.size, len(weight)), g.dtype)
        one_hot[np.arange(ids.size), ids.reshape(-1)] = 1
        return None, one_hot.T @ g.reshape(ids.size, weight.shape[1])
    return weight[ids], pullback

def dropout(x: Any, p: float = 0.5, training: bool = True) -> Tensor:
    """In training, set elements to 0 with probability p and scale the others by 1 / (1 - p)."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be at least 0 and below 1, not {p}")
    x = as_tensor(x)
    if not training or p == 0:
        return x
    keep = _mode.rng.random(x.shape, np.float32) >= p
    return x * (keep * np.asarray(1 / (1 - p), x.dtype))

# ### Losses
#
# How wrong is a prediction? A loss says it in one number, for training to make small. For classes,
# softmax and logarithm are taken together: the loss of a row is `log(sum(exp(x))) - x[target]`. The
# first term's derivative is softmax(x), the second's is 1 at the target: `softmax - one_hot`, the
# probabilities minus what they should have been. (The other losses are compositions of operations.)
@fused(lambda logits, targets: -np.mean(log_softmax(logits)[np.arange(len(targets)), targets]))
def cross_entropy(logits: Any, targets: Any) -> Tensor:
    """The mean of -log softmax(logits)[target]: logits (N, C), integer targets (N,) -> a scalar.
    Raises ValueError for shapes or targets that do not fit, TypeError for non-integer targets.
    """
    if logits.ndim != 2 or np.shape(targets) != logits.shape[:1] or len(logits) == 0:
        raise ValueError("needs logits (N, C), targets (N,), not of no rows; reshape (B, T, C)")
    hit = np.arange(len(logits)), _whole_numbers("targets", targets, logits.shape[1])
    p = _real_array(logits) - _row_max(logits)
    picked = p[hit]
    np.exp(p, out=p)
    total = _row_sum(p)  # the softmax is p / total
    def pullback(g: np.ndarray, wanted: list) -> tuple:
        share = np.asarray(g / len(p), p.dtype)
        dx = p * (share / total)
        dx[hit] -= share
        return (dx, None)
    return np.mean(np.log(total[:, 0]) - picked), pullback

def _matched(loss: str, prediction: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Both, of one shape and dtype. No loss broadcasts: (N, 1) against (N,) would be (N, N)."""
    p, t = as_tensor(prediction), as_tensor(target)
    if p.shape != t.shape or p.size == 0:
        raise ValueError(f"{loss}: shapes {p.shape} and {t.shape} differ, or have no elements")
    return p, t.astype(p.dtype)

def mse_loss(prediction: Any, target: Any) -> Tensor:
    """The mean squared difference of two arrays of one shape."""
    p, t = _matched("mse_loss", prediction, target)
    return mean((p - t) ** 2)

def binary_cross_entropy_with_logits(logits: Any, target: Any) -> Tensor:
    """The mean of -log probability, where sigmoid(logits) is the probability of target 1."""
    x, t = _matched("binary_cross_entropy_with_logits", logits, target)
    return mean(softplus(x) - t * x)  # = -t log s - (1-t) log(1-s), s = sigmoid(x); no overflow

def binary_cross_entropy(probability: Any, target: Any) -> Tensor:
    """The mean of -log probability, from [0, 1]; logarithms are held above -100, as in PyTorch."""
    p, t = _matched("binary_cross_entropy", probability, target)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("binary_cross_entropy: not in [0, 1]; for logits there is ..._with_logits")
    log_of = lambda p: log(clip(p, math.exp(-100)))
    return -mean(t * log_of(p) + (1 - t) * log_of(1 - p))

def hinge_loss(prediction: Any, target: Any) -> Tensor:
    """The mean of max(0, 1 - target * prediction), for targets -1 and 1."""
    p, t = _matched("hinge_loss", prediction, target)
    if not np.all(abs_(t) == 1):
        raise ValueError("hinge_loss: targets must be -1 or 1")
    return mean(relu(1 - t * p))

# ### What a Tensor can do, and what NumPy may ask of it
#
# The operations exist; here they become operators, methods and NumPy's own functions.
for _name, _f in dict(add=add, sub=sub, mul=mul, truediv=div, pow=power, matmul=matmul).items():
    setattr(Tensor, f"__{_name}__", _f)
    setattr(Tensor, f"__r{_name}__", lambda self, other, op=_f: op(other, self))
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):  # so __hash__ stays
    setattr(Tensor, _name, lambda a, b, name=_name: getattr(np.asarray(a._data), name)(_value(b)))
for _f in (abs_, exp, log, sqrt, sin, cos, tanh, sigmoid, relu, clip, astype, _copy, sum_, mean, var,
           std, max_, min_, reshape, transpose, swapaxes, squeeze, np.ravel, np.dot, np.argmax,
           np.argmin):  # (np's own, called as methods, come back to the tables)
    setattr(Tensor, _f.__name__, _f)
Tensor.__neg__, Tensor.__abs__, Tensor.__getitem__, Tensor.flatten = neg, abs_, getitem, np.ravel
Tensor.tolist = lambda self: self._data.tolist()

def _dot(a: Any, b: Any) -> Tensor:
    """a @ b, or a * b if one is a number; b has at most two axes."""
    if np.ndim(b) > 2:
        raise TypeError(f"np.dot with a Tensor of shape {np.shape(b)}: use np.matmul or np.einsum")
    return mul(a, b) if 0 in (np.ndim(a), np.ndim(b)) else matmul(a, b)

# A reduction with the arguments that NumPy passes; `more` may have keepdims, and ddof for var.
_reduction = lambda op: lambda a, axis=None, dtype=None, **more: op(
    a if dtype is None else astype(a, dtype), axis, **more)
_FUNCTIONS.update({  # one table, though NumPy asks for its ufuncs and for the rest in two ways
    **{getattr(np, _f.__name__): _f for _f in (
        add, power, exp, expm1, log, log1p, logaddexp, sqrt, sin, cos, tanh, maximum, minimum,
        matmul, where, swapaxes, moveaxis, expand_dims, squeeze, broadcast_to, concatenate, stack)},
    **{getattr(np, _f.__name__): _reduction(_f) for _f in (sum_, mean, var, std, max_, min_)},
    np.amax: _reduction(max_), np.amin: _reduction(min_), np.tan: lambda x: sin(x) / cos(x),
    np.subtract: sub, np.multiply: mul, np.true_divide: div, np.negative: neg, np.absolute: abs_,
    np.fabs: abs_, np.positive: identity, np.square: lambda x: x * x, np.reciprocal: lambda x: 1 / x,
    np.clip: lambda a, a_min=None, a_max=None, *, min=None, max=None: clip(
        a, min if a_min is None else a_min, max if a_max is None else a_max),
    np.reshape: lambda a, shape=None, *, newshape=None: reshape(
        a, newshape if shape is None else shape),
    np.ravel: lambda a: reshape(a, -1), np.transpose: lambda a, axes=None: transpose(a, axes),
    np.hstack: lambda tup: concatenate(tup, 0 if np.ndim(tup[0]) < 2 else 1),
    np.vstack: lambda tup: concatenate([expand_dims(t, 0) if np.ndim(t) == 1 else t for t in tup]),
    np.split: lambda ary, indices_or_sections, axis=0: split(ary, indices_or_sections, axis),
    np.pad: lambda array, pad_width, mode="constant": pad(
        array, pad_width, **{} if mode == "constant" else {"mode": mode}),  # pad refuses that
    np.vdot: lambda a, b: _dot(reshape(a, -1), reshape(b, -1)),
    np.copy: _copy, np.dot: _dot, np.outer: lambda a, b: reshape(a, -1, 1) * reshape(b, 1, -1),
    np.einsum: lambda subscripts, *operands, optimize=None: einsum(subscripts, *operands),
    np.full_like: lambda a, fill_value, dtype=None: broadcast_to(
        astype(fill_value, dtype or a.dtype), a.shape),
})
for _function, _f in _FUNCTIONS.items():  # so a TypeError for a wrong argument names np.x
    if _f.__qualname__[0] in "_<":  # such as <lambda>
        _f.__qualname__ = f"np.{_function.__name__}"

# These have derivative zero wherever it exists, or ask for a shape: they give plain arrays.
_WITHOUT_GRADIENT = {getattr(np, _name) for _name in (
    "sign floor ceil trunc rint round floor_divide isnan isinf isfinite signbit equal not_equal"
    " less less_equal greater greater_equal logical_and logical_or logical_not logical_xor isneginf"
    " isposinf isclose allclose array_equal argmax argmin argsort searchsorted nonzero"
    " count_nonzero any all shape ndim size zeros_like ones_like empty_like array2string array_repr"
    " array_str result_type may_share_memory shares_memory").split()}

# ## Modules
#
# Where do the numbers live that training changes? A Module is an object with Parameters among its
# attributes, and other modules that have some of their own. There is no registry: whoever wants the
# parameters looks through the attributes, and the lists among them, in the order in which they were
# set. An ndarray (batch norm's running mean) is saved with the parameters but not trained. Names
# and shapes are PyTorch's, so its state_dict is ours too.
class Parameter(Tensor):
    """A Tensor that its module trains."""
    __slots__ = ()

def _parts(holder: Any, prefix: str = "", deep: bool = True) -> Iterator[tuple[str, Any]]:
    """(dotted name, item) for all in a module or list, in its lists, and if `deep` its modules."""
    for key, item in vars(holder).items() if isinstance(holder, Module) else enumerate(holder):
        yield f"{prefix}{key}", item
        if isinstance(item, (list, tuple)) or deep and isinstance(item, Module):
            yield from _parts(item, f"{prefix}{key}.", deep)

def _fitting(what: str, own: dict, given: dict, strict: bool = True) -> dict[str, np.ndarray]:
    """The arrays `given` for `own` (or numbers), if names (when `strict`) and shapes agree."""
    missing, unknown = sorted(own.keys() - set(given)), sorted(set(given) - own.keys())
    if strict and (missing or unknown):
        raise KeyError(f"{what}: missing {missing}, unknown {unknown}")
    new = {k: np.asarray(_value(given[k]), np.result_type(own[k])) for k in own if k in given}
    for key, array in new.items():
        if array.shape != np.shape(own[key]):
            raise ValueError(f"{what}: {key} has shape {array.shape}, not {np.shape(own[key])}")
    return new

class Module:
    """The base of all layers and networks: give it attributes in `__init__`, write `forward`.
    Calling it runs `forward`, with lists stacked, and raw floats in the dtype of the parameters.
    """
    training = True
    def forward(self, *args: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward method")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = [_from_list(a) if isinstance(a, (list, tuple)) else a for a in args]
        for i, a in enumerate(args):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                dtypes = (p.dtype for _, p in _parts(self) if isinstance(p, Parameter))
                args[i] = a.astype(next(dtypes, a.dtype), copy=False)
        return self.forward(*args, **kwargs)
    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """(dotted name, parameter) pairs; one that occurs twice is listed once."""
        found = [(name, p) for name, p in _parts(self) if isinstance(p, Parameter)]
        first = {p: name for name, p in reversed(found)}
        return [(name, p) for name, p in found if first[p] == name]
    def parameters(self) -> list[Parameter]:
        """The parameters, each once."""
        return [parameter for _, parameter in self.named_parameters()]
    def modules(self) -> list[Module]:
        """This module and all below it."""
        return [self, *(item for _, item in _parts(self) if isinstance(item, Module))]
    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and running statistics, by PyTorch's dotted names."""
        return {name: np.array(_value(item)) for name, item in _parts(self)
                if isinstance(item, (Parameter, np.ndarray))}
    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Copy arrays in, all or none: KeyError for names, if strict, and ValueError for shapes."""
        own = dict(_parts(self))
        for name, array in _fitting("load_state_dict", self.state_dict(), state, strict).items():
            _value(own[name])[...] = array
            if isinstance(own[name], Parameter):
                _note_write(own[name])
    def astype(self, dtype: Any) -> Module:
        """Convert parameters and ndarray attributes in place, say to float64; returns self."""
        for p in self.parameters():
            p._data, p.grad = astype(p._data, dtype)._data, None
            _note_write(p)
        for own in map(vars, self.modules()):
            own.update({k: a.astype(dtype) for k, a in own.items() if isinstance(a, np.ndarray)})
        return self
    def train(self, mode: bool = True) -> Module:
        """Set this and all modules below to training, which dropout and batch norm ask about."""
        for module in self.modules():
            module.training = mode
        return self
    def eval(self) -> Module:
        """Set this and all modules below to evaluation."""
        return self.train(False)
    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None
    def __repr__(self) -> str:
        own = [f"{name}={getattr(item, 'shape', item)}" for name, item in vars(self).items()
               if isinstance(item, (Tensor, int, float, tuple)) and name != "training"]
        below = "".join(f"\n({name}): {item!r}" for name, item in _parts(self, deep=False)
                        if isinstance(item, Module)).replace("\n", "\n  ")
        return f"{type(self).__name__}({', '.join(own)}{below}" + ("\n)" if below else ")")

# A layer is a function of the chapter before, with the parameters and settings it needs. Weights
# start as in PyTorch, so that its recipes and learning rates carry over.
def _uniform(bias: bool, *shape: int) -> tuple[Parameter, Parameter | None]:
    bound = 1 / math.sqrt(math.prod(shape[1:]))  # so sums of that many products stay input-sized
    draw = lambda *shape: Parameter(_mode.rng.uniform(-bound, bound, shape).astype(np.float32))
    return draw(*shape), draw(shape[0]) if bias else None

def _positive(name: str, **sizes: int) -> None:
    for key, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}: {key} must be a positive integer, got {size!r}")

class Linear(Module):
    """x @ weight.T + bias, weight (out_features, in_features): (..., in) -> (..., out)."""
    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        _positive("Linear", in_features=in_features, out_features=out_features)
        self.weight, self.bias = _uniform(bias, out_features, in_features)
    def forward(self, x): return linear(x, self.weight, self.bias)

class Conv2d(Module):
    """`conv2d` with weight (out_channels, in_channels, kh, kw): (N, C, H, W) -> (N, O, oh, ow)."""
    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1,
                 padding: Any = 0, bias: bool = True) -> None:
        (h, w), self.stride, self.padding = _pair(kernel_size), stride, padding
        _positive("Conv2d", in_channels=in_channels, out_channels=out_channels, height=h, width=w)
        self.weight, self.bias = _uniform(bias, out_channels, in_channels, h, w)
    def forward(self, x): return conv2d(x, self.weight, self.bias, self.stride, self.padding)

class MaxPool2d(Module):
    """`max_pool2d`: the largest element of each window."""
    def __init__(self, kernel_size: Any, stride: Any = None) -> None:
        self.kernel_size, self.stride = kernel_size, stride
    def forward(self, x): return max_pool2d(x, self.kernel_size, self.stride)

class AvgPool2d(Module):
    """`avg_pool2d`: the mean of each window."""
    __init__ = MaxPool2d.__init__
    def forward(self, x): return avg_pool2d(x, self.kernel_size, self.stride)

class BatchNorm2d(Module):
    """`batch_norm` over the channels of (N, C, H, W), with running statistics for evaluation."""
    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        _positive("BatchNorm2d", num_features=num_features)
        self.eps, self.momentum = eps, momentum
        zeros, ones = np.zeros(num_features, np.float32), np.ones(num_features, np.float32)
        self.weight, self.bias = Parameter(ones), Parameter(zeros)
        self.running_mean, self.running_var = zeros, ones
    def forward(self, x):
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                          self.training, self.momentum, self.eps)

class LayerNorm(Module):
    """`layer_norm` over the last axis."""
    def __init__(self, normalized_shape: int, eps: float = 1e-5, bias: bool = True) -> None:
        _positive("LayerNorm", normalized_shape=normalized_shape)
        self.eps, self.weight = eps, Parameter(np.ones(normalized_shape, np.float32))
        self.bias = Parameter(np.zeros(normalized_shape, np.float32)) if bias else None
    def forward(self, x): return layer_norm(x, self.weight, self.bias, self.eps)

class Embedding(Module):
    """A table (num_embeddings, embedding_dim) looked up by integers: (...) -> (..., dim)."""
    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        _positive("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        shape = num_embeddings, embedding_dim
        self.weight = Parameter(_mode.rng.standard_normal(shape, np.float32))
    def forward(self, ids): return embedding(ids, self.weight)

class Dropout(Module):
    """`dropout`: active in training, nothing in evaluation."""
    def __init__(self, p: float = 0.5) -> None:
        dropout(0.0, p, training=False)  # complains of a wrong p
        self.p = p
    def forward(self, x): return dropout(x, self.p, self.training)

class Flatten(Module):
    """(N, ...) -> (N, everything else)."""
    def forward(self, x): return reshape(x, len(x), math.prod(x.shape[1:]))

def _layer(name: str, function: Callable) -> type:
    """A module without parameters that does what a function does."""
    return type(name, (Module,), dict(forward=staticmethod(function), __module__=__name__,
                                      __doc__=f"`{function.__name__}` as a module."))

ReLU, GELU, Tanh = _layer("ReLU", relu), _layer("GELU", gelu), _layer("Tanh", tanh)
Sigmoid, CrossEntropy = _layer("Sigmoid", sigmoid), _layer("CrossEntropy", cross_entropy)
MSE = _layer("MSE", mse_loss)

class Sequential(Module):
    """The layers given, one after another."""
    def __init__(self, *layers: Module) -> None:
        vars(self).update((str(i), layer) for i, layer in enumerate(layers))
    __getitem__ = lambda self, i: [m for m in vars(self).values() if isinstance(m, Module)][i]
    __len__ = lambda self: len(self[:])
    def forward(self, x): return functools.reduce(lambda x, layer: layer(x), self[:], x)

class MLP(Sequential):
    """Linear layers of these sizes with relu between them: (N, nin) -> (N, nouts[-1]).
    A last size of 1 is dropped, as in micrograd's MLP: (N, nin) -> (N,), and (nin,) -> a scalar.

        >>> MLP(2, [16, 1])(np.zeros((5, 2))).shape
        (5,)
    """
    def __init__(self, nin: int, nouts: Sequence[int]) -> None:
        _positive("MLP", layers=len(nouts))
        sizes = itertools.pairwise([nin, *nouts])
        super().__init__(*[layer for pair in sizes for layer in (Linear(*pair), ReLU())][:-1])
    def forward(self, x: Any) -> Tensor:
        y = super().forward(x)
        return y.squeeze(-1) if y.shape[-1] == 1 else y

# ### A transformer
#
# The GPT below is the decoder of "Language Models are Unsupervised Multitask Learners" (Radford
# and others, 2019). Each block adds two things to a running sum, the residual stream: what the
# positions learn from one another (attention), and what each makes of it by itself (the MLP).
#
# All that attention asks of old positions are their keys and values, which never change. So while
# GPT writes, `seen` keeps them: a list per layer, which from the first call on holds one array
# (2, B, H, T, D). A new character then costs the work of one position.

class MultiHeadAttention(Module):
    """Causal self-attention in `num_heads` heads, which divide C: (B, T, C) -> (B, T, C)."""
    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = False):
        _positive("MultiHeadAttention", embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"MultiHeadAttention: cannot split {embed_dim} into {num_heads} heads")
        self.num_heads, self.qkv = num_heads, Linear(embed_dim, 3 * embed_dim, bias)
        self.proj, self.dropout = Linear(embed_dim, embed_dim, bias), Dropout(dropout)
    def forward(self, x: Any, seen: list | None = None) -> Tensor:
        qkv = self.qkv(x)  # (B, T, 3C)
        if seen is None:
            return self.dropout(self.proj(causal_self_attention(qkv, self.num_heads)))
        heads = _heads(qkv._data, self.num_heads)  # (3, B, H, T, D)
        seen[:] = [np.concatenate([*seen, heads[1:]], axis=3)]
        # A single new position sees all before it, so only the first call needs the causal mask.
        y, _, _ = _attend(heads[0], *seen[0], is_causal=heads.shape[3] > 1)
        return self.proj(_wrap(_merge(y)))

class _Block(Module):
    def __init__(self, c: int, num_heads: int) -> None:
        self.ln1, self.ln2, self.attn = LayerNorm(c), LayerNorm(c), MultiHeadAttention(c, num_heads)
        self.mlp = Sequential(Linear(c, 4 * c), GELU(), Linear(4 * c, c))

class GPT(Module):
    """A decoder-only transformer: integers (B, T), T <= block_size -> logits (B, T, vocab_size).
    Learned positions, layer norms before attention and MLP, one matrix for embedding tokens and
    scoring them (Press and Wolf, 2017). Weights start at N(0, 0.02), those that write to the
    residual stream smaller by sqrt(2 * num_layers), as GPT-2's: so many terms add up in it.
    """
    def __init__(self, vocab_size: int, embed_dim: int, num_heads: int, num_layers: int,
                 block_size: int, dropout: float = 0.0) -> None:
        _positive("GPT", vocab_size=vocab_size, num_layers=num_layers, block_size=block_size)
        self.block_size, self.dropout = block_size, Dropout(dropout)
        self.tok_emb, self.pos_emb = (Embedding(n, embed_dim) for n in (vocab_size, block_size))
        self.blocks = [_Block(embed_dim, num_heads) for _ in range(num_layers)]
        self.ln_f = LayerNorm(embed_dim)
        for name, p in self.named_parameters():
            terms = 2 * num_layers if name.endswith(("proj.weight", "mlp.2.weight")) else 1
            if p.ndim == 2:
                p._data[...] = 0.02 / terms ** 0.5 * _mode.rng.standard_normal(p.shape, np.float32)
            elif name.endswith("bias"):
                p._data[...] = 0
    def forward(self, ids: Any, seen: list[list] | None = None) -> Tensor:
        ids = _whole_numbers("GPT: token ids", ids, len(self.tok_emb.weight))
        start = seen[0][0].shape[3] if seen and seen[0] else 0  # positions read already
        room = 1 if start else self.block_size
        if ids.ndim != 2 or not 0 < ids.shape[1] <= room:
            raise ValueError(f"GPT: needs ids (B, T), 0 < T <= {room}, not {ids.shape}")
        drop = identity if seen else self.dropout  # who writes drops nothing
        x = drop(self.tok_emb(ids) + self.pos_emb(start + np.arange(ids.shape[1])))  # (B, T, C)
        for block, before in zip(self.blocks, seen or itertools.repeat(None)):
            x = x + drop(block.attn(block.ln1(x), seen=before))
            x = x[:, -1:] if seen and block is self.blocks[-1] else x  # enough to go on writing
            x = x + drop(block.mlp(block.ln2(x)))
        return linear(self.ln_f(x), self.tok_emb.weight)  # (B, T, V)
    @no_grad()
    def generate(self, idx: Any, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None) -> np.ndarray:
        """Continue sequences of integers (B, T) by sampling, without dropout: (B, T + new tokens).
        `manual_seed` fixes draws, `temperature` divides the logits, `top_k` keeps the k largest.
        Once block_size is full, each step moves all positions, and the window is read anew.
        """
        if max_new_tokens < 0 or not temperature > 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"generate: too small: {max_new_tokens=}, {temperature=} or {top_k=}")
        idx, seen = np.array(idx, ndmin=1), None  # (`forward` checks the shape)
        for _ in range(max_new_tokens):
            if seen is None or idx.shape[1] > self.block_size:
                seen, unread = [[] for _ in self.blocks], idx[..., -self.block_size:]
            unread = _sample(self(unread, seen=seen)._data[:, -1] / np.float32(temperature), top_k)
            idx = np.concatenate([idx, unread], axis=1)
        return idx

def _sample(logits: np.ndarray, top_k: int | None) -> np.ndarray:
    """One index per row of logits (B, V), drawn from the softmax of all or the top k: (B, 1)."""
    if top_k is not None and top_k < logits.shape[1]:
        logits = np.where(logits < np.partition(logits, -top_k)[:, -top_k, None], -np.inf, logits)
    # The Gumbel-max trick: argmax(logits + Gumbel noise) is a draw from softmax(logits).
    return np.argmax(logits + _mode.rng.gumbel(size=logits.shape), axis=1)[:, None]

# ## Optimizers
#
# Gradients say which way is down. How far should each parameter go? An update rule is a few lines
# on arrays, and a network has fifty small arrays of parameters. To call NumPy ten times on each
# takes longer than the arithmetic. So the optimizer copies them into one flat array, updates that
# in pieces that fit the cache, and copies the results back. What it remembers from step to step
# (its state, a number or two per parameter) is as flat.
class Optimizer:
    """The base of all optimizers: a subclass names its states and writes `_update(x, g, *states)`,
    which changes x and the states in place; g is the gradient and may be overwritten.
    """
    _state_names: tuple[str, ...] = ()
    _flat = staticmethod(lambda tensors: np.concatenate([t._data.ravel() for t in tensors]))
    def __init__(self, params: Iterable[Tensor], lr: float, **settings: float) -> None:
        name, self.steps = type(self).__name__, 0
        self.params = [params] if isinstance(params, Module) else list(params)  # (refused below)
        if not all(isinstance(p, Tensor) and p._op is None for p in self.params):
            raise TypeError(f"{name}: parameters must be leaf Tensors, such as model.parameters()")
        if not self.params or len(set(self.params)) < len(self.params):
            raise ValueError(f"{name}: there are no parameters to optimize, or one is listed twice")
        vars(self).update(settings, lr=lr)
        if wrong := {k: v for k, v in dict(settings, lr=lr).items() if not np.min(v) >= 0}:
            raise ValueError(f"{name}: settings must not be negative, as is {wrong}")
        self._state = {key: np.zeros_like(self._flat(self.params)) for key in self._state_names}
        _calm_the_allocator()
    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.params:
            p.grad = None
    def step(self) -> None:
        """Move every parameter that has a gradient. Raises ValueError for one of another shape."""
        for p in self.params:
            if p.grad is not None and p.grad._data.shape != p._data.shape:
                raise ValueError(f"{type(self).__name__}: a gradient {p.grad.shape} for {p.shape}")
        self.steps, end = self.steps + 1, 0
        for has_grad, run in itertools.groupby(self.params, lambda p: p.grad is not None):
            run = list(run)
            start, end = end, end + sum(p.size for p in run)
            if has_grad:
                x, g = self._flat(run), self._flat(p.grad for p in run)
                for piece in _blocks(x, g, *(s[start:end] for s in self._state.values())):
                    self._update(*piece)
                for p, new in zip(run, np.split(x, np.cumsum([p.size for p in run]))):
                    p._data[...] = new.reshape(p.shape)
                    _note_write(p)
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: the step count, the learning rate and the state arrays."""
        return {"steps": self.steps, "lr": self.lr, **{k: s.copy() for k, s in self._state.items()}}
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict. Raises KeyError, ValueError if it is another optimizer's."""
        new = _fitting(f"{type(self).__name__}.load_state_dict", self.state_dict(), state)
        self.steps, self.lr = int(state["steps"]), float(state["lr"])
        self._state = {key: new[key].copy() for key in self._state}

@functools.cache
def _calm_the_allocator() -> None:
    """Make glibc keep freed memory: once, when training begins.
    A step makes and drops the same arrays of a few megabytes each time. By default glibc gives such
    memory back to the kernel and faults it in again page by page: half of the time of a CNN's step.
    So (mallopt(3)) let it keep what was freed, in blocks of up to 32 MiB, the most it takes; and in
    one heap for all threads, since it would not keep what the others have freed in theirs.
    """
    import ctypes
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where there is no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX

class SGD(Optimizer):
    """Gradient descent with momentum, Nesterov's if asked (Sutskever and others, 2013)."""
    _state_names = ("velocity",)
    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, momentum: float = 0.0,
                 nesterov: bool = False, weight_decay: float = 0.0) -> None:
        if nesterov and momentum == 0:
            raise ValueError("SGD: nesterov needs a momentum")
        self.nesterov = nesterov
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)
    def _update(self, x: np.ndarray, g: np.ndarray, velocity: np.ndarray) -> None:
        if self.weight_decay:
            g += self.weight_decay * x
        if self.momentum:
            velocity *= self.momentum
            velocity += g
            g = g + self.momentum * velocity if self.nesterov else velocity
        x -= self.lr * g

class Adam(Optimizer):
    """Steps of about lr per coordinate: mean gradient over its RMS (Kingma and Ba, 2015)."""
    _state_names, _decoupled = ("mean", "square"), False
    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"{type(self).__name__}: betas must be in [0, 1), not {betas}")
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)
    # Both averages start at zero, which dividing them by 1 - b^t corrects. Then the step is
    # lr * mean / (sqrt(square) + eps); multiplied out, the corrections are two numbers.
    def _update(self, x: np.ndarray, g: np.ndarray, mean: np.ndarray, square: np.ndarray) -> None:
        if self._decoupled:
            x *= 1 - self.lr * self.weight_decay
        elif self.weight_decay:
            g += self.weight_decay * x
        b1, b2 = self.betas
        mean *= b1
        mean += (1 - b1) * g
        square *= b2
        square += (1 - b2) * (g * g)
        root = math.sqrt(1 - b2 ** self.steps)
        rate = self.lr * root / (1 - b1 ** self.steps)
        x -= rate * (mean / (np.sqrt(square) + self.eps * root))

class AdamW(Adam):
    """Adam whose weight_decay shrinks x itself, not its gradient (Loshchilov and Hutter, 2019)."""
    _decoupled = True
    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

class CosineWarmupLR:
    """Sets an optimizer's lr: a line up to the lr it came with, then half a cosine to min_lr.
    Call `step()` after each optimizer step. (Loshchilov and Hutter, 2017, without restarts.)
    """
    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int,
                 min_lr: float = 0.0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"CosineWarmupLR: {warmup_steps} warmup_steps of {total_steps} steps")
        self.optimizer, self.min_lr = optimizer, min_lr
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.load_state_dict({"steps": 0, "max_lr": optimizer.lr})
    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, 2, ..."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        cosine = math.cos(math.pi * min(1.0, done))
        return self.min_lr + 0.5 * (self.max_lr - self.min_lr) * (1 + cosine)
    def step(self) -> None:
        """Move on to the next step's learning rate."""
        self.load_state_dict({"steps": self.steps + 1, "max_lr": self.max_lr})
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"steps": self.steps, "max_lr": self.max_lr}
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict."""
        self.steps, self.max_lr = int(state["steps"]), float(state["max_lr"])
        self.optimizer.lr = self.rate(self.steps)

def clip_grad_norm(params: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients so that their joint 2-norm is at most max_norm; returns it as it was.
    (Pascanu, Mikolov and Bengio, 2013.) A norm that is not finite leaves the gradients alone.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be above 0, not {max_norm}")
    params = [p for p in params if p.grad is not None]
    norm = math.sqrt(sum(float(np.vdot(p.grad._data, p.grad._data)) for p in params))
    if max_norm < norm < math.inf:
        for p in params:
            p.grad = p.grad * (max_norm / norm)
    return norm

# ## Loaders
#
# Where does the data come from, and how do we know that it is the right data? A network trained on
# half a file still learns something, so a damaged file costs an evening before anyone suspects it.
# Hence one rule: **bytes are believed only after their SHA-256 has been compared**, whether they
# came from the disk or from a mirror. It is that of the *unpacked* content, because two gzip files
# of one text may differ in every byte (but CIFAR-10's archive, of one source, counts packed). Here
# are each file's place under the data folder, its mirrors, and its content's size and digest.
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
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")}

# A mirror may be silent for ten seconds, and after the first ten must average 10 kB/s: a time-out
# on each read alone would let a server that sends one byte at a time hold us for days.
_TIMEOUT = 10.0

def _fetch(url: str, size: int) -> bytes:
    """The bytes behind `url`; if more than `size` and what gzip may add, only the beginning."""
    import urllib.request  # only here, for it is slow to load
    received, start = bytearray(), time.monotonic()
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply:
        while len(received) <= size + 4096 and (part := reply.read1(1 << 16)):
            received += part
            if time.monotonic() - start > _TIMEOUT + len(received) / 10_000:
                raise TimeoutError(f"only {len(received):,} bytes arrived in time")
            if sys.stderr and sys.stderr.isatty():
                print(f"{url}: {len(received) / 1e6:.1f} MB", end="\r", file=sys.stderr, flush=True)
    return bytes(received)

def _verified(place: str, name: str) -> bytes:
    """The content of data file `name`, from a path or URL; ValueError if the digest differs."""
    _, size, digest = _SOURCES[name]
    raw = content = _fetch(place, size) if "://" in place else pathlib.Path(place).read_bytes()
    if place.endswith(".gz") and not name.endswith(".gz"):
        with contextlib.suppress(zlib.error):  # 31: a gzip header; size + 1: whatever it promises
            content = zlib.decompressobj(wbits=31).decompress(raw, size + 1)
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise ValueError(f"{place}: expected {size:,} bytes with SHA-256 {digest}, found "
                         f"{len(content):,} bytes with {found}; it starts {raw[:24]!r}")
    return content

# A file must appear under its final name whole or not at all, even if the power fails or two
# processes write it at once. So each writer fills a file of its own *in the same folder* (a rename
# is atomic only within one file system), forces it to the disk, and then renames it. Checkpoints
# are written the same way. Only a process that is killed outright leaves its `.tmp` file behind.
def _write_whole(path: str, content: Any) -> None:
    """Replace the file at `path` by one with this content, atomically; OSError if it cannot."""
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was there before is untouched", path)
    finally:  # after an error, or Ctrl-C; else there is nothing left to remove
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        stack.callback(os.close, folder)
        os.fsync(folder)  # the new name is the folder's data, where folders can be synced

def _download(name: str, path: str) -> bytes:
    """The content of data file `name` from the first mirror that has it; `path` then holds it."""
    (mirrors, size, digest), failures = _SOURCES[name], []
    for url in (mirror.format(os.path.basename(name)) for mirror in mirrors):
        try:
            content = _verified(url, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            _write_whole(path, content)
            return content
        except Exception as error:  # whatever went wrong here, the next mirror may do better
            failures.append(f"{url}: {error}")
    raise OSError("\n  ".join([f"cannot get {name}:", *failures]) + f"\nPut it by hand at {path} ("
                  f"{size:,} bytes, SHA-256 {digest}), or set NANOAD_DATA to a folder that has it.")

# A download is stored unpacked, under the name that is tried first: no damaged file is in its way.
def _content(name: str) -> bytes:
    """The verified content of data file `name`: from the data folder, or else from a mirror."""
    folder = os.environ.get("NANOAD_DATA") or os.path.join(os.path.dirname(__file__), "data")
    path = os.path.abspath(os.path.join(folder, name))
    for candidate in filter(os.path.exists, (path, path + ".gz")):
        try:
            return _verified(candidate, name)
        except ValueError as error:
            print(f"nanoad: {error}; looking for a good copy", file=sys.stderr)
    return _download(name, path)

def _by_split(split: str, **choices: Any) -> Any:
    if split not in choices:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return choices[split]

# What the digest vouches for needs no further check. MNIST (LeCun, Cortes and Burges 1998) comes as
# IDX: four bytes that say what follows, four for each dimension, and then the array itself.
def load_mnist(split: str = "train", flatten: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 60,000 ("train") or 10,000 ("test") handwritten digits.
    Returns images, float32 in [0, 1] of shape (N, 1, 28, 28), or (N, 784) with `flatten`, and
    labels, int64 of shape (N,). OSError if the files are neither in the data folder nor online.
    """
    stem = "mnist/" + _by_split(split, train="train", test="t10k")
    images = np.frombuffer(_content(f"{stem}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(_content(f"{stem}-labels-idx1-ubyte"), np.uint8, offset=8)
    shape = (-1, 784) if flatten else (-1, 1, 28, 28)
    return np.divide(images.reshape(shape), 255, dtype=np.float32), labels.astype(np.int64)

# CIFAR-10 (Krizhevsky 2009) is read in its binary form, since the other one is a pickle, and a
# pickle is a program. Each record is a label byte and 3 x 32 x 32 bytes of red, green and blue. The
# archive is read where it lies, so no name inside it ever becomes a path on the disk.
def load_cifar10(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's 50,000 ("train") or 10,000 ("test") small colour photographs (170 MB to fetch).
    Returns what `load_mnist` does, with images of shape (N, 3, 32, 32), and fails as it does.
    """
    import tarfile  # only here, for it is slow to load
    batches = _by_split(split, train=[f"data_batch_{i}" for i in range(1, 6)], test=["test_batch"])
    unpacked = zlib.decompress(_content("cifar10/cifar-10-binary.tar.gz"), wbits=31)
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{b}.bin").read() for b in batches)
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    images = np.divide(records[:, 1:].reshape(-1, 3, 32, 32), 255, dtype=np.float32)
    return images, records[:, 0].astype(np.int64)

def load_tinyshakespeare() -> str:
    """The 1,115,394 characters of Shakespeare that Karpathy (2015) trained char-rnn on."""
    return _content("tinyshakespeare/input.txt").decode("utf-8")

def make_moons(n_samples: int = 100, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaving half circles, the smallest problem that no straight line solves.
    Returns float32 points (n_samples, 2), int64 labels 0 and 1. `noise` is a standard deviation.
    """
    if n_samples < 1 or noise < 0:
        raise ValueError(f"make_moons: needs n_samples >= 1, noise >= 0; got {n_samples}, {noise}")
    y = _mode.rng.permutation(np.arange(n_samples) % 2)
    angle = np.pi * (_mode.rng.random(n_samples) + y)  # the lower moon is turned by a half
    x = np.stack([np.cos(angle) + y, np.sin(angle) + 0.5 * y], axis=1)
    return _mode.rng.normal(x, noise).astype(np.float32), y.astype(np.int64)

class DataLoader:
    """Iterate over `x` and `y` (same length) in batches of (x_batch, y_batch), as ndarrays.
    With `shuffle` each pass has a new order, which `manual_seed` fixes; `drop_last` drops a short
    last batch. `transform(x_batch, rng)` returns what takes x_batch's place (augmentation); batches
    are copies, so it may write in place. ValueError: lengths that differ, a batch_size below 1.

        >>> [len(x) for x, y in DataLoader(np.zeros((10, 2)), np.zeros(10), batch_size=4)]
        [4, 4, 2]
    """
    def __init__(self, x: Any, y: Any, batch_size: int = 32, shuffle: bool = False,
                 drop_last: bool = False, transform: Callable | None = None) -> None:
        self.x, self.y = np.asarray(x), np.asarray(y)
        if self.x.shape[:1] != self.y.shape[:1] or self.x.ndim == 0:
            raise ValueError(f"DataLoader: x {self.x.shape} and y {self.y.shape} differ in length")
        _positive("DataLoader", batch_size=batch_size)
        self.batch_size, self.shuffle = int(batch_size), shuffle
        self.drop_last, self.transform = drop_last, transform
    def __len__(self) -> int:
        return (len(self.x) + (self.batch_size - 1) * (not self.drop_last)) // self.batch_size
    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = (_mode.rng.permutation if self.shuffle else np.arange)(len(self.x))
        for i in range(len(self)):
            rows = order[i * self.batch_size:(i + 1) * self.batch_size]
            x, y = self.x.take(rows, axis=0), self.y.take(rows, axis=0)
            yield (self.transform(x, _mode.rng) if self.transform else x), y

class CharTokenizer:
    """Number the distinct characters of `text` from 0, in code point order.
    `.chars` holds them as a string, so `CharTokenizer(tokenizer.chars)` is the same tokenizer.

        >>> tokenizer = CharTokenizer("hello")
        >>> tokenizer.chars, tokenizer.encode("hole").tolist(), tokenizer.decode([1, 0, 2, 2])
        ('ehlo', [1, 3, 2, 0], 'hell')
    """
    def __init__(self, text: str) -> None:
        self._ids = {char: i for i, char in enumerate(sorted(set(text)))}
        self.chars, self.vocab_size = "".join(self._ids), len(self._ids)
    def encode(self, text: str) -> np.ndarray:
        """int64 ids of shape (len(text),); ValueError for a character outside the vocabulary."""
        try:
            return np.fromiter(map(self._ids.__getitem__, text), np.int64, len(text))
        except KeyError as error:
            raise ValueError(f"CharTokenizer: {error} at position {text.index(*error.args)} is not "
                             f"among the {self.vocab_size} characters it knows") from None
    def decode(self, ids: Any) -> str:
        """The text of a 1-d sequence of ids; ValueError for one outside the vocabulary."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"CharTokenizer: ids must be 1-d integers, got {ids.dtype}{ids.shape}")
        if (bad := ids[(ids < 0) | (ids >= self.vocab_size)]).size:
            raise ValueError(f"CharTokenizer: id {bad[0]} is outside 0..{self.vocab_size - 1}")
        return "".join(map(self.chars.__getitem__, ids.tolist()))

# ## Saving
#
# How does a night of training survive the power cut at six? A checkpoint is whatever nested dict
# the script likes: weights, optimizer moments, the vocabulary. The file is an .npz, so `np.load`
# opens it without nanoad: each array is a member named by its dotted path, and all the rest is
# JSON in a member of its own; nothing is pickled. The last 64 characters are the SHA-256 of all
# that stands before them (they end the comment that a zip file may end with), so a damaged
# checkpoint is told from a whole one before any parser has read a byte of it.
_STAMP = b"nanoad checkpoint; the SHA-256 of all before it: "

def _describe(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """What JSON stores for `value`, once its arrays have been put into `arrays`.
    A dict stays a dict, and a list begins with its kind: ["list", ...], ["tuple", ...], or
    ["array", member]. Two paths may spell one name (`a.b`); the later gets a `_` at its end.
    """
    where = path or "the state"
    if isinstance(value, dict):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"save: keys must be strings; {where} has {strange[0]!r}")
        return {key: _describe(value[key], f"{path}.{key}".strip("."), arrays) for key in value}
    if isinstance(value, (list, tuple)):
        items = (_describe(item, f"{path}.{i}".strip("."), arrays) for i, item in enumerate(value))
        return ["list" if isinstance(value, list) else "tuple", *items]
    if not isinstance(value, (Tensor, np.ndarray, np.generic)):
        if value is None or isinstance(value, (int, float, str)):
            return value
        raise TypeError(f"save: {where} is a {type(value).__name__}, not an array or plain value")
    array = np.asarray(_value(value))
    if array.dtype.hasobject:
        raise TypeError(f"save: {where} is an array of objects, which only pickle could store")
    name = "".join(c if c.isalnum() or c in "_.-" else "_" for c in path)[:200] or "array"
    while name in arrays:
        name += "_"
    arrays[name] = array
    return ["array", name]

def save(path: str | os.PathLike, state: Any) -> None:
    """Write `state`, nested dicts and lists of arrays, Tensors and plain values, to `path`.
    At every moment `path` holds the old checkpoint or the new. Tensors and NumPy scalars come back
    as arrays, all else as it was, floats bit for bit. TypeError names what cannot be saved.
    """
    arrays, file = {"nanoad": np.empty(0)}, io.BytesIO()  # reserves the name for the JSON
    arrays["nanoad"] = np.frombuffer(json.dumps(_describe(state, "", arrays)).encode(), np.uint8)
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = _STAMP + bytes(64)  # room for the digest, which it cannot know yet
        for name, array in arrays.items():
            # A ZipInfo of our own has no date in it: equal states make equal files.
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    content = file.getvalue()[:-64]
    content += hashlib.sha256(content).hexdigest().encode()
    _write_whole(os.path.realpath(os.fsdecode(path)), content)

def load(path: str | os.PathLike) -> Any:
    """The state that `save` wrote to `path`. Reads only: nothing in the file is run or unpacked.
    FileNotFoundError if there is none; ValueError if it is not, to the last bit, what `save` wrote.
    """
    raw = pathlib.Path(os.fsdecode(path)).read_bytes()
    if not raw.endswith(_STAMP + hashlib.sha256(memoryview(raw)[:-64]).hexdigest().encode()):
        raise ValueError(f"{path} is not a whole checkpoint, but cut, damaged or something else")
    kinds = {"list": list, "tuple": tuple, "array": lambda names: members[next(names) + ".npy"]}
    def rebuild(value: Any) -> Any:  # the inverse of `_describe`
        if isinstance(value, dict):
            return {key: rebuild(item) for key, item in value.items()}
        return kinds[value[0]](map(rebuild, value[1:])) if isinstance(value, list) else value
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as members:
            # We store, and never compress: so no member can unpack to more than the file's size.
            if any(member.compress_type for member in members.zip.infolist()):
                raise ValueError("a member is compressed")
            return rebuild(json.loads(members["nanoad.npy"].tobytes()))
    except Exception as error:  # the digest is right and the content wrong: somebody's handiwork
        raise ValueError(f"{path} is not a checkpoint written by nanoad.save: {error}") from error

# ## Drawing
#
# What does a tape look like? A graph with the output on top and each operation over its operands,
# shown by `draw` as a picture or as indented text. Both come from one walk, of which only as much
# is taken as anybody would read; so it may recurse, however deep the tape.
def _tape_rows(node: Any, seen: set, result: Any = None, indent: str = "") -> Iterator[tuple]:
    """(node, the result it is an operand of, indentation, seen before), results first."""
    yield node, result, indent, id(node) in seen
    if isinstance(node, Tensor) and id(node) not in seen:
        seen.add(id(node))
        # Arguments beyond the rules are settings. A fused operation has no rules, and shows all.
        args = (node._operands or ())[:len(getattr(node._op, "rules", ())) or None]
        operands = [a for a in args if isinstance(a, (Tensor, np.ndarray, np.generic, int, float))]
        below = indent.replace("├─", "│ ").replace("└─", "  ")
        for i, operand in enumerate(operands, start=1 - len(operands)):  # so the last is 0
            yield from _tape_rows(operand, seen, node, below + ("├─ " if i else "└─ "))

def _caption(node: Any, gap: str) -> str:
    """`label = op`, the value or else type and shape, and the gradient or else its norm."""
    if not isinstance(node, Tensor):
        array = np.asarray(node)
        return f"{array.item():.5g}" if array.size == 1 else f"{array.dtype}{list(array.shape)}"
    name = " = ".join(filter(None, (node.label, node._op and node._op.__name__)))
    parts = [name, _caption(node._data, gap)]
    if node.grad is not None:
        g, norm = node.grad._data, np.linalg.norm(node.grad._data)
        parts.append(f"grad {g.item():.5g}" if g.size == 1 else f"grad norm {norm:.5g}")
    return gap.join(filter(None, parts))

def draw(tensor: Tensor, format: str = "svg") -> Any:
    """Draw the tape of `tensor`: operations, labels, values or shapes, gradients where set.
    Returns a `graphviz.Digraph`, which a notebook shows (ImportError without that package), or for
    `format="text"` a str. Backward lets the tape go; draw before, or `backward(retain_grads=True)`.

        >>> a = Tensor(2.0, label="a")
        >>> print(draw(a * 3 + a, format="text"))
        add  8
        ├─ mul  6
        │  ├─ a  2  [1]
        │  └─ 3
        └─ a [1] above
    """
    walk = _tape_rows(*_require_tensors("draw", [tensor]), set())
    rows = list(itertools.islice(walk, 200))
    more = ["... 200 lines are enough"] if next(walk, None) else []
    if format == "text":
        again = dict.fromkeys(id(node) for node, _, _, seen in rows if seen)
        marks = {key: f"[{i}]" for i, key in enumerate(again, start=1)}
        texts = [f"{node.label} {marks[id(node)]} above" if seen else
                 f"{_caption(node, '  ')}  {marks.get(id(node), '')}" for node, _, _, seen in rows]
        return "\n".join([row[2] + text.strip() for text, row in zip(texts, rows)] + more)
    try:
        import graphviz
    except ImportError:
        raise ImportError("draw needs graphviz (nanoad[viz]), unless format is 'text'") from None
    graph = graphviz.Digraph(format=format, graph_attr={"rankdir": "BT", "label": "".join(more)})
    for i, (node, result, _, seen) in enumerate(rows):
        name = str(id(node)) if isinstance(node, Tensor) else f"constant {i}"
        if not seen:
            graph.node(name, graphviz.escape(_caption(node, "\n")), shape="box")
        if result is not None:
            graph.edge(name, str(id(result)))
    return graph

def plot(values: Any, width: int = 72, height: int = 12) -> str:
    """The curve of `values` (1-d) in `width` by `height` characters, with a labelled y axis.
    Where values outnumber columns, a column shows the mean of its share; nan and inf leave a gap.

        >>> print(plot([4, 2, 1, 1, 2], width=26, height=4))
        4 ┤───╮
        3 ┤   │
        2 ┤   ╰──╮     ╭──
        1 ┤      ╰─────╯
    """
    values = np.ma.masked_invalid(np.asarray(values, np.float64).ravel())
    columns = max(width - 11, 1)  # beside ticks of some 9 characters
    edges = np.arange(columns + 1) * len(values) // columns
    shares = (values[a:max(b, a + 1)] for a, b in itertools.pairwise(edges))
    curve = {x: share.mean() for x, share in enumerate(shares) if share.count()}
    if not curve:
        return "(no finite values to plot)"
    low, high = min(curve.values()), max(curve.values())
    rows = {x: round((high - y) / (high - low or 1) * (height - 1)) for x, y in curve.items()}
    grid = np.full((height, columns), " ")
    for x, row in rows.items():
        before = rows.get(x - 1, row)  # after a gap the curve begins anew
        grid[min(before, row):max(before, row), x] = "│"
        grid[before, x], grid[row, x] = "──" if row == before else "╮╰" if row > before else "╯╭"
    ticks = [f"{tick:.4g}" for tick in np.linspace(high, low, height)]
    margin = max(map(len, ticks))
    return "\n".join(f"{t:>{margin}} ┤{''.join(row).rstrip()}" for t, row in zip(ticks, grid))

# ## Public names
#
# Where is X? This is the index of the file, by namespace and topic. All names are flat, and for
# those who like them sorted there are modules too, `nanoad.nn` and its like, made here and entered
# in `sys.modules`. They are named after this file's module, whatever that is called and wherever it
# is. A name that Python has itself (`sum`) stands in the file with a `_` behind it (`sum_`).
_INDEX = {
    "": {
        "tensor": "Tensor Value as_tensor unbroadcast no_grad manual_seed",
        "operations of your own": "primitive fused",
        "saving": "save load",
    },
    "functional": {
        "transforms": "gradients value_and_grad grad vjp jvp hvp jacobian hessian",
        "care": "checkpoint check_grad",
        "elementwise": "identity neg add sub mul div exp expm1 log log1p sqrt sin cos tanh power"
                       " logaddexp softplus sigmoid abs relu gelu maximum minimum clip where astype",
        "moving elements": "reshape transpose swapaxes moveaxis expand_dims squeeze broadcast_to pad"
                           " concatenate stack split getitem scatter_add",
        "reductions": "sum mean var std max min logsumexp softmax log_softmax",
        "linear algebra": "matmul bmm linear einsum",
        "images": "conv2d max_pool2d avg_pool2d",
        "normalization": "layer_norm batch_norm",
        "transformer": "scaled_dot_product_attention causal_self_attention embedding dropout",
        "losses": "cross_entropy mse_loss binary_cross_entropy binary_cross_entropy_with_logits"
                  " hinge_loss",
    },
    "nn": {
        "modules": "Parameter Module Sequential MLP",
        "layers": "Linear Conv2d MaxPool2d AvgPool2d BatchNorm2d LayerNorm Embedding Dropout"
                  " Flatten ReLU GELU Tanh Sigmoid CrossEntropy MSE",
        "transformer": "MultiHeadAttention GPT",
    },
    "optim": {"optimizers": "Optimizer SGD Adam AdamW CosineWarmupLR clip_grad_norm"},
    "data": {"loaders": "load_mnist load_cifar10 load_tinyshakespeare make_moons DataLoader"
                        " CharTokenizer"},
    "viz": {"drawing": "draw plot"},
}


def _item(name: str) -> Any:
    """What the public `name` stands for."""
    return globals()[f"{name}_" if hasattr(builtins, name) else name]


def _make_namespaces() -> None:
    """Make a module of each namespace, and `__all__` of all their names."""
    for space, topics in _INDEX.items():
        names = " ".join(topics.values()).split()
        # `from nanoad import *` must not hide Python's own sum, max, min and abs.
        __all__.extend(name for name in names if not hasattr(builtins, name))
        if space:
            module = types.ModuleType(f"{__name__}.{space}", f"Here are {', '.join(names)}.")
            vars(module).update({name: _item(name) for name in names}, __all__=names)
            globals()[space] = sys.modules[module.__name__] = module


def __getattr__(name: str) -> Any:
    """nanoad.sum, max, min and abs, which are no globals here: in this file they are Python's."""
    if hasattr(builtins, name) and f"{name}_" in globals():
        return _item(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *filter(None, _INDEX)]  # what an editor offers


__all__: list[str] = []
_make_namespaces()

# ## The tour
#
# What can all this do? `python nanoad.py` shows it in a few seconds.
def _tour() -> None:
    """Each paragraph below is printed and then run, so what you read is what happened.

        # The derivative of x sin x is sin x + x cos x. At x = 2, by hand and by the tape; and that
        # tape, each operation over its operands, with the gradient that reached them:
        x = Tensor(2.0, label="x")
        y = x * np.sin(x)
        y.backward(retain_grads=True)
        print(math.sin(2) + 2 * math.cos(2), x.grad)
        print(draw(y, format="text"))

        # A gradient is a computation too, so it has a gradient: 2 cos x - x sin x.
        print(2 * math.cos(2) - 2 * math.sin(2), grad(grad(lambda x: x * np.sin(x)))(2.0))

        # So Newton's method has its Hessian. A logistic regression in 50 dimensions, in five steps:
        rng = np.random.default_rng(0)
        A, t, w = rng.standard_normal((200, 50)), rng.choice([-1.0, 1.0], 200), np.zeros(50)
        loss = lambda w: np.sum(np.log(1 + np.exp(-t * (A @ w)))) + 5 * np.sum(w * w)
        for newton_step in range(5):
            slope = grad(loss)(w).data
            print(f"loss {loss(w):.5f}, norm of the gradient {np.linalg.norm(slope):.1e}")
            w = w - np.linalg.solve(hessian(loss)(w).data, slope)

        # A network learns which of two moons a point belongs to: its loss, and what it learned,
        # shaded where it says 1, with the points o (0) and x (1).
        manual_seed(1)
        points, labels = make_moons(200, noise=0.15)
        model, losses = MLP(2, [16, 16, 1]), []
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
        for (h, v), label in zip(points.clip((-1.5, -1), (2.49, 1.5)), labels):
            picture[int((1.5 - v) / 2.5 * 19.9), int((h + 1.5) / 4 * 72)] = "ox"[label]
        print(*map("".join, picture), sep="\\n")
    """
    scope = dict(globals())
    for step in inspect.cleandoc(_tour.__doc__).split("\n\n")[1:]:
        print(f"\n{step}\n")
        exec(step, scope)

if __name__ == "__main__":
    _tour()
