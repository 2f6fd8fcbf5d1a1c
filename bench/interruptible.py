"""A plugin for pytest: SIGTERM ends a session as Ctrl-C does, and so its report is written; in it the tests that
came to their end are marked."""

import signal

import pytest

signal.signal(signal.SIGTERM, signal.default_int_handler)
FINISHED = "finished"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        report.user_properties.append((FINISHED, True))
