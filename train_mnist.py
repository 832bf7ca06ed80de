"""Train a convolutional network to read handwritten digits, or to tell what a photograph shows.

    python train_mnist.py                     train; the network and its numbers go to runs/mnist
    python train_mnist.py --epochs 1          the same in a few seconds, a little less accurate
    python train_mnist.py --dataset cifar10   photographs of ten kinds of things
    python train_mnist.py --resume            go on with the latest run, wherever it was stopped
"""

# To make it yours, edit one place: DATASETS for the numbers, `get_data` for what is
# learned, `augment` for how images may vary, `build_model` for the network,
# `build_optimizer` for how it learns and by which schedule. What surrounds a training (its
# folder and checkpoints, Ctrl-C, the screen) is the second half of train_gpt.py. That says
# how BLAS is to work, too, and so is imported before NumPy.

from __future__ import annotations

import argparse
import functools
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

from train_gpt import (
    PROCESSES, Parser, Progress, Run, Screen, Stop, Training, check_least, choose_processes,
    count_processes, run_program,
)
import numpy as np
import nanoad

# ## Settings
#
# To show the network more images than there are, each is moved whenever it is used, by up
# to `reach` pixels, and `mirrored` with that probability (a mirrored digit is no digit).

DATASETS = {
    "mnist": dict(epochs=10, batch_size=128, lr=1e-2, width=8, reach=1, mirrored=0.0),
    "cifar10": dict(epochs=15, batch_size=128, lr=5e-3, width=32, reach=4, mirrored=0.5),
}
NAMES = {
    "mnist": list("0123456789"),
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
}
SAMPLE = Path(__file__).parent / "data" / "mnist-sample.npz"
SAMPLE_EPOCHS = 20  # over the 5,000 digits there

# Batch norm takes its statistics from a process's share of the batch: let none be small.
SMALLEST_SHARE = 32

# What `Run` needs to know about this program: its runs are of a data set, which brings
# settings.
PROGRAM = "train_mnist.py"
ABOUT = dict(
    program=PROGRAM, kind="dataset", kinds=DATASETS,
    metrics=("epoch", "train_loss", "test_loss", "test_accuracy"))

# No state of a random generator is ever saved. What epoch e draws comes from streams that
# are named by the run's seed, one of these kinds, and e: a resumed run opens the same.
WEIGHTS, ORDER, DROPOUT = range(3)


# ## The images


