"""Compares runs: `python -m plm.report DIR [DIR...] --output=PATH` writes one HTML page.

Finds every workdir in or below the directories and reads only their JSON files; runs may still be going on.
"""

import sys
from pathlib import Path

from absl import app, flags

from plm.command import BAD_INPUT, complain
from plm.errors import UserError

EXPORTS = ("csv", "md", "svg")

FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string(
        "output", "", "The page; by default report.html in DIR, with several DIRs in the folder you are in."
    )
    flags.DEFINE_list(
        "export", [], "Tables and figures as files beside the page: csv, svg (in PAGE_files/) and md (PAGE.md)."
    )
    flags.DEFINE_bool(
        "table_by_corpus", False, "Tables of its own for each corpus (and protocol), instead of refusing to mix them."
    )


def main(directories: list[str]) -> None:
    """Writes the page (and the exports) and says where they are.

    Raises UserError when nothing is found, corpora are mixed, or the output cannot be written.
    """
    if not directories:
        raise UserError("which runs? python -m plm.report DIR [DIR...]: workdirs, or folders that hold some")
    unknown = sorted(set(FLAGS.export) - set(EXPORTS))
    if unknown:
        raise UserError(f"--export={','.join(unknown)}: choose from {', '.join(EXPORTS)}")
    from plm.reporting import runs

    output = Path(FLAGS.output or (Path(directories[0]) / "report.html" if len(directories) == 1 else "report.html"))
    if output.is_dir():
        output /= "report.html"
    found = runs.find(directories)
    groups = runs.by_corpus(found, separate=FLAGS.table_by_corpus)
    from plm.reporting import page  # matplotlib: bad input is answered before it is loaded

    parts = page.prepare(groups)
    texts = {output: page.html(parts)}
    if "md" in FLAGS.export:
        texts[output.with_suffix(".md")] = page.markdown(parts)
    folder = output.with_name(f"{output.stem}_files")
    texts |= {folder / name: text for name, text in page.files(parts, FLAGS.export).items()}
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


def _parse(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        complain(error)
        sys.exit(BAD_INPUT)


def _guarded(argv: list[str]) -> int:
    try:
        main(argv[1:])
    except UserError as error:
        complain(error)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    _define_flags()
    app.run(_guarded, flags_parser=_parse)
