"""How fast is nanoad, and how much memory does it take? Beside PyTorch, where that is installed.

Forward and backward are medians in microseconds; a training step's backward includes clipping and
the optimizer. Peak is the most memory held during one forward and backward beyond what was there
before. The ratio is nanoad's forward plus backward over PyTorch's: below 1, nanoad is faster.

nanoad can use several cores in two ways, and the table has both. With one Python thread, BLAS
spreads each matrix product over the cores. Or the batch is cut into shards, one per Python thread,
and BLAS stays on the core it is called from. PyTorch always has all the threads it is given.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
add = parser.add_argument
add("--filter", metavar="REGEX", default="", help="only rows whose name matches")
add("--repeat", metavar="N", type=int, default=5, help="turns per row (default 5)")
add("--threads", metavar="N", type=int, default=os.cpu_count(), help="(default: one per core)")
add("--json", metavar="FILE", help="write the measurements there too")
# What needs a process of its own, this script does as a child of itself that is told its part.
add("--part", default="all", choices=["all", "shards", "0", "1"], help=argparse.SUPPRESS)
options = parser.parse_args()
if options.repeat < 1 or options.threads < 1:
    parser.error("--repeat and --threads must be at least 1")

# A BLAS reads how many threads it may have when NumPy is imported, so it is told before.
SHARDS = options.threads if options.part == "shards" else 1
for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM"):
    os.environ[f"{blas}_THREADS"] = str(options.threads // SHARDS)
import numpy as np  # noqa: E402
import nanoad  # noqa: E402

try:
    import torch
    import torch.nn.functional as F
    torch.set_num_threads(options.threads)
except ImportError:
    torch = None
LIBRARIES = [nanoad, F] if torch else [nanoad]
clock = time.perf_counter
nanoad._calm_the_allocator()  # as in every training process, where making an optimizer calls it

# ## Operations
#
# Each is a name, its inputs (a shape stands for random numbers that want a gradient, an array for
# itself), and one expression that both libraries understand, F being nanoad or PyTorch.
BIG, TEN, MANY = (128, 64, 14, 14), np.arange(128) % 10, np.arange(1024) % 65
OPS = [
    ("add", [BIG, BIG], lambda F, a, b: a + b),
    ("sub", [BIG, BIG], lambda F, a, b: a - b),
    ("mul", [BIG, BIG], lambda F, a, b: a * b),
    ("div", [BIG, BIG], lambda F, a, b: a / b),
    ("power 3", [BIG], lambda F, x: x ** 3),
    ("relu", [BIG], lambda F, x: x.relu()),
    ("tanh", [BIG], lambda F, x: x.tanh()),
    ("gelu", [BIG], lambda F, x: F.gelu(x, **{} if F is nanoad else {"approximate": "tanh"})),
    ("exp", [BIG], lambda F, x: x.exp()),
    ("matmul by 784 x 128", [(128, 784), (784, 128)], lambda F, a, b: a @ b),
    ("transpose", [(128, 16, 7, 7)], lambda F, x: x.swapaxes(1, 3)),
    ("reshape", [(128, 784)], lambda F, x: x.reshape(128, 16, 7, 7)),
    ("sum over 2 and 3", [BIG], lambda F, x: x.sum((2, 3))),
    ("mean over 2 and 3", [BIG], lambda F, x: x.mean((2, 3))),
    ("softmax", [(128, 10)], lambda F, x: F.softmax(x, -1)),
    ("softmax", [(4096, 65)], lambda F, x: F.softmax(x, -1)),
    ("cross_entropy", [(128, 10), TEN], lambda F, x, t: F.cross_entropy(x, t)),
    ("cross_entropy", [(1024, 65), MANY], lambda F, x, t: F.cross_entropy(x, t)),
    ("conv2d", [(128, 8, 14, 14), (16, 8, 3, 3)], lambda F, x, w: F.conv2d(x, w, padding=1)),
    ("max_pool2d by 2", [(128, 16, 14, 14)], lambda F, x: F.max_pool2d(x, 2)),
    ("batch_norm", [(128, 8, 28, 28), np.zeros(8, "f"), np.ones(8, "f"), (8,), (8,)],
     lambda F, x, mean, var, w, b: F.batch_norm(x, mean, var, w, b, training=True)),
    ("layer_norm", [(32, 32, 64), (64,), (64,)],
     lambda F, x, w, b: F.layer_norm(x, *[] if F is nanoad else [w.shape], w, b)),
    ("attention module", [(32, 32, 64), (192, 64), (64, 64)], lambda F, x, w, v: F.linear(
        (nanoad.causal_self_attention if F is nanoad else torch_attention)(F.linear(x, w), 4), v)),
    ("embedding of 1,024 ids", [(65, 64), MANY], lambda F, w, ids: F.embedding(ids, w)),
    ("chain of 1,000 scalar ops", [(), ()],
     lambda F, a, b: functools.reduce(lambda y, _: y * a + b, range(500), a)),
    ("one scalar op", [(), ()], lambda F, a, b: a * b),
]

# A job does its work once and returns the seconds of its forward and of its backward pass.
def op_job(F, f, inputs):
    draw = np.random.default_rng(0).standard_normal  # the same numbers for both
    array = np.asarray if F is nanoad else torch.tensor
    leaf = nanoad.Tensor if F is nanoad else lambda a: torch.tensor(a, requires_grad=True)
    inputs = [leaf(np.array(draw(x), "f")) if isinstance(x, tuple) else array(x) for x in inputs]
    cotangent = array(np.array(draw(f(F, *inputs).shape), "f"))
    leaves = [x for x in inputs if getattr(x, "requires_grad", False)]
    def job():
        start = clock()
        y = f(F, *inputs)
        middle = clock()
        y.backward(cotangent)
        end = clock()
        for x in leaves:
            x.grad = None
        return middle - start, end - middle
    return job

# ## Networks
#
# nanoad's, and the same in PyTorch, where the GPT is a function of nanoad's weights.
GPTS = {  # vocabulary, width, heads, layers, context; `small` is train_gpt.py's
    "width 32": (64, 32, 2, 2, 16), "width 64": (65, 64, 4, 4, 32),
    "width 256": (65, 256, 8, 6, 128), "small": (65, 128, 4, 4, 64),
}

def torch_attention(qkv, heads, seen=None):
    b, t, c = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    if seen is not None:  # the keys and values of what was read before, if anything
        k, v = seen[:] = [torch.cat([*seen[i:i + 1], new], 2) for i, new in enumerate((k, v))]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
    return y.transpose(1, 2).reshape(b, t, c // 3)

def torch_gpt(weights, heads, layers, ids, seen=None):
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])
    def linear(x, name):
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))
    start = seen[0][0].shape[2] if seen and seen[0] else 0
    places = torch.arange(start, start + ids.shape[1])
    x = F.embedding(ids, weights["tok_emb.weight"]) + F.embedding(places, weights["pos_emb.weight"])
    for i in range(layers):
        qkv = linear(norm(x, f"blocks.{i}.ln1"), f"blocks.{i}.attn.qkv")
        x = x + linear(torch_attention(qkv, heads, seen and seen[i]), f"blocks.{i}.attn.proj")
        y = linear(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.0")
        x = x + linear(F.gelu(y, approximate="tanh"), f"blocks.{i}.mlp.2")
    return linear(norm(x, "ln_f"), "tok_emb")

def network(F, size):
    """A network and its parameters."""
    nn, ours = nanoad.nn if F is nanoad else torch.nn, F is nanoad
    model = nanoad.GPT(*GPTS[size]) if size in GPTS else nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10))
    if ours or size not in GPTS:
        return model, list(model.parameters())
    weights = {name: torch.tensor(a).requires_grad_() for name, a in model.state_dict().items()}
    return functools.partial(torch_gpt, weights, *GPTS[size][2:4]), list(weights.values())

# A step as train_gpt.py does it: each thread has a shard of the batch, and the gradients are added
# up. torch.autograd.grad is the counterpart of nanoad.gradients, so both do the same.
def step_job(F, size, count):
    (model, parameters), rng = network(F, size), np.random.default_rng(0)
    y = rng.integers(0, 10, (count, GPTS[size][-1]) if size in GPTS else count)
    x = y[:, ::-1].copy() if size in GPTS else rng.random((count, 1, 28, 28), np.float32)
    if F is nanoad:
        optim, gradients, clip = nanoad, nanoad.gradients, nanoad.clip_grad_norm
        shards = [np.array_split(a, SHARDS) for a in (x, y)]
    else:
        optim, gradients, clip = torch.optim, torch.autograd.grad, torch.nn.utils.clip_grad_norm_
        shards = [[torch.tensor(a)] for a in (x, y)]
    optimizer = (optim.AdamW if size in GPTS else optim.Adam)(parameters)
    each = ThreadPoolExecutor(SHARDS).map if len(shards[0]) > 1 else map
    def share(x, y):
        logits = model(x)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
        loss = loss * (len(x) / count)
        return clock(), gradients(loss, parameters)
    def job():
        start = clock()
        (middle, *_), parts = zip(*each(share, *shards))
        for p, (one, *others) in zip(parameters, zip(*parts)):
            p.grad = sum(others, one)
        clip(parameters, 1.0)
        optimizer.step()
        return middle - start, clock() - middle
    return job

def writing_job(F):
    model, (_, _, _, layers, context) = network(F, "small")[0], GPTS["small"]
    def generate(ids, count):  # as GPT.generate: when the window is full it slides, and is read anew
        seen = None
        for _ in range(count):
            full = seen is None or seen[0][0].shape[2] == context
            seen = [[] for _ in range(layers)] if full else seen
            logits = model(ids[:, -context:] if full else ids[:, -1:], seen)[:, -1]
            ids = torch.cat([ids, torch.multinomial(F.softmax(logits, -1), 1)], 1)
    write = model.generate if F is nanoad else torch.no_grad()(generate)
    prompt = np.zeros((1, 1), int) if F is nanoad else torch.zeros((1, 1), dtype=torch.long)
    def job():
        start = clock()
        write(prompt, 400)
        return clock() - start, 0.0
    return job

# ## Measuring
#
# Jobs to be compared take turns, A B A B, so that whatever else the machine does hits both. After
# a product, OpenBLAS lets idle threads spin for up to 70 ms (PyTorch, 8) in case of another, which
# would take a core from the other's turn; so a turn begins with a pause and an uncounted call.
def measure(name, make):
    if sys.stderr.isatty():
        print(f"\r\033[K{name}\r", end="", file=sys.stderr, flush=True)
    begun, jobs = clock(), [make(F) for F in LIBRARIES]
    tracemalloc.start()  # NumPy tells it of its arrays
    jobs[0]()
    row = {"work": name, "peak KiB": tracemalloc.get_traced_memory()[1] / 1024}
    tracemalloc.stop()
    counts = [1 + int(0.02 / sum(job() and job())) for job in jobs]  # what is short runs often
    samples = [[] for _ in jobs]
    for turn in range(options.repeat):
        if turn < 3 or clock() - begun < 8:  # and what takes seconds has fewer turns
            for job, count, sample in zip(jobs, counts, samples):
                time.sleep(0.1)
                times = [job() for _ in range(count + (count > 1))]
                sample += times[count > 1:]
    for who, sample in zip(("", "torch "), samples):
        forward, backward = (1e6 * statistics.median(seconds) for seconds in zip(*sample))
        row |= {who + "forward us": forward, who + "backward us": backward}
        row["ratio"] = (row["forward us"] + row["backward us"]) / (forward + backward)
    return row

def output_of(*command):
    """What another Python process prints."""
    return json.loads(subprocess.run([sys.executable, *command], stdout=-1, check=True).stdout)

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

if options.part in "01":  # the memory of a process that takes two steps with one library
    before, job = resident("VmRSS"), step_job(LIBRARIES[int(options.part)], "width 256", 32)
    sys.exit(print(job() and job() and resident("VmHWM") - before))
steps = [("GPT step, width 64", functools.partial(step_job, size="width 64", count=32)),
         ("GPT step, width 256", functools.partial(step_job, size="width 256", count=32)),
         ("CNN step", functools.partial(step_job, size="CNN", count=128)),
         ("generate 400 tokens", writing_job)]
rows = [(f"{name}, {SHARDS} Python thread" + "s" * (SHARDS > 1), make) for name, make in steps]
if options.part == "all":
    ops = [(f"{name} {i[0]}", functools.partial(op_job, f=f, inputs=i)) for name, i, f in OPS]
    rows = [*ops, ("gpt_step", functools.partial(step_job, size="width 32", count=8)), *rows]
table = [measure(name, make) for name, make in rows if re.search(options.filter, name)]
if options.part == "shards":
    sys.exit(print(json.dumps(table)))

again = [__file__, "--filter", options.filter, "--repeat", str(options.repeat),
         "--threads", str(options.threads), "--part"]
table += output_of(*again, "shards") if options.threads > 1 else []
name = "GPT step, width 256, memory of the process"
if re.search(options.filter, name) and os.path.exists("/proc/self/status"):
    ours, theirs = [*(output_of(*again, str(i)) for i in range(len(LIBRARIES))), None][:2]
    table.append({"work": name, "peak KiB": ours})
    table[-1] |= {"torch peak KiB": theirs, "ratio": ours / theirs} if torch else {}
name, code = "import nanoad", "import time, numpy; t = time.time(); import nanoad; print(time.time() - t)"
if re.search(options.filter, name):  # in fresh processes that have NumPy already
    table.append({"work": name, "forward us": 1e6 * statistics.median(
        output_of("-c", code) for _ in range(9))})

columns = ["forward us", "backward us", "peak KiB"]
columns += ["torch forward us", "torch backward us", "torch peak KiB", "ratio"] if torch else []
print("| work |", " | ".join(columns), "|\n|", " --- |" + " ---: |" * len(columns))
for row in table:
    cells = [f"{row[c]:,.{0 if row[c] > 10 else 2}f}" if c in row else "" for c in columns]
    print("|", row["work"], "|", " | ".join(cells), "|")
names = [name for name, _ in rows[:-4] if "one scalar op" not in name]
ratios = [row["ratio"] for row in table if row["work"] in names]
if torch and ratios:
    mean = statistics.geometric_mean(ratios)
    print(f"\nGeometric mean of the ratios of {len(ratios)} operations: {mean:.2f}")
if options.json:
    versions = {"python": sys.version, "numpy": np.__version__, "torch": torch and torch.__version__}
    with open(options.json, "w") as file:
        json.dump({**versions, "threads": options.threads, "rows": table}, file, indent=1)
