"""What `mlcd evaluate` measures: a file a protocol, each a function that gives an `Outcome`."""
