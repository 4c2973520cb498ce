"""The command line: parse, make one call into exporters, render, set the exit code. See README.md beside this file."""
