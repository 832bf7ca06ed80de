"""Train a small GPT to write, one character at a time: Shakespeare, or any text you give it.

    python train_gpt.py                     train; the network and its numbers go to runs/small
    python train_gpt.py --size tiny         a smaller one, in less than a minute
    python train_gpt.py --resume            go on with the latest run, wherever it was stopped
    python train_gpt.py --sample "ROMEO:"   let the latest network write
"""

import argparse
import hashlib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Small networks bear high learning rates. Only `large` reads the text often enough to begin to
# know it by heart, and dropout hinders that.
SIZES = {
    "tiny": dict(embed_dim=64, num_heads=4, num_layers=4, block_size=32, dropout=0.0,
                 batch_size=32, steps=2000, lr=1e-2),
    "small": dict(embed_dim=128, num_heads=4, num_layers=4, block_size=128, dropout=0.0,
                  batch_size=8, steps=5200, lr=3e-3),
    "large": dict(embed_dim=192, num_heads=3, num_layers=4, block_size=256, dropout=0.1,
                  batch_size=8, steps=14000, lr=2e-3),
}
EVALUATIONS = 8  # per run; each reads the whole validation text, and saves a checkpoint
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = min(CORES, 4)  # of more, each would do too little between its turns at Python's lock
TERMINAL = sys.stdout.isatty()
sys.stdout.reconfigure(errors="replace")  # the loss curve's characters are not in every encoding

def show(text, live=False):
    """Print a line. A live one is for terminals only, and the next takes its place."""
    if TERMINAL:
        print(f"\r\033[K{text}", end="" if live else "\n", flush=True)
    elif not live:
        print(text, flush=True)

def stop(message, code=2):
    """End with one line on stderr. Code 2: nothing was begun; 1: something went wrong later."""
    show("", live=True)  # wipes what is there
    print(f"train_gpt.py: {message}", file=sys.stderr)
    sys.exit(code)

# ## What is asked for
#
# What the command line leaves open is None, so that a run to be resumed can tell.
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error = stop
add = parser.add_argument
add("--size", choices=SIZES, help="of the network and its training (default: small)")
add("--steps", type=int, metavar="N", help="training steps (default: by size)")
add("--seed", type=int, metavar="N", help="of another run (default: 0) or sample (the run's)")
add("--threads", type=int, metavar="N", help=f"that share each batch (default here: {THREADS})")
add("--text", metavar="FILE", help="UTF-8 text to learn from (default: tiny-Shakespeare)")
add("--out", metavar="FOLDER", help="of the run (default: runs/SIZE, or a new runs/SIZE-2, ...)")
add("--resume", nargs="?", const="", metavar="FOLDER",
    help="continue the run in FOLDER (default: --out, or the latest in runs/)")
add("--sample", metavar="PROMPT", help="only write 400 characters, by --out or the latest run")
args = parser.parse_args()
for name, least in dict(steps=1, seed=0, threads=1).items():
    if (given := getattr(args, name)) is not None and given < least:
        stop(f"--{name} must be at least {least}, not {given}")
if args.sample is not None and (args.resume is not None or args.text or not args.sample):
    stop("--sample needs a character or more, no --text, and --out rather than --resume")
if args.resume and args.out:
    stop("--resume FOLDER writes to that folder: drop --out")
signal.signal(signal.SIGINT, lambda *_: stop("interrupted", 130))

# Matrix products are computed by a library, BLAS, with threads of its own, which would be in the
# way of ours. How many it has is settled once and for all when NumPy is imported: hence only now.
# It gets one even where we have one: how it splits its work would show in the last bits.
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
# OpenBLAS does not know AMD's newest processors, and leaves half of their vector unit idle unless
# told which kernels to take (SkylakeX means AVX-512; float32 products took 0.55 times as long).
cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
if "AuthenticAMD" in cpu and "avx512_vnni" in cpu:
    os.environ.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX")
import numpy as np  # noqa: E402
import nanoad  # noqa: E402

