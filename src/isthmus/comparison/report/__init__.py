"""The report: one self-contained HTML page with scores, curves, samples and how they came about."""

from isthmus.comparison.report.chart import Chart
from isthmus.comparison.report.page import Answer, Listing, Note, Report, SamplePicture, TrainedPart, write_report

__all__ = ["Answer", "Chart", "Listing", "Note", "Report", "SamplePicture", "TrainedPart", "write_report"]
