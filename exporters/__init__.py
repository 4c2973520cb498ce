"""From an eager model to what is deployed. See README.md beside this file."""
