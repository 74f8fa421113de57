"""`train_rl.py ARGUMENTS`, killed: killed.py SIGNAL PHASE COUNT SHARE LOG ARGUMENTS...

The signal comes in the COUNT-th pass (from 2 on) through PHASE, a function of train_rl.py, after SHARE of the seconds that
the pass before it took; 0 is just before it. What was running at that instant is written to LOG."""

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rl as rl

PHASES = ("rollout", "update", "follow_gradient", "save_checkpoint")
number, phase, count, share, log = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5])
running, passes, seconds = "between the phases", 0, 0.0


def die() -> None:
    log.write_text(running)
    os.kill(os.getpid(), number)


def watched(name):
    original = getattr(rl, name)

    def call(*args, **kwargs):
        global running, passes, seconds
        running, started = name, time.perf_counter()
        if name == phase:
            passes += 1
            if passes == count and share == 0:
                die()
            elif passes == count:
                threading.Timer(share * seconds, die).start()
        result = original(*args, **kwargs)
        if name == phase:
            seconds = time.perf_counter() - started
        running = "between the phases"
        return result

    return call


for name in PHASES:
    setattr(rl, name, watched(name))
sys.argv = ["train_rl.py", *sys.argv[6:]]
rl.run_cli(rl.app)
