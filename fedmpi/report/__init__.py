"""The report: one self-contained page about a run, from the files that the run left. It must never know how a run is made."""

from typing import TYPE_CHECKING

from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.report.page import render as render
    from fedmpi.report.page import save as save
    from fedmpi.report.page import write as write
    from fedmpi.report.reading import read as read
    from fedmpi.report.results import show as show

__getattr__ = door(__name__, {**dict.fromkeys(("render", "save", "write"), "page"), "read": "reading", "show": "results"})
