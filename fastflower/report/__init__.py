"""The report of one or several experiments: HTML page, Markdown and their charts."""
