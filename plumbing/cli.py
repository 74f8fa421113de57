"""Commands: running a Typer app, errors of the user in one line, progress, the end of a process."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


console = Console(stderr=True)


def run_cli(cli: typer.Typer) -> None:
    """Run a chapter's commands; expected errors become one line on stderr and exit code 2."""
    try:
        sys.exit(cli(standalone_mode=False) or 0)
    except (UserError, typer.TyperException, OSError) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        console.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        end_rank(2)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)


def progress_bar() -> Progress:
    """The progress bar of everything that lasts; the last column is filled by `info=`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[info]}"), console=console)


def leave(state, code: int = 0) -> None:
    """The last act of a stage: where there are several ranks, all wait for each other and end here."""
    state.wait_for_everyone()
    end_rank(code)


def end_rank(code: int) -> None:
    """End this process if it is one of several ranks, at once: nothing is freed.

    Freed the usual way, a process group waits for gloo's thread, and that thread, still holding a tensor, for Python's lock:
    now and then the process hangs for ever or aborts (https://github.com/pytorch/pytorch/issues/56297)."""
    torch = sys.modules.get("torch")  # not imported here: a command without models starts at once
    if torch and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")]
PromptsFile = Annotated[Path | None, typer.Option("--prompts", help="TOML file that rewords templates of data/prompts.toml.")]
Url = Annotated[str | None, typer.Option(help="http: the retrieval server, such as http://localhost:8000/retrieve.")]
MODEL_OR_SERVER = "a folder, a Hub id, smollm2, or addresses http://host:port/v1 (replicas comma separated)"
TopK = Annotated[int, typer.Option("--top-k", help="Documents a search returns.")]
GeneratorOption = Annotated[Literal["auto", "hf", "vllm"], typer.Option("--generator", help="auto: vllm where it is installed, else hf.")]
