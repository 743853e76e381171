"""What every command shares: flags, one line for bad input, exit codes."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from plm.errors import UserError

BAD_INPUT = 2
INTERRUPTED = 75  # sysexits.h: EX_TEMPFAIL. A run that was told to stop and saved itself: start it again.


def is_failure(code: int) -> bool:
    """Whether a process that left with this code failed. A signal (as Python or a shell tells it), or a stop with
    everything saved, is an interruption."""
    return 0 < code <= 128 and code != INTERRUPTED


def complain(message: object) -> None:
    """Prints one line, whatever line breaks the message holds."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)


def run(main: Callable[..., int | None], *, required: tuple[str, ...] = (), positional: bool = False) -> None:
    """Parses the flags, calls `main()`, or with `positional` `main(arguments)`, and exits.

    A `UserError`, an unknown or ill-typed flag, a missing `required` flag or a stray positional argument prints one
    line and exits with 2; any other exception keeps its traceback.
    """

    def parse(argv: list[str]) -> list[str]:
        for module, own in flags.FLAGS.flags_by_module_dict().items():
            for flag in own if not module.startswith("absl") else ():  # else --help has those of one file only
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
        try:
            rest = flags.FLAGS(argv)
            if len(rest) > 1 and not positional:
                raise UserError(
                    f"unexpected argument {rest[1]!r}: values are given as flags, for example --config.seed=1"
                )
            missing = [f"--{name}" for name in required if flags.FLAGS[name].value in (None, "")]
            if missing:
                raise UserError(f"{', '.join(missing)} must be given; --help lists every flag")
        except (UserError, flags.Error) as error:
            complain(error)
            sys.exit(BAD_INPUT)
        return rest

    def guarded(argv: list[str]) -> int | None:
        try:
            return main(argv[1:]) if positional else main()
        except UserError as error:
            complain(error)
            return BAD_INPUT
        except ImportError as error:
            if not _is_of_a_bucket(error):
                raise
            complain(f"{error} (gs:// needs `pip install -c constraints.txt gcsfs`)")
            return BAD_INPUT

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def _is_of_a_bucket(error: ImportError) -> bool:
    """Whether fsspec says that the package of a file system is missing."""
    registry = sys.modules.get("fsspec.registry")
    return registry is not None and str(error) in {one.get("err") for one in registry.known_implementations.values()}
