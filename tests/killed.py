"""`train_rl.py ARGUMENTS`, killed: killed.py SIGNAL PHASE COUNT SHARE LOG ARGUMENTS...

The signal comes in the COUNT-th pass (from 2 on) through PHASE, one of PHASES, after SHARE of the
seconds that the pass before it took; 0 is just before it; a phase as SHARE: when the pass first
comes to that. LOG gets what was running then."""

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rl as rl
from plumbing import checkpoints

PHASES = {"collect": rl, "write_turn": rl, "update": rl, "optimizer_step": rl,
          "save_checkpoint": checkpoints}
number, phase, count, share, log = (kind(text) for kind, text in zip(
    (int, str, int, str, Path), sys.argv[1:6]))
running, passes, seconds = "between the phases", 0, 0.0


def die() -> None:
    log.write_text(running)
    os.kill(os.getpid(), number)


def watched(name, original):
    def call(*args, **kwargs):
        global running, passes, seconds
        before, running, started = running, name, time.perf_counter()
        passes += name == phase
        if name == share and passes == count:
            die()
        elif name == phase and passes == count and share not in PHASES:
            wait = float(share) * seconds
            threading.Timer(wait, die).start() if wait else die()
        result = original(*args, **kwargs)
        if name == phase:
            seconds = time.perf_counter() - started
        running = before
        return result

    return call


for name, module in PHASES.items():
    setattr(module, name, watched(name, getattr(module, name)))
sys.argv = ["train_rl.py", *sys.argv[6:]]
rl.run_cli(rl.app)
