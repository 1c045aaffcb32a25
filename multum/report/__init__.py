"""What a result looks like: the HTML page and the tables of the terminal."""

from .catalog import catalog
from .page import report

__all__ = ["catalog", "report"]
