"""A self-contained HTML page about a run: was the prior broken, and was it mended?"""

from ncprior.report.build import write_report
from ncprior.report.pictures import grid

__all__ = ["grid", "write_report"]
