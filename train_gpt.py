"""Train a small GPT to write, one character at a time: Shakespeare, or any text you give it.

    python train_gpt.py                     train; the network and its numbers go to runs/small
    python train_gpt.py --size tiny         a smaller one, in less than a minute
    python train_gpt.py --resume            go on with the latest run, wherever it was stopped
    python train_gpt.py --sample "ROMEO:"   let the latest network write
"""

# The first half of this file is the training: settings, text, network, a step, evaluation,
# main. To make it yours, edit one place: SIZES for the numbers, `get_data` for what is
# learned, `build_model` for the network, `build_optimizer` for how it learns and by which
# schedule. The second half, from "A run" on, is what surrounds a training: its folder and
# checkpoints, Ctrl-C, the screen. It knows nothing of GPTs; train_mnist.py uses it too.

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def prepare_blas() -> None:
    """Say how BLAS is to compute NumPy's matrix products. It listens when NumPy is imported.

    It has threads of its own. They would be in the way of our processes, and how they split
    a product would show in its last bits: so it gets one.

    OpenBLAS does not know AMD's newest processors, and leaves half of their vector unit idle
    unless told which kernels to take (SkylakeX means AVX-512; float32 products took 0.55
    times as long).
    """
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpuinfo.read_text() if cpuinfo.exists() else ""
    if "AuthenticAMD" in cpu and "avx512_vnni" in cpu:
        os.environ.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX")


if "numpy" not in sys.modules:  # else whoever imported it has settled this already
    prepare_blas()

import numpy as np  # noqa: E402
import nanoad  # noqa: E402

# ## Settings
#
# Small networks bear high learning rates. Only `large` reads the text often enough to begin
# to know it by heart, and dropout hinders that.

SIZES = {
    "tiny": dict(
        embed_dim=64, num_heads=4, num_layers=4, block_size=32, dropout=0.0,
        batch_size=32, steps=2350, lr=1e-2,
    ),
    "small": dict(
        embed_dim=128, num_heads=4, num_layers=4, block_size=128, dropout=0.0,
        batch_size=8, steps=5200, lr=4.5e-3,
    ),
    "large": dict(
        embed_dim=192, num_heads=3, num_layers=4, block_size=256, dropout=0.1,
        batch_size=8, steps=13500, lr=3e-3,
    ),
}
EVALUATIONS = 8  # per run; each reads the whole validation text, and saves a checkpoint
TEMPERATURE = 0.8  # of what it writes: below 1, likely characters become likelier
LENGTH = 400  # characters that it writes in the end
SAMPLE_LENGTH = 120  # and at every evaluation

# What `Run` needs to know about this program: its runs are of a size, which brings settings.
PROGRAM = "train_gpt.py"
ABOUT = dict(
    program=PROGRAM, kind="size", kinds=SIZES, metrics=("step", "train_loss", "val_loss"))

# No state of a random generator is ever saved. What step s draws comes from streams that
# are named by the run's seed, one of these kinds, and s: a resumed run opens the same.
WEIGHTS, BATCHES, DROPOUT, SAMPLES, ENDING = range(5)


# ## The text


class Data(NamedTuple):
    """A text, as it is and as numbers."""

    text: str
    path: str | None  # of its file; None is tiny-Shakespeare, which nanoad finds itself
    tokenizer: nanoad.CharTokenizer
    training: np.ndarray  # ids, (90 % of the characters,)
    validation: np.ndarray  # ids, the last tenth


def get_data(path: str | None, block_size: int, screen: Screen) -> Data:
    """The text to learn from, in the file at `path`, or tiny-Shakespeare."""
    text, path = read_text(path, screen)
    split = int(0.9 * len(text))
    if len(text) - split <= block_size:
        raise Stop(f"a text of {len(text)} characters is too short: "
                   f"a tenth must exceed the context, {block_size}")
    tokenizer = nanoad.CharTokenizer(text)
    ids = tokenizer.encode(text)
    return Data(text, path, tokenizer, ids[:split], ids[split:])


