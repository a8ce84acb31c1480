"""The report of a comparison: a single HTML page that needs no network, no server and no other files."""

from nnunet_conres.evaluation.report.page import REPORT_FORMAT, report_page

__all__ = ["REPORT_FORMAT", "report_page"]
