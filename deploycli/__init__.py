"""The command line of deploycli: parse, make one call into exporters, render, set the exit code."""
