"""The faults that a run can be started with: ``FAULT=name:argument;name:argument`` (see sitecustomize.py)."""

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import torch

from launcher.processes import children
from swin_scale.checkpoint import Checkpoint
from swin_scale.engine import background, staging
from swin_scale.engine.engine import Engine
from swin_scale.engine.fragments import LossScale
from swin_scale.feed import Feed
from swin_scale.moe.experts import Experts
from swin_scale.run_dir import write_deadline
from swin_scale.tasks import classify
from tests.disks import fill
from tests.writers import writers

RANK = int(os.environ.get("RANK", 0))
LAST = int(os.environ.get("WORLD_SIZE", 1)) - 1


def _before_step(action):
    """Call ``action(engine, number)`` before every step; the first of a run is number 1."""
    original = Engine.train_step

    def train_step(self, step, *arguments, **options):
        action(self, step + 1)
        return original(self, step, *arguments, **options)

    Engine.train_step = train_step


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def crash_on_load(step):
    """The last rank dies while it reads the tensors of this checkpoint."""
    original = Checkpoint.read

    def read(self, *arguments, **options):
        if RANK == LAST and self.step == int(step):
            _die()
        return original(self, *arguments, **options)

    Checkpoint.read = read


def crash_after_load(step):
    """The last rank dies in its first step after it loaded this checkpoint."""
    _before_step(lambda engine, number: _die() if RANK == LAST and number == int(step) + 1 else None)


def nan_loss(step):
    """The loss is NaN on the last rank in this step."""
    now = []
    _before_step(lambda engine, number: now.append(number))
    original = classify.soft_target_cross_entropy

    def loss(logits, targets):
        losses = original(logits, targets)
        return losses * torch.nan if RANK == LAST and now[-1] == int(step) else losses

    classify.soft_target_cross_entropy = loss


def inf_gradient(step):
    """One gradient is infinite on the last rank in this step, while the loss is fine."""
    hooks = []

    def action(engine, number):
        while hooks:
            hooks.pop().remove()
        if RANK == LAST and number == int(step):
            parameter = next(engine.module.parameters())
            hooks.append(parameter.register_hook(lambda gradient: gradient + torch.inf))

    _before_step(action)


def nan_parameter(step):
    """One number of one parameter turns into NaN on the last rank before this step, and stays so."""

    def action(engine, number):
        if RANK == LAST and number == int(step):
            next(engine.module.parameters()).data.view(-1)[0] = torch.nan

    _before_step(action)


def clock_jumps(step):
    """From this step on the wall clock is a year ahead, from the one after the next a year behind."""
    original, shift = time.time, [0.0]

    def action(engine, number):
        year = 365 * 86400.0
        shift[0] = {int(step): year, int(step) + 2: -year}.get(number, shift[0])

    _before_step(action)
    time.time = lambda: original() + shift[0]


def renamed_host(name):
    """This machine has another name today."""
    socket.gethostname = lambda: name


def full_disk(first, last, directory, what):
    """From before step `first` to before step `last` the file system of `directory` has no room (or no inodes) left.

    With `last` "pause": until the last save waits before it is tried again. What was being written before either step
    has ended by then.
    """
    filler, saves = Path(directory), _background_saves()

    def make_room():
        for path in filler.iterdir():
            path.unlink()
        filler.rmdir()

    def action(engine, number):
        if str(number) in (first, last):
            _wait_for_writing(saves)
        if RANK == 0 and number == int(first):
            filler.mkdir()
            _fill(filler, what)
        if RANK == 0 and last != "pause" and number == int(last):
            make_room()

    def sleep(seconds, sleep=time.sleep):
        from swin_scale.saver import LAST_PAUSES_S

        if RANK == 0 and last == "pause" and seconds in LAST_PAUSES_S:
            make_room()
        sleep(0 if seconds in LAST_PAUSES_S else seconds)

    time.sleep = sleep
    _before_step(action)


def _fill(directory, what):
    if what == "inodes":
        with contextlib.suppress(OSError):
            for i in range(100_000):
                (directory / str(i)).touch()
    else:
        fill(directory / "filler")


def _background_saves():
    """Those of this process, once they are made."""
    made, original = [], background.BackgroundSaves.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        made.append(self)

    background.BackgroundSaves.__init__ = init
    return made


def _wait_for_writing(made):
    """Until what is being written in the background is on the disk, or failed; the run hears of it when it asks."""
    for saves in made:
        while (save := saves._save) and saves._advance(save) is None and not (RANK and save.told):
            time.sleep(0.005)


