"""How fast is nanoad, and how much memory does it take? Beside PyTorch, where that is installed.

Forward and backward are median microseconds (a step's backward includes clipping and optimizer);
peak is the most memory held beyond what was there before; the ratio is nanoad's forward plus
backward over PyTorch's: below 1, nanoad is faster. With one Python thread, BLAS spreads each matrix
product over the cores. With several, each computes its shard of the batch, and BLAS stays on the
core it is called from. PyTorch always has --threads threads.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path
from time import perf_counter as clock, sleep
from timeit import timeit
from types import SimpleNamespace
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
add = parser.add_argument
add("--filter", metavar="REGEX", default="", help="only rows whose name matches")
add("--repeat", metavar="N", type=int, default=5, help="turns per row (default 5)")
add("--threads", metavar="N", type=int, default=os.cpu_count(), help="to use (default: the cores)")
add("--json", metavar="FILE", help="write the measurements there too")
# What needs a process of its own runs in a child: this script again, told its part.
add("--part", default="all", choices=["all", "shards", "0", "1"], help=argparse.SUPPRESS)
options = parser.parse_args()
if options.repeat < 1 or options.threads < 1:
    parser.error("--repeat and --threads must be at least 1")

# A BLAS reads when NumPy is imported how many threads it may have, and which kernels to take on
# new processors of AMD (see train_gpt.py): so it is told before.
SHARDS = options.threads if options.part == "shards" else 1
for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM"):
    os.environ[f"{blas}_THREADS"] = str(options.threads // SHARDS)
cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
if "AuthenticAMD" in cpu and "avx512_vnni" in cpu:
    os.environ.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX")
import numpy as np  # noqa: E402
import nanoad  # noqa: E402
# What the two libraries call the same things:
LIBRARIES = [SimpleNamespace(F=nanoad, nn=nanoad.nn, optim=nanoad, array=np.asarray,
                             tracked=nanoad.Tensor, gradients=nanoad.gradients,
                             clip=nanoad.clip_grad_norm)]
try:
    import torch
    import torch.nn.functional as F
    torch.set_num_threads(options.threads)
    LIBRARIES += [SimpleNamespace(F=F, nn=torch.nn, optim=torch.optim, array=torch.tensor,
                                  tracked=lambda a: torch.tensor(a, requires_grad=True),
                                  gradients=torch.autograd.grad,
                                  clip=torch.nn.utils.clip_grad_norm_)]
except ImportError:
    torch = None
nanoad._calm_the_allocator()  # as in every training process, where making an optimizer calls it

# ## Operations
# Each is a name, inputs (a shape stands for random numbers that want a gradient, an array for
# itself) and an expression that both libraries understand, F being nanoad or PyTorch.
BIG, TEN, MANY = (128, 64, 14, 14), np.arange(128) % 10, np.arange(1024) % 65
OPS = [
    ("add", [BIG, BIG], lambda F, a, b: a + b), ("sub", [BIG, BIG], lambda F, a, b: a - b),
    ("mul", [BIG, BIG], lambda F, a, b: a * b), ("div", [BIG, BIG], lambda F, a, b: a / b),
    ("power 3", [BIG], lambda F, x: x ** 3), ("relu", [BIG], lambda F, x: x.relu()),
    ("tanh", [BIG], lambda F, x: x.tanh()), ("exp", [BIG], lambda F, x: x.exp()),
    ("gelu", [BIG], lambda F, x: F.gelu(x, **{} if F is nanoad else {"approximate": "tanh"})),
    ("matmul by 784 x 128", [(128, 784), (784, 128)], lambda F, a, b: a @ b),
    ("transpose", [(128, 16, 7, 7)], lambda F, x: x.swapaxes(1, 3)),
    ("reshape", [(128, 784)], lambda F, x: x.reshape(128, 16, 7, 7)),
    ("sum over 2 and 3", [BIG], lambda F, x: x.sum((2, 3))),
    ("mean over 2 and 3", [BIG], lambda F, x: x.mean((2, 3))),
    *[("softmax", [shape], lambda F, x: F.softmax(x, -1)) for shape in ((128, 10), (4096, 65))],
    *[("cross_entropy", [(len(ids), classes), ids], lambda F, x, ids: F.cross_entropy(x, ids))
      for classes, ids in ((10, TEN), (65, MANY))],
    ("conv2d", [(128, 8, 14, 14), (16, 8, 3, 3)], lambda F, x, w: F.conv2d(x, w, padding=1)),
    ("max_pool2d by 2", [(128, 16, 14, 14)], lambda F, x: F.max_pool2d(x, 2)),
    ("batch_norm", [(128, 8, 28, 28), np.zeros(8, "f"), np.ones(8, "f"), (8,), (8,)],
     lambda F, x, mean, var, w, b: F.batch_norm(x, mean, var, w, b, training=True)),
    ("layer_norm", [(32, 32, 64), (64,), (64,)],
     lambda F, x, w, b: F.layer_norm(x, *[] if F is nanoad else [w.shape], w, b)),
    ("attention module", [(32, 32, 64), (192, 64), (64, 64)], lambda F, x, w, v: F.linear(
        (nanoad.causal_self_attention if F is nanoad else torch_attention)(F.linear(x, w), 4), v)),
    ("embedding of 1,024 ids", [(65, 64), MANY], lambda F, w, ids: F.embedding(ids, w)),
    ("1,000 scalar ops", [(), ()], lambda F, a, b: reduce(lambda y, _: y * a + b, range(500), a)),
    ("one scalar op", [(), ()], lambda F, a, b: a * b),
]

# A job does its work once and returns the seconds of its forward and of its backward pass.
def op_job(library, f, shapes):
    draw = np.random.default_rng(0).standard_normal  # the same numbers for both
    inputs = [library.tracked(np.array(draw(x), "f")) if isinstance(x, tuple) else library.array(x)
              for x in shapes]
    cotangent = library.array(np.array(draw(f(library.F, *inputs).shape), "f"))
    def job():
        for x, shape in zip(inputs, shapes):
            if isinstance(shape, tuple):
                x.grad = None
        start = clock()
        y = f(library.F, *inputs)
        middle = clock()
        y.backward(cotangent)
        return middle - start, clock() - middle
    return job

# ## Networks, nanoad's and the same in PyTorch, whose GPT is a function of nanoad's weights
GPTS = {"width 32": (64, 32, 2, 2, 16), "width 64": (65, 64, 4, 4, 32),
        "width 256": (65, 256, 8, 6, 128),  # vocabulary, width, heads, layers, context
        "small": (65, 128, 4, 4, 128)}  # of train_gpt.py

def torch_attention(qkv, heads, seen=None):
    b, t, c = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    if seen is not None:  # the keys and values of what was read before, if anything
        k, v = seen[:] = [torch.cat([*seen[i:i + 1], new], 2) for i, new in enumerate((k, v))]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
    return y.transpose(1, 2).reshape(b, t, c // 3)

def torch_gpt(weights, heads, layers, ids, seen=None):
    def at(name):
        return weights[name + ".weight"], weights.get(name + ".bias")
    start = seen[0][0].shape[2] if seen and seen[0] else 0
    positions = at("pos_emb")[0][start:start + ids.shape[1]]
    x, c = F.embedding(ids, at("tok_emb")[0]) + positions, positions.shape[1:]
    for i in range(layers):
        qkv = F.linear(F.layer_norm(x, c, *at(f"blocks.{i}.ln1")), *at(f"blocks.{i}.attn.qkv"))
        mixed = torch_attention(qkv, heads, seen and seen[i])
        x = x + F.linear(mixed, *at(f"blocks.{i}.attn.proj"))
        y = F.linear(F.layer_norm(x, c, *at(f"blocks.{i}.ln2")), *at(f"blocks.{i}.mlp.0"))
        x = x + F.linear(F.gelu(y, approximate="tanh"), *at(f"blocks.{i}.mlp.2"))
    return F.linear(F.layer_norm(x, c, *at("ln_f")), *at("tok_emb"))

def network(library, size):
    nn = library.nn
    model = nanoad.GPT(*GPTS[size]) if size in GPTS else nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10))
    if library.F is nanoad or size not in GPTS:
        return model, list(model.parameters())
    weights = {name: library.tracked(a) for name, a in model.state_dict().items()}
    return partial(torch_gpt, weights, *GPTS[size][2:4]), list(weights.values())

# A step as train_gpt.py does it: each thread has a shard, and their gradients are added up.
def step_job(library, size, count):
    (model, parameters), rng = network(library, size), np.random.default_rng(0)
    if size in GPTS:
        x, y = rng.integers(0, GPTS[size][0], (2, count, GPTS[size][-1]))
    else:
        x, y = rng.random((count, 1, 28, 28), np.float32), rng.integers(0, 10, count)
    optimizer = (library.optim.AdamW if size in GPTS else library.optim.Adam)(parameters)
    threads = SHARDS if library.F is nanoad else 1
    shards = [[library.array(part) for part in np.array_split(a, threads)] for a in (x, y)]
    each = ThreadPoolExecutor(threads).map if threads > 1 else map
    def share(x, y):
        logits = model(x)
        loss = library.F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
        return clock(), library.gradients(loss * (len(x) / count), parameters)  # (in this order)
    def job():
        start = clock()
        (middle, *_), parts = zip(*each(share, *shards))  # middle: of the first shard
        for p, (one, *others) in zip(parameters, zip(*parts)):
            p.grad = sum(others, one)
        library.clip(parameters, 1.0)
        optimizer.step()
        return middle - start, clock() - middle
    return job

def writing_job(library):
    model, (_, _, _, layers, context) = network(library, "small")[0], GPTS["small"]
    def torch_generate(ids, count):  # by the rule of GPT.generate: when full, the window slides
        seen = None
        for _ in range(count):
            full = seen is None or seen[0][0].shape[2] == context
            seen = [[] for _ in range(layers)] if full else seen
            logits = model(ids[:, -context:] if full else ids[:, -1:], seen)[:, -1]
            ids = torch.cat([ids, torch.multinomial(F.softmax(logits, -1), 1)], 1)
    write = model.generate if library.F is nanoad else torch.no_grad()(torch_generate)
    return lambda: (timeit(lambda: write(library.array(np.zeros((1, 1), int)), 400), number=1), 0.0)

# ## Measuring
# Jobs to be compared take turns, A B A B, so that whatever else the machine does hits both. After
# a product, OpenBLAS lets idle threads spin for up to 70 ms (PyTorch, 8), which would take a core
# from the other's turn: so a turn begins with a pause. That leaves cores and caches cold: so a turn
# lasts a tenth of a second (or one job, if longer), and its first third is not counted.
def measure(name, make):
    if sys.stderr.isatty():
        print(f"\r\033[K{name}\r", end="", file=sys.stderr, flush=True)
    begun, jobs = clock(), [make(library) for library in LIBRARIES]
    tracemalloc.start()  # NumPy tells it of its arrays
    jobs[0]()
    row = {"work": name, "peak KiB": tracemalloc.get_traced_memory()[1] / 1024}
    tracemalloc.stop()
    turns = [(job, 1 + int(0.1 / sum(job() and job())), []) for job in jobs]  # the second is timed
    for job, count, sample in options.repeat * turns:
        if len(sample) < 3 or clock() - begun < 8:  # what takes seconds has fewer turns
            sleep(0.1)
            sample += [job() for _ in range(count)][count // 3:]
    for who, (_, _, sample) in zip(("", "torch "), turns):
        forward, backward = (1e6 * statistics.median(seconds) for seconds in zip(*sample))
        row |= {who + "forward us": forward, who + "backward us": backward}
        row["ratio"] = (row["forward us"] + row["backward us"]) / (forward + backward)
    return row

def output_of(*command):
    return json.loads(subprocess.run([sys.executable, *command], cwd=Path(__file__).parent,
                                     stdout=subprocess.PIPE, check=True).stdout)
def resident(field):
    return int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
if options.part in ("0", "1"):  # the memory of a process that takes two steps with one library
    before, job = resident("VmRSS"), step_job(LIBRARIES[int(options.part)], "width 256", 32)
    sys.exit(print(job() and job() and resident("VmHWM") - before))
rows = [(f"{kind} step, {size}", partial(step_job, size=size, count=count)) for kind, size, count
        in (("GPT", "width 64", 32), ("CNN", "8-16 channels", 128), ("GPT", "width 256", 32))]
rows = [(f"{name}, {SHARDS} Python thread" + "s" * (SHARDS > 1), make)
        for name, make in [("generate 400 tokens", writing_job), *rows]]
ops = [*((f"{name} {i[0]}", partial(op_job, f=f, shapes=i)) for name, i, f in OPS),
       ("GPT step, width 32, 1 Python thread", partial(step_job, size="width 32", count=8))]
rows = ops + rows if options.part == "all" else rows  # the largest last: it scatters memory
table = [measure(name, make) for name, make in rows if re.search(options.filter, name)]
if options.part == "shards":
    sys.exit(print(json.dumps(table)))
if options.threads > 1:
    table += output_of(__file__, *sys.argv[1:], "--part", "shards")
name = "GPT step, width 256, memory of the process"
if re.search(options.filter, name) and os.path.exists("/proc/self/status"):
    peaks = [output_of(__file__, *sys.argv[1:], "--part", part) for part in "01"[:len(LIBRARIES)]]
    table.append({"work": name, "peak KiB": peaks[0], "ratio": peaks[0] / peaks[-1]})
    table[-1]["torch peak KiB"] = peaks[-1]
if re.search(options.filter, "import nanoad"):
    code = ("import sys, time, numpy; sys.dont_write_bytecode = False  # as is the default\n"
            "start = time.time(); import nanoad; print(1e6 * (time.time() - start))")
    us = statistics.median(output_of("-c", code) for _ in range(9))
    table.append({"work": "import nanoad, after NumPy", "forward us": us})
columns = ["forward us", "backward us", "peak KiB"]
columns += ["torch forward us", "torch backward us", "torch peak KiB", "ratio"] if torch else []
print("| work |", " | ".join(columns), "|\n| --- |" + " ---: |" * len(columns))
for row in table:
    cells = [f"{row[c]:,.{0 if row[c] > 10 else 2}f}" if c in row else "" for c in columns]
    print("|", row["work"], "|", " | ".join(cells), "|")
ratios = [row["ratio"] for row in table if torch and row["work"] in dict(ops[:-2] + ops[-1:])]
if ratios:  # of the operations and the smallest GPT; one scalar operation is left out
    print(f"\nGeometric mean of {len(ratios)} operations: {statistics.geometric_mean(ratios):.2f}")
if options.json:
    versions = {"numpy": np.__version__, "torch": torch and torch.__version__}
    Path(options.json).write_text(json.dumps({**vars(options), **versions, "rows": table}))
