"""One trainer for every method: loop, optimizer, checkpoints, metrics."""
