"""How fast is nanoad, and how much memory does it take? Beside PyTorch, where it is installed.

    python bench.py                            every row, in some six minutes
    python bench.py --filter "softmax|GPT"     the rows whose name matches
    python bench.py --json before.json         the measurements as data, too

Forward and backward are medians in microseconds. A training step's forward ends with the loss;
its backward includes clipping and the optimizer. The ratio is nanoad's forward plus backward
over PyTorch's: below 1, nanoad is faster. Peak is the most memory that was held beyond what was
there before.

In rows with one process, BLAS spreads each matrix product over the cores. In rows with several,
they share the batch (`nanoad.DataParallel`), and the BLAS of each stays on one core. PyTorch is
one process, with as many threads as there are cores and then with one; the better is shown.

To measure an operation of your own, add a line to OPERATIONS.
"""

import argparse
import atexit
import ctypes
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nanoad

try:
    import torch
except ImportError:
    torch = None

clock = time.perf_counter
HAS_AFFINITY = hasattr(os, "sched_getaffinity")
CORES = len(os.sched_getaffinity(0)) if HAS_AFFINITY else os.cpu_count()


# ## The libraries
#
# What the two call by different names or want in another form. `F` has the functions whose names
# and arguments they agree on.

class Nanoad:
    F = nanoad
    nn = nanoad.nn
    optim = nanoad.optim

    def constant(self, array):
        return array

    def tracked(self, array):
        return nanoad.Tensor(array)

    def gelu(self, x):
        return nanoad.gelu(x)

    def layer_norm(self, x, weight, bias):
        return nanoad.layer_norm(x, weight, bias)

    def attention(self, qkv, heads):
        return nanoad.causal_self_attention(qkv, heads)

    def gpt(self, size):
        return nanoad.GPT(**size)

    def clip(self, parameters):
        nanoad.clip_grad_norm(parameters, 1.0)


class PyTorch:
    def __init__(self):
        self.F = torch.nn.functional
        self.nn = torch.nn
        self.optim = torch.optim

    def constant(self, array):
        return torch.tensor(array)

    def tracked(self, array):
        return torch.tensor(array, requires_grad=True)

    def gelu(self, x):
        return self.F.gelu(x, approximate="tanh")

    def layer_norm(self, x, weight, bias):
        return self.F.layer_norm(x, weight.shape, weight, bias)

    def attention(self, qkv, heads):
        q, k, v = split_heads(qkv, heads)
        mixed = self.F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)                 # (B, T, C)

    def gpt(self, size):
        return TorchGPT(size)

    def clip(self, parameters):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)


def split_heads(qkv, heads):
    """Queries, keys and values of (B, T, 3C), each (B, heads, T, C / heads); for PyTorch."""
    batch, length, _ = qkv.shape
    return qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)


class TorchGPT:
    """What nanoad.GPT of this size computes, in PyTorch and by the same first weights."""

    def __init__(self, size):
        self.F = torch.nn.functional
        self.heads = size["num_heads"]
        self.layers = size["num_layers"]
        self.context = size["block_size"]
        self.weights = {name: torch.tensor(array, requires_grad=True)
                        for name, array in nanoad.GPT(**size).state_dict().items()}

    def parameters(self):
        return list(self.weights.values())

    def linear(self, x, name):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return self.F.linear(x, weight, bias)

    def norm(self, x, name):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.F.layer_norm(x, weight.shape, weight, bias)

    def attention(self, x, name, seen):
        q, k, v = split_heads(self.linear(x, f"{name}.qkv"), self.heads)
        if name in seen:
            k = torch.cat([seen[name][0], k], dim=2)
            v = torch.cat([seen[name][1], v], dim=2)
        seen[name] = k, v

        # A single query is the last position, which may look at all that was seen.
        mixed = self.F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        return self.linear(mixed.transpose(1, 2).flatten(2), f"{name}.proj")

    def __call__(self, ids, seen=None):
        """Logits (B, T, vocabulary) of `ids` (B, T).

        `seen` has the keys and values of the positions before them by the name of a layer, and
        these are added to it; without it there are none.
        """
        seen = {} if seen is None else seen
        start = seen["blocks.0.attn"][0].shape[2] if seen else 0
        positions = self.weights["pos_emb.weight"][start:start + ids.shape[1]]
        x = self.F.embedding(ids, self.weights["tok_emb.weight"]) + positions

        for i in range(self.layers):
            block = f"blocks.{i}"
            x = x + self.attention(self.norm(x, f"{block}.ln1"), f"{block}.attn", seen)
            hidden = self.linear(self.norm(x, f"{block}.ln2"), f"{block}.mlp.0")
            x = x + self.linear(self.F.gelu(hidden, approximate="tanh"), f"{block}.mlp.2")

        return self.linear(self.norm(x, "ln_f"), "tok_emb")

    def generate(self, ids, count):
        """By the rule of nanoad.GPT.generate: a full window slides, and is then read again."""
        seen = {}
        with torch.no_grad():
            for _ in range(count):
                if not seen or seen["blocks.0.attn"][0].shape[2] == self.context:
                    seen = {}
                    logits = self(ids[:, -self.context:], seen)
                else:
                    logits = self(ids[:, -1:], seen)

                probabilities = self.F.softmax(logits[:, -1], -1)
                ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)

        return ids


