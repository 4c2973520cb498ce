"""What `exporters.bench` is made of: candidates, the clock, figures, requirements."""
