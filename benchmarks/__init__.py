"""Benchmarks: how fast a decision is today, and whether that changed.

They run on a bundle through `serving`, never on training code, and report machine, versions and bundle hash beside
every number. Nothing here decides a test by time.
"""

from benchmarks.latency import LatencyReport, Percentiles, compare_latency, measure_latency
from benchmarks.machine import machine

__all__ = ["LatencyReport", "Percentiles", "compare_latency", "machine", "measure_latency"]