# ## The settings of the run
#
# A new run takes them from the table. An old one brings its own; to ask for others is an error.
named = args.resume or args.out
if args.resume is None and args.sample is None:
    state, size = None, args.size or "small"
    settings = {**SIZES[size], "size": size, "seed": args.seed or 0, "text": None,
                "threads": args.threads or THREADS, "steps": args.steps or SIZES[size]["steps"]}
    folder, number = Path(named or f"runs/{size}"), 1
    while folder.exists() and not named:
        number += 1
        folder = Path(f"runs/{size}-{number}")
    if (folder / "checkpoint.npz").exists():
        stop(f"{folder} has a run: go on with it by --resume {folder}, or name another --out")
else:
    folder = Path((named or f"runs/{args.size or '*'}").removesuffix("checkpoint.npz"))
    if not named:
        runs = [file for size in SIZES if args.size in (None, size)
                for file in Path("runs").glob(f"{size}*/checkpoint.npz")]
        folder = max(runs, key=os.path.getmtime).parent if runs else folder
    try:
        state = nanoad.load(folder / "checkpoint.npz")
    except (OSError, ValueError) as error:
        stop(f"no checkpoint to go on from in {folder}: {getattr(error, 'strerror', error)}")
    if not isinstance(state, dict) or state.get("written_by") != "train_gpt.py":
        stop(f"the checkpoint in {folder} was written by another program")
    settings = state["settings"]
    for name in ("size", "steps", "threads", *(() if args.sample else ("seed",))):
        if getattr(args, name) not in (None, settings[name]):
            stop(f"--{name} {getattr(args, name)}: the run in {folder} has {settings[name]}")
T, B, steps, threads = (settings[name] for name in ("block_size", "batch_size", "steps", "threads"))
seed = settings["seed"] if args.seed is None else args.seed
if threads > B:
    stop(f"--threads {threads}: there are only {B} texts in a batch to share")

