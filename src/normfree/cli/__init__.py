"""The command line: parse words, call, print."""
