"""One `get_config(arg)` per experiment family; `arg` picks size, data or protocol."""