# ## The text
if args.sample is None:
    path = args.text or settings["text"]
    try:
        show("reading the text ...", live=True)
        text = Path(path).read_text("utf-8") if path else nanoad.load_tinyshakespeare()
    except (OSError, UnicodeDecodeError) as error:
        if path:
            stop(f"cannot read {path} as UTF-8 text: {error}")
        show("tiny-Shakespeare is neither here nor to be had from the network, so this learns to "
             "write nanoad.py; data/README.md says how to get the real text.")
        path, text = nanoad.__file__, Path(nanoad.__file__).read_text("utf-8")
    settings["text"] = path and os.path.abspath(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != settings.setdefault("sha256", digest):
        stop(f"{path or 'tiny-Shakespeare'} is not, or no longer, the text of the run in {folder}; "
             "say by --text where that is")
    split = int(0.9 * len(text))  # the last tenth is for validation
    if len(text) - split <= T:
        stop(f"a text of {len(text)} characters is too short: a tenth must exceed the context, {T}")

# ## The network
#
# No state of a random generator is ever saved: what step s draws comes from streams named by the
# seed, a kind (1 for batches, 2 for dropout) and s, which a resumed run opens just as well.
chars = state["chars"] if state else "".join(sorted(set(text)))
tokenizer = nanoad.CharTokenizer(chars)
nanoad.manual_seed(seed)
model = nanoad.GPT(len(chars), settings["embed_dim"], settings["num_heads"],
                   settings["num_layers"], T, settings["dropout"])
params = model.parameters()
optimizer = nanoad.AdamW(params, settings["lr"], betas=(0.9, 0.99), weight_decay=0.1)
schedule = nanoad.CosineWarmupLR(optimizer, min(100, steps // 10), steps, settings["lr"] / 100)
losses, history = [], []  # of every step; (step, training loss, validation loss)
if state:
    losses, history = state["losses"].tolist(), state["history"]
    for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
        part.load_state_dict(state[name])

def loss_of(x, y):
    logits = model(x)  # (B, T, characters)
    return nanoad.cross_entropy(logits.reshape(-1, len(chars)), y.reshape(-1))

# Each thread takes its share of a batch. The mean over the batch is the sum of the shares' means
# weighted by their sizes, and so is its gradient. Dropout draws from a stream of the share's own.
def share(k, x, y):
    nanoad.manual_seed((seed, 2, len(losses), k))  # (counting steps from 0)
    loss = loss_of(x, y) * (len(x) / B)
    return loss.item(), nanoad.gradients(loss, params)

# Over the *whole* validation text, in consecutive windows, so that numbers compare between runs.
def evaluate(ids, pool):
    count = (len(ids) - 1) // T
    x, y = (ids[i:i + count * T].reshape(count, T) for i in (0, 1))
    total = nanoad.no_grad()(lambda rows: loss_of(x[rows], y[rows]).item() * len(rows))
    batches, totals = np.array_split(np.arange(count), 1 + count * T // 4096), []  # of ~4096 ids
    model.eval()
    for loss in pool.map(total, batches):
        totals.append(loss)
        show(f"evaluating: {len(totals) / len(batches):.0%}", live=True)
    model.train()
    return sum(totals) / count

# The checkpoint is replaced at one stroke, so the process may be killed at any moment.
def save():
    weights = model.state_dict()
    if not all(np.isfinite(numbers).all() for numbers in (*weights.values(), *history[-1:])):
        stop(f"step {len(losses)} made numbers infinite; the last good ones are in {folder}", 1)
    try:
        # The first save of an unnamed run makes its folder: another may have begun just now.
        folder.mkdir(parents=True, exist_ok=bool(named or state or losses))
        nanoad.save(folder / "checkpoint.npz", {
            "written_by": "train_gpt.py", "settings": settings, "chars": chars,
            "step": len(losses), "losses": np.array(losses), "history": history, "model": weights,
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
        rows = ["step,train_loss,val_loss", *(",".join(map(repr, row)) for row in history)]
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    except OSError as error:
        stop(f"cannot write to {folder}: {error.strerror}", 1 if losses else 2)

# ## Training
if args.sample is None:
    save()  # before the work, so that a folder which cannot be written to is noticed now
    show(f"{settings['size']}: {sum(p.size for p in params):,} parameters, {len(text):,} "
         f"characters, {threads} threads, step {len(losses)} of {steps}, into {folder}")
    interrupted = []  # Ctrl-C ends it after the step; a second kills at once, and does no harm
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(
        signal.signal(signal.SIGINT, signal.SIG_DFL)))
    np.seterr("ignore")  # we look for inf and nan ourselves
    ids, begun, first, shown = tokenizer.encode(text), time.monotonic(), len(losses), 0.0
    with ThreadPoolExecutor(threads, initializer=np.seterr, initargs=("ignore",)) as pool:
        for step in range(first + 1, steps + 1):
            starts = np.random.default_rng((seed, 1, step)).integers(0, split - T, B)
            x, y = (ids[starts[:, None] + np.arange(i, T + i)] for i in (0, 1))  # (B, T) each
            shares = np.array_split(x, threads), np.array_split(y, threads)
            parts, gradients = zip(*pool.map(share, range(threads), *shares))
            for p, (one, *others) in zip(params, zip(*gradients)):  # over the shares
                p.grad = sum(others, one)
            loss, norm = sum(parts), nanoad.clip_grad_norm(params, 1.0)
            if not np.isfinite(loss + norm):
                stop(f"step {step}: the loss is {loss} and the norm of its gradient {norm}; "
                     f"the last good checkpoint is in {folder}", 1)
            optimizer.step()
            schedule.step()
            losses.append(loss)

            now, recent = time.monotonic(), np.mean(losses[-50:]).item()  # one is noisy
            speed = (step - first) / (now - begun)
            if now - shown > (0.1 if TERMINAL else 10):
                shown, left = now, int((steps - step) / speed)
                show(f"step {step}/{steps}  loss {recent:.3f}  {speed * B * T:,.0f} tokens/s  "
                     f"{left // 60}:{left % 60:02} left", live=TERMINAL)
            if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:  # due
                history.append((step, recent, evaluate(ids[split:], pool)))
                save()
                show("step {}  training loss {:.3f}  validation loss {:.3f}".format(*history[-1]))
            if interrupted:
                save()
                stop(f"interrupted; step {step} is saved: go on by --resume {folder}", 130)
    show(nanoad.plot(losses))

# ## What it writes
try:
    ids = tokenizer.encode(args.sample or text[:40].partition("\n")[0] or text[0])
except ValueError as error:
    stop(error)
nanoad.manual_seed(seed)
show(tokenizer.decode(model.generate(ids[None], 400)[0]))