# ## What is measured
#
# First the operations: a name, the inputs (a shape stands for random numbers that want a gradient,
# an array for itself), and a function of a library and the inputs.

class Operation(NamedTuple):
    name: str
    inputs: list
    function: Callable


IMAGES = (128, 64, 14, 14)
TEN = np.arange(128) % 10
MANY = np.arange(1024) % 65
BATCH_NORM = [(128, 8, 28, 28), np.zeros(8, "f"), np.ones(8, "f"), (8,), (8,)]


def attention_module(lib, x, qkv_weight, out_weight):
    qkv = lib.F.linear(x, qkv_weight)
    return lib.F.linear(lib.attention(qkv, 4), out_weight)


def thousand_scalars(lib, a, b):
    y = a
    for _ in range(500):
        y = y * a + b
    return y


OPERATIONS = [
    Operation("add", [IMAGES, IMAGES], lambda lib, a, b: a + b),
    Operation("sub", [IMAGES, IMAGES], lambda lib, a, b: a - b),
    Operation("mul", [IMAGES, IMAGES], lambda lib, a, b: a * b),
    Operation("div", [IMAGES, IMAGES], lambda lib, a, b: a / b),
    Operation("power 3", [IMAGES], lambda lib, x: x ** 3),
    Operation("relu", [IMAGES], lambda lib, x: x.relu()),
    Operation("tanh", [IMAGES], lambda lib, x: x.tanh()),
    Operation("exp", [IMAGES], lambda lib, x: x.exp()),
    Operation("gelu", [IMAGES], lambda lib, x: lib.gelu(x)),
    Operation("matmul by 784 x 128", [(128, 784), (784, 128)], lambda lib, a, b: a @ b),
    Operation("transpose", [(128, 16, 7, 7)], lambda lib, x: x.swapaxes(1, 3)),
    Operation("reshape", [(128, 784)], lambda lib, x: x.reshape(128, 16, 7, 7)),
    Operation("sum over 2 and 3", [IMAGES], lambda lib, x: x.sum((2, 3))),
    Operation("mean over 2 and 3", [IMAGES], lambda lib, x: x.mean((2, 3))),
    Operation("softmax", [(128, 10)], lambda lib, x: lib.F.softmax(x, -1)),
    Operation("softmax", [(4096, 65)], lambda lib, x: lib.F.softmax(x, -1)),
    Operation("cross_entropy", [(128, 10), TEN],
              lambda lib, x, ids: lib.F.cross_entropy(x, ids)),
    Operation("cross_entropy", [(1024, 65), MANY],
              lambda lib, x, ids: lib.F.cross_entropy(x, ids)),
    Operation("conv2d", [(128, 8, 14, 14), (16, 8, 3, 3)],
              lambda lib, x, w: lib.F.conv2d(x, w, padding=1)),
    Operation("max_pool2d by 2", [(128, 16, 14, 14)],
              lambda lib, x: lib.F.max_pool2d(x, 2)),
    Operation("batch_norm", BATCH_NORM,
              lambda lib, *inputs: lib.F.batch_norm(*inputs, training=True)),
    Operation("layer_norm", [(32, 32, 64), (64,), (64,)],
              lambda lib, x, w, b: lib.layer_norm(x, w, b)),
    Operation("attention module", [(32, 32, 64), (192, 64), (64, 64)], attention_module),
    Operation("embedding of 1,024 ids", [(65, 64), MANY],
              lambda lib, w, ids: lib.F.embedding(ids, w)),
    Operation("1,000 scalar ops", [(), ()], thousand_scalars),
    Operation("one scalar op", [(), ()], lambda lib, a, b: a * b),
]


