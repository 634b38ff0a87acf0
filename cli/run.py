"""How every verb runs: errors become one line and an exit code that means something.

0 all well · 2 the command makes no sense · 3 some slides failed · 4 all slides failed · 5 this machine cannot do the work
· 130 stopped by Ctrl-C · 143 stopped by SIGTERM
"""

import logging
import signal
import sys
from types import FrameType

import click

from wsi.errors import EnvironmentFaultError, StoreCorruptError, WsiError

__all__ = ["EXIT_CODES", "Terminated", "run"]

EXIT_CODES = __doc__.split("\n\n", 1)[1].replace("\n", " ")


class Terminated(BaseException):
    """SIGTERM: like Ctrl-C, it may come anywhere and nothing but the way out handles it."""


def run(command: click.Command, name: str) -> None:
    """Run a command and leave the process with its exit code."""
    # tifffile logs every odd tag, and without a handler Python prints that; what matters comes as an error of ours.
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run(command, name))


def _run(command: click.Command, name: str) -> int:
    try:
        result = command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _say("stopped; run the same command again to go on", 130)
    except Terminated:
        return _say("stopped by SIGTERM; run the same command again to go on", 143)
    except EnvironmentFaultError as error:
        return _say(str(error), 5, error.code)
    except StoreCorruptError as error:
        return _say(str(error), 3, error.code)
    except WsiError as error:  # whatever else it is, it is about what was named on the command line
        return _say(str(error), 2, error.code)
    except BrokenPipeError:
        return 0  # the reader of a pipe, such as head, has seen enough
    return result if isinstance(result, int) else 0


def _say(message: str, exit_code: int, code: str | None = None) -> int:
    click.echo(f"{code}: {message}" if code else message, err=True)
    return exit_code


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
