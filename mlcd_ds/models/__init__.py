"""Backbones and their conversion to the layouts that other libraries load. Pure torch: no ranks, no IO."""
