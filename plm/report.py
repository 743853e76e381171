"""Compares runs: `python -m plm.report DIR [DIR...] --output=PATH` writes one HTML page.

Finds every workdir in or below the directories and reads only their JSON files; runs may still be going on.
"""

from pathlib import Path

from absl import flags

from plm import command
from plm.errors import UserError

EXPORTS = ("csv", "md", "svg")


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
    from plm.reporting import runs

    output = Path(values.output or (Path(directories[0]) / "report.html" if len(directories) == 1 else "report.html"))
    if output.is_dir():
        output /= "report.html"
    found = runs.find(directories)
    groups = runs.by_corpus(found, separate=values.table_by_corpus)
    from plm.reporting import page  # matplotlib: bad input is answered before it is loaded

    parts = page.prepare(groups)
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
            raise UserError(f"--output={output}: cannot write {path}: {error.strerror}") from error
    complete = sum(run.complete for run in found)
    print(f"{len(found)} runs ({complete} complete): {output}")
    for path in list(texts)[1:]:
        print(f"  {path}")


if __name__ == "__main__":
    flags.DEFINE_string("output", "", "the page; by default report.html in DIR, with several DIRs in this folder")
    flags.DEFINE_list("export", [], "tables and figures beside the page: csv, svg (in PAGE_files/) and md (PAGE.md)")
    flags.DEFINE_bool("table_by_corpus", False, "tables of its own for each corpus (and protocol) instead of an error")
    command.run(main, positional=True)
