"""One trainer for every method: loop, optimizer, checkpoints, metrics.

`trainer.py` is read first, then `step.py` and `checkpoint.py`; `run.py` puts a run together.
"""
