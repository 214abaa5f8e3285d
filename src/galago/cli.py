"""The command line: `galago train | ship | check | measure | trust | export | verify | report | inspect | methods`.

Nothing heavy is imported until a command is chosen, so that `galago --help` answers at once. Each command is a typed
function of `galago.commands`; its docstring and signature are its help.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a recipe; given again, continue where it stopped",
    "ship": "train, export, verify, measure and report, with all that the recipe needs",
    "check": "say what a recipe would do, layer by layer, before training",
    "measure": "measure a run's model, or the file made from it",
    "trust": "measure calibration, robustness and unknown images: before, after, and in the files",
    "export": "write a run's model as integer files for ONNX Runtime and OpenVINO",
    "verify": "prove that the files equal the trained model",
    "report": "write a run's report as one page of HTML",
    "inspect": "say which layers of a file run as integers in each engine",
    "methods": "list every published method, with paper, kind and recipe",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0 when it worked, 1 when a check failed, 2 when the user has something to mend."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    if given[0] in ("-V", "--version"):
        from galago import __version__

        print(f"galago {__version__}")
        return 0
    if given[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        return complain(
            f"there is no command {given[0]!r}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        )
    return run(given[0], given[1:])


def overview() -> str:
    """The first page of help."""
    lines = [f"  {name:<9} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: galago COMMAND [--help] [options]",
            "",
            "Train, shrink and ship compact vision networks that you can trust.",
            "",
            *lines,
            "",
            "Start with: galago ship --config recipes/demo/student.yaml",
        ]
    )


def run(command: str, arguments: Sequence[str]) -> int:
    """Imports and runs one command; what a user can mend is said in a line or two."""
    from galago.errors import UserError

    try:
        from galago import commands

        return commands.run(command, arguments)
    except UserError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain("stopped; the same command goes on from the last checkpoint", code=130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is wrong
        return 0
    except OSError as error:
        return complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Exception as error:
        if os.environ.get("GALAGO_TRACEBACK"):
            raise
        what = " ".join(str(error).split())[:300]
        return complain(f"{type(error).__name__}: {what}\n(set GALAGO_TRACEBACK=1 to see where)", code=2)


def complain(message: str, code: int = 2) -> int:
    """Says what is wrong on standard error."""
    print(f"galago: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
