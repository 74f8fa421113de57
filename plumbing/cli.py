"""Commands: options made from Settings classes, user errors in one line, progress bars, tables.

Typer alone declares each option in a function's signature; here a dataclass declares it once, for
the command line, config.json, --show-config and the presets."""

import dataclasses
import functools
import inspect
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import typer.core
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn,
                           TimeRemainingColumn)
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, markup=False, emoji=False)  # a path may hold [brackets]


WITH_PASSWORD = re.compile(r"(^|,)\s*https?://[^/?#,]*@", re.IGNORECASE)


class UserError(Exception):
    """An error that the user can fix: printed as one line, exit code 2, no traceback."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a command: a subclass has a field for each, made by `option` or `argument`."""

    def check(self) -> None:
        """Raise UserError for a value out of bounds. Subclasses add checks across options."""
        for field in dataclasses.fields(self):
            name, value = "--" + option_name(field), getattr(self, field.name)
            check_value(name, value, field.metadata)
            if isinstance(value, str) and WITH_PASSWORD.search(value):
                raise UserError(f"{name}: an address with a user name or password would be saved "
                                "and shown; a model server's key goes into OPENAI_API_KEY")

    def unused(self) -> dict[str, str]:
        """Fields that have no effect beside the others, and why: "with --engine bm25". A user who
        gives one is told; a preset's value is left alone. Subclasses add theirs."""
        return {}

    def record(self) -> dict[str, Any]:
        """The settings as JSON-compatible values."""
        return {name: str(value) if isinstance(value, Path) else value
                for name, value in vars(self).items()}


def option(default: Any = MISSING, help: str = "", *, low: float | None = None,
           above: float | None = None, high: float | None = None,
           choices: Collection[str] | None = None, **more: Any) -> Any:
    """A field of a Settings class. Bounds: low <= value, above < value, value <= high, choices.

    more: `name` if the option is not named after the field; `resumable` if a resumed run may change
    it; and arguments of typer.Option."""
    bounds = {"low": low, "above": above, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=bounds | {"help": help} | more)


def argument(help: str) -> Any:
    """A positional field of a Settings class."""
    return dataclasses.field(metadata={"help": help, "positional": True})


@dataclass(frozen=True, kw_only=True)
class CommonSettings(Settings):
    """What most commands share."""

    prompts: Path | None = option(None, "TOML file that rewords templates of data/prompts.toml.")
    seed: int = option(0, "Seed of everything that is drawn.")


def option_name(field: dataclasses.Field) -> str:
    return field.metadata.get("name") or field.name.replace("_", "-")


def unread(reads: Mapping[str, Collection[str] | None], *chosen: str) -> set[str]:
    """Fields that entries of a registry read, but none of the chosen entries. reads: field names by
    entry; None or no entry: not known, so that any may be read."""
    if any(reads.get(name) is None for name in chosen):
        return set()
    of_others = {field for names in reads.values() for field in names or ()}
    return of_others.difference(*(reads[name] for name in chosen))


def check_value(name: str, value: Any, bounds: dict[str, Any]) -> None:
    """Raise UserError if a value is out of bounds. None (option not given) is always accepted."""
    if value is None:
        return
    low, above, high, choices = (bounds.get(key) for key in ("low", "above", "high", "choices"))
    if choices is not None and value not in choices:
        raise UserError(f"{name} {value}: there are {', '.join(choices)}")
    if (low is not None and not value >= low or above is not None and not value > above
            or high is not None and not value <= high):  # so that NaN is out of bounds
        limits = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
        limits += [f"at most {high}"] * (high is not None)
        raise UserError(f"{name} must be {' and '.join(limits)}, not {value}")


