"""The command line: `mwpb-fast COMMAND ...`."""

from mwpb_fast.cli.entry import main as main
