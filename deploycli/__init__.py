"""The command line: parse, make one call into exporters, render, set the exit code.

One more command is a module in `commands`, and its name in `cli.COMMANDS`. Only `console` knows rich.
"""
