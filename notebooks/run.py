"""Runs the notebooks of this folder, each in a fresh kernel, and leaves the files as they are.

    python notebooks/run.py                           # all of them
    python notebooks/run.py 01_online_softmax         # some of them
    python notebooks/run.py --save docs/notebooks     # with their outputs, for the documentation

Fails if a cell fails, or if a notebook was saved with its outputs.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).resolve().parent
SECONDS_PER_CELL = 300
# A trace makes many objects and hardly any garbage, for which Python looks after every 2000.
IN_THE_KERNEL = "__import__('gc').set_threshold(100_000, 20, 20)"


def saved_results(notebook: nbformat.NotebookNode) -> list[int]:
    """Positions of the cells that hold outputs or an execution count."""
    return [
        i
        for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None)
    ]


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs every cell. The kernel is this Python's own, whatever kernels the user has installed."""
    client = NotebookClient(
        notebook,
        kernel_name=NATIVE_KERNEL_NAME,
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(FOLDER)}},
        extra_arguments=["--log-level=ERROR", f"--IPKernelApp.exec_lines={IN_THE_KERNEL}"],
    )
    client.create_kernel_manager().kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    client.execute()


def problem(path: Path, save: Path | None) -> str | None:
    """What is wrong with a notebook, or None; then ``save`` is the folder for what it came to."""
    notebook = nbformat.read(path, as_version=4)
    if cells := saved_results(notebook):
        return f"cells {cells} have outputs or execution counts; clear them before committing"
    try:
        execute(notebook)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return str(error)
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, save / path.name)
    return None


def main() -> int:
    """Runs the notebooks named on the command line; 1 if there is something wrong with one."""
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    parser = argparse.ArgumentParser(description="Run the notebooks of this folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--save", metavar="FOLDER", type=Path, help="save executed copies there")
    args = parser.parse_args()
    names = [name.removesuffix(".ipynb") for name in args.names] or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no notebook is called {', '.join(unknown)}; there are {', '.join(known)}")
    failed = False
    for name in names:
        begin = time.perf_counter()
        error = problem(known[name], args.save)
        verdict = "failed" if error else "ok"
        print(f"{name}  {time.perf_counter() - begin:.1f} s  {verdict}", flush=True)
        if error:
            failed = True
            print(error, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
