"""Frozen-feature evaluation: k-nearest neighbours, linear probe, and the figures made from them."""
