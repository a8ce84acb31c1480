"""The report of a comparison: one HTML file that opens without a network, a server or anything beside it."""

from nnunet_conres.evaluation.report.cases import CaseVolumes
from nnunet_conres.evaluation.report.page import REPORT_FORMAT, write_report

__all__ = ["REPORT_FORMAT", "CaseVolumes", "write_report"]
