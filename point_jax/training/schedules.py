"""What changes from step to step, as pure functions of the step, computed on the host in float64.

A schedule is `step -> {name: value}`. The jitted step gets its values as float32 scalars, so a run
that resumes reads the same numbers as one that was never interrupted, and nothing recompiles.
"""

import math
from collections.abc import Callable

from point_jax.training.config import Config

Schedule = Callable[[int], dict[str, float]]


def _half_cosine(start: float, end: float, share: float) -> float:
    """`start` at share 0, `end` at share 1, along half a period of a cosine."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))


def warmup_cosine(
    step: int, total: int, *, start: float, base: float, final: float, warmup: int = 0
) -> float:
    """A straight line from `start` to `base`, then half a cosine from `base` to `final`.

    As in the original's training: the line takes `warmup` steps and reaches `base` on the last of
    them, the cosine starts at `base` again on the next step and would reach `final` at step
    `total`, which is also the value of every later step.

    Args:
        step: updates done so far, from 0.
        total: steps of the run.
        start: value of step 0 when `warmup` is at least 1; otherwise not used.
        base: value at the end of the warm-up.
        final: value after the last step.
        warmup: steps of the straight line; `int(share * total)` in the original's recipes.
    """
    if step >= total:
        return final
    if step < warmup:
        return start + (base - start) * (step / (warmup - 1) if warmup > 1 else 0.0)
    return _half_cosine(base, final, (step - warmup) / (total - warmup))


def one_cycle(
    step: int, total: int, *, pct_start: float, start: float, peak: float, end: float
) -> float:
    """Smith's one-cycle policy (arXiv:1708.07120), two cosine phases as PyTorch's OneCycleLR.

    From `start` to `peak` during the first `pct_start` of the steps, then to `end`, which the last
    step of the run uses. PyTorch counts the peak at the real-valued step `pct_start * total - 1`;
    a run so short that this is not after step 0 has no rising phase (PyTorch divides by zero
    where it is exactly 0).

    Args:
        step: updates done so far, from 0; steps past the end keep the last value.
        total: steps of the run.
        pct_start: share of the steps that rise, between 0 and 1.
        start: value of the first step.
        peak: value at the end of the rising phase.
        end: value of the last step.
    """
    top, last = pct_start * total - 1.0, total - 1.0
    step = min(step, total - 1)
    if step < top:
        return _half_cosine(start, peak, step / top)
    if last <= top:
        return peak
    return _half_cosine(peak, end, (step - top) / (last - top))


def optimizer_schedule(config: Config, total: int) -> Schedule:
    """What AdamW needs: Smith's one cycle, and the weight decay along half a cosine.

    Args:
        config: the whole config; read is `config.optim`.
        total: steps of the run.

    Returns:
        `step -> values` where `step` is the number of updates done so far (0 for the first) and
        the values are `lr` (see `optimizer.layer_scales` for the blocks'), `beta1` (0.95 -> 0.85 ->
        0.95: PyTorch's OneCycle cycles it against the learning rate) and `wd`.
    """
    optim = config.optim
    lr, div = float(optim.lr), float(optim.div)

    def values(step: int) -> dict[str, float]:
        def cycle(start: float, peak: float, end: float) -> float:
            share = optim.pct_start
            return one_cycle(step, total, pct_start=share, start=start, peak=peak, end=end)

        return {
            "lr": cycle(lr / div, lr, lr / div / optim.final_div),
            "beta1": cycle(optim.beta1_high, optim.beta1_low, optim.beta1_high),
            "wd": _glide(step, total, (optim.wd, optim.wd_final)),
        }

    return values


def sonata_schedule(config: Config, total: int) -> Schedule:
    """Everything that Sonata's recipe changes from step to step.

    Args:
        config: the whole config; read are `config.optim` and `config.schedule`.
        total: steps of the run.

    Returns:
        `step -> values`: those of `optimizer_schedule`, `mask_size` (metres), `mask_ratio`,
        `teacher_temp` and `momentum` (of the teacher's moving average).
    """
    schedule = config.schedule
    warmup = int(total * schedule.warmup)
    optimizer = optimizer_schedule(config, total)

    def ramp(step: int, ends: tuple[float, float]) -> float:
        first, last = map(float, ends)
        return warmup_cosine(step, total, start=first, base=last, final=last, warmup=warmup)

    def values(step: int) -> dict[str, float]:
        return {
            **optimizer(step),
            "mask_size": ramp(step, schedule.mask_size),
            "mask_ratio": ramp(step, schedule.mask_ratio),
            "teacher_temp": ramp(step, schedule.teacher_temp),
            "momentum": _glide(step, total, schedule.momentum),
        }

    return values


def _glide(step: int, total: int, ends: tuple[float, float]) -> float:
    """Along half a cosine over the whole run."""
    first, last = map(float, ends)
    return warmup_cosine(step, total, start=first, base=first, final=last)
