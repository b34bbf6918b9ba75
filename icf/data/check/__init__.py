"""The validator: what is wrong with a data set on disk, file by file, before a run stumbles over it."""
from icf.data.check.dataset import check
from icf.data.check.findings import CHECKS, LEVELS, Finding
from icf.data.check.report import Report

__all__ = ["CHECKS", "LEVELS", "Finding", "Report", "check"]
