"""Runs every arm of a sweep for every seed: trained from the seed's character model, and measured like the default."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quietstar.config.training import TrainConfig
from quietstar.demos.finished import base_options, of_seed
from quietstar.demos.sweep_report import write_sweep_report
from quietstar.demos.textbook import (
    BASE,
    delete_finished,
    finished_measures,
    has_read,
    held_out_texts,
    in_words,
    read_textbook,
    seed_directory,
    train_arm,
    write_texts,
)
from quietstar.demos.variations import Arm, Sweep
from quietstar.runs.files import RunLock, make_output_dir


def run_sweep(sweep: Sweep) -> None:
    """Runs the arms that are not finished, prints the table, and writes it with the figure to the default's
    `output_dir`.

    The character model of a seed is made once and shared by its arms; the report is written after each seed. With
    `training.resume` off, what the arms of this sweep have written there is deleted first.

    Raises:
        ConfigError: The directory cannot be written to, or another sweep runs in it.
        CheckpointError: Something there was made with other options; then nothing has been changed.
    """
    started = time.monotonic()
    config = sweep.default.config
    out, arms = Path(config.output_dir), sweep.arms()
    first = config.training.seed
    seeds = range(first, first + config.textbook.seeds)
    make_output_dir(out)
    with RunLock(out):
        for seed in seeds:
            if config.training.resume:
                for arm in arms:
                    options = _of_arm(arm, sweep, seed)
                    has_read(options)
                    finished_measures(options)
            else:
                delete_finished(seed_directory(out, seed), [arm.name for arm in arms])
        results: dict[int, dict[str, Mapping[str, Any]]] = {}
        for seed in seeds:
            results[seed] = {arm.name: _run_arm(arm, _of_arm(arm, sweep, seed)) for arm in arms}
            report = write_sweep_report(sweep, results, out)
    print(report)
    print(f"This command took {time.monotonic() - started:.0f} s.")


def _of_arm(arm: Arm, sweep: Sweep, seed: int) -> TrainConfig:
    """Returns the options of an arm for one seed; it shares the seed's character model unless it needs a different
    one.
    """
    directory = seed_directory(Path(sweep.default.config.output_dir), seed)
    own = base_options(arm.config) != base_options(sweep.default.config)
    base = (directory / arm.name if own else directory) / BASE
    plain = replace(arm.config, preset="plain")  # it trains like any other model
    return of_seed(plain, seed, directory / arm.name, base)


def _run_arm(arm: Arm, config: TrainConfig) -> Mapping[str, Any]:
    label = f"seed {config.training.seed}, {arm.name}"
    measures = finished_measures(config)
    if measures is None:
        write_texts(config)
        read_textbook(config)
        measures = train_arm(config, held_out_texts(config), label)
    print(f"{label}: {in_words(measures)}", flush=True)
    return measures
