"""Options with their bounds, presets, and the way from a command line and YAML to a tree of options; torch-free."""
