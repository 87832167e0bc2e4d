"""What a training run will take, found before any weight is loaded: memory, operations, time."""
