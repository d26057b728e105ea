"""Where results and progress are shown: plain text, or colours by rich."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from .demo_view import Character


class Screen(Protocol):
    """The interface to what shows results and progress."""

    def step(self, name: str) -> AbstractContextManager[Any]:
        """Shows that a step is running, for as long as the context lasts."""
        ...

    def line(self, text: str = "") -> None:
        """Shows one line of text."""
        ...

    def table(
        self, title: str, rows: Iterable[Sequence[str]], header: Sequence[str] | None = None
    ) -> None:
        """Shows rows of cells under a title."""
        ...

    def excerpt(self, title: str, lines: Iterable[Sequence[Character]]) -> None:
        """Shows text, and marks what was predicted right."""
        ...


class PlainScreen:
    """Shows plain text, and progress only on a terminal."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if not sys.stdout.isatty():
            yield
            return
        print(f"{name} ...", end="", flush=True)
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            print()
            raise
        print(f" {time.perf_counter() - start:.1f} s")

    def line(self, text: str = "") -> None:
        print(text)

    def table(
        self, title: str, rows: Iterable[Sequence[str]], header: Sequence[str] | None = None
    ) -> None:
        rows = [*([header] if header else []), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(f"{title}\n")
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())

    def excerpt(self, title: str, lines: Iterable[Sequence[Character]]) -> None:
        print(f"{title} (^ predicted right)\n")
        for line in lines:
            print("".join(character.text for character in line).rstrip())
            marks = ("^ "[not character.right] * character.cells for character in line)
            print("".join(marks).rstrip())


class RichScreen:
    """Shows colours, and a spinner with the elapsed time."""

    def __init__(self, console: Any) -> None:
        self.console = console

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            progress.add_task(name, total=None)
            yield

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(
        self, title: str, rows: Iterable[Sequence[str]], header: Sequence[str] | None = None
    ) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = list(rows)
        table = Table(
            title=Text(title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD if header else box.SIMPLE,
            show_header=header is not None,
        )
        for i, name in enumerate(header or rows[0]):
            table.add_column(Text(name), style="cyan" if i == 0 else None)
        for row in rows:
            # A cell such as a file's name may look like markup. Text shows it as it is.
            table.add_row(*map(Text, row))
        self.console.print(table)

    def excerpt(self, title: str, lines: Iterable[Sequence[Character]]) -> None:
        from rich.text import Text

        styles = {True: "bold green", False: "dim red"}
        heading = Text.assemble(
            (title, "bold"), " (", ("right", styles[True]), ", ", ("wrong", styles[False]), ")\n"
        )
        self.console.print(heading)
        for line in lines:
            text = Text()
            for right, characters in itertools.groupby(line, lambda character: character.right):
                text.append("".join(character.text for character in characters), styles[right])
            self.console.print(text, soft_wrap=True)


def open_screen() -> Screen:
    """Opens a rich screen where rich is installed and colours can be seen, else a plain one."""
    try:
        from rich.console import Console
    except ImportError:
        return PlainScreen()
    console = Console()
    if console.is_terminal and console.color_system and not console.no_color:
        return RichScreen(console)
    return PlainScreen()
