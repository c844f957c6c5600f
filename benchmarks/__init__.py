"""Benchmarks: how fast it is today, whether that changed, and whether what is promised holds.

Each reports machine and versions beside every number; nothing here decides a test by time. Latency runs on a bundle
through `serving`; modules that import torch (`masks`, `joint_limits`, `learned_masks`) are imported by name.
"""

from benchmarks.latency import LatencyReport, Percentiles, compare_latency, measure_latency
from benchmarks.machine import machine

__all__ = ["LatencyReport", "Percentiles", "compare_latency", "machine", "measure_latency"]
