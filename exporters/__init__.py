"""From an nn.Module to a proven artifact: trace, rewrite, bundle, verify."""
