"""Runs the notebooks from top to bottom, each in a fresh kernel, as a reader would.

    python .ci/notebooks.py [FILE ...]             checks them: what they print is thrown away
    python .ci/notebooks.py --write [FILE ...]     stores what they print in them

Then tiny_ldm.py itself, cell by cell (`# %%`), of which those called "Look" must show something,
and a picture with what they have defined.

A cell with the tag "exercise" has a line to fill in, the cell after it checks that, and the next
text has the answer. All three run: the check must say that the cell as it stands is "not filled
in", and of the answer that it is "right". What is stored is the second.

A notebook fails if a cell raises or writes to stderr (a warning of deprecation in our own code, a
progress bar), if it takes more than 3 minutes, or, when checking, if the stored outputs are stale:
cells not run in order, or with other kinds of output (picture, text) than now.
"""
import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from PIL import Image
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

LIMIT = 180    # seconds for one notebook on 2 cores


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell shows, as the reader sees it: text, picture, ..."""
    found = []
    for output in cell.outputs:
        data = output.get("data", {})
        kind = "text"
        if any(mime.startswith("image/") for mime in data):
            kind = "picture"
        elif "text/html" in data:
            kind = "html"
        if found[-1:] != [kind] or kind == "picture":     # text may come in several pieces
            found.append(kind)
    return found


def complaints(cell: nbformat.NotebookNode, with_bars: bool) -> list[str]:
    """What a cell writes to stderr; progress bars are left out unless with_bars."""
    texts = [output.text for output in cell.outputs if output.get("name") == "stderr"]
    if not with_bars:
        texts = [re.sub(r"\r[^\r\n]*", "", text) for text in texts]
    return [text.strip()[:500] for text in texts if text.strip()]


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell prints, which may come in pieces."""
    return "".join(output.get("text", "") for output in cell.outputs)


def with_answers(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells in the order in which they run: after each exercise its check, then the answer in
    place of the exercise, which the check that is stored judges."""
    cells = []
    for i, cell in enumerate(book.cells):
        cells.append(cell)
        if "exercise" in cell.metadata.get("tags", ()):
            answer = re.search(r"<summary>Answer</summary>\s*```python\n(.*?)```",
                               book.cells[i + 2].source, re.S)
            cells += [nbformat.v4.new_code_cell(book.cells[i + 1].source, metadata={"run": "once"}),
                      nbformat.v4.new_code_cell(answer[1], metadata={"run": "once"})]
    return cells


def exercises(cells: list[nbformat.NotebookNode]) -> list[str]:
    """What is wrong with the exercises, of cells that have run; takes the added cells out."""
    wrong = []
    for i, cell in enumerate(cells):
        if "exercise" in cell.metadata.get("tags", ()):
            name = cells[i - 1].source.splitlines()[0]
            if "not filled in" not in text_of(cells[i + 1]):
                wrong.append(f"{name}: unfilled, the check says {text_of(cells[i + 1])!r}")
            if text_of(cells[i + 3]).split("\n")[-2:] != ["right", ""]:
                wrong.append(f"{name}: of the answer the check says {text_of(cells[i + 3])!r}")
    cells[:] = [cell for cell in cells if "run" not in cell.metadata]
    codes = (cell for cell in cells if cell.cell_type == "code")
    for number, cell in enumerate(codes, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    return wrong


def shrink(cell: nbformat.NotebookNode) -> None:
    """Stores pictures with a palette of 256 colours: half of the bytes, and they look the same."""
    for output in cell.get("outputs", ()):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            small = io.BytesIO()
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                small, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def check(path: Path, write: bool, with_bars: bool = True) -> list[str]:
    """Runs one notebook; returns what is wrong with it. A progress bar is wrong if with_bars."""
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    fresh.cells = with_answers(fresh)
    began = time.monotonic()
    try:
        NotebookClient(fresh, timeout=600, kernel_name="python3",
                       resources={"metadata": {"path": str(path.parent)}}).execute()
    except CellExecutionError as e:
        return [str(e)]
    seconds = time.monotonic() - began
    wrong = exercises(fresh.cells)
    old, new = ([c for c in book.cells if c.cell_type == "code"] for book in (stored, fresh))
    for number, (was, now) in enumerate(zip(old, new), 1):
        for text in complaints(now, with_bars):
            wrong.append(f"cell {number} writes to stderr: {text}")
        if not write and (was.execution_count != number or kinds(was) != kinds(now)):
            wrong.append(f"cell {number}: the stored output is stale ({kinds(was)}, now "
                         f"{kinds(now)}); run with --write")
    if seconds > LIMIT:
        wrong.append(f"took {seconds:.0f} s, more than {LIMIT}")
    if write and not wrong:
        for cell in fresh.cells:
            cell.metadata.pop("execution", None)          # times of day change with every run
            shrink(cell)
        fresh.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                         "language": "python"},
                          "language_info": {"name": "python"}}
        nbformat.write(fresh, path)
    print(f"{path.name}: {seconds:.0f} s", "" if not wrong else "WRONG", flush=True)
    return wrong


def check_the_file(path: Path) -> list[str]:
    """Runs a .py file with cells as the notebook that Jupyter makes of it."""
    cells = [*re.split(r"(?m)^(?=# %%)", path.read_text()), "from IPython.display import display",
             'display(*LatentDiffusion.load().generate("a red circle", steps=2, progress=False))']
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".ipynb") as file:
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        nbformat.write(book, file.name)
        wrong = check(Path(file.name), write=True, with_bars=False)
        if wrong:
            return wrong
        book = nbformat.read(file.name, 4)
    for number, cell in enumerate(book.cells, 1):
        if cell.source.startswith("# %% Look") and not cell.outputs:
            wrong.append(f"cell {number} shows nothing: {cell.source.splitlines()[0]}")
    if "picture" not in kinds(book.cells[-1]):
        wrong.append("no picture comes of its cells")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args()
    # Deprecation in a library's own code is the library's; in ours it is shown, so it fails.
    shown = [f"default::{kind}:{module}" for module in ("__main__", "tiny_ldm", "weights_convert")
             for kind in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning")]
    os.environ["PYTHONWARNINGS"] = ",".join(shown)
    files = args.files or sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
    wrong = [(path.name, line) for path in files for line in check(path.resolve(), args.write)]
    if not args.files:
        file = Path(__file__).resolve().parents[1] / "tiny_ldm.py"
        wrong += [(file.name, line) for line in check_the_file(file)]
    for name, line in wrong:
        print(f"{name}: {line}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
