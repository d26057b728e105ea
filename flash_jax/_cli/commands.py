"""The command line: ``python -m flash_jax``."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import time
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from .. import __version__
from .._tiles.tile import BlockSizes
from . import demo as _demo
from . import info as _info

_PROG = "python -m flash_jax"
_EXCERPT_LINES = 8
_EXCERPT_COLUMNS = 100


class Screen(Protocol):
    """Where results and progress go."""

    def step(self, name: str) -> AbstractContextManager[Any]:
        """Shows, inside the ``with``, that this step is running."""
        ...

    def line(self, text: str = "") -> None:
        """One line of text."""
        ...

    def table(
        self, title: str, rows: Iterable[Sequence[str]], header: Sequence[str] | None = None
    ) -> None:
        """Rows of cells under a title."""
        ...

    def excerpt(self, title: str, lines: Iterable[Sequence[_demo.Character]]) -> None:
        """Text, with what was predicted right made visible."""
        ...


class PlainScreen:
    """Plain text; progress only on a terminal."""

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

    def excerpt(self, title: str, lines: Iterable[Sequence[_demo.Character]]) -> None:
        print(f"{title} (^ predicted right)\n")
        for line in lines:
            print("".join(character.text for character in line).rstrip())
            marks = ("^ "[not character.right] * character.cells for character in line)
            print("".join(marks).rstrip())


class RichScreen:
    """Colours and a spinner with the elapsed time."""

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
            # As Text, since a cell such as a file's name may look like markup.
            table.add_row(*map(Text, row))
        self.console.print(table)

    def excerpt(self, title: str, lines: Iterable[Sequence[_demo.Character]]) -> None:
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
    """rich where it is installed and its colours can be seen, else plain text."""
    try:
        from rich.console import Console
    except ImportError:
        return PlainScreen()
    console = Console()
    if console.is_terminal and console.color_system and not console.no_color:
        return RichScreen(console)
    return PlainScreen()


def demo(args: argparse.Namespace, screen: Screen) -> None:
    """Predicts a text's bytes and shows how well and how fast."""
    if args.plot is not None:
        _demo.check_plot(args.plot)
    with screen.step("reading"):
        data = _demo.read_text(args.file, args.max_bytes)
    products = ("float32", "int8") if args.int8 else ("float32",)
    results = _demo.measure(data, args.seed, args.block_size, screen.step, products)
    name, result = Path(args.file).name, results[0]
    if args.plot is not None:
        with screen.step("plotting"):
            _demo.save_plot(result, args.plot, name)
    header = ("", *products) if args.int8 else None
    title = f"Next-byte prediction by attention alone: {name}"
    screen.table(title, _demo.report(results), header)
    columns = min(_EXCERPT_COLUMNS, shutil.get_terminal_size().columns)
    screen.line()
    lines = _demo.last_lines(data, result.right, _EXCERPT_LINES, columns)
    screen.excerpt("The last lines read", lines)
    if args.plot is not None:
        screen.line()
        screen.line(f"accuracy by position: {args.plot}")


def info(args: argparse.Namespace, screen: Screen) -> None:
    """Shows versions, the processor and the tiles chosen for it."""
    screen.table("Versions", _info.versions())
    screen.line()
    screen.table("Processor", _info.hardware())
    screen.line()
    screen.line(_info.VECTOR_HINT)
    screen.line()
    screen.table("Tiles (Q x KV) of FlashAttentionConfig.auto", _info.tiles(), _info.tile_header())


def bench(args: argparse.Namespace, screen: Screen) -> None:
    """Measures cases beside the peers that are installed."""
    from .bench import report
    from .bench.cases import CASES, LENGTHS, of_length
    from .bench.measure import compare_alone

    if args.list:
        screen.table("Cases", [(x.name, x.shape, x.why) for x in CASES.values()])
        return
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        raise _demo.InputError(f"CASE must be one of {', '.join(CASES)}; it is {unknown[0]!r}")
    if args.plot is not None:
        _demo.check_plot(args.plot)
    if args.json is not None:
        _demo.check_writable("--json", args.json)
    screen.table("Measured on", list(report.environment().items()))
    chosen = [CASES[name] for name in args.cases or CASES]
    curve = [of_length(T) for T in LENGTHS] if args.plot is not None else []
    comparisons = []
    for i, case in enumerate([*chosen, *curve], 1):
        with screen.step(f"{case.name} ({i} of {len(chosen) + len(curve)})"):
            comparisons.append(compare_alone(case, args.rounds))
        if i <= len(chosen):
            screen.line()
            screen.table(report.title(case), report.rows(comparisons[-1]), report.HEADER)
    comparisons, curve = comparisons[: len(chosen)], comparisons[len(chosen) :]
    if args.json is not None:
        Path(args.json).write_text(report.as_json(comparisons), encoding="utf-8")
        screen.line(f"every round: {args.json}")
    if args.plot is not None:
        report.save_plot(comparisons, curve, args.plot)
        screen.line(f"figure: {args.plot}")


