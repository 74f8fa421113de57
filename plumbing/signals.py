"""SIGTERM and SIGINT: a run stops at the end of a step, or at once where it can be dropped."""

import shlex
import signal
import sys

from accelerate.utils import gather_object


class Signals:
    """SIGTERM and SIGINT: all ranks drop the same step. A second signal kills the process.

    A signal raises KeyboardInterrupt: at once if allowed, else at the next `allow` or `agree`."""

    def __init__(self):
        self.number, self.allowed = 0, False
        self.before = {number: signal.signal(number, self.arrived)
                       for number in (signal.SIGTERM, signal.SIGINT)}

    def restore(self) -> None:
        """Handle signals as before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def arrived(self, number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
        self.number = number
        self.allow(self.allowed)

    def allow(self, allowed: bool) -> None:
        """Set whether a signal may stop this rank at once; a pending one does so now."""
        self.allowed = allowed
        if allowed and self.number:
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Raise KeyboardInterrupt on all ranks if any got a signal. Later signals are pending."""
        self.allowed = False
        self.number = max(gather_object([self.number]))
        if self.number:
            raise KeyboardInterrupt


def resume_command(processes: int) -> str:
    several = ["accelerate", "launch", "--num_processes", str(processes)]
    arguments = [a for a in sys.argv if a not in ("--overwrite", "--resume")]
    return shlex.join([*(["python"] if processes == 1 else several), *arguments, "--resume"])
