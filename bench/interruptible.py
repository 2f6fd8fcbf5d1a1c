"""A plugin for pytest: SIGTERM ends a session as Ctrl-C does, and so its report is written."""

import signal

signal.signal(signal.SIGTERM, signal.default_int_handler)