def integer(least: int, most: int | None = None) -> typing.Callable[[str], int]:
    """A converter of arguments that accepts least..most."""
    range_ = f">= {least}" if most is None else f"in {least}..{most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be an integer {range_}; it is {text!r}")
        return value

    return convert


def block_sizes(text: str) -> BlockSizes:
    """N or Q,KV as positions per tile."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be N or Q,KV, integers >= 1; it is {text!r}")
    return BlockSizes(sizes[0], sizes[-1])


def build_parser() -> argparse.ArgumentParser:
    """The parser; every subcommand sets ``run``, called with its arguments and the screen."""
    parser = argparse.ArgumentParser(prog=_PROG, description="FlashAttention for CPUs in JAX.")
    parser.add_argument("--version", action="version", version=f"flash_jax {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_info(commands)
    _add_bench(commands)
    return parser


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="predict the bytes of a text by attention alone",
        description="Predicts every byte of a text from the bytes before it, by one causal "
        "attention head over random codes, with nothing learned.",
    )
    command.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        default=typing.__file__,
        help="a UTF-8 text (default: typing.py of Python's standard library)",
    )
    command.add_argument(
        "--max-bytes",
        metavar="N",
        type=integer(_demo.MIN_BYTES, _demo.MAX_BYTES),
        default=65536,
        help="read at most this much of it; time grows with the square (default: %(default)s)",
    )
    command.add_argument(
        "--block-size",
        metavar="N|Q,KV",
        type=block_sizes,
        help="positions per tile: queries and keys (default: the fastest known)",
    )
    command.add_argument(
        "--seed",
        metavar="N",
        type=integer(0),
        default=0,
        help="of the random codes (default: %(default)s)",
    )
    command.add_argument(
        "--int8", action="store_true", help="also multiply in 8 bits, and compare the two"
    )
    command.add_argument(
        "--plot", metavar="OUT.png", help="save a figure of the accuracy by position"
    )
    command.set_defaults(run=demo)


def _add_info(commands: Any) -> None:
    command = commands.add_parser(
        "info",
        help="show versions, the processor and the tiles chosen for it",
        description="Shows versions, the processor and the tiles chosen for it.",
    )
    command.set_defaults(run=info)


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed beside jax.nn, PyTorch, ONNX Runtime and OpenVINO",
        description="Measures each case, in a process of its own and in alternating rounds, "
        "beside jax.nn and, where they are installed (pip install -e '.[bench]'), PyTorch, "
        "ONNX Runtime and OpenVINO. "
        "Columns: median time and quartiles; the median ratio to flash_jax within a round; "
        "GFLOP/s of kept pairs, or GB/s of keys and values where reading them is the bound; that "
        "rate's share of XLA's matrix product or of reading as many bytes; temporary memory; "
        "compile time; largest error against float64.",
    )
    command.add_argument("cases", metavar="CASE", nargs="*", help="see --list (default: all)")
    command.add_argument("--list", action="store_true", help="show the cases")
    command.add_argument(
        "--rounds", metavar="N", type=integer(1), default=7, help="default: %(default)s"
    )
    command.add_argument("--json", metavar="OUT.json", help="save every round")
    command.add_argument(
        "--plot", metavar="OUT.png", help="save a figure, with a curve over the length"
    )
    command.set_defaults(run=bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    # A character that the terminal's encoding lacks must not end the program.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="replace")
    try:
        args.run(args, open_screen())
        sys.stdout.flush()
    except _demo.InputError as error:
        print(f"{_PROG} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has left; Python's own flush at exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