# Then the training steps of networks, and writing.

def gpt_size(vocabulary, width, heads, layers, context):
    return {"vocab_size": vocabulary, "embed_dim": width, "num_heads": heads,
            "num_layers": layers, "block_size": context}


GPT_32 = gpt_size(64, 32, 2, 2, 16)
GPT_64 = gpt_size(65, 64, 4, 4, 32)      # train_gpt.py's `tiny`
GPT_128 = gpt_size(65, 128, 4, 4, 128)   # `small`
GPT_256 = gpt_size(65, 256, 8, 6, 128)


class Training(NamedTuple):
    """What a training step needs: x, y are a batch and its targets."""

    model: Any
    optimizer: Any
    x: np.ndarray
    y: np.ndarray


def gpt_training(lib, size, count):
    """A GPT and a batch of `count` texts."""
    model = lib.gpt(size)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, size["vocab_size"], (2, count, size["block_size"]))
    return Training(model, lib.optim.AdamW(model.parameters()), ids[0], ids[1])


def cnn_training(lib, count):
    """A network that reads digits, and a batch of `count` images."""
    nn = lib.nn
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10))
    rng = np.random.default_rng(0)
    images = rng.random((count, 1, 28, 28), np.float32)
    digits = rng.integers(0, 10, count)
    return Training(model, lib.optim.Adam(model.parameters()), images, digits)


STEPS = {
    "GPT step, width 64": functools.partial(gpt_training, size=GPT_64, count=32),
    "CNN step, 8-16 channels": functools.partial(cnn_training, count=128),
    "GPT step, width 256": functools.partial(gpt_training, size=GPT_256, count=32),
}


# ## Jobs
#
# A job does its work once and returns the seconds of its forward and of its backward pass.

def operation_job(lib, operation):
    rng = np.random.default_rng(0)  # the same numbers for both libraries
    inputs, tracked = [], []
    for x in operation.inputs:
        if isinstance(x, tuple):
            tracked.append(lib.tracked(np.array(rng.standard_normal(x), np.float32)))
            inputs.append(tracked[-1])
        else:
            inputs.append(lib.constant(x))

    shape = operation.function(lib, *inputs).shape
    cotangent = lib.constant(np.array(rng.standard_normal(shape), np.float32))

    def job():
        for x in tracked:
            x.grad = None

        start = clock()
        y = operation.function(lib, *inputs)
        middle = clock()
        y.backward(cotangent)
        return middle - start, clock() - middle

    return job


def step_job(lib, make_training, processes):
    """A training step as the scripts do it. Only nanoad's can have several processes."""
    model, optimizer, x, y = make_training(lib)
    parameters = list(model.parameters())
    middle = 0.0

    def loss_of(x, y):
        nonlocal middle
        logits = model(x)
        loss = lib.F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
        middle = clock()  # of several processes, only this one's: it has the first share
        return loss

    if processes > 1 and lib.F is nanoad:
        leave_gradients = nanoad.DataParallel(model, loss_of, processes=processes)
        atexit.register(leave_gradients.close)
    else:
        x, y = lib.constant(x), lib.constant(y)

        def leave_gradients(x, y):
            optimizer.zero_grad()
            loss_of(x, y).backward()

    def job():
        start = clock()
        leave_gradients(x, y)
        lib.clip(parameters)
        optimizer.step()
        return middle - start, clock() - middle

    return job


def writing_job(lib):
    model = lib.gpt(GPT_128)
    prompt = lib.constant(np.zeros((1, 1), int))

    def job():
        start = clock()
        model.generate(prompt, 400)
        return clock() - start, 0.0

    return job


