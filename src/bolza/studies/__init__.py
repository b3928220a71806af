"""Studies: one file a paper, its claim run on data we ship, expected beside measured.

``bolza reproduce`` lists them, ``bolza reproduce KEY`` runs one.

Example:
    >>> from bolza.studies import get
    >>> get("liu2019_review").reference.year
    2019
"""

from bolza.studies._study import Row, Study, StudyFailure, StudyResult, get, run_all, studies

__all__ = ["Row", "Study", "StudyFailure", "StudyResult", "get", "run_all", "studies"]
