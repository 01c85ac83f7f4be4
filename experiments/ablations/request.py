"""What a command line asks for: which ablation, which seeds, which part of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.ablations import store
from experiments.ablations.catalogue import MAKERS, find
from experiments.ablations.definition import MAX_SEED, SEED, Ablation, record
from experiments.ablations.fields import near, show
from experiments.common.command import Refusal, refusing
from jaxdiff import files


def resolve(name: str, preset: str, seeds: int | None, seed: int | None) -> Ablation:
    """Return the ablation that is asked for, or refuse it before anything trains."""
    with refusing(ValueError, TypeError):
        ablation = find(name, preset)
        if seeds is not None and seeds < 1:
            raise Refusal(f"--seeds must be at least 1; got {seeds}.")
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise Refusal(f"--seed must be at least 0 and at most {MAX_SEED}; got {seed}.")
        if seeds is not None or seed is not None:
            axes = {f: v for f, v in ablation.axes.items() if f != SEED}
            first = ablation.base.seed if seed is None else seed
            ablation = dataclasses.replace(
                ablation,
                base=dataclasses.replace(ablation.base, seed=first),
                axes=axes,
                seeds=seeds or len(ablation.seed_values),
            )
    ablation.check()
    return ablation


def reopen(directory: files.Path, definition: str | None) -> tuple[dict[str, Any], Ablation]:
    """Return what a folder is locked for, as a record and as an ablation of today's code.

    No module is imported because a folder names it: one of the catalogue is found by its name, any
    other is where `definition` says, which who asks has given.

    Raises:
        Refusal: if the folder holds none, or not that one.
    """
    resolved = store.require_lock(directory)
    name = resolved["name"] if definition is None else definition
    if name not in MAKERS and definition is None:
        raise Refusal(
            f"{directory} holds {name}, which is not of the catalogue. What a folder names is not "
            f"run; say it yourself: --definition {name}"
        )
    with refusing(ValueError, TypeError):
        ablation = find(name, resolved["preset"])
        seeds, axes = resolved["seeds"], {f: v for f, v in ablation.axes.items() if f != SEED}
        ablation = dataclasses.replace(
            ablation,
            base=dataclasses.replace(ablation.base, seed=seeds[0]),
            axes=axes | {SEED: seeds},
            seeds=len(seeds),
        )
    asked = record(resolved["name"], resolved["preset"], ablation)
    return resolved, store.as_there(directory, resolved, asked, ablation)


def parse_only(ablation: Ablation, only: Sequence[str]) -> dict[str, list[Any]]:
    """Return the asked values by axis; refuse an axis or a value that there is not."""
    axes = {**ablation.varied, SEED: ablation.seed_values}
    asked: dict[str, list[Any]] = {}
    for each in only:
        field, equals, text = each.partition("=")
        if not equals:
            raise Refusal(f"--only takes AXIS=VALUE; got {each}.")
        if field not in axes:
            raise Refusal(
                f"--only {each}: there is no axis {field}; {near(field, axes)} "
                f"Axes: {', '.join(axes)}."
            )
        matching = [value for value in axes[field] if text in (show(value), str(value))]
        if not matching:
            values = [show(value) for value in axes[field]]
            raise Refusal(
                f"--only {each}: axis {field} has no value {text}; {near(text, values)} "
                f"Values: {', '.join(values)}."
            )
        asked.setdefault(field, []).extend(matching)
    return asked


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of i/n."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 0 < int(count) >= int(index)):
        raise Refusal(f"--shard must be i/n with i in 0..n-1 or in 1..n; got {text}.")
    return int(index), int(count)