# ## The rows

class Row(NamedTuple):
    name: str
    make: Callable      # makes a library's job
    processes: int = 1  # nanoad's


def processes_text(count):
    return f"{count} process{'' if count == 1 else 'es'}"


def operation_rows():
    rows = []
    for operation in OPERATIONS:
        name = f"{operation.name} {operation.inputs[0]}"
        rows.append(Row(name, functools.partial(operation_job, operation=operation)))

    make_training = functools.partial(gpt_training, size=GPT_32, count=8)
    make = functools.partial(step_job, make_training=make_training, processes=1)
    return [*rows, Row("GPT step, width 32, 1 process", make)]


def network_rows(cores):
    rows = [Row("generate 400 tokens, 1 process", writing_job)]
    for processes in sorted({1, cores}):
        for name, make_training in STEPS.items():
            make = functools.partial(step_job, make_training=make_training,
                                     processes=processes)
            rows.append(Row(f"{name}, {processes_text(processes)}", make, processes))
    return rows


# One scalar operation is left out of the mean: it is a part of the thousand.
IN_THE_MEAN = {row.name for row in operation_rows()} - {"one scalar op ()"}


# ## Measuring
#
# Jobs to be compared take turns, A B A B, so that whatever else the machine does hits both. After a
# product, OpenBLAS lets idle threads spin for up to 70 ms (PyTorch, 8), which would take a core from
# the other's turn: so a turn begins with a pause. That leaves cores and caches cold: so a turn lasts
# a tenth of a second (or one job, if longer), and its first third is not counted.

PAUSE = 0.1
TURN = 0.1
PATIENCE = 8.0  # seconds after which a row ends with three measurements


class Contestant:
    """A library's job, and the seconds that its passes took in each of its turns."""

    def __init__(self, job, threads=None):
        self.job = job
        self.threads = threads  # PyTorch's; nanoad's BLAS was told when NumPy was imported
        self.samples = []

        self.use_threads()
        job()
        self.count = 1 + int(TURN / sum(job()))  # jobs to a turn

    def use_threads(self):
        if self.threads:
            torch.set_num_threads(self.threads)

    def take_turn(self):
        self.use_threads()
        time.sleep(PAUSE)
        seconds = [self.job() for _ in range(self.count)]
        self.samples += seconds[self.count // 3:]

    def medians(self):
        """Microseconds of the forward and of the backward pass."""
        forward, backward = zip(*self.samples)
        return 1e6 * statistics.median(forward), 1e6 * statistics.median(backward)


def peak_kib(job):
    tracemalloc.start()  # NumPy tells it of its arrays
    job()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1024


def measure(row, cores, repeat):
    """What the report shows of `row`, by the titles of its columns."""
    begun = clock()
    result = {"work": row.name}
    job = row.make(Nanoad())
    if row.processes == 1:  # of several, it would miss what the others hold
        result["peak KiB"] = peak_kib(job)

    ours = Contestant(job)
    theirs = []
    if torch:
        job = row.make(PyTorch())
        theirs = [Contestant(job, threads) for threads in sorted({1, cores})]

    for _ in range(repeat):
        for contestant in [ours, *theirs]:
            if len(contestant.samples) < 3 or clock() - begun < PATIENCE:
                contestant.take_turn()

    result["forward us"], result["backward us"] = ours.medians()
    if theirs:
        best = min(theirs, key=lambda contestant: sum(contestant.medians()))
        result["torch forward us"], result["torch backward us"] = best.medians()
        result["torch threads"] = best.threads
        result["ratio"] = sum(ours.medians()) / sum(best.medians())
        for contestant in theirs:
            result[f"torch us, threads: {contestant.threads}"] = sum(contestant.medians())
    return result


# ## Processes of their own
#
# A BLAS reads when NumPy is imported how many threads it may have, and memory is best measured
# where nothing was before. So all measuring is done by children: this script again, told a task.

def environment(blas_threads):
    variables = dict(os.environ, PYTHONUNBUFFERED="1")
    for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM"):
        variables[f"{blas}_THREADS"] = str(blas_threads)

    # OpenBLAS does not know AMD's newest processors (see train_gpt.py).
    cpu = cpu_info()
    if "AuthenticAMD" in cpu and "avx512_vnni" in cpu:
        variables.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX")
    return variables


def start_child(task, *arguments, blas_threads):
    command = [sys.executable, __file__, "--child", task, json.dumps(arguments)]
    return subprocess.Popen(command, env=environment(blas_threads), stdout=subprocess.PIPE,
                            text=True, start_new_session=task == "memory")


def ask_child(task, *arguments, blas_threads):
    """What a child's `task` returned."""
    with start_child(task, *arguments, blas_threads=blas_threads) as child:
        answer, _ = child.communicate()
    check_code(child)
    return json.loads(answer)


def check_code(child):
    if child.returncode:
        sys.exit(f"bench.py: a process ended with code {child.returncode}: {child.args}")


def measure_rows(names, cores, repeat):
    """A child's task: the results of the rows called `names`."""
    keep_freed_memory()
    results = []
    for row in operation_rows() + network_rows(cores):
        if row.name in names:
            if sys.stderr.isatty():
                print(f"\r\033[K{row.name}\r", end="", file=sys.stderr, flush=True)
            results.append(measure(row, cores, repeat))
    return results


def keep_freed_memory():
    """As every process that trains does: making an optimizer tells glibc so."""
    nanoad.SGD([nanoad.Tensor(0.0)])


def import_seconds():
    """A child's task: how long nanoad takes to be imported when NumPy is there."""
    code = ("import sys, time, numpy\n"
            "sys.dont_write_bytecode = False  # as is the default\n"
            "start = time.perf_counter()\n"
            "import nanoad\n"
            "print(time.perf_counter() - start)")
    command = [sys.executable, "-c", code]
    folder = Path(nanoad.__file__).parent
    shown = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True).stdout
    return float(shown)


