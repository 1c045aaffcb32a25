"""Where a network's parameters, MACs, bytes and milliseconds are; and what a difference of scores means."""

from .groups import groups
from .latency import Latencies
from .profile import Analysis, Row, analyze

__all__ = ["Analysis", "Latencies", "Row", "analyze", "groups"]