def command(app: typer.Typer, settings: type[Settings]) -> Callable:
    """Register `function(settings)` as a command of `app`; its options are the fields."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(function)
        def run(context: typer.Context, **values: Any) -> None:
            given = settings(**values)
            given.check()
            for field in dataclasses.fields(settings):
                optional = not field.metadata.get("positional")
                chosen = context.get_parameter_source(field.name).name == "COMMANDLINE" and optional
                if chosen and (why := given.unused().get(field.name)):
                    raise UserError(f"--{option_name(field)} has no effect {why}")
            if getattr(given, "show_config", False):
                print(json.dumps(given.record(), indent=1))
            else:
                function(given)

        hints = get_type_hints(settings)
        parameters = [parameter(field, hints[field.name]) for field in dataclasses.fields(settings)]
        parameters.sort(key=lambda p: p.default is not p.empty)  # stable; required ones come first
        parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY,
                                            annotation=typer.Context))
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command()(run)
        return function

    return register


def parameter(field: dataclasses.Field, kind: Any) -> inspect.Parameter:
    """A field as Typer reads it: a parameter annotated with typer.Option or typer.Argument."""
    more = {key: value for key, value in field.metadata.items()
            if key not in ("low", "above", "high", "choices", "name", "resumable", "positional")}
    if field.metadata.get("choices"):
        more["metavar"] = "|".join(field.metadata["choices"])
    name = "--" + option_name(field)
    name += f"/--no-{option_name(field)}" if field.default is True else ""
    positional = field.metadata.get("positional")
    info = typer.Argument(**more) if positional else typer.Option(name, **more)
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    default = list(default) if isinstance(default, tuple) else default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default,
                             annotation=Annotated[kind, info])


def preset_callback(path: Path) -> Callable[[typer.Context, str | None], str | None]:
    """Callback of a --preset option: the preset's values become the defaults of this call.

    path: TOML, a table of option values per preset; values above all tables hold for all."""

    def use(ctx: typer.Context, name: str | None) -> str | None:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        presets = {key: table for key, table in content.items() if isinstance(table, dict)}
        shared = {key: value for key, value in content.items() if key not in presets}
        if name is not None and name not in presets:
            raise UserError(f"--preset {name}: there are {', '.join(presets)}")
        ctx.default_map = None if name is None else shared | presets[name]
        return name

    return use


class Command(typer.core.TyperCommand):
    """A command that names all missing options, where Typer's names the first alone."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        options, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException:
            absent = [p.opts[0] if p.opts[0].startswith("-") else p.opts[0].upper()
                      for p in self.params if p.required
                      and p.value_is_missing(p.consume_value(ctx, options)[0])]
            if not absent:
                raise
            raise UserError(f"missing: {', '.join(absent)}") from None


class App(typer.Typer):
    def command(self, *names: Any, **how: Any) -> Callable:
        return super().command(*names, **{"cls": Command} | how)


def make_app(doc: str) -> typer.Typer:
    return App(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=doc,
               rich_markup_mode=None)  # Rich would break the lines of an example


def run_cli(app: typer.Typer) -> None:
    """Run a chapter's commands. A user error is printed as one line on stderr; exit code 2."""
    try:
        code = app(standalone_mode=False) or 0
        if code > 128:  # stopped by a signal
            exit_now(code)
        sys.exit(code)
    except (UserError, typer.TyperException, OSError) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        text = " ".join(text.encode("utf-8", "replace").decode().split())  # one line of Unicode
        if text:  # none where no command was named: the help has been printed
            console.print(f"error: {text}", style="red", markup=False, highlight=False,
                          soft_wrap=True)
        end_rank(2)
        sys.exit(2)
    except typer.Abort:
        exit_now(130)


def leave(state: Any, code: int = 0) -> None:
    """Barrier, then exit, if there are several ranks. state: Accelerate's."""
    state.wait_for_everyone()
    end_rank(code)


def end_rank(code: int) -> None:
    """Exit at once, without freeing anything, if this process is one of several ranks.

    An ordinary exit can hang or abort: destroying the process group waits for gloo's thread, which
    may wait for the GIL to free a tensor (https://github.com/pytorch/pytorch/issues/56297)."""
    torch = sys.modules.get("torch")  # not imported here: a command without models starts fast
    if torch and torch.distributed.is_initialized():
        exit_now(code)


def exit_now(code: int) -> None:
    """Exit without waiting for threads, which may wait for a server."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ProgressLines(Progress):
    """A line a step, of rank 0, where no terminal shows a bar."""

    def __init__(self) -> None:
        super().__init__(disable=True)

    def update(self, task_id: Any, **fields: Any) -> None:
        super().update(task_id, **fields)
        task = next(task for task in self.tasks if task.id == task_id)
        line = f"{task.description} {task.completed:.0f}/{task.total:.0f}  {task.fields['info']}"
        if os.environ.get("RANK", "0") == "0":
            console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def progress_bar() -> Progress:
    """Progress of a long stage. `info=` fills the last column."""
    if not console.is_terminal:
        return ProgressLines()
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                    TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[info]}"),
                    console=console)


def print_table(title: str, header: list[str], rows: list[list[str]],
                text_columns: int = 1) -> None:
    """Print a table on stdout: `text_columns` columns left-aligned, then numbers right-aligned."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1),
                  pad_edge=False)
    for index, name in enumerate(header):
        justify = "left" if index < text_columns else "right"
        table.add_column(name, justify=justify, no_wrap=index > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120  # a file or a pipe has no width
    Console(markup=False, highlight=False, width=width).print(table)  # a name may hold [brackets]


def plain(text: str) -> Text:
    """A text from outside, to be printed as it is: no markup is obeyed, no control character sent.
    """
    return Text("".join(c if c.isprintable() or c == "\n" else " " for c in text))


def markdown_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