# ### Memory
#
# A child takes four steps, and this process looks every few milliseconds how much memory the child
# and its workers have. What processes share must not be counted twice: the kernel's *proportional*
# set size counts of a page that n processes share an n-th part for each (proc(5), smaps_rollup).

def take_steps(library, processes):
    """A child's task: four training steps; says on a line of its own when all is imported."""
    lib = Nanoad() if library == "nanoad" else PyTorch()
    print("imported", flush=True)
    job = step_job(lib, STEPS["GPT step, width 256"], processes)
    for _ in range(4):
        job()


def held_kib(session):
    """The proportional set sizes of all processes of a session, added up."""
    total = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == session:
                rollup = Path(f"/proc/{name}/smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])
        except (OSError, TypeError):  # it has just ended
            pass
    return total


def measure_memory(library, processes, blas_threads):
    """The most KiB that the steps held beyond what the child held after its imports."""
    with start_child("memory", library, processes, blas_threads=blas_threads) as child:
        try:
            child.stdout.readline()
            before = peak = held_kib(child.pid)
            while child.poll() is None:
                peak = max(peak, held_kib(child.pid))
                time.sleep(0.005)
        finally:
            child.kill()
    check_code(child)
    return peak - before


def memory_row(name, cores):
    result = {"work": name, "peak KiB": measure_memory("nanoad", cores, blas_threads=1)}
    if torch:
        result["torch peak KiB"] = measure_memory("torch", 1, blas_threads=cores)
        result["torch threads"] = cores
        result["ratio"] = result["peak KiB"] / result["torch peak KiB"]
    return result


# ## The machine

def cpu_info():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def processor():
    """Its name; and since that of a virtual machine may say little, its family and model."""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", cpu_info(), re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    number = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return f"{fields['model name']} ({number})"


def blas():
    """The library that NumPy's matrix products use, and for which processor its kernels are."""
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    text = f"{built.get('name')} {built.get('version')}"
    maps = Path("/proc/self/maps")
    paths = re.findall(r"\S*openblas\S*", maps.read_text()) if maps.exists() else []
    library = ctypes.CDLL(paths[0]) if paths else None
    for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("", "")):
        get_name = getattr(library, f"{prefix}openblas_get_corename{suffix}", None)
        if get_name:
            get_name.restype = ctypes.c_char_p
            chosen = os.environ.get("OPENBLAS_CORETYPE")
            how = " (OPENBLAS_CORETYPE)" if chosen else ""
            return f"{text} with {get_name().decode()} kernels{how}"
    return text


