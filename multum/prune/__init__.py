"""Pruning: what is cut out for good, and what is set to zero."""

from .channels import Channels

__all__ = ["Channels"]