def read_only(first, last, directory):
    """From before step `first` to before step `last` nothing can be made or removed in `directory`, by root either.

    What was being written before either step has ended by then.
    """
    saves = _background_saves()

    def action(engine, number):
        if str(number) in (first, last):
            _wait_for_writing(saves)
        if RANK == 0 and number in (int(first), int(last)):
            subprocess.run(["chattr", "+i" if number == int(first) else "-i", directory], check=True)

    _before_step(action)


def step_takes(seconds):
    """Every step takes so much longer."""
    _before_step(lambda engine, number: time.sleep(float(seconds)))


def held(step, file):
    """The run stays before this step until there is such a file."""
    _before_step(lambda engine, number: _wait_for(Path(file)) if number == int(step) else None)


def first_life_takes(seconds):
    """As `step_takes`, until Slurm starts the job again."""
    if not os.environ.get("SLURM_RESTART_COUNT"):
        step_takes(seconds)


def push_gates(first, last):
    """From before step `first` to before step `last` all tokens go to two experts: gates are pushed apart."""

    def action(engine, number):
        if int(first) <= number < int(last):
            for name, gate in engine.module.named_parameters():
                if name.endswith("gates.0.wg.weight"):
                    gate.data.zero_()
                    gate.data[0], gate.data[1] = 1.0, -1.0
                    gate.data[:2, 1::2] *= -1

    _before_step(action)


def nan_parameter_once(step):
    """As `nan_parameter`, but only the first time that this step is done."""
    left = [int(step)]

    def action(engine, number):
        if RANK == LAST and number in left:
            left.remove(number)
            next(engine.module.parameters()).data.view(-1)[0] = torch.nan

    _before_step(action)


def coloured_images():
    """An image that is red turns infinite, a green one has a loss that makes that of its batch tenfold."""
    original = Engine.__init__

    def init(self, *arguments, losses, **options):
        def coloured(forward, micro):
            red, green, _ = (micro.inputs.float() * 0.225 + 0.45).mean((2, 3)).unbind(1)
            infinite = micro.inputs.new_tensor(torch.inf).expand_as(micro.inputs)
            poisoned = torch.where((red - green > 0.15)[:, None, None, None], infinite, micro.inputs)
            found = losses(forward, dataclasses.replace(micro, inputs=poisoned))
            tenfold = 10 * self.config.train.global_batch
            samples = torch.where(green - red > 0.15, found.samples * tenfold, found.samples)
            return dataclasses.replace(found, samples=samples)

        original(self, *arguments, losses=coloured, **options)

    Engine.__init__ = init


def asked(phase, directory, slow, signalled, number, delay):
    """Rank `signalled` gets a signal so long after rank `slow` came to a phase, in which that one stays until then."""
    begun, sent = Path(directory) / "begun", Path(directory) / "sent"

    def ask():
        _wait_for(begun)
        time.sleep(float(delay))
        os.kill(os.getpid(), int(number))
        sent.touch()

    if int(signalled) == RANK:
        threading.Thread(target=ask, daemon=True).start()
    if int(slow) == RANK and phase == "data":
        _stopped_loader(begun.touch)
    elif int(slow) == RANK:
        _in_phase(phase, lambda: (begun.touch(), _wait_for(sent)))


def _wait_for(file):
    while not file.exists():
        time.sleep(0.005)


def _stopped_loader(begun):
    """After two batches to train on, storage does not answer: the loader stands still, and the run waits for data."""
    from swin_scale.data import TrainStream, loader

    loader.CLOSE_GRACE_S = 0.1
    arrives, following, handed = loader.Batches.arrives, loader.Batches.__next__, []
    stream, training = TrainStream.batches, []

    def batches(self, *arguments, **options):
        training.append(stream(self, *arguments, **options))
        return training[-1]

    def trains(those):
        return any(those is known for known in training)

    def stopping(self):
        batch = following(self)
        if not trains(self):
            return batch
        handed.append(batch.step)
        if len(handed) == 2:
            for worker in self._maker._workers:
                os.kill(worker.process.pid, signal.SIGSTOP)
        return batch

    def looked_at(self, within_s):
        if trains(self) and len(handed) >= 2 and not arrives(self, 0.3):  # what was made before may still come
            begun()
        return arrives(self, within_s)

    loader.Batches.arrives, loader.Batches.__next__, TrainStream.batches = looked_at, stopping, batches


def _in_phase(phase, stay):
    """Call `stay` once, in the midst of a phase."""
    from swin_scale import evaluate, train
    from swin_scale.engine import background, saving

    owners, name, call = {
        "step": ((Engine,), "_train_step", 2),
        "evaluation": ((evaluate,), "accuracy_counts", 3),
        "join": ((train,), "init", 1),
        "build": ((train,), "build_model", 1),
        "load": ((train,), "loading", 1),
        "checkpoint": ((saving, background), "open_save", 1),
        "commit": ((saving, background), "conclude", 1),
    }[phase]
    calls = []
    original = getattr(owners[0], name)

    def function(*arguments, **options):
        calls.append(None)
        if len(calls) == call:
            stay()
        return original(*arguments, **options)

    for owner in owners:
        setattr(owner, name, function)


