"""The command line that the variants share: types, flags, checks, parser."""