def read_text(path: str | None, screen: Screen) -> tuple[str, str | None]:
    """The text, and where it was found."""
    screen.live("reading the text ...")
    if path:
        try:
            return Path(path).read_text("utf-8"), os.path.abspath(path)
        except (OSError, ValueError) as error:
            raise Stop(f"cannot read {path} as UTF-8 text: {error}")
    try:
        return nanoad.load_tinyshakespeare(), None
    except OSError:
        screen.show("tiny-Shakespeare is neither here nor to be had from the network, so this "
                    "learns to write nanoad.py; data/README.md says how to get the real text.")
        return Path(nanoad.__file__).read_text("utf-8"), nanoad.__file__


def draw_batch(ids: np.ndarray, block_size: int, batch_size: int,
               seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pieces from anywhere (B, T), and for each character in them the one that follows."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(ids) - block_size, batch_size)  # (B,)
    windows = starts[:, None] + np.arange(block_size)  # (B, T)
    return ids[windows], ids[windows + 1]


# ## The network


def build_model(settings: dict, vocab_size: int) -> nanoad.Module:
    """A network that turns ids (B, T) into logits (B, T, V) of what follows each."""
    return nanoad.GPT(
        vocab_size, settings["embed_dim"], settings["num_heads"], settings["num_layers"],
        settings["block_size"], dropout=settings["dropout"])


def build_optimizer(
        model: nanoad.Module, settings: dict) -> tuple[nanoad.Optimizer, nanoad.CosineWarmupLR]:
    """How the network learns, and the schedule of its learning rate."""
    steps, lr = settings["steps"], settings["lr"]
    optimizer = nanoad.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.1)
    warmup = min(100, steps // 10)
    schedule = nanoad.CosineWarmupLR(optimizer, warmup, steps, min_lr=lr / 100)
    return optimizer, schedule


def mean_loss(model: nanoad.Module, x: np.ndarray, y: np.ndarray) -> nanoad.Tensor:
    """How surprised the network is by what follows, in nats per character."""
    logits = model(x)  # (B, T, V)
    return nanoad.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


# ## Training


def train_step(training: Training, parallel: nanoad.DataParallel,
               x: np.ndarray, y: np.ndarray, stream: tuple[int, ...]) -> None:
    """Move the weights a little, so that the batch surprises the network less."""
    loss = parallel(x, y, stream=stream)  # leaves the gradients in each .grad
    norm = nanoad.clip_grad_norm(training.optimizer.params, 1.0)
    training.check(loss=loss, norm_of_gradient=norm)
    training.optimizer.step()
    training.schedule.step()
    training.losses.append(loss)


def evaluate(model: nanoad.Module, parallel: nanoad.DataParallel, ids: np.ndarray,
             block_size: int, screen: Screen) -> float:
    """The mean loss over *all* of ids, in consecutive windows: so runs can be compared."""
    count = (len(ids) - 1) // block_size
    x = ids[:count * block_size].reshape(count, block_size)
    y = ids[1:count * block_size + 1].reshape(count, block_size)
    at_once = parallel.processes * max(1, 4096 // block_size)  # few enough for the cache
    total = 0.0
    model.eval()
    for i in range(0, count, at_once):
        total += sum(parallel.evaluate(x[i:i + at_once], y[i:i + at_once]))
        screen.live(f"evaluating: {min(1, (i + at_once) / count):.0%}")
    model.train()
    return total / count


def is_evaluated(step: int, steps: int) -> bool:
    """Whether a run of so many steps is evaluated after this one, as after the last."""
    return step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps


def train(run: Run, training: Training, data: Data, screen: Screen) -> None:
    """Take the steps that are left, look at the network now and then, and save it."""
    settings, model = run.settings, training.model
    seed, steps = settings["seed"], settings["steps"]
    batch_size, T = settings["batch_size"], settings["block_size"]

    def batch_loss(x, y):
        return mean_loss(model, x, y)

    def sum_of_losses(x, y):
        return mean_loss(model, x, y).item() * len(x)

    parallel = nanoad.DataParallel(
        model, batch_loss, evaluate=sum_of_losses, processes=settings["processes"])
    progress = Progress(screen, training.step, steps, batch_size * T, "tokens")
    with parallel, Interrupt() as interrupt:
        for step in range(training.step + 1, steps + 1):
            x, y = draw_batch(data.training, T, batch_size, seed=(seed, BATCHES, step))
            train_step(training, parallel, x, y, stream=(seed, DROPOUT, step - 1))
            recent = np.mean(training.losses[-50:]).item()  # one is noisy
            progress.show(step, f"step {step}/{steps}  loss {recent:.3f}")

            if is_evaluated(step, steps):
                loss = evaluate(model, parallel, data.validation, T, screen)
                training.history.append((step, recent, loss))
                run.save(training)
                screen.show(f"step {step}  training loss {recent:.3f}  "
                            f"validation loss {loss:.3f}")
                nanoad.manual_seed((seed, SAMPLES, step))
                show_sample(model, data.tokenizer, screen)
            if interrupt:
                run.save(training)
                raise Stop(f"interrupted; step {step} is saved: "
                           f"go on by --resume {run.folder}", code=130)


# ## Writing


def write(model: nanoad.Module, tokenizer: nanoad.CharTokenizer, prompt: str, length: int,
          temperature: float, top_k: int | None) -> Iterator[str]:
    """Yield the prompt and then, one by one, the characters that the network adds.

    After `length` of them it goes on to the end of the line. Where lines are long, a word's
    end is enough, and where words are long too, 200 more are enough.
    """
    tokens = stream(model, tokenizer.encode(prompt), length + 200, temperature, top_k)
    yield prompt
    for count, token in enumerate(tokens, start=1):
        char = tokenizer.decode([token])
        is_end = char == "\n" or (char.isspace() and count > length + 100)
        if is_end and count > length:
            return
        yield char


def stream(model: nanoad.Module, ids: np.ndarray, count: int, temperature: float,
           top_k: int | None) -> Iterator[int]:
    """Yield `count` ids that the network writes after `ids`, as soon as each is there."""
    for token in model.stream(ids[None], count, temperature, top_k):
        yield np.asarray(token).item()


def show_sample(model: nanoad.Module, tokenizer: nanoad.CharTokenizer,
                screen: Screen) -> None:
    """Show two lines that the network writes now."""
    prompt = "\n" if "\n" in tokenizer.chars else tokenizer.chars[0]
    ids = model.generate(tokenizer.encode(prompt)[None], SAMPLE_LENGTH, TEMPERATURE)[0]
    lines = [line for line in tokenizer.decode(ids).splitlines() if line.strip()]
    for line in lines[:2]:
        screen.show("  | " + line[:screen.columns - 5])


def write_ending(run: Run, training: Training, data: Data, options: argparse.Namespace,
                 screen: Screen) -> None:
    """Show the losses, what the network writes, and what one can do next."""
    screen.show(plot_losses(training, screen))
    screen.rule()
    line, line_end, _ = data.text[:40].partition("\n")
    nanoad.manual_seed((run.settings["seed"], ENDING))
    for piece in write(training.model, data.tokenizer, line + line_end, *style(options)):
        screen.write(piece)
    screen.write("\n")
    screen.rule()

    prompt = "ROMEO:" if set("ROMEO:") <= set(data.tokenizer.chars) else line or line_end
    folder = shlex.quote(str(run.folder))
    more = 2 * run.settings["steps"]
    screen.show(f"The network is in {run.folder}. Let it write, or let it learn on:")
    screen.show(f"  python {PROGRAM} --out {folder} --sample {shlex.quote(prompt)}")
    screen.show(f"  python {PROGRAM} --resume {folder} --steps {more}")


def plot_losses(training: Training, screen: Screen) -> str:
    """The training loss of every step, and the validation loss of every evaluation."""
    steps = np.arange(1, len(training.losses) + 1)
    evaluated = [step for step, _, _ in training.history]
    validation = [loss for _, _, loss in training.history]
    width = min(72, screen.columns)
    return nanoad.plot(
        {"training": (steps, training.losses), "validation": (evaluated, validation)},
        title="loss (nats per character)", xlabel="step", width=width)


def style(options: argparse.Namespace) -> tuple[int, float, int | None]:
    """How long and how boldly to write."""
    length = options.length or LENGTH
    temperature = options.temperature or TEMPERATURE
    return length, temperature, options.top_k


# ## From the command line


def main(arguments: list[str] | None = None) -> None:
    """Train a network, or with --sample let one write."""
    options = read_options(arguments)
    with np.errstate(all="ignore"):  # we look for inf and nan ourselves
        if options.sample is None:
            learn(options)
        else:
            sample(options)


def learn(options: argparse.Namespace) -> None:
    """Train a network, and let it write."""
    screen = Screen(PROGRAM, goes_on=True)
    with Run(options, **ABOUT) as run:
        open_run(run, options)
        settings = run.settings
        path = options.text or settings.get("text")
        data = get_data(path, settings["block_size"], screen)
        settings["text"] = data.path
        run.check_data(data.text.encode(), data.path or "tiny-Shakespeare",
                       advice="; say by --text where that is")

        nanoad.manual_seed((settings["seed"], WEIGHTS))
        model = build_model(settings, data.tokenizer.vocab_size)
        optimizer, schedule = build_optimizer(model, settings)
        training = Training(model, optimizer, schedule, chars=data.tokenizer.chars)
        run.restore(training, screen)
        run.save(training)  # before the work: so we notice now if it cannot be written
        screen.show(
            f"{settings['size']}: {training.size:,} parameters, "
            f"{len(data.text):,} characters, {count_processes(settings['processes'])}, "
            f"step {training.step} of {settings['steps']}, into {run.folder}")
        train(run, training, data, screen)
        write_ending(run, training, data, options, screen)


def sample(options: argparse.Namespace) -> None:
    """Let a trained network write: another seed, another story."""
    screen = Screen(PROGRAM, goes_on=False)
    run = Run(options, **ABOUT)
    run.load(lock=False)
    run.require("size")
    with run.understanding():
        tokenizer = nanoad.CharTokenizer(run.state["chars"])
        model = build_model(run.settings, tokenizer.vocab_size)
        model.load_state_dict(run.state["model"])
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    nanoad.manual_seed(seed)
    try:
        for piece in write(model, tokenizer, options.sample, *style(options)):
            screen.write(piece)
    except ValueError as error:  # the tokenizer's: a character that it does not know
        raise Stop(str(error))
    screen.write("\n")
    if options.seed is None:
        print(f"(--seed {seed} writes the same again)", file=sys.stderr)


def open_run(run: Run, options: argparse.Namespace) -> None:
    """Begin a run with the settings asked for, or go on with an old one by its own."""
    if options.resume is not None:
        run.load()
        run.require("size", "seed", "processes")
        run.lengthen("steps", options.steps)
        return

    size = options.size or "small"
    settings = {**SIZES[size], "size": size, "seed": options.seed or 0, "text": None}
    settings["steps"] = options.steps or settings["steps"]
    most = min(PROCESSES, settings["batch_size"])
    settings["processes"] = choose_processes(options, most, settings["batch_size"], "texts")
    run.begin(settings)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """What is asked for; Stop if it makes no sense.

    What the command line leaves open is None, so that a run to be resumed can tell.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, help="of the network and its training (default: small)")
    add("--steps", type=int, metavar="N",
        help="training steps (default: by size); with --resume, more than the run has")
    parser.add_run_options(kind="SIZE")
    add("--text", metavar="FILE",
        help="UTF-8 text to learn from (default: tiny-Shakespeare)")
    add("--sample", metavar="PROMPT",
        help="only write what follows it, by --out or the latest run")
    add("--temperature", type=float, metavar="X",
        help=f"of what it writes: low is careful, high is bold (default: {TEMPERATURE})")
    add("--top-k", type=int, metavar="N",
        help="let it write only the N likeliest characters")
    add("--length", type=int, metavar="N",
        help=f"characters to write, and on to the end of the line (default: {LENGTH})")
    options = parser.parse_args(arguments)

    check_least(
        options, steps=1, seed=0, processes=1, temperature=1e-9, top_k=1, length=1)
    if options.sample is not None:
        if not options.sample:
            raise Stop("--sample needs a character or more to go on from")
        for name in ("resume", "text", "steps", "processes"):
            if getattr(options, name) is not None:
                raise Stop("--sample only writes (by --out FOLDER, or the latest run): "
                           f"drop --{name}")
    return options


# ## A run
#
# What has to be right around any training, whatever is trained: two runs never share a
# folder; a process may be killed at any moment, and its run be resumed to the same numbers,
# bit for bit; and whatever goes wrong is told in one line.

def count_cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


PROCESSES = min(count_cores(), 8)  # that share a batch; more were never tried


def choose_processes(options: argparse.Namespace, most: int, batch_size: int, what: str) -> int:
    """How many share a batch: what is asked for, or else `most`; Stop if some had nothing."""
    processes = options.processes or most
    if processes > batch_size:
        raise Stop(f"--processes {processes}: there are only {batch_size} {what} in a batch to share")
    return processes


def count_processes(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"


class Stop(Exception):
    """Ends the program, with one line on stderr.

    Code 2: nothing was begun. 1: something went wrong later. 130: it was Ctrl-C.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever was in it
        self.code = code


class Diverged(Exception):
    """Numbers of the training became infinite, or are none."""


# ### What it is, and where it lies


class Training:
    """What training changes: all that a checkpoint has to bring back."""

    def __init__(self, model: nanoad.Module, optimizer: nanoad.Optimizer,
                 schedule: nanoad.CosineWarmupLR, **constants: Any) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.losses: list[float] = []  # of every step
        self.history: list[tuple] = []  # a row of metrics.csv for every evaluation
        self.constants = constants  # what else the checkpoint is to hold

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.schedule.steps

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(p.size for p in self.model.parameters())

    def check(self, **numbers: float) -> None:
        """Before a step: are these numbers finite? Diverged, if not."""
        if not all(map(math.isfinite, numbers.values())):
            listed = ", ".join(f"{name} is {number}" for name, number in numbers.items())
            raise Diverged(f"step {self.step + 1}: {listed}")

    def state_dict(self) -> dict[str, Any]:
        """All of it; Diverged, if a weight or the last evaluation is not finite."""
        weights = self.model.state_dict()
        last_row = self.history[-1] if self.history else ()
        numbers = [*weights.values(), last_row]
        if not all(np.isfinite(some).all() for some in numbers):
            raise Diverged(f"step {self.step} made numbers infinite")
        return {
            "step": self.step,
            "losses": np.array(self.losses),
            "history": self.history,
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            **self.constants,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.losses = np.asarray(state["losses"]).tolist() if "losses" in state else []
        self.history = list(state["history"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])  # sets the learning rate


class Run:
    """A folder that one process at a time writes to, and the settings of the run in it.

    The folder gets `checkpoint.npz`, which is replaced at one stroke, so that the process
    may be killed at any moment; and `metrics.csv`, a line for every evaluation.

        with Run(options, ...) as run:
            run.begin(settings)  # or run.load()
            run.save(training)
    """

    def __init__(self, options: argparse.Namespace, *, program: str, kind: str,
                 kinds: dict[str, dict], metrics: tuple[str, ...]) -> None:
        self.options = options
        self.program = program  # no other program goes on with its checkpoints
        self.kind = kind  # the name of the setting that its folder is named after
        self.kinds = kinds  # for each value of that one, the other settings
        self.metrics = metrics  # the columns of metrics.csv
        self.settings: dict[str, Any] = {}
        self.state: dict[str, Any] | None = None  # what the checkpoint held
        self.folder: Path | None = None  # None: the first save makes one
        self.lock: int | None = None  # while it is open, the folder is ours
        self.has_saved = False
        self.lengthened = ""  # what there is more of than before

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Leave the folder to others, and say where the checkpoint is if it is needed now."""
        self.release()
        if isinstance(error, KeyboardInterrupt) and self.has_saved:
            raise Stop(f"interrupted; go on by --resume {self.folder}", code=130)
        is_worker_lost = str(error).startswith("DataParallel: worker process")
        if isinstance(error, Diverged) or is_worker_lost:
            raise Stop(f"{error}; the last good checkpoint is in {self.folder}", code=1)

    # A new run

    def begin(self, settings: dict[str, Any]) -> None:
        """Have one in the folder that --out names, or in a new one; write nothing yet."""
        self.settings = settings
        if self.options.out:
            self.folder = folder_of(self.options.out)
            self.refuse_to_overwrite()

    def refuse_to_overwrite(self) -> None:
        """Stop if there is a run in the folder."""
        with self.writing():
            is_there = (self.folder / "checkpoint.npz").exists()
        if is_there:
            raise Stop(f"{self.folder} has a run: go on with it by "
                       f"--resume {self.folder}, or name another --out")

    def take_folder(self) -> None:
        """Make the folder of a new run, and keep other processes out of it."""
        with self.writing():
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self.folder = Path("runs")  # if this fails, it is named
                self.folder = new_folder(self.settings[self.kind])
            self.keep_others_out()
        self.refuse_to_overwrite()  # somebody else's that ended meanwhile

    def keep_others_out(self) -> None:
        """Lock the folder. The lock goes when this process does, however it ends.

        Without locks (on Windows, and some network drives) it is up to the user.
        """
        if fcntl is None:
            return
        self.lock = os.open(self.folder, os.O_RDONLY)
        os.register_at_fork(after_in_child=self.release)  # a worker may outlive us
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"another process is at work in {self.folder}")
        except OSError:
            pass

    def release(self) -> None:
        """Let other processes have the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    # An old run

    def load(self, lock: bool = True) -> None:
        """Read the run that --resume or --out names, or the latest one.

        With `lock`, keep others out of its folder before. Stop, if there is no run, or not
        one that this program can go on with.
        """
        self.folder = self.find()
        try:
            if lock:
                self.keep_others_out()
            self.state = nanoad.load(self.folder / "checkpoint.npz")
        except OSError as error:
            raise Stop(f"no checkpoint to go on from in {self.folder}: {error.strerror}; "
                       + self.advice())
        except ValueError as error:
            raise Stop(f"no checkpoint to go on from in {self.folder}: {error}")
        is_state = isinstance(self.state, dict)
        if not is_state or self.state.get("written_by") != self.program:
            raise Stop(f"the checkpoint in {self.folder} was written by another program")

        with self.understanding():
            settings = dict(self.state["settings"])
            if "threads" in settings:  # which processes took the place of
                settings["processes"] = settings.pop("threads")
            missing = {self.kind, "seed", "processes"} - settings.keys()
            if missing:
                raise KeyError(*missing)
            self.settings = {**self.kinds[settings[self.kind]], **settings}

    def find(self) -> Path:
        """The folder of the run that is meant."""
        name = self.options.resume or self.options.out
        if name:
            return folder_of(name)
        kind = getattr(self.options, self.kind)
        files = []
        for kind_of_run in [kind] if kind else self.kinds:
            files += Path("runs").glob(f"{kind_of_run}*/checkpoint.npz")
        if not files:
            raise Stop(f"no checkpoint to go on from in runs/{kind or ''}: " + self.advice())
        return max(files, key=os.path.getmtime).parent

    def advice(self) -> str:
        """What to do where there is no run."""
        command = f"python {self.program}"
        kind = getattr(self.options, self.kind)
        if kind:
            command += f" --{self.kind} {kind}"
        name = self.options.resume or self.options.out
        if name:
            command += f" --out {shlex.quote(name)}"
        return f"train a network first, by `{command}`"

    @contextlib.contextmanager
    def understanding(self) -> Iterator[None]:
        """Stop where an intact checkpoint does not have what it should."""
        try:
            yield
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise Stop(f"the checkpoint in {self.folder} is whole, but not one of this "
                       f"version: {type(error).__name__}: {error}")

    def require(self, *names: str) -> None:
        """Stop if an option asks for another setting than the run has."""
        for name in names:
            asked = getattr(self.options, name)
            if asked not in (None, self.settings[name]):
                raise Stop(f"--{name.replace('_', '-')} {asked}: "
                           f"the run in {self.folder} has {self.settings[name]}")

    def lengthen(self, name: str, total: int | None) -> None:
        """Let the run have more steps, or epochs, than it was begun with."""
        before = self.settings[name]
        if total is None or total == before:
            return
        if total < before:
            raise Stop(f"--{name} {total}: the run in {self.folder} has {before}; "
                       "it can be made longer, not shorter")
        self.settings[name] = total
        self.lengthened = f"{before} {name} become {total}"

    def check_data(self, content: Any, name: str, advice: str = "") -> None:
        """Stop if the data, an array or bytes, are not those that the run began with."""
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.settings.setdefault("sha256", digest):
            raise Stop(f"{name} is not, or no longer, what the run in {self.folder} "
                       f"learns from{advice}")

    def restore(self, training: Training, screen: Screen) -> None:
        """Bring back what the checkpoint held, if there is one."""
        if self.state is None:
            return
        with self.understanding():
            before = self.state["optimizer"]["lr"]
            training.load_state_dict(self.state)
        if self.lengthened:
            now, schedule = training.optimizer.lr, training.schedule
            last = schedule.rate(schedule.total_steps)
            screen.show(f"{self.lengthened}: the learning rate goes from {before:.2g} to "
                        f"{now:.2g}, where a run of that length has it here, "
                        f"and down to {last:.2g} in the end")

    # Saving

    def save(self, training: Training) -> None:
        """Replace the checkpoint and metrics.csv; of a new run, take the folder first."""
        state = training.state_dict()
        if self.state is None and not self.has_saved:
            self.take_folder()
        with self.writing():
            nanoad.save(self.folder / "checkpoint.npz",
                        {"written_by": self.program, "settings": self.settings, **state})
            rows = [self.metrics, *training.history]
            table = "".join(",".join(map(str, row)) + "\n" for row in rows)
            (self.folder / "metrics.csv").write_text(table)
        self.has_saved = True

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Stop where the folder cannot be written to."""
        try:
            yield
        except OSError as error:
            raise Stop(f"cannot write to {self.folder}: {error.strerror}",
                       code=1 if self.has_saved else 2)


def folder_of(path: str) -> Path:
    """The folder of a run that was named by its folder or by its checkpoint."""
    return Path(path).parent if Path(path).name == "checkpoint.npz" else Path(path)


def new_folder(name: str) -> Path:
    """Make runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that was not there.

    Of two processes that try at the same moment, only one makes it, and the other goes on
    to the next number.
    """
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


# ### Its screen


class Screen:
    """Where lines go: to a terminal, where a live one is replaced by the next, or elsewhere.

    If that is a pipe that is closed, or a disk that is full, the program ends, unless it
    `goes_on` without a word.
    """

    def __init__(self, program: str, goes_on: bool) -> None:
        self.program, self.goes_on = program, goes_on
        self.is_terminal = sys.stdout.isatty()
        with contextlib.suppress(AttributeError):  # not all characters are in all encodings
            sys.stdout.reconfigure(errors="replace")

    @property
    def columns(self) -> int:
        """How wide it is now."""
        return shutil.get_terminal_size().columns

    def show(self, text: str) -> None:
        """Print a line."""
        self.write(f"\r\033[K{text}\n" if self.is_terminal else f"{text}\n")

    def live(self, text: str) -> None:
        """Print a line that the next one takes the place of. Only terminals show it."""
        if self.is_terminal:
            fitting = text[:self.columns - 1]  # what wraps could not be taken back
            self.write(f"\r\033[K{fitting}")

    def rule(self) -> None:
        """Draw a line."""
        self.show("-" * min(72, self.columns))

    def write(self, text: str) -> None:
        """Print a piece of a line."""
        try:
            print(text, end="", flush=True)
        except OSError as error:
            drop_output()
            if not self.goes_on:
                raise Stop(f"cannot print: {error.strerror}", code=1)
            print(f"{self.program}: cannot print any more ({error.strerror}); "
                  "the work goes on", file=sys.stderr)


def drop_output() -> None:
    """Let all vanish that is printed from now on, or was printed and not yet written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class Progress:
    """Says now and then how far it is, how fast it goes, and how long it will take."""

    def __init__(self, screen: Screen, step: int, steps: int, items: int, unit: str) -> None:
        """Of `steps`, `step` are taken; each is through so many items, such as tokens."""
        self.screen = screen
        self.first, self.steps = step, steps
        self.items, self.unit = items, unit
        self.begun = time.monotonic()
        self.shown = -math.inf

    def show(self, step: int, text: str) -> None:
        """Ten times a second on a terminal, and else every ten seconds."""
        now = time.monotonic()
        if now - self.shown < (0.1 if self.screen.is_terminal else 10):
            return
        self.shown = now
        speed = (step - self.first) / (now - self.begun)  # in steps per second
        left = int((self.steps - step) / speed)
        line = (f"{text}  {speed * self.items:,.0f} {self.unit}/s  "
                f"{left // 60}:{left % 60:02} left")
        if self.screen.is_terminal:
            self.screen.live(line)
        else:
            self.screen.show(line)


# ### Its command line, and its end


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, with the options of every training."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        raise Stop(message)

    def add_run_options(self, kind: str) -> None:
        """Add --seed, --processes, --out, --resume; folders are named by `kind` of run."""
        add = self.add_argument
        add("--seed", type=int, metavar="N", help="for another run (default: 0)")
        add("--processes", "--threads", type=int, metavar="N",
            help=f"that share each batch (default here: {PROCESSES})")
        add("--out", metavar="FOLDER",
            help=f"of the run (default: runs/{kind}, or a new runs/{kind}-2, ...)")
        add("--resume", nargs="?", const="", metavar="FOLDER",
            help="continue the run in FOLDER (default: --out, or the latest in runs/)")


def check_least(options: argparse.Namespace, **least: float) -> None:
    """Stop if an option is less than it may be, or no finite number, or two contradict."""
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and not minimum <= value < math.inf:
            option = name.replace("_", "-")
            raise Stop(f"--{option} must be at least {minimum}, not {value}")
    if options.resume and options.out:
        raise Stop("--resume FOLDER writes to that folder: drop --out")


class Interrupt:
    """Ctrl-C as a question: `with Interrupt() as interrupt: ... if interrupt: save, stop`.

    A second one ends the process at once, which does no harm.
    """

    def __enter__(self) -> "Interrupt":
        self.is_asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)

    def ask(self, *_: Any) -> None:
        self.is_asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.is_asked


def run_program(main: Callable[[], None], name: str) -> int:
    """Call main; returns the exit code, and says in one line why it is not 0."""
    with standard_streams():
        try:
            main()
            return 0
        except Stop as stop:
            message, code = str(stop), stop.code
        except KeyboardInterrupt:
            message, code = "interrupted", 130
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)  # wipes a live line
        print(f"{name}: {message}", file=sys.stderr)
        return code


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Have all three of them, also where somebody closed one, say by `>&-`."""
    with contextlib.ExitStack() as opened:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, opened.enter_context(open(os.devnull, mode)))
        yield


if __name__ == "__main__":
    sys.exit(run_program(main, PROGRAM))