class Data(NamedTuple):
    """Images (N, C, H, W), of mean 0 and variance 1, and what they show (N,)."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    mean: float  # of the images as they were
    std: float
    is_sample: bool  # of MNIST, for there was no more


def get_data(dataset: str, screen: Screen) -> Data:
    """The data set of that name; where MNIST is not to be had, the sample in data/."""
    screen.live(f"looking for {dataset} ...")
    load = {"mnist": nanoad.load_mnist, "cifar10": nanoad.load_cifar10}[dataset]
    is_sample = False
    try:
        (x, y), (x_test, y_test) = load("train"), load("test")
    except OSError as error:
        if dataset != "mnist" or not SAMPLE.exists():
            raise Stop(str(error))
        screen.show("MNIST is neither here nor to be had from the network, so this learns "
                    "from a sample of 5,000 digits; data/README.md says how to get all of it.")
        (x, y), (x_test, y_test) = load_sample()
        is_sample = True
    mean, std = x.mean(), x.std()
    for images in (x, x_test):
        images -= mean
        images /= std
    return Data(x, y, x_test, y_test, mean, std, is_sample)


def load_sample() -> tuple[tuple, tuple]:
    """What `load_mnist` returns for "train" and "test", of fewer digits."""
    with np.load(SAMPLE) as sample:
        x = sample["x_train"][:, None].astype(np.float32)  # (N, H, W) -> (N, 1, H, W)
        x_test = sample["x_test"][:, None].astype(np.float32)
        return (x, sample["y_train"]), (x_test, sample["y_test"])


def augment(x: np.ndarray, rng: np.random.Generator, reach: int,
            mirrored: float) -> np.ndarray:
    """Move each image by up to `reach` pixels, and mirror some."""
    count, _, height, width = x.shape
    edges = (reach, reach)
    padded = np.pad(x, ((0, 0), (0, 0), edges, edges), mode="edge")
    sliding_windows = np.lib.stride_tricks.sliding_window_view
    windows = sliding_windows(padded, (height, width), axis=(2, 3))
    down, right = rng.integers(2 * reach + 1, size=(2, count))
    # windows: (N, C, 2 reach + 1, 2 reach + 1, H, W). Of each image, take one:
    moved = windows[np.arange(count), :, down, right]  # (N, C, H, W)
    is_mirrored = rng.random((count, 1, 1, 1)) < mirrored
    return np.where(is_mirrored, moved[..., ::-1], moved)


# ## The network


def build_model(settings: dict, image_shape: tuple[int, int, int]) -> nanoad.Module:
    """A network that turns images (N, C, H, W) into logits (N, 10) of what they show."""
    channels, height, width = image_shape
    few, many = settings["width"], 2 * settings["width"]

    def convolution(before: int, after: int) -> nanoad.Module:
        # batch norm has a bias of its own, and takes away any other
        return nanoad.Conv2d(before, after, kernel_size=3, padding=1, bias=False)

    return nanoad.Sequential(
        convolution(channels, few),
        nanoad.BatchNorm2d(few),
        nanoad.MaxPool2d(2),  # (N, few, H/2, W/2)
        nanoad.ReLU(),  # of the maxima: the maximum of the ReLUs, for a quarter of the work
        convolution(few, many),
        nanoad.BatchNorm2d(many),
        nanoad.MaxPool2d(2),  # (N, many, H/4, W/4)
        nanoad.ReLU(),
        convolution(many, many),
        nanoad.BatchNorm2d(many),
        nanoad.ReLU(),
        nanoad.Flatten(),
        nanoad.Linear(many * (height // 4) * (width // 4), 10),
    )


def build_optimizer(model: nanoad.Module, settings: dict, steps: int
                    ) -> tuple[nanoad.Optimizer, nanoad.CosineWarmupLR]:
    """How the network learns, and the schedule of its learning rate."""
    optimizer = nanoad.Adam(model.parameters(), settings["lr"])
    schedule = nanoad.CosineWarmupLR(optimizer, min(50, steps // 10), steps)
    return optimizer, schedule


# ## Training


def train_step(training: Training, parallel: nanoad.DataParallel,
               x: np.ndarray, y: np.ndarray, stream: tuple[int, ...]) -> None:
    """Move the weights a little, so that the batch surprises the network less."""
    loss = parallel(x, y, stream=stream)  # leaves the gradients in each .grad
    training.check(loss=loss)
    training.optimizer.step()
    training.schedule.step()
    training.losses.append(loss)


def evaluate(model: nanoad.Module, parallel: nanoad.DataParallel,
             x: np.ndarray) -> np.ndarray:
    """The logits (N, 10) of images."""
    at_once = 250 * parallel.processes  # few enough for the cache
    logits = []
    model.eval()
    for i in range(0, len(x), at_once):
        logits += parallel.evaluate(x[i:i + at_once])
    model.train()
    return np.concatenate(logits)


def train(run: Run, training: Training, parallel: nanoad.DataParallel,
          loader: nanoad.DataLoader, data: Data, screen: Screen) -> None:
    """Take the epochs that are left; test and save after each."""
    seed, epochs = run.settings["seed"], run.settings["epochs"]
    steps = epochs * len(loader)
    progress = Progress(screen, training.step, steps, loader.batch_size, "images")
    seconds = 0.0  # of training, without tests
    for epoch in range(len(training.history) + 1, epochs + 1):
        begun = time.monotonic()
        first = len(training.losses)
        nanoad.manual_seed((seed, ORDER, epoch))
        for k, (x, y) in enumerate(loader, start=1):
            train_step(training, parallel, x, y, stream=(seed, DROPOUT, training.step))
            loss = np.mean(training.losses[first:]).item()
            place = f"epoch {epoch}/{epochs}  step {k}/{len(loader)}"
            progress.show(training.step, f"{place}  loss {loss:.4f}")
        seconds += time.monotonic() - begun

        logits = evaluate(training.model, parallel, data.x_test)
        test_loss = nanoad.cross_entropy(logits, data.y_test).item()
        accuracy = np.mean(logits.argmax(axis=1) == data.y_test).item()
        training.history.append((epoch, loss, test_loss, accuracy))
        run.save(training)
        screen.show(f"epoch {epoch}  training loss {loss:.4f}  "
                    f"test loss {test_loss:.4f}  test accuracy {accuracy:.2%}  "
                    f"{seconds:.1f} s of training")


# ## What it mistakes


def show_mistakes(logits: np.ndarray, data: Data, names: list[str],
                  screen: Screen) -> None:
    """Show how often what is taken for what, and pictures of the surest mistakes."""
    guess = logits.argmax(axis=1)  # (N,)
    sure = nanoad.softmax(logits).numpy().max(axis=1)  # (N,)
    screen.show("")
    if screen.columns < 72:
        screen.show("(A screen 72 columns wide would show what is taken for what.)")
    else:
        show_table(guess, data.y_test, names, screen)

    wrong = np.flatnonzero(guess != data.y_test)
    surest = wrong[np.argsort(-sure[wrong], kind="stable")][:6]
    screen.show(f"\n{len(wrong):,} of {len(guess):,} are mistaken. "
                "The network was surest of these:")
    captions = []
    for i in surest:
        percent = f"{100 * sure[i]:.0f} %"
        captions.append(f"{names[data.y_test[i]]}, taken for {names[guess[i]]} ({percent})")
    show_pictures(data.x_test[surest], captions, screen)


def show_pictures(images: np.ndarray, captions: list[str], screen: Screen) -> None:
    """Show images (N, C, H, W) in characters, side by side where there is room."""
    width = images.shape[3] - 2
    captions = [textwrap.wrap(caption, width) for caption in captions]
    tallest = max(map(len, captions), default=0)
    pictures = []
    for image, caption in zip(images, captions):
        padding = [""] * (tallest - len(caption))
        lines = caption + padding + draw_picture(image)
        pictures.append([line.ljust(width) for line in lines])

    across = max(1, (screen.columns + 1) // (width + 1))  # with a space between them
    for i in range(0, len(pictures), across):
        for lines in zip(*pictures[i:i + across]):
            screen.show(" ".join(lines).rstrip())


def show_table(guess: np.ndarray, truth: np.ndarray, names: list[str],
               screen: Screen) -> None:
    """Show how many images of each kind (a row) are taken for each kind (a column)."""
    screen.show("What the test images are (rows), and what they are taken for (columns):")
    screen.show(" " * 10 + "".join(f"{name[:5]:>6}" for name in names))
    for k, name in enumerate(names):
        counts = np.bincount(guess[truth == k], minlength=len(names))
        screen.show(f"{name:>10}" + "".join(f"{count or '.':>6}" for count in counts))


def draw_picture(image: np.ndarray) -> list[str]:
    """The lines of an image (C, H, W) in characters, which are twice as high as wide."""
    gray = image.mean(axis=0)[1:-1, 1:-1]  # without its edge, three digits fit 80 columns
    height, width = gray.shape
    gray = gray.reshape(height // 2, 2, width).mean(axis=1)  # (H/2, W)
    shades = np.rint(9 * (gray - gray.min()) / np.ptp(gray)).astype(int)
    return ["".join(" .:-=+*#%@"[shade] for shade in row) for row in shades]


# ## From the command line


def main(arguments: list[str] | None = None) -> None:
    """Train, and show what is still mistaken."""
    options = read_options(arguments)
    screen = Screen(PROGRAM, goes_on=True)
    with Run(options, **ABOUT) as run, np.errstate(all="ignore"):  # we look for nan ourselves
        open_run(run, options)
        settings = run.settings
        dataset, batch_size = settings["dataset"], settings["batch_size"]
        data = get_data(dataset, screen)
        run.check_data(data.x, f"{dataset}, of {len(data.x):,} images here,")
        settings["epochs"] = settings["epochs"] or default_epochs(dataset, data)
        if batch_size > len(data.x):
            raise Stop(f"--batch-size {batch_size}: there are {len(data.x)} images")

        nanoad.manual_seed((settings["seed"], WEIGHTS))
        model = build_model(settings, data.x.shape[1:])
        varied = functools.partial(
            augment, reach=settings["reach"], mirrored=settings["mirrored"])
        loader = nanoad.DataLoader(
            data.x, data.y, batch_size, shuffle=True, drop_last=True, transform=varied)
        steps = settings["epochs"] * len(loader)
        optimizer, schedule = build_optimizer(model, settings, steps)
        training = Training(model, optimizer, schedule, mean=data.mean, std=data.std)
        run.restore(training, screen)
        run.save(training)  # before the work: so we notice now if it cannot be written
        screen.show(
            f"{dataset}: {len(data.x):,} images, {training.size:,} parameters, "
            f"{count_processes(settings['processes'])}, "
            f"epoch {len(training.history)} of {settings['epochs']}, into {run.folder}")

        parallel = nanoad.DataParallel(
            model, lambda x, y: nanoad.cross_entropy(model(x), y),
            evaluate=lambda x: model(x).numpy(), processes=settings["processes"])
        with parallel:
            train(run, training, parallel, loader, data, screen)
            logits = evaluate(model, parallel, data.x_test)
        show_mistakes(logits, data, NAMES[dataset], screen)


def default_epochs(dataset: str, data: Data) -> int:
    """How often to go through the images, if nobody says."""
    return SAMPLE_EPOCHS if data.is_sample else DATASETS[dataset]["epochs"]


def open_run(run: Run, options: argparse.Namespace) -> None:
    """Begin a run with the settings asked for, or go on with an old one by its own."""
    if options.resume is not None:
        run.load()
        run.require("dataset", "batch_size", "lr", "seed", "width", "processes")
        run.lengthen("epochs", options.epochs)
        return

    dataset = options.dataset or "mnist"
    settings = {**DATASETS[dataset], "dataset": dataset, "seed": options.seed or 0}
    for name in ("batch_size", "lr", "width"):
        settings[name] = getattr(options, name) or settings[name]
    settings["epochs"] = options.epochs  # None: see default_epochs
    most = min(PROCESSES, max(1, settings["batch_size"] // SMALLEST_SHARE))
    settings["processes"] = choose_processes(options, most, settings["batch_size"], "images")
    run.begin(settings)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """What is asked for; Stop if it makes no sense.

    What the command line leaves open is None, so that a run to be resumed can tell.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="what to learn (default: mnist)")
    add("--epochs", type=int, metavar="N",
        help="passes over the images (default: by data set); "
             "with --resume, more than the run has")
    add("--batch-size", type=int, metavar="N", help="images per step (default: 128)")
    add("--lr", type=float, metavar="X",
        help="highest learning rate (default: by data set)")
    add("--width", type=int, metavar="N",
        help="channels of the first layer (default: by data set)")
    parser.add_run_options(kind="DATASET")
    options = parser.parse_args(arguments)
    check_least(options, epochs=1, batch_size=1, lr=1e-9, seed=0, width=1, processes=1)
    return options


if __name__ == "__main__":
    sys.exit(run_program(main, PROGRAM))
