"""A command's flags: whole names, each value given once."""

import argparse
from typing import Any


class _Once(argparse.Action):
    """Keeps a flag's value; given twice, the flag is an error."""

    seen = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.seen:
            parser.error(f"{option_string} is given twice")
        self.seen = True
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Where argparse would take half a name for a flag, or the last of two values, it is an error.

    A command uses one for one command line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As of `argparse.ArgumentParser`."""
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.register("action", None, _Once)
