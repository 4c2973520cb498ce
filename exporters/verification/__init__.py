"""Whether two models compute the same. See README.md beside this file."""
