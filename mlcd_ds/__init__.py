"""Multi-label cluster discrimination (MLCD, arXiv 2407.17331) at LAION scale, on DeepSpeed."""

__version__ = "0.1.0"
