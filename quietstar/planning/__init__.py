"""What a training run will take, before any weight is loaded: memory, operations, time."""
