"""What a person sees while a run goes on: a bar in a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[int, Mapping[str, float]], None]
SECONDS_BETWEEN_LINES = 10.0


def _text(values: Mapping[str, float]) -> str:
    """The losses, the total first."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if "loss" in name)


@contextlib.contextmanager
def progress(start: int, steps: int, *, visible: bool = True) -> Iterator[Show]:
    """Shows the steps and losses of a run; gives a function to call with every finished step.

    Args:
        start: steps done before.
        steps: steps of the whole run.
        visible: False on all processes but the first.
    """
    console = Console(stderr=False)
    if not visible:
        yield lambda step, values: None
    elif console.is_terminal:
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as bar:
            task = bar.add_task("", total=steps, completed=start, text="compiling")
            yield lambda step, values: bar.update(task, completed=step, text=_text(values))
    else:
        printed = -SECONDS_BETWEEN_LINES

        def show(step: int, values: Mapping[str, float]) -> None:
            nonlocal printed
            if step == steps or time.monotonic() - printed > SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                print(f"step {step}/{steps}  {_text(values)}", flush=True)

        yield show