def describe_machine():
    """A child's task: what the figures are from."""
    return {
        "processor": processor(),
        "cores": CORES,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas(),
        "torch": torch.__version__ if torch else None,
    }


# ## The report

def print_machine(machine):
    software = [f"Python {machine['python']}", f"NumPy {machine['numpy']}", machine["blas"]]
    if machine["torch"]:
        software.append(f"PyTorch {machine['torch']}")
    else:
        software.append("no PyTorch to compare with")
    print(f"{machine['processor']}, cores: {machine['cores']}")
    print(", ".join(software), end="\n\n", flush=True)


def cell(result, column):
    value = result.get(column)
    if value is None:
        return ""
    if isinstance(value, int) or value > 10:
        return f"{value:,.0f}"
    return f"{value:.2f}"


def print_table(results):
    columns = ["forward us", "backward us", "peak KiB"]
    if torch:
        columns += ["torch forward us", "torch backward us", "torch peak KiB", "torch threads",
                    "ratio"]
    print("| work |", " | ".join(columns), "|")
    print("| --- |" + " ---: |" * len(columns))
    for result in results:
        cells = [cell(result, column) for column in columns]
        print("|", result["work"], "|", " | ".join(cells), "|")

    ratios = [r["ratio"] for r in results if r["work"] in IN_THE_MEAN and "ratio" in r]
    if ratios:
        mean = statistics.geometric_mean(ratios)
        print(f"\nGeometric mean of the ratios of {len(ratios)} operations: {mean:.2f}")


# ## All of it

CHILD_TASKS: dict[str, Callable[..., Any]] = {
    "machine": describe_machine,
    "measure": measure_rows,
    "memory": take_steps,
    "import": import_seconds,
}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--filter", metavar="REGEX", default="", help="only rows whose name matches")
    add("--repeat", metavar="N", type=int, default=5, help="turns to a row (default 5)")
    add("--cores", metavar="N", type=int, default=CORES,
        help="to use: nanoad's processes, PyTorch's threads (default: all)")
    add("--json", metavar="FILE", help="write the measurements there too")
    add("--child", nargs=2, help=argparse.SUPPRESS)  # a task and its arguments
    options = parser.parse_args(arguments)
    if options.repeat < 1 or options.cores < 1:
        parser.error("--repeat and --cores must be at least 1")
    try:
        re.compile(options.filter)
    except re.error as error:
        parser.error(f"--filter {options.filter!r} is no regular expression: {error}")
    return options


def measure_all(matches, cores, repeat):
    """The results of all rows whose names match."""
    results = []
    names = [row.name for row in operation_rows() if matches(row.name)]
    if names:
        results += ask_child("measure", names, cores, repeat, blas_threads=cores)

    for row in network_rows(cores):  # each in a fresh process: they scatter much memory
        if matches(row.name):
            blas = 1 if row.processes > 1 else cores
            results += ask_child("measure", [row.name], cores, repeat, blas_threads=blas)

    name = f"memory of GPT step, width 256, {processes_text(cores)}"
    if matches(name) and os.path.exists("/proc/self/smaps_rollup"):
        results.append(memory_row(name, cores))

    name = "import nanoad, after NumPy"
    if matches(name):
        seconds = [ask_child("import", blas_threads=1) for _ in range(9)]
        results.append({"work": name, "forward us": 1e6 * statistics.median(seconds)})
    return results


def main(arguments=None):
    options = parse(arguments)
    if options.child:
        task, task_arguments = options.child
        print(json.dumps(CHILD_TASKS[task](*json.loads(task_arguments))))
        return 0

    machine = ask_child("machine", blas_threads=options.cores)
    print_machine(machine)
    matches = re.compile(options.filter).search
    results = measure_all(matches, options.cores, options.repeat)
    if not results:
        print(f"bench.py: no row matches --filter {options.filter!r}", file=sys.stderr)
        return 2

    print_table(results)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "child"}
        measured = {**settings, "machine": machine, "rows": results}
        Path(options.json).write_text(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
