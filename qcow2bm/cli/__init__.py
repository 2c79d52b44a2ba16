"""The command line: parses words, calls the public API, prints what it answers."""
