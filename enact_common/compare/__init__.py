"""Runs side by side: what differs between them, what they reach, what they cost and what they find, as one page."""
