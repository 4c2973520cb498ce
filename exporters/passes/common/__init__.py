"""What passes share, and no pass of its own name: read written-out arithmetic, raise opsets, tidy, name."""
