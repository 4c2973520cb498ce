"""One module a command: it parses, makes one call into exporters, renders, and returns the exit code."""
