"""The report of a comparison: one HTML page that opens without a network, a server or anything beside it."""

from nnunet_conres.evaluation.report.page import REPORT_FORMAT, report_page

__all__ = ["REPORT_FORMAT", "report_page"]
