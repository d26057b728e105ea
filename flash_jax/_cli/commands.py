"""Arguments, subcommands and the main function of ``python -m flash_jax``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._tiles.axis import BlockSizes
from .._version import __version__
from . import demo, demo_view, info
from .bench import report
from .bench.available import available
from .bench.cases import CASES, DTYPES, LENGTHS, in_dtypes, of_length, over_devices
from .bench.measure import compare
from .bench.processes import WorkerError
from .inputs import InputError, check_plot, check_writable
from .screen import Screen, open_screen

_PROG = "python -m flash_jax"
_EXCERPT_LINES = 8
_EXCERPT_COLUMNS = 100


def run_demo(args: argparse.Namespace, screen: Screen) -> None:
    """Predicts the bytes of a text, and shows how well and how fast."""
    if args.plot is not None:
        check_plot(args.plot)
    with screen.step("reading"):
        data = demo.read_text(args.file, args.max_bytes)
    products = ("float32", "int8") if args.int8 else ("float32",)
    results = demo.measure(data, args.seed, args.block_size, screen.step, products)
    name, result = Path(args.file).name, results[0]
    if args.plot is not None:
        with screen.step("plotting"):
            demo_view.save_plot(result, args.plot, name)
    header = ("", *products) if args.int8 else None
    title = f"Next-byte prediction by attention alone: {name}"
    screen.table(title, demo_view.report(results), header)
    columns = min(_EXCERPT_COLUMNS, shutil.get_terminal_size().columns)
    screen.line()
    lines = demo_view.last_lines(data, result.right, _EXCERPT_LINES, columns)
    screen.excerpt("The last lines read", lines)
    if args.plot is not None:
        screen.line()
        screen.line(f"accuracy by position: {args.plot}")


def run_info(args: argparse.Namespace, screen: Screen) -> None:
    """Shows versions, the processor and the tiles chosen for it."""
    screen.table("Versions", info.versions())
    screen.line()
    screen.table("Processor", [*info.hardware(), *info.devices_of_jax()])
    screen.line()
    screen.line(info.VECTOR_HINT)
    screen.line()
    screen.table("Tiles (Q x KV) of FlashAttentionConfig.auto", info.tiles(), info.tile_header())


def run_bench(args: argparse.Namespace, screen: Screen) -> int:
    """Measures cases beside the peers that are installed; 1 means that a subject failed."""
    if args.list:
        screen.table("Cases", [(x.name, x.shape, x.why) for x in CASES.values()])
        return 0
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        raise InputError(f"CASE must be one of {', '.join(CASES)}; it is {unknown[0]!r}")
    if args.plot is not None:
        check_plot(args.plot)
    if args.json is not None:
        check_writable("--json", args.json)
    subjects, versions = available(args.torch_python)
    measured_on = report.environment(versions)
    screen.table("Measured on", list(measured_on.items()))
    chosen = [
        over_devices(x, args.devices)
        for name in args.cases or CASES
        for x in in_dtypes(CASES[name], args.dtype)
    ]
    lengths = LENGTHS if args.plot is not None else ()
    curve = [over_devices(in_dtypes(of_length(T), args.dtype)[0], args.devices) for T in lengths]
    comparisons = []
    for i, case in enumerate([*chosen, *curve], 1):
        with screen.step(f"{case.name} ({i} of {len(chosen) + len(curve)})"):
            comparison = compare(case, args.rounds, subjects)
        comparisons.append(comparison)
        if i <= len(chosen):
            screen.line()
            screen.table(report.title(case), report.rows(comparison), report.HEADER)
        for line in report.failures([comparison]):
            screen.line(line)
    measured, curve = comparisons[: len(chosen)], comparisons[len(chosen) :]
    if args.json is not None:
        Path(args.json).write_text(report.as_json(measured, measured_on), encoding="utf-8")
        screen.line(f"every round: {args.json}")
    if args.plot is not None:
        report.save_plot(measured, curve, args.plot)
        screen.line(f"figure: {args.plot}")
    return int(any(x.failures for x in comparisons))


def integer(least: int, most: int | None = None) -> typing.Callable[[str], int]:
    """Makes a converter of arguments that accepts the integers least..most."""
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
    """Converts an argument, N or Q,KV, to positions per tile."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be N or Q,KV, integers >= 1; it is {text!r}")
    return BlockSizes(sizes[0], sizes[-1])


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser. Every subcommand sets ``run``: arguments and a screen to an exit code."""
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
        type=integer(demo.MIN_BYTES, demo.MAX_BYTES),
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
    command.set_defaults(run=run_demo)


def _add_info(commands: Any) -> None:
    command = commands.add_parser(
        "info",
        help="show versions, the processor and the tiles chosen for it",
        description="Shows versions, the processor and the tiles chosen for it.",
    )
    command.set_defaults(run=run_info)


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed beside jax.nn, PyTorch, ONNX Runtime and OpenVINO",
        description="Measures each case beside jax.nn and, where they are installed "
        "(pip install -e '.[bench]'), PyTorch, ONNX Runtime and OpenVINO. Each runs in a process "
        "of its own, in alternating rounds, while all others sleep. "
        "Columns: cores that a process may use; median time of a round and quartiles; "
        "the median ratio to flash_jax within a round; "
        "GFLOP/s of kept pairs, or GB/s of keys and values where reading them is the bound; that "
        "rate's share of XLA's matrix product or of reading as many bytes; temporary memory; "
        "compile time; largest error against float64. "
        "The exit code is 1 if a subject fails or gives a wrong result.",
    )
    command.add_argument("cases", metavar="CASE", nargs="*", help="see --list (default: all)")
    command.add_argument("--list", action="store_true", help="show the cases")
    command.add_argument(
        "--dtype",
        choices=[*DTYPES, "both"],
        default="float32",
        help="of query, key and value; a bfloat16 case is called CASE-bf16 (default: %(default)s)",
    )
    command.add_argument(
        "--devices",
        metavar="N",
        type=integer(1),
        default=1,
        help="CPU devices that JAX's libraries divide the batch over, then heads, then queries; a "
        "case that these do not divide runs on one (default: %(default)s)",
    )
    command.add_argument(
        "--torch-python",
        metavar="PATH",
        help="run PyTorch with this Python, which needs torch and numpy only",
    )
    command.add_argument(
        "--rounds", metavar="N", type=integer(1), default=7, help="default: %(default)s"
    )
    command.add_argument("--json", metavar="OUT.json", help="save every round")
    command.add_argument(
        "--plot", metavar="OUT.png", help="save a figure, with a curve over the length"
    )
    command.set_defaults(run=run_bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
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
        code = args.run(args, open_screen())
        sys.stdout.flush()
    except (InputError, WorkerError) as error:
        print(f"{_PROG} {args.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has left. Python flushes at exit, which would raise the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0
