"""Problems, prompts, hints and answer checks."""
