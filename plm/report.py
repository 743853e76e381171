"""Compares runs: `python -m plm.report DIR [DIR...] --output=PATH` writes one HTML page.

    python -m plm.report runs/demo                                  # runs beside each other
    python -m plm.report runs/b5 runs/g5 --export=csv,tex,svg       # ablations: the papers' tables, ours beside theirs
    python -m plm.report runs/b5 --bundle=b5.tar                    # all that the page is made of, for others
    python -m plm.report b5.tar                                     # and the page again, anywhere

Finds every workdir and every study of a sweep in or below the directories and reads only their JSON files; runs may
still be going on.
"""

import os
import tempfile
from pathlib import Path

from absl import flags
from etils import epath

from plm import command
from plm.errors import UserError

EXPORTS = ("csv", "md", "svg", "tex")


def main(directories: list[str]) -> None:
    """Writes the page (and the exports) and says where they are.

    Raises UserError when nothing is found, corpora are mixed, or the output cannot be written.
    """
    values = flags.FLAGS
    if not directories:
        raise UserError("which runs? python -m plm.report DIR [DIR...]: workdirs, or folders that hold some")
    unknown = sorted(set(values.export) - set(EXPORTS))
    if unknown:
        raise UserError(f"--export={','.join(unknown)}: choose from {', '.join(EXPORTS)}")
    output = epath.Path(values.output or (_beside(directories[0]) if len(directories) == 1 else "report.html"))
    if output.is_dir():
        output /= "report.html"
    with tempfile.TemporaryDirectory() as unpacked:
        places = [Path(unpacked) / str(number) for number in range(len(directories))]
        _write([_folder(*one) for one in zip(directories, places, strict=True)], output, values)


def _beside(directory: str) -> epath.Path:
    path = epath.Path(directory)
    return path.with_suffix(".html") if directory.endswith(".tar") else path / "report.html"


def _folder(directory: str, unpacked: Path) -> str:
    """A directory by its one name, so that no run is found by two; of a bundle where it is unpacked."""
    if directory.endswith(".tar"):
        from plm.reporting import bundle

        folder = unpacked / Path(directory).stem
        bundle.unpack(Path(directory), folder)
        return str(folder)
    if "://" in directory or not os.path.isdir(directory):
        return directory
    folder = os.path.realpath(directory)
    return folder if os.path.isabs(directory) else os.path.relpath(folder)


def _write(directories: list[str], output: epath.Path, values: flags.FlagValues) -> None:
    from plm.reporting import bundle, runs, studies

    results = {folder: studies.Results(study) for folder, study in studies.find(directories).items()}
    found = runs.find(directories, may_be_none=bool(results))
    places = {cell.place for one in results.values() for cells in one.study.cells.values() for cell in cells}
    models = {model for one in results.values() for model in one.study.models}
    found += runs.elsewhere(sorted((places | models) - {run.path for run in found}))
    on_tasks = [run for run in found if run.is_task and run.path in places]
    groups = runs.by_corpus(
        [run for run in found if run not in on_tasks], separate=values.table_by_corpus or bool(results)
    )
    from plm.reporting import page  # matplotlib: bad input is answered before it is loaded

    parts = page.prepare(groups, list(results.values()), on_tasks)
    texts = {output: page.html(parts)}
    if "md" in values.export:
        texts[output.with_suffix(".md")] = page.markdown(parts)
    folder = output.with_name(f"{output.stem}_files")
    texts |= {folder / name: text for name, text in page.files(parts, values.export).items()}
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise UserError(f"--output={output}: cannot write {path}: {error.strerror or error}") from error
    if values.bundle:
        n = bundle.write(epath.Path(values.bundle), [*(run.path for run in found), *results])
        print(f"{n:,} files: {values.bundle}")
    complete = sum(run.complete for run in found)
    print(f"{len(found)} runs ({complete} complete): {output}")
    for path in list(texts)[1:]:
        print(f"  {path}")


if __name__ == "__main__":
    flags.DEFINE_string("output", "", "the page; by default report.html in DIR, with several DIRs in this folder")
    flags.DEFINE_list("export", [], "beside the page: csv, tex, svg (in PAGE_files/) and md (PAGE.md)")
    flags.DEFINE_string("bundle", "", "a tar file of all that the page is made of, which plm.report reads again")
    flags.DEFINE_bool("table_by_corpus", False, "tables of its own for each corpus (and protocol) instead of an error")
    command.run(main, positional=True)
