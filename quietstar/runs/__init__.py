"""The files of a run's directory, its checkpoints, and the machine that it runs on; importing these needs no torch."""
