"""The faults that a run can be started with: ``FAULT=name:argument;name:argument`` (see sitecustomize.py)."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import torch

from swin_scale.checkpoint import Checkpoint
from swin_scale.engine import engine
from swin_scale.engine.engine import Engine
from tests.disks import fill

RANK = int(os.environ.get("RANK", 0))
LAST = int(os.environ.get("WORLD_SIZE", 1)) - 1


def _before_step(action):
    """Call ``action(engine, number)`` before every step; the first of a run is number 1."""
    original = Engine.train_step

    def train_step(self, step, *arguments):
        action(self, step + 1)
        return original(self, step, *arguments)

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
    original = engine.soft_target_cross_entropy

    def loss(logits, targets):
        losses = original(logits, targets)
        return losses * torch.nan if RANK == LAST and now[-1] == int(step) else losses

    engine.soft_target_cross_entropy = loss


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
    """From before step `first` to before step `last` the file system of `directory` has no room (or no inodes) left."""

    def action(engine, number):
        filler = Path(directory)
        if RANK == 0 and number == int(first):
            filler.mkdir()
            _fill(filler, what)
        if RANK == 0 and number == int(last):
            for path in filler.iterdir():
                path.unlink()
            filler.rmdir()

    _before_step(action)


def _fill(directory, what):
    if what == "inodes":
        with contextlib.suppress(OSError):
            for i in range(100_000):
                (directory / str(i)).touch()
    else:
        fill(directory / "filler")


def read_only(first, last, directory):
    """From before step `first` to before step `last` nothing can be made or removed in `directory`, by root either."""

    def action(engine, number):
        if RANK == 0 and number in (int(first), int(last)):
            subprocess.run(["chattr", "+i" if number == int(first) else "-i", directory], check=True)

    _before_step(action)


def step_takes(seconds):
    """Every step takes so much longer."""
    _before_step(lambda engine, number: time.sleep(float(seconds)))


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
