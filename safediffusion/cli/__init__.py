"""The command. Heavy libraries are imported inside each command, so that `--help` is quick."""
