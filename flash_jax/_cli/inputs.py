"""The error for input that cannot be worked with, and checks of the files to be written."""

from __future__ import annotations

from pathlib import Path

_PLOT_KINDS = (".png", ".svg", ".pdf")


class InputError(Exception):
    """Input that cannot be worked with; the message is one line for the user."""


def check_plot(path: str) -> None:
    """Checks that a figure can be saved, before the work that it shows is done.

    Raises:
        InputError: the format is unknown, matplotlib is missing, or the file can't be written.
    """
    if Path(path).suffix.lower() not in _PLOT_KINDS:
        raise InputError(f"--plot must end in one of {', '.join(_PLOT_KINDS)}; it is {path!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = "--plot needs matplotlib, which is missing: pip install -e '.[plot]'"
        raise InputError(message) from error
    check_writable("--plot", path)


def check_writable(option: str, path: str) -> None:
    """Checks that an option's file can be written, and leaves no new file behind.

    Raises:
        InputError: the file can't be written.
    """
    file = Path(path)
    try:
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option} must be a writable file; {path!r}: {reason}") from error
