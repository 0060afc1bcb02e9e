"""A progress bar that ends with its block, also when an error leaves a generator half done."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import Progress

T = TypeVar("T")


def counted(progress: Progress, items: Sequence[T], text: str) -> Iterator[T]:
    """Yields the items and shows how many are done on a line of `progress`.

    rich's own track() keeps a thread until its generator is collected, and can deadlock there.
    """
    task = progress.add_task(text, total=len(items))
    for item in items:
        yield item
        progress.advance(task)