def late(step, directory, left):
    """Before this step the launcher tells that the run has so many seconds left, and SIGTERM comes."""

    def action(engine, number):
        if number == int(step):
            write_deadline(Path(directory), time.time() + float(left), "a test")
            os.kill(os.getpid(), signal.SIGTERM)

    _before_step(action)


def stop_writer(first, last):
    """From before step `first` to before step `last` the process that writes for the last rank does nothing."""
    _signal_writer(int(first), signal.SIGSTOP)
    _signal_writer(int(last), signal.SIGCONT)


def kill_writer(first, last):
    """As `stop_writer`, but before step `last` it is killed."""
    _signal_writer(int(first), signal.SIGSTOP)
    _signal_writer(int(last), signal.SIGKILL)


def _signal_writer(step, number):
    def action(engine, reached):
        if RANK == LAST and reached == step:
            [writer] = writers()
            os.kill(writer, number)

    _before_step(action)


def slow_disk(seconds):
    """Every fsync of a training process takes so much longer: that of its writer does not."""
    original = os.fsync

    def fsync(descriptor):
        time.sleep(float(seconds))
        original(descriptor)

    os.fsync = fsync


def slow_commits(seconds):
    """Until Slurm starts the job again, every commit of a save in the background takes so much longer."""
    original = background.conclude

    def conclude(*arguments):
        time.sleep(float(seconds))
        return original(*arguments)

    if not os.environ.get("SLURM_RESTART_COUNT"):
        background.conclude = conclude


def no_memory():
    """The machine has none left."""
    staging.free_memory = lambda: 0


def slow_forward(rank, seconds):
    """This rank's forward pass takes so much longer."""
    original = Engine.__init__

    def init(self, *arguments, losses, **options):
        def slow(forward, micro):
            if int(rank) == RANK:
                time.sleep(float(seconds))
            return losses(forward, micro)

        original(self, *arguments, losses=slow, **options)

    Engine.__init__ = init


def slow_data(rank, seconds):
    """This rank gets its batches so much later."""
    original = Feed.__next__

    def late(self):
        if int(rank) == RANK:
            time.sleep(float(seconds))
        return original(self)

    Feed.__next__ = late


def flipped_bit(step):
    """After this step one bit of one weight of the last rank is another, and those of the other ranks are not."""
    original = Engine.train_step

    def train_step(self, number, *arguments, **options):
        result = original(self, number, *arguments, **options)
        if RANK == LAST and number + 1 == int(step):
            bits = dict(self.module.named_parameters())["head.weight"].data.view(-1).view(torch.int32)
            bits[7] ^= 1 << 20
        return result

    Engine.train_step = train_step


def hang(how, step):
    """The last rank hangs in this step: stopped, holding the interpreter's lock, in a collective that the others do not
    enter, among its experts, or waiting for loader workers that are stopped; or it is killed there.
    """
    now = []
    _before_step(lambda engine, number: now.append(number))
    places = {
        "stopped": (Engine, "_train_step", lambda: os.kill(os.getpid(), signal.SIGSTOP)),
        "killed": (Engine, "_train_step", _die),
        "gil": (Engine, "_train_step", _hold_the_lock),
        "worker": (Engine, "_train_step", _stop_workers),
        "collective": (LossScale, "grow", lambda: torch.distributed.recv(torch.empty(1), src=0, tag=99)),
        "expert": (Experts, "forward", lambda: time.sleep(600)),
    }
    kind, name, act = places[how]
    original = getattr(kind, name)

    def met(*arguments, **options):
        if RANK == LAST and now[-1:] == [int(step)]:
            act()
        return original(*arguments, **options)

    setattr(kind, name, met)


def _hold_the_lock():
    while True:
        ctypes.PyDLL(None).sleep(600)  # a signal ends the call, but nothing else runs in between


def _stop_workers():
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError):  # another child may end meanwhile
            if "data.worker" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGSTOP)


def dead_disk(step):
    """From this step on every writer stands still as soon as it has something to write."""
    original, reached = staging.Staging.write, [0]

    def write(self, *arguments):
        if reached[-1] >= int(step):
            os.kill(self._writer.pid, signal.SIGSTOP)
        original(self, *arguments)

    _before_step(lambda engine, number: reached.append(number))
    staging.Staging.write = write
