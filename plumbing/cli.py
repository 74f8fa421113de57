"""Commands: Settings classes as command lines, errors of the user in one line, progress, tables, the end of a process."""

import dataclasses
import functools
import inspect
import json
import os
import sys
import tomllib
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(stderr=True)


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a command: a subclass has a field for each, made with `option` or `argument`."""

    def check(self) -> None:
        """Raises UserError for a value out of its bounds. A subclass adds what depends on several options."""
        for field in dataclasses.fields(self):
            check_value("--" + option_name(field), getattr(self, field.name), field.metadata)

    def record(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {name: str(value) if isinstance(value, Path) else value
                for name, value in vars(self).items()}


def option(default: Any = MISSING, help: str = "", *, low: float | None = None,
           above: float | None = None, high: float | None = None,
           choices: Collection[str] | None = None, **more: Any) -> Any:
    """A field of a Settings class. Allowed: low <= value, above < value, value <= high, one of choices.

    more: `name` of the option where it is not the field's; `resumable`, if a resumed run may change
    it; and what typer.Option takes."""
    bounds = {"low": low, "above": above, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=bounds | {"help": help} | more)


def argument(help: str) -> Any:
    """A field of a Settings class that is given by its place on the command line."""
    return dataclasses.field(metadata={"help": help, "positional": True})


def option_name(field: dataclasses.Field) -> str:
    return field.metadata.get("name") or field.name.replace("_", "-")


def check_value(name: str, value: Any, bounds: dict[str, Any]) -> None:
    """Raises UserError if a value is out of its bounds; None, an option not given, never is."""
    if value is None:
        return
    low, above, high, choices = (bounds.get(key) for key in ("low", "above", "high", "choices"))
    if choices is not None and value not in choices:
        raise UserError(f"{name} {value}: there are {', '.join(choices)}")
    if low is not None and value < low or above is not None and value <= above or (
            high is not None and value > high):  # fmt: skip
        limits = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
        limits += [f"at most {high}"] * (high is not None)
        raise UserError(f"{name} must be {' and '.join(limits)}, not {value}")


def command(app: typer.Typer, settings: type[Settings]) -> Callable:
    """Register `function(settings)` as a command of the app: its options are the fields of the class."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            given = settings(**values)
            given.check()
            if getattr(given, "show_config", False):
                print(json.dumps(given.record(), indent=1))
            else:
                function(given)

        hints = get_type_hints(settings)
        parameters = [parameter(field, hints[field.name]) for field in dataclasses.fields(settings)]
        run.__signature__ = inspect.Signature(sorted(parameters, key=lambda p: p.default is not p.empty))
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command()(run)
        return function

    return register


def parameter(field: dataclasses.Field, kind: Any) -> inspect.Parameter:
    """A field as typer reads it: a parameter annotated with typer's Option or Argument."""
    more = {key: value for key, value in field.metadata.items()
            if key not in ("low", "above", "high", "choices", "name", "resumable", "positional")}
    if field.metadata.get("choices"):
        more["metavar"] = "|".join(field.metadata["choices"])
    name = "--" + option_name(field)
    name += f"/--no-{option_name(field)}" if field.default is True else ""
    info = typer.Argument(**more) if field.metadata.get("positional") else typer.Option(name, **more)
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    default = list(default) if isinstance(default, tuple) else default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default,
                             annotation=Annotated[kind, info])


def preset_callback(path: Path) -> Callable[[typer.Context, str | None], str | None]:
    """The callback of a --preset option: a preset's values become the defaults of this call."""

    def use(ctx: typer.Context, name: str | None) -> str | None:
        presets = read_presets(path)
        if name is not None and name not in presets:
            raise UserError(f"--preset {name}: there are {', '.join(presets)}")
        ctx.default_map = presets.get(name)
        return name

    return use


def read_presets(path: Path) -> dict[str, dict[str, Any]]:
    """Option values by preset: its own table, and what stands above all tables."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    shared = {name: value for name, value in content.items() if not isinstance(value, dict)}
    return {name: shared | table for name, table in content.items() if isinstance(table, dict)}


# ---------------------------------------------------------------- running


def make_app(doc: str) -> typer.Typer:
    return typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=doc)


def run_cli(app: typer.Typer) -> None:
    """Run a chapter's commands. An error of the user is one line on stderr and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (UserError, typer.TyperException, OSError) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        console.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        end_rank(2)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)


def leave(state: Any, code: int = 0) -> None:
    """Barrier, then exit, where there are several ranks. state: Accelerate's."""
    state.wait_for_everyone()
    end_rank(code)


def end_rank(code: int) -> None:
    """End this process if it is one of several ranks, at once: nothing is freed.

    Freed the usual way, a process group waits for gloo's thread, and that thread, still holding a
    tensor, for Python's lock: now and then the process hangs or aborts
    (https://github.com/pytorch/pytorch/issues/56297)."""
    torch = sys.modules.get("torch")  # not imported here: a command without models starts at once
    if torch and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------- printing


def progress_bar() -> Progress:
    """The progress bar of long stages. The last column is filled by `info=`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[info]}"), console=console)


def print_table(title: str, header: list[str], rows: list[list[str]], text_columns: int = 1) -> None:
    """A table on stdout: the first `text_columns` columns flush left, numbers flush right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for index, name in enumerate(header):
        justify = "left" if index < text_columns else "right"
        table.add_column(name, justify=justify, no_wrap=index > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120  # a file or a pipe has no width of its own
    Console(markup=False, highlight=False, width=width).print(table)  # a name may hold [brackets]


def markdown_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
