"""`python -m quietstar.train`: train a model to think. Without arguments it runs the embedded default."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from pathlib import Path

        from quietstar.config.commands import parse_train_config
        from quietstar.config.options import check_weights_format
        from quietstar.data.sources import check_training_text
        from quietstar.data.tokenizer import check_tokenizer
        from quietstar.runs.machine import set_up

        config = parse_train_config(argv)
        if config.preset != "textbook":
            check_tokenizer(str(config.model.path))
            check_weights_format(str(config.model.path))
            check_training_text(config.data)
        set_up(config.training)
        if config.training.replay == "auto":
            from quietstar.planning.gpus import known_gpu_here
            from quietstar.planning.plan import with_stage

            config = with_stage(config, known_gpu_here(config.training.device, "training.replay auto"))
            print(f"training.replay: auto is {config.training.replay} here", file=sys.stderr)
        if config.preset == "textbook":
            from quietstar.demos.textbook import run_textbook

            run_textbook(config)
            return
        from quietstar.training.ranks import join_ranks
        from quietstar.training.run import train

        with join_ranks(config.distributed, config.training.device) as ranks:
            result = train(config, ranks=ranks)
        if not ranks.leads:
            return
        print(f"trained {result.steps} steps in {result.seconds:.0f} s: {Path(result.checkpoint)}")
        if result.eval_metrics:
            values = result.eval_metrics
            names = [name for name in ("text_nll", "base_nll", "talk_nll", "gain") if name in values]
            print("held-out text: " + ", ".join(f"{name} {values[name]:.4f}" for name in names))
        if config.training.report:
            print(f"report: {Path(config.output_dir) / 'report.html'}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
