"""Train a convolutional network to read handwritten digits, or to tell what a photograph shows.

    python train_mnist.py                     train; the network and its numbers go to runs/mnist
    python train_mnist.py --epochs 1          the same in a few seconds, a little less accurate
    python train_mnist.py --dataset cifar10   photographs of ten kinds of things
    python train_mnist.py --resume            go on with the latest run, wherever it was stopped
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# To show the network more images than there are, each is moved whenever it is used, by up to
# `reach` pixels, and `mirrored` with that probability (but a mirrored digit is no digit).
DATASETS = {
    "mnist": dict(epochs=10, lr=1e-2, width=8, reach=1, mirrored=0.0, names="0123456789"),
    "cifar10": dict(epochs=15, lr=5e-3, width=32, reach=4, mirrored=0.5, names=(
        "airplane automobile bird cat deer dog frog horse ship truck").split()),
}
SAMPLE = Path(__file__).parent / "data" / "mnist-sample.npz"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = min(CORES, 4)  # of more, each would do too little between its turns at Python's lock
TERMINAL = sys.stdout.isatty()

def show(text, live=False):
    """Print a line. A live one is for terminals only, and the next takes its place."""
    if TERMINAL:
        print(f"\r\033[K{text}", end="" if live else "\n", flush=True)
    elif not live:
        print(text, flush=True)

def stop(message, code=2):
    """End with one line on stderr. Code 2: nothing was begun; 1: something went wrong later."""
    show("", live=True)  # wipes what is there
    print("train_mnist.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(code)

# ## What is asked for
#
# What the command line leaves open is None, so that a run to be resumed can tell.
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error = stop
add = parser.add_argument
add("--dataset", choices=DATASETS, help="what to learn (default: mnist)")
add("--epochs", type=int, metavar="N", help="passes over the images (default: by data set)")
add("--batch-size", type=int, metavar="N", help="images per step (default: 128)")
add("--lr", type=float, metavar="X", help="highest learning rate (default: by data set)")
add("--seed", type=int, metavar="N", help="for another run (default: 0)")
add("--width", type=int, metavar="N", help="channels of the first layer (default: by data set)")
add("--threads", type=int, metavar="N", help=f"that share each batch (default here: {THREADS})")
add("--out", metavar="FOLDER", help="of the run (default: runs/DATASET, or runs/DATASET-2, ...)")
add("--resume", nargs="?", const="", metavar="FOLDER",
    help="continue the run in FOLDER (default: --out, or the latest in runs/)")
args = parser.parse_args()
for name, least in dict(epochs=1, batch_size=1, lr=1e-9, seed=0, width=1, threads=1).items():
    if (given := getattr(args, name)) is not None and not least <= given < math.inf:
        stop(f"--{name.replace('_', '-')} must be at least {least}, not {given}")
if args.resume and args.out:
    stop("--resume FOLDER writes to that folder: drop --out")
interrupted = "interrupted"  # says more once there is something to resume
signal.signal(signal.SIGINT, lambda *_: stop(interrupted, 130))

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

# ## The run
#
# A new one gets a folder of its own. An old one brings its settings; to ask for others is an error.
named, dataset, state = args.resume or args.out, args.dataset or "mnist", None
folder, number = Path((named or f"runs/{dataset}").removesuffix("checkpoint.npz")), 1
if args.resume is None:
    while not named and (folder / "checkpoint.npz").exists():
        number += 1
        folder = Path(f"runs/{dataset}-{number}")
    if (folder / "checkpoint.npz").exists():
        stop(f"{folder} has a run: go on with it by --resume {folder}, or name another --out")
else:
    if not named:
        runs = [file for name in DATASETS if args.dataset in (None, name)
                for file in Path("runs").glob(f"{name}*/checkpoint.npz")]
        folder = max(runs, key=os.path.getmtime).parent if runs else folder
    try:
        state = nanoad.load(folder / "checkpoint.npz")
    except (OSError, ValueError) as error:
        stop(f"no checkpoint to go on from in {folder}: {getattr(error, 'strerror', error)}")
    if not isinstance(state, dict) or state.get("written_by") != "train_mnist.py":
        stop(f"the checkpoint in {folder} was written by another program")
    dataset = state["settings"]["dataset"]
    for name, own in state["settings"].items():
        if getattr(args, name, None) not in (None, own):
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: the run in {folder} has {own}")

# ## The images
show(f"looking for {dataset} ...", live=True)
try:  # x: (N, C, H, W), y: (N,)
    (x, y), (x_test, y_test) = map(getattr(nanoad, f"load_{dataset}"), ("train", "test"))
except OSError as error:
    if dataset != "mnist" or not SAMPLE.exists():
        stop(error)
    show("MNIST is neither here nor to be had from the network, so this learns from a sample of "
         "5,000 digits; data/README.md says how to get all of it.")
    with np.load(SAMPLE) as sample:
        y, y_test = sample["y_train"], sample["y_test"]
        x, x_test = (sample[k][:, None].astype(np.float32) for k in ("x_train", "x_test"))
mean, std = x.mean(), x.std()
for images in (x, x_test):
    images -= mean
    images /= std

kind = DATASETS[dataset]
settings = state["settings"] if state else dict(
    dataset=dataset, images=len(x), seed=args.seed or 0, batch_size=args.batch_size or 128,
    epochs=args.epochs or (kind["epochs"] if len(x) > 5000 else 20), lr=args.lr or kind["lr"],
    width=args.width or kind["width"], threads=args.threads or min(THREADS, args.batch_size or 128))
seed, epochs, B, threads = (settings[k] for k in ("seed", "epochs", "batch_size", "threads"))
if len(x) != settings["images"]:
    stop(f"the run in {folder} learns from {settings['images']:,} images; here are {len(x):,}")
if not threads <= B <= len(x):
    stop(f"--batch-size {B} must be from {threads}, the threads, to {len(x)}, the images")

def augment(x, rng):
    n, reach = len(x), kind["reach"]
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, x.shape[2:], axis=(2, 3))
    down, right = rng.integers(2 * reach + 1, size=(2, n))  # windows: (N, C, down, right, H, W)
    x = windows[np.arange(n), :, down, right]  # (N, C, H, W)
    return np.where(rng.random((n, 1, 1, 1)) < kind["mirrored"], x[..., ::-1], x)

# ## The network
#
# No state of a random generator is ever saved: epoch e draws from a stream named by the seed and
# e, which a resumed run opens just as well. The network itself is from stream 0.
nanoad.manual_seed((seed, 0))
(_, C, H, W), width = x.shape, settings["width"]
model = nanoad.Sequential(
    nanoad.Conv2d(C, width, kernel_size=3, padding=1), nanoad.BatchNorm2d(width),
    nanoad.ReLU(), nanoad.MaxPool2d(2),  # (N, width, H/2, W/2)
    nanoad.Conv2d(width, 2 * width, kernel_size=3, padding=1), nanoad.BatchNorm2d(2 * width),
    nanoad.ReLU(), nanoad.MaxPool2d(2),  # (N, 2 width, H/4, W/4)
    nanoad.Flatten(), nanoad.Linear(2 * width * (H // 4) * (W // 4), 10))
params = model.parameters()
loader = nanoad.DataLoader(x, y, B, shuffle=True, drop_last=True, transform=augment)
optimizer, steps = nanoad.Adam(params, settings["lr"]), epochs * len(loader)
schedule = nanoad.CosineWarmupLR(optimizer, min(50, steps // 10), steps)
parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
history = state["history"] if state else []  # (epoch, training loss, test loss, test accuracy)
if state:
    for name, part in parts.items():
        part.load_state_dict(state[name])

# Each thread has a replica of the network. All share the parameters (deepcopy is told to take them
# for copied), but batch norm writes its running statistics in every step: those of the first count.
replicas = [model, *(copy.deepcopy(model, {id(p): p for p in params}) for _ in range(1, threads))]

# Each takes its share of a batch. The mean over the batch is the sum of the shares' means weighted
# by their sizes, and so is its gradient.
def share(replica, x, y):
    loss = nanoad.cross_entropy(replica(x), y) * (len(x) / B)
    return loss.item(), nanoad.gradients(loss, params)

# ## Training
show(f"{dataset}: {len(x):,} images, {sum(p.size for p in params):,} parameters, "
     f"{threads} threads, epoch {len(history)} of {epochs}, into {folder}")
np.seterr("ignore")  # we look for inf and nan ourselves
scores = nanoad.no_grad()(lambda x: model(x).numpy())  # (N, C, H, W) -> (N, 10)
losses, seconds, first = [], 0.0, schedule.steps
with ThreadPoolExecutor(threads, initializer=np.seterr, initargs=("ignore",)) as pool:
    while True:  # each turn tests and saves what there is, and then trains for an epoch more
        model.eval()
        logits = np.concatenate([*pool.map(scores, np.array_split(x_test, len(x_test) // 250 + 1))])
        model.train()
        test_loss = nanoad.cross_entropy(logits, y_test).item()
        if not math.isfinite(sum(losses) + test_loss):
            stop(f"epoch {len(history) + 1}: the loss is {(losses or [test_loss])[-1]}, of the "
                 f"test images {test_loss}; the last good checkpoint is in {folder}", 1)
        if losses:
            accuracy = np.mean(logits.argmax(1) == y_test).item()
            history.append((len(history) + 1, np.mean(losses).item(), test_loss, accuracy))
        # The checkpoint is replaced at one stroke, so the process may be killed at any moment. The
        # first is saved before the work: a folder that cannot be written to is noticed now.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            nanoad.save(folder / "checkpoint.npz", {
                "written_by": "train_mnist.py", "settings": settings, "history": history,
                "mean": mean, "std": std, **{k: part.state_dict() for k, part in parts.items()}})
            rows = ("epoch", "train_loss", "test_loss", "test_accuracy"), *history
            (folder / "metrics.csv").write_text("".join(",".join(map(str, r)) + "\n" for r in rows))
        except OSError as error:
            stop(f"cannot write to {folder}: {error.strerror}", 1 if losses else 2)
        if losses:
            show("epoch {}  training loss {:.4f}  test loss {:.4f}  test accuracy {:.2%}  "
                 "{:.1f} s of training".format(*history[-1], seconds))
        interrupted = f"interrupted; whole epochs are saved: go on by --resume {folder}"
        if len(history) == epochs:
            break

        epoch, losses, begun = len(history) + 1, [], time.monotonic() - seconds  # no testing
        nanoad.manual_seed((seed, epoch))
        for x_batch, y_batch in loader:
            shares = np.array_split(x_batch, threads), np.array_split(y_batch, threads)
            parts_of_loss, gradients = zip(*pool.map(share, replicas, *shares))
            losses.append(sum(parts_of_loss))
            if not math.isfinite(losses[-1]):
                break  # the next turn says so
            for p, (one, *others) in zip(params, zip(*gradients)):
                p.grad = sum(others, one)
            optimizer.step()
            schedule.step()
            seconds = time.monotonic() - begun
            if len(losses) % 10 == 0:
                left = int(seconds / (schedule.steps - first) * (steps - schedule.steps))
                show(f"epoch {epoch}/{epochs}  step {len(losses)}/{len(loader)}  "
                     f"loss {np.mean(losses):.4f}  {left // 60}:{left % 60:02} left", live=True)

# ## What it mistakes
names, guess, sure = kind["names"], logits.argmax(1), nanoad.softmax(logits).numpy().max(1)
show("\nWhat the test images are (rows), and what they are taken for (columns):")
show(" ".join([" " * 10, *(f"{name[:5]:>5}" for name in names)]))
for k, name in enumerate(names):
    counts = np.bincount(guess[y_test == k], minlength=10)
    show(" ".join([f"{name:>10}", *(f"{count or '.':>5}" for count in counts)]))
wrong = np.flatnonzero(guess != y_test)
show(f"\n{len(wrong):,} of {len(y_test):,} are mistaken. The network was surest of these:")
pictures, across = [], 81 // (W - 1)  # each is W - 2 wide, and a space
for i in wrong[np.argsort(-sure[wrong], kind="stable")][:6]:
    gray = x_test[i].mean(0)[1:-1, 1:-1]  # without the edge, three digits fit into 80 columns
    gray = gray.reshape(-1, 2, W - 2).mean(1)  # a character is twice as high as wide
    shades = np.rint(9 * (gray - gray.min()) / np.ptp(gray)).astype(int)
    caption = f"{names[y_test[i]]}, guess {names[guess[i]]} {sure[i]:.0%}".ljust(W - 2)
    pictures.append([caption, *("".join(" .:-=+*#%@"[shade] for shade in row) for row in shades)])
for k in range(0, len(pictures), across):
    show("\n".join(" ".join(row).rstrip() for row in zip(*pictures[k:k + across])))
