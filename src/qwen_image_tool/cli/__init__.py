"""The command line: it translates words to a Request and events to lines, and decides nothing."""

from qwen_image_tool.cli.commands import main

__all__ = ["main"]
